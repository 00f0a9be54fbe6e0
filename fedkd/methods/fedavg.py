"""FedAvg: federated averaging of locally trained models (McMahan et al., AISTATS 2017, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from fedkd.config import HyperParameters
from fedkd.method import Method, Paper
from fedkd.payload import (
    Examples,
    ParameterSum,
    ParameterVector,
    Positive,
    Record,
    SharedStatistics,
    Statistics,
    StatisticsSum,
)


class Hyper(HyperParameters):
    """Settings of FedAvg."""

    weighting: Literal["examples", "uniform"] = Field(
        "examples", description="clients weigh by their number of training examples, or all the same"
    )


@dataclass(frozen=True)
class Broadcast(Record):
    """The global model."""

    parameters: ParameterVector
    statistics: SharedStatistics


@dataclass(frozen=True)
class Update(Record):
    """A locally trained model and the number of examples behind it."""

    parameters: ParameterVector
    statistics: SharedStatistics
    examples: Examples


@dataclass(frozen=True)
class Sum(Record):
    """The weighted sum of several clients' models, and what is behind it (:mod:`fedkd.sums`)."""

    parameters: ParameterSum
    statistics: StatisticsSum
    examples: Examples
    clients: Positive


@dataclass(frozen=True)
class State(Record):
    """What a client keeps: its BatchNorm running statistics."""

    statistics: Statistics


METHOD = Method(
    name="fedavg",
    summary="average of the clients' locally trained models",
    hyper=Hyper,
    Broadcast=Broadcast,
    Update=Update,
    State=State,
    groups=True,
    Sum=Sum,
    paper=Paper(
        authors="McMahan, Moore, Ramage, Hampson, Agüera y Arcas",
        title="Communication-Efficient Learning of Deep Networks from Decentralized Data",
        venue="AISTATS 2017",
        arxiv="1602.05629",
    ),
)
