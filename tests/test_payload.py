"""Typed payloads: any of them travels without loss, and what does not fit its type is refused by name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from fedkd import protocol
from fedkd.method import load, names
from fedkd.payload import (
    LARGEST,
    MOST,
    ClassCounts,
    Count,
    ParameterVector,
    PayloadError,
    Record,
    SharedStatistics,
    Spec,
    Stack,
    pack,
    unpack,
    wire_bytes,
)


@dataclass(frozen=True)
class Sample(Record):
    """A record with every kind of field there is."""

    parameters: ParameterVector
    statistics: SharedStatistics
    counts: ClassCounts
    examples: Count
    table: Annotated[torch.Tensor, Spec(("classes", 3), torch.float64)]


FLOATS = st.floats(-LARGEST, LARGEST, width=32)
INTEGERS = st.integers(0, MOST)
QUICK = settings(max_examples=25, deadline=None)


@st.composite
def records(draw: st.DrawFn) -> tuple[list[Sample], dict[str, int]]:
    """Draw one to four records and the sizes that they share; a size may be zero."""
    sizes = {name: draw(st.integers(0, 5)) for name in ("parameters", "shared_statistics", "classes")}

    def field(spec: Spec) -> torch.Tensor:
        shape = spec.resolve(sizes)
        dtype = {torch.float32: np.float32, torch.float64: np.float64, torch.int64: np.int64}[spec.dtype]
        elements = INTEGERS if spec.dtype == torch.int64 else FLOATS
        return torch.from_numpy(np.array(draw(arrays_of.arrays(dtype, shape, elements=elements))))

    count = draw(st.integers(1, 4))
    return [Sample(**{n: field(s) for n, s in Sample.specs().items()}) for _ in range(count)], sizes


def owners(rows: list[Sample]) -> list[str]:
    """Name the owner of each row."""
    return [f"client {number}" for number in range(len(rows))]


def bits(record: Record) -> list[bytes]:
    """Return the bytes of each field, so that -0.0 is not 0.0."""
    return [tensor.contiguous().numpy().tobytes() for tensor in record.tensors().values()]


@QUICK
@given(records())
def test_any_payload_round_trips(drawn: tuple[list[Sample], dict[str, int]]) -> None:
    """Bit for bit, whatever the number of rows and with empty dimensions too."""
    rows, sizes = drawn
    arrived = unpack(Sample, pack(rows), sizes, owners(rows))
    assert [bits(row) for row in arrived] == [bits(row) for row in rows]
    assert all(type(row) is Sample for row in arrived)


@QUICK
@given(records())
def test_bytes_are_the_length_of_flowers_serialization(drawn: tuple[list[Sample], dict[str, int]]) -> None:
    """For any shape, a scalar and an empty one too."""
    (row, *_), _ = drawn
    assert wire_bytes(row) == sum(len(Array(tensor.numpy()).data) for tensor in row.tensors().values())


@QUICK
@given(records(), st.sampled_from(list(Sample.specs())), st.integers(0, 3))
def test_a_missing_or_unknown_field_is_refused(
    drawn: tuple[list[Sample], dict[str, int]], name: str, other: int
) -> None:
    """Both are named, and whose they are."""
    rows, sizes = drawn
    packed = pack(rows)
    short = ArrayRecord({key: value for key, value in packed.items() if key != name})
    with pytest.raises(PayloadError, match=rf"client 0.*missing fields \['{name}'\]"):
        unpack(Sample, short, sizes, owners(rows))
    longer = ArrayRecord({**packed, f"extra{other}": Array(np.zeros(2))})
    with pytest.raises(PayloadError, match=rf"client 0.*unknown fields \['extra{other}'\]"):
        unpack(Sample, longer, sizes, owners(rows))


@QUICK
@given(records(), st.data())
def test_a_wrong_shape_is_refused(drawn: tuple[list[Sample], dict[str, int]], data: st.DataObject) -> None:
    """The message names the owner, the field and both shapes."""
    rows, sizes = drawn
    victim = data.draw(st.integers(0, len(rows) - 1))
    name = data.draw(st.sampled_from(list(Sample.specs())))
    value = getattr(rows[victim], name)
    wrong = data.draw(st.sampled_from([value[None], torch.cat([value.reshape(-1), value.new_zeros(1 + value.ndim)])]))
    with pytest.raises(PayloadError, match=rf"Sample\.{name} of client {victim} is"):
        dataclasses.replace(rows[victim], **{name: wrong}).check(sizes, f"client {victim}")


@QUICK
@given(records(), st.data())
def test_a_wrong_dtype_is_refused(drawn: tuple[list[Sample], dict[str, int]], data: st.DataObject) -> None:
    """A float in place of a count, or half the precision, is not converted in silence."""
    rows, sizes = drawn
    name = data.draw(st.sampled_from(list(Sample.specs())))
    wrong = data.draw(st.sampled_from([torch.float16, torch.int32, torch.bool, torch.complex64]))
    changed = [dataclasses.replace(row, **{name: getattr(row, name).to(wrong)}) for row in rows]
    with pytest.raises(PayloadError, match=rf"Sample\.{name} of client 0 is {wrong}"):
        unpack(Sample, pack(changed), sizes, owners(rows))


@QUICK
@given(records(), st.data(), st.sampled_from([float("nan"), float("inf"), float("-inf")]))
def test_a_value_that_is_not_finite_is_refused(
    drawn: tuple[list[Sample], dict[str, int]], data: st.DataObject, value: float
) -> None:
    """Only the client that has it is named, wherever in the vector it is."""
    rows, sizes = drawn
    victim = data.draw(st.integers(0, len(rows) - 1))
    filled = [name for name in ("parameters", "statistics", "table") if getattr(rows[victim], name).numel()]
    if not filled:
        return
    name = data.draw(st.sampled_from(filled))
    flat = getattr(rows[victim], name).flatten().clone()
    flat[data.draw(st.integers(0, len(flat) - 1))] = value
    rows[victim] = dataclasses.replace(rows[victim], **{name: flat.reshape(getattr(rows[victim], name).shape)})
    with pytest.raises(PayloadError, match=rf"Sample\.{name} of client {victim} has a value that is not finite"):
        unpack(Sample, pack(rows), sizes, owners(rows))


def sample(parameters: int = 3) -> tuple[Sample, dict[str, int]]:
    """Return a valid record and its sizes."""
    row = Sample(
        parameters=torch.arange(parameters, dtype=torch.float32),
        statistics=torch.zeros(0),
        counts=torch.tensor([1, 2]),
        examples=torch.tensor(7),
        table=torch.zeros(2, 3, dtype=torch.float64),
    )
    return row, {"parameters": parameters, "shared_statistics": 0, "classes": 2}


@pytest.mark.parametrize("rows", [1, 3])
def test_a_wrong_number_of_rows_is_refused(rows: int) -> None:
    """One row per client that was asked: none may be dropped or made up."""
    row, sizes = sample()
    with pytest.raises(PayloadError, match=r"Sample\.parameters of client 1, client 4"):
        unpack(Sample, pack([row] * rows), sizes, ["client 1", "client 4"])


HOSTILE = {
    "text": Array(np.array([["a", "b", "c"]])),
    "cut short": Array("float32", (1, 3), "numpy.ndarray", Array(np.zeros((1, 3), np.float32)).data[:-4]),
    "no array": Array("float32", (1, 3), "numpy.ndarray", b"no array"),
    "empty": Array("float32", (1, 3), "numpy.ndarray", b""),
    "unknown serialization": Array("float32", (1, 3), "torch.tensor", b""),
}
"""Arrays that are none."""


@pytest.mark.parametrize("case", HOSTILE)
def test_an_array_that_is_none_is_refused_by_name(case: str) -> None:
    """A broken sender is a payload error like any other."""
    row, sizes = sample()
    arrays = ArrayRecord({**pack([row]), "parameters": HOSTILE[case]})
    with pytest.raises(PayloadError, match=r"Sample\.parameters (of|from) client 2"):
        unpack(Sample, arrays, sizes, ["client 2"])


def test_pickled_arrays_are_never_opened() -> None:
    """An array of objects could run code when it is read."""
    with pytest.raises(ValueError, match="allow_pickle"):
        Array(np.array([{}], dtype=object))


def test_packing_copies() -> None:
    """A workspace that goes on training must not change what was sent."""
    row, sizes = sample()
    packed = pack([row])
    row.parameters.fill_(9)
    assert unpack(Sample, packed, sizes, ["client 0"])[0].parameters.tolist() == [0, 1, 2]


def test_packing_writes_what_flower_writes() -> None:
    """Byte for byte, of a tensor that lies otherwise too; and rows of one array are alike."""
    row, _ = sample()
    turned = dataclasses.replace(row, table=torch.arange(6, dtype=torch.float64).reshape(3, 2).T)
    for name, array in pack([turned, turned]).items():
        assert array == Array(torch.stack([getattr(turned, name)] * 2).numpy())
    with pytest.raises(ValueError, match=r"Sample\.parameters is .* after"):
        pack([row, dataclasses.replace(row, parameters=torch.zeros(4))])
    fewer = Stack(10**6)  # a header of other length
    fewer.add(turned)
    assert fewer.arrays() == pack([turned])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("columns_first", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
def test_arrays_arrive_however_they_lie(order: str, columns_first: bool, shift: int) -> None:
    """Columns first, or where tensors cannot begin: what lies otherwise than we write it is copied.

    Bytes in the other order are refused.
    """
    row, sizes = sample()
    values = np.array([[[0, 1, 2], [3, 4, 5]]], f"{order}f8", order="F" if columns_first else "C")
    data = Array(values).data
    at = data.index(b"\n") + 1
    length = at - 10 + shift  # of the header's text, which ends with a line feed
    data = data[:8] + length.to_bytes(2, "little") + data[10 : at - 1] + b" " * shift + b"\n" + data[at:]
    arrays = ArrayRecord({**pack([row]), "table": Array("float64", (1, 2, 3), "numpy.ndarray", data)})
    if order == ">":
        with pytest.raises(PayloadError, match=r"Sample\.table from client 0 is no array"):
            unpack(Sample, arrays, sizes, ["client 0"])
        return
    [arrived] = unpack(Sample, arrays, sizes, ["client 0"])
    assert arrived.table.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_messages_hold_a_few_large_arrays() -> None:
    """One array per field whatever the number of clients."""
    row, _ = sample()
    packed = pack([row] * 50)
    assert list(packed) == list(Sample.specs())
    assert packed["parameters"].shape == (50, 3)


def test_an_untyped_field_is_refused() -> None:
    """A payload is a type; a field without shape and dtype is none."""

    @dataclass(frozen=True)
    class Untyped(Record):
        vector: torch.Tensor

    with pytest.raises(TypeError, match=r"Untyped\.vector needs a type such as ParameterVector"):
        Untyped.specs()


@pytest.mark.parametrize("name", names())
def test_what_is_private_is_not_in_a_payload(name: str) -> None:
    """A client's own statistics stay; only their shared counterpart may be declared."""
    method = load(name)
    for kind in (method.Broadcast, method.Update):
        assert not [n for n, spec in kind.specs().items() if "statistics" in spec.shape]


def with_content(content: RecordDict) -> Any:
    """Return a message as far as its reader looks."""
    return SimpleNamespace(content=content)


def test_records_cross_flowers_wire() -> None:
    """Stacked arrays and rows survive Flower's own serialization of a message's content."""
    row, sizes = sample()
    rows: list[protocol.Row] = [{"client": 3, "loss_sum": 0.1, "total": 4}, {"client": 5, "loss_sum": 2.0, "total": 0}]
    sent = recorddict_to_proto(protocol.reply(rows, updates=pack([row, row])))
    content = recorddict_from_proto(type(sent).FromString(sent.SerializeToString()))
    message = with_content(content)
    arrived = unpack(Sample, protocol.arrays(message, "updates"), sizes, ["client 3", "client 5"])
    assert bits(arrived[1]) == bits(row)
    assert protocol.read_rows(message) == rows


def test_a_metric_that_only_some_rows_have_is_left_out_of_the_others() -> None:
    """Columns are lists of one type on the wire, so a gap has to be written as something."""
    rows: list[protocol.Row] = [{"client": 3, "extra": 0.5}, {"client": 5}]
    assert protocol.read_rows(with_content(protocol.reply(rows))) == rows


def test_orders_name_round_and_clients() -> None:
    """A node is told what to do once, for all its clients."""
    row, sizes = sample()
    message = with_content(protocol.order("{}", 4, [2, 9], [0, 3], pack([row])))
    assert protocol.read_order(message) == protocol.Order("{}", 4, [2, 9], [0, 3])
    assert bits(unpack(Sample, protocol.arrays(message, "broadcast"), sizes, ["the server"])[0]) == bits(row)
    with pytest.raises(PayloadError, match="the message has no 'updates'"):
        protocol.arrays(message, "updates")
