"""FedDyn: a regularizer that changes with every participation (Acar et al., ICLR 2021).

A client adds to its loss a linear term with the gradient it was left with and a proximal term towards the global
model, weighed by alpha; the server subtracts from the mean of the models the mean of all clients' gradients over
alpha, h / alpha.  At a fixed point all local minima are the global model and the clients' gradients sum to zero.

Client and server keep ``drift_k = -gradient_k / alpha`` and ``drift = -h / alpha``, sums of parameter differences in
which alpha does not occur; so does the released code (alpemreacar/FedDyn @ 48a19fa) and alpha = 0 is no division.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from fedkd.config import HyperParameters, ModelSection, TrainSection, overshoots
from fedkd.method import Method, Paper
from fedkd.methods import fedavg
from fedkd.payload import ParameterVector


class Hyper(HyperParameters):
    """Settings of FedDyn; its mean of the models is uniform, so there is no weighting by examples."""

    alpha: float = Field(
        0.01,
        ge=0,
        description="weight of the clients' linear and proximal terms (0.01 in the released examples); 0 leaves plain "
        "SGD, but not the server's correction; times train.lr below 2, or clients' models may diverge",
    )
    server_correction: float = Field(
        1.0,
        ge=0,
        le=1,
        description="factor on the server's -h / alpha; 1 is the paper's, 0 with alpha=0 is fedavg with uniform "
        "weighting, bit for bit",
    )

    def doubts(self, train: TrainSection, model: ModelSection, statistics: int) -> list[str]:
        """Say so where the pull to the regularizer's minimum overshoots by more than the distance that it acts on."""
        del model, statistics
        return overshoots("feddyn.alpha", self.alpha, train, "clients' models")


@dataclass(frozen=True)
class State(fedavg.State):
    """FedAvg's state and the sum of the client's moves away from the models it was given, -gradient / alpha."""

    drift: ParameterVector


METHOD = Method(
    name="feddyn",
    summary="dynamic regularization: clients' linear and proximal terms, server's correction",
    hyper=Hyper,
    Broadcast=fedavg.Broadcast,
    Update=fedavg.Update,
    State=State,
    groups=True,
    paper=Paper(
        authors="Acar, Zhao, Matas, Mattina, Whatmough, Saligrama",
        title="Federated Learning Based on Dynamic Regularization",
        venue="ICLR 2021",
        arxiv="2111.04263",
    ),
)
