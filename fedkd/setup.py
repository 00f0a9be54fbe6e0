"""What both halves of a method start from: the configuration, the workspaces and the sizes of everything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import torch

from fedkd import memory
from fedkd.config import Config
from fedkd.data import Shard
from fedkd.errors import UserError
from fedkd.method import load
from fedkd.models import FlatModel, StagedModel, build
from fedkd.partial import statistics_of
from fedkd.payload import PayloadError, Record, Sizes
from fedkd.rng import Streams

R = TypeVar("R", bound=Record)


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
        others: set-ups with the other models that clients have by ``model.client-models``, by model name.
        public: the unlabelled images that were set aside (``data.public-fraction``), on the server only.
    """

    config: Config
    classes: int
    model: FlatModel
    extras: dict[str, FlatModel]
    streams: Streams
    sizes: Sizes
    others: Mapping[str, Setup] = field(default_factory=dict)
    public: Shard | None = None

    def of(self, client: int) -> Setup:
        """Return the set-up with a client's own model."""
        names = self.config.model.assigned
        return self.others.get(names[client % len(names)], self)

    def check_variances(self, record: R, owner: str) -> R:
        """Return a record that came from elsewhere itself, after comparing its running variances with zero.

        Raises:
            PayloadError: one is below; BatchNorm would take its root.
        """
        for name, spec in record.specs().items():
            statistics, mask = getattr(record, name), self._variances.get(str(spec.shape[-1])) if spec.shape else None
            if mask is not None and (least := float(statistics[..., mask].min())) < 0:
                raise PayloadError(f"{type(record).__name__}.{name} of {owner} has a running variance of {least:g}")
        return record

    @cached_property
    def _variances(self) -> dict[str, torch.Tensor]:
        """Masks of the running variances among all statistics, and among those that travel, by dimension."""
        mask = torch.zeros(self.model.statistics.numel(), dtype=torch.bool)
        for name, view in self.model.unflatten_statistics(mask).items():
            view.fill_(name.endswith("running_var"))
        travels = statistics_of(self.model, self.hyper.shared(self.model)) if hasattr(self.hyper, "shared") else ...
        masks = {"statistics": mask}
        if self.sizes["shared_statistics"]:
            masks["shared_statistics"] = mask[travels]
        return {name: mask for name, mask in masks.items() if mask.any()}

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
    def build(
        cls,
        config: Config,
        shape: tuple[int, ...],
        classes: int,
        device: torch.device,
        public: Shard | None = None,
    ) -> Setup:
        """Build the workspaces.

        Args:
            shape: ``(channels, height, width)`` of an image.
            public: unlabelled images that the server half may use.

        Raises:
            UserError: a model or a stage that does not exist, images that the model cannot take, more than fits into
                memory, or clients with different models under a method whose payload depends on the model.
        """
        streams, method = Streams(config.run.seed), load(config.run.method).under(config.hyper)

        def make(where: torch.device) -> tuple[StagedModel, dict[str, FlatModel]]:
            staged = build(config.model, shape, classes, streams)
            return staged, method.extras(config.hyper, staged, classes, streams, where) if method.extras else {}

        memory.check_workspaces(config, device, partial(make, torch.device("meta")))
        with memory.enough(config):
            staged, extras = make(device)
            model = FlatModel(staged, device)
        statistics = model.statistics.numel()
        sizes = {
            "parameters": model.parameters.numel(),
            "statistics": statistics,
            "shared_statistics": statistics,
            "classes": classes,
            "clients": config.run.clients,
            "cohort": config.run.cohort,
        }
        if method.sizes:
            sizes |= method.sizes(config.hyper, model)
        if config.model.norm_statistics == "personal":
            sizes["shared_statistics"] = 0
        for name, extra in extras.items():
            sizes |= {name: extra.parameters.numel(), f"{name}_statistics": extra.statistics.numel()}
        memory.check_records(config, device, (method.Broadcast, method.Personal, method.Update), sizes)
        own = cls(config, classes, model, extras, streams, sizes, public=public)
        return replace(own, others=_others(own, shape, device)) if config.model.client_models else own


def _others(own: Setup, shape: tuple[int, ...], device: torch.device) -> dict[str, Setup]:
    """Build the set-ups of clients whose model is not the server's; what crosses the network must not depend on it."""
    section, method = own.config.model, load(own.config.run.method).under(own.config.hyper)
    refusal = f"model.client-models = '{section.client_models}': {method.name} exchanges"
    kinds = [kind for kind in (method.Broadcast, method.Update, method.Personal, method.Scoring) if kind]
    exchanged = {d for kind in kinds for spec in kind.specs().values() for d in spec.shape if isinstance(d, str)}
    if exchanged & {"parameters", "statistics", "shared_statistics"}:
        raise UserError(f"{refusal} parameters, so every client needs model.name; leave the key empty")
    others: dict[str, Setup] = {}
    for name in section.assigned:
        if name != section.name and name not in others:
            one = section.model_copy(update={"name": name, "client_models": ""})
            try:
                others[name] = Setup.build(own.config.model_copy(update={"model": one}), shape, own.classes, device)
            except UserError as error:
                raise UserError(f"model.client-models: {error}") from None
    for name, other in others.items():
        for d in sorted(exchanged):
            if own.sizes[d] != other.sizes[d]:
                raise UserError(
                    f"{refusal} '{d}': {own.sizes[d]} numbers for {section.name}, {other.sizes[d]} for {name}"
                )
    return others
