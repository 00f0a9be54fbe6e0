"""FedFomo, server half: it passes the previous participants' models on, to whom they seem to help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch

from fedkd.methods.fedfomo import Broadcast, Hyper, Personal, Update
from fedkd.payload import Record, Spec
from fedkd.setup import Setup
from strategies.base import Metrics


@dataclass(frozen=True)
class State(Record):
    """The previous participants' models, and every client's affinity to every other one.

    Before the first round there are no participants (-1), and the models are zero.
    """

    affinity: Annotated[torch.Tensor, Spec(("clients", "clients"), torch.float32)]
    participants: Annotated[torch.Tensor, Spec(("cohort",), torch.int64)]
    models: Annotated[torch.Tensor, Spec(("cohort", "parameters"), torch.float32)]
    statistics: Annotated[torch.Tensor, Spec(("cohort", "shared_statistics"), torch.float32)]


def init(setup: Setup) -> State:
    """Start without models and without preferences."""
    clients, cohort = setup.sizes["clients"], setup.sizes["cohort"]
    return State(
        affinity=torch.zeros(clients, clients),
        participants=torch.full((cohort,), -1),
        models=torch.zeros(cohort, setup.sizes["parameters"]),
        statistics=torch.zeros(cohort, setup.sizes["shared_statistics"]),
    )


def broadcast(setup: Setup, state: State, round: int) -> Broadcast:
    """Send nothing to everybody."""
    return Broadcast()


def personal(setup: Setup, state: State, round: int, client: int) -> Personal:
    """Send a client the models chosen for it, in the order of their clients."""
    rows = torch.tensor(chosen(setup, state, round, client), dtype=torch.int64)
    empty = setup.sizes["downloads"] - len(rows)
    return Personal(
        sources=torch.cat([state.participants[rows], torch.full((empty,), -1)]),
        models=torch.cat([state.models[rows], torch.zeros(empty, setup.sizes["parameters"])]),
        statistics=torch.cat([state.statistics[rows], torch.zeros(empty, setup.sizes["shared_statistics"])]),
    )


def chosen(setup: Setup, state: State, round: int, client: int) -> list[int]:
    """Return the rows of the models for a client: epsilon-greedy by its affinities, never its own.

    For each place the best model that is left, or with probability ``max(0, epsilon - (round - 1) epsilon-decay)`` a
    random one; equal affinities are in random order, and those of a newcomer are all equal.
    """
    hyper: Hyper = setup.hyper
    rows = [row for row, other in enumerate(state.participants.tolist()) if other not in (-1, client)]
    rng = setup.streams.numpy("downloads", round, client)
    random = [rows[k] for k in rng.permutation(len(rows))]
    known = client < len(state.affinity)
    affinity = state.affinity[client][state.participants].tolist() if known else [0.0] * len(state.participants)
    best = sorted((rows[k] for k in rng.permutation(len(rows))), key=lambda row: -affinity[row])
    epsilon = hyper.epsilon - (round - 1) * hyper.epsilon_decay
    taken: list[int] = []
    for _ in range(min(hyper.downloads, len(rows))):
        queue = random if rng.random() < epsilon else best
        taken.append(next(row for row in queue if row not in taken))
    return sorted(taken)


def update(setup: Setup, state: State, updates: Sequence[Update], round: int) -> tuple[State, Metrics]:
    """Add the clients' weights to their affinities, and keep the new models in place of the old ones."""
    affinity = state.affinity.clone()
    for u in updates:
        got = u.sources >= 0
        affinity[u.client, u.sources[got]] += u.weights[got]
    return (
        State(
            affinity=affinity,
            participants=torch.stack([u.client for u in updates]),
            models=torch.stack([u.parameters for u in updates]),
            statistics=torch.stack([u.statistics for u in updates]),
        ),
        {},
    )
