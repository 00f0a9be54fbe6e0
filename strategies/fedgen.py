"""FedGen, server half: learn the generator from the clients' last stages, then average (Zhu et al. 2021, Alg. 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.func import functional_call

from fedkd.errors import UserError
from fedkd.latent import draw_labels, draw_noise
from fedkd.losses import diversity, mean_teacher, weighted_teachers
from fedkd.methods.fedgen import Broadcast, GeneratorStatistics, GeneratorVector, Hyper, Update
from fedkd.partial import SharedVector, put, statistics_of
from fedkd.payload import ClassProbabilities, Count, Record, SharedStatistics
from fedkd.setup import Setup
from strategies import partial
from strategies.averaging import average, shares
from strategies.base import Metrics


@dataclass(frozen=True)
class State(Record):
    """The global model or predictor, the generator with its Adam moments, and the labels that clients draw from."""

    parameters: SharedVector
    statistics: SharedStatistics
    generator: GeneratorVector
    generator_statistics: GeneratorStatistics
    adam_mean: GeneratorVector
    adam_square: GeneratorVector
    adam_steps: Count
    label_probabilities: ClassProbabilities


def init(setup: Setup) -> State:
    """Start from the run's seed; every label is equally likely until labels have been counted.

    Raises:
        UserError: the generator feeds a stage with BatchNorm behind it whose statistics never reach the server.
    """
    hyper: Hyper = setup.hyper
    tail = setup.staged.tail(hyper.layer).stages
    normed = [name for name, stage in tail.items() if any(True for _ in stage.buffers())]
    if normed and not setup.sizes["shared_statistics"]:
        raise UserError(
            f"fedgen.layer = '{hyper.layer}': stage '{normed[0]}' behind it has BatchNorm whose statistics stay with "
            "the clients, so the server cannot run it; take a later layer, model.norm=group, or "
            "model.norm-statistics=averaged"
        )
    generator = setup.extras["generator"]
    moments = torch.zeros_like(generator.parameters).cpu()
    start = partial.init(setup)
    return State(
        parameters=start.parameters,
        statistics=start.statistics,
        generator=generator.parameters.cpu().clone(),
        generator_statistics=generator.statistics.cpu().clone(),
        adam_mean=moments,
        adam_square=moments.clone(),
        adam_steps=torch.tensor(0),
        label_probabilities=torch.full((setup.classes,), 1 / setup.classes),
    )


def broadcast(setup: Setup, state: State, round: int) -> Broadcast:
    """Send the global model, the generator and the label distribution."""
    return Broadcast(
        parameters=state.parameters,
        statistics=state.statistics,
        generator=state.generator,
        generator_statistics=state.generator_statistics,
        label_probabilities=state.label_probabilities,
    )


def update(setup: Setup, state: State, updates: Sequence[Update], round: int) -> tuple[State, Metrics]:
    """Train the generator against the round's models, then average them.

    paper: labels from the counts of all clients, Eq. 4 on the mean of the logits, plain mean of the models.

    authors: a client's count of a class is 1 + its draws this round, its weight for the class its share of it
    (``class-weights`` says how the weights enter the loss); the generator's labels uniform over the classes drawn
    this round, the clients' over those drawn in any round so far (the released code looks into the clients' data
    instead); models weighted by examples.  Both add ``diversity`` times the diversity loss.
    """
    hyper: Hyper = setup.hyper
    counts = torch.stack([u.label_counts for u in updates])  # [clients, classes]
    seen = (counts > 0).any(dim=0)
    if hyper.variant == "paper":
        labels = (counts.sum(dim=0) / counts.sum()).to(torch.float32)
        to_clients = labels
        weights = shares([int(u.examples) for u in updates], "uniform")

        def teacher_loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return mean_teacher(logits, y)

    else:
        labels = seen.to(torch.float32)
        to_clients = ((state.label_probabilities > 0) & (round > 1) | seen).to(torch.float32)
        weights = shares([int(u.examples) for u in updates], "examples")
        smoothed = (counts + 1).to(torch.float32)
        share = (smoothed / smoothed.sum(dim=0)).T.to(setup.model.device)  # [classes, clients]

        def teacher_loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return weighted_teachers(logits, y, share, per_example=hyper.class_weights == "per-example")

    rule = setup.config.aggregation
    trained, metrics = _train_generator(setup, state, updates, labels, teacher_loss, round)
    return (
        State(
            parameters=average([u.parameters for u in updates], weights, rule),
            statistics=average([u.statistics for u in updates], weights, rule),
            label_probabilities=to_clients / to_clients.sum(),
            **trained,
        ),
        metrics,
    )


def _train_generator(
    setup: Setup,
    state: State,
    updates: Sequence[Update],
    labels: torch.Tensor,
    teacher_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    round: int,
) -> tuple[dict[str, torch.Tensor], Metrics]:
    """Take ``generator-steps`` Adam steps and return the state's new generator fields and the summed losses."""
    hyper: Hyper = setup.hyper
    generator, device = setup.extras["generator"], setup.model.device
    generator.load(state.generator, state.generator_statistics)
    generator.module.train()
    adam = torch.optim.Adam(
        [generator.parameters],
        lr=hyper.generator_lr * hyper.generator_lr_decay ** (round - 1),
        weight_decay=hyper.generator_weight_decay,
    )
    adam.state[generator.parameters] = {
        "step": state.adam_steps.to(torch.float32).clone(),
        "exp_avg": state.adam_mean.to(device).clone(),
        "exp_avg_sq": state.adam_square.to(device).clone(),
    }
    ensemble = _ensemble(setup, updates)
    rng = setup.streams.torch("generator-training", round)
    losses = {"teacher_loss": 0.0, "diversity_loss": 0.0}
    for _ in range(hyper.generator_steps):
        y = draw_labels(labels, hyper.generator_batch, rng).to(device)
        noise = draw_noise(hyper.variant, (len(y), hyper.noise), rng).to(device)
        features = generator(noise, y)
        teacher, diverse = teacher_loss(ensemble(features), y), diversity(noise, features)
        generator.parameters.grad = generator.backward(teacher + hyper.diversity * diverse)
        adam.step()
        losses["teacher_loss"] += teacher.item()
        losses["diversity_loss"] += diverse.item()
    generator.parameters.grad = None
    moments = adam.state[generator.parameters]
    return (
        {
            "generator": generator.parameters.cpu().clone(),
            "generator_statistics": generator.statistics.cpu().clone(),
            "adam_mean": moments["exp_avg"].cpu(),
            "adam_square": moments["exp_avg_sq"].cpu(),
            "adam_steps": state.adam_steps + hyper.generator_steps,
        },
        {name: (value, float(hyper.generator_steps)) for name, value in losses.items() if hyper.generator_steps},
    )


def _ensemble(setup: Setup, updates: Sequence[Update]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return features ``[batch, ...]`` to the logits ``[clients, batch, classes]`` of all clients' last stages."""
    hyper: Hyper = setup.hyper
    tail = setup.staged.eval().tail(hyper.layer)
    shared = hyper.shared(setup.model)
    tensors = setup.model.unflatten(_placed([u.parameters for u in updates], shared, setup))
    if setup.sizes["shared_statistics"]:
        averaged = statistics_of(setup.model, shared)
        tensors |= setup.model.unflatten_statistics(_placed([u.statistics for u in updates], averaged, setup))
    tensors = {name: view for name, view in tensors.items() if name.split(".")[1] in tail.stages}

    def one(mine: dict[str, torch.Tensor], features: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = functional_call(tail, mine, (features,))
        return out

    batched = torch.func.vmap(one, in_dims=(0, None))
    return lambda features: batched(tensors, features)


def _placed(vectors: Sequence[torch.Tensor], mask: torch.Tensor, setup: Setup) -> torch.Tensor:
    """Return the clients' shared parts ``[shared]`` as ``[clients, whole]``, each in its place, zeros elsewhere."""
    placed = torch.zeros(len(vectors), len(mask))
    for vector, row in zip(vectors, placed, strict=True):
        put(vector, mask, row)
    return placed.to(setup.model.device)
