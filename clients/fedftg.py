"""FedFTG, client half: the base method's local training; only the class counts are added (Zhang et al. 2022)."""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from clients import scaffold
from clients.training import Job, Models, Outcome
from fedkd.data import Shard
from fedkd.methods.fedftg import Hyper, base_config, records, refers_to_aggregated
from fedkd.methods.scaffold import Hyper as ScaffoldHyper


def update(job: Job, broadcast: Any, state: Any, shard: Shard) -> Outcome:
    """Train as the base method does, from the fine-tuned model; send its update and n_k^y, the examples per class."""
    hyper: Hyper = job.hyper
    half, own = _base(job)
    if refers_to_aggregated(hyper):
        settings: ScaffoldHyper = own.hyper
        outcome = scaffold.train(
            own,
            broadcast,
            state,
            shard,
            variant=settings.variant,
            correction=settings.correction,
            reference=broadcast.aggregated,
        )
    else:
        outcome = half.update(own, broadcast, state, shard)
    classes = job.model.shapes["stages.head.bias"][0]
    counts = torch.bincount(shard.y, minlength=classes).cpu()
    sent = records(hyper)["Update"](**outcome.update.tensors(), class_counts=counts)
    return outcome._replace(update=sent)


def models(job: Job, broadcast: Any, state: Any, shard: Shard) -> Models:
    """The base method's models; the global one is the one that was sent for scoring."""
    half, own = _base(job)
    scored: Models = half.models(own, broadcast, state, shard)
    return scored


def _base(job: Job) -> tuple[ModuleType, Job]:
    """Return the base method's client half and the job as it sees it."""
    config = base_config(job.config)
    return importlib.import_module(f"clients.{job.hyper.base}"), replace(job, config=config)
