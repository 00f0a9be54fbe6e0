"""FedGen against numbers that the authors' own code gave (zhuangdizhu/FedGen @ dd5807c), and losses by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import clients.fedgen as client_half
import strategies.fedgen as server_half
from clients.training import Job, Outcome
from fedkd.config import Config
from fedkd.data import Images, Shard
from fedkd.data.federated import _own_label_test
from fedkd.data.partition import fedgen_partition
from fedkd.losses import cross_entropy, diversity, kl, mean_teacher, weighted_teachers
from fedkd.methods.fedgen import Broadcast, Update
from fedkd.setup import Setup

Case = dict[str, Any]

AUTHORS: Case = json.loads((Path(__file__).parent / "fixtures" / "fedgen_authors.json").read_text(encoding="utf-8"))
"""What the authors' code gave, and how it was asked: see its ``source``."""
CLIENT: Case = AUTHORS["client"]
SPLIT: Case = AUTHORS["split"]


def named(cases: list[Case], key: str = "name") -> Any:
    """Parametrize a test by the recorded cases."""
    return pytest.mark.parametrize("case", cases, ids=[str(case[key]).replace(" ", "-") for case in cases])


def pattern(seed: int, *shape: int) -> torch.Tensor:
    """Return the values in [0, 1) that the fixture names by a seed; integer arithmetic, so equal everywhere."""
    i = torch.arange(1, math.prod(shape) + 1) + 1000 * seed
    return (((31 * i * i + 17 * i) % 10007).double() / 10007).float().reshape(shape)


def close(actual: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Compare with a recorded number, or nested list of numbers."""
    actual = torch.as_tensor(actual).double()
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=rtol, atol=atol)


# The loss functions alone.


@named(AUTHORS["diversity"])
def test_diversity_is_the_authors(case: Case) -> None:
    """The paper has no formula, so the released one is the definition; features of any rank, and its maximum 1."""
    close(diversity(torch.tensor(case["noise"]), torch.tensor(case["features"])), case["loss"], atol=0)


@named(AUTHORS["teacher"])
def test_teacher_loss_is_the_authors(case: Case) -> None:
    """The released code multiplies [batch] by [batch, 1]: a user's mean share weighs its mean cross-entropy."""
    weights = torch.tensor(case["label_weights"])
    close(weighted_teachers(torch.tensor(case["logits"]), torch.tensor(case["labels"]), weights), case["loss"], atol=0)


# The server half: three users whose last stage takes 5 features, three classes, 6 hidden units, 4 noise values.


def small_setup(steps: int) -> Setup:
    """Return the workspaces of the recorded generator cases."""
    flat = {"run.method": "fedgen", "run.clients": 3, "run.clients-per-round": 0, "model.name": "mlp"}
    flat |= {"model.hidden": 5, "fedgen.variant": "authors", "fedgen.noise": 4, "fedgen.hidden": 6}
    flat |= {"fedgen.generator-steps": steps, "fedgen.generator-batch": 8}
    return Setup.build(Config.from_flat(flat), (1, 2, 2), 3, torch.device("cpu"))


def small_state(setup: Setup, case: Case) -> server_half.State:
    """Return the first state, with the recorded generator in it."""
    state = server_half.init(setup).tensors()
    size = len(state["generator"])
    return server_half.State(**state | {"generator": pattern(case["generator_seed"], size) - 0.5})


def updates_of(recorded: Case, size: int) -> list[Update]:
    """Return what the three users of a recorded round send."""
    return [
        Update(
            parameters=4 * pattern(seed, size) - 2,
            statistics=torch.zeros(0),
            examples=torch.tensor(examples),
            label_counts=torch.tensor(drawn),
        )
        for seed, examples, drawn in zip(recorded["user_seeds"], recorded["examples"], recorded["drawn"], strict=True)
    ]


def feed(monkeypatch: pytest.MonkeyPatch, half: Any, labels: list[list[int]], noise: list[torch.Tensor]) -> None:
    """Let a half draw the recorded labels and noise, in this order."""
    waiting_labels, waiting_noise = iter(labels), iter(noise)

    def draw_labels(probabilities: torch.Tensor, count: int, rng: torch.Generator) -> torch.Tensor:
        drawn = torch.tensor(next(waiting_labels))
        assert len(drawn) == count
        return drawn

    def draw_noise(variant: str, shape: tuple[int, int], rng: torch.Generator) -> torch.Tensor:
        drawn = next(waiting_noise)
        assert (variant, drawn.shape) == ("authors", shape)
        return drawn

    monkeypatch.setattr(half, "draw_labels", draw_labels)
    monkeypatch.setattr(half, "draw_noise", draw_noise)


@named(AUTHORS["generator"])
def test_label_weights_and_labels_are_the_authors(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's share of a class counts from 1, and only classes that someone drew are generated, all equally often."""
    shares: list[torch.Tensor] = []
    asked: list[torch.Tensor] = []

    def spy_loss(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, per_example: bool) -> torch.Tensor:
        shares.append(weights)
        return weighted_teachers(logits, labels, weights, per_example)

    def spy_labels(probabilities: torch.Tensor, count: int, rng: torch.Generator) -> torch.Tensor:
        asked.append(probabilities / probabilities.sum())
        return torch.zeros(count, dtype=torch.int64)

    monkeypatch.setattr(server_half, "weighted_teachers", spy_loss)
    monkeypatch.setattr(server_half, "draw_labels", spy_labels)
    setup = small_setup(steps=1)
    state = small_state(setup, case)
    for number, recorded in enumerate(case["rounds"], start=1):
        server_half.update(setup, state, updates_of(recorded, case["parameters"]), number)
        close(shares[-1], recorded["label_weights"])
        classes = recorded["qualified"]
        close(asked[-1], [1 / len(classes) if c in classes else 0.0 for c in range(3)])


@named(AUTHORS["generator"])
def test_first_generator_gradient_is_the_authors(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient in every layer checks both losses, the heads of all users and the generator's own layers."""
    setup, recorded = small_setup(steps=1), case["rounds"][0]
    feed(monkeypatch, server_half, recorded["labels"], list(pattern(recorded["noise_seed"], 3, 8, 4)))
    updates = updates_of(recorded, case["parameters"])
    _, metrics = server_half.update(setup, small_state(setup, case), updates, 1)
    close(metrics["diversity_loss"], (recorded["diversity_loss"][0], 1.0))
    close(metrics["teacher_loss"], (recorded["teacher_loss"][0], 1.0))
    close(metrics["teacher_loss"][0] + metrics["diversity_loss"][0], recorded["total"][0])
    close(setup.extras["generator"].gradient, recorded["first_gradient"])


@named(AUTHORS["generator"])
def test_two_rounds_of_the_server_are_the_authors(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam runs on one vector and is rebuilt every round from the state: moments, steps and rate must carry over."""
    setup = small_setup(steps=3)
    state = small_state(setup, case)
    for number, recorded in enumerate(case["rounds"], start=1):
        feed(monkeypatch, server_half, recorded["labels"], list(pattern(recorded["noise_seed"], 3, 8, 4)))
        state, metrics = server_half.update(setup, state, updates_of(recorded, case["parameters"]), number)
        close(state.parameters, recorded["averaged"])
        assert int(state.adam_steps) == 3 * number
        for name in ("teacher_loss", "diversity_loss"):
            close(metrics[name], (sum(recorded[name]), 3.0))
        close(state.generator, recorded["generator"])
        close(state.generator_statistics, recorded["statistics"])
        close(state.adam_mean, recorded["adam_mean"])
        close(state.adam_square, recorded["adam_square"], atol=1e-9)


# The client half: one step of the classifier for MNIST on six images.


def client_setup() -> Setup:
    """Return the workspaces of the recorded client step."""
    flat = {"run.method": "fedgen", "model.name": "fedgen_cnn", "fedgen.variant": "authors", "train.lr": 0.01}
    flat |= {"train.batch-size": CLIENT["batch"], "fedgen.batch": CLIENT["generated_batch"]}
    flat |= {"fedgen.alpha": CLIENT["alpha"], "fedgen.beta": CLIENT["beta"], "fedgen.decay": CLIENT["decay"]}
    flat |= {"train.lr-decay": 0.99, "train.lr-decay-from": "last-participation"}
    return Setup.build(Config.from_flat(flat), (1, 28, 28), 10, torch.device("cpu"))


def job_of(setup: Setup, round: int) -> Job:
    """Return a client's job in a round (from 1)."""
    return Job(setup.config, setup.model, setup.streams, round, 0, setup.model.parameters.clone(), setup.extras)


def client_step(setup: Setup, round: int, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """Train on the recorded batch with the recorded draws."""
    seeds, y = CLIENT["seeds"], torch.tensor(CLIENT["labels"])
    x = 2 * pattern(seeds["images"], len(y), 1, 28, 28) - 1
    monkeypatch.setattr(Job, "batches", lambda job, shard: iter([(x, y)]))
    sampled = CLIENT["sampled"]
    noise = [pattern(seeds["noise_real"], len(y), 32), pattern(seeds["noise_sampled"], len(sampled), 32)]
    feed(monkeypatch, client_half, [sampled], noise)
    broadcast = Broadcast(
        parameters=pattern(seeds["model"], setup.sizes["parameters"]) - 0.5,
        statistics=torch.zeros(0),
        generator=pattern(seeds["generator"], setup.sizes["generator"]) - 0.5,
        generator_statistics=torch.cat(
            [pattern(seeds["generator_mean"], 256) - 0.5, pattern(seeds["generator_variance"], 256) + 0.5]
        ),
        label_probabilities=torch.full((10,), 0.1),
    )
    shard = Shard(torch.zeros(len(y), 1, 28, 28, dtype=torch.uint8), y, torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    return client_half.update(job_of(setup, round), broadcast, None, shard)


def test_sizes_are_the_authors() -> None:
    """Communication is compared in bytes, so classifier and generator must have the authors' sizes."""
    sizes = client_setup().sizes
    assert (sizes["parameters"], sizes["generator"]) == (26434, 19744)
    assert AUTHORS["parameter_counts"] == {"model": 26434, "generator": 19744}


@named(CLIENT["steps"], key="round_index")
def test_client_step_is_the_authors(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """All three terms with their weights, and none but the first in the first round, which the authors call 0."""
    setup, round = client_setup(), case["round_index"] + 1
    update, state, metrics = client_step(setup, round, monkeypatch)
    recorded = {
        "loss": case["predictive_loss"],
        "latent_loss": case["latent_loss"],
        "generated_loss": case["generated_loss"],
    }
    means = {name: total / weight for name, (total, weight) in metrics.items()}
    assert set(means) == {name for name, value in recorded.items() if value is not None}
    for name, mean in means.items():
        close(mean, recorded[name])
    alpha, beta = client_half._weights(setup.hyper, round)
    ratio = CLIENT["generated_batch"] / CLIENT["batch"]
    total = means["loss"] + beta * means.get("latent_loss", 0.0) + ratio * alpha * means.get("generated_loss", 0.0)
    close(total, case["total"])
    assert isinstance(update, Update)
    start, scale = pattern(CLIENT["seeds"]["model"], setup.sizes["parameters"]) - 0.5, case["gradient_norm"]
    gradient = (start.double() - update.parameters.double()) / case["lr"]
    close(gradient.norm(), scale)
    close(gradient[:60], case["first_gradient"], atol=1e-6 * scale)
    close(gradient[-330:], case["head_gradient"], atol=1e-6 * scale)
    close(update.parameters[:60], case["first"], atol=1e-8 * scale)
    close(update.parameters[-330:], case["head"], atol=1e-8 * scale)
    close(state.tensors()["statistics"], case["statistics"])
    assert (update.label_counts + 1).tolist() == case["label_counts"]


def test_client_weights_decay_to_the_authors_floor() -> None:
    """The weights fall by 2 % a round and stop at 1e-4, where 200 rounds do not reach but longer runs do."""
    hyper = client_setup().hyper
    for recorded in CLIENT["weights"]:
        weights = client_half._weights(hyper, recorded["round_index"] + 1)
        assert weights == pytest.approx((recorded["weight"], recorded["weight"]), rel=1e-12)


def test_learning_rate_follows_the_previous_participation() -> None:
    """The authors' scheduler is set after training, so a client's rate lags behind the round."""
    setup, last = client_setup(), 0
    for round_index, rate in CLIENT["learning_rates"]:
        assert dataclasses.replace(job_of(setup, round_index + 1), last_round=last).learning_rate() == pytest.approx(
            rate, rel=1e-12
        )
        last = round_index + 1


# The split: its draws depend on the size of each class alone, so MNIST's images are not needed.


@named(SPLIT["cases"], key="alpha")
def test_split_is_the_authors(case: Case) -> None:
    """Their tables depend on this one draw, so who holds which image, and each client's test labels, must be theirs."""
    train_sizes, test_sizes = SPLIT["train_class_sizes"], SPLIT["test_class_sizes"]
    train_y, test_y = np.repeat(np.arange(10), train_sizes), np.repeat(np.arange(10), test_sizes)
    parts = fedgen_partition(train_y, SPLIT["users"], case["alpha"], SPLIT["ratio"], SPLIT["min_size"], SPLIT["seed"])
    assert [len(part) for part in parts] == case["samples"]
    assert [np.bincount(train_y[part], minlength=10).tolist() for part in parts] == case["histogram"]
    within_class = np.arange(len(train_y)) - np.repeat(np.cumsum([0, *train_sizes[:-1]]), train_sizes)
    assert [int(within_class[part].sum()) for part in parts] == case["position_sums"]
    assert len(np.unique(np.concatenate(parts))) == sum(case["samples"])

    none = np.zeros(0, dtype=np.int64)
    pixels = np.zeros((0, 1, 28, 28), dtype=np.uint8)
    names = tuple("0123456789")
    images = Images("mnist", pixels, train_y, pixels, test_y, none, none, names, 255, (0.13,), (0.31,))
    tests = [test_y[part - len(train_y)] for part in _own_label_test(images, parts)]
    assert [np.bincount(labels, minlength=10).tolist() for labels in tests] == case["test_histogram"]
    assert sum(map(len, tests)) == case["test_total"]


# By hand: the paper's Eq. 4 and the KL, which the released code does not have in this form.


def test_mean_teacher_is_the_cross_entropy_of_the_averaged_logits() -> None:
    """Eq. 4 averages logits before the softmax: one user's certainty outweighs another's doubt."""
    logits = torch.tensor([[[3.0, 0.0]], [[-1.0, 0.0]]])  # mean: [1, 0]
    close(mean_teacher(logits, torch.tensor([0])), math.log1p(math.exp(-1.0)))
    close(mean_teacher(logits, torch.tensor([1])), 1.0 + math.log1p(math.exp(-1.0)))
    rows = torch.tensor([[[2.0, 0.0, 1.0], [0.0, 0.0, 0.0]], [[0.0, 2.0, 1.0], [0.0, 4.0, 0.0]]])
    by_hand = [math.log(3.0), math.log(2.0 + math.exp(2.0)) - 2.0]  # of [1, 1, 1] and [0, 2, 0]
    close(mean_teacher(rows, torch.tensor([0, 1])), sum(by_hand) / 2)


def test_mean_teacher_is_not_the_released_loss() -> None:
    """The two readings agree for one user and differ for users who disagree, even with equal shares (Jensen)."""
    logits, labels = torch.tensor([[[3.0, 0.0]], [[-1.0, 0.0]]]), torch.tensor([0])
    halves = torch.full((2, 2), 0.5)
    separately = (math.log1p(math.exp(-3.0)) + math.log1p(math.exp(1.0))) / 2
    close(weighted_teachers(logits, labels, halves), separately)
    assert float(mean_teacher(logits, labels)) < separately - 0.3
    close(mean_teacher(logits[:1], labels), float(weighted_teachers(logits[:1], labels, torch.ones(2, 1))))


def test_kl_is_zero_at_equal_softmaxes_only() -> None:
    """A student that matches its teacher pays nothing, whatever the offset of its logits, and otherwise pays."""
    target = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 4.0]], dtype=torch.float64)
    for temperature in (0.5, 1.0, 4.0):
        close(kl(target, target + 7.0, temperature), [0.0, 0.0], atol=1e-12)
        assert bool((kl(target, target.flip(1), temperature) > 0.05).all())


def test_kl_by_hand() -> None:
    """The teacher is the first argument: KL(p || q) is not symmetric; here p = (2/3, 1/3) and q = (1/2, 1/2)."""
    skewed, even = torch.tensor([[math.log(2.0), 0.0]]), torch.zeros(1, 2)
    close(kl(skewed, even), [2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)])
    close(kl(even, skewed), [0.5 * math.log(3 / 4) + 0.5 * math.log(3 / 2)])
    close(kl(2 * skewed, 2 * even, temperature=2.0), 4 * kl(skewed, even).numpy())


def test_kl_at_large_temperature_is_half_the_mean_square_of_centred_logits() -> None:
    """The factor T^2 keeps the loss, and so its weight, comparable between temperatures (Hinton et al. 2015)."""
    target = torch.tensor([[1.0, -2.0, 0.5, 3.0]], dtype=torch.float64)
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]], dtype=torch.float64)
    difference = target - logits
    limit = (difference - difference.mean()).square().mean() / 2
    close(kl(target, logits, temperature=1e4), [float(limit)], rtol=1e-3)


def test_kl_sends_its_gradient_to_the_student_alone() -> None:
    """The teacher must not learn from the student: the student's gradient is q - p, the teacher's is none."""
    target = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
    logits = torch.tensor([[0.0, 2.0, 0.0]], requires_grad=True)
    kl(target, logits).sum().backward()
    assert target.grad is None
    assert logits.grad is not None
    close(logits.grad, (logits.softmax(1) - target.softmax(1)).tolist())


def test_cross_entropy_by_hand() -> None:
    """Per row and in nats: log 2 for an even guess between two classes."""
    close(
        cross_entropy(torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]]), torch.tensor([1, 0])),
        [
            math.log(2.0),
            math.log(4 / 3),
        ],
    )
