"""Averages of vectors, in client order, so that a sum has one order of additions; and what can take their place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean

from fedkd.config import AggregationSection

MEAN = AggregationSection()


def shares(examples: Sequence[int], weighting: str) -> list[float]:
    """Return each client's weight: its share of the examples, or the same for all; they sum to one."""
    if weighting == "uniform":
        return [1 / len(examples)] * len(examples)
    return [n / sum(examples) for n in examples]


def average(
    vectors: Sequence[torch.Tensor], weights: Sequence[float], aggregation: AggregationSection = MEAN
) -> torch.Tensor:
    """Return ``sum_k w_k v_k`` for vectors ``[P]``, added one after another, or what takes its place.

    Args:
        vectors: one per client.
        weights: theirs; median and trimmed mean (Yin et al. 2018) know none.
        aggregation: the run's settings, where these vectors are the clients' models.
    """
    if aggregation.rule == "median":
        return torch.from_numpy(np.median(torch.stack(list(vectors)).numpy(), axis=0))
    if aggregation.rule == "trimmed-mean":
        return torch.from_numpy(trim_mean(torch.stack(list(vectors)).numpy(), aggregation.trim))
    total = torch.zeros_like(vectors[0])
    for vector, weight in zip(vectors, weights, strict=True):
        total.add_(vector, alpha=weight)
    return total
