"""The messages of a round: an order to a node, and its reply.

An order holds ``order`` (the configuration, round and client numbers), ``broadcast`` (the payload, once per node) and,
for methods that have them, ``personal`` (stacked payloads, one for each of the clients).
A reply holds ``rows`` (JSON, one object of metrics per client) and, after training, ``updates`` (stacked payloads).
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
    """What a node is asked to do: which clients, in which round (from 1), under which configuration (JSON)."""

    config: str
    round: int
    clients: list[int]


Row = dict[str, Any]


def order(
    config: str, round: int, clients: Sequence[int], broadcast: ArrayRecord, personal: ArrayRecord | None = None
) -> RecordDict:
    """Build the content of an order."""
    asked = ConfigRecord({"config": config, "round": round, "clients": list(map(int, clients))})
    content = RecordDict({"order": asked, "broadcast": broadcast})
    if personal is not None:
        content["personal"] = personal
    return content


def read_order(message: Message) -> Order:
    """Read an order."""
    record = message.content.config_records["order"]
    return Order(cast(str, record["config"]), cast(int, record["round"]), cast(list[int], record["clients"]))


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
