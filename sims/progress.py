"""A live display of runs, read from their result files, so it is the same for every engine."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from sims.follow import Figures, Follower, alongside

INTERVAL, LINE_EVERY = 0.3, 10.0
MOST_BARS = 12
"""From more runs than this on, only those that are running have a bar."""
WIDE = 125
"""Columns that bar, times and figures in words take beside the name of a run; narrower consoles get a table."""


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

    def shown(self) -> dict[str, str]:
        """Return the figures of the display as text, by name; an empty one where the round had none."""
        return {name: text(self.figures[name]) if name in self.figures else "" for name, text in _TEXTS.items()}

    def status(self) -> str:
        """Return loss, mean accuracy and that of the worst tenth, bytes so far, and how many clients were sampled."""
        return "  ".join(_WORDS[name].format(text) for name, text in self.shown().items() if text)

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


class _Headed(Progress):
    """A display with headings, for consoles without the room to say in each line what its figures are."""

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        table = super().make_tasks_table(tasks)
        table.show_header = True
        return table


def _display(console: Console, longest: int) -> Progress:
    """Return the display that fits: a line of words per run, or a table without bar and elapsed time.

    Args:
        console: where.
        longest: characters of the longest name of a run.
    """
    name = "{task.description}"
    if console.width >= WIDE + longest:
        words = (TextColumn("{task.fields[left]}"), TextColumn("{task.fields[status]}"))
        first = TextColumn(name, markup=False)
        return Progress(first, BarColumn(12), MofNCompleteColumn(), TimeElapsedColumn(), *words, console=console)
    headings = {"left": "", "worst_decile": "worst tenth"}

    def right(key: str) -> Column:
        return Column(headings.get(key, key), justify="right", no_wrap=True)

    figures = [
        TextColumn(f"{{task.fields[{key}]}}", justify="right", table_column=right(key)) for key in ("left", *_TEXTS)
    ]
    run = TextColumn(name, markup=False, table_column=Column("run", overflow="fold"))  # a long name takes two lines
    return _Headed(run, MofNCompleteColumn(table_column=right("round")), *figures, console=console)


def _bars(runs: Sequence[Watched], console: Console, at_once: int, stop: threading.Event) -> None:
    few = len(runs) <= MOST_BARS
    none: dict[str, Any] = dict.fromkeys(("status", *_TEXTS), "")
    with _display(console, max(len(run.label) for run in runs)) as progress:
        tasks = [
            progress.add_task(run.label, total=run.rounds, left="waiting", start=False, visible=few, **none)
            for run in runs
        ]
        total = sum(run.rounds for run in runs)
        whole = progress.add_task("all rounds", total=total, left="", visible=len(runs) > 1, **none)
        while True:
            ended = stop.wait(INTERVAL)
            for run, task in zip(runs, tasks, strict=True):
                if run.started:
                    progress.start_task(task)
                    run.update()
                    going = run.done < run.rounds
                    figures = {**none, "left": "starting"}
                    if run.done:
                        figures = {"left": _left(run.left), "status": run.status(), **run.shown()}
                    progress.update(task, completed=run.done, visible=few or going, **figures)
                    if not going:
                        progress.stop_task(task)
            finished = f"{sum(run.done == run.rounds for run in runs)} of {len(runs)}"
            progress.update(
                whole,
                completed=sum(run.done for run in runs),
                description=f"{finished} done" if isinstance(progress, _Headed) else "all rounds",
                left=_left(all_left(runs, at_once)),
                status=f"{finished} runs finished",
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
        if count < 999.5:  # from there on three digits would be those of the next unit
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


_TEXTS: dict[str, Callable[[float], str]] = {
    "loss": "{:.3f}".format,
    "accuracy": "{:.1%}".format,
    "worst_decile": "{:.1%}".format,
    "bytes": _bytes,
    "clients": "{:.0f}".format,
}
_WORDS = {
    "loss": "loss {}",
    "accuracy": "accuracy {}",
    "worst_decile": "worst tenth {}",
    "bytes": "{}",
    "clients": "{} clients",
}
