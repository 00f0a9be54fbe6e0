"""FedBABU, client half: local steps on the body only; the client's own model is the global one, fine-tuned."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from clients import partial
from clients.training import Job, Models, Outcome, Predictor
from fedkd.data import Shard
from fedkd.losses import cross_entropy
from fedkd.methods.fedbabu import Hyper
from fedkd.partial import Broadcast, State


def update(job: Job, broadcast: Broadcast, state: State | None, shard: Shard) -> Outcome:
    """``body_k <- body_k - lr * grad_body CE(body_k, head_0)``; the head stays at its initial parameters head_0."""
    hyper: Hyper = job.hyper
    sgd, loss = partial.start(job, broadcast, state, hyper.shared(job.model)), job.mean()
    for x, y in job.batches(shard):
        sgd.step(loss.add(cross_entropy(job.model(x), y)))
    return partial.finish(job, shard, loss)


def adapt(job: Job, broadcast: Broadcast, shard: Shard) -> Iterator[Predictor]:
    """What is scored in the run, with a newcomer's epochs in place of ``fine-tune-steps``."""
    return partial.adapt(job, broadcast, shard, _fine_tuned(job))


def models(job: Job, broadcast: Broadcast, state: State | None, shard: Shard) -> Models:
    """The global body with the initial head, and the same after ``fine-tune-steps`` local steps, which are not kept."""
    hyper: Hyper = job.hyper

    def personal() -> Predictor:
        sgd = partial.start(job, broadcast, state, _fine_tuned(job))
        for x, y in job.batches(shard, steps=hyper.fine_tune_steps):
            sgd.step(cross_entropy(job.model(x), y).mean())
        return job.predictor()

    return Models(shared=partial.models(job, broadcast, state, shard).shared, personal=personal)


def _fine_tuned(job: Job) -> torch.Tensor:
    """Return the mask ``[P]`` of the part that ``fine-tune`` names."""
    hyper: Hyper = job.hyper
    body = hyper.shared(job.model)
    return {"all": torch.ones_like(body), "head": ~body, "body": body}[hyper.fine_tune]
