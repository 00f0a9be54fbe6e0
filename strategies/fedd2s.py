"""FedD2S (reconstructed after the abstract), server half: from the clients' uploads to the knowledge K."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch.nn import functional

from fedkd.errors import UserError
from fedkd.losses import cross_entropy
from fedkd.methods.fedd2s import Broadcast, Hyper, Knowledge, Update, depth, distillation, dropping_set, drops, shapes
from fedkd.payload import ClassCounts, Count, Record, Spec
from fedkd.setup import Setup
from strategies.base import Metrics

GlobalHead = Annotated[torch.Tensor, Spec(("global_head",), torch.float32)]
"""deep-layers: a model whose stages behind l are the head; pooled-linear: a linear head for each depth; or empty."""
GlobalHeadStatistics = Annotated[torch.Tensor, Spec(("global_head_statistics",), torch.float32)]
"""Running statistics of the BatchNorm layers in a global head of deep layers."""


@dataclass(frozen=True)
class State(Record):
    """K, how many clients are behind each row, after how many drops it was extracted, and the global head."""

    knowledge: Knowledge
    owners: ClassCounts
    drops: Count
    head: GlobalHead
    head_statistics: GlobalHeadStatistics


def init(setup: Setup) -> State:
    """Know nothing.

    Raises:
        UserError: a stage that no model has, or clients whose representations do not fit one global head.
    """
    hyper: Hyper = setup.hyper
    setups = [setup, *setup.others.values()]
    for stage in filter(None, map(str.strip, hyper.dropping_set.split(","))):
        if not any(stage in each.staged.stages for each in setups):
            setup.staged.input_of(stage, "fedd2s.dropping-set")
    by_model = [list(shapes(hyper, each.staged).values()) for each in setups]
    for drop in range(_last_drop(setup) + 1):
        found = {shape[min(drop, len(shape) - 1)] for shape in by_model}
        if hyper.server == "global-head" and len(found) > 1:
            raise UserError(
                f"model.client-models = '{setup.config.model.client_models}': after {drop} drops the representations "
                f"have the shapes {sorted(found)}, so no global head fits; take fedd2s.server=average, or a dropping "
                "set at which the models (model.name among them) agree"
            )
    head = setup.extras.get("heads", setup.model)
    return State(
        knowledge=torch.zeros(setup.classes, setup.classes),
        owners=torch.zeros(setup.classes, dtype=torch.int64),
        drops=torch.tensor(0),
        head=head.parameters[: setup.sizes["global_head"]].cpu().clone(),
        head_statistics=head.statistics[: setup.sizes["global_head_statistics"]].cpu().clone(),
    )


def broadcast(setup: Setup, state: State, round: int) -> Broadcast:
    """Send K; after a drop nothing is known until K has been extracted at the new depth."""
    valid = int(state.drops) == _drops(setup, round)
    return Broadcast(knowledge=state.knowledge * valid, owners=state.owners * valid)


def update(setup: Setup, state: State, updates: Sequence[Update], round: int) -> tuple[State, Metrics]:
    """``K[c] <- memory K[c] + (1 - memory) sum_n w_nc k_nc`` over the round's clients n that own class c.

    w_nc is uniform or by examples; a class without a row, or without an owner this round, is as ``memory`` says.
    average: k_nc is the mean of the client's soft labels of c.  global-head: it is what the global head, once it is
    trained (:func:`_train_head`), makes of the client's representations of c.
    """
    hyper: Hyper = setup.hyper
    labels = [u.labels[u.labels >= 0] for u in updates]
    soft = [u.soft_labels[u.labels >= 0] for u in updates]
    head, statistics, metrics = state.head, state.head_statistics, Metrics()
    if hyper.server == "global-head":
        flat = torch.cat([u.representations[u.labels >= 0] for u in updates])
        head, statistics, made, metrics = _train_head(setup, state, flat, torch.cat(soft), torch.cat(labels), round)
        soft = list(torch.split(made, [len(y) for y in labels]))
    members = [functional.one_hot(y, setup.classes).T.to(torch.float32) for y in labels]  # [classes, rows] each
    rows = torch.stack([member.sum(dim=1) for member in members])  # [clients, classes]
    means = torch.stack([m @ k for m, k in zip(members, soft, strict=True)]) / rows.clamp(min=1)[:, :, None]
    counts = torch.stack([u.label_counts for u in updates])
    weights = (rows > 0) * (counts if hyper.weights == "examples" else torch.ones_like(counts))
    shares = weights / weights.sum(dim=0).clamp(min=1)
    fresh = torch.einsum("nc,ncd->cd", shares, means)  # zero where nobody owns the class
    known, owners = broadcast(setup, state, round), (rows > 0).sum(dim=0)
    memory = hyper.memory * (known.owners > 0)[:, None]
    blended = memory * known.knowledge + (1 - memory) * fresh
    kept = known if hyper.memory else Broadcast(torch.zeros_like(fresh), torch.zeros_like(owners))
    after = State(
        knowledge=torch.where(owners[:, None] > 0, blended, kept.knowledge),
        owners=torch.where(owners > 0, owners, kept.owners),
        drops=torch.tensor(_drops(setup, round)),
        head=head,
        head_statistics=statistics,
    )
    stages = setup.staged.stage_names
    metrics |= {
        "depth": (stages.index(depth(hyper, setup.staged, round).stage) + 1.0, 1.0),
        "drops": (float(after.drops), 1.0),
        "classes_taught": (float((known.owners > 0).sum()), 1.0),
        "classes_known": (float((after.owners > 0).sum()), 1.0),
    }
    return after, metrics


def _train_head(
    setup: Setup, state: State, flat: torch.Tensor, soft: torch.Tensor, labels: torch.Tensor, round: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Metrics]:
    """SGD on ``CE(H(R), c) + lam tau^2 KL(k || softmax(H(R) / tau))`` over the uploaded rows, ``head-epochs`` passes.

    At the last stage of deep layers, H is the identity and nothing is to be trained.

    Args:
        flat: representations ``[rows, width]``.
        soft: the clients' soft labels k ``[rows, classes]``.
        labels: classes c ``[rows]``.

    Returns:
        the head's new parameters and statistics, ``softmax(H(R) / tau)`` ``[rows, classes]`` and the mean losses.
    """
    hyper: Hyper = setup.hyper
    place, device = depth(hyper, setup.staged, round), setup.model.device
    shape = shapes(hyper, setup.staged)[place.stage]
    features = flat[:, : torch.Size(shape).numel()].reshape(-1, *shape).to(device)
    soft, labels = soft.to(device), labels.to(device)
    workspace = setup.extras.get("heads", setup.model)
    workspace.load(state.head, state.head_statistics)

    def head(rows: torch.Tensor) -> torch.Tensor:
        if hyper.head == "pooled-linear":
            return workspace(rows, place.stage)
        return rows if place.behind is None else workspace(rows, start=place.behind)

    rng, passes = setup.streams.torch("global-head", round), hyper.head_epochs
    if hyper.head == "deep-layers" and place.behind is None:
        passes = 0
    sums, steps = torch.zeros(2, device=device), 0
    for _ in range(passes):
        for rows in torch.split(torch.randperm(len(labels), generator=rng).to(device), hyper.head_batch):
            workspace.module.train(len(rows) > 1)  # BatchNorm cannot be trained on one row
            logits = head(features[rows])
            hard = cross_entropy(logits, labels[rows]).mean()
            mutual = distillation(soft[rows], logits, hyper.temperature).mean()
            workspace.parameters.add_(workspace.backward(hard + hyper.lam * mutual), alpha=-hyper.head_lr)
            sums, steps = sums + torch.stack([hard, mutual]).detach(), steps + 1
    workspace.module.eval()
    with torch.no_grad():
        made = functional.softmax(head(features) / hyper.temperature, dim=1).cpu()
    names = ("global_head_loss", "global_head_distillation_loss")
    return (
        workspace.parameters.cpu().clone(),
        workspace.statistics[: len(state.head_statistics)].cpu().clone(),
        made,
        {name: (float(total), float(steps)) for name, total in zip(names, sums, strict=True) if steps},
    )


def _drops(setup: Setup, round: int) -> int:
    """Return how many drops there have been in a round: those of the schedule that some model still has to give."""
    return min(drops(setup.hyper, round), _last_drop(setup))


def _last_drop(setup: Setup) -> int:
    """Return how many drops the model with most stages to drop has in all."""
    return max(len(dropping_set(setup.hyper, each.staged)) for each in [setup, *setup.others.values()]) - 1
