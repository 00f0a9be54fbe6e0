"""FedPer, FedRep, LG-FedAvg, FedBABU, FedRoD and FedBN: limit cases bit for bit, and each update written out again."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import tiny
from safetensors.torch import load_file
from torch.nn import functional

from clients.training import SGD
from fedkd import partial
from fedkd.config import Scalar
from fedkd.data import federate
from fedkd.errors import UserError
from fedkd.losses import balanced_softmax, cross_entropy
from fedkd.methods import fedper
from fedkd.methods.fedavg import Broadcast
from fedkd.methods.fedrod import State as RodState
from fedkd.results import Run
from sims import cli
from strategies import build

RunInline = Callable[..., Run]
Keys = dict[str, Scalar]
MODELS: dict[str, Keys] = {
    "mlp": {"model.name": "mlp"},
    "personal-norm": {"model.name": "fedgen_cnn"},
    "averaged-norm": {"model.name": "fedgen_cnn", "model.norm-statistics": "averaged"},
}
FIRST = {"mlp": "hidden", "personal-norm": "conv1", "averaged-norm": "conv1"}
HEAVY: Keys = {"train.momentum": 0.9, "train.weight-decay": 0.1}
"""What moves a parameter that has no gradient, if it is let."""


def states(run: Run) -> list[str]:
    """Return the hash of the server's state after each round."""
    return [row["state"] for row in run.rows("rounds")]


def scores(run: Run, kind: str) -> list[tuple[int, int, int, float]]:
    """Return (round, client, correct, loss) of every evaluation of the global or the personal model."""
    return [
        (row["round"], row["client"], row[f"{kind}_correct"], row[f"{kind}_loss_sum"])
        for row in run.rows("evaluations")
    ]


def exchange(node: Any) -> tuple[Any, Any]:
    """Return the first broadcast, and client 0's outcome of the first round."""
    server = importlib.import_module(f"strategies.{node.method.name}")
    broadcast = server.broadcast(node.setup, server.init(node.setup), 1)
    return broadcast, node.half.update(node.job(1, 0), broadcast, None, node.shard(0, "train"))


def moved(record: Any, seed: int = 0) -> Any:
    """Return a record whose vectors are a little elsewhere (statistics further up, so that variances stay positive)."""
    rng = torch.Generator().manual_seed(seed)
    changed = {
        name: value + 0.1 * (torch.rand if "statistics" in name else torch.randn)(value.shape, generator=rng)
        for name, value in record.tensors().items()
        if value.is_floating_point()
    }
    return dataclasses.replace(record, **changed)


# Limit cases.


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", ["fedper", "lg_fedavg", "fedrep", "fedbabu"])
def test_with_nothing_personal_it_is_fedavg(run_inline: RunInline, method: str, model: str) -> None:
    """The part that stays is the only difference, with and without BatchNorm statistics on the way."""
    whole = FIRST[model] if method == "lg_fedavg" else "none"
    run = run_inline(method, **MODELS[model], **{f"{method}.head": whole, **HEAVY})
    avg = run_inline("fedavg", **MODELS[model], **HEAVY)
    assert states(run) == states(avg)
    assert scores(run, "global") == scores(avg, "global")
    if method != "fedbabu":
        assert scores(run, "personal") == scores(avg, "global")


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", ["fedper", "lg_fedavg"])
def test_with_everything_personal_it_is_local(run_inline: RunInline, method: str, model: str) -> None:
    """Then nothing of the model crosses the network, and every client is alone."""
    nothing = "none" if method == "lg_fedavg" else FIRST[model]
    run = run_inline(method, **MODELS[model], **{f"{method}.head": nothing})
    assert scores(run, "personal") == scores(run_inline("local", **MODELS[model]), "personal")


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_lg_fedavg_is_fedper_with_the_parts_exchanged(
    run_inline: RunInline, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """The two methods differ in which side of the same cut stays, and in nothing else."""
    lg = run_inline("lg_fedavg", **MODELS[model])
    assert lg.digest() != run_inline("fedper", **MODELS[model]).digest()
    monkeypatch.setattr(fedper.Hyper, "shared", lambda self, model: partial.from_stage(model, self.head, "fedper.head"))
    assert run_inline("fedper", again=True, **MODELS[model]).digest() == lg.digest()


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_fedrep_without_head_steps_has_fedbabus_body(run_inline: RunInline, model: str) -> None:
    """Heads that are never trained are all the common initial one, against which FedBABU trains its body."""
    rep = run_inline("fedrep", **MODELS[model], **{"fedrep.head-steps": 0, **HEAVY})
    babu = run_inline("fedbabu", **MODELS[model], **HEAVY)
    assert states(rep) == states(babu)
    assert scores(rep, "global") == scores(babu, "global") == scores(rep, "personal")


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_fedbabu_without_fine_tuning_scores_the_global_model(run_inline: RunInline, model: str) -> None:
    """Before its fine-tuning a client has the common head."""
    run = run_inline("fedbabu", **MODELS[model], **{"fedbabu.fine-tune-steps": 0})
    assert scores(run, "personal") == scores(run, "global")


def test_fedbabu_without_a_fixed_head_is_the_control(run_inline: RunInline) -> None:
    """FedAvg, scored after local steps from the current global model, is what ``fedavg_ft`` does with ``now``."""
    run = run_inline("fedbabu", **{"fedbabu.head": "none", "fedbabu.fine-tune-steps": 4})
    control = run_inline("fedavg_ft", **{"fedavg_ft.score": "now"})
    assert states(run) == states(control)
    assert scores(run, "personal") == scores(control, "personal")
    assert scores(run, "global") == scores(control, "global")


@pytest.mark.slow
@pytest.mark.parametrize("keys", [MODELS["mlp"], {"model.name": "fedgen_cnn", "model.norm": "group"}], ids=str)
def test_fedbn_without_batchnorm_is_fedavg_and_says_so(
    run_inline: RunInline, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    """GroupNorm has no statistics of a batch, so it is none of the layers that stay; a tie in a table means nothing."""
    bn, avg = run_inline("fedbn", **keys), run_inline("fedavg", **keys)
    assert states(bn) == states(avg)
    assert scores(bn, "global") == scores(bn, "personal") == scores(avg, "global")
    cli._warn_of_ignored([bn.config, avg.config], [])
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fedkd: model.name = '{keys['model.name']}' with model.norm = ")
    assert line.endswith("take model.name=fedgen_cnn (or resnet18) and model.norm=batch")
    cli._warn_of_ignored([tiny("fedbn", **MODELS["personal-norm"])], [])
    assert not capsys.readouterr().err


def test_fedbn_whose_clients_are_all_alike_is_fedavg(run_inline: RunInline) -> None:
    """With one client there is nothing that others could have normalised otherwise."""
    keys: Keys = {**MODELS["personal-norm"], "run.clients": 1, "run.clients-per-round": 1}
    bn, avg = run_inline("fedbn", **keys), run_inline("fedavg", **keys)
    assert scores(bn, "personal") == scores(avg, "global") != scores(bn, "global")


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_fedrod_with_plain_cross_entropy_is_fedavg(run_inline: RunInline, model: str) -> None:
    """The personalized heads take nothing from the generic model and give it nothing."""
    rod = run_inline("fedrod", **MODELS[model], **{"fedrod.balance": 0.0, **HEAVY})
    avg = run_inline("fedavg", **MODELS[model], **HEAVY)
    assert states(rod) == states(avg)
    assert scores(rod, "global") == scores(avg, "global") != scores(rod, "personal")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedper", "fedrep", "lg_fedavg", "fedrod", "fedbn"])
def test_a_newcomer_has_the_shared_model(run_inline: RunInline, method: str) -> None:
    """A client that was never trained is scored, with what it can have: the shared part and the initial rest."""
    run = run_inline(method, **MODELS["personal-norm"], **{"run.rounds": 1})
    trained = run.rows("rounds")[0]["clients"]
    for glob, personal in zip(scores(run, "global"), scores(run, "personal"), strict=True):
        assert (glob == personal) == (glob[1] not in trained)


# The parts.


@pytest.mark.parametrize("method", ["fedper", "fedrep", "lg_fedavg", "fedbabu", "fedrod"])
def test_a_wrong_stage_is_one_clear_line(method: str) -> None:
    """The message names the key, the value and the nearest stage, before anything starts."""
    config = tiny(method, **{f"{method}.head": "haed"})
    with pytest.raises(UserError, match=rf"{method}\.head = 'haed': .* did you mean 'head'\? \(stages: hidden, head\)"):
        build(config, federate(config))


@pytest.mark.parametrize(
    ("method", "head", "shared", "own", "statistics"),
    [
        ("fedper", "head", "conv1 conv2 latent", "head", 44),
        ("fedrep", "latent", "conv1 conv2", "latent head", 44),
        ("fedbabu", "conv2", "conv1", "conv2 latent head", 12),
        ("lg_fedavg", "head", "head", "conv1 conv2 latent", 0),
        ("lg_fedavg", "conv2", "conv2 latent head", "conv1", 32),
        ("fedper", "none", "conv1 conv2 latent head", "", 44),
    ],
)
def test_only_the_shared_part_travels(
    worker: Callable[..., Any], method: str, head: str, shared: str, own: str, statistics: int
) -> None:
    """The payload holds the shared stages' parameters and averaged statistics; the state holds the rest."""
    node = worker(method, **MODELS["averaged-norm"], **{f"{method}.head": head})
    broadcast, outcome = exchange(node)
    after, initial = node.setup.model.parameters, node.initial
    update, state = outcome.update, outcome.state

    def of(vector: torch.Tensor, stages: str) -> torch.Tensor:
        return vector[node.setup.model.slice_of(lambda stage: stage in stages.split())]

    assert torch.equal(broadcast.parameters, of(initial, shared))
    assert torch.equal(update.parameters, of(after, shared))
    assert torch.equal(state.parameters, of(after, own))
    assert update.statistics.shape == broadcast.statistics.shape == (statistics,)
    assert state.statistics.shape == (44,)


@pytest.mark.parametrize("model", ["personal-norm", "averaged-norm"])
def test_batchnorm_layers_never_leave_a_fedbn_client(worker: Callable[..., Any], model: str) -> None:
    """Neither scales, shifts nor statistics, whatever is set for the statistics of shared layers."""
    node = worker("fedbn", **MODELS[model])
    broadcast, outcome = exchange(node)
    views = node.setup.model.unflatten(torch.arange(node.initial.numel()))
    norm = torch.cat([view.flatten() for name, view in views.items() if name[7:].startswith(("conv1.1", "conv2.1"))])
    assert len(norm) == 2 * (6 + 16)
    assert torch.equal(outcome.state.parameters, node.setup.model.parameters[norm])
    assert not torch.equal(outcome.state.parameters, node.initial[norm])
    assert len(outcome.update.parameters) == node.initial.numel() - len(norm)
    assert outcome.update.statistics.shape == broadcast.statistics.shape == (0,)


@pytest.mark.parametrize("method", ["fedper", "fedrep", "lg_fedavg", "fedbabu", "fedbn"])
@pytest.mark.parametrize("model", ["personal-norm", "averaged-norm"])
def test_the_parts_come_together_again(worker: Callable[..., Any], method: str, model: str) -> None:
    """A client goes on from the server's shared part and from its own rest; the shared score has the initial rest."""
    node = worker(method, **MODELS[model])
    broadcast, outcome = exchange(node)
    broadcast, state = moved(broadcast, 1), moved(outcome.state, 2)
    shared = node.setup.hyper.shared(node.setup.model)
    travels = partial.statistics_of(node.setup.model, shared) & (model == "averaged-norm")
    job = node.job(2, 0)
    for own in (True, False):
        importlib.import_module("clients.partial").load(job, broadcast, state, own=own)
        assert torch.equal(job.model.parameters[shared], broadcast.parameters)
        assert torch.equal(job.model.parameters[~shared], state.parameters if own else node.initial[~shared])
        assert torch.equal(job.model.statistics[travels], broadcast.statistics)
        if own:
            assert torch.equal(job.model.statistics[~travels], state.statistics[~travels])


def test_a_part_that_is_fixed_stays_fixed(worker: Callable[..., Any]) -> None:
    """Neither weight decay nor momentum moves it, and the rest moves as it would without the mask."""
    node = worker("fedavg", **HEAVY)
    job, part = node.job(1, 0), torch.arange(node.initial.numel()) % 3 == 0
    results = []
    for mask in (None, part):
        job.model.load(node.initial)
        sgd = SGD(job, 0.1, part=mask)
        for direction in torch.randn(3, node.initial.numel(), generator=torch.Generator().manual_seed(0)):
            sgd.apply(direction)
        results.append(job.model.parameters.clone())
    assert torch.equal(results[1][~part], node.initial[~part])
    assert torch.equal(results[1][part], results[0][part])


def test_batches_by_number_and_purpose(worker: Callable[..., Any]) -> None:
    """A number of batches takes the place of the settings, and another purpose another order."""
    node = worker("fedavg")
    job, shard = node.job(1, 0), node.shard(0, "train")
    plain, nine, other = (
        [y for _, y in job.batches(shard, **keys)] for keys in ({}, {"steps": 9}, {"steps": 9, "purpose": "other"})
    )
    assert (len(plain), len(nine), len(other)) == (4, 9, 9)
    assert all(torch.equal(a, b) for a, b in zip(plain, nine, strict=False))
    assert not all(torch.equal(a, b) for a, b in zip(nine, other, strict=True))
    assert not list(job.batches(shard, steps=0))
    by_pass = dataclasses.replace(job, config=tiny(**{"train.local-steps": 0}))
    assert len(list(by_pass.batches(shard, steps=9))) == 9
    assert not list(by_pass.batches(shard, steps=0))


# FedRep.


def stepped(
    parameters: dict[str, torch.Tensor], loss: torch.Tensor, momentum: dict[str, torch.Tensor], names: list[str]
) -> dict[str, torch.Tensor]:
    """Return the parameters after one of HEAVY's steps, of rate 0.05, on those of some names."""
    gradients = torch.autograd.grad(loss, [parameters[name] for name in names])
    for name, gradient in zip(names, gradients, strict=True):
        momentum[name] = 0.9 * momentum.get(name, 0.0) + gradient + 0.1 * parameters[name].detach()
    new = {name: parameters[name].detach() - 0.05 * momentum[name] for name in names}
    return {name: (new.get(name, value.detach())).requires_grad_() for name, value in parameters.items()}


def mlp(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Return the logits of the mlp, written out."""
    w1, b1, w2, b2 = parameters.values()
    return functional.linear(functional.linear(x.flatten(1), w1, b1).relu(), w2, b2)


def test_fedrep_trains_the_head_and_then_the_representation(worker: Callable[..., Any]) -> None:
    """The update is the two phases written out: fixed representation, then fixed new head, fresh momentum in each."""
    node = worker("fedrep", **HEAVY, **{"fedrep.head-steps": 3})
    broadcast, first = exchange(node)
    broadcast, state = moved(broadcast, 1), moved(first.state, 2)
    shard, job = node.shard(0, "train"), node.job(2, 0)
    outcome = node.half.update(job, broadcast, state, shard)
    shared = node.setup.hyper.shared(node.setup.model)
    start = node.initial.clone()
    start[shared], start[~shared] = broadcast.parameters, state.parameters
    views = node.setup.model.unflatten(start.double())
    parameters = {name: view.clone().requires_grad_() for name, view in views.items()}
    body, head = list(parameters)[:2], list(parameters)[2:]
    for names, batches in (
        (head, job.batches(shard, steps=3, purpose="head-batches")),
        (body, job.batches(shard)),
    ):
        momentum: dict[str, torch.Tensor] = {}
        for x, y in batches:
            loss = functional.cross_entropy(mlp(parameters, x.double()), y)
            parameters = stepped(parameters, loss, momentum, names)
    expected = torch.cat([value.detach().flatten() for value in parameters.values()])
    assert torch.allclose(outcome.update.parameters.double(), expected[shared], atol=1e-6)
    assert torch.allclose(outcome.state.parameters.double(), expected[~shared], atol=1e-6)
    assert not torch.allclose(outcome.state.parameters, state.parameters, atol=1e-3)


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_fedreps_head_steps_are_really_taken(worker: Callable[..., Any], steps: int) -> None:
    """Elsewhere the number of epochs of one of the two phases is a setting that nothing reads."""
    node = worker("fedrep", **{"fedrep.head-steps": steps})
    _, outcome = exchange(node)
    assert outcome.metrics.get("head_loss", (0, 0))[1] == 16 * steps
    assert outcome.metrics["loss"][1] == 16 * 4
    shared = node.setup.hyper.shared(node.setup.model)
    assert torch.equal(outcome.state.parameters, node.initial[~shared]) == (steps == 0)
    assert not torch.equal(outcome.update.parameters, node.initial[shared])


# FedBABU.


def test_fedbabus_head_never_moves(run_inline: RunInline, worker: Callable[..., Any]) -> None:
    """Neither gradient, momentum nor weight decay reaches it in any round of the federation."""
    run = run_inline("fedbabu", **HEAVY)
    node = worker("fedbabu", **HEAVY)
    head = node.initial[~node.setup.hyper.shared(node.setup.model)]
    files = sorted((run.folder / "state").rglob("*.safetensors"))
    assert len(files) > 3
    assert all(torch.equal(load_file(file)["parameters"], head) for file in files)


@pytest.mark.parametrize("part", ["all", "head", "body"])
def test_fedbabu_fine_tunes_the_part_that_is_asked(worker: Callable[..., Any], part: str) -> None:
    """The other part stays as the server sent it or as the seed made it; the steps start anew each time."""
    node = worker("fedbabu", **HEAVY, **{"fedbabu.fine-tune": part})
    broadcast, outcome = exchange(node)
    body, job = node.setup.hyper.shared(node.setup.model), node.job(1, 0)
    found = []
    for _ in range(2):
        models = node.half.models(job, broadcast, outcome.state, node.shard(0, "train"))
        assert models.personal is not None
        models.personal()
        found.append(job.model.parameters.clone())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0][body], node.initial[body]) == (part == "head")
    assert torch.equal(found[0][~body], node.initial[~body]) == (part == "body")


# FedRoD.


def counts_and_logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return class counts with an absent class, logits and labels in double precision."""
    rng = torch.Generator().manual_seed(0)
    counts, labels = torch.tensor([7, 0, 2, 1]), torch.tensor([0, 2, 3, 0, 2])
    return counts, torch.randn(5, 4, generator=rng, dtype=torch.float64), labels


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_balanced_softmax_is_its_formula(exponent: float) -> None:
    """The loss, and its gradient by finite differences: weighted softmax minus label, zero for an absent class."""
    counts, logits, labels = counts_and_logits()
    weights = counts.double() ** exponent * logits.exp()
    share = weights / weights.sum(dim=1, keepdim=True)
    loss = balanced_softmax(logits, labels, counts, exponent)
    assert torch.allclose(loss, -share[torch.arange(5), labels].log(), atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda g: balanced_softmax(g, labels, counts, exponent), logits.clone().requires_grad_()
    )
    logits.requires_grad_()
    balanced_softmax(logits, labels, counts, exponent).sum().backward()
    assert logits.grad is not None
    assert torch.allclose(logits.grad, share - functional.one_hot(labels, 4), atol=1e-12)
    assert (logits.grad[:, 1] == 0).all()


def test_balanced_softmax_leaves_the_class_shares_to_the_counts() -> None:
    """Equal logits are stationary whatever the shares: with the other sign the head would learn them twice."""
    counts = torch.tensor([7, 0, 2, 1])
    labels = torch.repeat_interleave(torch.arange(4), counts)
    gradients = {}
    for exponent in (0.0, 1.0):
        logits = torch.zeros(10, 4, dtype=torch.float64, requires_grad=True)
        balanced_softmax(logits, labels, counts, exponent).mean().backward()
        assert logits.grad is not None
        gradients[exponent] = logits.grad.sum(dim=0)
    assert torch.allclose(gradients[1.0], torch.zeros(4, dtype=torch.float64), atol=1e-15)
    assert gradients[0.0].abs().max() > 0.1


@pytest.mark.parametrize(("exponent", "counts"), [(1.0, [5, 5, 5, 5]), (3.0, [1, 1, 1, 1]), (0.0, [7, 0, 2, 1])])
def test_balanced_softmax_with_equal_counts_is_cross_entropy(exponent: float, counts: list[int]) -> None:
    """Bit for bit, and likewise without an exponent."""
    _, logits, labels = counts_and_logits()
    for precise in (logits, logits.float()):
        balanced = balanced_softmax(precise, labels, torch.tensor(counts), exponent)
        assert torch.equal(balanced, cross_entropy(precise, labels))


def rod(worker: Callable[..., Any], **keys: Scalar) -> tuple[Any, Broadcast, RodState]:
    """Return a node, a broadcast and a state of client 0 that are not the initial ones."""
    node = worker("fedrod", **keys)
    broadcast, outcome = exchange(node)
    return node, moved(broadcast, 1), moved(outcome.state, 2)


@pytest.mark.parametrize("head", ["head", "latent", "conv2", "conv1"])
def test_fedrods_generic_model_does_not_depend_on_the_personalized_head(worker: Callable[..., Any], head: str) -> None:
    """The features and the generic logits are held fixed in the personalized loss, wherever the head begins."""
    node, broadcast, state = rod(worker, **MODELS["averaged-norm"], **{"fedrod.head": head})
    other = dataclasses.replace(state, personal_head=3 * state.personal_head)
    first, second = (
        node.half.update(node.job(2, 0), broadcast, mine, node.shard(0, "train")) for mine in (state, other)
    )
    assert torch.equal(first.update.parameters, second.update.parameters)
    assert torch.equal(first.update.statistics, second.update.statistics)
    assert torch.equal(first.state.statistics, second.state.statistics)
    assert not torch.equal(first.state.personal_head, second.state.personal_head)
    assert not torch.equal(first.state.personal_head, state.personal_head)


def test_fedrods_update_is_its_two_losses_written_out(worker: Callable[..., Any]) -> None:
    """Balanced softmax for body and generic head, cross-entropy of the sum of logits for the personalized one."""
    node, broadcast, state = rod(worker, **HEAVY)
    shard, job = node.shard(0, "train"), node.job(2, 0)
    outcome = node.half.update(job, broadcast, state, shard)
    views = node.setup.model.unflatten(broadcast.parameters.double())
    generic = {name: view.clone().requires_grad_() for name, view in views.items()}
    size = 10 * 64
    personal = {
        "weight": state.personal_head[:size].double().reshape(10, 64).requires_grad_(),
        "bias": state.personal_head[size:].double().requires_grad_(),
    }
    counts = torch.bincount(shard.y, minlength=10).double()
    momenta: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = ({}, {})
    for x, y in job.batches(shard):
        w1, b1, w2, b2 = generic.values()
        features = functional.linear(x.double().flatten(1), w1, b1).relu()
        logits = functional.linear(features, w2, b2)
        weights = counts * logits.exp()
        balanced = -(weights[torch.arange(len(y)), y] / weights.sum(dim=1)).log().mean()
        both = logits.detach() + functional.linear(features.detach(), personal["weight"], personal["bias"])
        generic = stepped(generic, balanced, momenta[0], list(generic))
        personal = stepped(personal, functional.cross_entropy(both, y), momenta[1], list(personal))
    expected = [torch.cat([value.detach().flatten() for value in part.values()]) for part in (generic, personal)]
    assert torch.allclose(outcome.update.parameters.double(), expected[0], atol=1e-6)
    assert torch.allclose(outcome.state.personal_head.double(), expected[1], atol=1e-6)


def test_a_fedrod_client_predicts_with_the_sum_of_the_logits(worker: Callable[..., Any]) -> None:
    """The generic model stays what it is; the client adds its own head's logits."""
    node, broadcast, state = rod(worker)
    x, _ = node.shard(0, "test").batch(slice(None))
    models = node.half.models(node.job(1, 0), broadcast, state, node.shard(0, "train"))
    shared, personal = models.shared()(x), models.personal()(x)
    views = node.setup.model.unflatten(broadcast.parameters)
    assert torch.allclose(shared, mlp(views, x), atol=1e-6)
    w1, b1, w2, b2 = views.values()
    summed = {"w1": w1, "b1": b1, "w2": w2 + state.personal_head[:640].reshape(10, 64)}
    assert torch.allclose(personal, mlp(summed | {"b2": b2 + state.personal_head[640:]}, x), atol=1e-5)


def test_a_new_personalized_head_is_the_models_initial_one(worker: Callable[..., Any]) -> None:
    """Not what another client left in the workspace."""
    node, broadcast, _ = rod(worker, **MODELS["personal-norm"], **{"train.lr": 1e-30})
    outcome = node.half.update(node.job(1, 1), broadcast, None, node.shard(1, "train"))
    assert torch.equal(outcome.state.personal_head, node.initial[-330:])


def test_an_only_class_teaches_fedrods_generic_model_nothing(worker: Callable[..., Any]) -> None:
    """Balanced softmax over one class is the constant 1; the personalized head learns the class all the same."""
    node = worker("fedrod", **{"data.partition": "pathological", "data.classes-per-client": 1, "run.clients": 10})
    _, outcome = exchange(node)
    assert torch.equal(outcome.update.parameters, node.initial)
    assert not torch.equal(outcome.state.personal_head, node.initial[-650:])


@pytest.mark.parametrize(
    "mask", ["1111", "0000", "0011", "1100", "0110", "1001", "10101", "1", "0", ""], ids=lambda mask: mask or "empty"
)
def test_a_part_is_taken_and_put_back_as_by_its_mask(mask: str) -> None:
    """The same numbers as indexing gives, in a vector and in rows, as a copy; and nothing else is touched."""
    named = torch.tensor([digit == "1" for digit in mask], dtype=torch.bool)
    for whole in (torch.arange(1.0, len(mask) + 1), torch.arange(3.0 * len(mask)).reshape(3, -1)):
        part, other = partial.take(whole, named), torch.full_like(whole, -1)
        assert torch.equal(part, whole[..., named])
        partial.put(part, named, other)
        assert torch.equal(other, torch.where(named, whole, -1))
        assert not len(mask) or part.data_ptr() != whole.data_ptr()
