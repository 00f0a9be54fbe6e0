"""FedBABU: only the body is trained and averaged, against a fixed random head; clients fine-tune to be scored.

(Oh, Kim, Yun, ICLR 2022.)
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from fedkd import partial
from fedkd.method import Method, Paper
from fedkd.models import FlatModel


class Hyper(partial.Hyper):
    """Settings of FedBABU."""

    head: str = Field(
        "head",
        description="first stage of the head, which stays at the run's initial parameters; none: FedAvg, bit for bit",
    )
    fine_tune: Literal["all", "head", "body"] = Field(
        "all", description="what a client trains before its own model is scored (the default is ours)"
    )
    fine_tune_steps: int = Field(
        20,
        ge=0,
        description="SGD steps of that fine-tuning, from the current global model; 0: clients are scored with the "
        "global model (the default is ours)",
    )

    def shared(self, model: FlatModel) -> torch.Tensor:
        """Return the mask of the body: the stages before ``head``."""
        return ~partial.from_stage(model, self.head, "fedbabu.head")


METHOD = Method(
    name="fedbabu",
    summary="body trained against a fixed random head, fine-tuned for scoring",
    hyper=Hyper,
    Broadcast=partial.Broadcast,
    Update=partial.Update,
    Sum=partial.Sum,
    State=partial.State,
    groups=True,
    paper=Paper(
        authors="Oh, Kim, Yun",
        title="FedBABU: Toward Enhanced Representation for Federated Image Classification",
        venue="ICLR 2022",
        arxiv="2106.06042",
    ),
    sizes=partial.sizes,
)
