"""No federation, server half: it only says who trains when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedkd.methods.local import Broadcast, Update
from fedkd.payload import Record
from fedkd.setup import Setup
from strategies.base import Metrics


@dataclass(frozen=True)
class State(Record):
    """Nothing."""


def init(setup: Setup) -> State:
    """Hold nothing."""
    return State()


def broadcast(setup: Setup, state: State, round: int) -> Broadcast:
    """Send nothing."""
    return Broadcast()


def update(setup: Setup, state: State, updates: Sequence[Update], round: int) -> tuple[State, Metrics]:
    """Learn nothing."""
    return state, {}
