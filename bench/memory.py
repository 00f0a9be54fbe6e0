"""Peak memory of the processes of a simulation, by what they do."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

import psutil

EVERY = 0.25
"""Seconds between two looks."""


def role(command: list[str]) -> str:
    """Return what a process of a simulation is, by its command line: server, node, or other (Flower's or Ray's)."""
    line = " ".join(command)
    if line.startswith("ray::ClientAppActor"):
        return "node"
    return "server" if any(word.endswith("flwr-simulation") for word in command) else "other"


class Peak:
    """The largest resident set (bytes) of a process of each role, and of all together, while the block runs."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(EVERY):
            found = {"server": 0, "node": 0, "all": 0}
            for process in psutil.Process().children(recursive=True):
                try:
                    kind, size = role(process.cmdline()), process.memory_info().rss
                except psutil.Error:
                    continue
                found["all"] += size
                found[kind] = max(found.get(kind, 0), size)
            for kind, size in found.items():
                self.bytes[kind] = max(self.bytes.get(kind, 0), size)
