"""Control: no federation.  Each client trains its own model, in the rounds in which it is sampled.

All clients start from the same initial model.  The sampling and the local steps are those of the federated methods,
so a client has trained as often as it would have there; nothing about its data crosses the network.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedkd.config import HyperParameters
from fedkd.method import Method
from fedkd.payload import Examples, ParameterVector, Record, Statistics


class Hyper(HyperParameters):
    """The control has no settings of its own."""


@dataclass(frozen=True)
class Broadcast(Record):
    """Nothing."""


@dataclass(frozen=True)
class Update(Record):
    """Only how many examples the client trained on, for the weighting of the reported loss."""

    examples: Examples


@dataclass(frozen=True)
class State(Record):
    """The client's own model."""

    parameters: ParameterVector
    statistics: Statistics


METHOD = Method(
    name="local",
    summary="control: every client alone",
    hyper=Hyper,
    Broadcast=Broadcast,
    Update=Update,
    State=State,
    groups=True,
)
