"""Losses against their definitions, their limits, and finite differences in double precision."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from fedkd.losses import cross_entropy, diversity, kl, mean_teacher, weighted_teachers

ROWS, CLASSES = 6, 4


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Return double-precision values with a gradient."""
    rng = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=rng, dtype=torch.float64)).requires_grad_()


def value(scalar: torch.Tensor) -> float:
    """Return a scalar tensor as a number."""
    return float(scalar.detach())


LABELS = torch.tensor([0, 3, 1, 1, 2, 0])


def softmax(logits: torch.Tensor) -> torch.Tensor:
    """Return the softmax by its definition."""
    powers = torch.exp(logits)
    return powers / powers.sum(dim=-1, keepdim=True)


def test_cross_entropy_is_its_definition() -> None:
    """Minus the logarithm of the label's probability, a value per row."""
    logits = random(ROWS, CLASSES)
    expected = -torch.log(softmax(logits)[torch.arange(ROWS), LABELS])
    assert torch.allclose(cross_entropy(logits, LABELS), expected)


def test_cross_entropy_of_a_uniform_prediction() -> None:
    """Knowing nothing costs log C nats."""
    assert torch.allclose(cross_entropy(torch.zeros(ROWS, CLASSES), LABELS), torch.full((ROWS,), math.log(CLASSES)))


def test_cross_entropys_gradient_is_softmax_minus_label() -> None:
    """The derivation that every text book gives."""
    logits = random(ROWS, CLASSES)
    (gradient,) = torch.autograd.grad(cross_entropy(logits, LABELS).sum(), logits)
    assert torch.allclose(gradient, softmax(logits) - torch.nn.functional.one_hot(LABELS, CLASSES))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_is_its_definition(temperature: float) -> None:
    """T^2 sum p log(p / q) at softened predictions; not the mean over elements, and not the reverse."""
    target, logits = random(ROWS, CLASSES, seed=1), random(ROWS, CLASSES, seed=2)
    p, q = softmax(target / temperature), softmax(logits / temperature)
    assert torch.allclose(kl(target, logits, temperature), temperature**2 * (p * (p / q).log()).sum(dim=1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kls_gradient_is_the_difference_of_the_softened_predictions(temperature: float) -> None:
    """T (q - p): with the factor T^2 the gradient keeps its size as T grows."""
    target, logits = random(ROWS, CLASSES, seed=1), random(ROWS, CLASSES, seed=2)
    (gradient,) = torch.autograd.grad(kl(target, logits, temperature).sum(), logits)
    assert torch.allclose(gradient, temperature * (softmax(logits / temperature) - softmax(target / temperature)))


def test_kl_is_zero_only_at_equal_predictions() -> None:
    """Adding a constant to the logits of a row changes no prediction."""
    target, logits = random(ROWS, CLASSES, seed=1), random(ROWS, CLASSES, seed=2)
    assert torch.allclose(kl(target, target + 5.0), torch.zeros(ROWS, dtype=torch.float64))
    assert bool((kl(target, logits) > 0).all())


def test_kl_for_large_temperature_is_logit_matching() -> None:
    """Half the squared difference of the centred logits over the number of classes (Hinton et al. 2015, 2.1)."""
    target, logits = random(ROWS, CLASSES, seed=1), random(ROWS, CLASSES, seed=2)
    difference = (target - target.mean(dim=1, keepdim=True)) - (logits - logits.mean(dim=1, keepdim=True))
    expected = difference.square().sum(dim=1) / (2 * CLASSES)
    assert torch.allclose(kl(target, logits, 1e4), expected, rtol=1e-3)


def test_no_gradient_flows_into_the_teacher() -> None:
    """The target of a distillation is a constant."""
    target, logits = random(ROWS, CLASSES, seed=1), random(ROWS, CLASSES, seed=2)
    kl(target, logits).sum().backward()  # type: ignore[no-untyped-call]
    assert target.grad is None
    assert logits.grad is not None


def test_diversity_is_its_definition() -> None:
    """Both means run over all ordered pairs, a row with itself included."""
    noise, features = random(5, 3, seed=1), random(5, 2, 4, seed=2)
    total = 0.0
    for i in range(5):
        for j in range(5):
            near = value((noise[i] - noise[j]).square().mean())
            total += near * value((features[i] - features[j]).abs().mean())
    assert value(diversity(noise, features)) == pytest.approx(math.exp(-total / 25), rel=1e-12)


def test_diversity_is_one_when_the_generator_collapses() -> None:
    """Equal features for different noise are the worst case, and more spread is always better."""
    noise, features = random(5, 3, seed=1), random(5, 4, seed=2)
    assert value(diversity(noise, torch.ones(5, 4, dtype=torch.float64))) == 1.0
    values = [value(diversity(noise, scale * features)) for scale in (0.5, 1.0, 2.0)]
    assert 1 > values[0] > values[1] > values[2] > 0


def test_diversity_does_not_depend_on_the_order() -> None:
    """It is a property of the batch."""
    noise, features = random(5, 3, seed=1), random(5, 4, seed=2)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.allclose(diversity(noise[order], features[order]), diversity(noise, features))


def test_the_mean_teacher_averages_logits_first() -> None:
    """Eq. 4 is the cross-entropy of the mean, not the mean of the cross-entropies."""
    logits = random(3, ROWS, CLASSES)
    expected = -torch.log(softmax(logits.mean(dim=0))[torch.arange(ROWS), LABELS]).mean()
    assert torch.allclose(mean_teacher(logits, LABELS), expected)
    separate = torch.stack([cross_entropy(mine, LABELS).mean() for mine in logits]).mean()
    assert value(mean_teacher(logits, LABELS)) < value(separate)


def test_equal_teachers_count_as_one() -> None:
    """With weights that sum to one, clients that agree are one client, in every reading."""
    logits = random(ROWS, CLASSES)
    weights = torch.softmax(random(CLASSES, 3, seed=4), dim=1)
    together = logits.expand(3, ROWS, CLASSES)
    single = cross_entropy(logits, LABELS).mean()
    assert torch.allclose(mean_teacher(together, LABELS), single)
    assert torch.allclose(weighted_teachers(together, LABELS, weights), single)


def test_a_client_without_weight_is_not_heard() -> None:
    """Its logits get no gradient."""
    logits = random(2, ROWS, CLASSES)
    weights = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(CLASSES, 2)
    weighted_teachers(logits, LABELS, weights).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert bool((logits.grad[1] == 0).all())
    assert bool((logits.grad[0] != 0).any())


DIFFERENTIABLE: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], tuple[int, ...]]] = {
    "cross_entropy": (lambda x: cross_entropy(x, LABELS), (ROWS, CLASSES)),
    "kl": (lambda x: kl(random(ROWS, CLASSES, seed=9), x, 2.0), (ROWS, CLASSES)),
    "diversity": (lambda x: diversity(random(ROWS, 3, seed=9).detach(), x), (ROWS, CLASSES)),
    "mean_teacher": (lambda x: mean_teacher(x, LABELS), (3, ROWS, CLASSES)),
    "weighted_teachers": (
        lambda x: weighted_teachers(x, LABELS, torch.softmax(random(CLASSES, 3, seed=9), dim=1).detach()),
        (3, ROWS, CLASSES),
    ),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    """Whatever the formula, the gradient is that of the value."""
    loss, shape = DIFFERENTIABLE[name]
    assert torch.autograd.gradcheck(loss, (random(*shape),))
