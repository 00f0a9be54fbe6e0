"""FedBN, client half: FedAvg's local training; the BatchNorm layers are neither sent nor received."""

from __future__ import annotations

from clients import partial
from clients.training import Job, Outcome
from fedkd.data import Shard
from fedkd.losses import cross_entropy
from fedkd.partial import Broadcast, State

models, adapt = partial.models, partial.adapt


def update(job: Job, broadcast: Broadcast, state: State | None, shard: Shard) -> Outcome:
    """``theta_k <- theta_k - lr * grad CE`` from the global model with the client's own BatchNorm layers."""
    sgd, loss = partial.start(job, broadcast, state), job.mean()
    for x, y in job.batches(shard):
        sgd.step(loss.add(cross_entropy(job.model(x), y)))
    return partial.finish(job, shard, loss)
