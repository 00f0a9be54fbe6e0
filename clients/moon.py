"""MOON, client half: local SGD with a model-contrastive term (Li, He, Song 2021, the paper's algorithm)."""

from __future__ import annotations

import torch
from torch.func import functional_call
from torch.nn import functional

from clients import fedavg
from clients.training import Job, Mean, Outcome, Predictor, initial_statistics
from fedkd.data import Shard
from fedkd.losses import cross_entropy
from fedkd.methods.fedavg import Broadcast
from fedkd.methods.fedavg_ft import State
from fedkd.methods.moon import Hyper
from fedkd.models import FlatModel

models = fedavg.models


def update(job: Job, broadcast: Broadcast, state: State | None, shard: Shard) -> Outcome:
    """Train by the settings of the run."""
    hyper: Hyper = job.hyper
    return train(
        job,
        broadcast,
        state,
        shard,
        mu=hyper.mu,
        temperature=hyper.temperature,
        layer=hyper.layer,
        first_negative=hyper.first_negative,
    )


def train(
    job: Job,
    broadcast: Broadcast,
    state: State | None,
    shard: Shard,
    *,
    mu: float,
    temperature: float,
    layer: str = "head",
    first_negative: str = "none",
) -> Outcome:
    """Minimise ``CE + mu * contrast`` from the global model and keep the trained model as the next negative.

    z is the representation of the model in training; the global and the previous model are frozen, in evaluation
    mode, each with the BatchNorm statistics it has on this client.
    """
    sgd, loss, contrast_loss = fedavg.start(job, broadcast, state), Mean(), Mean()
    positive = representation(job.model, job.model.parameters.clone(), job.model.statistics.clone(), layer)
    negative = None
    if state is not None:
        negative = representation(job.model, state.parameters, state.statistics, layer)
    elif first_negative == "initial":
        negative = representation(job.model, job.initial_parameters, initial_statistics(job.model), layer)
    for x, y in job.batches(shard):
        z = job.model(x, stop=layer)
        total = loss.add(cross_entropy(job.model(z, start=layer), y))
        if mu and negative is not None:
            total = total + mu * contrast_loss.add(contrast(z.flatten(1), positive(x), negative(x), temperature))
        sgd.step(total)
    outcome = fedavg.finish(job, shard, loss)
    kept = State(**outcome.state.tensors(), parameters=job.model.parameters.clone())
    metrics = {"contrast_loss": contrast_loss.metric()} if contrast_loss.weight else {}
    return Outcome(outcome.update, kept, outcome.metrics | metrics)


def contrast(z: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor, temperature: float) -> torch.Tensor:
    """MOON's model-contrastive loss in nats, per row, with cosine similarity s.

    ``-log( e^{s(z, p) / tau} / (e^{s(z, p) / tau} + e^{s(z, n) / tau}) ) = log(1 + e^{(s(z, n) - s(z, p)) / tau})``.

    Args:
        z: representations ``[batch, d]`` of the model in training.
        positive: those of the global model, same shape; no gradient flows into them.
        negative: those of the client's previous model, likewise.

    Returns:
        ``[batch]``.
    """
    towards = functional.cosine_similarity(z, positive.detach(), dim=1)
    away = functional.cosine_similarity(z, negative.detach(), dim=1)
    return functional.softplus((away - towards) / temperature)


def representation(model: FlatModel, parameters: torch.Tensor, statistics: torch.Tensor, layer: str) -> Predictor:
    """Return images ``[batch, ...]`` to what a frozen model's stage ``layer`` takes, ``[batch, d]``, without gradient.

    The module runs on views of the given vectors, in evaluation mode; the workspace's own content is left alone.

    Args:
        parameters: ``[P]``.
        statistics: BatchNorm running statistics ``[S]``.
    """
    tensors = model.unflatten(parameters.to(model.device))
    tensors |= model.unflatten_statistics(statistics.to(model.device))

    @torch.no_grad()
    def represent(x: torch.Tensor) -> torch.Tensor:
        training = model.module.training
        model.eval()
        out: torch.Tensor = functional_call(model.module, tensors, (x,), {"stop": layer})
        model.module.train(training)
        return out.flatten(1)

    return represent
