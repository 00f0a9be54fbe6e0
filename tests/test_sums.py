"""Sums in the place of updates: exact, so of the same bits on any nodes, and the average that the server would take."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import by_case, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fedkd.config import Scalar
from fedkd.ignored import ignored
from fedkd.method import load, names
from fedkd.methods.fedavg import Sum, Update
from fedkd.payload import PayloadError
from fedkd.results import Run
from fedkd.sums import UNIT, Total, in_use, mean
from strategies import fedavg, partial

RunInline = Callable[..., Run]
SUMS: dict[str, Scalar] = {"run.exchange": "sums"}
POOLED = [name for name in names() if load(name).Sum]


def update(values: list[float], examples: int) -> Update:
    """Return an update with these parameters."""
    vector = torch.tensor(values, dtype=torch.float32)
    return Update(parameters=vector, statistics=torch.zeros(0), examples=torch.tensor(examples))


def total(updates: list[Update], **flat: Scalar) -> Any:
    """Return the sum of some updates."""
    pooled = Total(tiny(**flat), Sum)
    for client, one in enumerate(updates):
        pooled.add(one, client)
    return pooled.record()


def test_who_may_send_sums() -> None:
    """Those whose server half is FedAvg's average, of all or of a part of the model, and nobody else."""
    for name in names():
        half, contract = importlib.import_module(f"strategies.{name}"), load(name)
        plain = half.update in (fedavg.update, partial.update) and "examples" in contract.Update.specs()
        assert (contract.Sum is not None) == plain, name
        if contract.Sum:
            assert set(contract.Sum.specs()) == {*contract.Update.specs(), "clients"}


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.lists(st.floats(-1000, 1000, width=32), min_size=3, max_size=3), st.integers(1, 500)),
        min_size=2,
        max_size=6,
    ),
    st.randoms(use_true_random=False),
    st.sampled_from(["examples", "uniform"]),
)
def test_the_sum_does_not_depend_on_order_or_parts(drawn: list[Any], random: Any, weighting: str) -> None:
    """Any order, any split over nodes: the same bits, and the weighted mean to the last digit of a float."""
    updates, keys = [update(*one) for one in drawn], {"fedavg.weighting": weighting}
    shuffled = random.sample(updates, len(updates))
    cut = random.randint(1, len(updates) - 1)
    config = tiny(**keys)
    whole = mean(config, [total(updates, **keys)], Update)
    parts = mean(config, [total(shuffled[:cut], **keys), total(shuffled[cut:], **keys)], Update)
    assert torch.equal(whole.tensors()["parameters"], parts.tensors()["parameters"])
    weights = torch.tensor(
        [float(u.examples) if weighting == "examples" else 1.0 for u in updates], dtype=torch.float64
    )
    exact = torch.stack([u.parameters.double() for u in updates]).T @ (weights / weights.sum())
    assert torch.allclose(whole.tensors()["parameters"].double(), exact, rtol=1e-7, atol=len(updates) * UNIT)
    assert int(whole.tensors()["examples"]) == sum(int(u.examples) for u in updates)


def test_what_would_not_fit_is_refused_by_name() -> None:
    """Whole numbers of 64 bits do not overflow in silence."""
    total([update([2.0**16, 0, 0], 100)])
    with pytest.raises(PayloadError, match="parameters of client 1 is too large to be added up"):
        total([update([0, 0, 0], 100), update([0, -(2.0**18), 0], 100)])


@pytest.mark.slow
@pytest.mark.parametrize("method", POOLED)
def test_the_same_bits_on_any_number_of_nodes(run_inline: RunInline, method: str) -> None:
    """And the model that averaging the updates gives, but for the last digits."""
    keys: dict[str, Scalar] = {**SUMS, "model.name": "fedgen_cnn", "model.norm-statistics": "averaged", "run.rounds": 2}
    one, two, three = (run_inline(method, nodes=nodes, **keys) for nodes in (1, 2, 3))
    assert one.digest() == two.digest() == three.digest()
    apart = run_inline(method, **{**keys, "run.exchange": "updates"})
    assert one.digest() != apart.digest()
    for name, vector in load_file(one.folder / "final.safetensors").items():
        assert torch.allclose(vector, load_file(apart.folder / "final.safetensors")[name], atol=1e-4), name
    assert [row["bytes_up"] for row in one.rows("clients")] == [row["bytes_up"] for row in apart.rows("clients")]


@by_case
def test_who_needs_updates_one_by_one_gets_them(run_inline: RunInline, method: str, variant: dict[str, Scalar]) -> None:
    """Whatever was asked for; and the command line says that it has no effect."""
    config = tiny(method, **{**variant, **SUMS})
    if method in POOLED:
        assert in_use(config, load(method))
        assert ignored(config, ["run.exchange"]) == []
    else:
        assert not in_use(config, load(method).under(config.hyper))
        assert ignored(config, ["run.exchange"]) == [f"run.exchange has no effect beside run.method = '{method}'"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys", [{"aggregation.rule": "median"}, {"privacy.clip-norm": 0.5}], ids=["median", "privacy"]
)
def test_single_updates_where_they_are_looked_at(run_inline: RunInline, keys: dict[str, Scalar]) -> None:
    """Rules against hostile clients and clipping need them: the same digest as without sums."""
    keys = {**keys, "fedavg.weighting": "uniform"}
    assert run_inline("fedavg", **keys, **SUMS).digest() == run_inline("fedavg", **keys).digest()
