"""What the benchmarks share: the work of a round, contestants in turn, medians and ratios, tables."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import images
from fedkd.config import Config, Scalar
from fedkd.data import federate
from fedkd.results import Run
from sims.simulation import PrivateSuperLink, default_nodes

ROUNDS, WARM_UP = 8, 2
"""Rounds of a run, and how many of them at its beginning do not count; the last does not either."""


@dataclass(frozen=True)
class Work:
    """The training of a round, the same for all contestants: each client of a cohort makes one pass over its images.

    Args:
        data: whose shape the images have, a name of :data:`bench.images.SHAPES`.
        model: a name of ``model.name``.
        clients: how many there are.
        cohort: how many of them train in a round.
        images: training images of a client, a multiple of the batch.
        batch: images of a step.
    """

    data: str
    model: str
    clients: int
    cohort: int
    images: int
    batch: int

    @property
    def steps(self) -> int:
        """SGD steps of a client."""
        return self.images // self.batch

    def __str__(self) -> str:
        return (
            f"{self.model}, {self.cohort} of {self.clients} clients, "
            f"{self.steps} step{'s' * (self.steps > 1)} of {self.batch}"
        )

    def config(self, root: Path, folder: Path, **keys: Scalar) -> Config:
        """Return the run of FedAvg, or with ``keys`` of another method, that does this; only its end is scored.

        Args:
            root: folder of the data.
            folder: for the results.
            keys: further settings, ``section__key``; two underscores stand for the dot, one for a hyphen.
        """
        flat: dict[str, Scalar] = {
            "run.method": "fedavg",
            "run.clients": self.clients,
            "run.clients-per-round": self.cohort,
            "run.rounds": ROUNDS,
            "run.eval-every": ROUNDS,
            "run.device": "cpu",
            "run.dir": str(folder),
            "data.name": self.data,
            "data.root": str(root),
            "data.partition": "iid",
            "data.test": "own-labels",
            "data.fraction": min(1.0, self.clients * self.images / images.count(self.data, root)),
            "model.name": self.model,
            "train.local-steps": self.steps,
            "train.batch-size": self.batch,
            "train.lr": 0.01,
        }
        named = {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()}
        return Config.from_flat(flat | named)


@dataclass(frozen=True)
class Bench:
    """Where a benchmark runs.

    Args:
        scratch: folder that is removed at the end.
        root: folder with data; None: images are invented.
        repetitions: how often everything is measured.
    """

    scratch: Path
    root: Path | None = None
    repetitions: int = 5
    nodes: int = field(default_factory=default_nodes)

    def data(self, work: Work) -> Path:
        """Return the folder with the images of some work, which are invented if there are none."""
        return self.root or images.invented(self.scratch, work.data, work.clients * work.images, 10 * work.clients)

    def folder(self) -> Path:
        """Return a new folder."""
        return Path(tempfile.mkdtemp(dir=self.scratch))

    def ours(self, work: Work, **keys: Scalar) -> float:
        """Return our seconds per round on the simulation engine; ``keys`` as in :meth:`Work.config`."""
        config = work.config(self.data(work), self.folder(), **keys)
        federate(config)  # decoded and dealt once, and not by what is measured
        with PrivateSuperLink() as superlink:
            superlink.run([config], self.nodes)
        return seconds_per_round(config.run.dir)


def seconds_per_round(folder: str | Path) -> float:
    """Return the median seconds of a whole round, without those that are scored, after the warm-up."""
    return float(statistics.median(row["seconds"] for row in Run.open(folder).rows("rounds")[WARM_UP:-1]))


def in_turn(contestants: Mapping[str, Callable[[], float]], repetitions: int) -> dict[str, list[float]]:
    """Measure each contestant once, and again, so that whatever else the machine does falls on all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repetitions):
        for name, measure in contestants.items():
            seconds[name].append(measure())
            print(f"  {name}: {seconds[name][-1]:.3f}", flush=True)
    return seconds


@dataclass(frozen=True)
class Table:
    """An answer: a title, columns and rows of text, and the figures behind them."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    figures: Any = None

    def markdown(self) -> str:
        """Return it in Markdown."""
        lines = [self.title, "", f"| {' | '.join(self.columns)} |", "|---" + "|---:" * (len(self.columns) - 1) + "|"]
        return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in self.rows)])


def middle(values: Sequence[float], digits: int = 3) -> str:
    """Write a median and, in parentheses, the range."""
    text = f"{statistics.median(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def ratios(seconds: Mapping[str, Sequence[float]], first: str, second: str) -> list[float]:
    """Return the ratio of two contestants, repetition by repetition."""
    return [a / b for a, b in zip(seconds[first], seconds[second], strict=True)]


def compared(title: str, seconds: Mapping[str, Sequence[float]]) -> Table:
    """Return the table of contestants: seconds of each, and its ratio to the first."""
    first = next(iter(seconds))
    rows = [
        [name, middle(values), "" if name == first else middle(ratios(seconds, name, first), 2)]
        for name, values in seconds.items()
    ]
    columns = ["", "seconds per round", f"ratio to {first}"]
    return Table(title, columns, rows, {name: list(values) for name, values in seconds.items()})
