"""Limit cases that hold bit for bit, and what other implementations of these methods get wrong."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny
from flwr.app import Context
from flwr.clientapp import ClientApp
from safetensors.torch import load_file

import clients.fedavg as fedavg_client
import strategies.fedgen as fedgen_server
from fedkd.config import Scalar
from fedkd.data import federate
from fedkd.latent import draw_noise
from fedkd.losses import cross_entropy
from fedkd.method import load
from fedkd.methods.fedavg import Broadcast, State
from fedkd.methods.fedgen import Update as FedGenUpdate
from fedkd.results import Run
from fedkd.setup import Setup
from sims import inline
from strategies import build
from strategies.base import RoundError

RunInline = Callable[..., Run]
NORMED: dict[str, Scalar] = {"model.name": "fedgen_cnn"}
"""A model with BatchNorm."""
AVERAGED: dict[str, Scalar] = {**NORMED, "model.norm-statistics": "averaged"}


def states(run: Run) -> list[str]:
    """Return the hash of the server's state after each round."""
    return [row["state"] for row in run.rows("rounds")]


def parameters(run: Run) -> torch.Tensor:
    """Return the final global model."""
    return load_file(run.folder / "final.safetensors")["parameters"]


def scores(run: Run, kind: str) -> list[tuple[int, int, int, float]]:
    """Return (round, client, correct, loss) of every evaluation of the global or the personal model."""
    return [
        (row["round"], row["client"], row[f"{kind}_correct"], row[f"{kind}_loss_sum"])
        for row in run.rows("evaluations")
    ]


# Limit cases.


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_fedprox_without_its_term_is_fedavg(run_inline: RunInline, weighting: str) -> None:
    """The proximal term is the only difference between the two."""
    prox = run_inline("fedprox", **{"fedprox.mu": 0.0, "fedprox.weighting": weighting})
    avg = run_inline("fedavg", **{"fedavg.weighting": weighting})
    assert states(prox) == states(avg)
    assert prox.rows("evaluations") == avg.rows("evaluations")


def test_fedgen_as_released_without_its_terms_is_fedavg(run_inline: RunInline) -> None:
    """With both weights zero the generator is trained and never heard."""
    gen = run_inline("fedgen", **{"fedgen.variant": "authors", "fedgen.alpha": 0.0, "fedgen.beta": 0.0})
    avg = run_inline("fedavg")
    assert torch.equal(parameters(gen), parameters(avg))
    assert gen.rows("evaluations") == avg.rows("evaluations")


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, AVERAGED], ids=["mlp", "batch-norm"])
def test_fedgen_that_shares_its_predictor_and_is_without_terms_is_lg_fedavg(
    run_inline: RunInline, keys: dict[str, Scalar]
) -> None:
    """The predictor is what LG-FedAvg calls the global head; only the generator's server sees a difference."""
    terms: dict[str, Scalar] = {"fedgen.alpha": 0.0, "fedgen.beta": 0.0}
    gen = run_inline("fedgen", **{"fedgen.share": "predictor", **terms, **keys})
    head = run_inline("lg_fedavg", **keys)
    assert torch.equal(parameters(gen), parameters(head))
    assert gen.rows("evaluations") == head.rows("evaluations")
    spoken = run_inline("fedgen", **{"fedgen.share": "predictor", **keys})
    assert scores(spoken, "personal") != scores(head, "personal")


def test_what_fedgen_shares_is_all_that_its_server_needs(run_inline: RunInline) -> None:
    """Eq. 4 reads the predictors alone, so in the first round both ways of sharing train one and the same generator."""
    whole, part = (
        load_file(run_inline("fedgen", **{"run.rounds": 1, "fedgen.share": share}).folder / "final.safetensors")
        for share in ("model", "predictor")
    )
    assert torch.equal(whole["generator"], part["generator"])
    assert len(part["parameters"]) < len(whole["parameters"])
    assert torch.equal(whole["parameters"][-len(part["parameters"]) :], part["parameters"])


def test_fedgen_of_the_paper_without_its_term_is_the_plain_mean(run_inline: RunInline) -> None:
    """Algorithm 1 averages uniformly, so the limit is FedAvg with uniform weights."""
    gen = run_inline("fedgen", **{"fedgen.variant": "paper", "fedgen.eq5-weight": 0.0})
    avg = run_inline("fedavg", **{"fedavg.weighting": "uniform"})
    assert torch.equal(parameters(gen), parameters(avg))
    assert gen.rows("evaluations") == avg.rows("evaluations")


def test_fedgen_as_released_is_fedavg_in_its_first_round(run_inline: RunInline) -> None:
    """The released code uses no generated data before the generator has been trained once."""
    gen, avg = run_inline("fedgen", **{"fedgen.variant": "authors"}), run_inline("fedavg")
    first, second = ([s for s in scores(r, "global") if s[0] == 1] for r in (gen, avg))
    assert first == second
    assert scores(gen, "global") != scores(avg, "global")


@pytest.mark.parametrize("score", ["last-participation", "now"])
def test_the_control_has_fedavgs_global_trajectory(run_inline: RunInline, score: str) -> None:
    """Scoring a client's own copy must not touch the global model, not even through the shared workspace."""
    control, avg = run_inline("fedavg_ft", **{"fedavg_ft.score": score}), run_inline("fedavg")
    assert states(control) == states(avg)
    assert scores(control, "global") == scores(avg, "global")
    assert scores(control, "personal") != scores(control, "global")


def test_before_its_first_participation_a_client_has_the_global_model(run_inline: RunInline) -> None:
    """A client without a model of its own is scored with the global one, not left out."""
    run = run_inline("fedavg_ft", **{"run.rounds": 1})
    trained = run.rows("rounds")[0]["clients"]
    for glob, personal in zip(scores(run, "global"), scores(run, "personal"), strict=True):
        assert (glob == personal) == (glob[1] not in trained)


def test_both_scores_of_the_control_are_local_steps_from_the_same_model(run_inline: RunInline) -> None:
    """Steps from today's model (``now``) are the steps of the next participation (``last-participation``).

    With the whole shard as batch the order of examples cannot matter, so the two agree up to rounding for every
    client that is trained in the next round.
    """
    whole: dict[str, Scalar] = {"train.batch-size": 10_000}
    now = run_inline("fedavg_ft", **{**whole, "fedavg_ft.score": "now"})
    last = run_inline("fedavg_ft", **{**whole, "fedavg_ft.score": "last-participation"})
    losses = {(r, client): loss for r, client, _, loss in scores(last, "personal")}
    compared = 0
    for number, client, _, loss in scores(now, "personal"):
        if number < 3 and client in last.rows("rounds")[number]["clients"]:
            assert loss == pytest.approx(losses[number + 1, client], rel=1e-4)
            compared += 1
    assert compared == 6


def test_one_round_alone_is_the_control_after_one_round(run_inline: RunInline) -> None:
    """Everybody starts from the same model, so before the first average there is no federation to see."""
    alone, control = run_inline("local", **{"run.rounds": 1}), run_inline("fedavg_ft", **{"run.rounds": 1})
    trained = alone.rows("rounds")[0]["clients"]
    assert trained == control.rows("rounds")[0]["clients"]
    mine, theirs = ([s for s in scores(r, "personal") if s[1] in trained] for r in (alone, control))
    assert mine == theirs


def test_a_federation_of_one_is_local_training(run_inline: RunInline) -> None:
    """The average over a single client is its model, so FedAvg, its control and no federation coincide."""
    single: dict[str, Scalar] = {"run.clients": 1, "run.clients-per-round": 1}
    alone, control, avg = (run_inline(method, **single) for method in ("local", "fedavg_ft", "fedavg"))
    assert scores(alone, "personal") == scores(control, "personal") == scores(avg, "global")


def test_a_client_alone_keeps_its_model_between_rounds(run_inline: RunInline) -> None:
    """Without federation a client's score changes only in rounds in which it is trained."""
    run = run_inline("local")
    by_client = {(r, client): (correct, loss) for r, client, correct, loss in scores(run, "personal")}
    for number in (2, 3):
        cohort = run.rows("rounds")[number - 1]["clients"]
        for client in range(6):
            assert (by_client[number, client] == by_client[number - 1, client]) == (client not in cohort)


# Seeds and sampling.


def test_the_cohort_is_a_function_of_seed_and_round() -> None:
    """Flower's own sampling draws from node ids that the operating system made up."""
    config = tiny(**{"run.clients": 20, "run.clients-per-round": 5})
    first, second = (build(config, federate(config)) for _ in range(2))
    second.cohort(7)
    cohorts = [first.cohort(number) for number in range(1, 30)]
    assert cohorts == [second.cohort(number) for number in range(1, 30)]
    assert all(len(set(cohort)) == 5 and cohort == sorted(cohort) for cohort in cohorts)
    assert set().union(*cohorts) == set(range(20))


def test_the_same_cohorts_for_every_method(run_inline: RunInline) -> None:
    """Methods are compared on the same clients in the same rounds."""
    cohorts = [[row["clients"] for row in run_inline(m).rows("rounds")] for m in ("local", "fedavg", "fedgen")]
    assert cohorts[0] == cohorts[1] == cohorts[2]


@pytest.mark.parametrize("method", ["fedavg_ft", "fedgen"])
def test_node_ids_do_not_matter(run_inline: RunInline, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Node ids are random numbers; neither their values nor their order may reach a result."""

    class Renamed(inline.LoopbackGrid):
        def __init__(self, client_app: ClientApp, contexts: dict[int, Context]) -> None:
            super().__init__(client_app, {(7919 * node) % 1013: context for node, context in contexts.items()})

    expected = run_inline(method).digest()
    monkeypatch.setattr(inline, "LoopbackGrid", Renamed)
    assert run_inline(method, nodes=3, again=True).digest() == expected


# Failures.


def broken(*clients: int) -> Callable[..., Any]:
    """Return FedAvg's client half with clients that raise."""
    whole = fedavg_client.update

    def update(job: Any, *args: Any) -> Any:
        if job.client in clients:
            raise OSError("the disk is gone")
        return whole(job, *args)

    return update


@pytest.mark.parametrize("nodes", [1, 3])
def test_a_failed_client_fails_the_round_and_is_named(
    run_inline: RunInline, monkeypatch: pytest.MonkeyPatch, nodes: int
) -> None:
    """Flower logs a failed client and averages the survivors; a result must not change like that in silence."""
    failing = run_inline("fedavg").rows("rounds")[0]["clients"][1]
    monkeypatch.setattr(fedavg_client, "update", broken(failing))
    with pytest.raises(RoundError, match=rf"client {failing} failed: OSError: the disk is gone"):
        run_inline("fedavg", nodes=nodes, again=True)


@pytest.mark.parametrize("exchange", ["updates", "sums"])
def test_failed_clients_take_nobody_with_them(
    run_inline: RunInline, monkeypatch: pytest.MonkeyPatch, exchange: str
) -> None:
    """Whom a round goes on without, and what is written of it, must not depend on which nodes they are on."""
    keys: dict[str, Scalar] = {"run.on-failure": "drop", "run.exchange": exchange, "run.clients-per-round": 0}
    cohort = run_inline("fedavg", **keys).rows("rounds")[0]["clients"]
    monkeypatch.setattr(fedavg_client, "update", broken(*cohort[:3]))
    runs = [run_inline("fedavg", nodes=nodes, again=True, **keys) for nodes in (1, 2, 3)]
    first = runs[0].rows("rounds")[0]
    assert first["clients"] == cohort[3:]
    assert first["dropped"] == [
        {"exchange": "train", "clients": [client], "why": f"client {client} failed: OSError: the disk is gone"}
        for client in cohort[:3]
    ]
    assert len({run.digest() for run in runs}) == 1


def test_a_diverged_client_is_named_and_never_averaged(run_inline: RunInline) -> None:
    """A model that is not finite would turn the average into NaN for everybody."""
    with pytest.raises(RoundError, match=r"client \d+\b.*Update\.parameters .*a value that is not finite"):
        run_inline("fedavg", **{"train.lr": 1e30})


def test_a_client_that_diverges_alone_is_named(run_inline: RunInline) -> None:
    """Without federation nothing that diverged crosses the network, and the run still has to say so."""
    with pytest.raises(RoundError, match=r"client \d+\b.*not finite"):
        run_inline("local", **{"train.lr": 1e30})


# Small clients.


def test_a_client_smaller_than_a_batch_really_trains(worker: Callable[..., Any]) -> None:
    """Elsewhere such a client trains nothing, and is averaged with its weight all the same."""
    node = worker("fedavg", **{"train.batch-size": 4096, "train.last-batch": "drop"})
    broadcast = Broadcast(node.initial, torch.zeros(0))
    shard = node.shard(0, "train")
    outcome = node.half.update(node.job(1, 0), broadcast, None, shard)
    assert not torch.equal(outcome.update.parameters, node.initial)
    assert outcome.metrics["loss"][1] == 4 * len(shard)
    assert int(outcome.update.examples) == len(shard)


@pytest.mark.parametrize(("keep", "expected"), [("keep", [16, 16, 8]), ("drop", [16, 16])])
def test_an_epoch_is_a_pass(worker: Callable[..., Any], keep: str, expected: list[int]) -> None:
    """Each example comes once per epoch, but for those of an incomplete batch that is dropped."""
    node = worker("fedavg", **{"train.local-steps": 0, "train.local-epochs": 2, "train.last-batch": keep})
    whole = node.shard(0, "train")
    shard = dataclasses.replace(whole, x=whole.x[:40], y=torch.arange(40))
    labels = [y for _, y in node.job(1, 0).batches(shard)]
    assert [len(y) for y in labels] == expected * 2
    for epoch in (labels[: len(expected)], labels[len(expected) :]):
        assert len(set(torch.cat(epoch).tolist())) == sum(expected)


# BatchNorm.


def statistics_of(run: Run) -> torch.Tensor:
    """Return the running statistics that the server ends with."""
    return load_file(run.folder / "final.safetensors")["statistics"]


def test_averaged_statistics_are_weighted_like_parameters(run_inline: RunInline) -> None:
    """Elsewhere buffers come from whichever client was copied first."""
    run = run_inline("fedavg_ft", **{**AVERAGED, "run.rounds": 1})
    cohort = run.rows("rounds")[0]["clients"]
    kept = [load_file(run.folder / "state" / f"{client:06d}" / "000001.safetensors") for client in cohort]
    examples = np.array([row["examples"] for row in run.rows("clients")])
    assert len(set(examples)) > 1
    for name, final in load_file(run.folder / "final.safetensors").items():
        rows = np.stack([state[name].double().numpy() for state in kept])
        assert np.allclose(final.numpy(), (examples / examples.sum()) @ rows, atol=1e-6), name
    assert statistics_of(run).numel() == 2 * (6 + 16)


def test_averaged_and_personal_statistics_are_different_runs(run_inline: RunInline) -> None:
    """The setting reaches the scores, and not only the payload."""
    assert run_inline("fedavg", **AVERAGED).digest() != run_inline("fedavg", **NORMED).digest()


@pytest.mark.parametrize("method", ["fedavg", "fedavg_ft", "fedprox", "fedgen"])
def test_personal_statistics_never_leave_the_client(worker: Callable[..., Any], method: str) -> None:
    """What stays private is not in the payload: the field is there for the other setting, and empty."""
    node = worker(method, **NORMED)
    assert node.setup.sizes["shared_statistics"] == 0
    assert node.setup.sizes["statistics"] == 44
    server = importlib.import_module(f"strategies.{method}")
    setup = node.setup
    broadcast = server.broadcast(setup, server.init(setup), 1)
    outcome = node.half.update(node.job(1, 0), broadcast, None, node.shard(0, "train"))
    assert outcome.update.statistics.shape == (0,)
    assert broadcast.statistics.shape == (0,)
    assert outcome.state.statistics.shape == (44,)


def test_the_global_model_is_scored_with_each_clients_own_statistics(worker: Callable[..., Any]) -> None:
    """With personal statistics the same parameters predict differently on two clients."""
    node = worker("fedavg", **NORMED)
    broadcast, test = Broadcast(node.initial, torch.zeros(0)), node.shard(0, "test")
    x, _ = test.batch(slice(None))
    logits = []
    for scale in (0.01, 0.04):
        mine = State(statistics=torch.full((44,), scale))
        models = node.half.models(node.job(1, 0), broadcast, mine, node.shard(0, "train"))
        logits.append(models.shared()(x))
        node.setup.model.load(node.initial, torch.full((44,), scale))
        node.setup.model.module.eval()
        with torch.no_grad():
            assert torch.equal(logits[-1], node.setup.model(x))
    assert not torch.equal(*logits)


def test_a_newcomer_starts_from_untouched_statistics(worker: Callable[..., Any]) -> None:
    """A client without state gets mean 0 and variance 1, not what the last client left in the workspace."""
    node = worker("fedavg", **NORMED)
    broadcast = Broadcast(node.initial, torch.zeros(0))
    node.half.update(node.job(1, 0), broadcast, None, node.shard(0, "train"))
    node.half.models(node.job(1, 1), broadcast, None, node.shard(1, "train")).shared()
    first, second = node.setup.model.norms
    for norm in (first, second):
        assert torch.equal(norm.running_mean, torch.zeros_like(norm.running_mean))
        assert torch.equal(norm.running_var, torch.ones_like(norm.running_var))


@pytest.mark.parametrize("method", ["fedavg", "fedprox", "fedgen"])
def test_training_goes_on_from_the_clients_own_statistics(worker: Callable[..., Any], method: str) -> None:
    """Personal statistics are state: after four steps of momentum 0.1 they are 0.9^4 what they were, and the rest."""
    node = worker(method, **NORMED)
    server = importlib.import_module(f"strategies.{method}")
    broadcast = server.broadcast(node.setup, server.init(node.setup), 1)
    first = node.half.update(node.job(1, 0), broadcast, None, node.shard(0, "train")).state
    after = []
    for value in (1.0, 3.0):
        mine = dataclasses.replace(first, statistics=torch.full((44,), value))
        after.append(node.half.update(node.job(2, 0), broadcast, mine, node.shard(0, "train")).state.statistics)
    assert torch.allclose(after[1] - after[0], torch.full((44,), 2 * 0.9**4), atol=1e-5)


def test_the_learning_rate_may_follow_a_clients_own_participations(worker: Callable[..., Any]) -> None:
    """FedGen's authors decay by the round of a client's previous participation, everybody else by the current one."""
    for decay_from, expected in (("round", 0.05 * 0.5**4), ("last-participation", 0.05 * 0.5**2)):
        node = worker("fedavg", **{"train.lr-decay": 0.5, "train.lr-decay-from": decay_from, "train.local-steps": 1})
        broadcast = Broadcast(node.initial, torch.zeros(0))
        mine = State(statistics=torch.zeros(0))
        job, shard = node.job(5, 0, last_round=3), node.shard(0, "train")
        after = node.half.update(job, broadcast, mine, shard).update.parameters
        x, y = next(iter(job.batches(shard)))
        node.setup.model.load(node.initial)
        gradient = node.setup.model.backward(cross_entropy(node.setup.model(x), y).mean())
        assert torch.allclose(after - node.initial, -expected * gradient, atol=1e-7)


def test_the_generators_statistics_do_not_leak_between_clients(worker: Callable[..., Any]) -> None:
    """Elsewhere clients share one generator in training mode, so each changes it for the next."""
    node = worker("fedgen")
    setup = node.setup
    broadcast = fedgen_server.broadcast(setup, fedgen_server.init(setup), 2)
    models = [
        node.half.update(node.job(2, client), broadcast, None, node.shard(client, "train")).update.parameters
        for client in (1, 0, 1)
    ]
    assert torch.equal(models[0], models[2])
    generator = setup.extras["generator"]
    assert torch.equal(generator.statistics, broadcast.generator_statistics)
    assert not generator.module.training


# FedProx and FedGen, against what is known to go wrong elsewhere.


def test_the_proximal_term_is_half_a_square(worker: Callable[..., Any]) -> None:
    """The gradient of mu/2 ||theta - theta_global||^2 is mu (theta - theta_global): nothing in the first step."""
    mu, lr = 0.7, 0.05
    node = worker("fedprox", **{"fedprox.mu": mu, "train.local-steps": 2, "train.lr": lr})
    shard, job = node.shard(0, "train"), node.job(1, 0)
    update = node.half.update(job, Broadcast(node.initial, torch.zeros(0)), None, shard).update
    theta, model = node.initial.clone(), node.setup.model
    for x, y in job.batches(shard):
        model.load(theta)
        gradient = model.backward(cross_entropy(model(x), y).mean()).clone()
        theta = theta - lr * (gradient + mu * (theta - node.initial))
    assert torch.allclose(update.parameters, theta, atol=1e-6)


def fedgen_round(**flat: Scalar) -> tuple[Setup, Any, list[FedGenUpdate]]:
    """Return a server's set-up, its first state, and two different updates to it."""
    config = tiny("fedgen", **flat)
    data = federate(config)
    setup = Setup.build(config, data.images.shape, data.classes, torch.device("cpu"))
    state = fedgen_server.init(setup)
    rng = torch.Generator().manual_seed(0)
    updates = [
        FedGenUpdate(
            parameters=state.parameters + 0.1 * torch.randn(state.parameters.shape, generator=rng),
            statistics=state.statistics,
            examples=torch.tensor(n),
            label_counts=torch.randint(0, 9, (setup.classes,), generator=rng),
        )
        for n in (10, 30)
    ]
    return setup, state, updates


@pytest.mark.parametrize("variant", ["paper", "authors"])
def test_the_teachers_are_the_clients_own_heads(variant: str) -> None:
    """Elsewhere the ensemble is loaded and the old global classifier is used in its place."""
    setup, state, updates = fedgen_round(**{"fedgen.variant": variant})
    ensemble = fedgen_server._ensemble(setup, updates)
    features = torch.randn(5, *setup.staged.input_of("head"))
    logits = ensemble(features)
    for update, mine in zip(updates, logits, strict=True):
        views = setup.model.unflatten(update.parameters)
        expected = features @ views["stages.head.weight"].T + views["stages.head.bias"]
        assert torch.allclose(mine, expected, atol=1e-5)
    changed = [dataclasses.replace(updates[0], parameters=updates[0].parameters + _head(setup)), updates[1]]
    first, second = (fedgen_server.update(setup, state, each, 1)[0] for each in (updates, changed))
    assert not torch.equal(first.generator, second.generator)


def test_each_teacher_runs_with_its_own_averaged_statistics() -> None:
    """With BatchNorm behind the layer a teacher is its client's parameters and its client's statistics."""
    setup, state, updates = fedgen_round(**{**AVERAGED, "fedgen.layer": "conv2"})
    updates = [dataclasses.replace(u, statistics=state.statistics + n + 0.5) for n, u in enumerate(updates)]
    features = torch.randn(5, *setup.staged.input_of("conv2"))
    logits = fedgen_server._ensemble(setup, updates)(features)
    for update, mine in zip(updates, logits, strict=True):
        setup.model.load(update.parameters, update.statistics)
        assert torch.allclose(mine, setup.staged.eval()(features, start="conv2"), atol=1e-5)


def part_of(setup: Setup, stage: str) -> torch.Tensor:
    """Return 1 for the parameters ``[P]`` of a stage and 0 for the others."""
    mask = torch.zeros(setup.sizes["parameters"])
    for name, view in setup.model.unflatten(mask).items():
        view.fill_(name.startswith(f"stages.{stage}."))
    return mask


def _head(setup: Setup) -> torch.Tensor:
    """Return a direction ``[P]`` in which only the head's parameters move, each row differently."""
    return part_of(setup, "head") * torch.linspace(-1, 1, setup.sizes["parameters"])


def test_only_the_heads_reach_the_generator() -> None:
    """What is before the layer is private to the distillation: changing it leaves the generator alone."""
    setup, state, updates = fedgen_round()
    body = 1 - part_of(setup, "head")
    changed = [dataclasses.replace(u, parameters=u.parameters + body) for u in updates]
    first, second = (fedgen_server.update(setup, state, each, 1)[0] for each in (updates, changed))
    assert torch.equal(first.generator, second.generator)
    assert not torch.equal(first.parameters, second.parameters)


def test_the_diversity_loss_is_on_by_default() -> None:
    """Elsewhere its weight defaults to zero, so the generator collapses."""
    assert load("fedgen").hyper().diversity == 1.0  # type: ignore[attr-defined]


def test_each_variant_has_its_own_noise() -> None:
    """Uniform noise under a comment that says Gaussian is known from two code bases; here it is the variant's."""
    rng = torch.Generator().manual_seed(0)
    normal, uniform = (draw_noise(variant, (4000, 2), rng) for variant in ("paper", "authors"))
    assert abs(float(normal.mean())) < 0.05
    assert float(normal.std()) == pytest.approx(1, abs=0.05)
    assert float(uniform.min()) >= 0
    assert float(uniform.max()) < 1
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.05)


def test_the_papers_labels_follow_the_counts() -> None:
    """p(y) is the clients' label counts, on the server and in the next broadcast."""
    setup, state, updates = fedgen_round(**{"fedgen.variant": "paper"})
    counts = (updates[0].label_counts + updates[1].label_counts).double()
    after = fedgen_server.update(setup, state, updates, 1)[0]
    assert torch.allclose(after.label_probabilities.double(), counts / counts.sum(), atol=1e-7)


def test_released_labels_are_uniform_over_what_was_seen() -> None:
    """A class that nobody has drawn is never generated, and one drawn in an earlier round still is."""
    setup, state, updates = fedgen_round(**{"fedgen.variant": "authors"})
    counts = torch.zeros(2, setup.classes, dtype=torch.int64)
    counts[0, 3], counts[1, 5] = 9, 1
    rounds = [[dataclasses.replace(u, label_counts=c) for u, c in zip(updates, counts, strict=True)], updates]
    rounds[1] = [dataclasses.replace(u, label_counts=counts[0]) for u in updates]
    for number, each in enumerate(rounds, start=1):
        state = fedgen_server.update(setup, state, each, number)[0]
        assert state.label_probabilities.nonzero().flatten().tolist() == [3, 5]
        assert float(state.label_probabilities.max()) == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["conv1", "conv2", "latent", "head"])
@pytest.mark.parametrize("keys", [{"model.norm": "group"}, {"model.norm-statistics": "averaged"}], ids=str)
def test_the_generator_may_feed_any_stage(run_inline: RunInline, layer: str, keys: dict[str, Scalar]) -> None:
    """What the refusal of BatchNorm behind the layer recommends has to work."""
    run = run_inline("fedgen", **{**NORMED, **keys, "fedgen.layer": layer, "fedgen.variant": "paper", "run.rounds": 1})
    assert torch.isfinite(parameters(run)).all()


def test_no_federation_sends_nothing() -> None:
    """The control's payload is empty by type."""
    assert load("local").Broadcast.specs() == {}
    assert set(load("local").Update.specs()) == {"examples"}
