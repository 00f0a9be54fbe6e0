"""FedProx, client half: local SGD on the proximal objective (Li et al. 2020, Eq. 2)."""

from __future__ import annotations

from clients import fedavg
from clients.training import Job, Outcome
from fedkd.data import Shard
from fedkd.losses import cross_entropy
from fedkd.methods.fedavg import Broadcast, State
from fedkd.methods.fedprox import Hyper

models = fedavg.models


def update(job: Job, broadcast: Broadcast, state: State | None, shard: Shard) -> Outcome:
    """Minimise ``F_k(theta) + mu / 2 * ||theta - theta_global||^2``; the proximal gradient is mu (theta - global)."""
    hyper: Hyper = job.hyper
    sgd, loss = fedavg.start(job, broadcast, state), job.mean()
    anchor = job.model.parameters.clone()
    for x, y in job.batches(shard):
        sgd.step(
            loss.add(cross_entropy(job.model(x), y)),
            extra=hyper.mu * (job.model.parameters - anchor),
        )
    return fedavg.finish(job, shard, loss)
