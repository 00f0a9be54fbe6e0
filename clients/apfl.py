"""APFL, client half: FedAvg's local steps on w, and steps on an own model v through the mixture of the two."""

from __future__ import annotations

import torch

from clients import fedavg
from clients.training import SGD, Job, Mean, Models, Outcome, Predictor, initial_statistics
from fedkd.data import Shard
from fedkd.losses import cross_entropy
from fedkd.methods.apfl import Hyper, State
from fedkd.methods.fedavg import Broadcast
from fedkd.models import gradients


def update(job: Job, broadcast: Broadcast, state: State | None, shard: Shard) -> Outcome:
    """Train w, v and, if adaptive, alpha; send w.

    paper (Algorithm 1, and Eq. 10 for alpha), all from the old point, ``m = alpha v + (1 - alpha) w``::

        w <- w - lr grad f(w);   v <- v - lr alpha grad f(m);   alpha <- clip(alpha - lr <v - w, grad f(m)>, 0, 1)

    authors, in this order, with the loss of the mixed logits ``alpha f(v) + (1 - alpha) f(w)`` at the new w and its
    gradients g_v and g_w, which hold a factor alpha and 1 - alpha already::

        w <- w - lr grad CE(w);   v <- v - lr_0 g_v
        alpha <- clip(alpha - lr (<v - w, alpha g_v + (1 - alpha) g_w> + alpha-pull alpha), 0, 1)

    Weight decay acts on w and on v; the authors' g_v in alpha's step holds it as well.
    """
    hyper: Hyper = job.hyper
    sgd, personal = fedavg.start(job, broadcast, state), job.extras["personal"]
    own = (job.initial_parameters if state is None else state.own).to(personal.device, copy=True)
    personal.load(own, initial_statistics(personal) if state is None else state.personal_statistics)
    personal.train()
    alpha = hyper.alpha if state is None else float(state.alpha)
    loss, personal_loss = Mean(), Mean()
    w = job.model.parameters
    if hyper.variant == "paper":
        own_sgd = SGD(job, sgd.lr, own)
        for step, (x, y) in enumerate(job.batches(shard)):
            personal.load(mixture(alpha, own, w))
            gradient = personal.backward(personal_loss.add(cross_entropy(personal(x), y)))
            slope = alpha_gradient(own, w, gradient) if _moves(hyper, step) else 0.0
            own_sgd.apply(alpha * gradient)
            sgd.step(loss.add(cross_entropy(job.model(x), y)))
            alpha = _clip(alpha - sgd.lr * slope)
    else:
        own = personal.parameters
        own_sgd = SGD(job, job.train.lr, own)
        for step, (x, y) in enumerate(job.batches(shard)):
            sgd.step(loss.add(cross_entropy(job.model(x), y)))
            statistics = job.model.statistics.clone()
            mixed = alpha * personal(x) + (1 - alpha) * job.model(x)
            w_gradient, own_gradient = gradients(personal_loss.add(cross_entropy(mixed, y)), job.model, personal)
            job.model.statistics.copy_(statistics)
            v_gradient = own_gradient + job.train.weight_decay * own
            own_sgd.apply(own_gradient)
            if _moves(hyper, step):
                slope = released_alpha_gradient(alpha, own, w, v_gradient, w_gradient, hyper.alpha_pull)
                alpha = _clip(alpha - sgd.lr * slope)
    base = fedavg.finish(job, shard, loss)
    return Outcome(
        update=base.update,
        state=State(
            **base.state.tensors(),
            own=own.clone(),
            copy=w.clone(),
            personal_statistics=personal.statistics.clone(),
            alpha=torch.tensor(alpha, dtype=torch.float64),
        ),
        metrics=base.metrics | {"personal_loss": personal_loss.metric(), "alpha": (alpha, 1.0)},
    )


def models(job: Job, broadcast: Broadcast, state: State | None, shard: Shard) -> Models:
    """The global model, and the mixture as the client's last local steps left it, before aggregation.

    A client that has not taken part yet has no trained model of its own and uses the global one.
    """
    hyper: Hyper = job.hyper

    def personal() -> Predictor:
        if state is None:
            job.load(broadcast.parameters, broadcast.statistics, None)
            return job.predictor()
        alpha = float(state.alpha)
        if hyper.variant == "paper":
            job.model.load(mixture(alpha, state.own, state.copy), state.personal_statistics)
            return job.predictor()
        own = job.extras["personal"]
        own.load(state.own, state.personal_statistics)
        own.eval()
        job.model.load(state.copy, state.statistics)
        copy = job.predictor()

        @torch.no_grad()
        def predict(x: torch.Tensor) -> torch.Tensor:
            return alpha * own(x) + (1 - alpha) * copy(x)

        return predict

    return Models(shared=fedavg.models(job, broadcast, state, shard).shared, personal=personal)


def mixture(alpha: float, own: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
    """Return ``alpha v + (1 - alpha) w`` for vectors ``[P]``."""
    return alpha * own + (1 - alpha) * copy


def alpha_gradient(own: torch.Tensor, copy: torch.Tensor, gradient: torch.Tensor) -> float:
    """Return Eq. 10's ``d f(alpha v + (1 - alpha) w) / d alpha = <v - w, grad f>``, the gradient at the mixture."""
    return float(torch.dot(own - copy, gradient))


def released_alpha_gradient(
    alpha: float,
    own: torch.Tensor,
    copy: torch.Tensor,
    own_gradient: torch.Tensor,
    copy_gradient: torch.Tensor,
    pull: float,
) -> float:
    """Return FedTorch's ``<v - w, alpha g_v + (1 - alpha) g_w> + pull alpha`` (``alpha_update``).

    The gradients are those of the mixed loss with respect to v and w, so for a model that is linear in its parameters
    this is ``alpha^2 + (1 - alpha)^2`` times Eq. 10, plus the pull; for others not even its sign is Eq. 10's.
    """
    both = alpha * own_gradient + (1 - alpha) * copy_gradient
    return float(torch.dot(own - copy, both)) + pull * alpha


def _moves(hyper: Hyper, step: int) -> bool:
    """Whether alpha moves in a local step (from 0)."""
    return hyper.adaptive and (step == 0 or hyper.alpha_steps == "every")


def _clip(alpha: float) -> float:
    return min(max(alpha, 0.0), 1.0)
