"""FedFTG: losses by derivation, the authors' numbers (ZhangLin-PKU/FedFTG @ 1e6347c), and its limits by base method."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny
from safetensors.torch import load_file
from torch.nn import functional
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import strategies.fedftg as server
from fedkd.config import Config, Scalar
from fedkd.data import federate
from fedkd.errors import UserError
from fedkd.losses import (
    class_level_distance,
    class_level_divergence,
    class_level_ensemble,
    cross_entropy,
    diversity_of_norms,
)
from fedkd.methods.fedftg import BASES, Hyper, ImageGenerator, records
from fedkd.results import Run
from fedkd.setup import Setup

RunInline = Callable[..., Run]
AUTHORS: dict[str, Any] = json.loads(
    (Path(__file__).parent / "fixtures" / "fedftg_authors.json").read_text(encoding="utf-8")
)
"""What the authors' code gave, and how it was asked: see its ``source``."""
CPU = torch.device("cpu")
VARIANTS = ("paper", "authors")


def pattern(seed: int, *shape: int) -> torch.Tensor:
    """Return the values in [0, 1) that the fixture names by a seed; integer arithmetic, so equal everywhere."""
    i = torch.arange(1, math.prod(shape) + 1) + 1000 * seed
    return (((31 * i * i + 17 * i) % 10007).double() / 10007).float().reshape(shape)


def close(actual: torch.Tensor, expected: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Compare with a recorded number, or list of numbers."""
    recorded = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.detach().double().reshape(recorded.shape), recorded, rtol=rtol, atol=atol)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return double-precision values with a gradient."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def alphas(clients: int, batch: int, seed: int = 9) -> torch.Tensor:
    """Return positive weights ``[clients, batch]`` that sum to one over the clients."""
    return torch.softmax(random(clients, batch, seed=seed).detach(), dim=0)


# The losses alone.


def test_the_papers_discrepancy_is_the_weighted_kl() -> None:
    """sum_k alpha_k sum_c p log(p / q), by its definition, in either direction, a value per row."""
    student, teachers, weights = random(4, 3), random(2, 4, 3, seed=1), alphas(2, 4)
    q, p = torch.softmax(student, 1), torch.softmax(teachers, 2)
    forward = sum(weights[k] * (p[k] * (p[k] / q).log()).sum(1) for k in range(2))
    backward = sum(weights[k] * (q * (q / p[k]).log()).sum(1) for k in range(2))
    torch.testing.assert_close(class_level_divergence(student, teachers, weights), forward)
    torch.testing.assert_close(class_level_divergence(student, teachers, weights, reverse=True), backward)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_papers_discrepancy_has_gradient_into_both_sides(reverse: bool) -> None:
    """The generator's maximum is over the images, on which both depend: finite differences in both arguments."""
    weights = alphas(2, 4)
    both = random(4, 3), random(2, 4, 3, seed=1)
    assert torch.autograd.gradcheck(lambda s, t: class_level_divergence(s, t, weights, reverse), both)


def test_the_released_discrepancy_is_a_mean_of_absolute_differences() -> None:
    """alpha_k times the mean over the classes on raw logits; the clients' models get no gradient."""
    student, teachers, weights = random(4, 3), random(2, 4, 3, seed=1), alphas(2, 4)
    value = class_level_distance(student, teachers, weights)
    expected = sum(weights[k] * (student - teachers[k]).abs().sum(1) / 3 for k in range(2))
    torch.testing.assert_close(value, expected)
    value.sum().backward()
    assert teachers.grad is None
    signs = (weights[..., None] * (student - teachers).sign() / 3).sum(0)
    torch.testing.assert_close(student.grad, signs.detach())


def test_the_student_losses_have_one_gradient() -> None:
    """CE(sum_k a_k softmax(t_k), s) and sum_k a_k KL(t_k || s) differ by a constant; both give softmax(s) - q."""
    student, teachers, weights = random(4, 3), random(2, 4, 3, seed=1), alphas(2, 4)
    (one,) = torch.autograd.grad(class_level_ensemble(student, teachers, weights).sum(), student)
    (other,) = torch.autograd.grad(class_level_divergence(student, teachers, weights).sum(), student)
    mixture = (weights[..., None] * torch.softmax(teachers, 2)).sum(0)
    torch.testing.assert_close(one, (torch.softmax(student, 1) - mixture).detach())
    torch.testing.assert_close(one, other)
    class_level_ensemble(student, teachers, weights).sum().backward()
    assert teachers.grad is None


def test_the_ensemble_mixes_probabilities_and_not_logits() -> None:
    """Two sure clients that contradict each other give even odds, whatever the size of their logits."""
    teachers = torch.tensor([[[9.0, 0.0]], [[0.0, 30.0]]])
    student = torch.tensor([[2.0, 0.0]])
    value = class_level_ensemble(student, teachers, torch.full((2, 1), 0.5))
    assert float(value) == pytest.approx(-0.5 * float(functional.log_softmax(student, 1).sum()), rel=1e-3)


@pytest.mark.parametrize("scaled", [False, True])
def test_the_papers_diversity_is_its_definition(scaled: bool) -> None:
    """exp(-mean of the products of the distances), i = j included; 1 for equal images, with a finite gradient."""
    noise, images = random(3, 2).detach() / 2, (random(3, 1, 2, 2, seed=1) / 2).detach().requires_grad_()
    rows = images.flatten(1)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            pair = (rows[i] - rows[j]).square().sum().sqrt(), (noise[i] - noise[j]).square().sum().sqrt()
            total += (pair[0] * pair[1] / (math.sqrt(4 * 2) if scaled else 1)).detach()
    torch.testing.assert_close(diversity_of_norms(noise, images, scaled), torch.exp(-total / 9))
    assert torch.autograd.gradcheck(lambda x: diversity_of_norms(noise, x, scaled), (images,))
    same = torch.ones(3, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    value = diversity_of_norms(noise, same, scaled)
    assert float(value.detach()) == 1
    value.backward()
    assert same.grad is not None
    assert bool(torch.isfinite(same.grad).all())


def test_the_papers_diversity_vanishes_at_the_size_of_images() -> None:
    """With unscaled norms the exponent is in the hundreds, so a user has to know that the term does nothing."""
    rng = torch.Generator().manual_seed(0)
    noise, images = torch.randn(50, 100, generator=rng), torch.randn(50, 1, 28, 28, generator=rng)
    assert float(diversity_of_norms(noise, images)) == 0
    assert 0.05 < float(diversity_of_norms(noise, images, scaled=True)) < 0.3


# The authors' numbers.


def network(vector: torch.Tensor, inputs: int, hidden: int, classes: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the fixture's small network on a vector of its parameters."""
    a, b, c, d = torch.split(vector, [inputs * hidden, hidden, hidden * classes, classes])

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x.flatten(1) @ a.reshape(hidden, inputs).T + b) @ c.reshape(classes, hidden).T + d

    return run


@pytest.mark.parametrize("case", AUTHORS["generator"], ids=lambda case: case["name"].replace(" ", "-"))
def test_the_generators_losses_are_the_authors(case: dict[str, Any]) -> None:
    """Each term of one client's loss, with its sign, and the gradient in the images (so every detach as well)."""
    counts, labels = torch.tensor(case["counts"]), torch.tensor(case["labels"])
    shares, size = server.class_shares(counts), 9 * 5 + 5 + 5 * 3 + 3
    noise, hyper = 2 * pattern(20, 6, 4) - 1, Hyper(variant="authors")
    for k, expected in enumerate(case["clients"]):
        images = (2 * pattern(1, 6, 1, 3, 3) - 1).requires_grad_()
        student, client = (network(1.5 * (2 * pattern(seed, size) - 1), 9, 5, 3)(images) for seed in (2, 3 + k))
        losses = server.generator_losses(hyper, student, client[None], labels, shares[k : k + 1], noise, images)
        total = server.generator_objective(hyper, losses, 1 / len(counts))
        close(-losses["discrepancy"], expected["md"])
        close(losses["classification"], expected["cls"])
        close(losses["diversity"], expected["ap"])
        close(total, expected["loss"])
        close(torch.autograd.grad(total, images)[0].flatten(), expected["gradient"])


@pytest.mark.parametrize("case", AUTHORS["labels"], ids=lambda case: "-".join(map(str, case["counts"])))
def test_label_sampling_is_the_authors(case: dict[str, Any]) -> None:
    """The histogram of a round's labels is fixed by the counts; only their order is random."""
    counts = torch.tensor(case["counts"])
    drawn = [server.draw_labels(counts, case["number"], torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    assert torch.bincount(drawn[0], minlength=len(counts)).tolist() == case["histogram"]
    assert torch.equal(*(labels.sort().values for labels in drawn))
    assert int((counts > 0).sum()) == 1 or not torch.equal(*drawn)


@pytest.mark.parametrize("case", AUTHORS["labels_rounded"], ids=lambda case: "-".join(map(str, case["counts"])))
def test_a_class_that_nobody_has_is_never_asked_for(case: dict[str, Any]) -> None:
    """The released code sums rounded shares, and now and then asks for an image of a class without examples."""
    assert case["counts"][-1] == 0
    assert case["histogram"][-1] == 1
    labels = server.draw_labels(torch.tensor(case["counts"]), case["number"], torch.Generator().manual_seed(0))
    assert int(labels.max()) < 5


@pytest.mark.parametrize("case", AUTHORS["generator_sizes"], ids=lambda case: f"{case['channels']}x{case['size']}")
def test_the_generator_has_the_authors_size(case: dict[str, Any]) -> None:
    """Parameters of the released generator, and images of the asked shape."""
    shape = (case["channels"], case["size"], case["size"])
    generator = ImageGenerator(case["noise"], case["classes"], 64, shape)
    assert sum(p.numel() for p in generator.parameters()) == case["parameters"]
    assert generator(torch.randn(2, case["noise"]), torch.tensor([0, 1])).shape == (2, *shape)


@pytest.mark.usefixtures("double_precision")
def test_the_whole_fine_tuning_is_the_authors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three iterations against three clients: order of the steps, both optimisers, both modes of the generator."""
    case = AUTHORS["server"]
    flat: dict[str, Scalar] = {
        "model.hidden": 4,
        "fedftg.variant": "authors",
        "fedftg.iterations": 3,
        "fedftg.batch": case["batch"],
        "fedftg.width": 2,
        "fedftg.server-lr": case["server_lr"],
        "fedftg.generator-lr": case["generator_lr"],
        "fedftg.server-weight-decay": case["weight_decay"],
    }
    setup = Setup.build(tiny("fedftg", **flat), (1, 8, 8), case["classes"], CPU)
    size, generator = setup.sizes["parameters"], setup.extras["generator"]
    calls = iter(range(3))
    monkeypatch.setattr(server, "draw_labels", lambda *_: torch.tensor(case["labels"]))
    monkeypatch.setattr(server, "draw_noise", lambda *_: 4 * pattern(70 + next(calls), case["batch"], 100).double() - 2)
    updates = [
        records(setup.hyper)["Update"](
            parameters=0.5 * (2 * pattern(60 + k, size).double() - 1),
            statistics=torch.zeros(0),
            examples=torch.tensor(sum(counts)),
            class_counts=torch.tensor(counts),
        )
        for k, counts in enumerate(case["counts"])
    ]
    fields = {
        "parameters": 0.5 * (2 * pattern(50, size).double() - 1),
        "statistics": torch.zeros(0),
        "generator": 0.3 * (2 * pattern(40, setup.sizes["generator"]).double() - 1),
        "generator_statistics": generator.statistics.clone(),
    }
    after, metrics = server._fine_tune(setup, fields, updates, 1)
    recorded = torch.tensor(case["generator_losses"])
    signs = {"discrepancy": -1, "classification": 1, "diversity": 1}
    for column, (name, sign) in enumerate(signs.items(), start=1):
        close(torch.tensor(metrics[f"generator_{name}"][0]), sign * float(recorded[:, column].sum()))
    for name, theirs in (("parameters", "student"), ("generator", "generator")):
        close(after[name], case[theirs])
    close(after["generator_statistics"], case["generator_statistics"])


# The paper's game, written out.


def divergence(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(softmax(one) || softmax(other)) of logits by its definition, per row."""
    p, q = torch.softmax(one, dim=1), torch.softmax(other, dim=1)
    return (p * (p.log() - q.log())).sum(dim=1)


def with_parameters(module: torch.nn.Module, vector: torch.Tensor) -> torch.nn.Module:
    """Return a copy of a module with the parameters of a vector."""
    module = copy.deepcopy(module)
    vector_to_parameters(vector.clone(), module.parameters())
    return module


def norms(z: torch.Tensor, x: torch.Tensor, scale: float) -> torch.Tensor:
    """``exp(-mean_ij ||x_i - x_j||_2 ||z_i - z_j||_2 / scale)``, i = j included."""
    pairs = itertools.permutations(range(len(z)), 2)
    return torch.exp(-sum(torch.dist(x[i], x[j]) * torch.dist(z[i], z[j]) for i, j in pairs) / len(z) ** 2 / scale)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("direction", ["client-model", "model-client"])
@pytest.mark.parametrize("distance", ["norms", "scaled"])
def test_the_papers_fine_tuning_by_hand(distance: str, direction: str) -> None:
    """Two iterations in round 3 against two clients, by autograd alone.

    With alpha_k^y = n_k^y / sum_i n_i^y, the generator descends ``-L_md + l_cls L_cls + l_dis L_dis``, the model L_md:
    ``L_md = mean_i sum_k alpha_k^{y_i} KL(w_k || w)``, ``L_cls = mean_i sum_k alpha_k^{y_i} CE(w_k, y_i)``,
    ``L_dis = exp(-mean_ij ||x_i - x_j||_2 ||z_i - z_j||_2)``; z ~ N(0, I), and both rates have decayed twice.
    """
    flat: dict[str, Scalar] = {"fedftg.diversity-distance": distance, "fedftg.divergence": direction}
    flat |= {"fedftg.variant": "paper", "model.hidden": 4, "fedftg.batch": 6, "fedftg.noise": 2, "fedftg.width": 2}
    flat |= {"fedftg.mining": 0.7, "fedftg.classification": 1.3, "fedftg.diversity": 1.6, "fedftg.student-steps": 2}
    flat |= {"fedftg.server-lr": 0.2, "fedftg.generator-lr": 0.04, "fedftg.lr-decay": 0.5}
    setup = Setup.build(tiny("fedftg", **flat, **{"fedftg.server-weight-decay": 0.1}), (1, 2, 2), 3, CPU)
    generator = setup.extras["generator"]
    start, *vectors = (random(setup.sizes["parameters"], seed=seed).detach() for seed in (1, 2, 3))
    counts = torch.tensor([[5, 0, 1], [1, 4, 1]])
    alpha = torch.tensor([[5 / 6, 0, 1 / 2], [1 / 6, 1, 1 / 2]])
    model, *clients = (with_parameters(setup.staged, vector) for vector in (start, *vectors))
    images_of = with_parameters(generator.module, generator.parameters)
    adam = torch.optim.Adam(images_of.parameters(), lr=0.04 * 0.5**2)
    sgd = torch.optim.SGD(model.parameters(), lr=0.2 * 0.5**2, weight_decay=0.1)

    def apart(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        pairs = [(client(x), model(x))[:: 1 if direction == "client-model" else -1] for client in clients]
        return sum(alpha[k, y] * divergence(*pair) for k, pair in enumerate(pairs)).mean()

    rng = setup.streams.torch("fine-tuning", 3)
    losses, right = [], []
    for y in server.draw_labels(counts.sum(dim=0), 12, rng).split(6):
        z = torch.randn(6, 2, generator=rng)
        x = images_of.train()(z, y)
        taught = sum(alpha[k, y] * functional.cross_entropy(w(x), y, reduction="none") for k, w in enumerate(clients))
        losses.append((apart(x, y), taught.mean(), norms(z, x, math.sqrt(4 * 2) if distance == "scaled" else 1)))
        adam.zero_grad()
        (-0.7 * losses[-1][0] + 1.3 * losses[-1][1] + 1.6 * losses[-1][2]).backward()
        adam.step()
        x = images_of.eval()(z, y).detach()
        for _ in range(2):
            sgd.zero_grad()
            apart(x, y).backward()
            sgd.step()
        guesses = [client(x).argmax(dim=1).tolist() for client in clients]
        right += [sum(float(alpha[k, c]) for k in range(2) if guesses[k][i] == c) for i, c in enumerate(y.tolist())]
    kind, none = records(setup.hyper)["Update"], torch.zeros(0)
    updates = [
        kind(parameters=vector, statistics=none, examples=torch.tensor(6), class_counts=count)
        for vector, count in zip(vectors, counts, strict=True)
    ]
    fields = {"parameters": start, "statistics": none, "generator": generator.parameters.clone()}
    fields["generator_statistics"] = generator.statistics.clone()
    after, metrics = server._fine_tune(setup, fields, updates, 3)
    close(after["parameters"], parameters_to_vector(model.parameters()).tolist(), rtol=1e-6, atol=1e-7)
    close(after["generator"], parameters_to_vector(images_of.parameters()).tolist(), rtol=1e-6, atol=1e-7)
    for name, values in zip(("discrepancy", "classification", "diversity"), zip(*losses, strict=True), strict=True):
        assert metrics[f"generator_{name}"] == pytest.approx((float(sum(values).detach()), 2), rel=1e-9)
    assert metrics["teacher_accuracy"] == pytest.approx((sum(right) / 6, 2))
    assert sum(right) / 12 not in (0, 0.5, 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_generator_learns_what_its_labels_mean(run_inline: RunInline, variant: str) -> None:
    """How often the clients, weighted by alpha, see the asked label in its image rises over the rounds."""
    rows = run_inline("fedftg", **{"fedftg.variant": variant}).rows("rounds")
    accuracies = [row["teacher_accuracy_sum"] / row["teacher_accuracy_weight"] for row in rows]
    assert accuracies[-1] > accuracies[0] + 0.1


# Structure.


def round_of(base: str = "fedavg", clients: int = 3, spread: float = 0.1, **flat: Any) -> tuple[Setup, Any, list[Any]]:
    """Return a server's set-up, its first state, and updates to it that are ``spread`` apart."""
    config = tiny("fedftg", **{"fedftg.base": base, **flat})
    data = federate(config)
    setup = Setup.build(config, data.images.shape, data.classes, CPU)
    state = server.init(setup)
    rng = torch.Generator().manual_seed(0)
    kind = records(config.hyper)["Update"]  # type: ignore[arg-type]
    updates = []
    for n in range(clients):
        values = {name: torch.zeros(spec.resolve(setup.sizes)) for name, spec in kind.specs().items()}
        values |= {
            "parameters": state.parameters + spread * torch.randn(state.parameters.shape, generator=rng),
            "statistics": state.statistics,
            "examples": torch.tensor(10 + n),
            "class_counts": torch.randint(0, 9, (setup.classes,), generator=rng),
        }
        updates.append(kind(**values))
    return setup, state, updates


def test_class_weights_sum_to_one_for_every_class_there_is() -> None:
    """And are zero for a client without the class, and everywhere for a class that nobody has."""
    counts = torch.tensor([[3, 0, 0], [1, 5, 0]])
    shares = server.class_shares(counts)
    assert shares.sum(dim=0).tolist() == [1, 1, 0]
    assert shares.tolist() == [[0.75, 0, 0], [0.25, 1, 0]]


def test_the_teachers_are_the_clients_own_models() -> None:
    """Stacked evaluation gives each client's logits, with its own averaged BatchNorm statistics."""
    setup, state, updates = round_of(**{"model.name": "fedgen_cnn", "model.norm-statistics": "averaged"})
    updates = [dataclasses.replace(u, statistics=state.statistics + n + 0.5) for n, u in enumerate(updates)]
    images = torch.randn(5, 1, 8, 8)
    stack = torch.stack([u.parameters for u in updates]), torch.stack([u.statistics for u in updates])
    for update, logits in zip(updates, server.stacked(setup, *stack)(images), strict=True):
        setup.model.load(update.parameters, update.statistics)
        torch.testing.assert_close(setup.staged.eval()(images), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_clients_teach_nothing(variant: str) -> None:
    """When every client's model is the global one, L_md is 0 and L_D has gradient zero: nothing moves it."""
    still = {"fedftg.server-weight-decay": 0.0, "fedftg.variant": variant}
    setup, state, updates = round_of(spread=0.0, **still)
    updates = [dataclasses.replace(u, class_counts=u.class_counts + 1) for u in updates]
    after, metrics = server.update(setup, state, updates, 1)
    assert metrics["generator_discrepancy"][0] == pytest.approx(0, abs=1e-4)
    torch.testing.assert_close(after.parameters, state.parameters, rtol=0, atol=2e-6)
    assert not torch.equal(after.generator, state.generator)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("alone", ["discrepancy", "classification", "diversity", "all"])
def test_a_generator_step_goes_the_right_way(variant: str, alone: str) -> None:
    """Against a frozen model, on the same noise and labels: more disagreement, less cross-entropy, more diversity.

    As released the client's logits are constants in the discrepancy, so there the model moves away from where the
    client was.
    """
    weights = {"discrepancy": "mining", "classification": "classification", "diversity": "diversity"}
    zero = {f"fedftg.{weights[name]}": 0.0 for name in weights if alone not in (name, "all")}
    setup, state, updates = round_of(
        clients=1, spread=0.3, **{"fedftg.variant": variant, "fedftg.diversity-distance": "scaled", **zero}
    )
    hyper, generator = setup.hyper, setup.extras["generator"]
    generator.load(state.generator, state.generator_statistics)
    shares, rng = server.class_shares(updates[0].class_counts[None] + 1), torch.Generator().manual_seed(1)
    labels, noise = torch.randint(0, 10, (50,), generator=rng), torch.randn(50, 100, generator=rng)
    rows = torch.stack((state.parameters, updates[0].parameters)), torch.zeros(2, 0)

    def measure(client: torch.Tensor | None = None) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        images = generator(noise, labels)
        logits = server.stacked(setup, *rows)(images).detach()
        client = logits[1:] if client is None else client
        losses = server.generator_losses(hyper, logits[0], client, labels, shares, noise, images)
        return losses | {"all": server.generator_objective(hyper, losses)}, client

    generator.module.train()
    before, client = measure()
    server._train_generator(setup, torch.optim.Adam([generator.parameters], lr=1e-4), *rows, labels, shares, noise, {})
    after, _ = measure(client if (variant, alone) == ("authors", "discrepancy") else None)
    assert after[alone] > before[alone] if alone == "discrepancy" else after[alone] < before[alone]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_generators_gradient_is_the_derivative_of_its_objective(variant: str) -> None:
    """Finite differences in the images; as released, the clients' logits are constants in the discrepancy only."""
    hyper = Hyper(variant=variant, diversity_distance="scaled")  # type: ignore[arg-type]
    labels, noise = torch.tensor([0, 2, 1]), random(3, 2, seed=5).detach()
    shares = torch.tensor([[0.3, 1.0, 0.0], [0.7, 0.0, 1.0]], dtype=torch.float64)
    students, clients = random(4, 3, seed=6).detach(), random(2, 4, 3, seed=7).detach()
    start = random(3, 1, 2, 2, seed=8)
    frozen = (start.flatten(1) @ clients).detach()

    def objective(images: torch.Tensor) -> torch.Tensor:
        rows = images.flatten(1)
        losses = server.generator_losses(hyper, rows @ students, rows @ clients, labels, shares, noise, images)
        return server.generator_objective(hyper, losses)

    def released(images: torch.Tensor) -> torch.Tensor:
        rows = images.flatten(1)
        taught = server.generator_losses(hyper, rows @ students, rows @ clients, labels, shares, noise, images)
        apart = server.generator_losses(hyper, rows @ students, frozen, labels, shares, noise, images)
        return server.generator_objective(hyper, taught | {"discrepancy": apart["discrepancy"]})

    (gradient,) = torch.autograd.grad(objective(start), start)
    derivative = torch.zeros_like(start)
    step = 1e-6
    for index in range(start.numel()):
        moved = torch.zeros(start.numel(), dtype=torch.float64)
        moved[index] = step
        ahead, behind = (start.detach() + sign * moved.reshape(start.shape) for sign in (1, -1))
        function = objective if variant == "paper" else released
        derivative.view(-1)[index] = (function(ahead) - function(behind)) / (2 * step)
    torch.testing.assert_close(gradient, derivative, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_each_variant_takes_its_own_number_of_generator_steps() -> None:
    """One step per sweep on all clients, or one per client: told by how many losses there are."""
    for variant, steps in (("paper", 10), ("authors", 30)):
        setup, state, updates = round_of(**{"fedftg.variant": variant, "fedftg.iterations": 10})
        metrics = server.update(setup, state, updates, 1)[1]
        assert metrics["generator_discrepancy"][1] == steps
        assert metrics["student_loss"][1] == 50


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_real_images_instead_of_generated_ones_raise_the_accuracy(variant: str) -> None:
    """The oracle: the same student loop on real images tells a wrong student loss from a poor generator."""
    config = tiny("fedftg", **{"data.alpha": 0.1, "fedftg.variant": variant, "run.rounds": 1})
    data = federate(config)
    setup = Setup.build(config, data.images.shape, data.classes, CPU)
    state, half = server.init(setup), importlib.import_module("clients.fedftg")
    from clients.training import Job

    job = Job(config, setup.model, setup.streams, 1, 0, state.parameters, setup.extras)
    config.train.model_copy()
    long = config.model_copy(update={"train": config.train.model_copy(update={"local_steps": 100})})
    updates = []
    for client in range(6):
        mine = dataclasses.replace(job, client=client, config=long)
        updates.append(half.update(mine, server.broadcast(setup, state, 1), None, data.shard(client, "train")).update)
    x, y = (
        torch.cat(parts) for parts in zip(*(data.shard(c, "test").batch(slice(None)) for c in range(6)), strict=True)
    )
    idle = setup.config.model_copy(update={"hyper": setup.hyper.model_copy(update={"iterations": 0})})
    average = server.update(dataclasses.replace(setup, config=idle), state, updates, 1)[0].parameters
    shares = server.class_shares(torch.stack([u.class_counts for u in updates]))
    seen = (shares.sum(dim=0) > 0)[y]
    x, y = x[seen], y[seen]
    stack = torch.stack([u.parameters for u in updates])
    teachers = server.stacked(setup, stack, torch.zeros(6, 0))(x)

    def accuracy() -> float:
        return float((setup.model(x).argmax(dim=1) == y).float().mean())

    setup.model.load(average)
    before = accuracy()
    lr = 0.1 if variant == "paper" else 1.0
    for _ in range(200):
        loss = server.student_loss(setup.hyper, setup.model(x), teachers, shares[:, y]).mean()
        gradient = setup.model.backward(loss)
        with torch.no_grad():
            setup.model.parameters.add_(gradient, alpha=-lr)
    assert accuracy() > before + 0.1


# Base methods.


def parameters(run: Run, name: str = "parameters") -> torch.Tensor:
    """Return a vector of the server's final state."""
    return load_file(run.folder / "final.safetensors")[name]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", BASES)
def test_without_fine_tuning_it_is_the_base_method(run_inline: RunInline, base: str, variant: str) -> None:
    """The plug-in adds nothing of its own: with no iterations, or no step on the model, every score is the base's."""
    plain = run_inline(base, **({"scaffold.variant": "option-2"} if base == "scaffold" else {}))
    for idle in ({"fedftg.iterations": 0}, {"fedftg.student-steps": 0, "fedftg.iterations": 1}):
        run = run_inline("fedftg", **{"fedftg.variant": variant, "fedftg.base": base, **idle})
        assert torch.equal(parameters(run), parameters(plain))
        assert torch.equal(parameters(run, "aggregated"), parameters(plain))
        assert run.rows("evaluations") == plain.rows("evaluations")


@pytest.mark.parametrize("base", BASES)
def test_what_is_sent_is_the_base_methods_and_the_counts(base: str) -> None:
    """No image and no generator travels; the class counts do, and with them the base method's own fields."""
    contract = importlib.import_module(f"fedkd.methods.{base}").METHOD
    setup, state, updates = round_of(base)
    sent = server.broadcast(setup, state, 1)
    assert set(updates[0].specs()) == {*contract.Update.specs(), "class_counts"}
    extra = {"aggregated"} if base == "scaffold" else set()
    assert set(sent.specs()) == {*contract.Broadcast.specs(), *extra}
    after = server.update(setup, state, updates, 1)[0]
    assert not torch.equal(after.parameters, after.aggregated)
    assert torch.equal(server.broadcast(setup, after, 2).parameters, after.parameters)


def test_a_client_counts_its_own_examples(worker: Callable[..., Any]) -> None:
    """n_k^y over the training examples, and nothing else of them."""
    node = worker("fedftg")
    shard = node.shard(0, "train")
    sent = server.broadcast(node.setup, server.init(node.setup), 1)
    update = node.half.update(node.job(1, 0), sent, None, shard).update
    assert update.class_counts.tolist() == torch.bincount(shard.y, minlength=10).tolist()
    assert int(update.class_counts.sum()) == int(update.examples)


@pytest.mark.slow
def test_either_model_can_be_scored(run_inline: RunInline) -> None:
    """Scoring the model before fine-tuning changes the scores and leaves the training as it is, round by round."""
    tuned, plain = run_inline("fedftg"), run_inline("fedftg", **{"fedftg.score": "aggregated"})
    states = [[row["state"] for row in run.rows("rounds")] for run in (tuned, plain)]
    assert states[0] == states[1]
    assert tuned.rows("evaluations") != plain.rows("evaluations")
    first = [[row for row in run.rows("evaluations") if row["round"] == 1] for run in (plain, run_inline("fedavg"))]
    assert first[0] == first[1]


@pytest.mark.slow
def test_fedprox_as_released_is_weight_decay(run_inline: RunInline) -> None:
    """The released FedProx adds mu to the weight decay on either side; its limit is FedAvg with that decay."""
    released = {"fedftg.base": "fedprox", "fedftg.fedprox-term": "released", "fedftg.fedprox-mu": 0.25}
    decayed = {"train.weight-decay": 0.25, "fedftg.server-weight-decay": 0.25}
    one = run_inline("fedftg", **released, **{"fedftg.server-weight-decay": 0.0})
    other = run_inline("fedftg", **decayed)
    assert torch.equal(parameters(one), parameters(other))
    assert one.rows("evaluations") == other.rows("evaluations")


@pytest.mark.parametrize("reference", ["aggregated", "started"])
def test_scaffolds_reference(worker: Callable[..., Any], reference: str) -> None:
    """c_k <- c_k - c + (reference - y) / (K lr): the steps start from the fine-tuned model in both cases."""
    node = worker("fedftg", **{"fedftg.base": "scaffold", "fedftg.scaffold-reference": reference})
    setup, job, shard = node.setup, node.job(1, 0), node.shard(0, "train")
    state = server.init(setup)
    state = dataclasses.replace(state, parameters=state.parameters + 0.01)
    sent = server.broadcast(setup, state, 1)
    update = node.half.update(job, sent, None, shard).update
    start = state.aggregated if reference == "aggregated" else state.parameters
    torch.testing.assert_close(update.control_change, (start - update.parameters) / (4 * 0.05), rtol=1e-4, atol=1e-5)
    trained = importlib.import_module("clients.fedavg")
    own = dataclasses.replace(job, config=tiny("fedavg"))
    assert torch.equal(trained.update(own, sent, None, shard).update.parameters, update.parameters)


def test_feddyns_cloud_model_is_fine_tuned() -> None:
    """mean w_k + drift is what is fine-tuned; the drift is measured from the fine-tuned model the clients had."""
    setup, state, updates = round_of("feddyn")
    state = dataclasses.replace(state, parameters=state.parameters + 0.01)
    after = server.update(setup, state, updates, 1)[0]
    mean = torch.stack([u.parameters for u in updates]).mean(dim=0)
    drift = 3 / 6 * (mean - state.parameters)
    torch.testing.assert_close(after.drift, drift)
    torch.testing.assert_close(after.aggregated, mean + drift)


# BatchNorm and image sizes.


def test_personal_statistics_are_refused() -> None:
    """A teacher with BatchNorm is nothing without its statistics; the message says what to set."""
    with pytest.raises(UserError, match=r"norm-statistics=averaged.*norm=group"):
        round_of(**{"model.name": "fedgen_cnn"})
    round_of(**{"model.name": "fedgen_cnn", "fedftg.iterations": 0})


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{"model.norm": "group"}, {"model.norm-statistics": "averaged"}], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_the_refusal_recommends_works(run_inline: RunInline, variant: str, keys: dict[str, Scalar]) -> None:
    """With averaged statistics the fine-tuned model's move on generated images, and travel with it."""
    run = run_inline("fedftg", **{"fedftg.variant": variant, "model.name": "fedgen_cnn", "run.rounds": 1, **keys})
    moved = parameters(run, "statistics") - parameters(run, "aggregated_statistics")
    assert bool(torch.isfinite(parameters(run)).all())
    assert bool(moved.any()) == ("model.norm-statistics" in keys)


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (32, 32), (30, 17), (3, 5)], ids=str)
def test_the_generator_makes_images_of_any_size(size: tuple[int, int]) -> None:
    """From a grid of a quarter of the size, rounded up; a batch in training has mean 0 and variance 1 per channel."""
    generator = ImageGenerator(4, 3, 2, (3, *size))
    assert generator.grid == (4, math.ceil(size[0] / 4), math.ceil(size[1] / 4))
    images = generator(torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
    assert images.shape == (6, 3, *size)
    torch.testing.assert_close(images.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)


def test_the_generator_is_of_the_seed_and_goes_on(run_inline: RunInline) -> None:
    """Its parameters come from the run's seed and persist from round to round, its optimiser is new in every round."""
    config = tiny("fedftg")
    first, second = (Setup.build(config, (1, 8, 8), 10, CPU).extras["generator"].parameters for _ in range(2))
    assert torch.equal(first, second)
    setup, state, updates = round_of()
    one = server.update(setup, state, updates, 1)[0]
    two = server.update(setup, one, updates, 2)[0]
    again = server.update(setup, one, updates, 2)[0]
    assert torch.equal(two.generator, again.generator)
    assert not torch.equal(one.generator, two.generator)


def test_settings_of_the_base_methods_reach_them() -> None:
    """Every setting of a base method has its twin here, with its range."""
    keys = set(Config.from_flat({"run.method": "fedftg"}).flat())
    assert {"fedftg.fedprox-mu", "fedftg.moon-temperature", "fedftg.feddyn-alpha", "fedftg.scaffold-server-lr"} <= keys
    with pytest.raises(UserError, match="fedprox-mu"):
        tiny("fedftg", **{"fedftg.fedprox-mu": -1.0})


def test_losses_of_the_generator_are_for_its_own_labels() -> None:
    """The cross-entropy is the clients' on the asked label; the product of means only in the released variant."""
    labels, shares = torch.tensor([0, 1]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    clients = torch.tensor([[[2.0, 0.0], [2.0, 0.0]], [[0.0, 3.0], [0.0, 3.0]]])
    images, noise = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1)
    rows = torch.stack([cross_entropy(logits, labels) for logits in clients])
    for variant, expected in (
        ("paper", (rows[0, 0] + rows[1, 1]) / 2),
        ("authors", 0.5 * rows[0].mean() + 0.5 * rows[1].mean()),
    ):
        losses = server.generator_losses(
            Hyper(variant=variant),
            clients[0],
            clients,
            labels,
            shares,
            noise,
            images,  # type: ignore[arg-type]
        )
        torch.testing.assert_close(losses["classification"], expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_generator_is_asked_with_normal_noise(variant: str) -> None:
    """z ~ N(0, I) in both variants: what reaches the generator, thousands of values of it."""
    setup, state, updates = round_of(**{"fedftg.variant": variant, "fedftg.batch": 64, "fedftg.student-steps": 0})
    seen: list[torch.Tensor] = []
    setup.extras["generator"].module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    server.update(setup, state, updates, 1)
    noise = torch.cat(seen)
    assert noise.shape[1] == 100
    assert abs(float(noise.mean())) < 0.05
    assert float(noise.std()) == pytest.approx(1, abs=0.05)
    assert float(noise.abs().max()) > 3
