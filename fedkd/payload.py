"""Typed records: what crosses the network, and what a client keeps.

A :class:`Record` is a frozen dataclass whose fields are tensors with a declared shape and dtype.  A *payload* is a
record that crosses the network; what a method keeps private is visible, because it is not in the payload's type.
Record keys come from the field names, so there is no second place to keep in step.

The records of several clients travel together as one stacked array per field (``[clients, *shape]``), so a message
holds a few large arrays whatever the number of clients.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Array, ArrayRecord
from flwr.common.constant import SType

Sizes = Mapping[str, int]
"""Values of the symbolic dimensions, e.g. ``{"parameters": 26434, "statistics": 0, "classes": 10}``."""


R = TypeVar("R", bound="Record")


class PayloadError(ValueError):
    """A record does not have the declared fields, shapes, dtypes or ranges; the message says which and whose."""


MOST = 2**31 - 1
"""The largest whole number in a record, so that no sum or product of theirs overflows 64 bits."""
LARGEST = 2.0**40
"""The largest magnitude of any other number in a record: 10^12, which nothing that was learnt comes near, and single
precision holds the sum of the squares of 10^14 such numbers, a thousand clients' models of 10^11 parameters."""
EXACT = 2.0**53
"""Whole numbers up to here are exact in double precision: the largest magnitude in a sum."""

Counted = Literal["", "held", "some", "drawn"]
"""Which of its client's training examples a whole number counts: nothing of them, all, at most all, or those that its
batches were drawn from, over and over."""


@dataclass(frozen=True)
class Spec:
    """Declared shape, dtype and range of a field: dimensions are numbers or names that :data:`Sizes` resolves.

    Args:
        shape: the dimensions.
        dtype: of the values.
        least: the smallest whole number that is allowed.
        below: name of a dimension, for whole numbers that count its places from 0.
        most: the largest number that is allowed; None: :data:`MOST`, or of a magnitude :data:`LARGEST`.
        counted: what it counts, of a number that the server can compare with what it knows (:mod:`fedkd.known`).
    """

    shape: tuple[int | str, ...]
    dtype: torch.dtype
    least: int = 0
    below: str = ""
    most: float | None = None
    counted: Counted = ""

    def resolve(self, sizes: Sizes) -> tuple[int, ...]:
        return tuple(d if isinstance(d, int) else sizes[d] for d in self.shape)

    def range(self, sizes: Sizes) -> tuple[float, float]:
        """Return the smallest and the largest number that are allowed."""
        if self.dtype.is_floating_point:
            most = LARGEST if self.most is None else self.most
            return -most, most
        most = MOST if self.most is None else self.most
        return self.least, sizes[self.below] - 1 if self.below else most


ParameterVector = Annotated[torch.Tensor, Spec(("parameters",), torch.float32)]
"""All trainable parameters of the model as one vector, in the order of :class:`fedkd.models.FlatModel`."""
SharedStatistics = Annotated[torch.Tensor, Spec(("shared_statistics",), torch.float32)]
"""BatchNorm running statistics that travel: all of them when ``model.norm-statistics`` is ``averaged``, else empty."""
Statistics = Annotated[torch.Tensor, Spec(("statistics",), torch.float32)]
"""All BatchNorm running statistics of the model (empty without BatchNorm)."""
ClassCounts = Annotated[torch.Tensor, Spec(("classes",), torch.int64)]
"""A whole number for each class, not below zero."""
HeldCounts = Annotated[torch.Tensor, Spec(("classes",), torch.int64, counted="held")]
"""Number of training examples of each class that a client holds; the server refuses any other than it knows of."""
SomeCounts = Annotated[torch.Tensor, Spec(("classes",), torch.int64, counted="some")]
"""Number of a client's training examples of each class that were used for something: no more than it holds."""
DrawnCounts = Annotated[torch.Tensor, Spec(("classes",), torch.int64, counted="drawn")]
"""Number of examples of each class in a participation's batches, as often as they were drawn."""
ClassMarks = Annotated[torch.Tensor, Spec(("classes",), torch.int64, most=1)]
"""1 or 0 for each class."""
ClassProbabilities = Annotated[torch.Tensor, Spec(("classes",), torch.float32)]
"""A distribution over the classes."""
Count = Annotated[torch.Tensor, Spec((), torch.int64)]
"""One whole number, not below zero."""
Positive = Annotated[torch.Tensor, Spec((), torch.int64, least=1)]
"""One whole number above zero, by which averages may divide."""
Examples = Annotated[torch.Tensor, Spec((), torch.int64, least=1, counted="held")]
"""Number of training examples that a client holds, or that the clients of a sum hold, above zero; the server refuses
any other than it knows of."""
ParameterSum = Annotated[torch.Tensor, Spec(("parameters",), torch.float64, most=EXACT)]
"""A sum of parameter vectors, in units of :data:`fedkd.sums.UNIT`."""
StatisticsSum = Annotated[torch.Tensor, Spec(("shared_statistics",), torch.float64, most=EXACT)]
"""A sum of running statistics, in units of :data:`fedkd.sums.UNIT`."""
Client = Annotated[torch.Tensor, Spec((), torch.int64, below="clients")]
"""Number of the client whose record it is; the server refuses another client's."""


@dataclass(frozen=True)
class Record:
    """Base of all typed records.  Subclasses are frozen dataclasses with fields annotated by a :class:`Spec`."""

    @classmethod
    @cache
    def specs(cls) -> dict[str, Spec]:
        """Return the declared specification of each field, in field order."""
        hints = get_type_hints(cls, include_extras=True)
        specs = {}
        for field in dataclasses.fields(cls):
            hint = hints[field.name]
            found = [a for a in get_args(hint)[1:] if isinstance(a, Spec)] if get_origin(hint) is Annotated else []
            if not found:
                raise TypeError(f"{cls.__name__}.{field.name} needs a type such as ParameterVector, not {hint!r}")
            specs[field.name] = found[0]
        return specs

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the fields by name, without copying."""
        return {name: getattr(self, name) for name in self.specs()}

    def check(self, sizes: Sizes, owner: str) -> Self:
        """Return the record itself after comparing every field with its specification.

        Raises:
            PayloadError: naming the owner, the field and what differs.
        """
        for name, spec in self.specs().items():
            value = getattr(self, name)
            shape = spec.resolve(sizes)
            if tuple(value.shape) != shape or value.dtype != spec.dtype:
                raise PayloadError(
                    f"{type(self).__name__}.{name} of {owner} is {value.dtype} {tuple(value.shape)}, "
                    f"the contract says {spec.dtype} {shape}"
                )
            if not value.numel():
                continue
            (least, most), (low, high) = spec.range(sizes), (end.item() for end in value.aminmax())
            if least <= low and high <= most:  # either is NaN if any value is
                continue
            said = f"a number outside {least:.0f} to {most:.0f}"
            if spec.dtype.is_floating_point:
                fits = math.isfinite(low) and math.isfinite(high)
                said = f"a value beyond {most:g}" if fits else "a value that is not finite"
                said += ": the client diverged; a smaller train.lr is the usual cure"
            raise PayloadError(f"{type(self).__name__}.{name} of {owner} has {said}")
        return self


class Stack:
    """Records of one type on their way into one array per field, ``[rows, *shape]``: each number is copied once.

    Args:
        rows: how many records there will be; fewer come at the price of another copy.
    """

    def __init__(self, rows: int) -> None:
        self._expected, self._rows = rows, 0
        self._kinds: dict[str, tuple[str, tuple[int, ...]]] = {}  # dtype and shape of a row, by field
        self._bytes: dict[str, io.BytesIO] = {}

    def add(self, record: Record) -> None:
        """Write the next row of every field.

        Raises:
            ValueError: it is not like the rows before it.
        """
        rows = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in record.tensors().items()}
        for name, values in rows.items():
            if (kind := (str(values.dtype), values.shape)) != self._kinds.setdefault(name, kind):
                raise ValueError(f"{type(record).__name__}.{name} is {kind} after {self._kinds[name]}")
        for name, values in rows.items():
            if name not in self._bytes:
                self._bytes[name] = io.BytesIO()
                self._bytes[name].write(self._header(name, self._expected))
            self._bytes[name].write(values.data)
        self._rows += 1

    def arrays(self) -> ArrayRecord:
        """Return what is sent: the bytes that Flower makes of a stacked array, without its copies on the way."""
        arrays = {}
        for name, (dtype, shape) in self._kinds.items():
            data = self._bytes[name].getvalue()
            if self._rows != self._expected:
                data = self._header(name, self._rows) + data[len(self._header(name, self._expected)) :]
            arrays[name] = Array(dtype, (self._rows, *shape), SType.NUMPY, data)
        return ArrayRecord(arrays)

    def _header(self, name: str, rows: int) -> bytes:
        dtype, shape = self._kinds[name]
        return _header(dtype, (rows, *shape))


def pack(records: Sequence[Record]) -> ArrayRecord:
    """Stack records of one type into a Flower ``ArrayRecord``: one array ``[len(records), *shape]`` per field."""
    stack = Stack(len(records))
    for record in records:
        stack.add(record)
    return stack.arrays()


def unpack(kind: type[R], arrays: ArrayRecord, sizes: Sizes, owners: Sequence[str]) -> list[R]:
    """Return the records that :func:`pack` stacked, each checked against its specification.

    Their tensors are the message's own memory, which is not to be written to.

    Args:
        kind: the record type.
        arrays: what arrived.
        sizes: values of the symbolic dimensions.
        owners: who each row belongs to, for messages; its length is the expected number of rows.

    Raises:
        PayloadError: missing or extra fields, a wrong number of rows, or a row that fails :meth:`Record.check`.
    """
    expected, found = set(kind.specs()), set(arrays)
    if expected != found:
        raise PayloadError(
            f"{kind.__name__} from {', '.join(owners)}: missing fields {sorted(expected - found)}, "
            f"unknown fields {sorted(found - expected)}"
        )
    columns = {}
    for name in kind.specs():
        try:
            column = torch.from_numpy(_decoded(arrays[name]))
        except Exception as error:
            raise PayloadError(
                f"{kind.__name__}.{name} from {', '.join(owners)} is no array: {type(error).__name__}: {error}"
            ) from error
        if column.ndim == 0 or column.shape[0] != len(owners):
            raise PayloadError(
                f"{kind.__name__}.{name} of {', '.join(owners)}: {tuple(column.shape)} is not one row each"
            )
        columns[name] = column
    return [
        kind(**{name: column[row] for name, column in columns.items()}).check(sizes, owner)
        for row, owner in enumerate(owners)
    ]


def _decoded(array: Array) -> npt.NDArray[Any]:
    """Return the values of an array that came from elsewhere, in its own bytes if those lie as tensors need them.

    What its header claims takes no memory before it is true.

    Raises:
        ValueError: it is not NumPy's format, has bytes too many or too few, or holds objects, which could run code.
    """
    if array.stype != SType.NUMPY:
        raise ValueError(f"serialized as '{array.stype}'")
    buffer = io.BytesIO(array.data)  # which shares the bytes
    if np.lib.format.read_magic(buffer) != (1, 0):
        raise ValueError("not version 1.0 of NumPy's format")
    shape, columns_first, dtype = np.lib.format.read_array_header_1_0(buffer)
    header = buffer.tell()
    length = len(array.data) - header
    if dtype.hasobject or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != length:
        raise ValueError(f"{length} bytes are no {dtype} of shape {shape}")
    values = np.frombuffer(array.data, dtype, offset=header) if length else np.empty(0, dtype)
    values = np.require(values.reshape(shape, order="F" if columns_first else "C"), requirements=["C", "A"])
    return np.asarray(_Writable(values))


class _Writable:
    """A view that claims that it may be written to, or PyTorch would warn: it has no tensors that may only be read."""

    def __init__(self, values: npt.NDArray[Any]) -> None:
        self._values = values  # which keeps the memory
        self.__array_interface__ = values.__array_interface__ | {"data": (values.ctypes.data, False)}


def declared_bytes(kind: type[Record], sizes: Sizes) -> int:
    """Return what :func:`wire_bytes` is for every record of a type whose shapes are the declared ones."""
    dtypes = {spec.dtype: str(torch.empty(0, dtype=spec.dtype).numpy().dtype) for spec in kind.specs().values()}
    return sum(_array_bytes(spec.resolve(sizes), dtypes[spec.dtype]) for spec in kind.specs().values())


def wire_bytes(record: Record) -> int:
    """Return the exact number of bytes of a record sent alone: Flower's serialization of each of its arrays."""
    return sum(_array_bytes(tuple(value.shape), str(value.numpy().dtype)) for value in record.tensors().values())


@cache
def _array_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Return the length of Flower's serialized array; it depends on shape and dtype only, so one real one tells all."""
    return len(_header(dtype, shape)) + math.prod(shape) * np.dtype(dtype).itemsize


def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return what comes before the numbers in NumPy's format."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape})
    return buffer.getvalue()
