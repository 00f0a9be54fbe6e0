"""Losses as pure functions: per-row values, shapes and the paper's equation number in each docstring."""

from __future__ import annotations

import torch
from torch.nn import functional


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats, per row: ``-log softmax(logits)[label]``.

    Args:
        logits: ``[..., batch, classes]``.
        labels: ``[..., batch]`` integers.

    Returns:
        ``[..., batch]``.
    """
    rows = functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    return rows if labels.ndim == 1 else rows.view_as(labels)


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


def class_level_divergence(
    student: torch.Tensor, teachers: torch.Tensor, weights: torch.Tensor, reverse: bool = False
) -> torch.Tensor:
    """FedFTG's discrepancy L_md as its paper has it: ``sum_k alpha_k KL(softmax(t_k) || softmax(s))`` in nats, per row.

    Gradient flows into student and teachers: the generator maximises it through both.

    Args:
        student: logits ``[batch, classes]``.
        teachers: logits ``[clients, batch, classes]``.
        weights: ``[clients, batch]``, alpha of each row's class; over the clients they sum to one.
        reverse: ``KL(softmax(s) || softmax(t_k))`` instead.

    Returns:
        ``[batch]``.
    """
    p, q = functional.log_softmax(teachers, dim=-1), functional.log_softmax(student, dim=-1)[None]
    divergence = (q.exp() * (q - p) if reverse else p.exp() * (p - q)).sum(dim=-1)
    return (weights * divergence).sum(dim=0)


def class_level_distance(student: torch.Tensor, teachers: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """FedFTG's discrepancy L_md as released: ``sum_k alpha_k 1/C sum_c |s_c - t_kc|`` on raw logits, per row.

    (ZhangLin-PKU/FedFTG @ 1e6347c, ``compute_backward_flow_G_dis``; no gradient flows into the teachers.)

    Args:
        student: logits ``[batch, classes]``.
        teachers: logits ``[clients, batch, classes]``.
        weights: ``[clients, batch]``.

    Returns:
        ``[batch]``.
    """
    return (weights * (student[None] - teachers.detach()).abs().mean(dim=-1)).sum(dim=0)


def class_level_ensemble(student: torch.Tensor, teachers: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the student against ``q = sum_k alpha_k softmax(t_k)`` in nats, per row.

    Its gradient in the student is that of :func:`class_level_divergence`, wherever the weights sum to one.  FedFTG as
    released trains the student on it divided by the number of classes (ZhangLin-PKU/FedFTG @ 1e6347c).

    Args:
        student: logits ``[batch, classes]``.
        teachers: logits ``[clients, batch, classes]``; no gradient flows into them.
        weights: ``[clients, batch]``.

    Returns:
        ``[batch]``.
    """
    target = (weights[..., None] * functional.softmax(teachers.detach(), dim=-1)).sum(dim=0)
    return -(target * functional.log_softmax(student, dim=-1)).sum(dim=-1)


def diversity_of_norms(noise: torch.Tensor, images: torch.Tensor, scaled: bool = False) -> torch.Tensor:
    """FedFTG's diversity loss with Euclidean norms: ``exp(-mean_ij [ ||x_i - x_j||_2 * ||z_i - z_j||_2 ])``, a scalar.

    The exponent grows as the square root of the numbers of pixels and of noise dimensions, so for images of 28x28
    pixels the loss and its gradient are zero in single precision; ``scaled`` divides each norm by the root of its
    number of dimensions.

    Args:
        noise: ``[batch, width]``.
        images: ``[batch, ...]``, flattened per row.
        scaled: root mean squares instead of norms.
    """

    def distances(rows: torch.Tensor) -> torch.Tensor:
        squares = (rows[:, None] - rows[None]).square()
        total = squares.mean(dim=2) if scaled else squares.sum(dim=2)
        return torch.where(total > 0, total, 1.0).sqrt() * (total > 0)  # the root has no gradient at zero

    return torch.exp(-(distances(noise) * distances(images.flatten(1))).mean())


def balanced_softmax(
    logits: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor, exponent: float = 1.0
) -> torch.Tensor:
    """FedRoD's generic loss: ``-log( n_y^a exp(g_y) / sum_c n_c^a exp(g_c) )`` in nats, per row.

    Cross-entropy of the logits plus a log n; an absent class has no part in it.  With equal counts, or a = 0 (where
    n^0 = 1 even for n = 0), it is cross-entropy, bit for bit.

    Args:
        logits: ``[batch, classes]``.
        labels: ``[batch]``, of classes with a count.
        counts: examples of each class ``[classes]``.
        exponent: a >= 0.

    Returns:
        ``[batch]``.
    """
    if not exponent:
        return cross_entropy(logits, labels)
    return cross_entropy(logits + exponent * torch.log(counts.to(logits.dtype) / counts.max()), labels)
