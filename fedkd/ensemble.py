"""The prediction of several models together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch


def ensemble(logits: Iterable[torch.Tensor], weights: Sequence[float], average: str) -> torch.Tensor:
    """Return the logits of an ensemble ``[batch, classes]``.

    ``logits``: ``sum_k w_k f_k(x)``.  ``probabilities``: ``log sum_k w_k softmax(f_k(x))``.  One member with weight 1
    is that member: its logits as they are, or up to a constant per row.

    Args:
        logits: of each member ``[batch, classes]``; consumed one after another.
        weights: of each member; they sum to one.
        average: ``logits`` or ``probabilities``.
    """
    members = zip(logits, weights, strict=True)
    if average == "logits":
        return torch.stack([weight * f for f, weight in members]).sum(dim=0)
    return torch.logsumexp(torch.stack([torch.log_softmax(f, dim=1) + math.log(w) for f, w in members]), dim=0)
