"""FedProto, server half: average the clients' prototypes of each class (Tan et al. 2022, Eq. 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedkd.methods.fedproto import Broadcast, Hyper, Prototypes, Update
from fedkd.payload import ClassMarks, Record
from fedkd.setup import Setup
from strategies.base import Metrics


@dataclass(frozen=True)
class State(Record):
    """The global prototypes, and whether (1 or 0) a class has one."""

    prototypes: Prototypes
    known: ClassMarks


def init(setup: Setup) -> State:
    """Start without prototypes."""
    return State(
        prototypes=torch.zeros(setup.classes, setup.sizes["features"]),
        known=torch.zeros(setup.classes, dtype=torch.int64),
    )


def broadcast(setup: Setup, state: State, round: int) -> Broadcast:
    """Send the global prototypes."""
    return Broadcast(prototypes=state.prototypes, known=state.known)


def update(setup: Setup, state: State, updates: Sequence[Update], round: int) -> tuple[State, Metrics]:
    """``C_j = sum_k n_kj / n_j C_kj`` over the clients that hold class j; where none does, the old prototype stays.

    The counts n_kj are the examples of the class (paper) or one per client (authors).  Eq. 6 as printed divides once
    more by the number of these clients.
    """
    hyper: Hyper = setup.hyper
    counts = torch.stack([u.counts for u in updates])  # [clients, classes]
    shares = counts / counts.sum(dim=0).clamp(min=1)
    if hyper.variant == "paper" and hyper.eq6 == "printed":
        shares = shares / (counts > 0).sum(dim=0).clamp(min=1)
    mean = torch.zeros_like(state.prototypes)
    for share, one in zip(shares, updates, strict=True):
        mean += share[:, None] * one.prototypes
    held = (counts > 0).any(dim=0)
    return State(torch.where(held[:, None], mean, state.prototypes), held.long() | state.known), {}
