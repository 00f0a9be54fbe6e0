"""FedEnsemble, server half: FedAvg's, and the round's models are kept for scoring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedkd.methods.fedavg import Update
from fedkd.methods.fedensemble import CohortParameters, CohortStatistics, Scoring, StartStatistics, StartVector
from fedkd.setup import Setup
from strategies import fedavg
from strategies.base import Metrics

broadcast = fedavg.broadcast


@dataclass(frozen=True)
class State(fedavg.State):
    """The global model, the models that it is the average of, and the one that their round started from."""

    models: CohortParameters
    model_statistics: CohortStatistics
    start: StartVector
    start_statistics: StartStatistics


def init(setup: Setup) -> State:
    """Start as FedAvg does; before the first round every member is the initial model."""
    first = fedavg.init(setup)
    cohort = setup.sizes["cohort"]
    return State(
        **first.tensors(),
        models=first.parameters.repeat(cohort, 1),
        model_statistics=first.statistics.repeat(cohort, 1),
        start=first.parameters[: setup.sizes["start"]],
        start_statistics=first.statistics,
    )


def scoring(setup: Setup, state: State, round: int) -> Scoring:
    """Send the members of the ensemble to those who are scored; training needs only the average."""
    return Scoring(**state.tensors())


def update(setup: Setup, state: State, updates: Sequence[Update], round: int) -> tuple[State, Metrics]:
    """Average the models as FedAvg does, and keep them."""
    averaged, metrics = fedavg.update(setup, fedavg.State(state.parameters, state.statistics), updates, round)
    return (
        State(
            **averaged.tensors(),
            models=torch.stack([u.parameters for u in updates]),
            model_statistics=torch.stack([u.statistics for u in updates]),
            start=state.parameters[: setup.sizes["start"]],
            start_statistics=state.statistics,
        ),
        metrics,
    )
