"""What every client half trains with: batches, the model's workspace and plain SGD on vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch

from fedkd.config import Config, TrainSection
from fedkd.data import Shard
from fedkd.losses import cross_entropy
from fedkd.models import FlatModel
from fedkd.payload import Record
from fedkd.rng import Streams

Predictor = Callable[[torch.Tensor], torch.Tensor]
"""Images ``[batch, channels, height, width]`` to logits ``[batch, classes]``."""
Metrics = dict[str, tuple[float, float]]
"""Name to (sum, weight); the mean is sum / weight."""


class Outcome(NamedTuple):
    """What local training gives: the payload for the server, the state to keep, and metrics."""

    update: Record
    state: Record
    metrics: Metrics


class Models(NamedTuple):
    """What a client can predict with.  Both are made when asked for, since they share one workspace.

    Args:
        shared: the global model on this client, or None where there is none.
        personal: the client's own model; None: it is the shared one.
    """

    shared: Callable[[], Predictor] | None
    personal: Callable[[], Predictor] | None


@dataclass(frozen=True)
class Job:
    """One client's work in one round.

    Args:
        config: the run's configuration.
        model: the workspace; its content is whatever the last user left, so load before use.
        streams: the run's random streams.
        round: the current round, from 1.
        client: the client's number.
        initial_parameters: the model's parameters ``[P]`` before any training, the same for all clients.
        personal: what the server sent to this client alone when it trains; None for methods without, and in scoring.
        extras: workspaces of the method's own (a generator, say), by name.
        last_round: round of the client's previous participation, which its state is from; 0: there was none.
    """

    config: Config
    model: FlatModel
    streams: Streams
    round: int
    client: int
    initial_parameters: torch.Tensor
    extras: dict[str, FlatModel]
    personal: Any = None
    last_round: int = 0

    @property
    def hyper(self) -> Any:
        """The method's own settings (each half knows their type)."""
        return self.config.hyper

    @property
    def train(self) -> TrainSection:
        """The settings of local training."""
        return self.config.train

    def torch_rng(self, purpose: str) -> torch.Generator:
        """Return this round's and this client's random stream for a purpose."""
        return self.streams.torch(purpose, self.round, self.client)

    def learning_rate(self) -> float:
        """Return the learning rate of this participation."""
        train = self.train
        if train.lr_decay_from == "round":
            return train.lr * train.lr_decay ** (self.round - 1)
        return train.lr * train.lr_decay ** max(self.last_round - 1, 0)

    def load(self, parameters: torch.Tensor, shared: torch.Tensor, kept: torch.Tensor | None) -> None:
        """Fill the workspace with parameters and the statistics that are the client's by ``model.norm-statistics``.

        Args:
            parameters: ``[P]``.
            shared: averaged statistics ``[S]``, or length zero when they are personal.
            kept: the client's own statistics ``[S]``; None for a client without state.
        """
        if len(shared):
            statistics = shared
        elif kept is not None:
            statistics = kept
        else:
            statistics = initial_statistics(self.model)
        self.model.load(parameters, statistics)

    def shared_statistics(self) -> torch.Tensor:
        """Return the statistics that travel: a copy of the workspace's, or length zero when they are personal."""
        if self.config.model.norm_statistics == "averaged":
            return self.model.statistics.clone().cpu()
        return torch.zeros(0)

    def mean(self) -> Mean:
        """Return a fresh mean of losses over the examples of this participation's batches."""
        return Mean()

    def predictor(self) -> Predictor:
        """Return the workspace's current content as a predictor, in evaluation mode."""
        self.model.eval()

        @torch.no_grad()
        def predict(x: torch.Tensor) -> torch.Tensor:
            return self.model(x)

        return predict

    def batches(
        self, shard: Shard, steps: int | None = None, purpose: str = "batches"
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield this participation's mini-batches: ``local-steps`` of them, or ``local-epochs`` passes.

        Each pass is a fresh permutation.  A client smaller than a batch uses all it has in every step.

        Args:
            steps: this many batches instead.
            purpose: the random stream that orders the examples.
        """
        train, rng = self.train, self.torch_rng(purpose)
        most = train.local_steps or None if steps is None else steps
        size, whole = train.batches(len(shard))
        done, passes = 0, 0
        while passes < train.local_epochs if most is None else done < most:
            order = torch.randperm(len(shard), generator=rng)[:whole].to(shard.y.device)
            for rows in torch.split(order, size):
                if done == most:
                    return
                yield shard.batch(rows)
                done += 1
            passes += 1


class SGD:
    """Plain SGD on a vector, fresh for one participation.

    ``d <- grad + weight_decay * theta;  m <- momentum * m + d;  theta <- theta - lr * m`` (PyTorch's convention).

    Args:
        job: whose workspace and settings.
        lr: learning rate of this participation.
        parameters: the vector ``[P]`` to change in place; None: the workspace's.
        part: mask ``[P]`` of the parameters that may move, None: all; weight decay leaves the others alone too.
    """

    def __init__(
        self, job: Job, lr: float, parameters: torch.Tensor | None = None, part: torch.Tensor | None = None
    ) -> None:
        self.model, self.lr = job.model, lr
        self.parameters = job.model.parameters if parameters is None else parameters
        self.frozen = None if part is None else ~part.to(job.model.device)
        self.momentum, self.weight_decay = job.train.momentum, job.train.weight_decay
        self.buffer: torch.Tensor | None = None

    def step(self, loss: torch.Tensor, extra: torch.Tensor | None = None) -> None:
        """Step along the workspace's gradient of a scalar loss, plus an ``extra`` gradient vector ``[P]``."""
        if extra is None and self.frozen is None and not self.weight_decay and not self.momentum:
            self.model.descend(loss, self.parameters, self.lr)
            return
        gradient = self.model.backward(loss)
        self.apply(gradient if extra is None else gradient.add_(extra))

    @torch.no_grad()
    def apply(self, direction: torch.Tensor) -> None:
        """Step along a gradient vector ``[P]`` that is at hand; its content is used up."""
        if self.weight_decay:
            direction.add_(self.parameters, alpha=self.weight_decay)
        if self.frozen is not None:
            direction.masked_fill_(self.frozen, 0.0)
        if self.momentum:
            self.buffer = direction.clone() if self.buffer is None else self.buffer.mul_(self.momentum).add_(direction)
            direction = self.buffer
        self.parameters.add_(direction, alpha=-self.lr)


def fine_tuned(job: Job, sgd: SGD, shard: Shard) -> Iterator[Predictor]:
    """Step along the cross-entropy in ``local-epochs`` passes, and after each yield what the workspace predicts.

    The steps are those of :meth:`Job.batches`; a predictor is good until the next one is asked for.
    """
    size, drop, batches = min(job.train.batch_size, len(shard)), job.train.last_batch == "drop", job.batches(shard)
    steps = len(shard) // size if drop else -(-len(shard) // size)
    for _ in range(job.train.local_epochs):
        job.model.train()
        for x, y in islice(batches, steps):
            sgd.step(cross_entropy(job.model(x), y).mean())
        yield job.predictor()


def initial_statistics(model: FlatModel) -> torch.Tensor:
    """Return BatchNorm's initial running statistics ``[..., S]``: mean 0, variance 1, layer by layer."""
    parts = []
    for norm in model.norms:
        parts += [torch.zeros(norm.num_features), torch.ones(norm.num_features)]
    statistics = torch.cat(parts) if parts else torch.zeros(0)
    return statistics.expand(model.statistics.shape).clone()


class Mean:
    """A running (sum, weight) of per-row values, kept on the device until it is read."""

    def __init__(self) -> None:
        self.sum: torch.Tensor | float = 0.0
        self.weight = 0

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """Add per-row values ``[batch]`` and return their mean."""
        self.sum = self.sum + values.detach().sum()
        self.weight += len(values)
        return values.mean()

    def metric(self) -> tuple[float, float]:
        """Return (sum, weight)."""
        return float(self.sum), float(self.weight)
