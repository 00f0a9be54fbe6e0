"""FedAvg, client half: local SGD from the global model (McMahan et al. 2017, Algorithm 1, ClientUpdate)."""

from __future__ import annotations

from collections.abc import Iterator

from clients.training import SGD, Job, Mean, Models, Outcome, Predictor, fine_tuned
from fedkd.data import Shard
from fedkd.losses import cross_entropy
from fedkd.methods.fedavg import Broadcast, State, Update


def update(job: Job, broadcast: Broadcast, state: State | None, shard: Shard) -> Outcome:
    """``theta_k <- theta; theta_k <- theta_k - lr * grad CE`` over the local batches; send ``theta_k``."""
    sgd, loss = start(job, broadcast, state), job.mean()
    for x, y in job.batches(shard):
        sgd.step(loss.add(cross_entropy(job.model(x), y)))
    return finish(job, shard, loss)


def start(job: Job, broadcast: Broadcast, state: State | None) -> SGD:
    """Load the global model, in training mode, and return the optimiser of this participation."""
    job.load(broadcast.parameters, broadcast.statistics, state.statistics if state else None)
    job.model.train()
    return SGD(job, job.learning_rate())


def finish(job: Job, shard: Shard, loss: Mean) -> Outcome:
    """Collect the trained workspace into FedAvg's update and state."""
    return Outcome(
        update=Update(
            parameters=job.model.parameters.clone(),
            statistics=job.shared_statistics(),
            examples=shard.examples,
        ),
        state=State(statistics=job.model.statistics.clone()),
        metrics={"loss": loss.metric()},
    )


def adapt(job: Job, broadcast: Broadcast, shard: Shard) -> Iterator[Predictor]:
    """Plain fine-tuning: a newcomer predicts with what its local steps have made of the global model."""
    return fine_tuned(job, start(job, broadcast, None), shard)


def models(job: Job, broadcast: Broadcast, state: State | None, shard: Shard) -> Models:
    """One model for all: the global one, with this client's statistics when those are personal."""

    def shared() -> Predictor:
        job.load(broadcast.parameters, broadcast.statistics, state.statistics if state else None)
        return job.predictor()

    return Models(shared=shared, personal=None)
