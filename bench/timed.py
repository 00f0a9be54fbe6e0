"""The two apps with a stopwatch in some of their functions: a Flower app that runs from a copy of this file.

Each process appends a line of JSON per message, or per round on the server, to a file of its own in the folder that
``FEDKD_BENCH_TIMES`` names; nothing of the project knows of it.
"""

from __future__ import annotations

import importlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

import clients.app
import strategies.base
from fedkd import protocol
from fedkd.method import names
from strategies.app import app as server

__all__ = ["client", "server"]

TIMED: dict[str, tuple[Any, str]] = {
    "decode": (clients.app.Worker, "broadcast"),
    "order": (strategies.base.FederatedStrategy, "configure_train"),
}
"""Label to the function whose time counts under it; ``compute`` is the ``update`` of every client half."""

spent: dict[str, float] = defaultdict(float)
"""Seconds by label since the last line."""
running: set[str] = set()
"""Labels whose time is being taken: one function of a label may call another."""


def timed(label: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with its time added to ``label``."""

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if label in running:
            return function(*args, **kwargs)
        running.add(label)
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[label] += time.perf_counter() - began
            running.remove(label)

    return wrapper


def write(*labels: str, **line: Any) -> None:
    """Append a line with what was spent under these labels, and begin them anew."""
    folder = Path(os.environ["FEDKD_BENCH_TIMES"])
    with (folder / f"{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps(line | {label: spent.pop(label, 0.0) for label in labels}) + "\n")


def install() -> None:
    """Put the stopwatch into the functions, in this process."""
    for label, (owner, name) in TIMED.items():
        setattr(owner, name, timed(label, getattr(owner, name)))
    halves = [importlib.import_module(f"clients.{name}") for name in names()]
    updates = [half.update for half in halves]  # all before any is replaced: some halves share one
    for half, update in zip(halves, updates, strict=True):
        half.update = timed("compute", update)  # type: ignore[attr-defined]
    aggregate = strategies.base.FederatedStrategy.aggregate_train

    @wraps(aggregate)
    def aggregate_train(self: Any, server_round: int, replies: Any) -> Any:
        began = time.perf_counter()
        out = aggregate(self, server_round, replies)
        row = self._row
        write(
            "order",
            role="server",
            run=self.setup.config.run.dir,
            round=row["round"],
            arrived=time.perf_counter() - began - row["seconds_server"],
        )
        return out

    strategies.base.FederatedStrategy.aggregate_train = aggregate_train  # type: ignore[method-assign]


client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Train as ever, and write down where the time went."""
    began = time.perf_counter()
    reply = clients.app.app(message, context)
    order = protocol.read_order(message)
    run = json.loads(order.config)["run.dir"]
    write("decode", "compute", role="node", run=run, round=order.round, total=time.perf_counter() - began)
    return reply


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score as ever."""
    return clients.app.app(message, context)


if "FEDKD_BENCH_TIMES" in os.environ:
    install()
