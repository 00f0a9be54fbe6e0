"""Ditto: a personal model beside FedAvg, held near the global one (Li, Hu, Beirami, Smith, ICML 2021, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from fedkd.config import HyperParameters, ModelSection, TrainSection, overshoots
from fedkd.method import Method, Paper
from fedkd.methods import fedavg
from fedkd.payload import ParameterVector, Statistics


class Hyper(HyperParameters):
    """Settings of Ditto."""

    weighting: Literal["uniform", "examples"] = Field(
        "uniform", description="clients weigh all the same in the global model (released code), or by their examples"
    )
    lam: float = Field(
        1.0,
        ge=0,
        description="lambda, the pull of the personal model to the global one; 0 is local training; "
        "1 is the released example's; times train.lr below 2, or the personal models may diverge",
    )

    def doubts(self, train: TrainSection, model: ModelSection, statistics: int) -> list[str]:
        """Say so where the pull overshoots by more than the distance that it acts on."""
        del model, statistics
        return overshoots("ditto.lam", self.lam, train, "personal models")


@dataclass(frozen=True)
class State(fedavg.State):
    """What a client keeps: its personal model with its statistics, beside FedAvg's state."""

    parameters: ParameterVector
    personal_statistics: Statistics


METHOD = Method(
    name="ditto",
    summary="a personal model beside FedAvg, held near the global one",
    hyper=Hyper,
    Broadcast=fedavg.Broadcast,
    Update=fedavg.Update,
    Sum=fedavg.Sum,
    State=State,
    paper=Paper(
        authors="Li, Hu, Beirami, Smith",
        title="Ditto: Fair and Robust Federated Learning Through Personalization",
        venue="ICML 2021",
        arxiv="2012.04221",
    ),
)
