"""The messages of a round: an order to a node, and its reply.

An order holds ``order`` (the configuration, round and client numbers), ``broadcast`` (the payload, once per node) and,
for methods that have them, ``personal`` (stacked payloads, one for each of the clients).
A reply holds ``rows`` (JSON, one object of metrics per client), ``failed`` (JSON, why other clients have none) and,
after training, ``updates`` (stacked payloads).

On devices the server asks every node once, before the first round: a question holds the configuration, the version of
fedkd and the methods that will run; the answer is the node's description of its data, or why it does not take part.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from fedkd.payload import MOST, PayloadError


@dataclass(frozen=True)
class Order:
    """What a node is asked to do.

    Args:
        config: the configuration (JSON of flat keys).
        round: the round, from 1.
        clients: numbers of the clients.
        versions: for each of them, the round that its state is to be from: the last whose update the server took; 0:
            none.
        run: name of the run on devices, which keep their clients' states under it; empty in simulation.
    """

    config: str
    round: int
    clients: list[int]
    versions: list[int]
    run: str = ""


Row = dict[str, Any]


def order(
    config: str,
    round: int,
    clients: Sequence[int],
    versions: Sequence[int],
    broadcast: ArrayRecord,
    personal: ArrayRecord | None = None,
    run: str = "",
) -> RecordDict:
    """Build the content of an order (:class:`Order`)."""
    asked: dict[str, Any] = {
        "config": config,
        "round": round,
        "clients": list(map(int, clients)),
        "versions": list(versions),
        "run": run,
    }
    content = RecordDict({"order": ConfigRecord(asked), "broadcast": broadcast})
    if personal is not None:
        content["personal"] = personal
    return content


def read_order(message: Message) -> Order:
    """Read an order.

    Raises:
        PayloadError: it is none, or names no clients, a client twice, no round, or a state that cannot be.
    """
    record = _said(message, "order")
    values: dict[str, Any] = {field.name: record.get(field.name) for field in fields(Order)}
    if [type(value) for value in values.values()] != [str, int, list, list, str]:
        raise PayloadError(f"the order cannot be read: it takes {', '.join(values)}")
    order = Order(**values)
    named = {client for client in order.clients if type(client) is int and client >= 0}
    if not named or len(named) < len(order.clients) or not 1 <= order.round <= MOST:
        raise PayloadError(f"the order for round {order.round} is for clients {order.clients[:8]}")
    possible = [version for version in order.versions if type(version) is int and 0 <= version <= order.round]
    if not len(possible) == len(order.versions) == len(order.clients):
        raise PayloadError(f"the order for round {order.round} is for states of rounds {order.versions[:8]}")
    return order


def _said(message: Message, name: str) -> ConfigRecord:
    """Return what a message says under a name; nothing, where it says nothing."""
    return message.content.config_records.get(name, ConfigRecord())


def read_json(text: object, what: str) -> Any:
    """Read JSON that came over the network.

    Raises:
        PayloadError: it is none.
    """
    try:
        return json.loads(cast(str, text))
    except (TypeError, ValueError, RecursionError) as error:
        raise PayloadError(f"{what} cannot be read: {type(error).__name__}: {str(error)[:200]}") from error


def reply(
    rows: Sequence[Row], failed: Mapping[int, str] | None = None, updates: ArrayRecord | None = None
) -> RecordDict:
    """Build the content of a reply.

    Args:
        rows: of the clients that were served, in the order that was asked for.
        failed: why the others were not.
        updates: of the clients with rows.
    """
    content = RecordDict({"reply": ConfigRecord({"rows": json.dumps(list(rows)), "failed": json.dumps(failed or {})})})
    if updates is not None:
        content["updates"] = updates
    return content


_NEEDED = {MessageType.TRAIN: ("examples", "loss_sum", "loss_weight"), MessageType.EVALUATE: ("total",)}
"""What the server reads of a row, by what was asked for."""
_SCORES = {f"{kind}_{what}" for kind in ("global", "personal") for what in ("correct", "loss_sum")}
"""What a row may say of a client's models."""
_LARGEST = 2.0**127
"""The largest magnitude of a number in a row that is not whole: a sum over any clients and rounds stays finite."""
_SERVERS = {"round", "bytes_down", "bytes_up"}
"""What the server adds to a row, so that no client may."""


def read_rows(message: Message, exchange: str = "") -> list[Row]:
    """Read the rows of a reply.

    Args:
        message: the reply.
        exchange: what was asked for, whose numbers have to be there.

    Raises:
        PayloadError: there are none, or they are not JSON objects of numbers with a client each.
    """
    rows = read_json(_said(message, "reply").get("rows"), "the rows of a reply")
    if not isinstance(rows, list):
        raise PayloadError("the rows of a reply cannot be read: they are no list")
    for row in rows:
        _check_row(row, exchange)
    return cast(list[Row], rows)


def read_failed(message: Message) -> dict[int, str]:
    """Read why clients have no row in a reply, by client.

    Raises:
        PayloadError: it is no JSON object of texts by number.
    """
    read = read_json(_said(message, "reply").get("failed"), "the failures of a reply")
    if not isinstance(read, dict) or not all(
        re.fullmatch("[0-9]{1,15}", name) and isinstance(why, str) for name, why in read.items()
    ):
        raise PayloadError("the failures of a reply cannot be read: they are no texts by number")
    return {int(name): line(why) for name, why in read.items()}


def line(text: str) -> str:
    """Return a text that came over the network as one line of bounded length, whatever it holds."""
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(printable.split())[:500]


def _check_row(row: Any, exchange: str) -> None:
    """Check that a row is numbers by name, its scores possible, and nothing in it the server's to say."""
    if not isinstance(row, dict) or not all(name.isidentifier() and name.isascii() for name in row):
        raise PayloadError("the rows of a reply cannot be read: one is no JSON object of numbers by name")
    whole = {"client", "examples", "total", *(name for name in row if name.endswith("_correct"))}
    counts = {"seconds", *whole, *(name for name in row if name.endswith("_weight"))}
    whose = f" of client {row['client']}" if type(row.get("client")) is int and 0 <= row["client"] <= MOST else ""
    for name, value in row.items():
        number = type(value) is int or (type(value) is float and name not in whole)
        if exchange == MessageType.EVALUATE and name.endswith("_loss_sum") and type(value) is float:
            continue  # whoever scores a model that others have ruined may well find no number
        most = MOST if type(value) is int else _LARGEST
        if not number or not (0 if name in counts else -most) <= value <= most:  # NaN is not between any two
            raise PayloadError(f"the rows of a reply cannot be read: {name}{whose} = {str(value)[:40]}")
    if missing := [name for name in ("client", *_NEEDED.get(exchange, ())) if name not in row]:
        raise PayloadError(f"the rows of a reply cannot be read: no {', '.join(missing)}")
    if strange := sorted(_SERVERS & row.keys()):
        raise PayloadError(f"the rows of a reply cannot be read: {strange[0]} is the server's to say")
    if exchange == MessageType.EVALUATE and (other := sorted(row.keys() - _SCORES - {"client", "total"})):
        raise PayloadError(f"the rows of a reply cannot be read: {other[0]} is no score")
    if "total" in row and any(row[name] > row["total"] for name in whole if name.endswith("_correct")):
        raise PayloadError("the rows of a reply cannot be read: more are correct than there are")


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
        """Read a question.

        Raises:
            PayloadError: it is none.
        """
        read = read_json(_said(message, "question").get("json"), "the question")
        names = [field.name for field in fields(cls)]
        if not isinstance(read, dict) or sorted(read) != sorted(names) or not isinstance(read["methods"], list):
            raise PayloadError(f"the question cannot be read: it takes {', '.join(names)}")
        if not all(isinstance(text, str) for text in (*read["methods"], *(read[n] for n in names if n != "methods"))):
            raise PayloadError("the question cannot be read: something in it is no text")
        return cls(**{**read, "methods": tuple(read["methods"])})


def answer(description: str = "", refused: str = "") -> RecordDict:
    """Build the content of a node's answer: its data's description (JSON), or why it does not take part."""
    return RecordDict({"answer": ConfigRecord({"description": description, "refused": refused})})


def read_answer(message: Message) -> tuple[str, str]:
    """Read an answer: the description, and why not.

    Raises:
        PayloadError: it is none.
    """
    record = _said(message, "answer")
    description, refused = record.get("description"), record.get("refused")
    if not isinstance(description, str) or not isinstance(refused, str):
        raise PayloadError("the answer of a node cannot be read: it takes description and refused")
    return description, line(refused)
