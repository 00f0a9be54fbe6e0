"""FedDyn, client half: local SGD on the dynamically regularized loss (Acar et al. 2021, the paper's algorithm)."""

from __future__ import annotations

import torch

from clients import fedavg
from clients.training import Job, Outcome
from fedkd.data import Shard
from fedkd.losses import cross_entropy
from fedkd.methods.fedavg import Broadcast
from fedkd.methods.feddyn import Hyper, State

models = fedavg.models


def update(job: Job, broadcast: Broadcast, state: State | None, shard: Shard) -> Outcome:
    """Train by the settings of the run."""
    hyper: Hyper = job.hyper
    return train(job, broadcast, state, shard, alpha=hyper.alpha)


def train(job: Job, broadcast: Broadcast, state: State | None, shard: Shard, *, alpha: float) -> Outcome:
    """Minimise ``F_k(theta) - <gradient_k, theta> + alpha / 2 ||theta - theta_t||^2``, then renew the gradient.

    With ``gradient_k = -alpha drift_k`` the two terms' gradient is ``alpha (theta - (theta_t - drift_k))``, and
    ``gradient_k <- gradient_k - alpha (theta_k - theta_t)`` is ``drift_k <- drift_k + theta_k - theta_t``.  A client
    that has not taken part has gradient zero, so its first participation is FedProx with mu = alpha.
    """
    sgd, loss = fedavg.start(job, broadcast, state), job.mean()
    anchor = job.model.parameters.clone()
    drift = state.drift.to(job.model.device) if state else torch.zeros_like(anchor)
    centre = anchor - drift
    for x, y in job.batches(shard):
        sgd.step(
            loss.add(cross_entropy(job.model(x), y)),
            extra=alpha * (job.model.parameters - centre),
        )
    outcome = fedavg.finish(job, shard, loss)
    return outcome._replace(state=State(**outcome.state.tensors(), drift=drift + job.model.parameters - anchor))
