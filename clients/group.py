"""Training of several clients at once (``run.group``): the halves' own code, over a workspace of many models.

A half whose local training is a loop of ``sgd.step(loss.add(per_row(job.model(x), y)))`` need not know whether ``job``
is one client's or a group's: vectors ``[P]`` become ``[G, P]``, batches ``[G, batch, ...]``.  Every client sees the
batches that it would see alone, so a group's results differ from its clients' own by rounding alone.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from clients.training import Job, Mean, Outcome
from fedkd.data import Shard
from fedkd.models import StackedModel
from fedkd.payload import Record


class Work(NamedTuple):
    """What a half trains one client with."""

    job: Job
    state: Record | None
    shard: Shard


class Groups:
    """Trains clients when the first of their group is asked for.

    Args:
        versions: of the state of each client of an order; every ``size`` clients in a row are a group.
        size: ``run.group``.
        begin: takes a client and a version and gives the client's work.
        update: the half's.
        broadcast: what it takes.
    """

    def __init__(
        self,
        versions: Mapping[int, int],
        size: int,
        begin: Callable[[int, int], Work],
        update: Callable[..., Outcome],
        broadcast: Record,
    ) -> None:
        self._versions, self._begin, self._update, self._broadcast = versions, begin, update, broadcast
        clients = [*versions]
        groups = [clients[first : first + size] for first in range(0, len(clients), size)]
        self._group = {client: group for group in groups for client in group}
        self._done: dict[int, Outcome | Exception] = {}
        self._seconds = 0.0  # of each client of the last group

    def outcome(self, client: int) -> tuple[Outcome, float]:
        """Return what a client's training gave, and its share of the seconds that the group took.

        Raises:
            Exception: whatever kept the client from being trained; it does not keep the others of its group.
        """
        if client not in self._done:
            began, group = time.perf_counter(), self._group[client]
            self._serve(group)
            self._seconds = (time.perf_counter() - began) / len(group)
        done = self._done.pop(client)
        if isinstance(done, Exception):
            raise done
        return done, self._seconds

    def _serve(self, group: Sequence[int]) -> None:
        """Train a group, in stacks of clients that are alike."""
        stacks: dict[Hashable, dict[int, Work]] = {}
        for client in group:
            try:
                work = self._begin(client, self._versions[client])
                stacks.setdefault(_likeness(work), {})[client] = work
            except Exception as error:
                self._done[client] = error
        for stack in stacks.values():
            try:
                self._done |= zip(stack, self._outcomes([*stack.values()]), strict=True)
            except Exception as error:
                self._done |= dict.fromkeys(stack, error)

    def _outcomes(self, works: Sequence[Work]) -> list[Outcome]:
        """Train clients that are alike: one by itself, several at once."""
        if len(works) == 1:
            [(job, state, shard)] = works
            return [self._update(job, self._broadcast, state, shard)]
        jobs, states, shards = map(list, zip(*works, strict=True))
        kept = None if _blank(states[0]) else _stacked(states)
        return _apart(self._update(GroupJob.of(jobs), self._broadcast, kept, Shards(shards)), len(works))


def _likeness(work: Work) -> Hashable:
    """Return what clients have to have in common to be stacked.

    That is the model, whether they have a state, the learning rate and the number of steps.  Batches of different
    sizes are filled up, but for BatchNorm, to which an image that is not there would be one that is.
    """
    job, train = work.job, work.job.train
    size, whole = train.batches(len(work.shard))
    steps = train.local_steps or train.local_epochs * -(-whole // size)
    sizes = (size, whole if whole % size else 0) if job.model.norms else None
    return id(job.model), _blank(work.state), job.learning_rate(), steps, sizes


def _blank(state: Record | None) -> bool:
    """Say whether a client has no state, or one without any number in it."""
    return state is None or not any(tensor.numel() for tensor in state.tensors().values())


@dataclass(frozen=True)
class Shards:
    """The images of several clients."""

    shards: list[Shard]

    @property
    def examples(self) -> torch.Tensor:
        """The number of each client's images ``[G]``."""
        return torch.tensor([len(shard) for shard in self.shards])


@dataclass(frozen=True)
class GroupJob(Job):
    """The work of several clients in one round; ``initial_parameters`` are ``[G, P]``, and ``client`` is none of them.

    Args:
        jobs: of each client.
        counts: how many examples of each client are in the batch at hand; renewed with every batch.
    """

    jobs: list[Job] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, jobs: list[Job]) -> GroupJob:
        """Return the common work of clients whose jobs are alike."""
        first = jobs[0]
        shared = {one.name: getattr(first, one.name) for one in dataclasses.fields(Job)}
        shared |= {
            "model": StackedModel(first.model, len(jobs)),
            "client": -1,
            "initial_parameters": first.initial_parameters.expand(len(jobs), -1),
        }
        return cls(**shared, jobs=jobs)

    def torch_rng(self, purpose: str) -> torch.Generator:
        """There is none: every client has its own."""
        raise NotImplementedError(f"the stream '{purpose}' is a client's, not a group's")

    def shared_statistics(self) -> torch.Tensor:
        """Return the statistics that travel ``[G, S]``, or of length zero."""
        return super().shared_statistics().expand(len(self.jobs), -1)

    def mean(self) -> Mean:
        """Return a fresh mean for each client."""
        return GroupMean(self.counts)

    def batches(
        self, shard: Any, steps: int | None = None, purpose: str = "batches"
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the clients' own mini-batches side by side, the smaller ones filled up with zeros."""
        each = [job.batches(own, steps, purpose) for job, own in zip(self.jobs, shard.shards, strict=True)]
        for pairs in zip(*each, strict=True):
            x, y = map(list, zip(*pairs, strict=True))
            self.counts[:] = map(len, y)
            yield pad_sequence(x, batch_first=True), pad_sequence(y, batch_first=True)


class GroupMean(Mean):
    """A running (sum, weight) for each client, which leaves out what batches are filled up with.

    Args:
        counts: of the batch at hand, as the job keeps them.
    """

    def __init__(self, counts: list[int]) -> None:
        super().__init__()
        self._counts = counts
        self._weights: list[torch.Tensor] = []

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """Add per-row values ``[G, batch]`` and return the sum of the clients' means, each of its own rows."""
        counts = torch.tensor(self._counts, device=values.device)[:, None]
        rows = torch.where(torch.arange(values.shape[1], device=values.device) < counts, values, 0.0)
        self.sum = self.sum + rows.detach().sum(dim=1)
        self._weights.append(counts[:, 0])
        return (rows / counts).sum()

    def metric(self) -> tuple[Any, Any]:
        """Return (sums, weights) of the clients, as lists."""
        assert isinstance(self.sum, torch.Tensor)
        return self.sum.tolist(), torch.stack(self._weights).sum(dim=0).tolist()


def _stacked(records: Sequence[Any]) -> Record:
    """Put records of one kind into one, whose tensors have a row for each."""
    kind: type[Record] = type(records[0])
    return kind(**{name: torch.stack([getattr(record, name) for record in records]) for name in kind.specs()})


def _apart(outcome: Outcome, rows: int) -> list[Outcome]:
    """Return each client's own outcome."""

    def row(record: Record, number: int) -> Record:
        return type(record)(**{name: tensor[number] for name, tensor in record.tensors().items()})

    return [
        Outcome(
            row(outcome.update, number),
            row(outcome.state, number),
            {name: (float(total[number]), float(weight[number])) for name, (total, weight) in outcome.metrics.items()},  # type: ignore[index]
        )
        for number in range(rows)
    ]
