"""FedD2S as reconstructed: its schedule, its two directions of distillation, and clients with different models."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

import clients.fedd2s as client
import strategies.fedd2s as server
from clients.training import SGD
from fedkd.config import Scalar
from fedkd.data import Shard
from fedkd.errors import UserError
from fedkd.losses import cross_entropy, kl
from fedkd.method import load, names
from fedkd.methods.fedd2s import Broadcast, Hyper, Update, depth, distillation, drops
from fedkd.models import StagedModel
from fedkd.results import Run
from fedkd.setup import Setup

RunInline = Callable[..., Run]
MakeWorker = Callable[..., Any]
Keys = dict[str, Scalar]

DEEP: Keys = {"model.name": "fedgen_cnn"}
"""Four stages, two of them with BatchNorm."""
HEADS, SERVERS, UPLOADS = ("deep-layers", "pooled-linear"), ("global-head", "average"), ("class-mean", "samples")
READINGS: list[Keys] = [
    {"fedd2s.head": head, "fedd2s.server": made, "fedd2s.upload": upload}
    for head, made, upload in itertools.product(HEADS, SERVERS, UPLOADS)
]


def reading_id(keys: Keys) -> str:
    """Name a reading after its choices."""
    return "-".join(map(str, keys.values()))


def scores(run: Run) -> list[dict[str, Any]]:
    """Return every evaluation."""
    return run.rows("evaluations")


def taught(node: Any, seed: int = 0) -> Broadcast:
    """Return a K of random soft labels in which every class is known."""
    logits = torch.randn(node.setup.classes, node.setup.classes, generator=torch.Generator().manual_seed(seed))
    return Broadcast(knowledge=logits.softmax(dim=1), owners=torch.ones(node.setup.classes, dtype=torch.int64))


def fresh(node: Any) -> Setup:
    """Return a server's own set-up, whose workspace no client has used."""
    return Setup.build(node.config, node.data.images.shape, node.data.classes, torch.device("cpu"))


# Limit cases.


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mlp", "fedgen_cnn"])
@pytest.mark.parametrize("keys", READINGS, ids=reading_id)
def test_without_its_terms_it_is_local(run_inline: RunInline, keys: Keys, model: str) -> None:
    """With lam = 0 (and no CE of linear heads) nothing that was federated reaches a client, bit for bit."""
    common: Keys = {"model.name": model, "run.rounds": 4, "train.momentum": 0.5}
    off: Keys = {"fedd2s.lam": 0.0, "fedd2s.head-ce": False, "fedd2s.rounds-per-drop": 2}
    assert scores(run_inline("fedd2s", **common, **keys, **off)) == scores(run_inline("local", **common))


def test_its_first_round_is_local_and_the_second_is_not(run_inline: RunInline) -> None:
    """There is no K before knowledge has been extracted once."""
    mine, alone = (scores(run_inline(method, **DEEP)) for method in ("fedd2s", "local"))
    assert [r for r in mine if r["round"] == 1] == [r for r in alone if r["round"] == 1]
    assert [r for r in mine if r["round"] == 2] != [r for r in alone if r["round"] == 2]


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [0, 1000])
def test_without_drops_the_whole_model_takes_part_to_the_end(run_inline: RunInline, rounds: int) -> None:
    """The control of the mechanism: no drops, or none within the run, are the same run."""
    run = run_inline("fedd2s", **DEEP, **{"fedd2s.rounds-per-drop": rounds})
    assert [row["depth_sum"] for row in run.rows("rounds")] == [4, 4, 4]
    assert scores(run) == scores(run_inline("fedd2s", **DEEP, **{"fedd2s.dropping-set": "head"}))


# The schedule.


@pytest.mark.slow
def test_the_schedule_is_in_the_results(run_inline: RunInline) -> None:
    """Depth and drops of each round, and how many classes of K the clients were taught: none right after a drop."""
    run = run_inline("fedd2s", **DEEP, **{"fedd2s.rounds-per-drop": 2, "run.rounds": 9, "run.clients-per-round": 0})
    rows = run.rows("rounds")
    assert [row["depth_sum"] for row in rows] == [4, 4, 3, 3, 2, 2, 1, 1, 1]
    assert [row["drops_sum"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert [row["classes_taught_sum"] for row in rows] == [0, 10, 0, 10, 0, 10, 0, 10, 10]
    assert [row["classes_known_sum"] for row in rows] == [10] * 9
    distilled = [row["round"] for row in run.rows("clients") if "distillation_loss_sum" in row]
    assert sorted(set(distilled)) == [2, 4, 6, 8, 9]


def test_depth_is_a_stage_and_the_one_behind_it(worker: MakeWorker) -> None:
    """The dropping set goes from deep to shallow and stays at its last entry."""
    staged = worker("fedd2s", **DEEP).setup.staged
    every = Hyper(rounds_per_drop=3)
    assert [drops(every, t) for t in (1, 3, 4, 6, 7)] == [0, 0, 1, 1, 2]
    assert [tuple(depth(every, staged, t)) for t in (1, 4, 7, 10, 99)] == [
        ("head", None),
        ("latent", "head"),
        ("conv2", "latent"),
        ("conv1", "conv2"),
        ("conv1", "conv2"),
    ]
    some = Hyper.model_validate({"dropping-set": "latent, conv1", "rounds-per-drop": 1})
    assert [depth(some, staged, t).stage for t in (1, 2, 3)] == ["latent", "conv1", "conv1"]


@pytest.mark.parametrize("wrong", ["haed", "conv1,head", "head,head", "head,,latent"])
def test_a_wrong_dropping_set_is_one_clear_line(run_inline: RunInline, wrong: str) -> None:
    """It names the key, and the stages that there are."""
    with pytest.raises(UserError, match=r"fedd2s.dropping-set.*stages|fedd2s.dropping-set.*deepest first"):
        run_inline("fedd2s", **DEEP, **{"fedd2s.dropping-set": wrong})


# From K to the clients.


def test_the_kl_has_the_gradient_of_its_definition() -> None:
    """d/dz T^2 KL(k || softmax(z / T)) = T (softmax(z / T) - k), checked against finite differences as well."""
    rng, temperature = torch.Generator().manual_seed(0), 3.0
    target = torch.randn(4, 5, generator=rng, dtype=torch.float64).softmax(dim=1)
    logits = torch.randn(4, 5, generator=rng, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(distillation(target, logits, temperature).sum(), logits)
    assert torch.allclose(gradient, temperature * ((logits / temperature).softmax(dim=1) - target))
    assert torch.autograd.gradcheck(lambda z: distillation(target, z, temperature), logits)
    assert torch.allclose(distillation(target, logits, 1.0), kl(target.log(), logits))
    assert torch.allclose(distillation(logits.softmax(dim=1), logits, 1.0), torch.zeros(4, dtype=torch.float64))


def test_an_unknown_class_gives_no_loss_and_no_gradient() -> None:
    """A row of zeros is not a distribution; it must be silent, not NaN."""
    logits = torch.randn(3, 5, requires_grad=True)
    loss = distillation(torch.zeros(3, 5), logits, 2.0)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.equal(loss, torch.zeros(3))
    assert torch.equal(gradient, torch.zeros(3, 5))


@pytest.mark.parametrize("round", [1, 2, 3, 4])
def test_the_distillation_stops_at_the_depth(worker: MakeWorker, round: int) -> None:
    """Its gradient is exactly zero behind l(t) and the plain gradient of the KL up to l(t)."""
    node = worker("fedd2s", **DEEP, **{"fedd2s.rounds-per-drop": 1})
    job, (x, y) = node.job(round, 0), node.shard(0, "train").batch(slice(0, 16))
    place, model, target = depth(job.hyper, node.setup.staged, round), job.model, taught(node).knowledge
    model.load(node.initial)
    plain = model.backward(distillation(target[y], model(x), 2.0).mean()).clone()
    features = model(x, stop=place.behind)
    logits = features if place.behind is None else model(features, start=place.behind)
    gradient = model.backward(client.entering(distillation(target[y], logits, 2.0).mean(), features))
    stages = node.setup.staged.stage_names
    behind = model.slice_of(lambda stage: stages.index(stage) > stages.index(place.stage))
    assert int(behind.any()) == (round > 1)
    assert torch.equal(gradient[behind], torch.zeros(int(behind.sum())))
    assert torch.allclose(gradient[~behind], plain[~behind], atol=1e-6)
    assert float(gradient[~behind].abs().max()) > 1e-4
    for stage in stages[: stages.index(place.stage) + 1]:
        assert gradient[model.slice_of(lambda name, stage=stage: name == stage)].any(), stage


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("round", [1, 2, 3, 4])
def test_one_local_step(worker: MakeWorker, head: str, round: int) -> None:
    """``theta <- theta - lr (grad CE + lam grad KL up to l)``; what is behind l moves as it does alone, bit for bit."""
    keys: Keys = {"fedd2s.rounds-per-drop": 1, "fedd2s.head": head, "fedd2s.head-ce": False, "train.local-steps": 1}
    after = []
    for lam in (0.0, 0.7):
        node = worker("fedd2s", **DEEP, **keys, **{"fedd2s.lam": lam})
        job, shard = node.job(round, 0), node.shard(0, "train")
        state = node.half.update(job, taught(node), None, shard).state
        after.append(state.parameters)
    place, stages = depth(job.hyper, node.setup.staged, round), node.setup.staged.stage_names
    behind = job.model.slice_of(lambda stage: stages.index(stage) > stages.index(place.stage))
    assert torch.equal(after[0][behind], after[1][behind])
    if head == "deep-layers":
        x, y = next(iter(job.batches(shard)))
        job.model.load(node.initial)
        job.model.module.train()
        expected = job.model.backward(distillation(taught(node).knowledge[y], job.model(x), 2.0).mean())
        moved = after[1] - after[0]
        assert torch.allclose(moved[~behind], -0.05 * 0.7 * expected[~behind], atol=1e-6)
        assert float(moved.abs().max()) > 1e-4
    else:  # a linear head that is still zero has a gradient itself, but passes none on
        assert torch.equal(*after)
        assert float(state.heads.abs().max()) > 1e-4


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("head", HEADS)
def test_one_local_step_by_hand(worker: MakeWorker, head: str) -> None:
    """Phase 1 at the first of two stages: ``CE(f(x), y) + CE(h(r), y) + lam tau^2 KL(K[y] || softmax(h(r) / tau))``.

    The second term is a linear head's only, the third has no row for class 1, and neither reaches what is behind r.
    """
    keys: Keys = {"fedd2s.lam": 0.7, "fedd2s.temperature": 3.0, "fedd2s.rounds-per-drop": 1, "fedd2s.head": head}
    node = worker("fedd2s", **keys, **{"model.name": "mlp", "train.lr": 0.5, "train.local-steps": 1})
    job, classes, rng = node.job(2, 0), node.setup.classes, torch.Generator().manual_seed(0)
    x, y = torch.randn(6, *node.data.images.shape, generator=rng), torch.tensor([0, 1, 2, 2, 0, 1])
    knowledge, owners = torch.randn(classes, classes, generator=rng).softmax(dim=1), torch.ones(classes).long()
    knowledge[1], owners[1] = 0.0, 0
    start, linear = (torch.randn(node.setup.sizes[n], generator=rng) / 5 for n in ("parameters", "heads"))

    theta = {name: view.clone().requires_grad_() for name, view in job.model.unflatten(start).items()}
    r = torch.relu(x.flatten(1) @ theta["stages.hidden.1.weight"].T + theta["stages.hidden.1.bias"])
    loss = functional.cross_entropy(r @ theta["stages.head.weight"].T + theta["stages.head.bias"], y)
    beside = {}
    if head == "deep-layers":
        logits = r @ theta["stages.head.weight"].detach().T + theta["stages.head.bias"].detach()
    else:
        views = node.setup.extras["heads"].unflatten(linear).items()
        beside = {name: view.clone().requires_grad_() for name, view in views}
        logits = r @ beside["linear.hidden.weight"].T + beside["linear.hidden.bias"]
        loss += functional.cross_entropy(logits, y)
    k, q, known = knowledge[y], (logits / 3).softmax(dim=1), y != 1
    loss += 0.7 * 3**2 * (k[known] * (k[known] / q[known]).log()).sum() / 6
    moved = [*theta.values(), *beside.values()]
    gradients = torch.autograd.grad(loss, moved, allow_unused=True)
    after = [t if g is None else t - 0.5 * g for t, g in zip(moved, gradients, strict=True)]
    expected = torch.cat([t.detach().flatten() for t in after]).split([len(start), len(linear)])

    state = client.State(parameters=start, statistics=torch.zeros(0), heads=linear)
    shard = Shard(x, y, torch.zeros(1), torch.ones(1))
    found = node.half.update(job, Broadcast(knowledge, owners), state, shard).state
    torch.testing.assert_close(found.parameters, expected[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.heads, expected[1], rtol=1e-9, atol=1e-9)


def test_linear_heads_are_trained_and_pass_gradients_on(worker: MakeWorker) -> None:
    """The CE of the head of this depth moves that head and the stages up to l, and no other head and no other stage."""
    node = worker("fedd2s", **DEEP, **{"fedd2s.head": "pooled-linear", "fedd2s.rounds-per-drop": 1})
    alone = worker("fedd2s", **DEEP, **{"fedd2s.head": "pooled-linear", "fedd2s.head-ce": False, "fedd2s.lam": 0.0})
    with_ce, without = (n.half.update(n.job(3, 0), taught(n), None, n.shard(0, "train")).state for n in (node, alone))
    views = node.setup.extras["heads"].unflatten(with_ce.heads)
    assert {name for name, view in views.items() if view.any()} == {"linear.conv2.weight", "linear.conv2.bias"}
    moved = with_ce.parameters != without.parameters
    assert moved[node.setup.model.slice_of(lambda stage: stage in ("conv1", "conv2"))].any()
    x, y = next(iter(node.job(3, 0).batches(node.shard(0, "train"))))
    node.setup.model.load(with_ce.parameters)
    heads = node.setup.extras["heads"]
    heads.load(with_ce.heads)
    loss = cross_entropy(heads(node.setup.model(x, stop="latent"), "conv2"), y).mean()
    gradient = node.setup.model.backward(loss)
    assert not gradient[node.setup.model.slice_of(lambda stage: stage in ("latent", "head"))].any()


@pytest.mark.parametrize("head", HEADS)
def test_a_client_is_taught_only_what_is_known_of_its_own_classes(worker: MakeWorker, head: str) -> None:
    """Rows of classes that the client has none of change nothing, and neither do masked ones."""
    node = worker("fedd2s", **DEEP, **{"fedd2s.head": head})
    shard, everything = node.shard(0, "train"), taught(node)
    shard = dataclasses.replace(shard, x=shard.x[shard.y < 5], y=shard.y[shard.y < 5])
    assert len(shard)
    own = torch.arange(10) < 5
    masked = Broadcast(everything.knowledge * ~own[:, None], everything.owners * ~own)
    nothing = Broadcast(everything.knowledge * 0, everything.owners * 0)
    states = [node.half.update(node.job(1, 0), sent, None, shard).state for sent in (masked, nothing, everything)]
    assert torch.equal(states[0].parameters, states[1].parameters)
    assert not torch.equal(states[0].parameters, states[2].parameters) or head == "pooled-linear"
    assert torch.equal(states[0].heads, states[1].heads)


# From the clients to K.


@pytest.mark.parametrize("round", [1, 2, 3])
@pytest.mark.parametrize("head", HEADS)
def test_extraction_is_the_mean_over_all_examples_of_a_class(worker: MakeWorker, head: str, round: int) -> None:
    """Soft labels at temperature tau and representations at l(t), of the trained model, in evaluation mode."""
    keys: Keys = {"fedd2s.rounds-per-drop": 1, "fedd2s.head": head, "fedd2s.temperature": 3.0}
    node = worker("fedd2s", **DEEP, **keys)
    shard = node.shard(0, "train")
    outcome = node.half.update(node.job(round, 0), taught(node), None, shard)
    sent, model, x, y = outcome.update, node.setup.model, *shard.batch(slice(None))
    model.load(outcome.state.parameters, outcome.state.statistics)
    model.module.eval()
    place = depth(node.config.hyper, node.setup.staged, round)
    with torch.no_grad():
        features, logits = model(x, stop=place.behind), model(x)
        if head == "pooled-linear":
            heads = node.setup.extras["heads"]
            heads.load(outcome.state.heads)
            logits = heads(features, place.stage)
            features = features.mean(dim=(2, 3)) if features.dim() == 4 else features
    wide = features.flatten(1).shape[1]
    for c in range(10):
        mine = y == c
        assert int(sent.label_counts[c]) == int(mine.sum())
        if not mine.any():
            assert int(sent.labels[c]) == -1
            assert not sent.soft_labels[c].any()
            assert not sent.representations[c].any()
            continue
        assert int(sent.labels[c]) == c
        assert torch.allclose(sent.soft_labels[c], (logits[mine] / 3.0).softmax(dim=1).mean(dim=0), atol=1e-6)
        assert torch.allclose(sent.representations[c, :wide], features[mine].flatten(1).mean(dim=0), atol=1e-5)
        assert not sent.representations[c, wide:].any()


def test_samples_are_drawn_and_counted(worker: MakeWorker) -> None:
    """At most ``samples`` rows, each with its own soft label; the rest of the fixed width is empty."""
    node = worker("fedd2s", **{"fedd2s.upload": "samples", "fedd2s.samples": 400})
    shard = node.shard(0, "train")
    every = node.half.update(node.job(1, 0), taught(node), None, shard).update
    assert len(shard) < 400
    assert every.labels[: len(shard)].bincount(minlength=10).tolist() == every.label_counts.tolist()
    assert every.labels[len(shard) :].tolist() == [-1] * (400 - len(shard))
    assert not every.soft_labels[len(shard) :].any()
    few = worker("fedd2s", **{"fedd2s.upload": "samples", "fedd2s.samples": 5})
    drawn = [few.half.update(few.job(t, 0), taught(few), None, shard).update for t in (1, 1, 2)]
    assert all((update.labels >= 0).all() for update in drawn)
    assert torch.equal(drawn[0].soft_labels, drawn[1].soft_labels)
    assert not torch.equal(drawn[0].soft_labels, drawn[2].soft_labels)
    assert drawn[0].label_counts.tolist() == every.label_counts.tolist()


def test_the_average_of_all_samples_is_that_of_the_class_means(worker: MakeWorker) -> None:
    """Two forms of one upload, when every example is sent."""
    knowledge = []
    for upload in UPLOADS:
        node = worker("fedd2s", **{"fedd2s.upload": upload, "fedd2s.samples": 600, "fedd2s.server": "average"})
        updates = [node.half.update(node.job(1, c), taught(node), None, node.shard(c, "train")).update for c in (0, 1)]
        state, _ = server.update(node.setup, server.init(node.setup), updates, 1)
        knowledge.append(state.knowledge)
    assert torch.allclose(*knowledge, atol=1e-6)


def check_knowledge(state: server.State) -> None:
    """Rows of K that somebody owns sum to one, the others are zero, and nothing is NaN."""
    owned = state.owners > 0
    assert torch.isfinite(state.knowledge).all()
    assert torch.allclose(state.knowledge[owned].sum(dim=1), torch.ones(int(owned.sum())), atol=1e-5)
    assert (state.knowledge >= 0).all()
    assert not state.knowledge[~owned].any()


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("keys", READINGS, ids=reading_id)
def test_knowledge_is_soft_labels_of_classes_that_somebody_owns(worker: MakeWorker, keys: Keys, norm: str) -> None:
    """At every depth, in every reading, with one single example in all as well."""
    node = worker("fedd2s", **DEEP, **keys, **{"fedd2s.rounds-per-drop": 1, "model.norm": norm})
    state = server.init(node.setup)
    assert not state.owners.any()
    shard = node.shard(0, "train")
    present = shard.y.unique()
    for round in (1, 2, 3, 4, 5):
        sent = server.broadcast(node.setup, state, round).check(node.setup.sizes, "the server")
        assert bool(sent.owners.any()) == (round == 5)
        update = node.half.update(node.job(round, 0), sent, None, shard).update.check(node.setup.sizes, "it")
        state, _ = server.update(node.setup, state, [update], round)
        state.check(node.setup.sizes, "the server")
        check_knowledge(state)
        assert set(state.owners.nonzero().flatten().tolist()) <= set(present.tolist())
    one = dataclasses.replace(shard, x=shard.x[:1], y=shard.y[:1])
    update = node.half.update(node.job(1, 0), sent, None, one).update
    for round in (1, 2, 3, 4):
        state, _ = server.update(node.setup, server.init(node.setup), [update], round)
        check_knowledge(state)
        assert state.owners.nonzero().flatten().tolist() == one.y.tolist()


def updates_by_hand(node: Any) -> list[Update]:
    """Return two updates: classes 0 (3 examples) and 1 (4) of one client, class 0 (9) of another."""
    updates = []
    for number, counts in enumerate(({0: 3, 1: 4}, {0: 9})):
        held = torch.zeros(10, dtype=torch.int64)
        held[list(counts)] = torch.tensor(list(counts.values()))
        soft = torch.randn(10, 10, generator=torch.Generator().manual_seed(number)).softmax(dim=1)
        updates.append(
            Update(
                soft_labels=soft * (held > 0)[:, None],
                representations=torch.zeros(10, node.setup.sizes["representation"]),
                labels=torch.where(held > 0, torch.arange(10), -1),
                label_counts=held,
            )
        )
    return updates


@pytest.mark.parametrize(("weights", "share"), [("uniform", 0.5), ("examples", 0.25)])
def test_the_average_is_over_the_clients_that_own_a_class(worker: MakeWorker, weights: str, share: float) -> None:
    """A client has no say about a class that it has no example of."""
    node = worker("fedd2s", **{"fedd2s.server": "average", "fedd2s.weights": weights})
    first, second = updates_by_hand(node)
    state, metrics = server.update(node.setup, server.init(node.setup), [first, second], 1)
    expected = share * first.soft_labels[0] + (1 - share) * second.soft_labels[0]
    assert torch.allclose(state.knowledge[0], expected, atol=1e-7)
    assert torch.allclose(state.knowledge[1], first.soft_labels[1], atol=1e-7)
    assert state.owners.tolist() == [2, 1] + [0] * 8
    assert metrics["classes_known"] == (2.0, 1.0)
    check_knowledge(state)


@pytest.mark.parametrize("memory", [0.0, 0.3])
def test_memory_keeps_rows_of_this_depth_only(worker: MakeWorker, memory: float) -> None:
    """Without memory a class is masked as soon as nobody of the round owns it; a drop forgets all in either case."""
    node = worker("fedd2s", **{"fedd2s.server": "average", "fedd2s.memory": memory, "fedd2s.rounds-per-drop": 2})
    first, second = updates_by_hand(node)
    state, _ = server.update(node.setup, server.init(node.setup), [first], 1)
    again, _ = server.update(node.setup, state, [second], 2)
    expected = memory * first.soft_labels[0] + (1 - memory) * second.soft_labels[0]
    assert torch.allclose(again.knowledge[0], expected, atol=1e-7)
    assert again.owners[:2].tolist() == [1, 1 if memory else 0]
    assert torch.allclose(again.knowledge[1], first.soft_labels[1] * bool(memory))
    assert server.broadcast(node.setup, again, 2).owners.any()
    sent = server.broadcast(node.setup, again, 3)
    assert not sent.owners.any()
    assert not sent.knowledge.any()
    dropped, _ = server.update(node.setup, again, [second], 3)
    assert torch.allclose(dropped.knowledge[0], second.soft_labels[0])
    assert not dropped.knowledge[1].any()
    check_knowledge(dropped)


# The global head.


def head_round(node: Any, round: int, state: server.State | None = None) -> tuple[server.State, Update, dict[str, Any]]:
    """Return the server's state after a round of client 0, the update, and the metrics."""
    update = node.half.update(node.job(round, 0), taught(node), None, node.shard(0, "train")).update
    setup = fresh(node)
    after, metrics = server.update(setup, state or server.init(setup), [update], round)
    return after, update, metrics


def test_the_global_head_is_the_part_that_was_dropped(worker: MakeWorker) -> None:
    """Stages behind l(t) are trained on the server, and the newly dropped one is prepended to what is there."""
    node = worker("fedd2s", **DEEP, **{"fedd2s.rounds-per-drop": 1})
    state, before, model = None, node.initial, node.setup.model
    trained: list[set[str]] = []
    for round in (1, 2, 3, 4):
        state, _, _ = head_round(node, round, state)
        moved = {s for s in node.setup.staged.stage_names if (state.head != before)[model.slice_of(s.__eq__)].any()}
        trained.append(moved)
        before = state.head
    assert trained == [set(), {"head"}, {"head", "latent"}, {"head", "latent", "conv2"}]


@pytest.mark.parametrize("head", HEADS)
def test_one_step_of_the_global_head(worker: MakeWorker, head: str) -> None:
    """``CE(H(R), c) + lam tau^2 KL(k || softmax(H(R) / tau))``, and K is what the trained head says of R."""
    lam, lr, temperature = 0.6, 0.2, 3.0
    keys: Keys = {"head": head, "lam": lam, "head-lr": lr, "head-epochs": 1, "head-batch": 10, "rounds-per-drop": 1}
    keys = {f"fedd2s.{name}": value for name, value in keys.items()} | {"fedd2s.temperature": temperature}
    node = worker("fedd2s", **keys)
    state, sent, _ = head_round(node, 2)
    held = sent.labels >= 0
    rows, k, c = sent.representations[held].double(), sent.soft_labels[held].double(), sent.labels[held]
    workspace = node.setup.extras.get("heads", node.setup.model)
    prefix = "linear.hidden" if head == "pooled-linear" else "stages.head"
    start = torch.zeros_like(state.head) if head == "pooled-linear" else node.initial
    weight, bias = (workspace.unflatten(start)[f"{prefix}.{kind}"].double().clone() for kind in ("weight", "bias"))

    def loss(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        logits = rows @ weight.T + bias
        hard = functional.cross_entropy(logits, c)
        soft = (k * (k.log() - (logits / temperature).log_softmax(dim=1))).sum(dim=1).mean()
        return hard + lam * temperature**2 * soft

    gradients = torch.func.grad(loss, argnums=(0, 1))(weight, bias)
    weight, bias = weight - lr * gradients[0], bias - lr * gradients[1]
    views = workspace.unflatten(state.head)
    assert torch.allclose(views[f"{prefix}.weight"].double(), weight, atol=1e-5)
    assert torch.allclose(views[f"{prefix}.bias"].double(), bias, atol=1e-5)
    expected = ((rows @ weight.T + bias) / temperature).softmax(dim=1)
    assert torch.allclose(state.knowledge[c].double(), expected, atol=1e-5)


def test_at_the_last_stage_the_global_head_is_the_identity(worker: MakeWorker) -> None:
    """With the whole model taking part the representation is the logits: nothing is left for the server to learn."""
    node = worker("fedd2s")
    state, sent, metrics = head_round(node, 1)
    held = sent.labels >= 0
    assert torch.equal(state.head, node.initial)
    assert "global_head_loss" not in metrics
    expected = (sent.representations[held, :10] / node.config.hyper.temperature).softmax(dim=1)
    assert torch.allclose(state.knowledge[sent.labels[held]], expected, atol=1e-7)


def test_the_global_head_learns(worker: MakeWorker) -> None:
    """Both of its losses fall over more passes."""
    losses = []
    for passes in (1, 50):
        node = worker("fedd2s", **{"fedd2s.rounds-per-drop": 1, "fedd2s.head-epochs": passes, "fedd2s.head-lr": 0.05})
        total, weight = head_round(node, 2)[2]["global_head_loss"]
        losses.append(total / weight)
    assert losses[1] < losses[0]


# What crosses the network, and clients with different models.


def test_no_model_crosses_the_network() -> None:
    """By type: soft labels, representations, labels and counts; heads and models are not among the fields."""
    method = load("fedd2s")
    dimensions = {d for kind in (method.Broadcast, method.Update) for spec in kind.specs().values() for d in spec.shape}
    assert dimensions == {"classes", "rows", "representation"}
    assert {"parameters", "heads"} <= {d for spec in method.State.specs().values() for d in spec.shape}


def test_the_average_needs_no_representations(worker: MakeWorker) -> None:
    """What the server does not use is not sent: the field is there for the other reading, and empty."""
    node = worker("fedd2s", **DEEP, **{"fedd2s.server": "average"})
    update = node.half.update(node.job(1, 0), taught(node), None, node.shard(0, "train")).update
    assert update.representations.shape == (10, 0)


MIXED: Keys = {"model.client-models": "mlp, fedgen_cnn", "model.name": "mlp", "run.clients-per-round": 0}
"""Clients 0, 2 and 4 have one model, the others another."""


@pytest.mark.slow
def test_clients_may_have_different_models(run_inline: RunInline, tmp_path: Any) -> None:
    """Alone, each client is as in a run where all have its model."""
    mixed = scores(run_inline("local", **MIXED))
    for offset, name in enumerate(("mlp", "fedgen_cnn")):
        same = scores(run_inline("local", **{"model.name": name, "run.clients-per-round": 0}))
        assert [r for r in mixed if r["client"] % 2 == offset] == [r for r in same if r["client"] % 2 == offset]


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_different_models_learn_from_each_other(run_inline: RunInline, head: str) -> None:
    """K has no trace of a model; the number of nodes does not matter, and a shallow model waits for a deep one."""
    keys: Keys = {"fedd2s.server": "average", "fedd2s.head": head, "fedd2s.rounds-per-drop": 1, "run.rounds": 5}
    run = run_inline("fedd2s", **MIXED, **keys)
    assert run.digest() == run_inline("fedd2s", nodes=2, **MIXED, **keys).digest()
    assert [row["drops_sum"] for row in run.rows("rounds")] == [0, 1, 2, 3, 3]
    assert [row["depth_sum"] for row in run.rows("rounds")] == [2, 1, 1, 1, 1]
    assert [row["classes_taught_sum"] for row in run.rows("rounds")] == [0, 0, 0, 0, 10]
    last = [row for row in run.rows("clients") if row["round"] == 5]
    assert all("distillation_loss_sum" in row for row in last)


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_a_global_head_serves_models_that_agree_in_width(run_inline: RunInline, head: str) -> None:
    """The mlp's hidden stage and the CNN's latent one have 32 numbers each; deeper in the CNN there is no such pair."""
    keys: Keys = {**MIXED, "model.hidden": 32, "fedd2s.head": head, "fedd2s.rounds-per-drop": 1}
    run = run_inline("fedd2s", **keys, **{"fedd2s.dropping-set": "head, hidden, latent"})
    assert [row["classes_taught_sum"] for row in run.rows("rounds")] == [0, 0, 10]
    with pytest.raises(UserError, match=r"model.client-models = .*(no global head fits|'representation')"):
        run_inline("fedd2s", **keys)
    with pytest.raises(UserError, match=r"model.client-models = .*'representation': 64 numbers for mlp, 32 for fedgen"):
        run_inline("fedd2s", **{**keys, "model.hidden": 64, "fedd2s.dropping-set": "head, hidden, latent"})


def exchanging() -> list[str]:
    """Return the methods that exchange parameters."""
    return [
        name
        for name in names()
        if any("parameters" in s.shape for k in (load(name).Broadcast, load(name).Update) for s in k.specs().values())
    ]


@pytest.mark.parametrize("method", exchanging())
def test_methods_that_exchange_parameters_refuse_different_models(run_inline: RunInline, method: str) -> None:
    """Before anything has started, in a line that names the key."""
    with pytest.raises(UserError, match=rf"model.client-models = .*{method} exchanges parameters"):
        run_inline(method, **MIXED)


@pytest.mark.parametrize("wrong", ["mlp,lenet6", "mlp,,mlp"])
def test_a_client_model_that_does_not_exist_is_one_clear_line(run_inline: RunInline, wrong: str) -> None:
    """It names the key that the user wrote."""
    with pytest.raises(UserError, match=r"model.client-models: model.name = '.*' is unknown"):
        run_inline("local", **{"model.client-models": wrong})


@pytest.mark.slow
def test_one_model_for_all_named_twice_is_no_other_run(run_inline: RunInline) -> None:
    """Naming the server's own model for all clients changes nothing."""
    keys: Keys = {"model.name": "mlp"}
    named = run_inline("fedd2s", **keys, **{"model.client-models": "mlp,mlp"})
    assert named.digest() == run_inline("fedd2s", **keys).digest()


def test_optimisers_share_the_settings_of_local_training(worker: MakeWorker) -> None:
    """Linear heads are trained as the model is: the same learning rate, momentum and weight decay."""
    node = worker("fedd2s", **{"fedd2s.head": "pooled-linear", "train.momentum": 0.9, "train.weight-decay": 0.1})
    model, heads = client._optimisers(node.job(1, 0), None)
    assert isinstance(heads, SGD)
    assert (model.lr, model.momentum, model.weight_decay) == (heads.lr, heads.momentum, heads.weight_decay)
    assert heads.parameters is node.setup.extras["heads"].parameters
    assert isinstance(node.setup.model.module, StagedModel)
