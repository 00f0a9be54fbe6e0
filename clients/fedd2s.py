"""FedD2S (reconstructed after the abstract), client half: local training under K, then extraction of knowledge."""

from __future__ import annotations

import torch
from torch.nn import functional

from clients import local
from clients.training import SGD, Job, Mean, Outcome
from fedkd.data import Shard
from fedkd.losses import cross_entropy
from fedkd.methods.fedd2s import Broadcast, Depth, Hyper, State, Update, depth, distillation, pooled, width
from fedkd.models import StagedModel, gradients

models = local.models

EXTRACTION_BATCH = 1024


def update(job: Job, broadcast: Broadcast, state: State | None, shard: Shard) -> Outcome:
    """Train (phase 1), then extract knowledge (phase 2, :func:`extract`), both at l = l(t).

    Per example ``CE(f(x), y) + CE(h(r(x)), y) + lam tau^2 KL(K[y] || softmax(h(r(x)) / tau))``, the second term for
    pooled-linear with ``head-ce`` only, the third where K has a row for y.  The gradient of both reaches the stages
    up to l and a linear head, never the stages behind l.  The model and the heads stay with the client.
    """
    hyper: Hyper = job.hyper
    local.load(job, state)
    job.model.train()
    sgd, heads = _optimisers(job, state)
    place = depth(hyper, _staged(job), job.round)
    knowledge = broadcast.knowledge.to(job.model.device)
    known = broadcast.owners.to(job.model.device) > 0
    loss, head_loss, distilled = Mean(), Mean(), Mean()
    for x, y in job.batches(shard):
        features = job.model(x, stop=place.behind)
        logits = features if place.behind is None else job.model(features, start=place.behind)
        total = loss.add(cross_entropy(logits, y))
        if heads:
            logits = job.extras["heads"](features, place.stage)
            if hyper.head_ce:
                total = total + head_loss.add(cross_entropy(logits, y))
        if hyper.lam and bool(known.any()):
            rows = distillation(knowledge[y], logits, hyper.temperature)
            distilled.add(rows[known[y]])
            term = hyper.lam * rows.mean()
            total = total + (term if heads else entering(term, features))
        if heads:
            for optimiser, gradient in zip((sgd, heads), gradients(total, job.model, job.extras["heads"]), strict=True):
                optimiser.apply(gradient)
        else:
            sgd.step(total)
    means = {"loss": loss, "head_loss": head_loss, "distillation_loss": distilled}
    return Outcome(
        update=extract(job, shard, place, len(known)),
        state=State(
            parameters=job.model.parameters.clone(),
            statistics=job.model.statistics.clone(),
            heads=heads.parameters.clone() if heads else torch.zeros(0),
        ),
        metrics={name: mean.metric() for name, mean in means.items() if mean.weight},
    )


def entering(term: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Return a scalar with a term's gradient in the features and what is before them, and none behind them."""
    (gradient,) = torch.autograd.grad(term, features, retain_graph=True)
    return (features * gradient).sum()


@torch.no_grad()
def extract(job: Job, shard: Shard, place: Depth, classes: int) -> Update:
    """Return ``softmax(h(r(x)) / tau)`` and r(x), averaged per class that the client has, or for examples drawn.

    The means run over all local examples, in evaluation mode.  Representations are left out (width 0) unless the
    server trains a global head; pooled-linear uploads them pooled.
    """
    hyper: Hyper = job.hyper
    job.model.eval()
    counts, means = shard.class_counts(classes), hyper.upload == "class-mean"
    chosen = torch.arange(len(shard))
    if not means:
        chosen = torch.randperm(len(shard), generator=job.torch_rng("upload"))[: hyper.samples]
    parts: list[tuple[torch.Tensor, ...]] = []
    for rows in torch.split(chosen.to(shard.y.device), EXTRACTION_BATCH):
        x, y = shard.batch(rows)
        features = job.model(x, stop=place.behind)
        if hyper.head == "pooled-linear":
            features, logits = pooled(features), job.extras["heads"](features, place.stage)
        else:
            logits = features if place.behind is None else job.model(features, start=place.behind)
        part = functional.softmax(logits / hyper.temperature, dim=1), features.flatten(1)
        member = functional.one_hot(y, classes).T.to(features.dtype)
        parts.append((*(member @ values for values in part), y) if means else (*part, y))
    if means:
        sums = (torch.stack(values).sum(dim=0).cpu() for values in list(zip(*parts, strict=True))[:2])
        soft, flat = (total / counts.clamp(min=1)[:, None] for total in sums)
        labels = torch.where(counts > 0, torch.arange(classes), -1)
    else:
        soft, flat, labels = (torch.cat(columns).cpu() for columns in zip(*parts, strict=True))
    most, wide = classes if means else hyper.samples, width(hyper, _staged(job))
    return Update(
        soft_labels=functional.pad(soft, (0, 0, 0, most - len(soft))),
        representations=functional.pad(flat[:, :wide], (0, max(wide - flat.shape[1], 0), 0, most - len(flat))),
        labels=functional.pad(labels, (0, most - len(labels)), value=-1),
        label_counts=counts,
    )


def _staged(job: Job) -> StagedModel:
    assert isinstance(job.model.module, StagedModel)
    return job.model.module


def _optimisers(job: Job, state: State | None) -> tuple[SGD, SGD | None]:
    """Load the client's linear heads, if there are any, and return the optimisers of the model and of the heads."""
    lr = job.learning_rate()
    if "heads" not in job.extras:
        return SGD(job, lr), None
    heads = job.extras["heads"]
    heads.load(state.heads if state else torch.zeros_like(heads.parameters))
    return SGD(job, lr), SGD(job, lr, heads.parameters)
