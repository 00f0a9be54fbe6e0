"""FedDistill, server half: sum the clients' mean outputs for each class; FedDistill+ averages the models too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedkd.methods.feddistill import (
    Broadcast,
    ClassOutputs,
    Hyper,
    SharedBroadcast,
    SharedUpdate,
    Update,
)
from fedkd.payload import ClassCounts, Record
from fedkd.setup import Setup
from strategies import fedavg
from strategies.averaging import average
from strategies.base import Metrics


@dataclass(frozen=True)
class State(Record):
    """The last round's outputs: their sum for each class, and how many clients it is the sum of."""

    outputs: ClassOutputs
    contributors: ClassCounts


@dataclass(frozen=True)
class SharedState(fedavg.State):
    """FedDistill+: the global model beside the outputs."""

    outputs: ClassOutputs
    contributors: ClassCounts


def init(setup: Setup) -> State | SharedState:
    """Start without a teacher."""
    outputs = {
        "outputs": torch.zeros(setup.classes, setup.classes),
        "contributors": torch.zeros(setup.classes, dtype=torch.int64),
    }
    hyper: Hyper = setup.hyper
    return SharedState(**fedavg.init(setup).tensors(), **outputs) if hyper.share_model else State(**outputs)


def broadcast(setup: Setup, state: State | SharedState, round: int) -> Broadcast | SharedBroadcast:
    """Send the outputs, and the global model when it is shared."""
    kind = SharedBroadcast if isinstance(state, SharedState) else Broadcast
    return kind(**state.tensors())


def update(
    setup: Setup, state: State | SharedState, updates: Sequence[Update | SharedUpdate], round: int
) -> tuple[State | SharedState, Metrics]:
    """Add up the outputs of the clients that have any for a class (Jeong et al., Algorithm 1, lines 9 to 12)."""
    outputs = {
        "outputs": average([u.outputs * u.held[:, None] for u in updates], [1.0] * len(updates)),
        "contributors": torch.stack([u.held for u in updates]).sum(dim=0),
    }
    if not isinstance(state, SharedState):
        return State(**outputs), {}
    averaged, metrics = fedavg.update(setup, fedavg.State(state.parameters, state.statistics), updates, round)  # type: ignore[arg-type]
    return SharedState(**averaged.tensors(), **outputs), metrics
