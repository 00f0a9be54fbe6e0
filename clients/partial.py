"""What the client halves share that exchange a part of the model: put the two parts together, and take them apart."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from clients.training import SGD, Job, Mean, Models, Outcome, Predictor, fine_tuned, initial_statistics
from fedkd.data import Shard
from fedkd.partial import Broadcast, Hyper, State, Update, put, statistics_of, take


def load(job: Job, broadcast: Broadcast, state: State | None, own: bool = True) -> None:
    """Fill the workspace: the shared part from the server, the rest from the client's state.

    Without a state the rest is as the run's seed initialised it, the same for all clients.  Statistics of shared
    BatchNorm layers are the server's where those travel, else the client's.

    Args:
        own: False leaves the personal part as initialised, whatever the client has.
    """
    hyper: Hyper = job.hyper
    shared = hyper.shared(job.model)
    shared_statistics = statistics_of(job.model, shared)
    parameters, statistics = job.initial_parameters.cpu().clone(), initial_statistics(job.model)
    put(broadcast.parameters, shared, parameters)
    if state is not None:
        mine = shared_statistics | own
        statistics[..., mine] = state.statistics.cpu()[..., mine]
        if own:
            put(state.parameters, ~shared, parameters)
    if len(broadcast.statistics):
        statistics[..., shared_statistics] = broadcast.statistics
    job.model.load(parameters, statistics)


def start(job: Job, broadcast: Broadcast, state: State | None, part: torch.Tensor | None = None) -> SGD:
    """Load the client's model, in training mode, and return the optimiser of this participation.

    Args:
        part: mask ``[P]`` of the parameters to train; None: all.
    """
    load(job, broadcast, state)
    job.model.train()
    return SGD(job, job.learning_rate(), part=part)


def adapt(job: Job, broadcast: Broadcast, shard: Shard, part: torch.Tensor | None = None) -> Iterator[Predictor]:
    """A newcomer trains both parts, or the one that is given, from the shared part and the initial rest."""
    return fine_tuned(job, start(job, broadcast, None, part), shard)


def finish(job: Job, shard: Shard, loss: Mean) -> Outcome:
    """Take the trained workspace apart: the shared part is the update, the rest is the state."""
    hyper: Hyper = job.hyper
    shared = hyper.shared(job.model)
    parameters, statistics = job.model.parameters.cpu(), job.model.statistics.cpu()
    averaged = job.config.model.norm_statistics == "averaged"
    return Outcome(
        update=Update(
            parameters=take(parameters, shared),
            statistics=statistics[..., statistics_of(job.model, shared) & averaged],
            examples=shard.examples,
        ),
        state=State(parameters=take(parameters, ~shared), statistics=statistics.clone()),
        metrics={"loss": loss.metric()},
    )


def models(job: Job, broadcast: Broadcast, state: State | None, shard: Shard) -> Models:
    """The shared part with the initial rest, which is what a newcomer gets, and with the client's own rest."""

    def shared() -> Predictor:
        load(job, broadcast, state, own=False)
        return job.predictor()

    def personal() -> Predictor:
        load(job, broadcast, state)
        return job.predictor()

    return Models(shared=shared, personal=personal)
