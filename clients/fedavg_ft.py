"""FedAvg scored after the same local steps, client half: FedAvg's training, the trained copy is kept and scored."""

from __future__ import annotations

from clients import fedavg
from clients.training import Job, Models, Outcome, Predictor
from fedkd.data import Shard
from fedkd.methods.fedavg import Broadcast
from fedkd.methods.fedavg_ft import Hyper, State

adapt = fedavg.adapt


def update(job: Job, broadcast: Broadcast, state: State | None, shard: Shard) -> Outcome:
    """FedAvg's local training; the client also keeps its model as it is before aggregation."""
    outcome = fedavg.update(job, broadcast, state, shard)
    return outcome._replace(state=State(**outcome.state.tensors(), parameters=job.model.parameters.clone()))


def models(job: Job, broadcast: Broadcast, state: State | None, shard: Shard) -> Models:
    """The global model, and the client's own after local steps; a client that has none yet uses the global model."""
    hyper: Hyper = job.hyper

    def personal() -> Predictor:
        if hyper.score == "now":
            fedavg.update(job, broadcast, state, shard)
        elif state is not None:
            job.model.load(state.parameters, state.statistics)
        else:
            job.load(broadcast.parameters, broadcast.statistics, None)
        return job.predictor()

    return Models(shared=fedavg.models(job, broadcast, state, shard).shared, personal=personal)
