"""FedDF: the server fine-tunes the average by distilling the ensemble of the round's models on unlabelled public data.

(Lin, Kong, Stich, Jaggi, NeurIPS 2020, Algorithm 1; code epfml/federated-learning-public-code @ 44dd555.)  The public
images are set aside (``data.public-fraction``), without their labels, and no client holds one: FedGen's comparison
likewise gave FedDF unlabelled training samples.  The authors stop early by the accuracy on labelled validation data; a
server without labels takes a fixed number of steps.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedkd.method import Method, Paper
from fedkd.methods import fedavg


class Hyper(fedavg.Hyper):
    """Settings of FedDF."""

    steps: int = Field(
        100,
        ge=0,
        le=1_000_000,
        description="distillation steps per round; 0 is FedAvg (paper: 10,000 with early stopping)",
    )
    batch: int = Field(128, ge=1, description="public images per distillation step; at most all there are")
    lr: float = Field(1e-3, gt=0, description="Adam learning rate of the distillation, fresh in each round")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="learning rate over a round's steps: annealed to 0 (paper), or constant"
    )
    temperature: float = Field(1.0, gt=0, description="temperature of the KL (times its square); 1 is the paper")
    average: Literal["logits", "probabilities"] = Field(
        "logits", description="what is averaged over the teachers; logits is the paper, the code has both"
    )


METHOD = Method(
    name="feddf",
    summary="ensemble distillation on the server with unlabelled public data",
    hyper=Hyper,
    Broadcast=fedavg.Broadcast,
    Update=fedavg.Update,
    State=fedavg.State,
    paper=Paper(
        authors="Lin, Kong, Stich, Jaggi",
        title="Ensemble Distillation for Robust Model Fusion in Federated Learning",
        venue="NeurIPS 2020",
        arxiv="2006.07242",
    ),
    defaults={"data.public-fraction": 0.1},
)
