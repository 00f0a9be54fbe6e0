"""Counts of examples: what clients may say is what batches and data give, neither more nor less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from conftest import by_case, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.training import Job
from fedkd.config import Config, Scalar
from fedkd.data import Shard, federate
from fedkd.known import Known
from fedkd.payload import DrawnCounts, Examples, HeldCounts, PayloadError, Record, SomeCounts
from fedkd.rng import Streams
from strategies import build

CLASSES = 3


@dataclass(frozen=True)
class Counts(Record):
    """One count of each kind."""

    examples: Examples
    held: HeldCounts
    some: SomeCounts
    drawn: DrawnCounts


@dataclass(frozen=True)
class Drawn(Record):
    """The labels of a participation's batches."""

    drawn: DrawnCounts


def drawn(config: Config, labels: torch.Tensor) -> torch.Tensor:
    """Return how often a participation's batches have each class ``[classes]``, by drawing them."""
    none = torch.zeros(1)
    shard = Shard(torch.zeros(len(labels), 1, 1, 1), labels, none, none)
    model: Any = None  # no batch looks at it
    job = Job(config, model, Streams(config.run.seed), 1, 0, none, {})
    counts = torch.zeros(CLASSES, dtype=torch.int64)
    for _, y in job.batches(shard):
        counts += torch.bincount(y, minlength=CLASSES)
    return counts


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=30),
    st.integers(1, 12),
    st.integers(0, 25),
    st.integers(1, 3),
    st.sampled_from(["keep", "drop"]),
)
def test_batches_give_what_is_known_of_them(labels: list[int], size: int, steps: int, epochs: int, last: str) -> None:
    """Whatever is drawn passes; one example more, one less, or one of another class that has none does not."""
    flat: dict[str, Scalar] = {
        "train.batch-size": size,
        "train.local-steps": steps,
        "train.local-epochs": epochs,
        "train.last-batch": last,
    }
    config, y = tiny(**flat), torch.tensor(labels)
    held = np.bincount(labels, minlength=CLASSES)[None]
    known, counts = Known(held, held, config.train), drawn(config, y)
    known.check(Drawn(counts), [0])
    for change in (torch.tensor([1, 0, 0]), torch.tensor([0, 0, -1])):
        with pytest.raises(PayloadError, match=r"Drawn\.drawn of client 0 says"):
            known.check(Drawn(counts + change), [0])
    for k in np.flatnonzero(held[0] == 0):
        moved = counts.clone()
        moved[labels[0]], moved[k] = moved[labels[0]] - 1, moved[k] + 1
        with pytest.raises(PayloadError, match=r"Drawn\.drawn of client 0 says"):
            known.check(Drawn(moved), [0])
    if last == "keep" and not steps:  # whole passes: nothing is left to chance
        assert counts.tolist() == (epochs * held[0]).tolist()


HELD = np.array([[4, 0, 6], [1, 2, 0]])
RIGHT: dict[str, Any] = {"examples": 10, "held": [4, 0, 6], "some": [4, 0, 1], "drawn": [8, 0, 12]}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"examples": 11}, "examples of client 0 says 11 examples, and from its data it is 10"),
        ({"examples": 3}, "examples of client 0 says 3 examples, and from its data it is 10"),
        ({"held": [4, 1, 5]}, "held of client 0 says 1 examples of class 1, and from its data it is 0"),
        ({"held": [4, 0, 5]}, "held of client 0 says 5 examples of class 2, and from its data it is 6"),
        ({"some": [0, 1, 0]}, "some of client 0 says 1 examples of class 1, and from its data it is 0"),
        ({"some": [5, 0, 0]}, "some of client 0 says 5 examples of class 0, and from its data it is 0 to 4"),
        ({"drawn": [8, 1, 11]}, "drawn of client 0 says 1 examples of class 1, and from its data it is 0"),
        ({"drawn": [0, 0, 20]}, "drawn of client 0 says 0 examples of class 0, and from its data it is 8"),
    ],
    ids=str,
)
def test_counts_that_contradict_what_is_known(wrong: dict[str, Any], said: str) -> None:
    """Each is named with the client, what it says, and what is known."""
    known = Known(HELD, HELD, tiny(**{"train.local-steps": 0, "train.local-epochs": 2}).train)
    known.check(Counts(**{name: torch.tensor(value) for name, value in RIGHT.items()}), [0])
    with pytest.raises(PayloadError) as error:
        known.check(Counts(**{name: torch.tensor(value) for name, value in (RIGHT | wrong).items()}), [0])
    assert str(error.value) == f"Counts.{said}"


def test_the_examples_of_a_sum_are_those_of_its_clients() -> None:
    """Which are known too."""

    @dataclass(frozen=True)
    class Sum(Record):
        examples: Examples

    known = Known(HELD, HELD, tiny().train)
    known.check(Sum(torch.tensor(13)), [0, 1])
    with pytest.raises(PayloadError, match=r"Sum\.examples of clients 0, 1 says 14 examples, and .* is 13"):
        known.check(Sum(torch.tensor(14)), [0, 1])


@pytest.mark.parametrize("row", [{"examples": 9}, {"total": 11}, {"total": 0}], ids=str)
def test_rows_that_contradict_what_is_known(row: dict[str, Any]) -> None:
    """The numbers of examples that rows and scores are weighed by."""
    known = Known(HELD, HELD, tiny().train)
    known.check_row({"client": 0, "examples": 10, "total": 10})
    (name, value), what = next(iter(row.items())), "training" if "examples" in row else "test"
    with pytest.raises(PayloadError, match=f"^client 0 says {name} = {value}, and it has 10 {what} examples$"):
        known.check_row({"client": 0, **row})


@by_case
def test_no_count_of_examples_goes_unchecked(method: str, variant: dict[str, Scalar]) -> None:
    """Every whole number that a client sends is a count that is known, a mark, or a place among clients or classes."""
    config = tiny(method, **variant)
    strategy = build(config, federate(config))
    for name, spec in strategy.method.Update.specs().items():
        bounded = spec.counted or spec.below or spec.most == 1
        assert spec.dtype.is_floating_point or bounded, name
