"""FedGen: data-free distillation through a generator of latent features (Zhu, Hong, Zhou, ICML 2021).

The server learns a generator G(y, eps) of the features that the model's last stage takes, from the clients' last
stages alone (Eq. 4).  Clients add generated features to their local loss (Eq. 5).  Two readings:

``paper``
    Eq. 4 on the mean of the clients' logits, labels drawn from the label counts on both sides, Eq. 5 with weight
    ``eq5-weight`` (the paper prints no weight: 1), normal noise, plain mean of the models.
``authors``
    the released code (zhuangdizhu/FedGen @ dd5807c): weighted sum of the clients' own cross-entropies, labels
    uniform over the classes seen, weights alpha and beta that decay by 0.98 a round down to 1e-4, a third client
    term (beta: KL on real batches against the prediction for generated features) that the paper does not have,
    uniform noise, models weighted by examples, no generated terms in the first round.

The diversity loss is in both; the paper names it without a formula, so its form is the code's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from fedkd import partial
from fedkd.config import HyperParameters
from fedkd.latent import build_generator
from fedkd.method import Method, Paper
from fedkd.models import FlatModel, StagedModel
from fedkd.payload import ClassProbabilities, DrawnCounts, Spec
from fedkd.rng import Streams

GeneratorVector = Annotated[torch.Tensor, Spec(("generator",), torch.float32)]
"""All parameters of the generator as one vector."""
GeneratorStatistics = Annotated[torch.Tensor, Spec(("generator_statistics",), torch.float32)]
"""Running statistics of the generator's BatchNorm."""


class Hyper(HyperParameters):
    """Settings of FedGen; those of one variant only say so."""

    variant: Literal["paper", "authors"] = Field("authors", description="which reading (see `fedkd show fedgen`)")
    layer: str = Field("head", description="stage of the model that the generator feeds")
    share: Literal["model", "predictor"] = Field(
        "model",
        description="what is averaged: the whole model, or the stages from `layer` on, the rest staying personal "
        "(Sec. 3.3); with zero weights that is fedavg or lg_fedavg",
    )
    noise: int = Field(32, ge=1, description="width of the generator's noise")
    hidden: int = Field(256, ge=1, description="hidden width of the generator")
    generator_steps: int = Field(50, ge=0, description="Adam steps on the generator per round; 0 leaves it random")
    generator_batch: int = Field(32, ge=2, le=65_536, description="generated examples per generator step")
    generator_lr: float = Field(3e-4, gt=0, description="Adam learning rate of the generator")
    generator_lr_decay: float = Field(0.98, gt=0, le=1, description="factor on it per round")
    generator_weight_decay: float = Field(1e-2, ge=0, description="L2 coefficient of the generator's Adam")
    diversity: float = Field(1.0, ge=0, description="weight of the diversity loss; 0 is Eq. 4 as printed")
    batch: int = Field(32, ge=1, le=65_536, description="generated examples per local step (the paper's B_G)")
    eq5_weight: float = Field(
        1.0,
        ge=0,
        description="paper variant: weight of Eq. 5's second term; 0 is FedAvg",
        json_schema_extra={"only": {"variant": "paper"}},
    )
    class_weights: Literal["released", "per-example"] = Field(
        "released",
        description="authors variant: clients weigh in the generator's loss by their mean share over the batch (what "
        "the released code computes) or each example by its own class (what it names)",
        json_schema_extra={"only": {"variant": "authors"}},
    )
    early_stop: int = Field(
        20,
        ge=0,
        description="authors variant: local steps after this many are plain; 0: none are",
        json_schema_extra={"only": {"variant": "authors"}},
    )
    alpha: float = Field(
        10.0,
        ge=0,
        description="authors variant: first weight of the generated cross-entropy",
        json_schema_extra={"only": {"variant": "authors"}},
    )
    beta: float = Field(
        10.0,
        ge=0,
        description="authors variant: first weight of the latent KL; alpha=beta=0 is FedAvg",
        json_schema_extra={"only": {"variant": "authors"}},
    )
    temperature: float = Field(
        1.0,
        gt=0,
        description="authors variant: temperature of the latent KL (times its square); 1 is the released code",
        json_schema_extra={"only": {"variant": "authors"}},
    )
    decay: float = Field(
        0.98,
        gt=0,
        le=1,
        description="authors variant: factor on alpha and beta per round",
        json_schema_extra={"only": {"variant": "authors"}},
    )

    def shared(self, model: FlatModel) -> torch.Tensor:
        """Return the mask ``[P]`` of the parameters that travel."""
        if self.share == "model":
            return model.slice_of(lambda name: True)
        return partial.from_stage(model, self.layer, "fedgen.layer")


@dataclass(frozen=True)
class Broadcast(partial.Broadcast):
    """The global model or predictor, the generator, and the distribution that clients draw labels from."""

    generator: GeneratorVector
    generator_statistics: GeneratorStatistics
    label_probabilities: ClassProbabilities


@dataclass(frozen=True)
class Update(partial.Update):
    """A locally trained model or predictor, the examples behind it, and the labels drawn in its local steps."""

    label_counts: DrawnCounts


def extras(
    hyper: Hyper, model: StagedModel, classes: int, streams: Streams, device: torch.device
) -> dict[str, FlatModel]:
    """Return the generator, which both halves hold beside the model."""
    return {
        "generator": build_generator(hyper.noise, hyper.hidden, hyper.layer, model, classes, streams, device),
    }


METHOD = Method(
    name="fedgen",
    summary="data-free distillation through a generator of latent features",
    hyper=Hyper,
    Broadcast=Broadcast,
    Update=Update,
    State=partial.State,
    paper=Paper(
        authors="Zhu, Hong, Zhou",
        title="Data-Free Knowledge Distillation for Heterogeneous Federated Learning",
        venue="ICML 2021",
        arxiv="2105.10056",
    ),
    variants=("paper", "authors"),
    extras=extras,
    sizes=partial.sizes,
)
