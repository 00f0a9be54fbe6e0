"""FedFomo: each client mixes the models that help it most (Zhang, Sapra, Fidler, Yeung, Alvarez, ICLR 2021).

There is no global model.  Client i measures on validation data of its own by how much model n lowers its loss below
that of its starting point theta_i, per unit of distance, and moves towards the models that do:

    w_n = (L_i(theta_i) - L_i(theta_n)) / ||theta_n - theta_i||,   v_n = max(w_n, 0) / sum_m max(w_m, 0)
    theta_i <- theta_i + sum_n v_n (theta_n - theta_i)

theta_i is the model that the client's last local training started from; what that training made of it is one of the
theta_n, so a training that did not help is taken back.  The server keeps every client's affinity to every other one,
to which the w_n are added, and sends each client the models of highest affinity, or, with probability epsilon, random
ones.  Where the definitions are silent they are those of the released code (NVlabs/FedFomo @ fe04f66).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from fedkd.config import HyperParameters
from fedkd.method import Method, Paper
from fedkd.models import FlatModel
from fedkd.payload import Client, ParameterVector, Record, SharedStatistics, Spec, Statistics

Sources = Annotated[torch.Tensor, Spec(("downloads",), torch.int64, least=-1, below="clients")]
"""Whose models a client gets, one per place; -1 for a place without one."""


class Hyper(HyperParameters):
    """Settings of FedFomo; the defaults are the released code's."""

    downloads: int = Field(
        8,
        ge=0,
        description="other clients' models that each client gets in a round, out of those that took part in the "
        "previous one; more than clients per round is waste; 0 is local training, taken back where it did not help",
    )
    epsilon: float = Field(
        0.3,
        ge=0,
        le=1,
        description="chance that a place goes to a random model, in the first round; 0: affinity alone decides",
        json_schema_extra={"only": {"downloads": 2, "run.clients-per-round": 0, "run.rounds": 4}},
    )
    epsilon_decay: float = Field(
        0.05,
        ge=0,
        description="what epsilon loses per round, down to 0; 0: it stays",
        json_schema_extra={"only": {"downloads": 1, "epsilon": 1.0, "run.clients-per-round": 0, "run.rounds": 3}},
    )
    validation: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="share of a client's training data that it holds out to weigh models with (at least one example, "
        "where it has two); 0 holds out none and weighs models on the training data",
    )
    norm: Literal["l1", "l2"] = Field("l1", description="distance between models; l1 is the released code's default")
    affinity: Literal["scaled", "raw"] = Field(
        "scaled",
        description="what is added to the affinities: weights divided by the size of their sum (released code), or "
        "the weights as they are",
        json_schema_extra={
            "only": {"downloads": 1, "run.clients-per-round": 0, "run.rounds": 10, "data.alpha": 100.0, "train.lr": 0.2}
        },
    )


@dataclass(frozen=True)
class Broadcast(Record):
    """Nothing: there is no global model."""


@dataclass(frozen=True)
class Personal(Record):
    """The models that the server chose for one client; a place without a model is all zeros."""

    sources: Sources
    models: Annotated[torch.Tensor, Spec(("downloads", "parameters"), torch.float32)]
    statistics: Annotated[torch.Tensor, Spec(("downloads", "shared_statistics"), torch.float32)]


@dataclass(frozen=True)
class Update(Record):
    """A locally trained model, and what its client thinks of the models it got (signed, 0 where there was none)."""

    client: Client
    parameters: ParameterVector
    statistics: SharedStatistics
    examples: Annotated[torch.Tensor, Spec((), torch.int64, least=1, counted="some")]
    sources: Sources
    weights: Annotated[torch.Tensor, Spec(("downloads",), torch.float32)]


@dataclass(frozen=True)
class State(Record):
    """The client's own model after its last local training, and what that training started from."""

    parameters: ParameterVector
    statistics: Statistics
    start: ParameterVector
    start_statistics: SharedStatistics


def sizes(hyper: Hyper, model: FlatModel) -> dict[str, int]:
    """Return the number of models per client."""
    return {"downloads": hyper.downloads}


METHOD = Method(
    name="fedfomo",
    summary="each client mixes the models that lower its own validation loss",
    hyper=Hyper,
    Broadcast=Broadcast,
    Update=Update,
    State=State,
    Personal=Personal,
    paper=Paper(
        authors="Zhang, Sapra, Fidler, Yeung, Alvarez",
        title="Personalized Federated Learning with First Order Model Optimization",
        venue="ICLR 2021",
        arxiv="2012.08565",
    ),
    sizes=sizes,
)
