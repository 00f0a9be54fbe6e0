"""No federation, client half: local SGD on the client's own model."""

from __future__ import annotations

from collections.abc import Iterator

from clients.training import SGD, Job, Models, Outcome, Predictor, fine_tuned, initial_statistics
from fedkd.data import Shard
from fedkd.losses import cross_entropy
from fedkd.methods.local import Broadcast, State, Update


def update(job: Job, broadcast: Broadcast, state: State | None, shard: Shard) -> Outcome:
    """``theta_k <- theta_k - lr * grad CE`` over the local batches; nothing but a count is sent."""
    sgd, loss = start(job, state), job.mean()
    for x, y in job.batches(shard):
        sgd.step(loss.add(cross_entropy(job.model(x), y)))
    return Outcome(
        update=Update(examples=shard.examples),
        state=State(
            parameters=job.model.parameters.clone(),
            statistics=job.model.statistics.clone(),
        ),
        metrics={"loss": loss.metric()},
    )


def adapt(job: Job, broadcast: Broadcast, shard: Shard) -> Iterator[Predictor]:
    """The same steps, from the initial model."""
    return fine_tuned(job, start(job, None), shard)


def start(job: Job, state: State | None) -> SGD:
    """Load the client's own model, in training mode, and return the optimiser of this participation."""
    load(job, state)
    job.model.train()
    return SGD(job, job.learning_rate())


def models(job: Job, broadcast: Broadcast, state: State | None, shard: Shard) -> Models:
    """The client's own model; there is no global one."""

    def personal() -> Predictor:
        load(job, state)
        return job.predictor()

    return Models(shared=None, personal=personal)


def load(job: Job, state: State | None) -> None:
    """Fill the workspace with the client's own model, or with the initial one."""
    if state is None:
        job.model.load(job.initial_parameters, initial_statistics(job.model))
    else:
        job.model.load(state.parameters, state.statistics)
