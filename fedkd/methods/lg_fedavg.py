"""LG-FedAvg: local representations, a global head over them (Liang, Liu, Liu et al. 2020)."""

from __future__ import annotations

import torch
from pydantic import Field

from fedkd import partial
from fedkd.method import Method, Paper
from fedkd.models import FlatModel


class Hyper(partial.Hyper):
    """Settings of LG-FedAvg."""

    head: str = Field(
        "head",
        description="first stage of the global head; what is before it is personal; none: every client alone; the "
        "first of all: FedAvg, bit for bit",
    )

    def shared(self, model: FlatModel) -> torch.Tensor:
        """Return the mask of the global head: ``head`` and the stages behind it."""
        return partial.from_stage(model, self.head, "lg_fedavg.head")


METHOD = Method(
    name="lg_fedavg",
    summary="local representations, global head",
    hyper=Hyper,
    Broadcast=partial.Broadcast,
    Update=partial.Update,
    Sum=partial.Sum,
    State=partial.State,
    groups=True,
    paper=Paper(
        authors="Liang, Liu, Ziyin, Allen, Auerbach, Brent, Salakhutdinov, Morency",
        title="Think Locally, Act Globally: Federated Learning with Local and Global Representations",
        venue="2020",
        arxiv="2001.01523",
    ),
    sizes=partial.sizes,
)
