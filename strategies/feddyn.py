"""FedDyn, server half: the mean of the models, less the mean gradient over alpha (Acar et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedkd.config import AggregationSection
from fedkd.methods.fedavg import Update
from fedkd.methods.feddyn import Hyper
from fedkd.payload import ParameterVector
from fedkd.setup import Setup
from strategies import fedavg
from strategies.averaging import MEAN, average, shares
from strategies.base import Metrics

broadcast = fedavg.broadcast


@dataclass(frozen=True)
class State(fedavg.State):
    """The global model and ``-h / alpha``, the mean of all clients' drifts (zero for those never sampled)."""

    drift: ParameterVector


def init(setup: Setup) -> State:
    """Start from the initial parameters of the run's seed; h is zero."""
    start = fedavg.init(setup)
    return State(**start.tensors(), drift=torch.zeros_like(start.parameters))


def update(setup: Setup, state: State, updates: Sequence[Update], round: int) -> tuple[State, Metrics]:
    """Aggregate by the settings of the run."""
    hyper: Hyper = setup.hyper
    run, rule = setup.config.run, setup.config.aggregation
    return aggregate(state, updates, clients=run.clients, correction=hyper.server_correction, rule=rule), {}


def aggregate(
    state: State,
    updates: Sequence[Update],
    *,
    clients: int,
    correction: float = 1.0,
    rule: AggregationSection = MEAN,
) -> State:
    """``h <- h - alpha / m sum_P (theta_k - theta)``, ``theta <- mean_P theta_k - h / alpha``, the mean uniform.

    In terms of ``drift = -h / alpha`` alpha cancels.  ``state.parameters`` must be what the clients started from.

    Args:
        clients: m, the number of all clients.
        correction: factor on ``-h / alpha``.
        rule: what takes the mean's place.
    """
    weights = shares([int(u.examples) for u in updates], "uniform")
    mean = average([u.parameters for u in updates], weights, rule)
    drift = state.drift + len(updates) / clients * (mean - state.parameters)
    return State(
        parameters=mean + correction * drift,
        statistics=average([u.statistics for u in updates], weights, rule),
        drift=drift,
    )
