"""SCAFFOLD, server half: a step along the mean update, and the mean of the control variates (Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedkd.methods.scaffold import Broadcast, Hyper, Update
from fedkd.payload import ParameterVector
from fedkd.setup import Setup
from strategies import fedavg
from strategies.averaging import average, shares
from strategies.base import Metrics


@dataclass(frozen=True)
class State(fedavg.State):
    """The global model and the server's control variate, the mean of all clients' control variates."""

    control: ParameterVector


def init(setup: Setup) -> State:
    """Start from the initial parameters of the run's seed; all control variates are zero."""
    start = fedavg.init(setup)
    return State(**start.tensors(), control=torch.zeros_like(start.parameters))


def broadcast(setup: Setup, state: State, round: int) -> Broadcast:
    """Send the global model and the control variate."""
    return Broadcast(parameters=state.parameters, statistics=state.statistics, control=state.control)


def update(setup: Setup, state: State, updates: Sequence[Update], round: int) -> tuple[State, Metrics]:
    """Aggregate by the settings of the run."""
    hyper: Hyper = setup.hyper
    return aggregate(state, updates, clients=setup.config.run.clients, server_lr=hyper.server_lr), {}


def aggregate(state: State, updates: Sequence[Update], *, clients: int, server_lr: float = 1.0) -> State:
    """``x <- x + lr_g mean_S(y_k - x)``, ``c <- c + |S| / N mean_S(change of c_k)``, both means uniform.

    The factor |S| / N keeps c the mean over all N clients, sampled or not.

    Args:
        clients: N, the number of all clients.
    """
    weights = shares([int(u.examples) for u in updates], "uniform")
    mean = average([u.parameters for u in updates], weights)
    change = average([u.control_change for u in updates], weights)
    return State(
        parameters=server_lr * mean + (1 - server_lr) * state.parameters,
        statistics=average([u.statistics for u in updates], weights),
        control=state.control + len(updates) / clients * change,
    )
