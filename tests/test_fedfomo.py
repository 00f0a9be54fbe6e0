"""FedFomo: limit cases, weights by hand, and numbers that the authors' code gave (NVlabs/FedFomo @ fe04f66)."""

from __future__ import annotations

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

import clients.fedfomo as client_half
import strategies.fedfomo as server_half
from clients.app import Worker
from clients.fedfomo import Candidate
from clients.training import Job
from fedkd.config import Config, Scalar
from fedkd.data import Shard, federate
from fedkd.losses import cross_entropy
from fedkd.method import load
from fedkd.methods.fedfomo import Broadcast, Personal, State, Update
from fedkd.results import Run
from fedkd.setup import Setup

RunInline = Callable[..., Run]
AUTHORS: dict[str, Any] = json.loads(
    (Path(__file__).parent / "fixtures" / "fedfomo_authors.json").read_text(encoding="utf-8")
)
"""What the authors' code gave, and how it was asked: see its ``source``."""
NONE = torch.zeros(0)


def pattern(seed: int, *shape: int) -> torch.Tensor:
    """Return the values in [0, 1) that the fixture names by a seed; integer arithmetic, so equal everywhere."""
    i = torch.arange(1, math.prod(shape) + 1) + 1000 * seed
    return (((31 * i * i + 17 * i) % 10007).double() / 10007).float().reshape(shape)


def close(actual: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Compare with a number, or nested list of numbers, computed in another order."""
    actual, expected = (torch.as_tensor(value).double() for value in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


# Limit cases.


def test_without_other_models_it_is_local_training(run_inline: RunInline) -> None:
    """With no downloads and no hold-out a client keeps what training made of its model, wherever training helped.

    Whole-shard batches of a small rate always help, and then it is ``local`` bit for bit.
    """
    flat: dict[str, Scalar] = {"train.batch-size": 10_000}
    fomo = run_inline("fedfomo", **flat, **{"fedfomo.downloads": 0, "fedfomo.validation": 0.0})
    local = run_inline("local", **flat)
    assert fomo.rows("evaluations") == local.rows("evaluations")
    assert [row["loss_sum"] for row in fomo.rows("clients")] == [row["loss_sum"] for row in local.rows("clients")]
    shares = [row["own_share_sum"] for row in fomo.rows("clients") if "own_share_sum" in row]
    assert shares
    assert set(shares) == {1.0}


def test_the_first_round_is_local_training(run_inline: RunInline) -> None:
    """Nobody has sent a model yet."""
    fomo = run_inline("fedfomo", **{"fedfomo.validation": 0.0, "run.rounds": 1})
    assert fomo.rows("evaluations") == run_inline("local", **{"run.rounds": 1}).rows("evaluations")


def test_there_is_no_global_model(run_inline: RunInline) -> None:
    """Nothing is sent to everybody, and only personal models are scored."""
    assert load("fedfomo").Broadcast.specs() == {}
    assert not any("global_correct" in row for row in run_inline("fedfomo").rows("evaluations"))


# Weights.


def test_weights_by_hand() -> None:
    """Gain per distance, clipped at zero and normalised; a model at no distance has no weight."""
    gains, distances = (torch.tensor(v, dtype=torch.float64) for v in ([0.6, 0.2, -0.4, 0.0], [2.0, 0.5, 1.0, 0.0]))
    weights = client_half.weights(gains, distances)
    assert weights.tolist() == pytest.approx([0.3, 0.4, -0.4, 0.0])
    assert client_half.shares(weights).tolist() == pytest.approx([3 / 7, 4 / 7, 0.0, 0.0])
    assert client_half.scaled(weights).tolist() == pytest.approx([1.0, 4 / 3, -4 / 3, 0.0])
    assert client_half.scaled(-weights).tolist() == pytest.approx([-1.0, -4 / 3, 4 / 3, 0.0])


def test_weights_that_cancel_stay_finite() -> None:
    """Neither no candidates, nor none that helps, nor a sum of zero divides by zero."""
    for weights in ([], [0.0], [-1.0, -2.0], [1.0, -1.0], [0.0, 0.0]):
        values = torch.tensor(weights, dtype=torch.float64)
        assert torch.isfinite(client_half.scaled(values)).all()
        total = float(client_half.shares(values).sum())
        assert total == (1.0 if any(w > 0 for w in weights) else 0.0)


def test_the_weight_is_minus_the_slope_of_the_loss() -> None:
    """For a model close by, w_n tends to minus the slope of the validation loss towards it: the first order."""
    rng = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, generator=rng, dtype=torch.float64)
    theta, direction = (torch.randn(4, generator=rng, dtype=torch.float64) for _ in range(2))
    direction /= direction.norm()

    def loss(at: torch.Tensor) -> torch.Tensor:
        return (root @ at).square().sum()

    slope = float((2 * root.T @ root @ theta) @ direction)
    for step in (1e-3, -1e-3):
        gain = loss(theta) - loss(theta + step * direction)
        weight = client_half.weights(gain[None], torch.tensor([abs(step)], dtype=torch.float64))
        assert float(weight) == pytest.approx(-slope * math.copysign(1, step), rel=0.05)


def test_the_mixture_moves_from_the_starting_point() -> None:
    """``theta + sum_n v_n (theta_n - theta)``, statistics likewise; the starting point itself where nothing helps."""
    rng = torch.Generator().manual_seed(0)
    start, *others = (Candidate(torch.randn(5, generator=rng), torch.rand(2, generator=rng)) for _ in range(3))
    shares = torch.tensor([0.25, 0.75])
    mixed = client_half.mixture(start, others, shares)
    for got, at, first, second in zip(mixed, start, *others, strict=True):
        close(got, at + 0.25 * (first - at) + 0.75 * (second - at))
    assert client_half.mixture(start, others, torch.zeros(2)) is start
    assert client_half.mixture(start, [], torch.zeros(0)) is start


@pytest.mark.parametrize(("norm", "expected"), [("l1", 7.0), ("l2", 5.0)])
def test_distances_by_hand(norm: str, expected: float) -> None:
    """Manhattan or Euclidean, over all parameters at once."""
    assert float(client_half._distance(torch.tensor([3.0, 0.0, -4.0]), norm)) == expected


# The hold-out.


@pytest.mark.parametrize(
    ("share", "count", "held"), [(0.2, 10, 2), (0.2, 2, 1), (0.01, 9, 1), (0.9, 3, 2), (0.5, 5, 2)]
)
def test_the_holdout_splits_the_training_data(
    worker: Callable[..., Worker], share: float, count: int, held: int
) -> None:
    """The parts are disjoint, together all there is, and the same in every round; each has at least one example."""
    node = worker("fedfomo", **{"fedfomo.validation": share})
    whole = node.shard(0, "train")
    shard = dataclasses.replace(whole, x=whole.x[:count], y=torch.arange(count))
    train, validation = client_half.split(node.job(1, 0), shard)
    assert (len(train), len(validation)) == (count - held, held)
    assert sorted([*train.y.tolist(), *validation.y.tolist()]) == list(range(count))
    assert torch.equal(torch.cat([train.x, validation.x]), shard.x[torch.cat([train.y, validation.y])])
    assert client_half.split(node.job(7, 0), shard)[1].y.tolist() == validation.y.tolist()


def test_a_client_with_one_example_uses_it_for_both(worker: Callable[..., Worker]) -> None:
    """There is nothing to hold out; nor is there when the share is zero."""
    node = worker("fedfomo")
    whole = node.shard(0, "train")
    one = dataclasses.replace(whole, x=whole.x[:1], y=whole.y[:1])
    assert client_half.split(node.job(1, 0), one) == (one, one)
    without = dataclasses.replace(node.job(1, 0), config=tiny("fedfomo", **{"fedfomo.validation": 0.0}))
    assert client_half.split(without, whole) == (whole, whole)


def test_held_out_examples_never_train(run_inline: RunInline) -> None:
    """The reported loss is over the rest, and the two add up to what the client has."""
    for row in run_inline("fedfomo", **{"train.batch-size": 10_000}).rows("clients"):
        assert row["loss_weight"] == 4 * (row["examples"] - row["held_out_sum"])
        assert row["held_out_sum"] == max(1, round(0.2 * row["examples"]))


# A participation by hand.


def personal_of(sources: list[int], models: torch.Tensor, statistics: torch.Tensor | None = None) -> Personal:
    """Return what the server sends, with as many places as models."""
    statistics = torch.zeros(len(models), 0) if statistics is None else statistics
    return Personal(sources=torch.tensor(sources), models=models, statistics=statistics)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("affinity", ["raw", "scaled"])
def test_a_participation_by_hand(worker: Callable[..., Worker], norm: str, affinity: str) -> None:
    """From the last starting point, towards what lowers the loss on the held-out examples; then local steps."""
    places = {"fedfomo.downloads": 3, "fedfomo.norm": norm, "fedfomo.affinity": affinity}
    node = worker("fedfomo", **places, **{"train.lr": 0.01})
    model, shard = node.setup.model, node.shard(0, "train")
    helper = worker("fedfomo", **{"fedfomo.validation": 0.0, "fedfomo.downloads": 0, "train.local-steps": 30})
    nothing = personal_of([], torch.zeros(0, len(node.initial)))
    good = helper.half.update(helper.job(1, 0, nothing), Broadcast(), None, shard).update.parameters
    bad = node.initial - (good - node.initial)
    start, trained = node.initial + 0.3 * (good - node.initial), node.initial + 0.4 * (good - node.initial)
    state = State(trained, NONE, start, NONE)
    personal = personal_of([4, -1, 5], torch.stack([good, torch.zeros_like(good), bad]))
    job = node.job(2, 0, personal)
    outcome = client_half.update(job, Broadcast(), state, shard)

    train, validation = client_half.split(job, shard)
    x, y = validation.batch(slice(None))

    def loss(parameters: torch.Tensor) -> float:
        model.load(parameters)
        with torch.no_grad():
            return cross_entropy(model(x), y).mean().item()

    weights = []
    for candidate in (trained, good, bad):
        distance = (candidate - start).abs().sum() if norm == "l1" else (candidate - start).square().sum().sqrt()
        weights.append((loss(start) - loss(candidate)) / float(distance))
    assert weights[0] > 0
    assert weights[1] > 0
    assert weights[2] < 0
    positive = weights[0] + weights[1]
    theta = start + (weights[0] * (trained - start) + weights[1] * (good - start)) / positive
    close(outcome.state.start, theta, rtol=1e-4, atol=1e-5)
    divisor = abs(sum(weights)) if affinity == "scaled" else 1.0
    close(outcome.update.weights, [weights[1] / divisor, 0.0, weights[2] / divisor], rtol=1e-3, atol=1e-5)
    assert outcome.update.sources.tolist() == [4, -1, 5]
    assert outcome.metrics["helpful"] == (2.0, 3.0)
    assert outcome.metrics["own_share"][0] == pytest.approx(weights[0] / positive, rel=1e-3)
    for batch, labels in job.batches(train):
        model.load(theta)
        theta = theta - 0.01 * model.backward(cross_entropy(model(batch), labels).mean())
    close(outcome.update.parameters, theta, rtol=1e-4, atol=1e-5)
    assert torch.equal(outcome.state.parameters, outcome.update.parameters)


def test_a_training_that_did_not_help_is_taken_back(worker: Callable[..., Worker]) -> None:
    """Without a candidate that lowers the validation loss the client starts again from where it started."""
    node = worker("fedfomo", **{"fedfomo.downloads": 1})
    trained = node.initial + 5 * torch.randn(node.initial.shape, generator=torch.Generator().manual_seed(0))
    state = State(trained, NONE, node.initial, NONE)
    personal = personal_of([3], 2 * trained[None])
    outcome = client_half.update(node.job(2, 0, personal), Broadcast(), state, node.shard(0, "train"))
    assert torch.equal(outcome.state.start, node.initial)
    assert outcome.metrics["own_share"] == (0.0, 1.0)


def test_others_models_are_weighed_with_the_right_statistics(worker: Callable[..., Worker]) -> None:
    """Averaged statistics come with each model and are mixed like it; personal ones are the client's own."""
    for setting, shared in (("averaged", 44), ("personal", 0)):
        places = {"model.name": "fedgen_cnn", "model.norm-statistics": setting, "fedfomo.downloads": 2}
        node = worker("fedfomo", **places)
        shard, size = node.shard(0, "train"), len(node.initial)
        rng = torch.Generator().manual_seed(0)
        models = node.initial + 0.1 * torch.randn(2, size, generator=rng)
        statistics = torch.rand(2, shared, generator=rng) + 0.5
        kept = torch.rand(44, generator=rng) + 0.5
        start_statistics = torch.rand(shared, generator=rng) + 0.5
        state = State(models.mean(dim=0), kept, node.initial, start_statistics)
        job = node.job(2, 0, personal_of([1, 2], models, statistics))
        outcome = client_half.update(job, Broadcast(), state, shard)
        x, y = client_half.split(job, shard)[1].batch(slice(None))
        losses = []
        for parameters, its_own in (
            (node.initial, start_statistics),
            (models.mean(dim=0), kept),
            *zip(models, statistics, strict=True),
        ):
            node.setup.model.load(parameters, its_own if shared else kept)
            node.setup.model.module.eval()
            with torch.no_grad():
                losses.append(cross_entropy(node.setup.model(x), y).mean().double())
        candidates = [models.mean(dim=0), *models]
        distances = torch.stack([(c - node.initial).double().abs().sum() for c in candidates])
        shares = client_half.shares(client_half.weights(losses[0] - torch.stack(losses[1:]), distances))
        assert (shares > 0).any()
        close(outcome.state.start, sum(s * c for s, c in zip(shares, candidates, strict=True)), atol=1e-4)
        if shared:
            expected = sum(s * c for s, c in zip(shares, [kept, *statistics], strict=True))
            close(outcome.state.start_statistics, expected, atol=1e-4)


# The server.


def server(**flat: Scalar) -> tuple[Setup, server_half.State]:
    """Return a server that six clients' three models have reached: of clients 1, 3 and 4."""
    config = tiny("fedfomo", **flat)
    data = federate(config)
    setup = Setup.build(config, data.images.shape, data.classes, torch.device("cpu"))
    state = server_half.init(setup)
    updates = [
        Update(
            client=torch.tensor(client),
            parameters=torch.full_like(state.models[0], client),
            statistics=NONE,
            examples=torch.tensor(9),
            sources=torch.full((setup.sizes["downloads"],), -1),
            weights=torch.zeros(setup.sizes["downloads"]),
        )
        for client in (1, 3, 4)
    ]
    return setup, server_half.update(setup, state, updates, 1)[0].check(setup.sizes, "the server")


def test_each_client_gets_the_others_models() -> None:
    """All that there are, when there is room: with their owners, never its own, zeros in the places left over."""
    setup, state = server(**{"fedfomo.downloads": 4})
    for client in range(6):
        personal = server_half.personal(setup, state, 2, client).check(setup.sizes, "the server")
        others = [c for c in (1, 3, 4) if c != client]
        assert personal.sources.tolist() == others + [-1] * (4 - len(others))
        for source, model in zip(personal.sources.tolist(), personal.models, strict=True):
            assert torch.equal(model, torch.full_like(model, max(source, 0)))


def test_before_the_first_round_there_are_no_models() -> None:
    """Every place is empty."""
    setup, _ = server()
    personal = server_half.personal(setup, server_half.init(setup), 1, 0).check(setup.sizes, "the server")
    assert set(personal.sources.tolist()) == {-1}
    assert not personal.models.any()


def test_without_exploration_affinity_decides() -> None:
    """The best models that are there, whatever the affinity to clients that are not."""
    setup, state = server(**{"fedfomo.downloads": 2, "fedfomo.epsilon": 0.0})
    affinity = state.affinity.clone()
    affinity[0] = torch.tensor([9.0, -0.5, 9.0, 0.1, 0.2, 9.0])
    state = dataclasses.replace(state, affinity=affinity)
    for number in range(2, 12):
        assert server_half.personal(setup, state, number, 0).sources.tolist() == [3, 4]


@pytest.mark.parametrize(("decay", "expected"), [(0.0, 0.5 * 2 / 3), (0.1, (0.5 - 0.1 * 3) * 2 / 3), (0.2, 0.0)])
def test_exploration_is_as_often_as_epsilon_says(decay: float, expected: float) -> None:
    """A random place goes to one of the two worse models in two of three cases; epsilon falls from round to round."""
    setup, state = server(**{"fedfomo.downloads": 1, "fedfomo.epsilon": 0.5, "fedfomo.epsilon-decay": decay})
    affinity = state.affinity.clone()
    affinity[:, 3] = 1.0
    state = dataclasses.replace(state, affinity=affinity)
    others = []
    for seed in range(600):
        streams = dataclasses.replace(setup.streams, seed=seed)
        [row] = server_half.chosen(dataclasses.replace(setup, streams=streams), state, 4, 0)
        others.append(int(state.participants[row]) != 3)
    assert sum(others) / 600 == pytest.approx(expected, abs=0.07)


def test_equal_affinities_are_in_random_order() -> None:
    """Before anything is known, every client's model has the same chance."""
    setup, state = server(**{"fedfomo.downloads": 1, "fedfomo.epsilon": 0.0})
    rows = [server_half.chosen(setup, state, number, 0)[0] for number in range(300)]
    assert all(60 < rows.count(row) < 140 for row in range(3))


def test_affinities_add_up() -> None:
    """A client's weights are added to its own row, in the columns of whose models it got, and to nothing else."""
    setup, state = server(**{"fedfomo.downloads": 3})
    before = state.affinity + torch.arange(36.0).reshape(6, 6)
    state = dataclasses.replace(state, affinity=before)
    update = Update(
        client=torch.tensor(2),
        parameters=state.models[0],
        statistics=NONE,
        examples=torch.tensor(9),
        sources=torch.tensor([1, -1, 4]),
        weights=torch.tensor([0.5, 7.0, -0.25]),
    )
    after, _ = server_half.update(setup, state, [update, update, update], 2)
    expected = before.clone()
    expected[2, 1] += 3 * 0.5
    expected[2, 4] -= 3 * 0.25
    assert torch.equal(after.affinity, expected)
    assert after.participants.tolist() == [2, 2, 2]


def test_affinity_and_models_are_in_the_results(run_inline: RunInline) -> None:
    """The final state has the affinities of all pairs and the last round's models; a client's own column is empty."""
    run = run_inline("fedfomo")
    state = load_file(run.folder / "final.safetensors")
    assert state["participants"].tolist() == run.rows("rounds")[-1]["clients"]
    assert state["affinity"].shape == (6, 6)
    assert state["affinity"].any()
    assert not state["affinity"].diagonal().any()


# The authors' numbers.


@pytest.mark.parametrize("case", AUTHORS["cases"], ids=lambda case: str(case["name"]))
def test_weights_and_mixture_are_the_authors(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation losses, weights, what is added to the affinities, shares and the mixture."""
    flat: dict[str, Scalar] = {"run.method": "fedfomo", "model.name": "mlp", "model.hidden": 5, "fedfomo.downloads": 3}
    setup = Setup.build(Config.from_flat(flat), (1, 2, 2), 3, torch.device("cpu"))

    def model(seeds: list[int]) -> torch.Tensor:
        parameters = 4 * pattern(seeds[0], setup.sizes["parameters"]) - 2
        return parameters + sum(0.2 * (pattern(s, len(parameters)) - 0.5) for s in seeds[1:])

    x, y = 2 * pattern(20, 6, 1, 2, 2) - 1, torch.tensor(AUTHORS["labels"])
    images = Shard(x, y, torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    own, *others = (model(seeds) for seeds in case["candidates"])
    state = State(own, NONE, model(case["start"]), NONE)
    personal = personal_of([1, 2, 3], torch.stack(others))
    monkeypatch.setattr(client_half, "split", lambda job, shard: (images, images))
    monkeypatch.setattr(Job, "batches", lambda job, shard: iter(()))
    measured: list[torch.Tensor] = []
    losses = client_half._losses
    monkeypatch.setattr(client_half, "_losses", lambda *a: measured.append(losses(*a)) or measured[-1])
    weighed: list[torch.Tensor] = []
    shares = client_half.shares
    monkeypatch.setattr(client_half, "shares", lambda w: weighed.append(w) or shares(w))
    job = Job(setup.config, setup.model, setup.streams, 2, 0, setup.model.parameters.clone(), {}, personal)
    outcome = client_half.update(job, Broadcast(), state, images)
    close(torch.cat(measured), case["losses"])
    close(weighed[0], case["weights"], rtol=1e-4)
    close(outcome.update.weights, case["affinity"][1:4], rtol=1e-4)
    found = shares(weighed[0])
    if case["models_mixed"] != [0] or case["weights"][0] > 0:
        close(found[case["models_mixed"]], case["shares"], rtol=1e-4)
    assert int((found > 0).sum()) == sum(w > 0 for w in case["weights"])
    close(outcome.state.start, case["mixture"], rtol=1e-4)
