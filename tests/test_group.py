"""Clients that are trained several at once (``run.group``): as alone but for rounding, wherever they are trained."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny
from safetensors.torch import load_file

from clients.app import Worker
from clients.group import GroupJob, Groups, Work
from clients.training import Outcome
from fedkd.config import Scalar
from fedkd.data import federate
from fedkd.errors import UserError
from fedkd.method import load, names
from fedkd.models import FlatModel, StackedModel
from fedkd.models import build as build_model
from fedkd.payload import Record
from fedkd.results import Run
from fedkd.rng import Streams
from sims import inline
from strategies import build
from strategies.base import FederatedStrategy

RunInline = Callable[..., Run]
METHODS = [name for name in names() if load(name).groups]
NEAR = {"rtol": 1e-4, "atol": 1e-6}
"""How far numbers of clients that were trained at once may be from those of clients that were trained alone."""
BATCH_NORM: dict[str, Scalar] = {"model.name": "fedgen_cnn", "train.last-batch": "drop"}
FEW: dict[str, Scalar] = {"data.fraction": 0.06}
"""Clients of 9 to 17 examples."""
ALL: dict[str, Scalar] = {"run.clients": 10, "run.clients-per-round": 0}


class Node:
    """A node's worker and one broadcast of the server, to train clients with in groups of any size."""

    def __init__(self, method: str, folder: Path, **flat: Any) -> None:
        self.config = tiny(method, **{"run.dir": str(folder), **FEW, **flat})
        self.worker = Worker(self.config, run_id=1)
        half = importlib.import_module(f"strategies.{method}")
        self.broadcast = half.broadcast(self.worker.setup, half.init(self.worker.setup), 1)
        self.stacks: list[int] = []

    def outcomes(self, size: int, states: dict[int, Record] | None = None, round: int = 1) -> dict[int, Any]:
        """Return what training gives, an exception included, by client."""

        def begin(client: int, version: int) -> Work:
            job = self.worker.job(round, client, last_round=version)
            return Work(job, states[client] if states and version else None, self.worker.shard(client, "train"))

        def update(job: Any, broadcast: Any, state: Any, shard: Any) -> Outcome:
            self.stacks.append(len(job.jobs) if isinstance(job, GroupJob) else 1)
            outcome: Outcome = self.worker.half.update(job, broadcast, state, shard)
            return outcome

        versions = {c: round - 1 if states and c in states else 0 for c in range(self.config.run.clients)}
        groups, done = Groups(versions, size, begin, update, self.broadcast), dict[int, Any]()
        for client in versions:
            try:
                done[client], _ = groups.outcome(client)
            except Exception as error:
                done[client] = error
        return done


def assert_near(ours: Outcome, alone: Outcome) -> None:
    """Compare update, state and metrics."""
    for one, other in ((ours.update, alone.update), (ours.state, alone.state)):
        assert type(one) is type(other)
        for name, tensor in one.tensors().items():
            torch.testing.assert_close(tensor, other.tensors()[name], msg=lambda text, n=name: f"{n}: {text}", **NEAR)
    assert ours.metrics.keys() == alone.metrics.keys()
    for name, (total, weight) in ours.metrics.items():
        assert total == pytest.approx(alone.metrics[name][0], rel=1e-4)
        assert weight == alone.metrics[name][1]


def compare(node: Node) -> None:
    """Train everybody twice, alone and at once; in the second round some have a state and some have none."""
    alone = node.outcomes(1)
    assert set(node.stacks) == {1}
    node.stacks.clear()
    together = node.outcomes(node.config.run.clients)
    assert max(node.stacks) > 1
    kept = {client: alone[client].state for client in alone if client % 3}
    again, alone_again = node.outcomes(node.config.run.clients, kept, 2), node.outcomes(1, kept, 2)
    for client in alone:
        assert_near(together[client], alone[client])
        assert_near(again[client], alone_again[client])


@pytest.mark.parametrize("method", METHODS)
def test_clients_at_once_are_trained_as_alone(tmp_path: Path, method: str) -> None:
    """Clients smaller than a batch among them."""
    node = Node(method, tmp_path)
    sizes = [len(node.worker.shard(client, "train")) for client in range(node.config.run.clients)]
    assert min(sizes) < node.config.train.batch_size < max(sizes)
    compare(node)


@pytest.mark.parametrize("method", ["fedavg", "fedprox", "fedbabu"])
@pytest.mark.parametrize(
    "keys",
    [
        {"train.momentum": 0.9, "train.weight-decay": 0.01},
        {"train.local-steps": 0, "train.local-epochs": 2},
        {"train.lr-decay": 0.5, "train.lr-decay-from": "last-participation"},
        {"model.name": "fedgen_cnn", "model.norm": "group", "model.memory-format": "channels-last"},
        BATCH_NORM,
        {**BATCH_NORM, "model.norm-statistics": "averaged"},
    ],
    ids=["momentum", "epochs", "lr-decay", "channels-last", "batch-norm", "averaged"],
)
def test_settings_are_those_of_each_client(tmp_path: Path, method: str, keys: dict[str, Scalar]) -> None:
    """Optimiser, passes of different length, and models."""
    compare(Node(method, tmp_path, **keys))


def test_the_proximal_term_is_each_clients_own(tmp_path: Path) -> None:
    """A strong one changes the result, of many clients as of one."""
    without, strong = (
        Node("fedprox", tmp_path / str(mu), **{"fedprox.mu": mu}).outcomes(6)[0].update.parameters for mu in (0.0, 5.0)
    )
    assert not torch.allclose(without, strong, rtol=1e-2)
    compare(Node("fedprox", tmp_path, **{"fedprox.mu": 5.0}))


def test_clients_that_are_not_alike_are_stacked_apart(tmp_path: Path) -> None:
    """By their number of steps; one that is like nobody is trained alone, to the last bit."""
    node = Node("fedavg", tmp_path, **{"train.local-steps": 0})
    alone = node.outcomes(1)
    node.stacks.clear()
    together = node.outcomes(6)
    steps = [-(-len(node.worker.shard(client, "train")) // 16) for client in range(6)]
    assert sorted(node.stacks) == sorted(map(steps.count, set(steps)))
    single = [client for client in range(6) if steps.count(steps[client]) == 1]
    assert single
    for client in single:
        assert torch.equal(together[client].update.parameters, alone[client].update.parameters)


def test_a_client_that_fails_takes_nobody_with_it(tmp_path: Path) -> None:
    """Neither one whose numbers are none, nor one that cannot even begin."""
    node = Node("fedavg", tmp_path)
    before = node.outcomes(6)
    x = node.worker.shard(2, "train").x
    x.fill_(float("nan"))
    after = node.outcomes(6)
    assert after[2].update.parameters.isnan().any()
    for client in (0, 1, 3, 4, 5):
        assert torch.equal(after[client].update.parameters, before[client].update.parameters)

    def shard(client: int, split: str) -> Any:
        raise UserError(f"nothing of {client}")

    whole, node.worker.shard = node.worker.shard, lambda c, s: shard(c, s) if c == 4 else whole(c, s)  # type: ignore[method-assign]
    fewer = node.outcomes(6)
    assert isinstance(fewer[4], UserError)
    assert isinstance(fewer[5], Outcome)


def test_who_diverges_in_a_group_is_named_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the round goes on with all the others."""
    shard = Worker.shard

    def poisoned(worker: Worker, client: int, split: str) -> Any:
        own = shard(worker, client, split)
        if (client, split) == (3, "train"):
            own.x.fill_(float("nan"))
        return own

    monkeypatch.setattr(Worker, "shard", poisoned)
    inline.run(tiny(**ALL, **{"run.group": 5, "run.rounds": 1, "run.on-failure": "drop", "run.dir": str(tmp_path)}))
    [row] = Run.open(tmp_path).rows("rounds")
    assert row["clients"] == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert [(each["exchange"], each["clients"]) for each in row["dropped"]] == [("train", [3])]
    assert "client 3" in row["dropped"][0]["why"]


@pytest.mark.parametrize("method", ["fedavg", pytest.param("scaffold", marks=pytest.mark.slow)])
def test_groups_do_not_depend_on_the_number_of_nodes(
    run_inline: RunInline, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten clients in groups of four, four and two, on one node to three; and the results are those of one by one."""
    at_once, of = list[int](), GroupJob.of
    monkeypatch.setattr(GroupJob, "of", lambda jobs: (at_once.append(len(jobs)), of(jobs))[1])
    runs = [run_inline(method, nodes=nodes, **ALL, **{"run.group": 4}) for nodes in (1, 2, 3)]
    assert len({run.digest() for run in runs}) == 1
    rounds = runs[0].config.run.rounds
    assert sorted(at_once) == sorted([4, 4, 2] * 3 * rounds)  # on every number of nodes
    one, alone = (
        load_file(run.folder / "final.safetensors")["parameters"] for run in (runs[0], run_inline(method, **ALL))
    )
    torch.testing.assert_close(one, alone, **NEAR)
    assert len(at_once) == 9 * rounds  # and none of them alone


def test_nodes_get_whole_groups(tmp_path: Path) -> None:
    """The one that is smaller comes last, so that a node that cuts its clients into groups finds the same."""
    config = tiny(**ALL)
    strategy: FederatedStrategy = build(config, federate(config))
    groups = [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    for nodes in (1, 2, 3):
        spread = strategy._spread(range(10), range(nodes), 4)
        found = [tuple(mine[i : i + 4]) for mine in map(sorted, spread.values()) for i in range(0, len(mine), 4)]
        assert sorted(found) == groups
    assert strategy._spread(range(10), range(3)) == strategy._spread(range(10), range(3), 1)


@pytest.mark.parametrize(
    ("method", "keys", "said"),
    [
        ("moon", {}, "run.group = 2: moon trains its clients one by one; take 1, or one of fedavg,"),
        ("scaffold", {"scaffold.variant": "option-1"}, "run.group = 2: scaffold trains its clients one by one"),
        ("fedavg", {"data.partition": "devices"}, "run.group = 2: devices train their clients one by one"),
    ],
)
def test_what_cannot_be_grouped_is_refused(method: str, keys: dict[str, Scalar], said: str) -> None:
    """Before anything starts, with the methods that can; one by one it is all allowed."""
    tiny(method, **keys)
    with pytest.raises(UserError, match=said):
        tiny(method, **keys, **{"run.group": 2})


def test_a_stack_of_models_is_each_of_them() -> None:
    """Parts of the model, its masks, and the workspace whose module it borrows, included."""
    config = tiny(**{"model.name": "fedgen_cnn"})
    model = FlatModel(build_model(config.model, (1, 8, 8), 10, Streams(1)))
    held, generator = model.parameters.clone(), torch.Generator().manual_seed(0)
    stack = StackedModel(model, 3)
    rows = torch.randn(3, held.numel(), generator=generator)
    stack.load(rows, torch.rand(3, model.statistics.numel(), generator=generator))
    x = torch.randn(3, 5, 1, 8, 8, generator=generator)
    model.module.eval()
    whole, features = stack(x), stack(x, stop="head")
    assert torch.equal(model.parameters, held)
    for number in range(3):
        model.load(rows[number], stack.statistics[number])
        torch.testing.assert_close(whole[number], model(x[number]), **NEAR)
        torch.testing.assert_close(features[number], model(x[number], stop="head"), **NEAR)
        torch.testing.assert_close(stack(features, start="head"), whole, **NEAR)
    assert torch.equal(stack.slice_of(lambda name: name == "head"), model.slice_of(lambda name: name == "head"))
