"""FedRoD, client half: balanced softmax for the generic model, cross-entropy for the personalized head."""

from __future__ import annotations

from dataclasses import replace

import torch

from clients import fedavg
from clients.training import SGD, Job, Mean, Models, Outcome, Predictor, initial_statistics
from fedkd.data import Shard
from fedkd.losses import balanced_softmax, cross_entropy
from fedkd.methods.fedavg import Broadcast
from fedkd.methods.fedrod import Hyper, State
from fedkd.models import FlatModel
from fedkd.partial import from_stage


def update(job: Job, broadcast: Broadcast, state: State | None, shard: Shard) -> Outcome:
    """On each batch, with features z = f(x): two steps that share nothing but the forward pass.

    generic: ``(f, g) <- (f, g) - lr * grad BSM(g(z), y; n_k)``, n_k the client's class counts; sent.

    personal: ``p_k <- p_k - lr * grad CE(g(z) + p_k(z), y)`` with z and g(z) held fixed; stays.
    """
    hyper: Hyper = job.hyper
    sgd, head = fedavg.start(job, broadcast, state), _load_head(job, state)
    head.train()
    head_sgd = SGD(replace(job, model=head), sgd.lr)
    loss, personal_loss = Mean(), Mean()
    counts: torch.Tensor | None = None
    for x, y in job.batches(shard):
        features = job.model(x, stop=hyper.head)
        logits = job.model(features, start=hyper.head)
        if counts is None:
            counts = shard.class_counts(logits.shape[1]).to(logits.device)
        sgd.step(loss.add(balanced_softmax(logits, y, counts, hyper.balance)))
        personal = logits.detach() + head(features.detach())
        head_sgd.step(personal_loss.add(cross_entropy(personal, y)))
    outcome = fedavg.finish(job, shard, loss)
    kept = State(
        **outcome.state.tensors(),
        personal_head=head.parameters.clone(),
        personal_head_statistics=head.statistics.clone(),
    )
    return outcome._replace(state=kept, metrics=outcome.metrics | {"personal_loss": personal_loss.metric()})


def models(job: Job, broadcast: Broadcast, state: State | None, shard: Shard) -> Models:
    """The generic model, and the sum of the logits of both heads; a client without a head has the generic one."""
    hyper: Hyper = job.hyper
    shared = fedavg.models(job, broadcast, state, shard).shared
    assert shared is not None

    def personal() -> Predictor:
        generic = shared()
        if state is None:
            return generic
        head = _load_head(job, state)
        head.eval()

        @torch.no_grad()
        def predict(x: torch.Tensor) -> torch.Tensor:
            features = job.model(x, stop=hyper.head)
            return job.model(features, start=hyper.head) + head(features)

        return predict

    return Models(shared=shared, personal=personal)


def _load_head(job: Job, state: State | None) -> FlatModel:
    """Return the personalized head's workspace with the client's head, at first the model's initial one."""
    hyper: Hyper = job.hyper
    head = job.extras["personal_head"]
    if state is None:
        initial = job.initial_parameters[from_stage(job.model, hyper.head, "fedrod.head").to(job.model.device)]
        head.load(initial, initial_statistics(head))
    else:
        head.load(state.personal_head, state.personal_head_statistics)
    return head
