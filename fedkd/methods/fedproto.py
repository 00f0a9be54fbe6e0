"""FedProto: clients exchange prototypes, the mean features of each class, and no model (Tan et al., AAAI 2022).

Each client pulls its features towards the global prototypes (Eq. 7), the server averages the local ones (Eq. 6), and a
client predicts by the nearest prototype (Eq. 4) or by its own head.  Two readings:

``paper``
    Eq. 8 with the L2 distance between the mean features of each class in the batch (Eq. 3, Algorithm 1, line 3) and the
    global prototype, summed over classes; Eq. 3 over the client's data after training is what it sends; clients weigh
    by their examples of the class (Eq. 6); the nearest of all prototypes.
``authors``
    the released code (yuetan031/FedProto @ 97e42e2): mean squared error between each example's features and its class's
    prototype, over batch and features; what a client sends is the mean of the features as they came in training; plain
    mean over clients; the nearest among the classes that the client holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from fedkd.config import HyperParameters
from fedkd.method import Method, Paper
from fedkd.methods import local
from fedkd.models import FlatModel
from fedkd.payload import ClassMarks, Examples, Record, SomeCounts, Spec

Prototypes = Annotated[torch.Tensor, Spec(("classes", "features"), torch.float32)]
"""One vector of features for each class; zero where there is none."""


class Hyper(HyperParameters):
    """Settings of FedProto; those of one variant only say so."""

    variant: Literal["paper", "authors"] = Field("authors", description="which reading (see `fedkd show fedproto`)")
    weight: float = Field(
        1.0,
        ge=0,
        description="weight (lambda) of the distance to the global prototypes; 0 is local training, bit for bit "
        "(released: 1 for MNIST and FEMNIST, 0.1 for CIFAR-10)",
    )
    layer: str = Field(
        "head",
        description="stage whose input the prototypes are the means of; the input of the first stage is the image "
        "itself, so that its prototypes are mean images and there is nothing to train",
    )
    predict: Literal["nearest", "head"] = Field(
        "nearest", description="by the nearest prototype (Eq. 4), or by the client's own last stage"
    )
    eq6: Literal["weighted", "printed"] = Field(
        "weighted",
        description="paper variant: average by examples of the class, as the text says, or Eq. 6 as printed, which "
        "divides once more by the number of clients",
        json_schema_extra={"only": {"variant": "paper"}},
    )


@dataclass(frozen=True)
class Broadcast(Record):
    """The global prototypes, and whether (1 or 0) a class has one."""

    prototypes: Prototypes
    known: ClassMarks


@dataclass(frozen=True)
class Update(Record):
    """A client's prototypes, and the number of examples behind each (authors variant: 1 or 0)."""

    prototypes: Prototypes
    counts: SomeCounts
    examples: Examples


def sizes(hyper: Hyper, model: FlatModel) -> dict[str, int]:
    """Return the width of a prototype."""
    shape = model.module.input_of(hyper.layer, "fedproto.layer")  # type: ignore[operator]
    return {"features": torch.Size(shape).numel()}


METHOD = Method(
    name="fedproto",
    summary="prototypes of each class are exchanged, no model",
    hyper=Hyper,
    Broadcast=Broadcast,
    Update=Update,
    State=local.State,
    paper=Paper(
        authors="Tan, Long, Liu, Zhou, Lu, Jiang, Zhang",
        title="FedProto: Federated Prototype Learning across Heterogeneous Clients",
        venue="AAAI 2022",
        arxiv="2105.00243",
    ),
    variants=("paper", "authors"),
    sizes=sizes,
)
