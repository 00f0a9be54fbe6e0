"""What the generators of finished runs make, from the server's state at the end (``final.safetensors``).

The data set is not needed: whatever shape is not among the settings is found from the lengths of the saved vectors.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fedkd.errors import UserError
from fedkd.latent import draw_noise
from fedkd.methods.fedftg import ImageGenerator
from fedkd.models import FlatModel, LatentGenerator
from fedkd.results import Run
from fedkd.rng import Streams


def final_state(run: Run) -> dict[str, torch.Tensor]:
    """Return the server's state at the end of a run, by field name.

    Raises:
        UserError: the run has not finished, or the file cannot be read.
    """
    path = run.folder / "final.safetensors"
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{run.folder} has no final.safetensors: the run has not finished") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def latent_features(run: Run, per_class: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features that FedGen's generator makes at the end of a run, and their classes.

    Args:
        run: a finished run of ``fedgen``.
        per_class: how many of each class.

    Returns:
        ``[classes * per_class, features]``, flat, and ``[classes * per_class]``.

    Raises:
        UserError: the run has not finished, or its state fits no generator of these settings.
    """
    hyper: Any = run.config.hyper
    state, classes = final_state(run), _classes(run)
    vector = state.get("generator", torch.zeros(0))
    # [noise, one-hot] -> hidden: a weight, a bias, and BatchNorm's two vectors; hidden -> features: a weight and a bias
    width = (len(vector) - (hyper.noise + classes + 3) * hyper.hidden) // (hyper.hidden + 1)
    generator = LatentGenerator(hyper.noise, classes, hyper.hidden, (max(width, 1),))
    return _generate(run, generator, state, per_class, hyper.variant)


def images(run: Run, per_class: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images that FedFTG's generator makes at the end of a run, and their classes.

    Height and width are taken as equal and a multiple of four, as they are for every data set that has a name; of
    others the images are up to three pixels larger than those that the run made.

    Args:
        run: a finished run of ``fedftg``.
        per_class: how many of each class.

    Returns:
        ``[classes * per_class, channels, height, width]`` and ``[classes * per_class]``.

    Raises:
        UserError: the run has not finished, or its state fits no generator of these settings.
    """
    hyper: Any = run.config.hyper
    state, classes = final_state(run), _classes(run)
    vector, statistics = state.get("generator", torch.zeros(0)), state.get("generator_statistics", torch.zeros(0))
    channels = max(1, len(statistics) // 2 - 5 * hyper.width)  # means and variances of 2w + 2w + w + channels
    smallest = FlatModel(ImageGenerator(hyper.noise, classes, hyper.width, (channels, 4, 4)))
    per_place = (hyper.noise + classes + 2) * hyper.width  # of the grid: both linear layers
    places = 1 + max(0, len(vector) - len(smallest.parameters)) // per_place
    size = 4 * math.isqrt(places)
    generator = ImageGenerator(hyper.noise, classes, hyper.width, (channels, size, size))
    return _generate(run, generator, state, per_class, "paper")


def _generate(
    run: Run, module: nn.Module, state: dict[str, torch.Tensor], per_class: int, noise: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Load the state into a generator and let it make samples in evaluation mode, from noise of the run's seed."""
    generator = FlatModel(module)
    for name, vector in (("generator", generator.parameters), ("generator_statistics", generator.statistics)):
        if name not in state or state[name].shape != vector.shape:
            path: Path = run.folder / "final.safetensors"
            raise UserError(f"{path} holds no '{name}' that fits the settings of the run")
    generator.load(state["generator"], state["generator_statistics"])
    generator.module.eval()
    labels = torch.arange(_classes(run)).repeat_interleave(per_class)
    rng = Streams(run.config.run.seed).torch("samples")
    with torch.no_grad():
        return generator(draw_noise(noise, (len(labels), run.config.hyper.noise), rng), labels), labels  # type: ignore[attr-defined]


def _classes(run: Run) -> int:
    return sum(name.startswith("class_") for name in run.partition.columns)
