"""APFL: limit cases bit for bit, Eq. 10 by finite differences, and numbers that the authors' own code gave."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny
from safetensors.torch import load_file
from torch import nn

import clients.apfl as half
from clients.training import Job
from fedkd.config import Scalar
from fedkd.data import Shard
from fedkd.losses import cross_entropy
from fedkd.methods import apfl, fedavg
from fedkd.methods.apfl import State
from fedkd.models import FlatModel, StagedModel, gradients
from fedkd.results import Run
from fedkd.setup import Setup
from strategies.averaging import average

RunInline = Callable[..., Run]
Case = dict[str, Any]
VARIANTS = pytest.mark.parametrize("variant", ["paper", "authors"])
UNIFORM: dict[str, Scalar] = {"fedavg.weighting": "uniform"}
NORMED: dict[str, Scalar] = {"model.name": "fedgen_cnn"}
"""A model with BatchNorm."""
AUTHORS: Case = json.loads((Path(__file__).parent / "fixtures" / "apfl_authors.json").read_text(encoding="utf-8"))
"""What the authors' code gave, and how it was asked: see its ``source``."""
EMPTY = torch.zeros(0)


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


# Limit cases.


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, {**NORMED, "train.momentum": 0.5}], ids=["mlp", "batch-norm"])
@VARIANTS
def test_without_an_own_model_it_is_the_control(run_inline: RunInline, variant: str, keys: dict[str, Scalar]) -> None:
    """alpha = 0 is FedAvg scored at w_i after its local steps: global and personal scores, bit for bit."""
    run = run_inline("apfl", **{**keys, "apfl.variant": variant, "apfl.alpha": 0.0})
    control = run_inline("fedavg_ft", **{**keys, "fedavg_ft.weighting": "uniform"})
    assert states(run) == states(control)
    assert run.rows("evaluations") == control.rows("evaluations")


@VARIANTS
def test_an_own_model_without_weight_never_moves(worker: Callable[..., Any], variant: str) -> None:
    """With alpha = 0 the mixture does not depend on v."""
    node = worker("apfl", **{"apfl.variant": variant, "apfl.alpha": 0.0})
    outcome = node.half.update(node.job(1, 0), fedavg.Broadcast(node.initial, EMPTY), None, node.shard(0, "train"))
    assert torch.equal(outcome.state.own, node.initial)
    assert not torch.equal(outcome.state.copy, node.initial)


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, {**NORMED, "train.weight-decay": 0.1}], ids=["mlp", "batch-norm"])
@VARIANTS
def test_an_own_model_alone_is_local_training(run_inline: RunInline, variant: str, keys: dict[str, Scalar]) -> None:
    """alpha = 1: v follows purely local SGD, so nothing of other clients can be in it."""
    run = run_inline("apfl", **{**keys, "apfl.variant": variant, "apfl.alpha": 1.0})
    mine, alone = scores(run, "personal"), scores(run_inline("local", **keys), "personal")
    assert [mine[pair] for pair in trained(run)] == [alone[pair] for pair in trained(run)]
    assert trained(run)


TRAJECTORIES: list[dict[str, Scalar]] = [
    {},
    {"train.momentum": 0.9, "train.weight-decay": 0.01, "train.lr-decay": 0.5},
    {**NORMED, "model.norm-statistics": "averaged"},
]


@pytest.mark.slow
@pytest.mark.parametrize("keys", TRAJECTORIES, ids=["plain", "momentum", "averaged-statistics"])
@VARIANTS
def test_the_global_model_does_not_know_of_alpha(run_inline: RunInline, variant: str, keys: dict[str, Scalar]) -> None:
    """w is FedAvg's after every round whatever alpha and v do; elsewhere it takes the same step twice."""
    expected = run_inline("fedavg", **{**keys, **UNIFORM})
    for alpha, adaptive in ((0.3, False), (0.9, True)):
        own: dict[str, Scalar] = {"apfl.variant": variant, "apfl.alpha": alpha, "apfl.adaptive": adaptive}
        run = run_inline("apfl", **{**keys, **own, "apfl.alpha-steps": "every"})
        assert states(run) == states(expected)
        assert scores(run, "global") == scores(expected, "global")


@VARIANTS
def test_only_w_travels(variant: str) -> None:
    """The payloads are FedAvg's, so v and alpha cannot leave the client."""
    assert apfl.METHOD.Update is fedavg.Update
    assert apfl.METHOD.Broadcast is fedavg.Broadcast
    assert set(State.specs()) - set(fedavg.State.specs()) == {"own", "copy", "personal_statistics", "alpha"}


# State and results.


@VARIANTS
def test_a_client_that_is_not_sampled_keeps_its_model_and_its_weight(run_inline: RunInline, variant: str) -> None:
    """State is written when a client takes part, and its score changes at no other time."""
    run = run_inline("apfl", **{"apfl.variant": variant, "apfl.adaptive": True})
    rounds = {client: [r["round"] for r in run.rows("rounds") if client in r["clients"]] for client in range(6)}
    personal = scores(run, "personal")
    for client, numbers in rounds.items():
        files = sorted((run.folder / "state" / f"{client:06d}").glob("*.safetensors"))
        kept = [int(file.stem) for file in files]
        assert kept[-1:] == numbers[-1:]
        assert set(kept) <= set(numbers)
        for number in (2, 3):
            if numbers and numbers[0] < number:
                assert (personal[number, client] == personal[number - 1, client]) == (number not in numbers)


@VARIANTS
def test_before_its_first_participation_a_client_has_the_global_model(run_inline: RunInline, variant: str) -> None:
    """Nothing is mixed with a model that was never trained."""
    run = run_inline("apfl", **{"apfl.variant": variant, "run.rounds": 1})
    glob, personal = scores(run, "global"), scores(run, "personal")
    assert all((glob[pair] == personal[pair]) == (pair not in trained(run)) for pair in glob)


@VARIANTS
def test_each_clients_weight_is_in_the_results(run_inline: RunInline, variant: str) -> None:
    """One alpha per client and round; a fixed one stays, a trained one goes on from where the client left it."""
    fixed = run_inline("apfl", **{"apfl.variant": variant, "apfl.alpha": 0.3})
    assert {(row["alpha_sum"], row["alpha_weight"]) for row in fixed.rows("clients")} == {(0.3, 1.0)}
    run = run_inline("apfl", **{"apfl.variant": variant, "apfl.adaptive": True})
    last = {row["client"]: row["alpha_sum"] for row in run.rows("clients")}
    assert len(set(last.values())) == len(last)
    for client, alpha in last.items():
        file = sorted((run.folder / "state" / f"{client:06d}").glob("*.safetensors"))[-1]
        assert float(load_file(file)["alpha"]) == alpha


@pytest.mark.slow
@VARIANTS
def test_the_weight_stays_a_weight(run_inline: RunInline, variant: str) -> None:
    """alpha is clipped to [0, 1]; unclipped, these long steps would leave it."""
    own: dict[str, Scalar] = {"apfl.adaptive": True, "apfl.alpha-steps": "every", "apfl.alpha": 0.95}
    run = run_inline("apfl", **{"apfl.variant": variant, **own, "train.lr": 0.5, "train.local-steps": 20})
    alphas = [row["alpha_sum"] for row in run.rows("clients")]
    assert all(0 <= alpha <= 1 for alpha in alphas)
    assert {0.0, 1.0} & set(alphas)


# The mathematics, in double precision.


def double(kind: str, **flat: Scalar) -> Job:
    """Return a job in double precision for images of 2x2 and three classes, on a linear model or an MLP."""
    config = tiny("apfl", **{"model.name": "mlp", "model.hidden": 5, **flat})
    setup = Setup.build(config, (1, 2, 2), 3, torch.device("cpu"))
    staged = setup.staged
    if kind == "linear":
        head = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        staged = StagedModel(OrderedDict([("head", head)]), (1, 2, 2))
    first, second = (FlatModel(copy.deepcopy(staged).double()) for _ in range(2))
    return Job(config, first, setup.streams, 1, 0, first.parameters.clone(), {"personal": second})


def vectors(job: Job, *seeds: int) -> list[torch.Tensor]:
    """Return random vectors ``[P]``."""
    size = job.model.parameters.shape
    return [torch.randn(size, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return six images and their classes."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(6, 1, 2, 2, generator=rng, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 0, 1])


def loss_at(job: Job, parameters: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the mean loss at parameters ``[P]``, in the workspace."""
    job.model.load(parameters)
    return cross_entropy(job.model(batch[0]), batch[1]).mean()


def gradient_at(job: Job, parameters: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return its gradient ``[P]``."""
    return job.model.backward(loss_at(job, parameters, batch)).clone()


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_eq_10_by_finite_differences(kind: str, alpha: float) -> None:
    """d f(alpha v + (1 - alpha) w) / d alpha is the gradient at the mixture along v - w."""
    job = double(kind)
    (v, w), batch, step = vectors(job, 1, 2), data(), 1e-6
    ends = [float(loss_at(job, half.mixture(alpha + h, v, w), batch).detach()) for h in (step, -step)]
    slope = half.alpha_gradient(v, w, gradient_at(job, half.mixture(alpha, v, w), batch))
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6)


def released(job: Job, alpha: float, v: torch.Tensor, w: torch.Tensor, batch: Any, pull: float) -> float:
    """Return the released code's gradient of alpha, at v and w, with autograd's gradients of the mixed logits."""
    own = job.extras["personal"]
    job.model.load(w), own.load(v)
    mixed = alpha * own(batch[0]) + (1 - alpha) * job.model(batch[0])
    w_gradient, own_gradient = gradients(cross_entropy(mixed, batch[1]).mean(), job.model, own)
    return half.released_alpha_gradient(alpha, v, w, own_gradient, w_gradient, pull)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_the_released_gradient_of_a_linear_model(alpha: float) -> None:
    """Its two gradients hold alpha and 1 - alpha and are weighted by them again; 0.02 alpha comes on top."""
    job = double("linear")
    (v, w), batch = vectors(job, 1, 2), data()
    exact = half.alpha_gradient(v, w, gradient_at(job, half.mixture(alpha, v, w), batch))
    expected = (alpha**2 + (1 - alpha) ** 2) * exact + 0.02 * alpha
    assert released(job, alpha, v, w, batch, 0.02) == pytest.approx(expected, rel=1e-12)


def test_the_released_gradient_may_have_the_wrong_sign() -> None:
    """On a model that is not linear it is no multiple of Eq. 10, nor of the derivative of its own mixed loss."""
    job = double("mlp")
    signs = set()
    for seed in range(40):
        (v, w), batch = vectors(job, 2 * seed, 2 * seed + 1), data(seed)
        exact = half.alpha_gradient(v, w, gradient_at(job, half.mixture(0.5, v, w), batch))
        signs.add(math.copysign(1, exact * released(job, 0.5, v, w, batch, 0.0)))
    assert signs == {1.0, -1.0}


@pytest.mark.parametrize(("decay", "momentum"), [(0.0, 0.0), (0.3, 0.5)])
@pytest.mark.parametrize("steps", ["first", "every"])
def test_the_papers_steps_by_hand(monkeypatch: pytest.MonkeyPatch, steps: str, decay: float, momentum: float) -> None:
    """v, w and alpha all step from the same old point, v by alpha times the gradient at the mixture of parameters.

    Weight decay pulls at v and at w, each with its own momentum, and is no part of Eq. 10.
    """
    flat: dict[str, Scalar] = {"apfl.adaptive": True, "apfl.alpha-steps": steps, "train.lr": 0.05}
    flat |= {"train.weight-decay": decay, "train.momentum": momentum}
    job = double("mlp", **flat)
    batches = [data(seed) for seed in range(3)]
    monkeypatch.setattr(Job, "batches", lambda *_: iter(batches))
    (v, w), alpha = vectors(job, 1, 2), 0.4
    kept = torch.tensor(alpha, dtype=torch.float64)
    state = State(EMPTY, own=v, copy=w, personal_statistics=EMPTY, alpha=kept)
    shard = Shard(torch.zeros(6, 1, 2, 2), torch.zeros(6), torch.zeros(1), torch.ones(1))
    outcome = half.update(job, fedavg.Broadcast(w.clone(), EMPTY), state, shard)
    pace_v = pace_w = torch.zeros_like(v)
    for number, batch in enumerate(batches):
        at_mixture, at_w = gradient_at(job, alpha * v + (1 - alpha) * w, batch), gradient_at(job, w, batch)
        slope = float((v - w) @ at_mixture) if steps == "every" or number == 0 else 0.0
        pace_v = momentum * pace_v + alpha * at_mixture + decay * v
        pace_w = momentum * pace_w + at_w + decay * w
        v, w, alpha = v - 0.05 * pace_v, w - 0.05 * pace_w, min(max(alpha - 0.05 * slope, 0.0), 1.0)
    assert isinstance(outcome.state, State)
    torch.testing.assert_close(outcome.state.own, v, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(outcome.state.copy, w, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(outcome.update.tensors()["parameters"], w, rtol=1e-12, atol=1e-12)
    assert float(outcome.state.alpha) == pytest.approx(alpha, rel=1e-12)
    assert 0 < alpha < 1
    assert abs(alpha - 0.4) > 1e-3


def test_what_is_mixed_is_what_the_variant_says(worker: Callable[..., Any]) -> None:
    """Parameters in the paper, logits in the released code; on an MLP the two predict differently."""
    logits = {}
    for variant in ("paper", "authors"):
        node = worker("apfl", **{"apfl.variant": variant})
        rng = torch.Generator().manual_seed(0)
        v, w = (torch.randn(node.initial.shape, generator=rng) for _ in range(2))
        alpha = torch.tensor(0.3, dtype=torch.float64)
        state = State(EMPTY, own=v, copy=w, personal_statistics=EMPTY, alpha=alpha)
        broadcast, (x, _) = fedavg.Broadcast(node.initial, EMPTY), node.shard(0, "test").batch(slice(None))
        logits[variant] = node.half.models(node.job(1, 0), broadcast, state, node.shard(0, "train")).personal()(x)
        each = []
        for parameters in (v, w, 0.3 * v + 0.7 * w):
            node.setup.model.load(parameters)
            with torch.no_grad():
                each.append(node.setup.model(x))
        expected = each[2] if variant == "paper" else 0.3 * each[0] + 0.7 * each[1]
        torch.testing.assert_close(logits[variant], expected)
    assert not torch.allclose(logits["paper"], logits["authors"], rtol=0.1)


# What the authors' code gave.


def pattern(seed: int, *shape: int) -> torch.Tensor:
    """Return the values in [-1, 1) that the fixture names by a seed; integer arithmetic, so equal everywhere."""
    i = torch.arange(1, math.prod(shape) + 1) + 1000 * seed
    return 2 * (((31 * i * i + 17 * i) % 10007).double() / 10007).float().reshape(shape) - 1


def close(actual: Any, expected: Any) -> None:
    """Compare with a recorded number or list."""
    actual = torch.as_tensor(actual).double()
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("case", AUTHORS["alpha_update"], ids=lambda case: f"{case['alpha']}-{case['lr']}")
def test_alpha_update_is_the_authors(case: Case) -> None:
    """alpha_update alone, with clipping at both ends."""
    w, w_gradient, v, v_gradient = (pattern(seed, 9) for seed in (21, 22, 23, 24))
    slope = half.released_alpha_gradient(case["alpha"], v, w, v_gradient, w_gradient, 0.02)
    close(half._clip(case["alpha"] - case["lr"] * slope), case["after"])


@pytest.mark.parametrize("case", AUTHORS["runs"], ids=lambda case: case["name"].replace(" ", "-"))
def test_two_rounds_are_the_authors(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Order of the steps, mixed logits, alpha's gradient with weight decay in it, and v's undecayed learning rate."""
    flat: dict[str, Scalar] = {
        "apfl.variant": "authors",
        "apfl.alpha": case["alpha"],
        "apfl.adaptive": case["adaptive"],
    }
    flat |= {"train.lr": case["lr"], "train.lr-decay": case["lr_decay"], "train.weight-decay": case["weight_decay"]}
    base = double(case["model"], **flat)
    extras = {"personal": FlatModel(base.extras["personal"].module.float())}
    base = dataclasses.replace(base, model=FlatModel(base.model.module.float()), extras=extras)
    size = base.model.parameters.numel()
    w, kept = pattern(1, size), [pattern(10, size), pattern(11, size)]
    states: list[State | None] = [None, None]
    shard = Shard(torch.zeros(4, 1, 2, 2), torch.zeros(4), torch.zeros(1), torch.ones(1))
    for number, recorded in enumerate(case["rounds"], start=1):
        sent = []
        for client, expected in enumerate(recorded["clients"]):
            labels = [torch.tensor(y) for y in AUTHORS["labels"][client]]
            batches = [(pattern(100 + 10 * client + t, 4, 1, 2, 2), y) for t, y in enumerate(labels)]
            monkeypatch.setattr(Job, "batches", lambda *_, batches=batches: iter(batches))
            job = dataclasses.replace(base, round=number, client=client, initial_parameters=kept[client])
            broadcast = fedavg.Broadcast(w, EMPTY)
            update, state, metrics = half.update(job, broadcast, states[client], shard)
            assert isinstance(update, fedavg.Update)
            assert isinstance(state, State)
            close(update.parameters, expected["w"])
            close(state.own, expected["v"])
            close(state.alpha, expected["alpha"])
            assert metrics["alpha"] == (float(state.alpha), 1.0)
            personal = half.models(job, broadcast, state, shard).personal
            assert personal is not None
            logits = personal()(pattern(500, 4, 1, 2, 2))
            close(cross_entropy(logits, torch.tensor(AUTHORS["scored_labels"])).mean(), expected["loss"])
            states[client] = state
            sent.append(update.parameters)
        w = average(sent, [0.5, 0.5])
        close(w, recorded["w"])
