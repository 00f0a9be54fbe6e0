"""Sums of clients' models, which a node may send in the place of the models (``run.exchange = "sums"``).

A server that only averages needs no more than the sum, so a node that trains fifty clients sends one vector instead of
fifty.  Each number is rounded to a whole multiple of :data:`UNIT`.  Whole numbers below 2^53 are added without rounding
in double precision, so the sum has the same bits however the clients are spread over nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedkd.config import AggregationSection, Config
from fedkd.method import Method
from fedkd.payload import EXACT, PayloadError, Record

UNIT = 2.0**-28
"""What is counted; half of it is the most by which a client's part of the sum may be off."""
LARGEST = EXACT * UNIT
"""What no sum over a round's clients may reach."""
_BLOCK = 1 << 15
"""Numbers that are added at once: few enough to stay in the processor's cache on the way, by NumPy, whose conversion to
double precision takes no other memory."""


def in_use(config: Config, method: Method) -> bool:
    """Return whether nodes send sums: it is asked for, and the server does nothing with single models."""
    plain = config.aggregation == AggregationSection() and not config.privacy.on
    return config.run.exchange == "sums" and method.Sum is not None and plain


class Total:
    """The sum of some clients' updates.

    Args:
        config: the run's configuration.
        kind: the method's ``Sum``.
    """

    def __init__(self, config: Config, kind: type[Record]) -> None:
        self._kind, self._most = kind, LARGEST / config.run.cohort
        self._weight = weight_of(config)
        self._sums: dict[str, npt.NDArray[np.float64]] = {}
        self._block = np.empty(_BLOCK)
        self._counts = {"examples": 0, "clients": 0}

    def add(self, update: Record, client: int) -> None:
        """Add an update ``(theta_k, n_k)`` with its weight, n_k or 1.

        Raises:
            PayloadError: a number of it is so large that the sum might not fit.
        """
        fields = update.tensors()
        counts = {"examples": int(fields.pop("examples")), "clients": 1}
        weight = counts[self._weight]
        vectors = {name: vector.cpu() for name, vector in fields.items()}
        for name, values in vectors.items():  # all of them first: the others' sum stays what it is
            if len(values) and max(map(abs, map(float, values.aminmax()))) * weight >= self._most:
                raise PayloadError(
                    f"{name} of client {client} is too large to be added up: the client diverged; a smaller train.lr "
                    "is the usual cure, else take run.exchange=updates"
                )
        for name, values in vectors.items():
            if name not in self._sums:
                self._sums[name] = np.zeros(len(values))
            total, numbers = self._sums[name], values.numpy()
            for start in range(0, len(numbers), _BLOCK):
                part = total[start : start + _BLOCK]
                whole = self._block[: len(part)]
                np.multiply(numbers[start : start + _BLOCK], weight / UNIT, out=whole, dtype=np.float64)
                np.add(part, np.rint(whole, out=whole), out=part)
        for name, count in counts.items():
            self._counts[name] += count

    def record(self) -> Record:
        """Return what the node sends."""
        counts = {name: torch.tensor(count) for name, count in self._counts.items()}
        sums = {name: torch.from_numpy(total) for name, total in self._sums.items()}
        return self._kind(**sums, **counts)


def weight_of(config: Config) -> str:
    """Return what clients weigh by, a field of the sum: their ``examples``, or the number of ``clients``."""
    return "examples" if getattr(config.hyper, "weighting", "uniform") == "examples" else "clients"


def mean(config: Config, sums: Sequence[Any], kind: type[Record]) -> Record:
    """Return the mean of all models, as one update with all examples behind it.

    Args:
        config: the run's configuration.
        sums: of the nodes that answered, in any order.
        kind: the method's ``Update``.
    """
    weight = sum(int(getattr(one, weight_of(config))) for one in sums)
    fields = {"examples": torch.tensor(sum(int(one.examples) for one in sums))}
    for name in kind.specs():
        if name not in fields:
            total = torch.stack([getattr(one, name) for one in sums]).sum(dim=0)
            fields[name] = total.mul_(UNIT / weight).float()
    return kind(**fields)
