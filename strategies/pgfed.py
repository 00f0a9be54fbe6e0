"""PGFed, server half: FedAvg's mean, and for each client the weighted sum of the previous participants' gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch

from fedkd.methods import fedavg as fedavg_contract
from fedkd.methods.pgfed import Broadcast, CohortClients, CohortValues, Hyper, Personal, Update
from fedkd.payload import Spec
from fedkd.setup import Setup
from strategies import fedavg
from strategies.base import Metrics


@dataclass(frozen=True)
class State(fedavg.State):
    """The global model, alpha, and the previous participants' gradients g_j and offsets c_j; older ones are forgotten.

    Before the first round there are no participants (-1), and gradients and offsets are zero.
    """

    alpha: Annotated[torch.Tensor, Spec(("clients", "clients"), torch.float32)]
    participants: CohortClients
    gradients: Annotated[torch.Tensor, Spec(("cohort", "parameters"), torch.float32)]
    offsets: CohortValues


def init(setup: Setup) -> State:
    """Start from the run's seed; every alpha, a client's own too, is one over the clients per round."""
    clients, cohort = setup.sizes["clients"], setup.sizes["cohort"]
    return State(
        **fedavg.init(setup).tensors(),
        alpha=torch.full((clients, clients), 1 / cohort),
        participants=torch.full((cohort,), -1),
        gradients=torch.zeros(cohort, setup.sizes["parameters"]),
        offsets=torch.zeros(cohort),
    )


def broadcast(setup: Setup, state: State, round: int) -> Broadcast:
    """Send the global model and, times mu, the offsets and the mean of the gradients, or all of them."""
    hyper: Hyper = setup.hyper
    mean = state.gradients.mean(dim=0, keepdim=True)[: setup.sizes["inner_mean"]]
    return Broadcast(
        parameters=state.parameters,
        statistics=state.statistics,
        participants=state.participants,
        offsets=hyper.mu * state.offsets,
        mean_gradient=hyper.mu * mean,
        gradients=hyper.mu * state.gradients[None][: setup.sizes["inner_exact"]],
    )


def scoring(setup: Setup, state: State, round: int) -> fedavg_contract.Broadcast:
    """Send clients that are scored the global model alone."""
    return fedavg.broadcast(setup, state, round)


def personals(setup: Setup, state: State, round: int, clients: Sequence[int]) -> list[Personal]:
    """Send each client ``a_i = mu sum_j alpha_ij g_j`` and its alpha_ij, j over the previous participants.

    One matrix product for all: ``alpha[clients, participants] @ G``.
    """
    hyper: Hyper = setup.hyper
    alpha = state.alpha[list(clients)][:, state.participants]  # -1, before the first round, takes any column: all equal
    device = setup.model.device
    auxiliary = (hyper.mu * alpha.to(device) @ state.gradients.to(device)).cpu()
    return [Personal(auxiliary=a, alpha=row) for a, row in zip(auxiliary, alpha, strict=True)]


def personal(setup: Setup, state: State, round: int, client: int) -> Personal:
    """Send one client its part of :func:`personals`."""
    return personals(setup, state, round, [client])[0]


def update(setup: Setup, state: State, updates: Sequence[Update], round: int) -> tuple[State, Metrics]:
    """Average the models as FedAvg does, take over the clients' alpha, and replace gradients and offsets."""
    average, metrics = fedavg.update(setup, state, updates, round)
    alpha = state.alpha.clone()
    clients = torch.stack([u.client for u in updates])
    if int(state.participants[0]) >= 0:
        alpha[clients[:, None], state.participants] = torch.stack([u.alpha for u in updates])
    return (
        State(
            **average.tensors(),
            alpha=alpha,
            participants=clients,
            gradients=torch.stack([u.gradient for u in updates]),
            offsets=torch.stack([u.offset for u in updates]),
        ),
        metrics,
    )
