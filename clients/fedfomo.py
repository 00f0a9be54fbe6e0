"""FedFomo, client half: mix the models that lower the own validation loss, then train the mixture."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from clients import local
from clients.training import SGD, Job, Mean, Outcome, initial_statistics
from fedkd.data import Shard
from fedkd.losses import cross_entropy
from fedkd.methods.fedfomo import Hyper, Personal, State, Update

models = local.models
EVALUATION_BATCH = 1024


class Candidate(NamedTuple):
    """A model: parameters ``[P]`` and the statistics that come with it, of length zero when they are the client's."""

    parameters: torch.Tensor
    statistics: torch.Tensor


def update(job: Job, broadcast: object, state: State | None, shard: Shard) -> Outcome:
    """Weigh the own trained model and those sent against the last starting point, move, train, send.

    A client that trains for the first time starts from the initial model and has none of its own to weigh.
    """
    hyper: Hyper = job.hyper
    personal: Personal = job.personal
    train, validation = split(job, shard)
    kept = state.statistics if state else None
    start, own = _own_models(job, state)
    places = [k for k, source in enumerate(personal.sources.tolist()) if source >= 0]
    candidates = [own] if own else []
    candidates += [Candidate(personal.models[k], personal.statistics[k]) for k in places]
    gains = _losses(job, [start], kept, validation) - _losses(job, candidates, kept, validation)
    distances = torch.stack([_distance(c.parameters - start.parameters, hyper.norm) for c in [start, *candidates]])[1:]
    raw = weights(gains, distances)
    start = mixture(start, candidates, shares(raw))

    job.load(start.parameters, start.statistics, kept)
    job.model.train()
    sgd, loss = SGD(job, job.learning_rate()), Mean()
    for x, y in job.batches(train):
        sgd.step(loss.add(cross_entropy(job.model(x), y)))

    sent = torch.zeros(hyper.downloads)
    sent[places] = (scaled(raw) if hyper.affinity == "scaled" else raw)[len(candidates) - len(places) :].float()
    metrics = {"loss": loss.metric(), "held_out": (float(len(shard) - len(train)), 1.0)}
    if candidates:
        metrics["helpful"] = (float((raw > 0).sum()), float(len(raw)))
        metrics["own_share"] = (float(shares(raw)[0]) if own else 0.0, 1.0)
    parameters = job.model.parameters.clone()
    return Outcome(
        update=Update(
            client=torch.tensor(job.client),
            parameters=parameters,
            statistics=job.shared_statistics(),
            examples=torch.tensor(len(train)),
            sources=personal.sources,
            weights=sent,
        ),
        state=State(
            parameters=parameters,
            statistics=job.model.statistics.clone(),
            start=start.parameters,
            start_statistics=start.statistics,
        ),
        metrics=metrics,
    )


def weights(gains: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
    """Return ``w_n = (L_i(theta_i) - L_i(theta_n)) / ||theta_n - theta_i||``; 0 for a model at distance 0.

    Args:
        gains: by how much each model lowers the validation loss, ``[models]``.
        distances: ``[models]``.
    """
    return torch.where(distances > 0, gains / distances, torch.zeros_like(gains))


def shares(weights: torch.Tensor) -> torch.Tensor:
    """Return ``v_n = max(w_n, 0) / sum_m max(w_m, 0)`` ``[models]``; zeros where no weight is positive."""
    positive = weights.clamp(min=0)
    return positive / positive.sum() if bool((positive > 0).any()) else positive


def scaled(weights: torch.Tensor) -> torch.Tensor:
    """Return the signed weights over the size of their sum ``[models]``, as the released code adds them to affinities.

    A sum under 1e-9 counts 1e-9 more, so that weights that cancel stay finite.
    """
    total = weights.sum().abs()
    return weights / (total + 1e-9 * (total < 1e-9))


def mixture(start: Candidate, candidates: list[Candidate], shares: torch.Tensor) -> Candidate:
    """Return ``theta_i + sum_n v_n (theta_n - theta_i)``: ``sum_n v_n theta_n``, or theta_i where all shares are 0."""
    if not bool((shares > 0).any()):
        return start
    parameters, statistics = torch.zeros_like(start.parameters), torch.zeros_like(start.statistics)
    for share, candidate in zip(shares.tolist(), candidates, strict=True):
        parameters.add_(candidate.parameters, alpha=share)
        statistics.add_(candidate.statistics, alpha=share)
    return Candidate(parameters, statistics)


def split(job: Job, shard: Shard) -> tuple[Shard, Shard]:
    """Return the data to train on and the data to weigh models with; the same split in every round.

    Without hold-out, and for a client with one example, both are all there is.
    """
    hyper: Hyper = job.hyper
    count = min(max(1, round(hyper.validation * len(shard))), len(shard) - 1) if hyper.validation else 0
    if not count:
        return shard, shard
    order = torch.randperm(len(shard), generator=job.streams.torch("validation", client=job.client)).to(shard.y.device)
    parts = order[count:].sort().values, order[:count].sort().values
    train, validation = (dataclasses.replace(shard, x=shard.x[rows], y=shard.y[rows]) for rows in parts)
    return train, validation


def _own_models(job: Job, state: State | None) -> tuple[Candidate, Candidate | None]:
    """Return where the last local training started and where it ended; the initial model and None before the first."""
    shared = job.config.model.norm_statistics == "averaged"
    if state is None:
        return Candidate(
            job.initial_parameters.cpu(), initial_statistics(job.model) if shared else torch.zeros(0)
        ), None
    ended = Candidate(state.parameters, state.statistics if shared else torch.zeros(0))
    return Candidate(state.start, state.start_statistics), ended


def _distance(difference: torch.Tensor, norm: str) -> torch.Tensor:
    """Return the length of a vector ``[P]`` in double precision."""
    distance: torch.Tensor = torch.linalg.vector_norm(difference.double(), ord=1 if norm == "l1" else 2)
    return distance


@torch.no_grad()
def _losses(job: Job, candidates: list[Candidate], kept: torch.Tensor | None, shard: Shard) -> torch.Tensor:
    """Return each model's mean loss on the data, in evaluation mode, ``[models]`` in double precision."""
    losses = torch.zeros(len(candidates), dtype=torch.float64)
    for n, candidate in enumerate(candidates):
        job.load(candidate.parameters, candidate.statistics, kept)
        predict = job.predictor()
        for start in range(0, len(shard), EVALUATION_BATCH):
            x, y = shard.batch(slice(start, start + EVALUATION_BATCH))
            losses[n] += float(cross_entropy(predict(x), y).sum(dtype=torch.float64)) / len(shard)
    return losses
