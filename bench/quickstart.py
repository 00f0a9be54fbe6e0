"""A plain Flower app on the pattern of Flower's PyTorch quickstart, to compare with: it runs from a copy of this file.

One client per SuperNode; the model is made anew for each message; a DataLoader; state dicts as NumPy arrays in both
directions; Flower's FedAvg.  The images are read from one file per client, already scaled, which is quicker than the
quickstart's decoding and transforming image by image.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch.utils.data import DataLoader, TensorDataset

from fedkd.config import ModelSection
from fedkd.models import StagedModel, build
from fedkd.rng import Streams

client = ClientApp()
server = ServerApp()


def load_model(context: Context, shape: tuple[int, ...]) -> StagedModel:
    """Return a new model for images of a shape."""
    return build(ModelSection(name=str(context.run_config["model"])), shape, 10, Streams(1))


def load_data(context: Context, number: int) -> TensorDataset:
    """Return the images and classes of a client."""
    path = Path(str(context.run_config["shards"])) / f"{number:06d}.npz"
    with np.load(path, allow_pickle=False) as saved:
        return TensorDataset(torch.from_numpy(saved["x"]), torch.from_numpy(saved["y"]))


@client.train()
def train(message: Message, context: Context) -> Message:
    """Train the arrived model in one pass over the client's images."""
    data = load_data(context, int(context.node_config["partition-id"]))
    loader = DataLoader(data, batch_size=int(context.run_config["batch-size"]), shuffle=True)
    model = load_model(context, tuple(data.tensors[0].shape[1:]))
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=float(str(message.content.config_records["config"]["lr"])))
    running = 0.0
    for x, y in loader:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        running += loss.item()
    metrics = MetricRecord({"train_loss": running / len(loader), "num-examples": len(data)})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


class Watched(FedAvg):
    """FedAvg that notes when each round begins."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.began: list[float] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Note the time and do what FedAvg does."""
        self.began.append(time.perf_counter())
        return super().configure_train(server_round, arrays, config, grid)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run FedAvg and write the beginnings of the rounds down."""
    run = context.run_config
    clients, cohort = int(run["clients"]), int(run["cohort"])
    strategy = Watched(
        fraction_train=cohort / clients,
        fraction_evaluate=0.0,
        min_train_nodes=cohort,
        min_available_nodes=clients,
    )
    model = load_model(context, tuple(load_data(context, 0).tensors[0].shape[1:]))
    strategy.start(
        grid,
        ArrayRecord(model.state_dict()),
        num_rounds=int(run["rounds"]),
        train_config=ConfigRecord({"lr": run["lr"]}),
    )
    Path(str(run["out"])).write_text(json.dumps(strategy.began))
