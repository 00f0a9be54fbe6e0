"""FedDistill, client half: local SGD with the mean outputs of the other clients as a teacher for each class."""

from __future__ import annotations

import torch
from torch.nn.functional import one_hot

from clients import fedavg, local
from clients.training import Job, Mean, Models, Outcome
from fedkd.data import Shard
from fedkd.losses import cross_entropy, kl
from fedkd.methods.feddistill import Broadcast, Hyper, SharedBroadcast, SharedState, SharedUpdate, State, Update
from fedkd.methods.local import Broadcast as Nothing
from fedkd.payload import Record


def update(
    job: Job, broadcast: Broadcast | SharedBroadcast, state: State | SharedState | None, shard: Shard
) -> Outcome:
    """``theta <- theta - lr * grad [ CE(f(x), y) + weight * KL(teacher_y || f(x)) ]``, where class y has a teacher.

    The KL has the gradient of the cross-entropy against the teacher that Jeong et al. write (Algorithm 1, line 5).
    Outputs are summed as they come, in training mode and before each step (line 6).
    """
    hyper: Hyper = job.hyper
    device = job.model.device
    teacher, known = (t.to(device) for t in _teacher(job, broadcast, state))
    sums, counts = (t.to(device) for t in _sums(job, broadcast, state))
    if isinstance(broadcast, SharedBroadcast):
        assert not isinstance(state, State)
        sgd = fedavg.start(job, broadcast, state)
    else:
        assert not isinstance(state, SharedState)
        sgd = local.start(job, state)
    loss, distillation = Mean(), Mean()
    for x, y in job.batches(shard):
        logits = job.model(x)
        members = one_hot(y, len(counts))
        outputs = logits.detach() if hyper.variant == "authors" else logits.detach().softmax(dim=1)
        sums, counts = sums + members.to(outputs.dtype).T @ outputs, counts + members.sum(dim=0)
        total = loss.add(cross_entropy(logits, y))
        if hyper.weight and known.any():
            total = total + hyper.weight * distillation.add(kl(teacher[y], logits) * known[y])
        sgd.step(total)
    kept = {"output_sums": sums.cpu(), "output_counts": counts.cpu()}
    means = _means(hyper, kept["output_sums"], kept["output_counts"])
    held = torch.ones_like(kept["output_counts"]) if hyper.variant == "authors" else (kept["output_counts"] > 0).long()
    metrics = {"loss": loss.metric()} | ({"distillation_loss": distillation.metric()} if distillation.weight else {})
    base = fedavg.finish(job, shard, loss)
    if hyper.share_model:
        update: Record = SharedUpdate(**base.update.tensors(), outputs=means, held=held)
        return Outcome(update, SharedState(**base.state.tensors(), **kept), metrics)
    own = State(parameters=job.model.parameters.clone(), **base.state.tensors(), **kept)
    return Outcome(Update(outputs=means, held=held, examples=torch.tensor(len(shard))), own, metrics)


def models(job: Job, broadcast: Broadcast | SharedBroadcast, state: State | SharedState | None, shard: Shard) -> Models:
    """FedAvg's global model with ``share-model``, else the client's own."""
    if isinstance(broadcast, SharedBroadcast):
        assert not isinstance(state, State)
        return fedavg.models(job, broadcast, state, shard)
    assert not isinstance(state, SharedState)
    return local.models(job, Nothing(), state, shard)


def _teacher(
    job: Job, broadcast: Broadcast | SharedBroadcast, state: State | SharedState | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the teacher's logits ``[classes, classes]`` and whether a class has one ``[classes]``.

    paper: the mean over the others, ``(sum - own) / (M - 1)`` (Algorithm 1, line 15), for a client that took part in
    the round that the sum is of.
    """
    hyper: Hyper = job.hyper
    sums, contributors = broadcast.outputs, broadcast.contributors
    if hyper.variant == "paper" and state is not None and job.last_round == job.round - 1:
        sums = sums - _means(hyper, state.output_sums, state.output_counts)
        contributors = contributors - (state.output_counts > 0).long()
    mean = sums / contributors.clamp(min=1)[:, None]
    if hyper.variant == "paper":  # probabilities, whose difference from zero may be rounding
        mean = mean.clamp(min=torch.finfo(mean.dtype).tiny).log()
    return mean, contributors > 0


def _sums(
    job: Job, broadcast: Broadcast | SharedBroadcast, state: State | SharedState | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums and counts to go on from: the released code never starts them afresh."""
    if job.hyper.variant == "authors" and state is not None:
        return state.output_sums, state.output_counts
    return torch.zeros_like(broadcast.outputs), torch.zeros_like(broadcast.contributors)


def _means(hyper: Hyper, sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return the mean output of each class ``[classes, classes]``; the released code counts from one."""
    return sums / (counts + 1 if hyper.variant == "authors" else counts.clamp(min=1))[:, None]
