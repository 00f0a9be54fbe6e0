"""FedDistill: clients exchange the mean of their outputs for each class, and are taught by them.

Federated distillation comes from Jeong et al. (arXiv 1811.11479); FedGen (Zhu, Hong, Zhou, ICML 2021) calls it
FedDistill, a baseline, and FedDistill+ when the models are averaged too (``share-model``).  Two readings:

``paper``
    Jeong et al., Algorithm 1: mean softmax outputs of this participation; a client's teacher is the mean over the
    *others*.  Classes that nobody else holds have no teacher (the algorithm divides by their count, zero).
``authors``
    FedGen's released baseline (zhuangdizhu/FedGen @ dd5807c): logits summed over all participations so far, divided by
    one more than their number; the mean over the round's clients counts a class that a client never saw as zero logits,
    and includes the client's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from fedkd.config import HyperParameters
from fedkd.method import Method, Paper
from fedkd.methods import fedavg, local
from fedkd.payload import ClassCounts, ClassMarks, Examples, Record, Spec

ClassOutputs = Annotated[torch.Tensor, Spec(("classes", "classes"), torch.float32)]
"""One output vector for each class: row y belongs to the examples of class y."""


class Hyper(HyperParameters):
    """Settings of FedDistill."""

    variant: Literal["paper", "authors"] = Field("authors", description="which reading (see `fedkd show feddistill`)")
    weight: float = Field(
        1.0,
        ge=0,
        description="weight of the distillation (Jeong et al.: gamma, no value given; released code: 1); 0 is local, "
        "or fedavg with share-model, bit for bit",
    )
    share_model: bool = Field(False, description="FedDistill+: the models are averaged too, and there is a global one")
    weighting: Literal["examples", "uniform"] = Field(
        "examples",
        description="with share-model: clients weigh by their number of training examples, or all the same",
        json_schema_extra={"only": {"share_model": True}},
    )


@dataclass(frozen=True)
class Broadcast(Record):
    """The outputs of the last round's clients: their sum for each class, and how many clients it is the sum of."""

    outputs: ClassOutputs
    contributors: ClassCounts


@dataclass(frozen=True)
class Update(Record):
    """A client's mean output for each class, and whether (1 or 0) it contributes one."""

    outputs: ClassOutputs
    held: ClassMarks
    examples: Examples


@dataclass(frozen=True)
class State(local.State):
    """The client's own model, and the outputs that it has summed for each class, with their number."""

    output_sums: ClassOutputs
    output_counts: ClassCounts


@dataclass(frozen=True)
class SharedBroadcast(fedavg.Broadcast):
    """FedDistill+: the global model beside the outputs."""

    outputs: ClassOutputs
    contributors: ClassCounts


@dataclass(frozen=True)
class SharedUpdate(fedavg.Update):
    """FedDistill+: the trained model beside the client's outputs."""

    outputs: ClassOutputs
    held: ClassMarks


@dataclass(frozen=True)
class SharedState(fedavg.State):
    """FedDistill+: FedAvg's state, and the summed outputs."""

    output_sums: ClassOutputs
    output_counts: ClassCounts


def records(hyper: Hyper) -> dict[str, type[Record]]:
    """Return the record types: the model is in them only when it is shared."""
    if hyper.share_model:
        return {"Broadcast": SharedBroadcast, "Update": SharedUpdate, "State": SharedState}
    return {"Broadcast": Broadcast, "Update": Update, "State": State}


METHOD = Method(
    name="feddistill",
    summary="mean outputs per class are exchanged and teach (share-model: FedDistill+)",
    hyper=Hyper,
    Broadcast=Broadcast,
    Update=Update,
    State=State,
    paper=Paper(
        authors="Jeong, Oh, Kim, Park, Bennis, Kim",
        title="Communication-Efficient On-Device Machine Learning: Federated Distillation and Augmentation under "
        "Non-IID Private Data",
        venue="2018",
        arxiv="1811.11479",
    ),
    variants=("paper", "authors"),
    records=records,
)
