"""FedGen: the paper's Eq. 4 and Eq. 5 written out, and which labels and which noise each variant draws."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import tiny
from torch.nn import functional

import clients.fedgen as client_half
import strategies.fedgen as server_half
from clients.training import Job
from fedkd.data import Shard
from fedkd.methods.fedgen import Broadcast, Update
from fedkd.setup import Setup

VARIANTS = ("paper", "authors")
EMPTY = torch.zeros(0)
CLASSES, HIDDEN, NOISE = 3, 5, 2


def small(**flat: Any) -> Setup:
    """Return the workspaces for images of 2x2 and three classes; an MLP, whose head takes what is generated."""
    sizes = {"model.name": "mlp", "model.hidden": HIDDEN, "fedgen.noise": NOISE, "fedgen.hidden": 6}
    return Setup.build(tiny("fedgen", **{**sizes, **flat}), (1, 2, 2), CLASSES, torch.device("cpu"))


def random(*shape: int, seed: int) -> torch.Tensor:
    """Return normal values of the default precision."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def updates_of(setup: Setup, counts: list[list[int]]) -> list[Update]:
    """Return random models that have drawn these labels."""
    return [
        Update(
            parameters=random(setup.sizes["parameters"], seed=k),
            statistics=EMPTY,
            examples=torch.tensor(10 + 20 * k),
            label_counts=torch.tensor(row),
        )
        for k, row in enumerate(counts)
    ]


@pytest.mark.usefixtures("double_precision")
def test_the_papers_server_step_by_hand() -> None:
    """Eq. 4 in round 3: ``min_w E [CE(1/K sum_k g(G_w(y, eps); theta_k), y)]``, y ~ p(y), eps ~ N(0, I).

    p(y) is the clients' share of the labels drawn.  The diversity loss ``exp(-mean_ij |eps_i - eps_j|^2 / d_eps
    |z_i - z_j|_1 / d)`` comes on top, Adam's rate has decayed twice, and the models are averaged with equal weights.
    """
    steps: dict[str, Any] = {"fedgen.generator-steps": 3, "fedgen.generator-batch": 8, "fedgen.generator-lr": 0.04}
    steps |= {"fedgen.generator-lr-decay": 0.5, "fedgen.generator-weight-decay": 0.1, "fedgen.diversity": 0.7}
    setup = small(**{"fedgen.variant": "paper", **steps})
    updates = updates_of(setup, [[30, 0, 2], [6, 1, 0], [1, 0, 0]])
    heads = [setup.model.unflatten(u.parameters) for u in updates]
    generator = copy.deepcopy(setup.extras["generator"].module).train()
    adam = torch.optim.Adam(generator.parameters(), lr=0.04 * 0.5**2, weight_decay=0.1)
    rng, labels, losses = setup.streams.torch("generator-training", 3), torch.tensor([37.0, 1.0, 2.0]) / 40, []
    for _ in range(3):
        y = torch.multinomial(labels.float(), 8, replacement=True, generator=rng)
        eps = torch.randn(8, NOISE, generator=rng)
        z = generator(eps, y)
        logits = sum(z @ head["stages.head.weight"].T + head["stages.head.bias"] for head in heads) / 3
        products = [(eps[i] - eps[j]).square().mean() * (z[i] - z[j]).abs().mean() for i in range(8) for j in range(8)]
        teacher, diverse = functional.cross_entropy(logits, y), torch.exp(-sum(products) / 64)
        adam.zero_grad()
        (teacher + 0.7 * diverse).backward()
        adam.step()
        losses.append((float(teacher.detach()), float(diverse.detach())))
    state, metrics = server_half.update(setup, server_half.init(setup), updates, 3)
    expected = torch.cat([p.detach().flatten() for p in generator.parameters()])
    torch.testing.assert_close(state.generator, expected, rtol=1e-6, atol=1e-7)
    for name, values in zip(("teacher_loss", "diversity_loss"), zip(*losses, strict=True), strict=True):
        assert metrics[name] == pytest.approx((sum(values), 3), rel=1e-6)
    torch.testing.assert_close(state.parameters, torch.stack([u.parameters for u in updates]).mean(dim=0))


@pytest.mark.parametrize(
    ("variant", "first", "second"),
    [("paper", [3 / 4, 1 / 4, 0], [0, 1 / 4, 3 / 4]), ("authors", [1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3])],
)
def test_clients_are_told_which_labels_there_are(variant: str, first: list[float], second: list[float]) -> None:
    """paper: p(y) of the round's counts; authors: all classes drawn so far, each with the same probability."""
    setup = small(**{"fedgen.variant": variant})
    told = []
    state = server_half.init(setup)
    for round, counts in enumerate(([[3, 1, 0], [0, 0, 0]], [[0, 1, 2], [0, 0, 1]]), start=1):
        state, _ = server_half.update(setup, state, updates_of(setup, counts), round)
        told.append(server_half.broadcast(setup, state, round + 1).label_probabilities.tolist())
    assert told == [pytest.approx(first), pytest.approx(second)]


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_local_step_by_hand(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eq. 5: ``theta <- theta - lr grad [CE(f(x), y) + w CE(h(G(y~, eps)), y~)]``, y~ from what the server sent.

    paper: w is ``eq5-weight``, eps ~ N(0, I).  authors (third round, without the KL): w is alpha decayed twice times
    the ratio of the batches, eps is uniform on [0, 1).
    """
    flat = {"fedgen.variant": variant, "fedgen.eq5-weight": 0.7, "fedgen.alpha": 2.0, "fedgen.beta": 0.0}
    flat |= {"fedgen.decay": 0.5, "fedgen.batch": 24, "train.batch-size": 6, "train.lr": 0.5, "train.lr-decay": 1.0}
    setup = small(**flat)
    weight, draw = {"paper": (0.7, torch.randn), "authors": (24 / 6 * 2 * 0.5**2, torch.rand)}[variant]
    x, y = random(6, 1, 2, 2, seed=0), torch.tensor([0, 1, 2, 2, 0, 1])
    monkeypatch.setattr(Job, "batches", lambda *_: iter([(x, y)]))
    start, told = setup.model.parameters.clone(), torch.tensor([0.85, 0.0, 0.15])
    generator = setup.extras["generator"]
    broadcast = Broadcast(start, EMPTY, generator.parameters.clone(), generator.statistics.clone(), told)

    rng = setup.streams.torch("generated", 3, 1)
    asked = torch.multinomial(told, 24, replacement=True, generator=rng)
    features = copy.deepcopy(generator.module).eval()(draw(24, NOISE, generator=rng), asked).detach()
    theta = {name: view.clone().requires_grad_() for name, view in setup.model.unflatten(start).items()}
    hidden = torch.relu(x.flatten(1) @ theta["stages.hidden.1.weight"].T + theta["stages.hidden.1.bias"])
    real, generated = (z @ theta["stages.head.weight"].T + theta["stages.head.bias"] for z in (hidden, features))
    loss = functional.cross_entropy(real, y) + weight * functional.cross_entropy(generated, asked)
    gradients = torch.autograd.grad(loss, list(theta.values()))
    expected = start - 0.5 * torch.cat([gradient.flatten() for gradient in gradients])

    job = Job(setup.config, setup.model, setup.streams, 3, 1, start, setup.extras)
    shard = Shard(x, y, torch.zeros(1), torch.ones(1))
    update, _, metrics = client_half.update(job, broadcast, None, shard)
    torch.testing.assert_close(update.tensors()["parameters"], expected, rtol=1e-9, atol=1e-9)
    assert metrics["generated_loss"] == pytest.approx(
        (24 * float(functional.cross_entropy(generated, asked).detach()), 24)
    )
    assert update.tensors()["label_counts"].tolist() == [2, 2, 2]
