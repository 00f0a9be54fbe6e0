"""FedRep: many steps on the client's own head, then steps on the shared representation (Collins et al., ICML 2021)."""

from __future__ import annotations

import torch
from pydantic import Field

from fedkd import partial
from fedkd.method import Method, Paper
from fedkd.models import FlatModel


class Hyper(partial.Hyper):
    """Settings of FedRep."""

    head: str = Field(
        "head", description="first stage of the personal head; what is before it is shared; none: FedAvg, bit for bit"
    )
    head_steps: int = Field(
        20,
        ge=0,
        description="SGD steps on the head before the local steps on the representation; 0: the heads stay as "
        "initialised, and the representation is FedBABU's, bit for bit (the default is ours)",
    )

    def shared(self, model: FlatModel) -> torch.Tensor:
        """Return the mask of the representation: the stages before ``head``."""
        return ~partial.from_stage(model, self.head, "fedrep.head")


METHOD = Method(
    name="fedrep",
    summary="shared representation, personal heads, trained in turn",
    hyper=Hyper,
    Broadcast=partial.Broadcast,
    Update=partial.Update,
    Sum=partial.Sum,
    State=partial.State,
    paper=Paper(
        authors="Collins, Hassani, Mokhtari, Shakkottai",
        title="Exploiting Shared Representations for Personalized Federated Learning",
        venue="ICML 2021",
        arxiv="2102.07078",
    ),
    sizes=partial.sizes,
)
