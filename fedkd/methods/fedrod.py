"""FedRoD: a generic model trained with balanced softmax and a personalized head on its features (ICLR 2022).

(Chen, Chao.)  The generic model is averaged; a client predicts with the sum of the logits of the two heads.  The
variant of the paper whose personalized heads come from a hypernetwork is not here.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from fedkd.method import Method, Paper
from fedkd.methods import fedavg
from fedkd.models import FlatModel, StagedModel
from fedkd.payload import Spec
from fedkd.rng import Streams

HeadVector = Annotated[torch.Tensor, Spec(("personal_head",), torch.float32)]
"""All parameters of a personalized head."""
HeadStatistics = Annotated[torch.Tensor, Spec(("personal_head_statistics",), torch.float32)]
"""Running statistics of a personalized head's BatchNorm (empty without)."""


class Hyper(fedavg.Hyper):
    """Settings of FedRoD."""

    head: str = Field(
        "head", description="first stage of the head: the personalized head is a second copy of it and all behind it"
    )
    balance: float = Field(
        1.0,
        ge=0,
        description="exponent of the class counts in the generic loss; 1 is balanced softmax, 0 is cross-entropy, with "
        "which the generic model is FedAvg's, bit for bit",
    )


@dataclass(frozen=True)
class State(fedavg.State):
    """FedAvg's state and the client's personalized head."""

    personal_head: HeadVector
    personal_head_statistics: HeadStatistics


def extras(
    hyper: Hyper, model: StagedModel, classes: int, streams: Streams, device: torch.device
) -> dict[str, FlatModel]:
    """Return the personalized head, a copy of the model's head stages with their initial parameters.

    Raises:
        UserError: the model has no such stage.
    """
    shape = model.input_of(hyper.head, "fedrod.head")
    names = model.stage_names[model.stage_names.index(hyper.head) :]
    stages: OrderedDict[str, torch.nn.Module] = OrderedDict((name, copy.deepcopy(model.stages[name])) for name in names)
    return {"personal_head": FlatModel(StagedModel(stages, shape, in_bfloat16=model.in_bfloat16), device)}


METHOD = Method(
    name="fedrod",
    summary="generic model with balanced softmax, personalized head on its features",
    hyper=Hyper,
    Broadcast=fedavg.Broadcast,
    Update=fedavg.Update,
    Sum=fedavg.Sum,
    State=State,
    paper=Paper(
        authors="Chen, Chao",
        title="On Bridging Generic and Personalized Federated Learning for Image Classification",
        venue="ICLR 2022",
        arxiv="2107.00778",
    ),
    extras=extras,
)
