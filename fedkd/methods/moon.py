"""MOON: model-contrastive federated learning (Li, He, Song, CVPR 2021).

A client adds to its loss a contrastive term on representations: that of its model shall be like the global model's
(positive) and unlike that of its own model of the participation before (negative).  The server is FedAvg's.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedkd.method import Method, Paper
from fedkd.methods import fedavg, fedavg_ft


class Hyper(fedavg.Hyper):
    """Settings of MOON; defaults of mu and temperature are those of the released code (QinbinLi/MOON @ 8fcba3c)."""

    mu: float = Field(1.0, ge=0, description="weight of the contrastive term; 0 is fedavg, bit for bit")
    temperature: float = Field(
        0.5, gt=0, description="temperature of the contrast; the larger, the closer to a constant log 2 (fedavg)"
    )
    layer: str = Field(
        "head",
        description="stage of the model whose input is the representation; at the first stage, whose input is the "
        "image, the term is constant (fedavg)",
    )
    first_negative: Literal["none", "initial"] = Field(
        "none",
        description="a client's first participation, which has no model before it: no contrastive term (fedavg), or "
        "the initial model as the negative",
    )


METHOD = Method(
    name="moon",
    summary="contrast of representations with the global and the client's previous model",
    hyper=Hyper,
    Broadcast=fedavg.Broadcast,
    Update=fedavg.Update,
    Sum=fedavg.Sum,
    State=fedavg_ft.State,
    paper=Paper(
        authors="Li, He, Song",
        title="Model-Contrastive Federated Learning",
        venue="CVPR 2021",
        arxiv="2103.16257",
    ),
)
