"""FedEnsemble, client half: FedAvg's training; the ensemble of the round's models predicts."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from clients import fedavg
from clients.training import Job, Models, Predictor
from fedkd.data import Shard
from fedkd.ensemble import ensemble
from fedkd.methods.fedavg import State
from fedkd.methods.fedensemble import Hyper, Scoring

update, adapt = fedavg.update, fedavg.adapt


def models(job: Job, broadcast: Scoring, state: State | None, shard: Shard) -> Models:
    """Average the members' predictions: ``1/M sum_k f(theta_k; x)`` for the M models of the round.

    With ``members = "all"`` it is ``1/N (sum_k f(theta_k; x) + (N - M) f(theta; x))`` for N clients and the model theta
    that the round started from.  Where BatchNorm statistics are personal, each member runs with this client's own.
    """
    hyper: Hyper = job.hyper
    kept = state.statistics if state else None
    members = list(zip(broadcast.models, broadcast.model_statistics, strict=True))
    counts = [1] * len(members)
    if hyper.members == "all" and (others := job.config.run.clients - len(members)):
        members.append((broadcast.start, broadcast.start_statistics))
        counts.append(others)
    weights = [count / sum(counts) for count in counts]

    @torch.no_grad()
    def predict(x: torch.Tensor) -> torch.Tensor:
        def logits() -> Iterator[torch.Tensor]:
            for parameters, statistics in members:
                job.load(parameters, statistics, kept)
                yield job.predictor()(x)

        return ensemble(logits(), weights, hyper.average)

    def shared() -> Predictor:
        return predict

    return Models(shared=shared, personal=None)
