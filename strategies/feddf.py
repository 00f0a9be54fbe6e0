"""FedDF, server half: average, then distil the ensemble into the average (Lin et al. 2020, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from fedkd.data import Shard
from fedkd.ensemble import ensemble
from fedkd.errors import UserError
from fedkd.losses import kl
from fedkd.methods.fedavg import Update
from fedkd.methods.feddf import Hyper
from fedkd.setup import Setup
from strategies import fedavg
from strategies.base import Metrics
from strategies.fedavg import State

LARGEST_NORM = 5.0
"""Norm at which the released code clips the gradient of a distillation step; the paper does not mention it."""
FORWARD_BATCH = 1024

broadcast = fedavg.broadcast


def init(setup: Setup) -> State:
    """Start as FedAvg does.

    Raises:
        UserError: no public data, or BatchNorm whose statistics never reach the server.
    """
    hyper: Hyper = setup.hyper
    if hyper.steps and setup.config.data.public_fraction <= 0:
        raise UserError(
            "data.public-fraction = 0 leaves feddf no public data to distil on; take data.public-fraction=0.1 "
            "(or feddf.steps=0, which is fedavg)"
        )
    if hyper.steps and setup.sizes["statistics"] and not setup.sizes["shared_statistics"]:
        raise UserError(
            "feddf runs the clients' models on the server, and their BatchNorm statistics stay with the clients; take "
            "model.norm=group, or model.norm-statistics=averaged"
        )
    return fedavg.init(setup)


def update(setup: Setup, state: State, updates: Sequence[Update], round: int) -> tuple[State, Metrics]:
    """Average by examples (line 6), then take ``steps`` Adam steps of ensemble distillation (lines 7 to 10)."""
    hyper: Hyper = setup.hyper
    averaged, metrics = fedavg.update(setup, state, updates, round)
    if not hyper.steps:
        return averaged, metrics
    assert setup.public is not None, "the set-up of this server was built without its public data"
    return _distil(setup, averaged, updates, setup.public, round)


def _distil(
    setup: Setup, averaged: State, updates: Sequence[Update], public: Shard, round: int
) -> tuple[State, Metrics]:
    """``x <- x - Adam(grad mean_d KL(softmax(1/|S| sum_k f(x_k, d)) || softmax(f(x, d))))`` from the average.

    The teachers run in evaluation mode and the student in training mode, as in the released code.
    """
    hyper: Hyper = setup.hyper
    model = setup.model
    drawn = _batches(len(public), hyper.batch, hyper.steps, setup.streams.torch("distillation", round))
    target = _teacher(setup, updates, public, drawn)
    model.load(averaged.parameters, averaged.statistics)
    model.module.train()
    adam = torch.optim.Adam([model.parameters], lr=hyper.lr)
    total = 0.0
    for step, rows in enumerate(drawn):
        if hyper.schedule == "cosine":
            adam.param_groups[0]["lr"] = hyper.lr * (1 + math.cos(math.pi * step / hyper.steps)) / 2
        rows = rows.to(model.device)
        loss = kl(target[rows], model(public.batch(rows)[0]), hyper.temperature).mean()
        gradient = model.backward(loss)
        model.parameters.grad = gradient * min(1.0, LARGEST_NORM / (float(gradient.norm()) + 1e-6))
        adam.step()
        total += loss.item()
    model.parameters.grad = None
    shared = model.statistics[: setup.sizes["shared_statistics"]]
    distilled = State(parameters=model.parameters.cpu().clone(), statistics=shared.cpu().clone())
    return distilled, {"distillation_loss": (total, float(hyper.steps))}


def _batches(examples: int, size: int, steps: int, rng: torch.Generator) -> list[torch.Tensor]:
    """Return the positions of each step's images: passes in random order, without an incomplete last batch."""
    size = min(size, examples)
    passes = -(-steps // (examples // size))
    orders = [torch.randperm(examples, generator=rng)[: examples // size * size] for _ in range(passes)]
    return list(torch.split(torch.cat(orders), size)[:steps])


@torch.no_grad()
def _teacher(setup: Setup, updates: Sequence[Update], public: Shard, drawn: list[torch.Tensor]) -> torch.Tensor:
    """Return the ensemble's logits ``[public images, classes]``; rows that no step draws stay zero."""
    hyper: Hyper = setup.hyper
    rows = torch.bincount(torch.cat(drawn), minlength=len(public)).nonzero().flatten().to(setup.model.device)

    def logits() -> Iterator[torch.Tensor]:
        for one in updates:
            setup.model.load(one.parameters, one.statistics)
            setup.model.module.eval()
            yield torch.cat([setup.model(public.batch(some)[0]) for some in torch.split(rows, FORWARD_BATCH)])

    target = torch.zeros(len(public), setup.classes, device=setup.model.device)
    target[rows] = ensemble(logits(), [1 / len(updates)] * len(updates), hyper.average)
    return target
