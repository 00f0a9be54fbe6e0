"""SCAFFOLD: local steps corrected by control variates (Karimireddy et al., ICML 2020, Algorithm 1).

The server keeps a control variate c, the mean of the clients' c_k (zero for a client that has not taken part); each
local step goes along ``grad - c_k + c``, so that many local steps follow the federation's gradient and not the
client's.  The algorithm gives two ways to renew c_k, both of the paper:

``option-1``
    the gradient at the server's model over all local data: one more pass.
``option-2``
    the mean of the gradients along the local path, which the steps themselves have left: no more work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from fedkd.config import HyperParameters
from fedkd.method import Method, Paper
from fedkd.methods import fedavg
from fedkd.payload import ParameterVector


class Hyper(HyperParameters):
    """Settings of SCAFFOLD; the algorithm's means are uniform, so there is no weighting by examples."""

    variant: Literal["option-1", "option-2"] = Field(
        "option-2", description="how a client renews its control variate (see `fedkd show scaffold`)"
    )
    server_lr: float = Field(
        1.0, gt=0, description="the server's learning rate; 1 takes the mean of the clients' models"
    )
    correction: float = Field(
        1.0,
        ge=0,
        le=1,
        description="weight of c - c_k in each local step; 1 is the paper's, 0 (with server-lr 1) is fedavg with "
        "uniform weighting, bit for bit",
    )


@dataclass(frozen=True)
class Broadcast(fedavg.Broadcast):
    """The global model and the server's control variate."""

    control: ParameterVector


@dataclass(frozen=True)
class Update(fedavg.Update):
    """A locally trained model and by how much the client's control variate has changed."""

    control_change: ParameterVector


@dataclass(frozen=True)
class State(fedavg.State):
    """FedAvg's state and the client's control variate."""

    control: ParameterVector


METHOD = Method(
    name="scaffold",
    summary="local steps corrected by control variates of client and server",
    hyper=Hyper,
    Broadcast=Broadcast,
    Update=Update,
    State=State,
    groups=True,
    paper=Paper(
        authors="Karimireddy, Kale, Mohri, Reddi, Stich, Suresh",
        title="SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
        venue="ICML 2020",
        arxiv="1910.06378",
    ),
    variants=("option-1", "option-2"),
    records=lambda hyper: {"groups": hyper.variant == "option-2"},  # option-1 takes another pass over the data
)
