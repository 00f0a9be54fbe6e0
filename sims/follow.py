"""What a run adds to its logs, round by round: read from its files, so it is the same for every engine."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fedkd.checkpoints import LOGS
from fedkd.results import Row

Figures = dict[str, float]
"""What a round came to, by name."""


@contextmanager
def alongside(target: Callable[..., None], *arguments: object) -> Iterator[None]:
    """Call ``target(*arguments, stop)`` in a thread while the block runs; set ``stop`` at its end, and wait for it."""
    stop = threading.Event()
    thread = threading.Thread(target=target, args=(*arguments, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@dataclass
class Follower:
    """A run's logs, read as they grow.

    Args:
        folder: where the logs are, or will be.
    """

    folder: Path
    _offsets: dict[str, int] = field(default_factory=dict)
    _clients: dict[int, list[Row]] = field(default_factory=dict)
    _scores: dict[int, list[Row]] = field(default_factory=dict)
    _bytes: int = 0
    _seconds: float = 0.0

    def new(self) -> list[tuple[int, Figures]]:
        """Return the rounds that have been finished since the last call, each with its figures.

        A run that goes on cuts its logs back to its checkpoint; then all rounds come once more, from the first.

        ``clients`` (how many were sampled), ``loss`` and whatever else the clients log (mean by weight), ``server_*``
        (what the server logs), ``accuracy`` and ``worst_decile`` of the clients and ``global_accuracy``, in [0, 1]
        and only at evaluated rounds, ``bytes`` and ``seconds`` so far.
        """
        if any(self._cut_back(log) for log in LOGS):
            self._offsets, self._clients, self._scores, self._bytes, self._seconds = {}, {}, {}, 0, 0.0
        rounds = self._added("rounds")  # before the others: the line of a round is written after theirs
        for log, kept in (("clients", self._clients), ("evaluations", self._scores)):
            for row in self._added(log):
                kept.setdefault(row["round"], []).append(row)
        return [(row["round"], self._figures(row)) for row in rounds]

    def _figures(self, row: Row) -> Figures:
        clients, scores = (kept.pop(row["round"], []) for kept in (self._clients, self._scores))
        self._bytes += sum(client["bytes_down"] + client["bytes_up"] for client in clients)
        self._seconds += row.get("seconds", math.nan)
        found = {"clients": float(len(clients)), **means(clients)}
        found |= {f"server_{name}": value for name, value in means([row]).items()}
        return found | accuracies(scores) | {"bytes": float(self._bytes), "seconds": self._seconds}

    def _cut_back(self, log: str) -> bool:
        """Say whether what was read last is no longer there, or no longer the end of a line."""
        offset = self._offsets.get(log, 0)
        return bool(offset) and self._read(log, offset - 1, 1) != b"\n"

    def _added(self, log: str) -> list[Row]:
        offset = self._offsets.get(log, 0)
        text = self._read(log, offset)
        whole = text[: text.rfind(b"\n") + 1]
        self._offsets[log] = offset + len(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def _read(self, log: str, offset: int, count: int = -1) -> bytes:
        try:
            with (self.folder / f"{log}.jsonl").open("rb") as file:
                file.seek(offset)
                return file.read(count)
        except OSError:
            return b""


def means(rows: Iterable[Row]) -> Figures:
    """Return the mean of every figure that is logged as ``NAME_sum`` and ``NAME_weight``; none without weight."""
    sums: dict[str, tuple[float, float]] = {}
    for row in rows:
        for key in row:
            if key.endswith("_sum") and (weight := row.get(f"{key[:-4]}_weight")):
                total, weights = sums.get(key[:-4], (0.0, 0.0))
                sums[key[:-4]] = total + row[key], weights + weight
    return {name: total / weight for name, (total, weight) in sums.items()}


def accuracies(rows: Sequence[Mapping[str, int]]) -> Figures:
    """Return the clients' mean accuracy, that of their worst tenth, and the global model's, of one evaluation."""
    scored = [row for row in rows if row["total"]]
    if not scored:
        return {}
    own = sorted(row.get("personal_correct", row.get("global_correct", 0)) / row["total"] for row in scored)
    tenth = own[: math.ceil(len(own) / 10)]
    found = {"accuracy": sum(own) / len(own), "worst_decile": sum(tenth) / len(tenth)}
    if all("global_correct" in row for row in scored):
        found["global_accuracy"] = sum(row["global_correct"] / row["total"] for row in scored) / len(scored)
    return found
