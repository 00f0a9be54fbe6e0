"""Ditto, pFedMe and Per-FedAvg: limit cases, derivations in double precision, and the authors' own numbers."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny
from safetensors.torch import load_file

import clients.ditto as ditto_half
import clients.per_fedavg as per_fedavg_half
import clients.pfedme as pfedme_half
import strategies.pfedme as pfedme_server
from clients.training import Job
from fedkd.config import Scalar
from fedkd.data import Shard
from fedkd.errors import UserError
from fedkd.losses import cross_entropy
from fedkd.methods import ditto, fedavg, fedavg_ft
from fedkd.models import FlatModel
from fedkd.results import Run
from fedkd.setup import Setup
from sims import cli

RunInline = Callable[..., Run]
Worker = Callable[..., Any]
Batch = tuple[torch.Tensor, torch.Tensor]
Case = dict[str, Any]
NORMED: dict[str, Scalar] = {"model.name": "fedgen_cnn"}
"""A model with BatchNorm."""
SETTINGS: list[dict[str, Scalar]] = [
    {},
    {"train.momentum": 0.9, "train.weight-decay": 0.01, "train.lr-decay": 0.5},
    NORMED,
    {**NORMED, "model.norm-statistics": "averaged"},
]
EVERY_SETTING = pytest.mark.parametrize("keys", SETTINGS, ids=["plain", "momentum", "batch-norm", "averaged"])
AUTHORS: Case = json.loads((Path(__file__).parent / "fixtures" / "pfedme_authors.json").read_text(encoding="utf-8"))
"""What the authors of pFedMe's code gave, and how it was asked: see its ``source``."""
EMPTY = torch.zeros(0)
SHARD = Shard(torch.zeros(6, 1, 2, 2), torch.zeros(6), torch.zeros(1), torch.ones(1))
"""Stands for a client's data where a test feeds the batches."""


def scores(run: Run, kind: str) -> dict[tuple[int, int], tuple[int, float]]:
    """Return (round, client) to (correct, loss) of every evaluation of the global or the personal model."""
    return {
        (row["round"], row["client"]): (row[f"{kind}_correct"], row[f"{kind}_loss_sum"])
        for row in run.rows("evaluations")
    }


def trained(run: Run) -> list[tuple[int, int]]:
    """Return every (round, client) at which the client had taken part before or then."""
    seen: set[int] = set()
    pairs = []
    for row in run.rows("rounds"):
        seen |= set(row["clients"])
        pairs += [(row["round"], client) for client in sorted(seen)]
    return pairs


def states(run: Run) -> list[str]:
    """Return the hash of the server's state after each round."""
    return [row["state"] for row in run.rows("rounds")]


def double(method: str, **flat: Scalar) -> Job:
    """Return a job in double precision on an MLP for images of 2x2 and three classes."""
    config = tiny(method, **{"model.name": "mlp", "model.hidden": 5, **flat})
    setup = Setup.build(config, (1, 2, 2), 3, torch.device("cpu"))
    model = FlatModel(copy.deepcopy(setup.staged).double())
    return Job(config, model, setup.streams, 1, 0, model.parameters.clone(), {})


def vectors(job: Job, *seeds: int) -> list[torch.Tensor]:
    """Return random vectors ``[P]``."""
    size = job.model.parameters.shape
    return [torch.randn(size, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]


def data(seed: int = 0) -> Batch:
    """Return six images and their classes."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(6, 1, 2, 2, generator=rng, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 0, 1])


def loss_at(job: Job, parameters: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the mean loss at parameters ``[P]``, in the workspace."""
    job.model.load(parameters)
    return cross_entropy(job.model(batch[0]), batch[1]).mean()


def gradient_at(job: Job, parameters: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return its gradient ``[P]``."""
    return job.model.backward(loss_at(job, parameters, batch)).clone()


def feed(monkeypatch: pytest.MonkeyPatch, **batches: list[Batch]) -> None:
    """Let a client train on these batches, by purpose."""
    monkeypatch.setattr(Job, "batches", lambda job, shard, steps=None, purpose="batches": iter(batches[purpose]))


def near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare in double precision."""
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("method", ["ditto", "pfedme"])
def test_before_its_first_participation_a_client_has_the_global_model(run_inline: RunInline, method: str) -> None:
    """A client without a model of its own is scored with the global one."""
    run = run_inline(method, **{"run.rounds": 1})
    glob, personal = scores(run, "global"), scores(run, "personal")
    assert all((glob[pair] == personal[pair]) == (pair not in trained(run)) for pair in glob)


# Ditto.


@pytest.mark.slow
@EVERY_SETTING
@pytest.mark.parametrize("lam", [0.0, 2.0])
def test_ditto_has_fedavgs_global_model(run_inline: RunInline, keys: dict[str, Scalar], lam: float) -> None:
    """Personal models are an add-on: the global one is FedAvg's after every round, whatever lambda is."""
    run, expected = (
        run_inline("ditto", **keys, **{"ditto.lam": lam}),
        run_inline("fedavg", **keys, **{"fedavg.weighting": "uniform"}),
    )
    assert states(run) == states(expected)
    assert scores(run, "global") == scores(expected, "global")


@pytest.mark.slow
@EVERY_SETTING
def test_ditto_without_its_pull_is_local_training(run_inline: RunInline, keys: dict[str, Scalar]) -> None:
    """lambda = 0: the personal model starts from the initial one and sees its client's data alone, bit for bit."""
    run = run_inline("ditto", **keys, **{"ditto.lam": 0.0})
    mine, alone = scores(run, "personal"), scores(run_inline("local", **keys), "personal")
    assert trained(run)
    assert [mine[pair] for pair in trained(run)] == [alone[pair] for pair in trained(run)]


def test_dittos_steps_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step is the gradient of F(v) + lambda/2 ||v - w||^2, w the global model that was sent, on FedAvg's batch."""
    job, batches, lr, lam = (
        double("ditto", **{"train.lr": 0.2, "ditto.lam": 0.7}),
        [data(1), data(2), data(3)],
        0.2,
        0.7,
    )
    feed(monkeypatch, batches=batches)
    v, sent = vectors(job, 1, 2)
    state = ditto.State(EMPTY, parameters=v, personal_statistics=EMPTY)
    outcome = ditto_half.update(job, fedavg.Broadcast(sent, EMPTY), state, SHARD)
    w = sent
    for batch in batches:
        point = v.clone().requires_grad_()
        (pull,) = torch.autograd.grad(lam / 2 * (point - sent).square().sum(), point)
        v, w = v - lr * (gradient_at(job, v, batch) + pull), w - lr * gradient_at(job, w, batch)
    assert isinstance(outcome.state, ditto.State)
    near(outcome.state.parameters, v)
    near(outcome.update.tensors()["parameters"], w)


# pFedMe.


def pattern(seed: int, *shape: int) -> torch.Tensor:
    """Return the values in [-1, 1) that the fixture names by a seed; integer arithmetic, so equal everywhere."""
    i = torch.arange(1, math.prod(shape) + 1) + 1000 * seed
    return 2 * (((31 * i * i + 17 * i) % 10007).double() / 10007).float().reshape(shape) - 1


@pytest.mark.parametrize("case", AUTHORS["runs"], ids=["released-settings", "beta-2"])
def test_two_rounds_of_pfedme_are_the_authors(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inner steps with their L2 term, outer steps, weights by examples, beta, and which model is scored."""
    own = {f"pfedme.{key.replace('_', '-')}": case[key] for key in ("lam", "inner_steps", "inner_lr", "beta")}
    config = tiny("pfedme", **own, **{"pfedme.variant": "authors", "train.lr": case["lr"], "model.hidden": 5})
    setup = Setup.build(config, (1, 2, 2), 3, torch.device("cpu"))
    server = dataclasses.replace(pfedme_server.init(setup), parameters=pattern(1, setup.sizes["parameters"]))
    for number, recorded in enumerate(case["rounds"], start=1):
        updates = []
        for client, expected in enumerate(recorded["clients"]):
            labels = [torch.tensor(y) for y in AUTHORS["labels"][client]]
            feed(monkeypatch, batches=[(pattern(100 + 10 * client + t, 4, 1, 2, 2), y) for t, y in enumerate(labels)])
            job = Job(config, setup.model, setup.streams, number, client, server.parameters, {})
            sent = pfedme_server.broadcast(setup, server, number)
            update, state, _ = pfedme_half.update(job, sent, None, SHARD)
            assert isinstance(update, fedavg.Update)
            assert isinstance(state, fedavg_ft.State)
            torch.testing.assert_close(update.parameters, torch.tensor(expected["w"]), rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(state.parameters, torch.tensor(expected["scored"]), rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(setup.model.parameters, torch.tensor(expected["theta"]), rtol=1e-5, atol=2e-6)
            updates.append(dataclasses.replace(update, examples=torch.tensor(AUTHORS["examples"][client])))
        server, _ = pfedme_server.update(setup, server, updates, number)
        torch.testing.assert_close(server.parameters, torch.tensor(recorded["w"]), rtol=1e-5, atol=5e-6)


def test_pfedmes_steps_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """K inner steps on one batch, then one outer step; the personal model of the paper is theta."""
    flat: dict[str, Scalar] = {"pfedme.lam": 3.0, "pfedme.inner-steps": 2, "pfedme.inner-lr": 0.1, "train.lr": 0.2}
    job, batches = double("pfedme", **flat), [data(1), data(2)]
    feed(monkeypatch, batches=batches)
    (w,) = vectors(job, 1)
    outcome = pfedme_half.update(job, fedavg.Broadcast(w.clone(), EMPTY), None, SHARD)
    theta = w
    for batch in batches:
        for _ in range(2):
            theta = theta - 0.1 * (gradient_at(job, theta, batch) + 3.0 * (theta - w))
        w = w - 0.2 * 3.0 * (w - theta)
    assert isinstance(outcome.state, fedavg_ft.State)
    near(outcome.state.parameters, theta)
    near(outcome.update.tensors()["parameters"], w)


@pytest.mark.slow
def test_pfedmes_outer_step_is_the_envelopes_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an inner problem solved to the end, lambda (w - theta) is the gradient of the Moreau envelope."""
    lam, lr, step = 4.0, 1e-3, 1e-4
    flat: dict[str, Scalar] = {"pfedme.lam": lam, "pfedme.inner-steps": 2000, "pfedme.inner-lr": 0.1, "train.lr": lr}
    job, batch = double("pfedme", **flat), data()
    w, along = vectors(job, 1, 2)

    def participate(start: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return w after one outer step and the envelope's value at its start."""
        feed(monkeypatch, batches=[batch])
        outcome = pfedme_half.update(job, fedavg.Broadcast(start, EMPTY), None, SHARD)
        assert isinstance(outcome.state, fedavg_ft.State)
        theta = outcome.state.parameters
        envelope = float(loss_at(job, theta, batch).detach() + lam / 2 * (theta - start).square().sum())
        return outcome.update.tensors()["parameters"], envelope

    gradient = (w - participate(w)[0]) / lr
    slope = (participate(w + step * along)[1] - participate(w - step * along)[1]) / (2 * step)
    assert float(gradient @ along) == pytest.approx(slope, rel=1e-6)


@pytest.mark.slow
@EVERY_SETTING
def test_pfedme_with_one_inner_step_and_a_whole_outer_one_is_fedavg(
    run_inline: RunInline, keys: dict[str, Scalar]
) -> None:
    """K = 1 and lam * lr = 1: w moves onto theta, which has made one SGD step; equal up to rounding."""
    if "train.momentum" in keys:
        keys = {"train.batch-size": 8}  # momentum and decay act on w, whose learning rate is another one here
    own: dict[str, Scalar] = {"pfedme.lam": 4.0, "pfedme.inner-steps": 1, "pfedme.inner-lr": 0.05, "train.lr": 0.25}
    mine = run_inline("pfedme", **{**keys, **own})
    expected = run_inline("fedavg", **{**keys, "fedavg.weighting": "uniform", "train.lr": 0.05})
    for name, final in load_file(expected.folder / "final.safetensors").items():
        assert torch.allclose(load_file(mine.folder / "final.safetensors")[name], final, atol=1e-5), name
    assert mine.summary()["last_global"] == pytest.approx(expected.summary()["last_global"], abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lr", "curvature", "settles"),
    [
        (2 / 15, 0.0, True),
        (2 / 15, 1.0, True),
        (2 / 15, 7.0, True),
        (0.4, 1.0, True),
        (0.4, 4.0, True),
        (0.4, 5.0, False),
    ],
)
def test_pfedmes_steps_settle_for_any_loss_only_up_to_lr_lambda_2(
    monkeypatch: pytest.MonkeyPatch, lr: float, curvature: float, settles: bool
) -> None:
    """On ``f = curvature / 2 ||theta||^2``, where the inner steps alone do: inner-lr (lambda + curvature) < 2."""
    job = double("pfedme", **{"train.lr": lr})
    (start,) = vectors(job, 1)
    feed(monkeypatch, batches=[data()] * 60)
    loss = lambda *_: curvature / 2 * torch.stack([t.square().sum() for t in job.model.tensors]).sum().reshape(1)  # noqa: E731
    monkeypatch.setattr(pfedme_half, "cross_entropy", loss)
    outcome = pfedme_half.update(job, fedavg.Broadcast(start.clone(), EMPTY), None, SHARD)
    w = outcome.update.tensors()["parameters"]
    assert (float(w.norm()) <= float(start.norm())) == settles
    assert not settles or torch.isfinite(w).all()


def test_steps_that_overshoot_are_doubted_or_refused() -> None:
    """Refused where the inner steps cannot settle, doubted where it depends on the loss."""
    assert tiny("pfedme", **{"pfedme.inner-lr": 0.13}).hyper.inner_lr == 0.13
    assert tiny("pfedme", **{"pfedme.inner-lr": 0.14, "pfedme.inner-steps": 1}).hyper.inner_steps == 1  # FedAvg has it
    with pytest.raises(UserError, match=r"pfedme\.lam = 15\.0 times pfedme\.inner-lr = 0\.14 .* below 0\.133"):
        tiny("pfedme", **{"pfedme.inner-lr": 0.14})
    for method, key, most in (("pfedme", "pfedme.lam", 10.0), ("ditto", "ditto.lam", 9.9)):
        quiet, said = (tiny(method, **{"train.lr": 0.2, key: lam}) for lam in (most, 10.1))
        assert quiet.hyper.doubts(quiet.train, quiet.model, 0) == []
        [line] = said.hyper.doubts(said.train, said.model, 0)
        assert line.startswith(f"train.lr = 0.2 times {key} = 10.1 ")


def test_a_doubt_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the number of seeds and the methods beside."""
    runs = [tiny(method, **{"train.lr": 0.4, "run.seed": seed}) for method in ("pfedme", "fedavg") for seed in (1, 2)]
    cli._warn_of_ignored(runs, ["train.lr"])
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("fedkd: train.lr = 0.4 times pfedme.lam = 15.0 is above 2, where ")


def test_pfedme_without_a_pull_or_without_a_server_step_leaves_the_global_model(
    worker: Worker, run_inline: RunInline
) -> None:
    """lambda = 0: a client sends back what it got, and its personal model is K plain steps per batch; beta = 0."""
    node = worker("pfedme", **{"pfedme.lam": 0.0})
    shard, job = node.shard(0, "train"), node.job(1, 0)
    outcome = node.half.update(job, fedavg.Broadcast(node.initial, EMPTY), None, shard)
    assert torch.equal(outcome.update.parameters, node.initial)
    theta = node.initial
    for batch in job.batches(shard):
        for _ in range(job.hyper.inner_steps):
            theta = theta - job.hyper.inner_lr * gradient_at(job, theta, batch)
    torch.testing.assert_close(outcome.state.parameters, theta, rtol=1e-5, atol=1e-5)
    still = states(run_inline("pfedme", **{"pfedme.beta": 0.0}))
    assert len(set(still)) == 1
    assert len(set(states(run_inline("pfedme")))) == 3


# Per-FedAvg.

VARIANTS = pytest.mark.parametrize("variant", ["first-order", "hessian-free", "hessian"])


@pytest.mark.slow
@EVERY_SETTING
@VARIANTS
def test_per_fedavg_without_its_step_is_fedavg(run_inline: RunInline, keys: dict[str, Scalar], variant: str) -> None:
    """alpha = 0: FedAvg bit for bit, and the personal model is the global one."""
    run = run_inline("per_fedavg", **keys, **{"per_fedavg.variant": variant, "per_fedavg.alpha": 0.0})
    expected = run_inline("fedavg", **keys, **{"fedavg.weighting": "uniform"})
    assert states(run) == states(expected)
    assert scores(run, "global") == scores(expected, "global") == scores(run, "personal")


def direction(job: Job, w: torch.Tensor, monkeypatch: pytest.MonkeyPatch, *batches: Batch) -> torch.Tensor:
    """Return the direction of one local step from w on the batches D', D and D''."""
    outer, adaptation, curvature = batches
    feed(monkeypatch, batches=[outer], adaptation=[adaptation], curvature=[curvature])
    outcome = per_fedavg_half.update(job, fedavg.Broadcast(w, EMPTY), None, SHARD)
    return (w - outcome.update.tensors()["parameters"]) / job.train.lr


def test_per_fedavgs_direction_is_the_gradient_after_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one batch it is the gradient of f(w - alpha grad f(w)), by finite differences; first order is not."""
    alpha, batch, step = 0.3, data(), 1e-5
    jobs = {
        variant: double("per_fedavg", **{"per_fedavg.variant": variant, "per_fedavg.alpha": alpha, "train.lr": 0.1})
        for variant in ("first-order", "hessian-free", "hessian")
    }
    job = jobs["hessian"]
    w, along = vectors(job, 1, 2)

    def objective(point: torch.Tensor) -> float:
        return float(loss_at(job, point - alpha * gradient_at(job, point, batch), batch).detach())

    slope = (objective(w + step * along) - objective(w - step * along)) / (2 * step)
    found = {v: float(direction(j, w, monkeypatch, batch, batch, batch) @ along) for v, j in jobs.items()}
    assert found["hessian"] == pytest.approx(slope, rel=1e-6)
    assert found["hessian-free"] == pytest.approx(slope, rel=1e-5)
    assert abs(found["first-order"] - slope) > 0.01 * abs(slope)


@VARIANTS
def test_per_fedavgs_three_batches(monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    """The step is on D, the gradient after it on D', and the Hessian at w, not after the step, on D''."""
    alpha = 0.3
    job = double("per_fedavg", **{"per_fedavg.variant": variant, "per_fedavg.alpha": alpha, "train.lr": 0.1})
    outer, adaptation, curvature = data(1), data(2), data(3)
    (w,) = vectors(job, 1)
    found = direction(job, w, monkeypatch, outer, adaptation, curvature)
    expected = gradient_at(job, w - alpha * gradient_at(job, w, adaptation), outer)
    if variant != "first-order":
        step = 1e-4
        ahead, behind = (gradient_at(job, w + sign * step * expected, curvature) for sign in (1, -1))
        expected = expected - alpha * (ahead - behind) / (2 * step)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_per_fedavgs_batches_are_drawn_independently(worker: Worker) -> None:
    """With one and the same batch for step and gradient, the gradient after the step would be biased."""
    node = worker("per_fedavg")
    shard, job = node.shard(0, "train"), node.job(1, 0)
    drawn = [next(job.batches(shard, purpose=p))[0] for p in ("batches", "adaptation", "curvature")]
    assert not any(torch.equal(a, b) for a, b in ((drawn[0], drawn[1]), (drawn[0], drawn[2]), (drawn[1], drawn[2])))


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_per_fedavg_is_scored_after_steps_on_training_data(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Elsewhere the step before scoring is made on test data; here it is a whole pass over the training data."""
    monkeypatch.setattr(per_fedavg_half, "SCORE_BATCH", 7)
    node = worker("per_fedavg", **{"per_fedavg.score-steps": steps, "per_fedavg.alpha": 0.2})
    shard = node.shard(1, "train")
    models = node.half.models(node.job(1, 1), fedavg.Broadcast(node.initial, EMPTY), None, shard)
    x, _ = node.shard(1, "test").batch(slice(None))
    logits = models.personal()(x)
    w = node.initial
    for _ in range(steps):
        w = w - 0.2 * gradient_at(node.job(1, 1), w, shard.batch(slice(None)))
    node.setup.model.load(w)
    with torch.no_grad():
        torch.testing.assert_close(logits, node.setup.model(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(logits, models.shared()(x)) == (steps == 0)
