"""Ditto, client half: FedAvg's local steps, and as many on a personal model (Li et al. 2021, Algorithm 1)."""

from __future__ import annotations

from clients import fedavg
from clients.training import SGD, Job, Mean, Models, Outcome, Predictor, initial_statistics
from fedkd.data import Shard
from fedkd.losses import cross_entropy
from fedkd.methods.ditto import Hyper, State
from fedkd.methods.fedavg import Broadcast


def update(job: Job, broadcast: Broadcast, state: State | None, shard: Shard) -> Outcome:
    """Send FedAvg's ``theta_k``; on the same batches ``v_k <- v_k - lr (grad F_k(v_k) + lambda (v_k - theta))``.

    theta is the global model as it was sent, not the client's copy of it.  The personal model starts from the initial
    model and goes on from where the client's last participation left it.
    """
    hyper: Hyper = job.hyper
    base = fedavg.update(job, broadcast, state, shard)
    anchor = broadcast.parameters.to(job.model.device)
    if state is None:
        job.model.load(job.initial_parameters, initial_statistics(job.model))
    else:
        job.model.load(state.parameters, state.personal_statistics)
    sgd, loss = SGD(job, job.learning_rate()), Mean()
    for x, y in job.batches(shard):
        sgd.step(
            loss.add(cross_entropy(job.model(x), y)),
            extra=hyper.lam * (job.model.parameters - anchor),
        )
    return Outcome(
        update=base.update,
        state=State(
            **base.state.tensors(),
            parameters=job.model.parameters.clone(),
            personal_statistics=job.model.statistics.clone(),
        ),
        metrics=base.metrics | {"personal_loss": loss.metric()},
    )


def models(job: Job, broadcast: Broadcast, state: State | None, shard: Shard) -> Models:
    """The global model and the client's own; a client that has not taken part yet uses the global one."""

    def personal() -> Predictor:
        if state is None:
            job.load(broadcast.parameters, broadcast.statistics, None)
        else:
            job.model.load(state.parameters, state.personal_statistics)
        return job.predictor()

    return Models(shared=fedavg.models(job, broadcast, state, shard).shared, personal=personal)
