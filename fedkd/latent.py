"""FedGen's generator, which both halves need: how it is built, its noise, and the labels it is asked for."""

from __future__ import annotations

import torch

from fedkd.models import FlatModel, LatentGenerator, StagedModel
from fedkd.rng import Streams


def build_generator(
    noise: int, hidden: int, layer: str, model: StagedModel, classes: int, streams: Streams, device: torch.device
) -> FlatModel:
    """Return the generator of what stage ``layer`` of a model takes, initialised from the run's seed.

    Raises:
        UserError: the model has no such stage.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(streams.number("generator"))
        generator = LatentGenerator(noise, classes, hidden, model.input_of(layer, "fedgen.layer"))
    return FlatModel(generator, device)


def draw_noise(variant: str, shape: tuple[int, int], rng: torch.Generator) -> torch.Tensor:
    """Return noise ``[count, noise]``: N(0, I) in the paper, uniform on [0, 1) in the released code."""
    draw = torch.randn if variant == "paper" else torch.rand
    return draw(*shape, generator=rng)


def draw_labels(probabilities: torch.Tensor, count: int, rng: torch.Generator) -> torch.Tensor:
    """Return ``[count]`` labels drawn with the given probabilities ``[classes]`` (need not be normalised)."""
    return torch.multinomial(probabilities, count, replacement=True, generator=rng)
