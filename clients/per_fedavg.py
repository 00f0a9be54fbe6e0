"""Per-FedAvg, client half: SGD on the loss after a gradient step (Fallah et al. 2020, the paper's algorithm)."""

from __future__ import annotations

import torch

from clients import fedavg
from clients.training import Job, Mean, Models, Outcome, Predictor
from fedkd.data import Shard
from fedkd.losses import cross_entropy
from fedkd.methods.fedavg import Broadcast, State
from fedkd.methods.per_fedavg import Hyper

SCORE_BATCH = 1024
"""Examples at a time when the gradient over all of a client's data is computed."""
Batch = tuple[torch.Tensor, torch.Tensor]

adapt = fedavg.adapt  # the model that was trained to be adapted is adapted, not trained on


def update(job: Job, broadcast: Broadcast, state: State | None, shard: Shard) -> Outcome:
    """Step along the gradient of ``f(w - alpha grad f(w))``, on three batches drawn independently; send w.

    ::

        u <- w - alpha grad f(w; D)
        w <- w - lr (I - alpha Hess f(w; D'')) grad f(u; D')

    D' are the batches that FedAvg would take.  BatchNorm's running statistics follow the passes at u alone.
    """
    hyper: Hyper = job.hyper
    model, sgd, loss = job.model, fedavg.start(job, broadcast, state), Mean()
    adaptation, curvature = (job.batches(shard, purpose=name) for name in ("adaptation", "curvature"))
    for x, y in job.batches(shard):
        w = model.parameters.clone()
        model.parameters.add_(_gradient(job, next(adaptation)), alpha=-hyper.alpha)
        direction = model.backward(loss.add(cross_entropy(model(x), y))).clone()
        model.load(w)
        if hyper.variant != "first-order":
            direction -= hyper.alpha * hessian_product(job, direction, next(curvature))
        sgd.apply(direction)
    return fedavg.finish(job, shard, loss)


def models(job: Job, broadcast: Broadcast, state: State | None, shard: Shard) -> Models:
    """The global model, and the same after ``score-steps`` gradient steps on the client's own training data."""
    hyper: Hyper = job.hyper

    def personal() -> Predictor:
        fedavg.start(job, broadcast, state)
        for _ in range(hyper.score_steps):
            gradient = torch.zeros_like(job.model.parameters)
            for rows in torch.split(torch.arange(len(shard), device=shard.y.device), SCORE_BATCH):
                gradient.add_(_gradient(job, shard.batch(rows)), alpha=len(rows) / len(shard))
            job.model.parameters.add_(gradient, alpha=-hyper.alpha)
        return job.predictor()

    return Models(shared=fedavg.models(job, broadcast, state, shard).shared, personal=personal)


def hessian_product(job: Job, vector: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return ``Hess f(w) vector`` ``[P]`` at the workspace's w: exactly, or by a central difference (variant)."""
    hyper: Hyper = job.hyper
    model, w = job.model, job.model.parameters.clone()
    if hyper.variant == "hessian-free":
        model.load(w + hyper.delta * vector)
        ahead = _gradient(job, batch)
        model.load(w - hyper.delta * vector)
        behind = _gradient(job, batch)
        model.load(w)
        return (ahead - behind) / (2 * hyper.delta)
    (x, y), statistics = batch, model.statistics.clone()
    gradients = torch.autograd.grad(cross_entropy(model(x), y).mean(), model.tensors, create_graph=True)
    along = list(model.unflatten(vector).values())
    products = torch.autograd.grad(gradients, model.tensors, grad_outputs=along, materialize_grads=True)
    model.statistics.copy_(statistics)
    return model.flatten(products, torch.empty_like(w))


def _gradient(job: Job, batch: Batch) -> torch.Tensor:
    """Return the mean loss's gradient ``[P]`` on a batch at the workspace's parameters, leaving statistics alone."""
    (x, y), statistics = batch, job.model.statistics.clone()
    gradient = job.model.backward(cross_entropy(job.model(x), y).mean()).clone()
    job.model.statistics.copy_(statistics)
    return gradient
