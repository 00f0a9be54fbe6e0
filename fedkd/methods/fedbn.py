"""FedBN: FedAvg without the BatchNorm layers, which stay with the client (Li, Jiang, Zhang, Kamp, Dou, ICLR 2021)."""

from __future__ import annotations

import torch

from fedkd import partial
from fedkd.config import ModelSection, TrainSection
from fedkd.method import Method, Paper
from fedkd.models import FlatModel


class Hyper(partial.Hyper):
    """Settings of FedBN: FedAvg's."""

    def shared(self, model: FlatModel) -> torch.Tensor:
        """Return the mask of all parameters but the scales and shifts of BatchNorm."""
        norms = {name.rpartition(".")[0] for name in model.statistics_shapes}
        mask = torch.ones(model.parameters.shape[-1], dtype=torch.bool)
        for name, view in model.unflatten(mask).items():
            view.fill_(name.rpartition(".")[0] not in norms)
        return mask

    def doubts(self, train: TrainSection, model: ModelSection, statistics: int) -> list[str]:
        """Say so where no layer stays with the clients: a table with FedAvg would show a tie that means nothing."""
        del train
        if statistics:
            return []
        return [
            f"model.name = '{model.name}' with model.norm = '{model.norm}' has no BatchNorm for fedbn to leave with "
            "the clients, so its run is fedavg's; take model.name=fedgen_cnn (or resnet18) and model.norm=batch"
        ]


METHOD = Method(
    name="fedbn",
    summary="FedAvg with personal BatchNorm layers",
    hyper=Hyper,
    Broadcast=partial.Broadcast,
    Update=partial.Update,
    Sum=partial.Sum,
    State=partial.State,
    groups=True,
    paper=Paper(
        authors="Li, Jiang, Zhang, Kamp, Dou",
        title="FedBN: Federated Learning on Non-IID Features via Local Batch Normalization",
        venue="ICLR 2021",
        arxiv="2102.07623",
    ),
    sizes=partial.sizes,
)
