"""A live display of runs, read from their result files, so it is the same for every engine."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

INTERVAL, LINE_EVERY = 0.3, 10.0


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
    loss: float = float("nan")
    accuracy: float = float("nan")
    worst: float = float("nan")
    offsets: dict[str, int] = field(default_factory=dict)
    said: float = 0.0

    def update(self) -> None:
        """Read what has been added to the logs."""
        trained = [row for row in self._new("clients") if row.get("loss_weight")]
        last = [row for row in trained if row["round"] == trained[-1]["round"]]
        if last:
            self.loss = sum(row["loss_sum"] for row in last) / sum(row["loss_weight"] for row in last)
        rows = self._new("evaluations")
        if rows:
            scores = sorted(
                row.get("personal_correct", row.get("global_correct", 0)) / row["total"]
                for row in rows
                if row["round"] == rows[-1]["round"] and row["total"]
            )
            if scores:
                self.accuracy = sum(scores) / len(scores)
                tenth = scores[: math.ceil(len(scores) / 10)]
                self.worst = sum(tenth) / len(tenth)
        for row in self._new("rounds"):
            self.done = row["round"]

    def status(self) -> str:
        """Return loss, mean accuracy and accuracy of the worst tenth of the clients."""
        if self.done == 0:
            return "starting"
        scored = f"  accuracy {self.accuracy:.1%}  worst tenth {self.worst:.1%}" if self.accuracy >= 0 else ""
        return f"loss {self.loss:.3f}{scored}"

    def _new(self, log: str) -> list[dict[str, Any]]:
        path, offset = self.folder / f"{log}.jsonl", self.offsets.get(log, 0)
        try:
            with path.open("rb") as file:
                file.seek(max(offset - 1, 0))
                if offset and file.read(1) != b"\n":  # a run that goes on cut its log back
                    offset = file.seek(0)
                text = file.read()
        except OSError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self.offsets[log] = offset + len(whole)
        return [json.loads(line) for line in whole.splitlines()]


@contextmanager
def watching(runs: Sequence[Watched], console: Console | None = None) -> Iterator[None]:
    """Show the progress of runs while the block runs: live bars on a terminal, a line now and then elsewhere."""
    console = console or Console(stderr=True)
    stop = threading.Event()
    target = _bars if console.is_terminal else _lines
    thread = threading.Thread(target=target, args=(runs, console, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _bars(runs: Sequence[Watched], console: Console, stop: threading.Event) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with Progress(*columns, console=console) as progress:
        tasks = [progress.add_task(run.label, total=run.rounds, status="waiting", start=False) for run in runs]
        while True:
            ended = stop.wait(INTERVAL)
            for run, task in zip(runs, tasks, strict=True):
                if (run.folder / "config.toml").exists():
                    progress.start_task(task)
                    run.update()
                    progress.update(task, completed=run.done, status=run.status())
                    if run.done == run.rounds:
                        progress.stop_task(task)
            if ended:
                return


def _lines(runs: Sequence[Watched], console: Console, stop: threading.Event) -> None:
    while True:
        ended = stop.wait(INTERVAL)
        for run in runs:
            before = run.done
            run.update()
            due = time.monotonic() - run.said > LINE_EVERY or run.done == run.rounds
            if run.done > before and due:
                run.said = time.monotonic()
                console.print(f"{run.label}: round {run.done}/{run.rounds}  {run.status()}", highlight=False)
        if ended:
            return
