"""The messages of a round: an order to a node, and its reply.

An order holds ``order`` (the configuration, round and client numbers), ``broadcast`` (the payload, once per node) and,
for methods that have them, ``personal`` (stacked payloads, one for each of the clients).
A reply holds ``rows`` (JSON, one object of metrics per client) and, after training, ``updates`` (stacked payloads).

On devices the server asks every node once, before the first round: a question holds the configuration, the version of
fedkd and the methods that will run; the answer is the node's description of its data, or why it does not take part.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedkd.payload import PayloadError


@dataclass(frozen=True)
class Order:
    """What a node is asked to do: which clients, in which round (from 1), under which configuration (JSON).

    ``run`` names the run on devices, which keep their clients' states under that name; empty in simulation.
    """

    config: str
    round: int
    clients: list[int]
    run: str = ""


Row = dict[str, Any]


def order(
    config: str,
    round: int,
    clients: Sequence[int],
    broadcast: ArrayRecord,
    personal: ArrayRecord | None = None,
    run: str = "",
) -> RecordDict:
    """Build the content of an order."""
    asked = ConfigRecord({"config": config, "round": round, "clients": list(map(int, clients)), "run": run})
    content = RecordDict({"order": asked, "broadcast": broadcast})
    if personal is not None:
        content["personal"] = personal
    return content


def read_order(message: Message) -> Order:
    """Read an order."""
    record = message.content.config_records["order"]
    run = cast(str, record["run"])
    return Order(cast(str, record["config"]), cast(int, record["round"]), cast(list[int], record["clients"]), run)


def reply(rows: Sequence[Row], updates: ArrayRecord | None = None) -> RecordDict:
    """Build the content of a reply."""
    content = RecordDict({"reply": ConfigRecord({"rows": json.dumps(list(rows))})})
    if updates is not None:
        content["updates"] = updates
    return content


def read_rows(message: Message) -> list[Row]:
    """Read the rows of a reply.

    Raises:
        PayloadError: there are none, or they are not JSON objects with a client each.
    """
    try:
        rows = json.loads(cast(str, message.content.config_records["reply"]["rows"]))
        return [{**row, "client": int(row["client"])} for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise PayloadError(f"the rows of a reply cannot be read: {type(error).__name__}: {error}") from error


def arrays(message: Message, name: str) -> ArrayRecord:
    """Return an array record of a message.

    Raises:
        PayloadError: it is missing.
    """
    if name not in message.content.array_records:
        raise PayloadError(f"the message has no '{name}'")
    return message.content.array_records[name]


@dataclass(frozen=True)
class Question:
    """What the server asks a node before the first round; or, with ``refused``, why the node does not take part."""

    config: str = ""
    version: str = ""
    methods: tuple[str, ...] = ()
    refused: str = ""

    def content(self) -> RecordDict:
        """Build the content of the message."""
        return RecordDict({"question": ConfigRecord({"json": json.dumps(vars(self))})})

    @classmethod
    def read(cls, message: Message) -> Question:
        """Read a question."""
        read = json.loads(cast(str, message.content.config_records["question"]["json"]))
        return cls(**{**read, "methods": tuple(read["methods"])})


def answer(description: str = "", refused: str = "") -> RecordDict:
    """Build the content of a node's answer: its data's description (JSON), or why it does not take part."""
    return RecordDict({"answer": ConfigRecord({"description": description, "refused": refused})})


def read_answer(message: Message) -> tuple[str, str]:
    """Read an answer: the description, and why not.

    Raises:
        PayloadError: it is none.
    """
    try:
        record = message.content.config_records["answer"]
        return str(record["description"]), str(record["refused"])
    except KeyError as error:
        raise PayloadError(f"the answer of a node cannot be read: no {error}") from error
