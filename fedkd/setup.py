"""What both halves of a method start from: the configuration, the workspaces and the sizes of everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fedkd.config import Config
from fedkd.method import load
from fedkd.models import FlatModel, StagedModel, build
from fedkd.payload import Sizes
from fedkd.rng import Streams


@dataclass(frozen=True)
class Setup:
    """Built on either side from the configuration alone; nothing in it changes but the workspaces' content.

    Args:
        config: the run's configuration.
        classes: number of classes.
        model: workspace of the model, holding its initial parameters when new.
        extras: the method's other workspaces, by name.
        streams: the run's random streams.
        sizes: the symbolic dimensions of records.
    """

    config: Config
    classes: int
    model: FlatModel
    extras: dict[str, FlatModel]
    streams: Streams
    sizes: Sizes

    @property
    def hyper(self) -> Any:
        """The method's own settings (each half knows their type)."""
        return self.config.hyper

    @property
    def staged(self) -> StagedModel:
        """The model as its stages."""
        assert isinstance(self.model.module, StagedModel)
        return self.model.module

    @classmethod
    def build(cls, config: Config, shape: tuple[int, ...], classes: int, device: torch.device) -> Setup:
        """Build the workspaces.

        Args:
            shape: ``(channels, height, width)`` of an image.

        Raises:
            UserError: a model or a stage that does not exist, or images that the model cannot take.
        """
        streams, method = Streams(config.run.seed), load(config.run.method)
        staged = build(config.model, shape, classes, streams)
        extras = method.extras(config.hyper, staged, classes, streams, device) if method.extras else {}
        model = FlatModel(staged, device)
        statistics = model.statistics.numel()
        sizes = {
            "parameters": model.parameters.numel(),
            "statistics": statistics,
            "shared_statistics": statistics if config.model.norm_statistics == "averaged" else 0,
            "classes": classes,
            "clients": config.run.clients,
            "cohort": config.run.cohort,
        }
        if method.sizes:
            sizes |= method.sizes(config.hyper, model)
        for name, extra in extras.items():
            sizes |= {name: extra.parameters.numel(), f"{name}_statistics": extra.statistics.numel()}
        return cls(config, classes, model, extras, streams, sizes)
