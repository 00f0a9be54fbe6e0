"""APFL: each client mixes a model of its own with its copy of the global one (Deng, Kamani, Mahdavi 2020).

A client holds its own model v, trained through the mixture, and a weight alpha in [0, 1]; w is its copy of the global
model, trained and averaged as in FedAvg, so the global trajectory is FedAvg's whatever v and alpha do.  Two readings:

``paper``
    parameters are mixed, ``alpha v + (1 - alpha) w``; v, w and alpha step from the same old point; alpha follows the
    derivative of the mixture's loss (Eq. 10).
``authors``
    the released code (MLOPTPSU/FedTorch @ ab8068d): logits are mixed; w steps first and the mixture sees the new w;
    alpha follows another expression, which weighs the two gradients with alpha and 1 - alpha a second time, and a
    pull towards 0; v's learning rate does not decay.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from fedkd.config import HyperParameters
from fedkd.method import Method, Paper
from fedkd.methods import fedavg
from fedkd.models import FlatModel, StagedModel
from fedkd.payload import ParameterVector, Spec, Statistics
from fedkd.rng import Streams

Weight = Annotated[torch.Tensor, Spec((), torch.float64)]
"""A mixing weight in [0, 1]."""


class Hyper(HyperParameters):
    """Settings of APFL."""

    variant: Literal["paper", "authors"] = Field("paper", description="which reading (see `fedkd show apfl`)")
    weighting: Literal["uniform", "examples"] = Field(
        "uniform", description="clients weigh all the same in the global model (paper and code), or by their examples"
    )
    alpha: float = Field(
        0.5,
        ge=0,
        le=1,
        description="weight of a client's own model, the first one when adaptive: 0 is FedAvg scored after local steps "
        "(fedavg_ft), 1 is local training; 0.5 is the released example's",
    )
    adaptive: bool = Field(False, description="each client's weight is trained; false: it stays alpha")
    alpha_steps: Literal["first", "every"] = Field(
        "first",
        description="adaptive: the weight moves in the first local step of a participation (released code) or in every",
        json_schema_extra={"only": {"adaptive": True}},
    )
    alpha_pull: float = Field(
        0.02,
        ge=0,
        description="authors variant, adaptive: times alpha, added to alpha's gradient; 0 leaves it out",
        json_schema_extra={"only": {"variant": "authors", "adaptive": True}},
    )


@dataclass(frozen=True)
class State(fedavg.State):
    """What a client keeps: its own model v, its copy w as the last participation left it, and its weight.

    ``personal_statistics`` are the BatchNorm statistics of the mixture (paper) or of v (authors); ``statistics`` are
    those of w.
    """

    own: ParameterVector
    copy: ParameterVector
    personal_statistics: Statistics
    alpha: Weight


def extras(
    hyper: Hyper, model: StagedModel, classes: int, streams: Streams, device: torch.device
) -> dict[str, FlatModel]:
    """Return a second workspace of the model's kind, for the mixture or for v."""
    return {"personal": FlatModel(copy.deepcopy(model), device)}


METHOD = Method(
    name="apfl",
    summary="a mixture of a local and the global model, with a fixed or trained weight",
    hyper=Hyper,
    Broadcast=fedavg.Broadcast,
    Update=fedavg.Update,
    Sum=fedavg.Sum,
    State=State,
    paper=Paper(
        authors="Deng, Kamani, Mahdavi",
        title="Adaptive Personalized Federated Learning",
        venue="preprint 2020",
        arxiv="2003.13461",
    ),
    variants=("paper", "authors"),
    extras=extras,
)
