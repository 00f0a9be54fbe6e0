"""Whatever crosses the network or stands in a configuration: it is read as it was meant, or refused in one line."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import tracemalloc
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import case_id, cases, tiny
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import clients.app
from fedkd import protocol
from fedkd.checkpoints import state_hash
from fedkd.config import Config, Scalar, defaults, parse_assignment, read_toml
from fedkd.data import federate
from fedkd.data.devices import Description, Place, parse_clients
from fedkd.errors import UserError
from fedkd.payload import LARGEST, MOST, PayloadError, Record, pack, unpack
from fedkd.results import run_folder
from fedkd.setup import Setup
from strategies import build
from strategies.base import FederatedStrategy, RoundError
from strategies.devices import Devices, RefusalError

FEW = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)
MANY = settings(FEW, max_examples=150)

SMALL: dict[str, Scalar] = {
    "run.clients": 4,
    "run.clients-per-round": 0,
    "run.rounds": 2,
    "model.hidden": 8,
    "train.local-steps": 1,
    "run.on-failure": "auto",
}
"""Four clients, two for each of two nodes."""


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
TEXTS = st.text(max_size=20) | JSON.map(json.dumps) | st.just("deep")
DEEP = "[" * 100_000
"""JSON that no parser follows to its end; drawn by name, since hypothesis prints what it draws."""


@pytest.fixture(autouse=True, scope="module")
def task() -> Iterator[None]:
    """Be somebody who may write messages, and keep what is refused out of the output."""
    logger, level = logging.getLogger("flwr"), logging.getLogger("flwr").level
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


def refusal(function: Callable[[], object]) -> str:
    """Call what may refuse, in one line, and may not fail; return the line, empty where it did not."""
    try:
        function()
    except (PayloadError, UserError, RoundError) as error:
        said = str(error)
    else:
        return ""
    if not said or "\n" in said:
        raise AssertionError(f"not one line: {said!r}")
    return said


def holding(content: RecordDict) -> Any:
    """Return a message as far as its readers look."""
    return SimpleNamespace(content=content)


# ---- what is sent ----------------------------------------------------------------------------------------------------


def kinds() -> list[Any]:
    """Return every record type that crosses the network: method, the keys of its variant, and the type's name.

    The richest of them do for the fast tests.
    """
    found = []
    for method, variant in cases():
        contract, fast = contract_of(method, variant), method in ("fedavg", "fedgen", "pgfed", "fedd2s")
        for name in ("Broadcast", "Update", "Personal", "Scoring"):
            if getattr(contract, name) is not None:
                ident = "-".join(map(case_id, (method, variant, name)))
                found.append(pytest.param(method, variant, name, id=ident, marks=[] if fast else pytest.mark.slow))
    return found


def contract_of(method: str, variant: dict[str, Scalar]) -> Any:
    """Return a method's contract under the settings of a tiny run."""
    from fedkd.method import load

    return load(method).under(tiny(method, **variant).hyper)


@cache
def setup(method: str, variant: str) -> tuple[Setup, Any]:
    """Return the set-up of a tiny run, and the method's contract under its settings."""
    from fedkd.method import load

    config = tiny(method, **{**SMALL, **json.loads(variant)})
    return Setup.build(config, (1, 8, 8), 10, torch.device("cpu")), load(method).under(config.hyper)


def valid(kind: type[Record], sizes: Any) -> Record:
    """Return a record that is as it has to be."""

    def field(spec: Any) -> torch.Tensor:
        shape = spec.resolve(sizes)
        return torch.ones(shape, dtype=spec.dtype) if spec.dtype == torch.int64 else torch.rand(shape).to(spec.dtype)

    return kind(**{name: field(spec) for name, spec in kind.specs().items()}).check(sizes, "the test")


def crossed(content: RecordDict) -> RecordDict:
    """Return a message's content after Flower's own serialization."""
    return recorddict_from_proto(recorddict_to_proto(content))


def header(shape: tuple[int, ...], dtype: str = "<f4", order: bool = False) -> bytes:
    """Return the header of NumPy's format that claims a shape."""
    buffer = io.BytesIO()
    fields = {"descr": dtype, "fortran_order": order, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, fields)  # type: ignore[arg-type]
    return buffer.getvalue()


DIMENSIONS = st.sampled_from([0, 1, 2, 3, 10, 2**31, 2**40, 2**62, 2**63, 2**64, 10**30, -1])
DTYPES = st.sampled_from(
    ["<f4", ">f4", "<f8", "<f2", "<i8", ">i8", "<i4", "<u8", "|b1", "|O", "<c8", "<U4", "|V8", "<M8[s]"]
)
NUMBERS = st.one_of(
    st.sampled_from([0, -1, -(2**63), 2**63 - 1, MOST, MOST + 1]), st.floats(), st.sampled_from([3.4e38, -0.0, 1e-45])
)


@st.composite
def broken(draw: st.DrawFn, array: Array) -> Array:
    """Change an array in one way or another, as somebody might who writes bytes to a socket."""
    how = draw(st.sampled_from(["flip", "cut", "more", "header", "meta", "values", "stype", "any", "version"]))
    data, dtype, shape, stype = bytearray(array.data), array.dtype, array.shape, array.stype
    if how == "flip":
        for _ in range(draw(st.integers(1, 8))):
            data[draw(st.integers(0, len(data) - 1))] ^= draw(st.integers(1, 255))
    elif how == "cut":
        del data[draw(st.integers(0, len(data) - 1)) :]
    elif how == "more":
        data += draw(st.binary(min_size=1, max_size=64))
    elif how == "header":
        claimed = draw(st.one_of(st.lists(DIMENSIONS, max_size=4).map(tuple), st.just(tuple(shape))))
        claim = header(claimed, draw(DTYPES), draw(st.booleans()))
        data = bytearray(claim) + data[128:]
    elif how == "meta":
        dtype, shape = draw(st.text(max_size=8)), tuple(draw(st.lists(DIMENSIONS, max_size=4)))
        return Array(dtype, tuple(d % 2**31 for d in shape), stype, bytes(data))
    elif how == "values":
        values = np.array(array.numpy())
        if values.size:
            place = draw(st.integers(0, values.size - 1))
            with np.errstate(all="ignore"):
                number = draw(NUMBERS.filter(lambda n: values.dtype.kind == "f" or isinstance(n, int)))
                values.reshape(-1)[place] = number
        return Array(values)
    elif how == "stype":
        stype = draw(st.sampled_from(["", "torch.tensor", "pickle", "numpy.ndarray\0", "numpy.savez"]))
    elif how == "version":
        data[6:8] = draw(st.binary(min_size=2, max_size=2))
    else:
        data = bytearray(draw(st.binary(max_size=200)))
    return Array(dtype, shape, stype, bytes(data))


@st.composite
def mutated(draw: st.DrawFn, arrays: ArrayRecord) -> ArrayRecord:
    """Change, drop, add or rename arrays."""
    changed = dict(arrays)
    how = draw(st.sampled_from(["break", "break", "break", "drop", "add", "rename", "swap"]))
    name = draw(st.sampled_from(sorted(changed))) if changed else None
    if how == "add" or name is None:
        changed[draw(st.text(max_size=12))] = Array(np.zeros(draw(st.integers(0, 3)), np.float32))
    elif how == "drop":
        del changed[name]
    elif how == "rename":
        changed[draw(st.text(max_size=12))] = changed.pop(name)
    elif how == "swap":
        changed[name] = changed[draw(st.sampled_from(sorted(changed)))]
    else:
        changed[name] = draw(broken(changed[name]))
    return ArrayRecord(changed)


@pytest.mark.parametrize(("method", "variant", "name"), kinds())
@FEW
@given(data=st.data())
def test_a_mutated_payload_is_refused_or_legal(
    method: str, variant: dict[str, Scalar], name: str, data: st.DataObject
) -> None:
    """Of every type that crosses the network: there is one error, and what passes has all that its type promises."""
    built, contract = setup(method, json.dumps(variant))
    kind, owners = getattr(contract, name), ["client 0", "client 1"]
    sent = pack([valid(kind, built.sizes)] * 2)
    arrays = data.draw(mutated(sent))
    arrived = crossed(RecordDict({"updates": arrays})).array_records["updates"]
    if said := refusal(lambda: unpack(kind, arrived, built.sizes, owners)):
        assert "client 0" in said or "client 1" in said
        return
    records = unpack(kind, arrived, built.sizes, owners)
    again = unpack(kind, pack(records), built.sizes, owners)
    assert [state_hash(record) for record in again] == [state_hash(record) for record in records]


def test_a_claimed_size_takes_no_memory() -> None:
    """A header of a few bytes may not make the server set terabytes, or even megabytes, aside."""
    kind = setup("fedavg", "{}")[1].Update
    for shape in ((1, 2**28), (2**40,), (2**62, 4), (2**63,), (2**32, 2**32), (2**16,) * 8):
        arrays = pack([valid(kind, setup("fedavg", "{}")[0].sizes)])
        arrays["parameters"] = Array("float32", (1,), "numpy.ndarray", header(shape) + bytes(64))
        tracemalloc.start()
        with pytest.raises(PayloadError, match=r"Update\.parameters from client 7 is no array"):
            unpack(kind, arrays, setup("fedavg", "{}")[0].sizes, ["client 7"])
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()


@pytest.mark.parametrize("number", [-1, 0, MOST + 1, 2**63 - 1, -(2**63)])
def test_numbers_of_examples_that_cannot_be(number: int) -> None:
    """An average divides by them, and their sum may not overflow."""
    built, contract = setup("fedavg", "{}")
    update = valid(contract.Update, built.sizes)
    wrong = type(update)(**update.tensors() | {"examples": torch.tensor(number)})
    with pytest.raises(PayloadError, match=rf"examples of client 3 has a number outside 1 to {MOST}"):
        unpack(contract.Update, pack([wrong]), built.sizes, ["client 3"])


# ---- the server ------------------------------------------------------------------------------------------------------

KEYS = (
    "client",
    "loss_sum",
    "loss_weight",
    "examples",
    "seconds",
    "round",
    "bytes_down",
    "total",
    "global_correct",
    "x",
)


@st.composite
def rows(draw: st.DrawFn, sent: list[dict[str, Any]]) -> str:
    """Change the rows of a reply."""
    how = draw(st.sampled_from(["value", "key", "drop", "length", "any", "text", "deep"]))
    changed = json.loads(json.dumps(sent))
    row = changed[draw(st.integers(0, len(changed) - 1))]
    if how == "value":
        row[draw(st.sampled_from(sorted(row)))] = draw(JSON)
    elif how == "key":
        row[draw(st.sampled_from(KEYS) | st.text(max_size=6))] = draw(JSON)
    elif how == "drop":
        del row[draw(st.sampled_from(sorted(row)))]
    elif how == "length":
        changed = draw(st.sampled_from([[], changed[:1], [*changed, row], changed[::-1]]))
    elif how == "any":
        changed = draw(JSON)
    elif how == "deep":
        return "deep"
    else:
        return draw(st.text(max_size=20))
    return json.dumps(changed)


def told(strategy: FederatedStrategy, replies: Callable[[Message], RecordDict]) -> list[Message]:
    """Return the answers to the orders of a strategy's first round."""
    orders = list(strategy.configure_train(1, ArrayRecord(), ConfigRecord(), Nodes()))
    answers = []
    for number, message in enumerate(orders):
        message.metadata.__dict__["_message_id"] = str(number)
        answers.append(Message(replies(message), reply_to=message))
    return answers


class Nodes:
    """All of a grid that a strategy asks for."""

    def get_node_ids(self) -> Iterator[int]:
        """Return two nodes."""
        return iter([5, 7])


def strategy_of(method: str, variant: dict[str, Scalar], **keys: Scalar) -> FederatedStrategy:
    """Return a strategy before its first round."""
    config = tiny(method, **{**SMALL, **variant, **keys})
    return build(config, federate(config))


def context() -> Context:
    """Return the context of a simulated node."""
    node: Any = {"partition-id": 0, "num-partitions": 1}
    return Context(run_id=1, node_id=5, node_config=node, state=RecordDict(), run_config={})


@cache
def honest(method: str, variant: str) -> tuple[RecordDict, ...]:
    """Return what the two nodes answer to the orders of the first round."""
    contents: list[RecordDict] = []

    def answer(message: Message) -> RecordDict:
        contents.append(clients.app.train(message, context()).content)
        return contents[-1]

    told(reset(method, variant)[0], answer)
    return tuple(contents)


def after(strategy: FederatedStrategy, contents: list[RecordDict]) -> None:
    """Do a round in which the nodes answer this."""
    waiting = iter(contents)
    strategy.aggregate_train(1, told(strategy, lambda _: next(waiting)))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "variant"), cases(), ids=case_id)
@settings(FEW, max_examples=8)
@given(data=st.data())
def test_a_mutated_reply_leaves_no_trace(
    method: str, variant: dict[str, Scalar], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The node's clients are named; dropped, the server's state is that of a node that said nothing, bit for bit."""
    variant = {**variant, "run.dir": str(tmp_path_factory.getbasetemp() / f"hostile-{method}")}
    good, bad = honest(method, json.dumps(variant))
    change = data.draw(st.sampled_from(["arrays", "rows", "records"]))
    content = RecordDict({key: bad[key] for key in bad})
    if change == "arrays":
        content["updates"] = data.draw(mutated(bad.array_records["updates"]))
    elif change == "rows":
        sent = json.loads(str(bad.config_records["reply"]["rows"]))
        text = data.draw(rows(sent))
        content["reply"] = ConfigRecord({"rows": DEEP if text == "deep" else text})
    else:
        value: Any = data.draw(st.sampled_from([1, 1.5, True, [1], ["a"], b"x", "x"]))
        content["reply"] = ConfigRecord(data.draw(st.sampled_from([{}, {"rows": value}, {"row": "[]"}])))
    strategy, drops = reset(method, json.dumps(variant))
    before = state_hash(strategy.state)
    if said := refusal(lambda: after(strategy, [good, crossed(content)])):
        assert "the server" in said or (not drops and "client" in said)
        assert state_hash(strategy.state) == before
    elif strategy._dropped:
        assert [dropped["clients"] for dropped in strategy._dropped] == [strategy_clients(bad)]
        left = state_hash(strategy.state)
        assert left == silent(method, json.dumps(variant))
    elif change == "arrays":  # other numbers than the honest ones, and as legal
        sizes, owners = strategy.setup.sizes, ["client"] * len(strategy_clients(bad))
        arrived = crossed(content).array_records["updates"]
        updates = unpack(strategy.method.Update, arrived, sizes, owners)
        for client, update in zip(strategy_clients(bad), updates, strict=True):
            strategy.known.check(update, [client])
        assert within(strategy.state.check(sizes, "the server"))
    else:  # what rows say moves no model
        assert state_hash(strategy.state) == untouched(method, json.dumps(variant))
        assert strategy._row["clients"] == [0, 1, 2, 3]


@cache
def first(method: str, variant: str) -> tuple[FederatedStrategy, Record, bool]:
    """Return a strategy, its state before the first round, and whether it can do without a client."""
    strategy = strategy_of(method, json.loads(variant))
    drops = not refusal(lambda: strategy_of(method, json.loads(variant), **{"run.on-failure": "drop"}))
    return strategy, strategy.state, drops


def reset(method: str, variant: str) -> tuple[FederatedStrategy, bool]:
    """Return a strategy that has done no round, and whether it drops."""
    strategy, strategy.state, strategy._drops = first(method, variant)
    return strategy, strategy._drops


@cache
def silent(method: str, variant: str) -> str:
    """Return the hash of the state after a round in which the second node failed."""
    strategy, _ = reset(method, variant)
    after(strategy, [honest(method, variant)[0], RecordDict()])
    assert len(strategy._dropped) == 1
    return state_hash(strategy.state)


@cache
def untouched(method: str, variant: str) -> str:
    """Return the hash of the state after a round in which both nodes said the truth."""
    strategy, _ = reset(method, variant)
    after(strategy, list(honest(method, variant)))
    assert not strategy._dropped
    return state_hash(strategy.state)


def within(record: Record) -> bool:
    """Say whether every number of a record is finite and no larger than those that may be sent."""
    return all(
        bool((value.double().abs() <= LARGEST).all())
        for value in record.tensors().values()
        if value.is_floating_point()
    )


def strategy_clients(content: RecordDict) -> list[int]:
    """Return whom a reply is for."""
    return [row["client"] for row in json.loads(str(content.config_records["reply"]["rows"]))]


@pytest.mark.parametrize(
    "change",
    [
        {"round": 9},
        {"bytes_up": 0},
        {"loss_sum": "0.1"},
        {"loss_sum": None},
        {"client": 1.0},
        {"client": True},
        {"examples": -1},
        {"examples": 10**400},
        {"loss_sum": [1]},
        {"a-b": 1},
        {"total": 3, "global_correct": 4},
        {"loss_sum": math.nan},
        {"loss_sum": math.inf},
        {"loss_weight": -1.0},
        {"seconds": -0.5},
        {"extra": -1e300},
    ],
    ids=lambda change: str(change)[:30],
)
def test_rows_that_say_what_cannot_be(change: dict[str, Any]) -> None:
    """What is not a number, impossible, or the server's to say is refused before it is written down."""
    row = {"client": 1, "examples": 3, "loss_sum": 0.5, "loss_weight": 3.0}
    assert protocol.read_rows(holding(protocol.reply([row])), MessageType.TRAIN) == [row]
    with pytest.raises(PayloadError, match="the rows of a reply cannot be read") as error:
        protocol.read_rows(holding(protocol.reply([row | change])), MessageType.TRAIN)
    if "loss_sum" in change:
        assert "loss_sum of client 1 = " in str(error.value)
    with pytest.raises(PayloadError, match="no total"):
        protocol.read_rows(holding(protocol.reply([row])), MessageType.EVALUATE)


@MANY
@given(text=TEXTS)
def test_any_answer_of_a_node_is_read_or_refused(text: str) -> None:
    """The description of a device's data comes before anything is known about it."""
    text = DEEP if text == "deep" else text
    assert protocol.read_answer(holding(protocol.answer(text))) == (text, "")
    refusal(lambda: Description.parse(text, 4))


def described(*names: str) -> dict[str, Any]:
    """Return what a node that hosts some clients says of its data."""
    of_each = {"train": [3, 0], "test": [0, 0], "fingerprints": "0123456789abcdef"}
    return {"classes": ["a", "b"], "shape": [1, 8, 8]} | {key: dict.fromkeys(names, of_each[key]) for key in of_each}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (described("-1"), "it describes client -1, and the run has clients 0 to 3"),
        (described("4"), "it describes client 4, and"),
        (described("02"), "it describes client 02, and"),
        (described("٢"), "it describes client ٢, and"),
        (described("9" * 5000), "it describes client 9999"),
        ({"train": {"3": [10**30, 0]}}, "client 3 has [1000000000"),
        ({"train": {"3": [MOST, 1]}}, f"and no more than {MOST} together are possible"),
        ({"train": {"3": [2.5, 1]}}, "client 3 has [2.5, 1] train examples of the 2 classes"),
        ({"train": {"3": [True, 1]}}, "client 3 has [True, 1] train examples"),
        ({"train": {"3": [3]}}, "client 3 has [3] train examples"),
        ({"train": {"3": [0, 0]}}, "client 3 has no training examples"),
        ({"test": {"3": [-1, 0]}}, "client 3 has [-1, 0] test examples"),
        ({"test": {}}, "its test examples are not of the clients that it has fingerprints of"),
        ({"test": {"3": [1, 1], "2": [1, 1]}}, "its test examples are not of the clients"),
        ({"fingerprints": {}}, "it has no fingerprints"),
        ({"fingerprints": {"3": "x" * 10**6}}, "the fingerprint of client 3 is none"),
        ({"classes": []}, "its classes are no list of 1 to 100000 names"),
        ({"classes": ["a"] * 100_001}, "its classes are no list"),
        ({"classes": ["a", "b" * 1001]}, "a class is named 'bbbb"),
        ({"classes": ["a", 1]}, "a class is named '1'"),
        ({"shape": [1, 8]}, "its images are [1, 8], which is no channels, height and width"),
        ({"shape": [1, 0, 8]}, "its images are [1, 0, 8]"),
        ({"shape": [2**10] * 3}, "its images are [1024, 1024, 1024]"),
        ({"shape": [10**30, 1, 1]}, "its images are [1000"),
        ({"more": 1}, "the description takes classes, shape, train, test, fingerprints"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_description_beyond_what_there_can_be_concerns_its_node_alone(
    change: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others' clients stay theirs, and the line is short, whatever it is about."""
    monkeypatch.setattr("strategies.devices.WAIT_SECONDS", 0.0)
    config = tiny(**{**SMALL, "data.partition": "devices"})
    answers = {5: described("0", "1"), 7: described("2", "3"), 9: described("3") | change}
    assert Devices(Described(answers), ["fedavg"]).federation(config).nodes == (5, 5, 7, 7)
    with pytest.raises(RefusalError) as error:
        Devices(Described(answers | {7: described("2")}), ["fedavg"]).federation(config)
    line = str(error.value)
    assert line.startswith("no node hosts client 3; node 9 is refused: its answer cannot be read: ")
    assert said in line
    assert len(line) < 300
    assert "\n" not in line


class Described:
    """A grid whose nodes say this of their data."""

    def __init__(self, answers: dict[int, dict[str, Any]]) -> None:
        self._answers = answers
        self._replies: dict[str, Message] = {}

    def get_node_ids(self) -> Iterator[int]:
        """Return the nodes."""
        return iter(self._answers)

    def push_messages(self, messages: list[Message]) -> list[str]:
        """Answer."""
        for message in messages:
            number = str(message.metadata.dst_node_id)
            message.metadata.__dict__["_message_id"] = number
            said = json.dumps(self._answers[message.metadata.dst_node_id])
            self._replies[number] = Message(protocol.answer(said), reply_to=message)
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, names: set[str]) -> list[Message]:
        """Return the answers."""
        return [self._replies.pop(name) for name in sorted(names) if name in self._replies]


def test_why_a_node_does_not_take_part_is_one_line() -> None:
    """It stands in a log and in a file that others read."""
    _, refused = protocol.read_answer(holding(protocol.answer(refused="a\n  b\r" + "c" * 10_000)))
    assert refused == ("a b " + "c" * 10_000)[:500]


# ---- the client ------------------------------------------------------------------------------------------------------

VALUES: Any = st.one_of(
    st.text(max_size=8),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.booleans(),
    st.binary(max_size=4),
    st.lists(st.integers(-3, 2**40), max_size=4),
    st.sampled_from(["../up", "/abs", "0" * 15 + "/", "a\0b", "..", "~"]),
)


@pytest.mark.slow
@MANY
@given(data=st.data())
def test_a_mutated_order_is_refused_or_legal(data: st.DataObject) -> None:
    """On the client: configuration, round, clients, name of the run, and names of records."""
    config = json.dumps(tiny(**SMALL).flat())
    sent: dict[str, Any] = {"config": config, "round": 1, "clients": [0, 1], "versions": [0, 1], "run": ""}
    how = data.draw(st.sampled_from(["value", "drop", "config", "clients", "versions"]))
    if how == "value":
        sent[data.draw(st.sampled_from(sorted(sent)))] = data.draw(VALUES)
    elif how == "drop":
        del sent[data.draw(st.sampled_from(sorted(sent)))]
    elif how == "config":
        flat = json.loads(config)
        flat[data.draw(st.sampled_from(sorted(flat)) | st.text(max_size=8))] = data.draw(JSON)
        texts = {"flat": json.dumps(flat), "list": "[]", "number": "1", "deep": DEEP, "table": '{"a": {}}'}
        sent["config"] = texts[data.draw(st.sampled_from(sorted(texts)))]
    else:
        sent[how] = data.draw(st.lists(st.integers(-2, 6), max_size=4))
    content = RecordDict({"order": ConfigRecord(sent)} if data.draw(st.booleans()) or how != "drop" else {})

    def read() -> None:
        order = protocol.read_order(holding(content))
        assert order.clients
        assert min(order.clients) >= 0
        assert len(order.versions) == len(order.clients)
        assert 0 <= min(order.versions) <= max(order.versions) <= order.round
        assert Config.read(order.config).flat()
        Place((0,), Path("/data"), Path("/state")).folder(order.run)

    refusal(read)


@pytest.mark.parametrize("numbers", [[4], [0, 9], [2**40]])
def test_a_simulated_node_trains_clients_that_there_are(numbers: list[int], tmp_path: Path) -> None:
    """A number beyond them is no client, and neither is one counted from the end."""
    config = json.dumps(tiny(**SMALL, **{"run.dir": str(tmp_path)}).flat())
    with pytest.raises(clients.app.ClientError, match=f"client {numbers[-1]} is not hosted here"):
        clients.app._worker_of(protocol.Order(config, 1, numbers, [0] * len(numbers)), context())
    assert not list(tmp_path.iterdir())


@MANY
@given(text=TEXTS)
def test_a_node_answers_any_question(text: str) -> None:
    """What it cannot read it refuses, in an answer of its own."""
    text = DEEP if text == "deep" else text
    asked = Message(
        RecordDict({"question": ConfigRecord({"json": text})}), dst_node_id=1, message_type=MessageType.QUERY
    )
    asked.metadata.__dict__["_message_id"] = "1"
    description, refused = protocol.read_answer(clients.app.query(asked, context()))
    assert not description
    assert refused


# ---- configurations --------------------------------------------------------------------------------------------------

TOML = st.one_of(
    st.text(max_size=8).map(json.dumps),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(str),
    st.sampled_from(
        ["true", "[1]", "{a = 1}", "1979-05-27", "0x" + "f" * 5000, "9" * 5000, '"""a\nb"""', "nan", "'\\'"]
    ),
)


@pytest.mark.slow
@MANY
@given(st.dictionaries(st.sampled_from(sorted(defaults())) | st.text(max_size=10), JSON, max_size=3))
def test_any_flat_configuration_is_read_or_refused(flat: dict[str, Any]) -> None:
    """What is read says the same when it is written and read again."""

    def read() -> None:
        config = Config.from_flat(flat)
        assert Config.from_flat(config.flat()) == config

    refusal(read)


@MANY
@given(st.text(max_size=30) | st.tuples(st.sampled_from(sorted(defaults())), TOML).map("=".join))
def test_any_assignment_is_read_or_refused(text: str) -> None:
    """``--set`` takes whatever a shell can say."""

    def read() -> None:
        key, value = parse_assignment(text)
        Config.from_flat({key: value})

    refusal(read)


@MANY
@given(
    st.binary(max_size=60)
    | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.tuples(
        st.sampled_from(["run", "data", "model", '"a\\nb"']), st.sampled_from(["seed", "name", '"\\n"']), TOML
    ).map(lambda parts: "[{}]\n{} = {}\n".format(*parts).encode())
    | st.just(b"a = " + b"[" * 5000)
)
def test_any_file_of_settings_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """A config.toml that a disk or a hand has damaged."""
    path = tmp_path_factory.getbasetemp() / "hostile.toml"
    path.write_bytes(content)
    refusal(lambda: Config.from_flat(read_toml(path)))


@MANY
@given(st.text(max_size=20) | st.from_regex(r"[0-9a-f./\\~]{1,17}", fullmatch=True))
def test_a_runs_name_stays_in_its_folder(name: str) -> None:
    """On a device the name comes from the server; a path in it, or none, is refused."""
    place = Place((0,), Path("/data"), Path("/state"))
    with contextlib.suppress(UserError):
        assert place.folder(name).parent == Path("/state")


@pytest.mark.slow
@MANY
@given(st.text(max_size=20) | st.from_regex(r"[a-z./~]{1,12}", fullmatch=True))
def test_a_runs_folder_stays_among_the_others(name: str) -> None:
    """Without ``run.dir`` it is named after the data, whose name may have path parts."""

    def read() -> None:
        config = Config.from_flat({"data.name": name})
        assert run_folder(config, 7).parent == run_folder(tiny(), 7).parent

    refusal(read)


@MANY
@given(st.text(max_size=20) | st.from_regex(r"[0-9,\- ]{1,12}", fullmatch=True))
def test_any_list_of_clients_is_read_or_refused(text: str) -> None:
    """What is read are numbers, so the folders named after them lie where they belong."""

    def read() -> None:
        numbers = parse_clients(text)
        assert all(type(number) is int and number >= 0 for number in numbers)

    refusal(read)


@MANY
@given(st.dictionaries(st.sampled_from(["clients", "data", "state", "x"]), VALUES, max_size=4))
def test_any_configuration_of_a_node_is_read_or_refused(node: dict[str, Any]) -> None:
    """``--node-config`` is the device's own; its folders are absolute."""

    def read() -> None:
        place = Place.read(node)
        assert place.data.is_absolute()
        assert place.state.is_absolute()

    refusal(read)
