"""PGFed, client half: local SGD on the client's risk and the others' expanded risks, whose weights it learns."""

from __future__ import annotations

import math

import torch

from clients import fedavg
from clients.training import Job, Mean, Metrics, Models, Outcome, Predictor
from fedkd.data import Shard
from fedkd.losses import cross_entropy
from fedkd.methods import fedavg as fedavg_contract
from fedkd.methods.pgfed import Broadcast, Hyper, Personal, State, Update

adapt = fedavg.adapt  # a newcomer has no auxiliary gradient


def update(job: Job, broadcast: Broadcast, state: State | None, shard: Shard) -> Outcome:
    """Train from the global model with the auxiliary gradient, and learn alpha; then expand the own risk.

    In every step, with a the auxiliary gradient of this participation, constant within it:

    ``alpha_j <- max(0, alpha_j - lam mu (c_j + <g, theta>))`` for all previous participants j, g being the mean of
    their gradients or g_j, theta before the step; ``theta <- theta - lr (grad CE + a)``.

    In the first round nobody has a risk to share: FedAvg's local steps.
    """
    hyper: Hyper = job.hyper
    personal: Personal = job.personal
    device = job.model.device
    alpha, offsets = personal.alpha.to(device), broadcast.offsets.to(device)
    gradients = _gradients(broadcast).to(device)
    auxiliary = _auxiliary(job, broadcast, personal, state)
    extra = None if auxiliary is None else auxiliary.to(device)
    sgd, loss = fedavg.start(job, broadcast, state), Mean()
    if hyper.momentum_buffer == "kept" and job.train.momentum and state is not None:
        sgd.buffer = state.buffer.to(device).clone()
    for x, y in job.batches(shard):
        batch_loss = loss.add(cross_entropy(job.model(x), y))
        if extra is not None:
            alpha = (alpha - hyper.lam * alpha_gradient(offsets, gradients, job.model.parameters)).clamp(min=0)
        sgd.step(batch_loss, extra)
    base = fedavg.finish(job, shard, loss)
    gradient, offset = expansion(job, shard)
    return Outcome(
        update=Update(
            **base.update.tensors(),
            client=torch.tensor(job.client),
            gradient=gradient,
            offset=offset,
            alpha=alpha.cpu(),
        ),
        state=State(
            **base.state.tensors(),
            parameters=job.model.parameters.clone(),
            auxiliary=_kept(bool(hyper.beta), auxiliary, job),
            buffer=_kept(hyper.momentum_buffer == "kept", sgd.buffer, job),
        ),
        metrics=base.metrics | (_alpha_metrics(alpha, broadcast, job.client) if extra is not None else {}),
    )


def alpha_gradient(offsets: torch.Tensor, gradients: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """Return ``dF/dalpha_j = mu (c_j + <g_j, theta>)`` for the previous participants j, ``[cohort]``.

    Args:
        offsets: ``mu c_j``, ``[cohort]``.
        gradients: ``mu g_j``, ``[cohort, P]``, or their mean ``[1, P]`` in place of each.
        theta: ``[P]``.
    """
    return offsets + gradients @ theta


def expansion(job: Job, shard: Shard) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``g = grad f(theta)`` ``[P]`` and ``c = f(theta) - <g, theta>``, f the mean loss on the local data.

    One more pass over all of it, in equal batches and in training mode as the released code does it, so the
    workspace's statistics are used up.
    """
    count = len(shard)
    gradient, risk = torch.zeros_like(job.model.parameters), 0.0
    for rows in torch.arange(count, device=shard.y.device).tensor_split(math.ceil(count / job.train.batch_size)):
        x, y = shard.batch(rows)
        loss = cross_entropy(job.model(x), y).sum() / count
        gradient += job.model.backward(loss)
        risk += loss.item()
    slope = float(gradient.double() @ job.model.parameters.double())
    return gradient, torch.tensor(risk - slope, dtype=torch.float32)


def models(job: Job, broadcast: fedavg_contract.Broadcast, state: State | None, shard: Shard) -> Models:
    """The global model, and the client's own as its last local steps left it; without one, the global model."""

    def personal() -> Predictor:
        if state is not None:
            job.model.load(state.parameters, state.statistics)
        else:
            job.load(broadcast.parameters, broadcast.statistics, None)
        return job.predictor()

    return Models(shared=fedavg.models(job, broadcast, state, shard).shared, personal=personal)


def _gradients(broadcast: Broadcast) -> torch.Tensor:
    """Return ``mu g_mean`` ``[1, P]`` or every ``mu g_j`` ``[cohort, P]``, whichever was sent."""
    return broadcast.mean_gradient if len(broadcast.mean_gradient) else broadcast.gradients[0]


def _auxiliary(job: Job, broadcast: Broadcast, personal: Personal, state: State | None) -> torch.Tensor | None:
    """Return this participation's auxiliary gradient ``[P]``; None in the first round.

    PGFedMo: ``(1 - beta) new + beta old``, old being that of the client's last participation, if it had one then:
    after the first round every participation has.
    """
    if int(broadcast.participants[0]) < 0:
        return None
    hyper: Hyper = job.hyper
    if hyper.beta and state is not None and job.last_round > 1:
        return (1 - hyper.beta) * personal.auxiliary + hyper.beta * state.auxiliary
    return personal.auxiliary


def _kept(wanted: bool, vector: torch.Tensor | None, job: Job) -> torch.Tensor:
    """Return a vector ``[P]`` to keep: zero where there is none yet, of length zero where none is wanted."""
    if not wanted:
        return torch.zeros(0)
    return torch.zeros_like(job.model.parameters) if vector is None else vector.clone()


def _alpha_metrics(alpha: torch.Tensor, broadcast: Broadcast, client: int) -> Metrics:
    """Return the summary of a client's alpha over the previous participants; its own only if it was one."""
    values = {"alpha_mean": alpha.mean(), "alpha_min": alpha.min(), "alpha_max": alpha.max()}
    mine = (broadcast.participants == client).nonzero().flatten()
    if len(mine):
        values["alpha_self"] = alpha[int(mine)]
    return {name: (float(value), 1.0) for name, value in values.items()}
