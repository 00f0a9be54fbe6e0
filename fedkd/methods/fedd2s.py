"""FedD2S, reconstructed after the abstract: deep-to-shallow layer dropping in data-free mutual distillation.

The text of Atapour et al. (arXiv 2402.10846) beyond its abstract was not at hand and there is no released code, so
this is a mechanism that agrees with the abstract and with published summaries, not a reproduction.  Open points, each
a setting here: what a client uploads and at which layers (``upload``), what the server does with it (``server``) and
with which weights (``weights``), where heads live and how big they are (``head``, ``head-ce``) and how the global one
is trained (``head-epochs``, ``head-batch``, ``head-lr``), what K keeps from round to round
(``memory``), the schedule (``rounds-per-drop``, ``dropping-set``), the weight of the distillation (``lam``) and the
temperature.  Open and not settings: the model, the partition and every number of its experiments.

Depth l(t) is the deepest stage that takes part in the federation in round t: entry ``(t - 1) // rounds-per-drop`` of
the dropping set, or its last.  r^l(x) is what that stage gives, h^l the head that turns it into logits:

``deep-layers``
    the model's own stages behind l; the server's global head is those stages of its own model, and when one is
    dropped it is prepended to the global head.  Behind l nothing ever feels the distillation.
``pooled-linear``
    the mean over space, if there is one, and a linear layer for each depth, trained beside the model.

Client models never cross the network, so clients may have different ones (``model.client-models``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from fedkd.config import HyperParameters
from fedkd.errors import UserError
from fedkd.method import Method, Paper
from fedkd.methods import local
from fedkd.models import FlatModel, Shape, StagedModel
from fedkd.payload import ClassCounts, HeldCounts, Record, Spec
from fedkd.rng import Streams

Knowledge = Annotated[torch.Tensor, Spec(("classes", "classes"), torch.float32)]
"""Row c: the soft label of class c, which sums to one; zero where the class is unknown."""
SoftLabels = Annotated[torch.Tensor, Spec(("rows", "classes"), torch.float32)]
"""A soft label per uploaded row; rows that are not used are zero."""
Representations = Annotated[torch.Tensor, Spec(("rows", "representation"), torch.float32)]
"""r^l per uploaded row, flat, zeros behind it: the width is the largest of the dropping set, 0 without global head."""
Labels = Annotated[torch.Tensor, Spec(("rows",), torch.int64, least=-1, below="classes")]
"""The class of each uploaded row, -1 for rows that are not used."""
HeadVector = Annotated[torch.Tensor, Spec(("heads",), torch.float32)]
"""The linear heads of all depths; empty for deep-layers."""


class Hyper(HyperParameters):
    """Settings of the reconstruction; no default comes from the paper, all are ours (the docs page says how chosen)."""

    head: Literal["deep-layers", "pooled-linear"] = Field(
        "deep-layers", description="head at depth l: the model's own stages behind it, or pooling and a linear layer"
    )
    upload: Literal["class-mean", "samples"] = Field(
        "class-mean",
        description="what leaves a client: means per class (private default), or a row per example (strong and leaky)",
    )
    server: Literal["global-head", "average"] = Field(
        "global-head",
        description="what makes the knowledge K: a global head trained on the uploads by CE and KL, or their average",
    )
    weights: Literal["uniform", "examples"] = Field(
        "uniform", description="clients that own a class weigh the same in its row of K, or by their examples of it"
    )
    memory: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the row of an earlier round at this depth in a new row of K; above 0 a class that no "
        "client of the round owns keeps its row; 0: K is the round's alone, and such a class is masked",
    )
    temperature: float = Field(
        2.0, gt=0, description="tau of all soft labels and of the KL, which is times its square; 1 is plain softmax"
    )
    lam: float = Field(
        1.0, ge=0, description="weight of the KL in both directions; 0 (with head-ce off, if pooled-linear) is local"
    )
    head_ce: bool = Field(
        True,
        description="pooled-linear: CE of the linear head beside the model's own (deep-layers: the two are one)",
        json_schema_extra={"only": {"head": "pooled-linear"}},
    )
    dropping_set: str = Field(
        "",
        description="comma-separated stages, deepest first, down to which layers are dropped one by one; a model "
        "passes over names that it lacks; empty: all stages; one stage: nothing is ever dropped",
    )
    rounds_per_drop: int = Field(
        10, ge=0, description="rounds between drops, one over the layer-dropping rate; 0: nothing is ever dropped"
    )
    samples: int = Field(
        64,
        ge=1,
        description="most examples that a client uploads, drawn anew each round",
        json_schema_extra={"only": {"upload": "samples"}},
    )
    head_epochs: int = Field(
        20,
        ge=0,
        description="passes of the global head over a round's uploads; 0 leaves it as initialised",
        json_schema_extra={"only": {"server": "global-head", "rounds_per_drop": 1}},
    )
    head_batch: int = Field(
        32,
        ge=1,
        description="uploaded rows per step of the global head",
        json_schema_extra={"only": {"server": "global-head", "rounds_per_drop": 1}},
    )
    head_lr: float = Field(
        0.05,
        gt=0,
        description="learning rate of the global head's SGD",
        json_schema_extra={"only": {"server": "global-head", "rounds_per_drop": 1}},
    )


@dataclass(frozen=True)
class Broadcast(Record):
    """K at this round's depth, and how many clients are behind each row; 0: the class is unknown."""

    knowledge: Knowledge
    owners: ClassCounts


@dataclass(frozen=True)
class Update(Record):
    """Soft labels with their classes, representations for the global head, and the examples of each class."""

    soft_labels: SoftLabels
    representations: Representations
    labels: Labels
    label_counts: HeldCounts


@dataclass(frozen=True)
class State(local.State):
    """The client's own model and linear heads."""

    heads: HeadVector


class Depth(NamedTuple):
    """A place in the model: the deepest stage that takes part, and the stage behind it (None: it is the last)."""

    stage: str
    behind: str | None


def dropping_set(hyper: Hyper, model: StagedModel) -> tuple[str, ...]:
    """Return the stages of a model at which representations are taken, deepest first.

    Raises:
        UserError: the model has none of them, or they do not go from deep to shallow.
    """
    stages = model.stage_names[::-1]
    named = [name.strip() for name in hyper.dropping_set.split(",")] if hyper.dropping_set else list(stages)
    found = [name for name in named if name in stages]
    if not found or not all(named) or found != [name for name in stages if name in found]:
        raise UserError(
            f"fedd2s.dropping-set = '{hyper.dropping_set}': it must name stages of every model once each, deepest "
            f"first (here: {', '.join(stages)})"
        )
    return tuple(found)


def drops(hyper: Hyper, round: int) -> int:
    """Return how many drops the schedule asks for before a round (from 1); a model stops at its shallowest stage."""
    return (round - 1) // hyper.rounds_per_drop if hyper.rounds_per_drop else 0


def depth(hyper: Hyper, model: StagedModel, round: int) -> Depth:
    """Return l(t) of a model."""
    chosen, stages = dropping_set(hyper, model), model.stage_names
    stage = chosen[min(drops(hyper, round), len(chosen) - 1)]
    return Depth(stage, (*stages, None)[stages.index(stage) + 1])


@torch.no_grad()
def shapes(hyper: Hyper, model: StagedModel) -> dict[str, Shape]:
    """Return the shape, without the batch, of the representation at each stage of the dropping set."""
    was_training, chosen, found = model.training, dropping_set(hyper, model), {}
    model.eval()
    x = torch.zeros(1, *model.input_shape, device=next(model.parameters()).device)
    for name, stage in model.stages.items():
        x = stage(x)
        if name in chosen:
            found[name] = tuple((x if hyper.head == "deep-layers" else pooled(x)).shape[1:])
    model.train(was_training)
    return {name: found[name] for name in chosen}


def pooled(features: torch.Tensor) -> torch.Tensor:
    """Return ``[batch, channels]``: the mean over space of ``[batch, channels, ...]``."""
    return features.flatten(2).mean(dim=2) if features.dim() > 2 else features


class Heads(nn.Module):
    """A linear head for each depth of the dropping set, all zero at first.

    Args:
        widths: width of the pooled representation, by stage.
        classes: number of logits.
    """

    def __init__(self, widths: dict[str, int], classes: int) -> None:
        super().__init__()
        self.linear = nn.ModuleDict({name: nn.Linear(width, classes) for name, width in widths.items()})
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: torch.Tensor, stage: str) -> torch.Tensor:
        """Return logits ``[batch, classes]`` of what a stage gives, ``[batch, channels, ...]``."""
        out: torch.Tensor = self.linear[stage](pooled(features))
        return out


def distillation(target: torch.Tensor, logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """``T^2 KL(target || softmax(logits / T))`` in nats, per row; a target of zeros gives 0 and no gradient.

    Args:
        target: probabilities of the teacher ``[batch, classes]``; no gradient flows into them.
        logits: of the student ``[batch, classes]``.

    Returns:
        ``[batch]``.
    """
    student = functional.log_softmax(logits / temperature, dim=1)
    return temperature**2 * functional.kl_div(student, target.detach(), reduction="none").sum(dim=1)


def extras(
    hyper: Hyper, model: StagedModel, classes: int, streams: Streams, device: torch.device
) -> dict[str, FlatModel]:
    """Return the linear heads, if there are any; the server's are its global heads."""
    if hyper.head == "deep-layers":
        return {}
    with torch.random.fork_rng(devices=[]):
        heads = Heads({name: shape[0] for name, shape in shapes(hyper, model).items()}, classes)
    return {"heads": FlatModel(heads, device)}


def width(hyper: Hyper, model: StagedModel) -> int:
    """Return how many numbers an uploaded representation has, at whatever depth."""
    found = shapes(hyper, model).values()
    return max(torch.Size(shape).numel() for shape in found) if hyper.server == "global-head" else 0


def sizes(hyper: Hyper, model: FlatModel) -> dict[str, int]:
    """Return the dimensions of uploads, of a client's heads and of the global head."""
    assert isinstance(model.module, StagedModel)
    staged, deep, trained = model.module, hyper.head == "deep-layers", hyper.server == "global-head"
    with torch.no_grad():
        classes = staged.eval()(model.parameters.new_zeros(1, *staged.input_shape)).shape[1]
    heads = 0 if deep else sum((shape[0] + 1) * classes for shape in shapes(hyper, staged).values())
    return {
        "rows": hyper.samples if hyper.upload == "samples" else classes,
        "representation": width(hyper, staged),
        "heads": heads,
        "global_head": (model.parameters.numel() if deep else heads) if trained else 0,
        "global_head_statistics": model.statistics.numel() if deep and trained else 0,
    }


METHOD = Method(
    name="fedd2s",
    summary="deep-to-shallow layer dropping in data-free mutual distillation, reconstructed after the abstract",
    hyper=Hyper,
    Broadcast=Broadcast,
    Update=Update,
    State=State,
    paper=Paper(
        authors="Atapour, Seyedmohammadi, Abouei, Mohammadi, Plataniotis",
        title="FedD2S: Personalized Data-Free Federated Knowledge Distillation",
        venue="2024",
        arxiv="2402.10846",
    ),
    extras=extras,
    sizes=sizes,
)
