"""LG-FedAvg, client half: local representation and global head are trained together, the head is sent."""

from __future__ import annotations

from clients import partial
from clients.training import Job, Outcome
from fedkd.data import Shard
from fedkd.losses import cross_entropy
from fedkd.partial import Broadcast, State

models, adapt = partial.models, partial.adapt


def update(job: Job, broadcast: Broadcast, state: State | None, shard: Shard) -> Outcome:
    """``(l_k, g) <- (l_k, g) - lr * grad CE`` from the client's representation and the global head; send g only."""
    sgd, loss = partial.start(job, broadcast, state), job.mean()
    for x, y in job.batches(shard):
        sgd.step(loss.add(cross_entropy(job.model(x), y)))
    return partial.finish(job, shard, loss)
