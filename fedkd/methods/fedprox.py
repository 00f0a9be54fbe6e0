"""FedProx: FedAvg with a proximal term towards the global model (Li et al., MLSys 2020, Algorithm 2)."""

from __future__ import annotations

from pydantic import Field

from fedkd.config import ModelSection, TrainSection, overshoots
from fedkd.method import Method, Paper
from fedkd.methods import fedavg


class Hyper(fedavg.Hyper):
    """Settings of FedProx."""

    mu: float = Field(
        0.1,
        ge=0,
        description="weight of the proximal term; 0 is FedAvg, bit for bit; times train.lr below 2, or clients' models "
        "may diverge",
    )

    def doubts(self, train: TrainSection, model: ModelSection, statistics: int) -> list[str]:
        """Say so where the pull to the global model overshoots by more than the distance that it acts on."""
        del model, statistics
        return overshoots("fedprox.mu", self.mu, train, "clients' models")


METHOD = Method(
    name="fedprox",
    summary="FedAvg with a proximal term towards the global model",
    hyper=Hyper,
    Broadcast=fedavg.Broadcast,
    Update=fedavg.Update,
    Sum=fedavg.Sum,
    State=fedavg.State,
    groups=True,
    paper=Paper(
        authors="Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith",
        title="Federated Optimization in Heterogeneous Networks",
        venue="MLSys 2020",
        arxiv="1812.06127",
    ),
)
