"""FedFTG, server half: the base method's aggregation, then data-free fine-tuning (Zhang et al. 2022)."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch.func import functional_call

from fedkd.errors import UserError
from fedkd.latent import draw_noise
from fedkd.losses import (
    class_level_distance,
    class_level_divergence,
    class_level_ensemble,
    diversity,
    diversity_of_norms,
    weighted_teachers,
)
from fedkd.methods.fedftg import GeneratorStatistics, GeneratorVector, Hyper, base_config, records, refers_to_aggregated
from fedkd.payload import ParameterVector, SharedStatistics
from fedkd.setup import Setup
from strategies.base import Metrics


def init(setup: Setup) -> Any:
    """Start from the base method's state and a generator of the run's seed.

    Raises:
        UserError: the model has BatchNorm whose statistics never reach the server.
    """
    hyper: Hyper = setup.hyper
    if hyper.iterations and setup.sizes["statistics"] and not setup.sizes["shared_statistics"]:
        raise UserError(
            "fedftg runs the clients' models on the server, but the statistics of their BatchNorm stay with the "
            "clients; take model.norm-statistics=averaged, or a model without BatchNorm (model.norm=group)"
        )
    half, base = _base(setup)
    start, generator = half.init(base).tensors(), setup.extras["generator"]
    return _state(hyper.base)(
        **start,
        aggregated=start["parameters"].clone(),
        aggregated_statistics=start["statistics"].clone(),
        generator=generator.parameters.cpu().clone(),
        generator_statistics=generator.statistics.cpu().clone(),
    )


def broadcast(setup: Setup, state: Any, round: int) -> Any:
    """Send what the base method sends, the global model being the fine-tuned one."""
    half, base = _base(setup)
    sent: dict[str, torch.Tensor] = half.broadcast(base, state, round).tensors()
    if refers_to_aggregated(setup.hyper):
        sent["aggregated"] = state.aggregated
    return records(setup.hyper)["Broadcast"](**sent)


def scoring(setup: Setup, state: Any, round: int) -> Any:
    """With ``score = "aggregated"``: what clients are scored with, the model before its fine-tuning."""
    return broadcast(
        setup,
        dataclasses.replace(state, parameters=state.aggregated, statistics=state.aggregated_statistics),
        round,
    )


def update(setup: Setup, state: Any, updates: Sequence[Any], round: int) -> tuple[Any, Metrics]:
    """Aggregate as the base method does, then fine-tune its model against the round's clients."""
    hyper: Hyper = setup.hyper
    half, base = _base(setup)
    start = state
    if refers_to_aggregated(hyper):
        start = dataclasses.replace(state, parameters=state.aggregated)
    inner, metrics = half.update(base, start, updates, round)
    fields = inner.tensors() | {
        "aggregated": inner.parameters.clone(),
        "aggregated_statistics": inner.statistics.clone(),
        "generator": state.generator,
        "generator_statistics": state.generator_statistics,
    }
    if hyper.iterations:
        tuned, own = _fine_tune(setup, fields, updates, round)
        fields, metrics = fields | tuned, metrics | own
    return _state(hyper.base)(**fields), metrics


def draw_labels(counts: torch.Tensor, number: int, rng: torch.Generator) -> torch.Tensor:
    """Customized label sampling: ``number`` labels in random order, ``floor(number * P(y <= c))`` of them up to c.

    P is proportional to the counts ``[classes]`` of the round's clients.  In whole numbers, so a class without
    examples is never asked for.
    """
    ends = counts.cumsum(0) * number // counts.sum()
    return torch.searchsorted(ends, torch.arange(number), right=True)[torch.randperm(number, generator=rng)]


def class_shares(counts: torch.Tensor) -> torch.Tensor:
    """Class-level weights ``alpha_k^y = n_k^y / sum_i n_i^y``: ``[clients, classes]`` counts to as many weights.

    Over the clients they sum to one for every class that somebody has, and to zero for the others.
    """
    return counts / counts.sum(dim=0).clamp(min=1)


def generator_losses(
    hyper: Hyper,
    student: torch.Tensor,
    teachers: torch.Tensor,
    labels: torch.Tensor,
    shares: torch.Tensor,
    noise: torch.Tensor,
    images: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Return L_md, L_cls and L_dis of a batch against some clients, as scalars.

    paper: ``L_md = mean_i sum_k a_k^{y_i} KL(t_k || s)``, ``L_cls = mean_i sum_k a_k^{y_i} CE(t_k, y_i)``.

    authors: ``L_md = mean_i sum_k a_k^{y_i} 1/C |s - t_k|_1`` without gradient into the clients' models, ``L_cls =
    sum_k mean_i a_k^{y_i} * mean_i CE(t_k, y_i)``.

    Args:
        student: logits ``[batch, classes]``.
        teachers: logits ``[clients, batch, classes]``.
        labels: ``[batch]``.
        shares: ``[clients, classes]``, alpha.
        noise: ``[batch, noise]``.
        images: ``[batch, channels, height, width]``.
    """
    weights = shares[:, labels]
    if hyper.variant == "paper":
        spread = diversity_of_norms(noise, images, scaled=hyper.diversity_distance == "scaled")
        apart = class_level_divergence(student, teachers, weights, reverse=hyper.divergence == "model-client")
    else:
        spread = diversity(noise, images)
        apart = class_level_distance(student, teachers, weights)
    return {
        "discrepancy": apart.mean(),
        "classification": weighted_teachers(teachers, labels, shares.T, per_example=hyper.variant == "paper"),
        "diversity": spread,
    }


def generator_objective(hyper: Hyper, losses: dict[str, torch.Tensor], part: float = 1.0) -> torch.Tensor:
    """``L_G = -L_md + lambda_cls L_cls + part * lambda_dis L_dis``, which the generator minimises.

    Args:
        part: share of the diversity loss in this step, 1 over the clients where each has a step of its own.
    """
    return (
        hyper.classification * losses["classification"]
        - hyper.mining * losses["discrepancy"]
        + part * hyper.diversity * losses["diversity"]
    )


def student_loss(hyper: Hyper, student: torch.Tensor, teachers: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return L_D, which the fine-tuned model minimises, per row ``[batch]``.

    paper: L_md itself, ``sum_k a_k KL(t_k || s)``.  authors: ``1/C CE(sum_k a_k softmax(t_k), s)``, whose gradient is
    1/C of it.

    Args:
        student: logits ``[batch, classes]``.
        teachers: logits ``[clients, batch, classes]``, without gradient.
        weights: ``[clients, batch]``.
    """
    if hyper.variant == "paper":
        return class_level_divergence(student, teachers, weights, reverse=hyper.divergence == "model-client")
    return class_level_ensemble(student, teachers, weights) / student.shape[1]


def _fine_tune(
    setup: Setup, fields: dict[str, torch.Tensor], updates: Sequence[Any], round: int
) -> tuple[dict[str, torch.Tensor], Metrics]:
    """Play the game for ``iterations`` and return the state's new fields and the mean losses.

    Both optimisers are new in every round; the generator itself goes on.
    """
    hyper: Hyper = setup.hyper
    model, generator, device = setup.model, setup.extras["generator"], setup.model.device
    model.load(fields["parameters"], fields["statistics"])
    generator.load(fields["generator"], fields["generator_statistics"])
    decay = hyper.lr_decay ** (round - 1)
    adam = torch.optim.Adam([generator.parameters], lr=hyper.generator_lr * decay)
    sgd = torch.optim.SGD([model.parameters], lr=hyper.server_lr * decay, weight_decay=_weight_decay(hyper))
    clients = torch.stack([u.parameters for u in updates]).to(device)
    statistics = torch.stack([u.statistics for u in updates]).to(device)
    counts = torch.stack([u.class_counts for u in updates])
    shares = class_shares(counts).to(device)
    rng = setup.streams.torch("fine-tuning", round)
    labels = draw_labels(counts.sum(dim=0), hyper.iterations * hyper.batch, rng).to(device)
    found: dict[str, list[float]] = {}
    for y in torch.split(labels, hyper.batch):
        noise = draw_noise("paper", (hyper.batch, hyper.noise), rng).to(device)
        models = torch.cat((model.parameters[None], clients)), torch.cat((model.statistics[None], statistics))
        _train_generator(setup, adam, *models, y, shares, noise, found)
        generator.module.eval()
        with torch.no_grad():
            images = generator(noise, y)
            teachers = stacked(setup, clients, statistics)(images)
        model.module.train()
        for _ in range(hyper.student_steps):
            loss = student_loss(hyper, model(images), teachers, shares[:, y]).mean()
            model.parameters.grad = model.backward(loss)
            sgd.step()
            found.setdefault("student_loss", []).append(loss.item())
        right = (shares[:, y] * (teachers.argmax(dim=2) == y)).sum(dim=0)
        found.setdefault("teacher_accuracy", []).append(right.mean().item())
    model.parameters.grad = generator.parameters.grad = None
    return (
        {
            "parameters": model.parameters.cpu().clone(),
            "statistics": model.statistics[: setup.sizes["shared_statistics"]].cpu().clone(),
            "generator": generator.parameters.cpu().clone(),
            "generator_statistics": generator.statistics.cpu().clone(),
        },
        {name: (sum(values), float(len(values))) for name, values in found.items()},
    )


def _train_generator(
    setup: Setup,
    adam: torch.optim.Adam,
    parameters: torch.Tensor,
    statistics: torch.Tensor,
    labels: torch.Tensor,
    shares: torch.Tensor,
    noise: torch.Tensor,
    found: dict[str, list[float]],
) -> None:
    """Take ``generator-sweeps`` sweeps over the clients against the frozen model, and note the losses.

    paper: one Adam step per sweep, on the losses of all clients.  authors: one step per client, on its losses alone.

    Args:
        parameters: ``[1 + clients, P]``, the model's first.
        statistics: ``[1 + clients, S]``.
        labels: ``[batch]``.
        shares: ``[clients, classes]``.
        noise: ``[batch, noise]``.
        found: losses by name, to append to.
    """
    hyper: Hyper = setup.hyper
    generator = setup.extras["generator"]
    generator.module.train()
    steps = [torch.arange(1, len(parameters))]
    if hyper.variant == "authors":
        steps = list(torch.split(steps[0], 1))
    for _ in range(hyper.generator_sweeps):
        for rows in steps:
            chosen = torch.cat((torch.zeros(1, dtype=torch.int64), rows)).to(parameters.device)
            images = generator(noise, labels)
            logits = stacked(setup, parameters[chosen], statistics[chosen])(images)
            losses = generator_losses(hyper, logits[0], logits[1:], labels, shares[chosen[1:] - 1], noise, images)
            generator.parameters.grad = generator.backward(generator_objective(hyper, losses, 1 / len(steps)))
            adam.step()
            for name, value in losses.items():
                found.setdefault(f"generator_{name}", []).append(value.item())


def stacked(setup: Setup, parameters: torch.Tensor, statistics: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return images ``[batch, ...]`` to logits ``[models, batch, classes]`` of many models, in evaluation mode.

    Args:
        parameters: ``[models, P]``.
        statistics: ``[models, S]``.
    """
    tensors = setup.model.unflatten(parameters) | setup.model.unflatten_statistics(statistics)
    module = setup.staged.eval()

    def one(mine: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = functional_call(module, mine, (images,))
        return out

    batched = torch.func.vmap(one, in_dims=(0, None))
    return lambda images: batched(tensors, images)


def _weight_decay(hyper: Hyper) -> float:
    """Return the L2 coefficient of the fine-tuning; FedProx as released adds its mu to it."""
    released = hyper.base == "fedprox" and hyper.fedprox_term == "released"
    return hyper.server_weight_decay + (float(hyper.fedprox_mu) if released else 0.0)  # type: ignore[attr-defined]


def _base(setup: Setup) -> tuple[ModuleType, Setup]:
    """Return the base method's server half and the set-up as it sees it."""
    half = importlib.import_module(f"strategies.{setup.hyper.base}")
    return half, dataclasses.replace(setup, config=base_config(setup.config))


@cache
def _state(base: str) -> type[Any]:
    """Return the server's state: the base method's, the model before its fine-tuning, and the generator."""
    added: list[tuple[str, Any]] = [
        ("aggregated", ParameterVector),
        ("aggregated_statistics", SharedStatistics),
        ("generator", GeneratorVector),
        ("generator_statistics", GeneratorStatistics),
    ]
    bases = (importlib.import_module(f"strategies.{base}").State,)
    return dataclasses.make_dataclass("State", added, bases=bases, frozen=True)
