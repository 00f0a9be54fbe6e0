"""The messages of a round: an order to a node, and its reply.

An order holds ``order`` (the configuration, round and client numbers) and ``broadcast`` (the payload, once per node).
A reply holds ``rows`` (one column per metric, one value per client) and, after training, ``updates`` (stacked
payloads).
"""

from __future__ import annotations

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


def order(config: str, round: int, clients: Sequence[int], broadcast: ArrayRecord) -> RecordDict:
    """Build the content of an order."""
    asked = ConfigRecord({"config": config, "round": round, "clients": list(map(int, clients))})
    return RecordDict({"order": asked, "broadcast": broadcast})


def read_order(message: Message) -> Order:
    """Read an order."""
    record = message.content.config_records["order"]
    return Order(cast(str, record["config"]), cast(int, record["round"]), cast(list[int], record["clients"]))


def reply(rows: Sequence[Row], updates: ArrayRecord | None = None) -> RecordDict:
    """Build the content of a reply.  A name that only some rows have is NaN in the others."""
    columns = {
        name: [row.get(name, float("nan")) for row in rows] for name in dict.fromkeys(k for r in rows for k in r)
    }
    content = RecordDict({"rows": ConfigRecord({name: _same_type(values) for name, values in columns.items()})})
    if updates is not None:
        content["updates"] = updates
    return content


def read_rows(message: Message) -> list[Row]:
    """Read the rows of a reply; a NaN stands for a value that the client does not have, and is left out."""
    columns = dict(message.content.config_records["rows"])
    names, values = list(columns), [cast(list[Any], v) for v in columns.values()]
    return [{n: v for n, v in zip(names, row, strict=True) if v == v} for row in zip(*values, strict=True)]


def arrays(message: Message, name: str) -> ArrayRecord:
    """Return an array record of a message.

    Raises:
        PayloadError: it is missing.
    """
    if name not in message.content.array_records:
        raise PayloadError(f"the message has no '{name}'")
    return message.content.array_records[name]


def _same_type(values: list[Any]) -> list[Any]:
    """Flower wants lists of one type."""
    return values if all(type(v) is type(values[0]) for v in values) else [float(v) for v in values]
