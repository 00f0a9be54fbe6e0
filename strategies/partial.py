"""What the server halves share that see a part of the model: FedAvg's average over that part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedkd.partial import Broadcast, Hyper, SharedVector, Update, statistics_of
from fedkd.payload import Record, SharedStatistics
from fedkd.setup import Setup
from strategies.averaging import average, shares
from strategies.base import Metrics


@dataclass(frozen=True)
class State(Record):
    """The shared part of the model."""

    parameters: SharedVector
    statistics: SharedStatistics


def init(setup: Setup) -> State:
    """Start from the initial parameters of the run's seed."""
    hyper: Hyper = setup.hyper
    shared = hyper.shared(setup.model)
    averaged = setup.config.model.norm_statistics == "averaged"
    return State(
        parameters=setup.model.parameters.cpu()[shared],
        statistics=setup.model.statistics.cpu()[statistics_of(setup.model, shared) & averaged],
    )


def broadcast(setup: Setup, state: State, round: int) -> Broadcast:
    """Send the shared part."""
    return Broadcast(parameters=state.parameters, statistics=state.statistics)


def update(setup: Setup, state: State, updates: Sequence[Update], round: int) -> tuple[State, Metrics]:
    """Average the shared parts over the round's clients, by examples or uniformly (``weighting``)."""
    hyper: Hyper = setup.hyper
    weights = shares([int(u.examples) for u in updates], hyper.weighting)
    rule = setup.config.aggregation
    return (
        State(
            parameters=average([u.parameters for u in updates], weights, rule),
            statistics=average([u.statistics for u in updates], weights, rule),
        ),
        {},
    )
