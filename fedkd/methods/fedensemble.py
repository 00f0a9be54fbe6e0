"""FedEnsemble: FedAvg's training, prediction by the models of the round together.

A baseline of FedGen (Zhu, Hong, Zhou, ICML 2021, section 6.1: it "extends FedAvg to ensemble the prediction output of
all user models"); it has no paper of its own there.  Which models take part is a setting: those that the round has
trained, or, as in the released code (zhuangdizhu/FedGen @ dd5807c), one per client, where a client that was not sampled
still holds the model that the round started from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from fedkd.method import Method, Paper
from fedkd.methods import fedavg
from fedkd.models import FlatModel
from fedkd.payload import Spec

CohortParameters = Annotated[torch.Tensor, Spec(("cohort", "parameters"), torch.float32)]
"""Parameters of the round's models, in client order."""
CohortStatistics = Annotated[torch.Tensor, Spec(("cohort", "shared_statistics"), torch.float32)]
"""Their BatchNorm statistics, when these travel."""
StartVector = Annotated[torch.Tensor, Spec(("start",), torch.float32)]
"""Parameters that the round started from, when they are a member of the ensemble; else empty."""
StartStatistics = Annotated[torch.Tensor, Spec(("shared_statistics",), torch.float32)]
"""Their BatchNorm statistics, when these travel."""


class Hyper(fedavg.Hyper):
    """Settings of FedEnsemble."""

    members: Literal["cohort", "all"] = Field(
        "cohort",
        description="the round's trained models, or one model per client, of which those that were not sampled hold "
        "what the round started from (released code); equal under full participation",
    )
    average: Literal["logits", "probabilities"] = Field(
        "logits", description="what is averaged over the members (released code: logits); a single member is itself"
    )


@dataclass(frozen=True)
class Scoring(fedavg.Broadcast):
    """The global model and the members of the ensemble."""

    models: CohortParameters
    model_statistics: CohortStatistics
    start: StartVector
    start_statistics: StartStatistics


def sizes(hyper: Hyper, model: FlatModel) -> dict[str, int]:
    """Return the length of the model that the round started from, as it travels."""
    return {"start": model.parameters.numel() if hyper.members == "all" else 0}


METHOD = Method(
    name="fedensemble",
    summary="FedAvg's training, prediction by the round's models together",
    hyper=Hyper,
    Broadcast=fedavg.Broadcast,
    Update=fedavg.Update,
    State=fedavg.State,
    Scoring=Scoring,
    paper=Paper(
        authors="Zhu, Hong, Zhou",
        title="Data-Free Knowledge Distillation for Heterogeneous Federated Learning (a baseline there)",
        venue="ICML 2021",
        arxiv="2105.10056",
    ),
    sizes=sizes,
)
