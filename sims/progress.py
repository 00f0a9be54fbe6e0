"""A live display of runs, read from their result files, so it is the same for every engine."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sims.follow import Figures, Follower, alongside

INTERVAL, LINE_EVERY = 0.3, 10.0
MOST_BARS = 12
"""From more runs than this on, only those that are running have a bar."""


@dataclass
class Watched:
    """A run to follow.

    Args:
        folder: where its results appear.
        label: what to call it.
        rounds: how many rounds it has.
    """

    folder: Path
    label: str
    rounds: int
    done: int = 0
    figures: Figures = field(default_factory=dict)
    said: float = 0.0

    def __post_init__(self) -> None:
        self._follower = Follower(self.folder)

    @property
    def started(self) -> bool:
        """Whether there is a run in the folder yet."""
        return (self.folder / "config.toml").exists()

    def update(self) -> None:
        """Read what has been added to the logs."""
        for done, figures in self._follower.new():
            self.done, self.figures = done, self.figures | figures

    def status(self) -> str:
        """Return loss, mean accuracy and that of the worst tenth, bytes so far, and how many clients were sampled."""
        if self.done == 0:
            return "starting"
        now = self.figures
        parts = [f"loss {now['loss']:.3f}"] if "loss" in now else []
        if "accuracy" in now:
            parts += [f"accuracy {now['accuracy']:.1%}", f"worst tenth {now['worst_decile']:.1%}"]
        return "  ".join([*parts, _bytes(now["bytes"]), f"{now['clients']:.0f} clients"])

    @property
    def left(self) -> float:
        """Seconds that the run has yet to go, at its mean pace so far; NaN before its first round."""
        return (self.rounds - self.done) * self.figures["seconds"] / self.done if self.done else math.nan


def all_left(runs: Sequence[Watched], at_once: int) -> float:
    """Return the seconds that all runs have yet to go, so many at a time; NaN before the first round.

    A run that has not begun is taken to need as long as the mean of the others.
    """
    known = [run for run in runs if run.done]
    if not known:
        return math.nan
    usual = sum(run.rounds * run.figures["seconds"] / run.done for run in known) / len(known)
    unfinished = sum(run.done < run.rounds for run in runs)
    return sum(run.left if run.done else usual for run in runs) / max(1, min(at_once, unfinished))


@contextmanager
def watching(runs: Sequence[Watched], console: Console, at_once: int = 1) -> Iterator[None]:
    """Show the progress of runs while the block runs: live bars on a terminal, a line now and then elsewhere.

    Args:
        runs: which.
        console: where.
        at_once: how many run at a time.
    """
    with alongside(_bars if console.is_terminal else _lines, runs, console, at_once):
        yield


def _bars(runs: Sequence[Watched], console: Console, at_once: int, stop: threading.Event) -> None:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[status]}"),
    )
    few = len(runs) <= MOST_BARS
    with Progress(*columns, console=console) as progress:
        tasks = [
            progress.add_task(run.label, total=run.rounds, status="waiting", left="", start=False, visible=few)
            for run in runs
        ]
        total = sum(run.rounds for run in runs)
        whole = progress.add_task("all rounds", total=total, status="", left="", visible=len(runs) > 1)
        while True:
            ended = stop.wait(INTERVAL)
            for run, task in zip(runs, tasks, strict=True):
                if run.started:
                    progress.start_task(task)
                    run.update()
                    going = run.done < run.rounds
                    progress.update(
                        task, completed=run.done, status=run.status(), left=_left(run.left), visible=few or going
                    )
                    if not going:
                        progress.stop_task(task)
            finished = sum(run.done == run.rounds for run in runs)
            said = f"{finished} of {len(runs)} runs finished"
            progress.update(
                whole, completed=sum(run.done for run in runs), left=_left(all_left(runs, at_once)), status=said
            )
            if ended:
                return


def _lines(runs: Sequence[Watched], console: Console, at_once: int, stop: threading.Event) -> None:
    while True:
        ended = stop.wait(INTERVAL)
        for run in runs:
            before = run.done
            run.update()
            due = time.monotonic() - run.said > LINE_EVERY or run.done == run.rounds
            if run.done > before and due:
                run.said = time.monotonic()
                parts = [f"{run.label}: round {run.done}/{run.rounds}", run.status(), _left(run.left)]
                if len(runs) > 1 and (left := _left(all_left(runs, at_once))):
                    parts.append(f"(all runs: {left})")
                console.print("  ".join(filter(None, parts)), highlight=False, markup=False, soft_wrap=True)
        if ended:
            return


def _left(seconds: float) -> str:
    """Write a time that is left; nothing where none is, or it is not known."""
    return f"{timedelta(seconds=round(seconds))} left" if seconds > 0 else ""


def _bytes(count: float) -> str:
    """Write a number of bytes in decimal units."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
