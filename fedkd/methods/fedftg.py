"""FedFTG: the server fine-tunes the aggregated model by data-free distillation (Zhang et al., CVPR 2022).

After the aggregation of any base method, an image generator G(z, y) and the aggregated model play a game on images
that are labelled by the clients' class counts (customized label sampling): the generator looks for images on which
the model and the clients' models disagree (hard-sample mining), the model learns the clients' predictions on them,
each weighted by its share of the class (class-level ensemble).  Clients send their class counts beside what the base
method sends.  Two readings:

``paper``
    discrepancy and student loss are the class-weighted KL, the generator takes one step per sweep on all clients.
    The paper's text was not at hand: these are its formulas as other authors quote them.
``authors``
    the released code (ZhangLin-PKU/FedFTG @ 1e6347c): L1 distance of raw logits, class weights that enter the
    cross-entropy through their mean, a student loss divided by the number of classes, one generator step per client.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, create_model
from torch import nn
from torch.nn import functional

from fedkd.config import Config, HyperParameters, ModelSection, TrainSection
from fedkd.method import Method, Paper, load
from fedkd.methods import fedprox
from fedkd.models import FlatModel, Shape, StagedModel
from fedkd.payload import HeldCounts, ParameterVector, Spec
from fedkd.rng import Streams

GeneratorVector = Annotated[torch.Tensor, Spec(("generator",), torch.float32)]
"""All parameters of the generator as one vector."""
GeneratorStatistics = Annotated[torch.Tensor, Spec(("generator_statistics",), torch.float32)]
"""Running statistics of the generator's BatchNorm."""
BASES = ("fedavg", "fedprox", "scaffold", "feddyn", "moon")
"""The methods that can be fine-tuned."""


class Hyper(HyperParameters):
    """Settings of FedFTG; those of the base methods are added under ``<base>-<name>``."""

    variant: Literal["paper", "authors"] = Field("authors", description="which reading (see `fedkd show fedftg`)")
    base: Literal["fedavg", "fedprox", "scaffold", "feddyn", "moon"] = Field(
        "fedavg", description="method whose aggregated model is fine-tuned"
    )
    weighting: Literal["examples", "uniform"] = Field(
        "examples",
        description="bases fedavg, fedprox, moon: clients weigh by their number of training examples, or all the same",
    )
    iterations: int = Field(
        10, ge=0, le=10_000, description="rounds of the game per communication round; 0 is the base method"
    )
    generator_sweeps: int = Field(1, ge=0, description="generator sweeps per iteration; 0 leaves it random")
    student_steps: int = Field(5, ge=0, description="SGD steps on the model per iteration; 0 is the base method")
    batch: int = Field(
        32, ge=2, le=4096, description="generated images per step (the code: its clients' batch size, 50)"
    )
    noise: int = Field(100, ge=1, description="width of the generator's noise (the code: 100, CIFAR100: 256)")
    width: int = Field(16, ge=1, description="channels of the generator (the code: 64; 16 is ours, for CPUs)")
    server_lr: float = Field(
        0.1, gt=0, description="learning rate of the fine-tuning; divide by the number of classes in the paper variant"
    )
    server_weight_decay: float = Field(1e-3, ge=0, description="L2 coefficient of the fine-tuning")
    generator_lr: float = Field(0.01, gt=0, description="Adam learning rate of the generator")
    lr_decay: float = Field(0.998, gt=0, le=1, description="factor on both rates per communication round")
    mining: float = Field(1.0, ge=0, description="weight of the discrepancy; 0: no hard samples (code and paper: 1)")
    classification: float = Field(1.0, ge=0, description="weight of the generator's cross-entropy; 0: any image")
    diversity: float = Field(
        1.0,
        ge=0,
        description="weight of the generator's diversity loss; 0: noise may be ignored",
        json_schema_extra={"only": {"diversity_distance": "scaled"}},
    )
    diversity_distance: Literal["norms", "scaled"] = Field(
        "norms",
        description="paper variant: Euclidean norms (the loss is then zero in single precision at the size of "
        "images), or norms divided by the root of their dimension (ours)",
        json_schema_extra={"only": {"variant": "paper"}},
    )
    divergence: Literal["client-model", "model-client"] = Field(
        "client-model",
        description="paper variant: KL(client || model), whose gradient is the released student loss's, or reversed",
        json_schema_extra={"only": {"variant": "paper"}},
    )
    fedprox_term: Literal["proximal", "released"] = Field(
        "proximal",
        description="base fedprox: its proximal term, or (what the released code has in its place) mu added to the "
        "weight decay of clients and fine-tuning",
        json_schema_extra={"only": {"base": "fedprox"}},
    )
    scaffold_reference: Literal["aggregated", "started"] = Field(
        "aggregated",
        description="base scaffold, option-2: control variates are renewed from the model before its fine-tuning (the "
        "released code; it then travels beside the other), or from the one that the client started from (SCAFFOLD's)",
        json_schema_extra={"only": {"base": "scaffold"}},
    )
    score: Literal["fine-tuned", "aggregated"] = Field(
        "fine-tuned",
        description="model that is scored; aggregated: the one before this round's fine-tuning; training is the same",
    )

    def doubts(self, train: TrainSection, model: ModelSection, statistics: int) -> list[str]:
        """Say what the base method doubts, in the words of its settings here."""
        said = base_hyper(self).doubts(train, model, statistics)  # added to the weight decay, mu pulls as hard
        return [line.replace(f"{self.base}.", f"fedftg.{self.base}-") for line in said]


SHARED = ("weighting",)
"""Settings that a base method and FedFTG have in common."""


def _with_bases(own: type[Hyper]) -> type[Hyper]:
    """Return the settings with those of every base method beside them."""
    added: dict[str, Any] = {}
    for base in BASES:
        for name, field in load(base).hyper.model_fields.items():
            extra: Any = field.json_schema_extra or {}
            only = {"base": base} | {f"{base}_{other}": value for other, value in extra.get("only", {}).items()}
            described: Any = Field(
                field.default, description=f"base {base}: {field.description}", json_schema_extra={"only": only}
            )
            if name not in SHARED:
                kind: Any = Annotated[field.annotation, base, *field.metadata]
                added[f"{base}_{name}"] = (kind, described)
    return create_model(own.__name__, __base__=own, __doc__=own.__doc__, **added)


def base_config(config: Config) -> Config:
    """Return the configuration that the base method's halves see: its own settings in place of FedFTG's."""
    hyper, train = config.hyper, config.train
    assert isinstance(hyper, Hyper)
    own = base_hyper(hyper)
    if isinstance(own, fedprox.Hyper) and hyper.fedprox_term == "released":
        train = train.model_copy(update={"weight_decay": train.weight_decay + own.mu})
        own = own.model_copy(update={"mu": 0.0})
    return config.model_copy(update={"hyper": own, "train": train})


def base_hyper(hyper: Hyper) -> HyperParameters:
    """Return the base method's own settings."""
    kind = load(hyper.base).hyper
    return kind(**{n: getattr(hyper, n if n in SHARED else f"{hyper.base}_{n}") for n in kind.model_fields})


def refers_to_aggregated(hyper: Hyper) -> bool:
    """Say whether the base method's reference is the model before its fine-tuning."""
    return hyper.base == "scaffold" and hyper.scaffold_reference == "aggregated"


def records(hyper: Hyper) -> dict[str, Any]:
    """Return the records of the base method, with the class counts in its update."""
    found = _types(hyper.base, refers_to_aggregated(hyper))
    return found | {"Scoring": found["Broadcast"]} if hyper.score == "aggregated" else found


@cache
def _types(base: str, both: bool) -> dict[str, Any]:
    """Return the records by base method, with the model before fine-tuning in the broadcast; one type for each case."""
    method = load(base)
    sent, received = method.Broadcast, [("class_counts", HeldCounts)]
    if both:
        sent = dataclasses.make_dataclass("Broadcast", [("aggregated", ParameterVector)], bases=(sent,), frozen=True)
        sent.__doc__ = f"What {base} sends, and the model before fine-tuning."
    update = dataclasses.make_dataclass("Update", received, bases=(method.Update,), frozen=True)
    update.__doc__ = f"What {base} sends, and the client's number of examples of each class."
    return {"Broadcast": sent, "Update": update, "State": method.State}


class ImageGenerator(nn.Module):
    """FedFTG's generator of images: noise and label, each through a linear layer to half the channels of a grid of a
    quarter of the image's height and width (rounded up), then two nearest-neighbour upsamplings with convolutions.

    Source: ZhangLin-PKU/FedFTG @ 1e6347c (``CGeneratorA``: 682,499 parameters for 100 noise, 10 classes, 3x32x32,
    width 64).  The last BatchNorm has no parameters, so a batch of images has mean 0 and variance 1 per channel.

    Args:
        noise: width of the noise.
        classes: number of classes.
        width: channels of the last hidden layer; twice as many before it.
        shape: ``(channels, height, width)`` of an image.
    """

    def __init__(self, noise: int, classes: int, width: int, shape: Shape) -> None:
        super().__init__()
        self.classes, self.shape = classes, shape
        self.grid = (2 * width, math.ceil(shape[1] / 4), math.ceil(shape[2] / 4))
        half = torch.Size(self.grid).numel() // 2
        self.of_noise, self.of_label = nn.Linear(noise, half), nn.Linear(classes, half)
        self.normed = nn.BatchNorm2d(2 * width)
        self.middle = nn.Sequential(
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2)
        )
        self.last = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, shape[0], 3, padding=1),
            nn.Tanh(),
            nn.BatchNorm2d(shape[0], affine=False),
        )

    def forward(self, noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return images ``[batch, *shape]`` for noise ``[batch, noise]`` and labels ``[batch]``."""
        one_hot = functional.one_hot(labels, self.classes).to(noise.dtype)
        grid = torch.cat((self.of_noise(noise), self.of_label(one_hot)), dim=1).reshape(-1, *self.grid)
        half = self.middle(functional.interpolate(self.normed(grid), scale_factor=2))
        out: torch.Tensor = self.last(functional.interpolate(half, size=self.shape[1:]))
        return out


def extras(
    hyper: Hyper, model: StagedModel, classes: int, streams: Streams, device: torch.device
) -> dict[str, FlatModel]:
    """Return the generator, and what the base method has beside the model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(streams.number("generator"))
        generator = ImageGenerator(hyper.noise, classes, hyper.width, model.input_shape)
    return {"generator": FlatModel(generator, device)}


METHOD = Method(
    name="fedftg",
    summary="server fine-tunes the aggregated model by data-free distillation; plug-in for a base method",
    hyper=_with_bases(Hyper),
    **records(Hyper()),
    records=records,
    paper=Paper(
        authors="Zhang, Shen, Ding, Tao, Duan",
        title="Fine-tuning Global Model via Data-Free Knowledge Distillation for Non-IID Federated Learning",
        venue="CVPR 2022",
        arxiv="2203.09249",
    ),
    variants=("paper", "authors"),
    extras=extras,
)
