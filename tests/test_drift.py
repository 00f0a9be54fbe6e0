"""SCAFFOLD, FedDyn and MOON: limit cases bit for bit, derivations, and numbers of the authors' own code."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny
from safetensors.torch import load_file
from torch.nn import functional

import clients.moon as moon_client
import clients.scaffold as scaffold_client
import strategies.feddyn as feddyn_server
import strategies.scaffold as scaffold_server
from fedkd.config import Scalar
from fedkd.data import Shard, federate
from fedkd.errors import UserError
from fedkd.losses import cross_entropy
from fedkd.methods import fedavg, fedavg_ft, feddyn, scaffold
from fedkd.results import Run
from strategies import build

RunInline = Callable[..., Run]
Worker = Callable[..., Any]
OPTIONS = ["option-1", "option-2"]
NORMED: dict[str, Scalar] = {"model.name": "fedgen_cnn"}
"""A model with BatchNorm."""
EMPTY = torch.zeros(0)


def final(run: Run) -> dict[str, torch.Tensor]:
    """Return the server's last state."""
    return load_file(run.folder / "final.safetensors")


def kept(run: Run, field: str, like: torch.Tensor) -> torch.Tensor:
    """Return a field of all clients' last states ``[clients, P]``, zero for those that never took part."""
    rows = []
    for client in range(run.config.run.clients):
        files = sorted((run.folder / "state" / f"{client:06d}").glob("*.safetensors"))
        rows.append(load_file(files[-1])[field] if files else torch.zeros_like(like))
    return torch.stack(rows)


def same(first: Run, second: Run) -> None:
    """Compare the global models and all evaluations bit for bit."""
    assert torch.equal(final(first)["parameters"], final(second)["parameters"])
    assert first.rows("evaluations") == second.rows("evaluations")


def random_vectors(node: Any, *scales: float, seed: int = 0) -> list[torch.Tensor]:
    """Return one random vector ``[P]`` for each scale."""
    rng = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(node.initial.shape, generator=rng) for scale in scales]


def gradient(node: Any, theta: torch.Tensor, x: torch.Tensor, y: torch.Tensor, decay: float = 0.0) -> torch.Tensor:
    """Return the gradient ``[P]`` of the mean cross-entropy at theta, with weight decay."""
    model = node.setup.model
    model.load(theta)
    model.module.train()
    found: torch.Tensor = model.backward(cross_entropy(model(x), y).mean())
    return found + decay * theta


# SCAFFOLD.


@pytest.mark.slow
@pytest.mark.parametrize("variant", OPTIONS)
@pytest.mark.parametrize("keys", [{}, {**NORMED, "model.norm-statistics": "averaged"}], ids=["plain", "batchnorm"])
def test_scaffold_without_its_correction_is_the_plain_mean(
    run_inline: RunInline, variant: str, keys: dict[str, Scalar]
) -> None:
    """With c and c_k at zero the algorithm is FedAvg; its means are uniform."""
    run = run_inline("scaffold", **{"scaffold.correction": 0.0, "scaffold.variant": variant, **keys})
    same(run, run_inline("fedavg", **{"fedavg.weighting": "uniform", **keys}))


@pytest.mark.parametrize("variant", OPTIONS)
def test_scaffold_is_the_plain_mean_in_its_first_round_only(run_inline: RunInline, variant: str) -> None:
    """Control variates start at zero, so nothing is corrected before they have been renewed once."""
    run, avg = (
        run_inline("scaffold", **{"scaffold.variant": variant}),
        run_inline("fedavg", **{"fedavg.weighting": "uniform"}),
    )
    rows = [[r for r in each.rows("evaluations") if r["round"] == 1] for each in (run, avg)]
    assert rows[0] == rows[1]
    assert not torch.equal(final(run)["parameters"], final(avg)["parameters"])


@pytest.mark.slow
@pytest.mark.parametrize("variant", OPTIONS)
@pytest.mark.parametrize("per_round", [0, 2])
def test_the_servers_control_variate_is_the_mean_of_all_clients(
    run_inline: RunInline, variant: str, per_round: int
) -> None:
    """c moves by |S| / N of the cohort's mean change: without the factor it would be the cohort's, not everybody's."""
    run = run_inline("scaffold", **{"scaffold.variant": variant, "run.clients-per-round": per_round})
    control = final(run)["control"]
    rows = kept(run, "control", control)
    assert float(control.abs().max()) > 1e-3
    assert torch.allclose(rows.mean(dim=0), control, atol=1e-7)
    assert bool((rows == 0).all(dim=1).any()) == bool(per_round)


def scaffold_job(worker: Worker, **flat: Scalar) -> tuple[Any, scaffold.Broadcast, scaffold.State]:
    """Return a node, and a broadcast and a client's state with control variates that are not zero."""
    node = worker("scaffold", **flat)
    c, own = random_vectors(node, 0.03, 0.05)
    statistics = torch.ones(node.setup.sizes["statistics"])
    state = scaffold.State(statistics=statistics, control=own)
    return node, scaffold.Broadcast(parameters=node.initial, statistics=EMPTY, control=c), state


@pytest.mark.parametrize("correction", [1.0, 0.5])
@pytest.mark.parametrize("variant", OPTIONS)
def test_scaffolds_steps_and_new_control_variate(worker: Worker, variant: str, correction: float) -> None:
    """Steps go along grad - c_k + c; the new c_k is the gradient at x, or the mean of the gradients along the path.

    The learning rate has decayed: the FedDyn authors' SCAFFOLD divides by the one that it has not stepped with.
    """
    lr, decay = 0.1, 0.01
    node, broadcast, state = scaffold_job(
        worker,
        **{"scaffold.variant": variant},
        **{"scaffold.correction": correction, "train.lr": lr, "train.weight-decay": decay, "train.lr-decay": 0.5},
    )
    shard, job = node.shard(0, "train"), node.job(3, 0)
    outcome = node.half.update(job, broadcast, state, shard)
    theta, gradients = node.initial.clone(), []
    for x, y in job.batches(shard):
        gradients.append(gradient(node, theta, x, y, decay))
        theta = theta - lr / 4 * (gradients[-1] + correction * (broadcast.control - state.control))
    assert len(gradients) == 4
    x, y = shard.batch(slice(None))
    at_server = gradient(node, node.initial, x, y, decay)
    expected = at_server if variant == "option-1" else torch.stack(gradients).mean(dim=0)
    assert torch.allclose(outcome.update.parameters, theta, atol=1e-6)
    assert torch.allclose(outcome.state.control, expected, atol=1e-5)
    assert torch.equal(outcome.update.control_change, outcome.state.control - state.control)
    assert float((torch.stack(gradients).mean(dim=0) - at_server).abs().max()) > 1e-3


def test_both_options_are_one_after_one_full_step(worker: Worker) -> None:
    """A single step on all data leaves exactly the gradient at the server's model."""
    controls = []
    for variant in OPTIONS:
        keys: dict[str, Scalar] = {"train.local-steps": 1, "train.batch-size": 4096, "scaffold.variant": variant}
        node, broadcast, state = scaffold_job(worker, **keys)
        controls.append(node.half.update(node.job(2, 0), broadcast, state, node.shard(0, "train")).state.control)
    assert torch.allclose(controls[0], controls[1], atol=1e-5)


def test_the_pass_for_option_1_leaves_the_statistics_alone(worker: Worker) -> None:
    """The extra pass is no training: BatchNorm must not see the data a second time."""
    statistics = []
    for variant in OPTIONS:
        node, broadcast, state = scaffold_job(worker, **{"scaffold.variant": variant, **NORMED, "train.lr": 1e-9})
        statistics.append(node.half.update(node.job(2, 0), broadcast, state, node.shard(0, "train")).state.statistics)
    assert torch.allclose(statistics[0], statistics[1], atol=1e-5)
    assert not torch.allclose(statistics[0], torch.ones(44), atol=1e-2)


def test_option_2_may_refer_to_another_model(worker: Worker) -> None:
    """A server that fine-tunes can have the control variate refer to the model before fine-tuning."""
    node, broadcast, state = scaffold_job(worker, **{"train.lr": 0.1})
    shard, (other,) = node.shard(0, "train"), random_vectors(node, 0.1, seed=1)
    own, moved = (
        scaffold_client.train(node.job(2, 0), broadcast, state, shard, reference=reference).update.tensors()
        for reference in (None, node.initial + other)
    )
    assert torch.allclose(moved["control_change"] - own["control_change"], other / (4 * 0.1), atol=1e-4)


@pytest.mark.parametrize("server_lr", [1.0, 0.5, 2.0])
def test_scaffolds_server_by_hand(server_lr: float) -> None:
    """x moves by lr_g times the mean change, c by |S| / N times the mean change of the control variates."""
    state = scaffold_server.State(torch.tensor([1.0, 1.0]), EMPTY, control=torch.tensor([0.0, 8.0]))
    updates = [
        scaffold.Update(torch.tensor(theta), EMPTY, torch.tensor(examples), control_change=torch.tensor(change))
        for theta, examples, change in (([3.0, 1.0], 1, [4.0, 0.0]), ([5.0, -1.0], 99, [0.0, 2.0]))
    ]
    after = scaffold_server.aggregate(state, updates, clients=8, server_lr=server_lr)
    assert torch.allclose(after.parameters, torch.tensor([1 + server_lr * 3, 1 - server_lr * 1]))
    assert torch.allclose(after.control, torch.tensor([0.5, 8.25]))


CURVATURES = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
MINIMA = torch.tensor([-3.0, 1.0, 2.0], dtype=torch.float64)
OPTIMUM = (CURVATURES * MINIMA).sum() / CURVATURES.sum()
"""Clients with ``F_k(theta) = a_k / 2 (theta - b_k)^2``, and where their mean is least."""


def quadratic_scaffold(correction: float, rounds: int = 400) -> torch.Tensor:
    """Return where SCAFFOLD with ten local steps and two of three clients a round ends on the quadratics."""
    lr, zero = 0.05, torch.zeros(1, dtype=torch.float64)
    state = scaffold_server.State(zero, EMPTY, control=zero)
    controls = [zero] * 3
    for number in range(rounds):
        updates = []
        for k in ((number) % 3, (number + 1) % 3):
            theta, shift = state.parameters, correction * (state.control - controls[k])
            for _ in range(10):
                theta = theta - lr * (CURVATURES[k] * (theta - MINIMA[k]) + shift)
            new = scaffold_client.path_gradient(state.parameters, theta, shift, 10, lr)
            updates.append(scaffold.Update(theta, EMPTY, torch.tensor(1), control_change=new - controls[k]))
            controls[k] = new
        state = scaffold_server.aggregate(state, updates, clients=3)
    return state.parameters


def test_scaffold_ends_where_the_mean_loss_is_least() -> None:
    """Many local steps on different clients end at the federation's minimum, and FedAvg's do not."""
    assert torch.allclose(quadratic_scaffold(1.0), OPTIMUM, atol=1e-9)
    assert abs(float(quadratic_scaffold(0.0) - OPTIMUM)) > 0.1


# FedDyn.


def test_feddyn_without_its_terms_is_the_plain_mean(run_inline: RunInline) -> None:
    """The clients' terms and the server's correction are all that there is; its mean is uniform."""
    run = run_inline("feddyn", **{"feddyn.alpha": 0.0, "feddyn.server-correction": 0.0})
    same(run, run_inline("fedavg", **{"fedavg.weighting": "uniform"}))


def test_feddyn_with_alpha_zero_is_not_fedavg(run_inline: RunInline) -> None:
    """alpha cancels in h / alpha: the first round ends |S| / m of the way beyond the mean, whatever alpha is."""
    run = run_inline("feddyn", **{"feddyn.alpha": 0.0, "run.rounds": 1})
    mean = final(run_inline("fedavg", **{"fedavg.weighting": "uniform", "run.rounds": 1}))["parameters"]
    start = build(run.config, federate(run.config)).state.tensors()["parameters"]
    assert torch.allclose(final(run)["parameters"], mean + 3 / 6 * (mean - start), atol=1e-6)


def test_a_first_participation_in_feddyn_is_fedprox(run_inline: RunInline) -> None:
    """A client without a gradient has only the proximal term; the two runs part when somebody comes again."""
    for rounds in (1, 3):
        dyn = run_inline("feddyn", **{"feddyn.alpha": 0.3, "feddyn.server-correction": 0.0, "run.rounds": rounds})
        prox = run_inline("fedprox", **{"fedprox.mu": 0.3, "fedprox.weighting": "uniform", "run.rounds": rounds})
        assert torch.equal(final(dyn)["parameters"], final(prox)["parameters"]) == (rounds == 1)


@pytest.mark.parametrize("per_round", [0, 2])
def test_h_is_the_mean_of_all_clients_gradients(run_inline: RunInline, per_round: int) -> None:
    """``h = 1 / m sum_k gradient_k`` over all m clients, sampled or not; gradient_k = -alpha drift_k."""
    run = run_inline("feddyn", **{"feddyn.alpha": 0.1, "run.clients-per-round": per_round})
    drift = final(run)["drift"]
    rows = kept(run, "drift", drift)
    assert float(drift.abs().max()) > 1e-3
    assert torch.allclose(rows.mean(dim=0), drift, atol=1e-6)
    assert bool((rows == 0).all(dim=1).any()) == bool(per_round)


def test_feddyns_steps_and_new_drift(worker: Worker) -> None:
    """Steps go along grad - gradient_k + alpha (theta - theta_t), with gradient_k as the paper keeps it."""
    alpha, lr = 0.7, 0.1
    node = worker("feddyn", **{"feddyn.alpha": alpha, "train.lr": lr})
    (old,) = random_vectors(node, 0.05)
    state = feddyn.State(statistics=EMPTY, drift=-old / alpha)
    shard, job = node.shard(0, "train"), node.job(2, 0)
    outcome = node.half.update(job, fedavg.Broadcast(node.initial, EMPTY), state, shard)
    theta = node.initial.clone()
    for x, y in job.batches(shard):
        theta = theta - lr * (gradient(node, theta, x, y) - old + alpha * (theta - node.initial))
    assert torch.allclose(outcome.update.parameters, theta, atol=1e-6)
    assert torch.allclose(-alpha * outcome.state.drift, old - alpha * (theta - node.initial), atol=1e-6)


def test_feddyns_terms_are_the_gradient_of_its_objective() -> None:
    """``-<g, theta> + alpha / 2 ||theta - theta_t||^2`` by finite differences against both forms of the step."""
    alpha = 0.3
    theta, start, old = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drift = -old / alpha

    def terms(at: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = (alpha / 2 * (at - start).square() - old * at).sum()
        return value

    eps, eye = 1e-6, torch.eye(5, dtype=torch.float64)
    numeric = torch.stack([(terms(theta + eps * e) - terms(theta - eps * e)) / (2 * eps) for e in eye])
    assert torch.allclose(numeric, -old + alpha * (theta - start), atol=1e-8)
    assert torch.allclose(numeric, alpha * (theta - (start - drift)), atol=1e-8)


@pytest.mark.parametrize("alpha", [0.01, 3.0])
def test_feddyns_server_is_the_papers_recursion(alpha: float) -> None:
    """``h <- h - alpha / m sum_P (theta_k - theta)``, ``theta <- mean_P theta_k - h / alpha``, as printed."""
    rng = torch.Generator().manual_seed(0)
    theta = torch.randn(4, dtype=torch.float64, generator=rng)
    h = torch.zeros_like(theta)
    state = feddyn_server.State(theta, EMPTY, drift=h)
    for cohort in (2, 3, 5):
        models = theta + torch.randn(cohort, 4, dtype=torch.float64, generator=rng)
        updates = [fedavg.Update(each, EMPTY, torch.tensor(n + 1)) for n, each in enumerate(models)]
        state = feddyn_server.aggregate(state, updates, clients=5)
        h = h - alpha / 5 * (models - theta).sum(dim=0)
        theta = models.mean(dim=0) - h / alpha
        assert torch.allclose(state.parameters, theta, atol=1e-12)
        assert torch.allclose(state.drift, -h / alpha, atol=1e-12)


def quadratic_feddyn(dynamic: bool, alpha: float = 1.0, rounds: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where FedDyn with exact local minima ends on the quadratics, and the sum of the clients' gradients.

    Without ``dynamic`` there is only the proximal term: FedProx.
    """
    zero = torch.zeros(1, dtype=torch.float64)
    state, drifts = feddyn_server.State(zero, EMPTY, drift=zero), [zero] * 3
    for number in range(rounds):
        updates = []
        for k in (number % 3, (number + 1) % 3):
            centre = state.parameters - drifts[k]
            theta = (CURVATURES[k] * MINIMA[k] + alpha * centre) / (CURVATURES[k] + alpha)
            if dynamic:
                drifts[k] = drifts[k] + theta - state.parameters
                # The first-order condition of the local minimum: what is kept is the loss's gradient there.
                assert torch.allclose(-alpha * drifts[k], CURVATURES[k] * (theta - MINIMA[k]), atol=1e-9)
            updates.append(fedavg.Update(theta, EMPTY, torch.tensor(1)))
        state = feddyn_server.aggregate(state, updates, clients=3, correction=float(dynamic))
    return state.parameters, -alpha * torch.stack(drifts).sum()


def test_feddyn_ends_where_the_mean_loss_is_least() -> None:
    """At the fixed point the clients' gradients sum to zero; with the proximal term alone they do not."""
    theta, gradients = quadratic_feddyn(dynamic=True)
    assert torch.allclose(theta, OPTIMUM, atol=1e-9)
    assert abs(float(gradients)) < 1e-9
    assert abs(float(quadratic_feddyn(dynamic=False)[0] - OPTIMUM)) > 0.1


# MOON.


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("keys", [{}, NORMED], ids=["plain", "batchnorm"])
def test_moon_without_its_term_is_fedavg(run_inline: RunInline, weighting: str, keys: dict[str, Scalar]) -> None:
    """The contrastive term is the only difference between the two."""
    run = run_inline("moon", **{"moon.mu": 0.0, "moon.weighting": weighting, **keys})
    same(run, run_inline("fedavg", **{"fedavg.weighting": weighting, **keys}))


def test_moon_on_the_image_itself_is_fedavg(run_inline: RunInline) -> None:
    """What the first stage takes depends on no parameter, so the term is constant."""
    same(run_inline("moon", **{"moon.layer": "hidden"}), run_inline("fedavg"))


def test_moon_is_fedavg_until_somebody_comes_again(run_inline: RunInline) -> None:
    """A client without a previous model has no negative, and the released code has no term then."""
    run, avg = run_inline("moon"), run_inline("fedavg")
    rows = [[r for r in each.rows("evaluations") if r["round"] == 1] for each in (run, avg)]
    assert rows[0] == rows[1]
    assert not torch.equal(final(run)["parameters"], final(avg)["parameters"])
    spared = {r["client"] for r in run.rows("clients") if "contrast_loss_sum" not in r or not r["contrast_loss_weight"]}
    assert spared >= set(run.rows("rounds")[0]["clients"])


def test_the_contrast_by_hand() -> None:
    """Cosines 1 and 0, 0 and 1, and equal ones, at two temperatures; it is a cross-entropy of two logits."""
    z = torch.tensor([[2.0, 0.0], [0.0, 5.0], [1.0, 1.0]], dtype=torch.float64)
    positive = torch.tensor([[3.0, 0.0]], dtype=torch.float64).expand(3, 2)
    negative = torch.tensor([[0.0, 7.0]], dtype=torch.float64).expand(3, 2)
    for tau in (0.5, 2.0):
        one = torch.tensor([-1 / tau, 1 / tau, 0.0], dtype=torch.float64)
        values = moon_client.contrast(z, positive, negative, tau)
        assert torch.allclose(values, torch.log(1 + torch.exp(one)))
        similar = torch.stack([functional.cosine_similarity(z, each) for each in (positive, negative)], dim=1) / tau
        assert torch.allclose(values, cross_entropy(similar, torch.zeros(3, dtype=torch.int64)))
    assert torch.allclose(moon_client.contrast(z, positive, negative, 1e9), torch.log(torch.tensor(2.0).double()))


def test_the_contrasts_gradient() -> None:
    """Finite differences in z; nothing flows into the representations of the frozen models."""
    rng = torch.Generator().manual_seed(0)
    z, positive, negative = torch.randn(3, 4, 6, dtype=torch.float64, generator=rng).unbind()
    for each in (z, positive, negative):
        each.requires_grad_()
    torch.autograd.gradcheck(lambda at: moon_client.contrast(at, positive.detach(), negative.detach(), 0.5), (z,))
    (slope,) = torch.autograd.grad(moon_client.contrast(z, positive, negative, 0.5).sum(), z)
    flows = torch.autograd.grad(
        moon_client.contrast(z, positive, negative, 0.5).sum(), (positive, negative), allow_unused=True
    )
    assert all(flow is None for flow in flows)
    # A step along the negative gradient makes z more like the positive and less like the negative.
    after = (z - 0.01 * slope).detach()
    assert (functional.cosine_similarity(after, positive) > functional.cosine_similarity(z, positive)).all()
    assert (functional.cosine_similarity(after, negative) < functional.cosine_similarity(z, negative)).all()


@pytest.mark.parametrize("layer", ["conv2", "latent", "head"])
def test_a_frozen_copy_is_the_model_in_evaluation_mode(worker: Worker, layer: str) -> None:
    """It runs on its own parameters and statistics, and leaves those of the workspace and its mode alone."""
    node = worker("moon", **NORMED)
    model, x = node.setup.model, node.shard(0, "train").batch(slice(0, 7))[0]
    theta, statistics = random_vectors(node, 0.3)[0], torch.linspace(0.5, 2, 44)
    model.module.train()
    before = model.parameters.clone(), model.statistics.clone()
    found = moon_client.representation(model, theta, statistics, layer)(x)
    assert torch.equal(model.parameters, before[0])
    assert torch.equal(model.statistics, before[1])
    assert model.module.training
    assert not found.requires_grad
    model.load(theta, statistics)
    expected = model.module.eval()(x, stop=layer).flatten(1)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("keys", [{}, {**NORMED, "moon.layer": "latent"}], ids=["plain", "batchnorm"])
def test_moons_steps(worker: Worker, keys: dict[str, Scalar]) -> None:
    """Positive is the global model, negative what the client kept: against real copies of the model."""
    mu, tau, lr = 2.0, 0.5, 0.1
    node = worker("moon", **{"moon.mu": mu, "moon.temperature": tau, "train.lr": lr, **keys})
    layer = str(keys.get("moon.layer", "head"))
    model, shard, job = node.setup.model, node.shard(0, "train"), node.job(2, 0)
    kept_statistics = torch.linspace(0.5, 2, node.setup.sizes["statistics"])
    previous = node.initial + random_vectors(node, 0.1)[0]
    state = fedavg_ft.State(statistics=kept_statistics, parameters=previous)
    outcome = node.half.update(job, fedavg.Broadcast(node.initial, EMPTY), state, shard)
    copies = []
    for theta in (node.initial, previous):
        model.load(theta, kept_statistics)
        copies.append(copy.deepcopy(model.module).eval())
    model.load(node.initial, kept_statistics)
    model.module.train()
    for x, y in job.batches(shard):
        with torch.no_grad():
            p, n = (each(x, stop=layer).flatten(1) for each in copies)
        features = model(x, stop=layer)
        z = features.flatten(1)
        up, down = (torch.exp(functional.cosine_similarity(z, other) / tau) for other in (p, n))
        loss = cross_entropy(model(features, start=layer), y).mean() - mu * torch.log(up / (up + down)).mean()
        model.parameters.sub_(lr * model.backward(loss))
    assert torch.allclose(outcome.update.parameters, model.parameters, atol=1e-5)
    assert torch.equal(outcome.state.parameters, outcome.update.parameters)
    assert torch.allclose(outcome.state.statistics, model.statistics, atol=1e-6)


def test_the_initial_model_may_be_the_first_negative(worker: Worker) -> None:
    """A client that first comes when the global model has moved: no term, or the initial model as the negative."""
    node = worker("moon")
    shard, (moved,) = node.shard(0, "train"), random_vectors(node, 0.1)
    broadcast = fedavg.Broadcast(node.initial + moved, EMPTY)
    state = fedavg_ft.State(statistics=EMPTY, parameters=node.initial)
    keys: dict[str, Any] = {"mu": 1.0, "temperature": 0.5}
    none, initial, explicit = (
        moon_client.train(node.job(2, 0), broadcast, mine, shard, first_negative=first, **keys).update.tensors()
        for mine, first in ((None, "none"), (None, "initial"), (state, "none"))
    )
    assert torch.equal(initial["parameters"], explicit["parameters"])
    assert not torch.equal(none["parameters"], initial["parameters"])


def test_moon_refuses_a_stage_that_does_not_exist() -> None:
    """A wrong layer would run no stage at all."""
    config = tiny("moon", **{"moon.layer": "hiden"})
    with pytest.raises(UserError, match=r"'hiden'.*did you mean 'hidden'"):
        build(config, federate(config))


# Numbers that the authors' own code produced.

AUTHORS: dict[str, Any] = json.loads((Path(__file__).parent / "fixtures" / "drift_authors.json").read_text())


def shard_of(client: int) -> Shard:
    """Return the fixture's shard of a client: 12 images of 8x8 whose bytes and classes are formulas."""
    pixel = torch.arange(12 * 64)
    x = ((pixel * (37 + 2 * client) + pixel // 64 * 101 + 11 * client) % 256).to(torch.uint8)
    y = (torch.arange(12) * (client + 1) + client) % 10
    return Shard(x.reshape(12, 1, 8, 8), y, torch.tensor(127.5), torch.tensor(1 / 127.5))


def wave(size: int, phase: float = 0.0) -> torch.Tensor:
    """Return the fixture's initial parameters ``[size]``."""
    return torch.sin(torch.arange(size, dtype=torch.float64) * 1.7 + phase).mul(0.2).float()


def authors_worker(worker: Worker, method: str, hidden: int, case: dict[str, Any], **flat: Scalar) -> Any:
    """Return a node whose model, steps and learning rate are the fixture's."""
    keys: dict[str, Scalar] = {
        "model.hidden": hidden,
        "train.batch-size": 12,
        "train.local-steps": case["steps"],
        "train.lr": case["lr"],
        "train.weight-decay": case["weight_decay"],
    }
    return worker(method, **{**keys, **flat})


@pytest.mark.parametrize("method", ["feddyn", "scaffold"])
def test_four_rounds_of_the_feddyn_authors_code(worker: Worker, method: str) -> None:
    """Global models of every round and the clients' states at the end, under partial participation."""
    case = AUTHORS["acar"]
    own = case[method]
    keys: dict[str, Scalar] = (
        {"feddyn.alpha": own["alpha"], "train.lr-decay": own["lr_decay"]}
        if method == "feddyn"
        else {"scaffold.server-lr": own["server_lr"]}
    )
    node = authors_worker(worker, method, 2, case, **keys, **{"run.clients": 4, "run.clients-per-round": 0})
    server: Any = feddyn_server if method == "feddyn" else scaffold_server
    start = wave(len(node.initial))
    state = server.State(start, EMPTY, torch.zeros_like(start))
    states: dict[int, Any] = {}
    for number, cohort in enumerate(case["cohorts"], start=1):
        updates = []
        broadcast = server.broadcast(node.setup, state, number)
        for client in cohort:
            outcome = node.half.update(node.job(number, client), broadcast, states.get(client), shard_of(client))
            updates.append(outcome.update)
            states[client] = outcome.state
        state = server.update(node.setup, state, updates, number)[0]
        assert torch.allclose(state.parameters, torch.tensor(own["models"][number - 1]), atol=1e-5), number
    assert sorted(states) == [0, 1, 2, 3]
    for client, mine in states.items():
        theirs = torch.tensor(own["drifts" if method == "feddyn" else "controls"][client])
        assert torch.allclose(mine.drift if method == "feddyn" else mine.control, theirs, atol=1e-5)
    if method == "scaffold":
        assert torch.allclose(state.control, torch.tensor(own["controls"][-1]), atol=1e-5)


def test_two_participations_of_the_moon_authors_code(worker: Worker) -> None:
    """One without a previous model, one from another global model with the first's result as the negative."""
    case = AUTHORS["moon"]
    keys: dict[str, Scalar] = {"moon.mu": case["mu"], "moon.temperature": case["temperature"]}
    node = authors_worker(worker, "moon", 3, case, **keys, **{"train.momentum": case["momentum"]})
    state = None
    for number, name in enumerate(("first", "second")):
        broadcast = fedavg.Broadcast(wave(len(node.initial), 0.5 * number), EMPTY)
        outcome = node.half.update(node.job(number + 1, 1), broadcast, state, shard_of(1))
        state = outcome.state
        assert torch.allclose(outcome.update.parameters, torch.tensor(case[name]), atol=1e-5), name
