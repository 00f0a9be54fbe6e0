"""FedPer: base layers are averaged, the personalization layers behind them stay (Arivazhagan et al. 2019)."""

from __future__ import annotations

import torch
from pydantic import Field

from fedkd import partial
from fedkd.method import Method, Paper
from fedkd.models import FlatModel


class Hyper(partial.Hyper):
    """Settings of FedPer."""

    head: str = Field(
        "head",
        description="first personal stage of the model; none: FedAvg, bit for bit; the first of all: each client alone",
    )

    def shared(self, model: FlatModel) -> torch.Tensor:
        """Return the mask of the base layers: the stages before ``head``."""
        return ~partial.from_stage(model, self.head, "fedper.head")


METHOD = Method(
    name="fedper",
    summary="base layers averaged, personalization layers stay with the client",
    hyper=Hyper,
    Broadcast=partial.Broadcast,
    Update=partial.Update,
    Sum=partial.Sum,
    State=partial.State,
    groups=True,
    paper=Paper(
        authors="Arivazhagan, Aggarwal, Singh, Choudhary",
        title="Federated Learning with Personalization Layers",
        venue="2019",
        arxiv="1912.00818",
    ),
    sizes=partial.sizes,
)
