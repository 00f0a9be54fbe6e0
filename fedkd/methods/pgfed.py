"""PGFed: each client personalizes its own global objective (Luo, Mendieta, Chen, Wu, ICCV 2023).

Client i's objective is its own risk and a weighted sum of everybody's, with weights alpha_ij >= 0 that it learns:
``F_i(theta_i) = f_i(theta_i) + mu sum_j alpha_ij f_j(theta_i)``.  The others' risks are replaced by their first-order
expansions at the others' own models, ``f_j(theta_i) ~= c_j + <g_j, theta_i>`` with ``g_j = grad f_j(theta_j)`` and
``c_j = f_j(theta_j) - <g_j, theta_j>``, so the gradient of the sum is a vector that the server computes.  With
``beta > 0`` that vector is a running mean over the client's participations: the paper's PGFedMo.

The released code (ljaiverson/pgfed @ b1d70f7) learns alpha with one inner product ``<g_mean, theta_i>`` in place of
every ``<g_j, theta_i>``; ``inner = "exact"`` takes the gradient of the expansion itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from fedkd.method import Method, Paper
from fedkd.methods import fedavg
from fedkd.models import FlatModel
from fedkd.payload import Client, ParameterVector, Record, Spec

CohortValues = Annotated[torch.Tensor, Spec(("cohort",), torch.float32)]
"""One number for each participant of the previous round."""
CohortClients = Annotated[torch.Tensor, Spec(("cohort",), torch.int64, least=-1, below="clients")]
"""Who took part in the previous round, in ascending order; -1 everywhere before the first."""


class Hyper(fedavg.Hyper):
    """Settings of PGFed; mu, lam and beta as in the authors' example for CIFAR-10."""

    mu: float = Field(0.1, ge=0, description="weight of the others' risks; 0 is fedavg_ft, bit for bit")
    lam: float = Field(
        0.01, ge=0, description="learning rate of alpha; 0 keeps every alpha at one over the clients per round"
    )
    beta: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of a client's earlier auxiliary gradient in its next one (PGFedMo, whose authors take 0.5); "
        "0 is PGFed; acts from a client's second auxiliary gradient on, so not before the third round",
        json_schema_extra={"only": {"run.rounds": 3}},
    )
    inner: Literal["mean", "exact"] = Field(
        "mean",
        description="inner product in alpha's gradient: with the mean of the others' gradients (released code), or "
        "with each one (exact; every client then downloads all of them); the same when all gradients are equal",
    )
    momentum_buffer: Literal["fresh", "kept"] = Field(
        "fresh",
        description="momentum of local SGD starts at zero in each participation, or where the last one left it "
        "(released code); the same when train.momentum is 0",
        json_schema_extra={"only": {"train.momentum": 0.5}},
    )


@dataclass(frozen=True)
class Broadcast(fedavg.Broadcast):
    """The global model, who took part in the previous round, and their expansions times mu.

    ``inner = "mean"`` sends ``mu g_mean``, ``inner = "exact"`` every ``mu g_j``; zeros before the second round.
    """

    participants: CohortClients
    offsets: CohortValues  # mu c_j
    mean_gradient: Annotated[torch.Tensor, Spec(("inner_mean", "parameters"), torch.float32)]
    gradients: Annotated[torch.Tensor, Spec(("inner_exact", "cohort", "parameters"), torch.float32)]


@dataclass(frozen=True)
class Personal(Record):
    """One client's auxiliary gradient ``mu sum_j alpha_ij g_j`` and its alpha over the previous participants."""

    auxiliary: ParameterVector
    alpha: CohortValues


@dataclass(frozen=True)
class Update(fedavg.Update):
    """A locally trained model, its local risk's gradient there and expansion's offset, and the client's new alpha."""

    client: Client
    gradient: ParameterVector
    offset: Annotated[torch.Tensor, Spec((), torch.float32)]
    alpha: CohortValues


@dataclass(frozen=True)
class State(fedavg.State):
    """FedAvg's state, the client's own model, and what beta and momentum-buffer have it keep (else empty)."""

    parameters: ParameterVector
    auxiliary: Annotated[torch.Tensor, Spec(("kept_auxiliary",), torch.float32)]
    buffer: Annotated[torch.Tensor, Spec(("kept_buffer",), torch.float32)]


def sizes(hyper: Hyper, model: FlatModel) -> dict[str, int]:
    """Return which of the optional fields are there."""
    count = model.parameters.numel()
    return {
        "inner_mean": int(hyper.inner == "mean"),
        "inner_exact": int(hyper.inner == "exact"),
        "kept_auxiliary": count if hyper.beta else 0,
        "kept_buffer": count if hyper.momentum_buffer == "kept" else 0,
    }


METHOD = Method(
    name="pgfed",
    summary="each client learns how much of the others' risks, expanded to first order, belongs to its objective",
    hyper=Hyper,
    Broadcast=Broadcast,
    Update=Update,
    State=State,
    Personal=Personal,
    Scoring=fedavg.Broadcast,
    paper=Paper(
        authors="Luo, Mendieta, Chen, Wu",
        title="PGFed: Personalize Each Client's Global Objective for Federated Learning",
        venue="ICCV 2023",
        arxiv="2212.01448",
    ),
    sizes=sizes,
)
