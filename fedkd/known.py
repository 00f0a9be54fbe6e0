"""What the server knows of its clients' data before the first round, and what their replies may therefore say of it.

In simulation the server divides the data itself; devices describe theirs once, before the first round
(:class:`fedkd.data.devices.Description`).  So a number of examples is never news: one that differs is a fault, or is
meant to gain a weight that nobody has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedkd.config import TrainSection
from fedkd.payload import PayloadError, Record

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Known:
    """Who holds how much of what, and how it is trained on.

    Args:
        train: ``[clients, classes]`` numbers of training examples.
        test: likewise of test examples.
        section: settings of local training, which say how batches are drawn.
    """

    train: Integers
    test: Integers
    section: TrainSection

    def check_row(self, row: Mapping[str, Any]) -> None:
        """Compare the ``examples`` and the ``total`` of a client's row, where it has them.

        Raises:
            PayloadError: naming the client, what it says and what is known.
        """
        client = row["client"]
        for name, table, what in (("examples", self.train, "training"), ("total", self.test, "test")):
            held = int(table[client].sum())
            if row.get(name, held) != held:
                raise PayloadError(f"client {client} says {name} = {row[name]}, and it has {held} {what} examples")

    def check(self, record: Record, clients: Sequence[int]) -> None:
        """Compare every count of examples in a client's update, or in a sum of those of several.

        Raises:
            PayloadError: naming the field, the clients, what they say and what is known.
        """
        held = self.train[list(clients)].sum(axis=0)
        owner = f"client{'s' * (len(clients) > 1)} {', '.join(map(str, clients))}"
        for name, spec in record.specs().items():
            if not spec.counted:
                continue
            said = np.atleast_1d(getattr(record, name).numpy())
            least, most = self._range(spec.counted, held)
            if not spec.shape:  # all classes together
                least, most = least.sum(keepdims=True), most.sum(keepdims=True)
            where = f"{type(record).__name__}.{name} of {owner}"
            for k in np.flatnonzero((said < least) | (said > most))[:1]:
                limits = f"{least[k]}" if least[k] == most[k] else f"{least[k]} to {most[k]}"
                of = f" of class {k}" if spec.shape else ""
                raise PayloadError(f"{where} says {said[k]} examples{of}, and from its data it is {limits}")
            if spec.counted == "drawn" and said.sum() != (total := self._draws(held)):
                raise PayloadError(f"{where} says {said.sum()} examples, and its batches have {total}")

    def _range(self, counted: str, held: Integers) -> tuple[Integers, Integers]:
        """Return the fewest and the most examples of each class ``[classes]`` that a count can say."""
        if counted == "drawn":
            examples, passes = int(held.sum()), self.section.passes(int(held.sum()))
            fewest = (times * np.maximum(held - (examples - used), 0) for used, times in passes.items())
            most = (times * np.minimum(held, used) for used, times in passes.items())
            return sum(fewest, np.zeros_like(held)), sum(most, np.zeros_like(held))
        return (held if counted == "held" else np.zeros_like(held)), held

    def _draws(self, held: Integers) -> int:
        """Return how many examples the batches of a participation have."""
        return sum(used * times for used, times in self.section.passes(int(held.sum())).items())
