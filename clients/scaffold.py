"""SCAFFOLD, client half: local SGD along ``grad - c_k + c`` (Karimireddy et al. 2020, Algorithm 1)."""

from __future__ import annotations

import torch

from clients import fedavg
from clients.training import Job, Outcome
from fedkd.data import Shard
from fedkd.losses import cross_entropy
from fedkd.methods.scaffold import Broadcast, Hyper, State, Update

models = fedavg.models


def update(job: Job, broadcast: Broadcast, state: State | None, shard: Shard) -> Outcome:
    """Train by the settings of the run."""
    hyper: Hyper = job.hyper
    return train(job, broadcast, state, shard, variant=hyper.variant, correction=hyper.correction)


def train(
    job: Job,
    broadcast: Broadcast,
    state: State | None,
    shard: Shard,
    *,
    variant: str = "option-2",
    correction: float = 1.0,
    reference: torch.Tensor | None = None,
) -> Outcome:
    """``y <- y - lr * (grad CE(y) - c_k + c)`` from the server's model x, K steps; then renew c_k and send its change.

    option-1: ``c_k <- grad F_k(x)``.  option-2: ``c_k <- c_k - c + (x - y) / (K lr)``, which is the mean of the
    gradients along the path.  A client that has not taken part has ``c_k = 0``.

    Args:
        correction: weight of ``c - c_k``.
        reference: ``[P]`` in the place of x in option-2's formula; None: the broadcast model.
    """
    sgd, loss, steps = fedavg.start(job, broadcast, state), job.mean(), 0
    device = job.model.device
    x0 = job.model.parameters.clone() if reference is None else reference.to(device)
    own = state.control.to(device) if state else torch.zeros_like(x0)
    shift = correction * (broadcast.control.to(device) - own)
    control = full_gradient(job, shard) if variant == "option-1" else None
    for x, y in job.batches(shard):
        sgd.step(loss.add(cross_entropy(job.model(x), y)), extra=shift)
        steps += 1
    if control is None:
        control = path_gradient(x0, job.model.parameters, shift, steps, sgd.lr)
    base = fedavg.finish(job, shard, loss)
    return Outcome(
        update=Update(**base.update.tensors(), control_change=control - own),
        state=State(**base.state.tensors(), control=control),
        metrics=base.metrics,
    )


def path_gradient(start: torch.Tensor, end: torch.Tensor, shift: torch.Tensor, steps: int, lr: float) -> torch.Tensor:
    """Return the mean gradient of K steps ``y <- y - lr * (g + shift)``: ``(start - end) / (K lr) - shift``, ``[P]``.

    The learning rate is the one that the steps were taken with.
    """
    return (start - end) / (steps * lr) - shift


def full_gradient(job: Job, shard: Shard) -> torch.Tensor:
    """Return the gradient ``[P]`` of the local objective (weight decay included) at the workspace, over all data.

    The model is in training mode, as in the steps; its BatchNorm statistics are left as they were.
    """
    model, statistics = job.model, job.model.statistics.clone()
    total = torch.zeros_like(model.parameters)
    for first in range(0, len(shard), job.train.batch_size):
        x, y = shard.batch(slice(first, first + job.train.batch_size))
        total += model.backward(cross_entropy(model(x), y).sum() / len(shard))
    model.statistics.copy_(statistics)
    return total + job.train.weight_decay * model.parameters
