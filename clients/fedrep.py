"""FedRep, client half: the head with the representation fixed, then the representation with the head fixed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from clients import partial
from clients.training import SGD, Job, Mean, Outcome, Predictor
from fedkd.data import Shard
from fedkd.losses import cross_entropy
from fedkd.methods.fedrep import Hyper
from fedkd.partial import NO_STAGE, Broadcast, State

models = partial.models


def update(job: Job, broadcast: Broadcast, state: State | None, shard: Shard) -> Outcome:
    """Two phases, from the client's last head and the global representation, each with a momentum of its own.

    ``h_k <- h_k - lr * grad_h CE(h_k, phi)``, ``head-steps`` times, over batches of their own;
    ``phi_k <- phi_k - lr * grad_phi CE(h_k, phi_k)`` over the local batches, with the new h_k; send phi_k only.

    BatchNorm layers of the representation are in training mode in both.
    """
    hyper: Hyper = job.hyper
    representation = hyper.shared(job.model)
    sgd, loss, head_loss = partial.start(job, broadcast, state, representation), Mean(), Mean()
    if hyper.head != NO_STAGE:
        head_sgd = SGD(job, sgd.lr, part=~representation)
        for x, y in job.batches(shard, steps=hyper.head_steps, purpose="head-batches"):
            with torch.no_grad():
                features = job.model(x, stop=hyper.head)
            head_sgd.step(head_loss.add(cross_entropy(job.model(features, start=hyper.head), y)))
    for x, y in job.batches(shard):
        sgd.step(loss.add(cross_entropy(job.model(x), y)))
    outcome = partial.finish(job, shard, loss)
    return outcome._replace(metrics=outcome.metrics | ({"head_loss": head_loss.metric()} if head_loss.weight else {}))


def adapt(job: Job, broadcast: Broadcast, shard: Shard) -> Iterator[Predictor]:
    """A newcomer fits a head to the representation, which stays as it is; without a head, it trains the model."""
    hyper: Hyper = job.hyper
    return partial.adapt(job, broadcast, shard, ~hyper.shared(job.model) if hyper.head != NO_STAGE else None)
