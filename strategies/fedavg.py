"""FedAvg, server half (McMahan et al. 2017, Algorithm 1): ``theta <- sum_k n_k / n theta_k``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedkd.methods.fedavg import Broadcast, Hyper, Update
from fedkd.payload import ParameterVector, Record, SharedStatistics
from fedkd.setup import Setup
from strategies.averaging import average, shares
from strategies.base import Metrics


@dataclass(frozen=True)
class State(Record):
    """The global model."""

    parameters: ParameterVector
    statistics: SharedStatistics


def init(setup: Setup) -> State:
    """Start from the initial parameters of the run's seed."""
    shared = setup.model.statistics[: setup.sizes["shared_statistics"]]
    return State(parameters=setup.model.parameters.cpu().clone(), statistics=shared.cpu().clone())


def broadcast(setup: Setup, state: State, round: int) -> Broadcast:
    """Send the global model."""
    return Broadcast(parameters=state.parameters, statistics=state.statistics)


def update(setup: Setup, state: State, updates: Sequence[Update], round: int) -> tuple[State, Metrics]:
    """Average the models over the round's clients, by examples or uniformly (``fedavg.weighting``)."""
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
