"""``startup``: seconds from the command to the first round, for each engine, and of ``fedkd --help``."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench.common import Bench, Table, in_turn, middle

SMALL = ("--rounds", "1", "--set", "train.local-steps=1")
"""One round with one step on ``digits``, so that it takes next to no time itself."""


def startup(bench: Bench) -> list[Table]:
    """Time commands, each in a process of its own, as a user would start them."""
    contestants: dict[str, Callable[[], float]] = {
        "fedkd --help": lambda: _until(["--help"], None, bench),
        "inline": lambda: _first(bench, "inline"),
        "simulation, cold": lambda: _first(bench, "simulation"),
        "simulation, next run of a series": lambda: _next(bench),
    }
    seconds = in_turn(contestants, bench.repetitions)
    rows = [[name, middle(values, 2)] for name, values in seconds.items()]
    title = "Seconds from the command until the first round is written down (of --help: until it is done)"
    return [Table(title, ["", "s"], rows, seconds)]


def _first(bench: Bench, engine: str) -> float:
    """Return the seconds until the first round of a run is written down."""
    folder = bench.folder()
    command = ["run", "fedavg", "--engine", engine, "--out", str(folder), *SMALL]
    return _until(command, folder / "rounds.jsonl", bench)


def _next(bench: Bench) -> float:
    """Return the seconds from the end of a run to the first round of the next, in one comparison."""
    folder = bench.folder()
    _until(["compare", "fedavg", "fedprox", "--engine", "simulation", "--out", str(folder), *SMALL], None, bench)
    ended = [path.stat().st_mtime for path in sorted(folder.rglob("summary.json"), key=lambda p: p.stat().st_mtime)]
    rounds = sorted(path.stat().st_mtime for path in folder.rglob("rounds.jsonl"))
    return rounds[1] - ended[0]


def _until(arguments: list[str], file: Path | None, bench: Bench) -> float:
    """Return the seconds until a command has written something to ``file``, or has ended; wait for its end."""
    log = bench.folder() / "log"
    with log.open("wb") as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("fedkd")), *arguments], stdout=output, stderr=subprocess.STDOUT
        )
        seconds = 0.0
        while process.poll() is None:
            if file is not None and not seconds and file.exists() and file.stat().st_size:
                seconds = time.perf_counter() - began
            time.sleep(0.005)
    if process.returncode:
        raise RuntimeError(f"fedkd {' '.join(arguments)} failed: {log.read_text()[-500:]}")
    return seconds or time.perf_counter() - began
