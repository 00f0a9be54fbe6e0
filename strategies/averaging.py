"""Weighted averages of vectors, in client order, so that a sum has one order of additions."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def shares(examples: Sequence[int], weighting: str) -> list[float]:
    """Return each client's weight: its share of the examples, or the same for all; they sum to one."""
    if weighting == "uniform":
        return [1 / len(examples)] * len(examples)
    return [n / sum(examples) for n in examples]


def average(vectors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return ``sum_k w_k v_k`` for vectors ``[P]``, added one after another."""
    total = torch.zeros_like(vectors[0])
    for vector, weight in zip(vectors, weights, strict=True):
        total.add_(vector, alpha=weight)
    return total
