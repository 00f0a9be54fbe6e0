"""Per-FedAvg: a global model from which one gradient step personalizes (Fallah, Mokhtari, Ozdaglar, NeurIPS 2020).

Client i's part of the global objective is its loss after a gradient step, ``F_i(w) = f_i(w - alpha grad f_i(w))``,
so ``grad F_i(w) = (I - alpha Hess f_i(w)) grad f_i(w - alpha grad f_i(w))``.  The variants are the paper's two cheap
gradients and the full one:

``first-order``
    (FO) without the Hessian.
``hessian-free``
    (HF) its product with the gradient d by ``(grad f(w + delta d) - grad f(w - delta d)) / (2 delta)``.
``hessian``
    the exact product, by differentiating twice.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedkd.config import HyperParameters
from fedkd.method import Method, Paper
from fedkd.methods import fedavg


class Hyper(HyperParameters):
    """Settings of Per-FedAvg.  ``train.lr`` is the paper's beta, ``train.local-steps`` its tau."""

    variant: Literal["first-order", "hessian-free", "hessian"] = Field(
        "first-order", description="how the gradient after a step is computed (see `fedkd show per_fedavg`)"
    )
    weighting: Literal["uniform", "examples"] = Field(
        "uniform", description="clients weigh all the same in the global model (paper), or by their examples"
    )
    alpha: float = Field(
        0.01, ge=0, description="learning rate of the personalizing step; 0 is FedAvg, bit for bit; the default is ours"
    )
    delta: float = Field(
        1e-3,
        gt=0,
        description="hessian-free: step of the difference, in units of the gradient; towards 0 it is the exact product "
        "(rounding apart); the default is ours",
        json_schema_extra={"only": {"variant": "hessian-free"}},
    )
    score_steps: int = Field(
        1,
        ge=0,
        description="gradient steps on all of a client's training data before it is scored; 0 scores the global model",
    )


METHOD = Method(
    name="per_fedavg",
    summary="a global model from which one gradient step personalizes",
    hyper=Hyper,
    Broadcast=fedavg.Broadcast,
    Update=fedavg.Update,
    Sum=fedavg.Sum,
    State=fedavg.State,
    paper=Paper(
        authors="Fallah, Mokhtari, Ozdaglar",
        title="Personalized Federated Learning with Theoretical Guarantees: A Model-Agnostic Meta-Learning Approach",
        venue="NeurIPS 2020",
        arxiv="2002.07948",
    ),
    variants=("first-order", "hessian-free", "hessian"),
)
