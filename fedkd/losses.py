"""Losses as pure functions: per-row values, shapes and the paper's equation number in each docstring."""

from __future__ import annotations

import torch
from torch.nn import functional


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats, per row: ``-log softmax(logits)[label]``.

    Args:
        logits: ``[batch, classes]``.
        labels: ``[batch]`` integers.

    Returns:
        ``[batch]``.
    """
    return functional.cross_entropy(logits, labels, reduction="none")


def kl(target: torch.Tensor, logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """``T^2 KL(softmax(target / T) || softmax(logits / T))`` in nats, per row; its minimum is 0, at equal softmaxes.

    The factor keeps the gradient's size as T grows: for large T the loss tends to half the squared difference of the
    centred logits, divided by the number of classes (Hinton, Vinyals, Dean 2015, section 2.1).

    Args:
        target: logits of the teacher ``[batch, classes]``; no gradient flows into them.
        logits: logits of the student ``[batch, classes]``.

    Returns:
        ``[batch]``.
    """
    teacher = functional.log_softmax(target.detach() / temperature, dim=1)
    student = functional.log_softmax(logits / temperature, dim=1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(dim=1)


def diversity(noise: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """FedGen's diversity loss, a scalar in (0, 1], small when different noise gives different features.

    ``exp(-mean_ij [ ||eps_i - eps_j||^2 / d_eps * ||z_i - z_j||_1 / d ])`` over all ordered pairs, i = j included
    (zhuangdizhu/FedGen @ dd5807c, ``DiversityLoss`` with metric l1; the paper names the idea without a formula).

    Args:
        noise: ``[batch, d_eps]``.
        features: ``[batch, ...]``, flattened to d per row.
    """
    rows = features.flatten(1)
    noise_distance = (noise[:, None] - noise[None]).square().mean(dim=2)
    feature_distance = (rows[:, None] - rows[None]).abs().mean(dim=2)
    return torch.exp(-(noise_distance * feature_distance).mean())


def weighted_teachers(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, per_example: bool = False
) -> torch.Tensor:
    """FedGen's generator loss as released: ``sum_k mean_i W[y_i, k] * mean_i CE(g(z_i; theta_k), y_i)``, a scalar.

    (zhuangdizhu/FedGen @ dd5807c, ``train_generator``: a ``[batch, 1]`` weight times a ``[batch]`` loss is averaged
    over ``[batch, batch]``, so the two means factorise and a client teaches a class it never saw as strongly as any
    other.  The weighting that the names in the code suggest, ``mean_i sum_k W[y_i, k] CE(g(z_i; theta_k), y_i)``, is
    ``per_example``.  The paper's Eq. 4 is :func:`mean_teacher`.)

    Args:
        logits: ``[clients, batch, classes]``.
        labels: ``[batch]``.
        weights: ``[classes, clients]``, rows sum to one: each client's share of the examples of a class.
        per_example: weigh each example's loss by its own class.
    """
    clients, batch, classes = logits.shape
    losses = cross_entropy(logits.reshape(-1, classes), labels.repeat(clients)).reshape(clients, batch)
    if per_example:
        return (weights[labels].T * losses).mean(dim=1).sum()
    return (weights[labels].mean(dim=0) * losses.mean(dim=1)).sum()


def mean_teacher(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """FedGen, Eq. 4: ``mean_i CE(1/K sum_k g(z_i; theta_k), y_i)``, the clients' logits averaged first, a scalar.

    Args:
        logits: ``[clients, batch, classes]``.
        labels: ``[batch]``.
    """
    return cross_entropy(logits.mean(dim=0), labels).mean()
