"""pFedMe: personalization by Moreau envelopes (T. Dinh, Tran, Nguyen, NeurIPS 2020).

Client i's part of the global objective is the Moreau envelope of its loss,
``F_i(w) = min_theta f_i(theta) + lambda / 2 ||theta - w||^2``; the minimiser theta is its personal model, and
``grad F_i(w) = lambda (w - theta)``.  Two readings:

``paper``
    the minimiser is approximated by ``inner-steps`` gradient steps; models are averaged uniformly; theta is scored.
``authors``
    the released code (CharlieDinh/pFedMe @ caf24b1): the inner steps have an L2 term of their own, models are
    weighted by examples, and the model that is scored as personal is w after its local rounds, since the list that
    should hold theta is the list of the model's parameters, which are overwritten before scoring.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from fedkd.config import HyperParameters, ModelSection, TrainSection
from fedkd.method import Method, Paper
from fedkd.methods import fedavg, fedavg_ft


class Hyper(HyperParameters):
    """Settings of pFedMe.  ``train.lr`` is the paper's eta, ``train.local-steps`` its local rounds R."""

    variant: Literal["paper", "authors"] = Field("paper", description="which reading (see `fedkd show pfedme`)")
    lam: float = Field(
        15.0,
        ge=0,
        description="lambda, the pull of the personal model to the client's copy w of the global one; times inner-lr "
        "below 2; times train.lr at most 1, or w overshoots the personal model, and beyond 2 it may diverge; 0: the "
        "global model never moves; 15 is the released code's",
    )
    inner_steps: int = Field(
        5,
        ge=1,
        description="gradient steps on the personal model per local round, on one batch (K); 1 with "
        "lam * train.lr = 1 is FedAvg with learning rate inner-lr, up to rounding; 5 is the released code's",
    )
    inner_lr: float = Field(0.09, gt=0, description="their learning rate; 0.09 is the released code's")
    inner_weight_decay: float = Field(
        0.001,
        ge=0,
        description="authors variant: L2 coefficient in the inner steps; 0 leaves it out",
        json_schema_extra={"only": {"variant": "authors"}},
    )
    beta: float = Field(
        1.0,
        ge=0,
        description="the server moves this far from the old model to the clients' mean; 1 takes the mean, 0 stays",
    )

    @model_validator(mode="after")
    def _inner_steps_contract(self) -> Self:
        if self.inner_steps > 1 and self.lam * self.inner_lr >= 2:
            raise ValueError(
                f"pfedme.lam = {self.lam} times pfedme.inner-lr = {self.inner_lr} is at least 2, with which the inner "
                f"steps run away from the personal model; take pfedme.inner-lr below {2 / self.lam:.3g}"
            )
        return self

    def doubts(self, train: TrainSection, model: ModelSection, statistics: int) -> list[str]:
        """Say so where the steps of w overshoot by more than they gain."""
        del model, statistics
        if self.lam * train.lr <= 2:
            return []
        return [
            f"train.lr = {train.lr} times pfedme.lam = {self.lam} is above 2, where pfedme's global model may diverge; "
            f"take train.lr up to {1 / self.lam:.3g}, or a smaller pfedme.lam"
        ]


METHOD = Method(
    name="pfedme",
    summary="personal models by Moreau envelopes around the global one",
    hyper=Hyper,
    Broadcast=fedavg.Broadcast,
    Update=fedavg.Update,
    State=fedavg_ft.State,
    paper=Paper(
        authors="T. Dinh, Tran, Nguyen",
        title="Personalized Federated Learning with Moreau Envelopes",
        venue="NeurIPS 2020",
        arxiv="2006.08848",
    ),
    variants=("paper", "authors"),
)
