"""FedProto, client half: local SGD that pulls features towards the global prototypes (Tan et al. 2022, Eq. 7)."""

from __future__ import annotations

import torch
from torch.nn.functional import one_hot

from clients import local
from clients.training import Job, Mean, Models, Outcome, Predictor
from fedkd.data import Shard
from fedkd.losses import cross_entropy
from fedkd.methods.fedproto import Broadcast, Hyper, Update
from fedkd.methods.local import Broadcast as Nothing
from fedkd.methods.local import State

FORWARD_BATCH = 1024


def update(job: Job, broadcast: Broadcast, state: State | None, shard: Shard) -> Outcome:
    """``theta <- theta - lr * grad [ CE(f(x), y) + weight * L_R ]`` on the client's own model; send its prototypes."""
    hyper: Hyper = job.hyper
    device = job.model.device
    prototypes, known = broadcast.prototypes.to(device), broadcast.known.to(device) > 0
    sums, counts = torch.zeros_like(prototypes), torch.zeros_like(broadcast.known).to(device)
    sgd, loss, distance = local.start(job, state), Mean(), Mean()
    for x, y in job.batches(shard):
        taken = job.model(x, stop=hyper.layer)
        features, members = taken.flatten(1), one_hot(y, len(known))
        sums, counts = sums + members.to(features.dtype).T @ features.detach(), counts + members.sum(dim=0)
        total = loss.add(cross_entropy(job.model(taken, start=hyper.layer), y))
        if hyper.weight and known.any():
            total = total + hyper.weight * _distance(hyper, features, y, prototypes, known, distance)
        sgd.step(total)
    trained = State(job.model.parameters.clone(), job.model.statistics.clone())
    if hyper.variant == "paper":
        sums, counts = _features(job, shard, len(known))
    means = sums / counts.clamp(min=1)[:, None]
    sent = counts if hyper.variant == "paper" else (counts > 0).long()
    metrics = {"loss": loss.metric()} | ({"prototype_loss": distance.metric()} if distance.weight else {})
    return Outcome(Update(means.cpu(), sent.cpu(), torch.tensor(len(shard))), trained, metrics)


def models(job: Job, broadcast: Broadcast, state: State | None, shard: Shard) -> Models:
    """The client's own model; its logits are minus the distances to the prototypes, or those of its head.

    A class that is out of the question (no prototype; in the authors variant also: not the client's) is put behind all
    others, at the largest distance plus one.  Without any prototype the head predicts.
    """
    hyper: Hyper = job.hyper
    own = local.models(job, Nothing(), state, shard)
    known = broadcast.known > 0
    if hyper.variant == "authors":
        known &= shard.class_counts(len(known)) > 0
    if hyper.predict == "head" or not known.any():
        return own

    def personal() -> Predictor:
        assert own.personal is not None
        own.personal()
        prototypes, candidates = broadcast.prototypes.to(job.model.device), known.to(job.model.device)

        @torch.no_grad()
        def predict(x: torch.Tensor) -> torch.Tensor:
            return nearest(job.model(x, stop=hyper.layer).flatten(1), prototypes, candidates)

        return predict

    return Models(shared=None, personal=personal)


def nearest(features: torch.Tensor, prototypes: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Eq. 4: return ``-||f(x) - C_j||_2`` as logits ``[batch, classes]``; the largest is the nearest prototype's.

    Args:
        features: ``[batch, features]``.
        prototypes: ``[classes, features]``.
        candidates: ``[classes]``, false for classes to be put behind all others.
    """
    distances = torch.cdist(features, prototypes, compute_mode="donot_use_mm_for_euclid_dist")
    farthest = distances[:, candidates].amax(dim=1, keepdim=True) + 1
    return -torch.where(candidates, distances, farthest)


def squared_error(
    features: torch.Tensor, labels: torch.Tensor, prototypes: torch.Tensor, known: torch.Tensor
) -> torch.Tensor:
    """L_R as released: ``1/d ||f(x) - C_y||^2`` per row ``[batch]``, zero where the class has no prototype.

    Args:
        features: ``[batch, features]``.
        labels: ``[batch]``.
        prototypes: ``[classes, features]``; no gradient flows into them.
        known: ``[classes]``.
    """
    return (features - prototypes[labels]).square().mean(dim=1) * known[labels]


def prototype_distance(
    features: torch.Tensor, labels: torch.Tensor, prototypes: torch.Tensor, known: torch.Tensor
) -> torch.Tensor:
    """Eq. 8 with the L2 distance: ``||C_j^batch - C_j||_2`` per class ``[classes]``; L_R is the sum.

    ``C_j^batch`` is the mean feature vector of class j in the batch (Eq. 3); classes that are not in it, or have no
    global prototype, are zero.

    Args:
        features: ``[batch, features]``.
        labels: ``[batch]``.
        prototypes: ``[classes, features]``; no gradient flows into them.
        known: ``[classes]``.
    """
    members = one_hot(labels, len(known)).to(features.dtype)
    counts = members.sum(dim=0)
    gaps = (members.T @ features) / counts.clamp(min=1)[:, None] - prototypes
    norms: torch.Tensor = torch.linalg.vector_norm(gaps[(counts > 0) & known], dim=1)
    return norms


def _distance(
    hyper: Hyper, features: torch.Tensor, y: torch.Tensor, prototypes: torch.Tensor, known: torch.Tensor, metric: Mean
) -> torch.Tensor:
    """Return L_R of the variant, and add it to the metric: a mean over examples, or over classes."""
    if hyper.variant == "authors":
        return metric.add(squared_error(features, y, prototypes, known))
    distances = prototype_distance(features, y, prototypes, known)
    if len(distances):
        metric.add(distances)
    return distances.sum()


@torch.no_grad()
def _features(job: Job, shard: Shard, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of the trained model's features ``[classes, features]`` and the count of each class (Eq. 3)."""
    hyper: Hyper = job.hyper
    job.model.eval()
    sums: torch.Tensor | float = 0.0
    counts: torch.Tensor | int = 0
    for start in range(0, len(shard), FORWARD_BATCH):
        x, y = shard.batch(slice(start, start + FORWARD_BATCH))
        members = one_hot(y, classes)
        features = job.model(x, stop=hyper.layer).flatten(1)
        sums, counts = sums + members.to(features.dtype).T @ features, counts + members.sum(dim=0)
    assert isinstance(sums, torch.Tensor)
    assert isinstance(counts, torch.Tensor)
    return sums, counts
