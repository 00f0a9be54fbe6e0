"""Methods that share a part of the model: which parameters travel, which stay, and the records that hold them.

A part is a mask of the parameter vector, so a payload holds the shared part and nothing of the rest.  BatchNorm
running statistics go with the layer that they belong to: those of a personal layer never travel.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Annotated

import torch

from fedkd.methods import fedavg
from fedkd.models import FlatModel, StagedModel
from fedkd.payload import EXACT, Examples, Positive, Record, SharedStatistics, Spec, Statistics, StatisticsSum

SharedVector = Annotated[torch.Tensor, Spec(("shared_parameters",), torch.float32)]
"""The parameters that travel, in the order of the model's vector."""
SharedSum = Annotated[torch.Tensor, Spec(("shared_parameters",), torch.float64, most=EXACT)]
"""A sum of what travels, in units of :data:`fedkd.sums.UNIT`."""
OwnVector = Annotated[torch.Tensor, Spec(("own_parameters",), torch.float32)]
"""The parameters that stay with the client, in the order of the model's vector."""

NO_STAGE = "none"
"""In place of a stage's name: no stage at all."""


class Hyper(fedavg.Hyper):
    """Settings of a method that shares a part of the model."""

    def shared(self, model: FlatModel) -> torch.Tensor:
        """Return the mask ``[P]`` of the parameters that travel."""
        raise NotImplementedError


@dataclass(frozen=True)
class Broadcast(Record):
    """The shared part of the model, averaged."""

    parameters: SharedVector
    statistics: SharedStatistics


@dataclass(frozen=True)
class Update(Record):
    """The shared part of a locally trained model and the number of examples behind it."""

    parameters: SharedVector
    statistics: SharedStatistics
    examples: Examples


@dataclass(frozen=True)
class Sum(Record):
    """The weighted sum of several clients' shared parts, and what is behind it (:mod:`fedkd.sums`)."""

    parameters: SharedSum
    statistics: StatisticsSum
    examples: Examples
    clients: Positive


@dataclass(frozen=True)
class State(Record):
    """What a client keeps: the rest of its model, and all its BatchNorm statistics."""

    parameters: OwnVector
    statistics: Statistics


def from_stage(model: FlatModel, stage: str, setting: str) -> torch.Tensor:
    """Return the mask ``[P]`` of the parameters of a stage and of all behind it; ``none`` is the empty part.

    Args:
        stage: its name.
        setting: the key that named it, for the message.

    Raises:
        UserError: the model has no such stage.
    """
    staged = model.module
    assert isinstance(staged, StagedModel)
    if stage == NO_STAGE:
        return model.slice_of(lambda name: False)
    if stage not in staged.stage_names:
        staged.input_of(stage, setting)  # says so
    behind = staged.stage_names[staged.stage_names.index(stage) :]
    return model.slice_of(lambda name: name in behind)


def statistics_of(model: FlatModel, part: torch.Tensor) -> torch.Tensor:
    """Return the mask ``[S]`` of the running statistics of the BatchNorm layers whose parameters are in a part."""
    weights = model.unflatten(part)
    mask = torch.zeros(model.statistics.shape[-1], dtype=torch.bool)
    for name, view in model.unflatten_statistics(mask).items():
        view.fill_(bool(weights[f"{name.rpartition('.')[0]}.weight"].all()))
    return mask


def take(whole: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return a copy of the numbers of ``[..., P]`` that a mask ``[P]`` names, as ``whole[..., mask]`` would.

    Parts of models are a few stretches, which are copied several times as fast as number by number.
    """
    return torch.cat([whole[..., begin:end] for begin, end in _stretches(mask)], dim=-1)


def put(part: torch.Tensor, mask: torch.Tensor, whole: torch.Tensor) -> None:
    """Put back into ``whole`` what :func:`take` has taken out, as ``whole[..., mask] = part`` would."""
    stretches = _stretches(mask)
    for (begin, end), values in zip(stretches, torch.split(part, [e - b for b, e in stretches], dim=-1), strict=True):
        whole[..., begin:end] = values


def _stretches(mask: torch.Tensor) -> list[tuple[int, int]]:
    """Return begin and end of each stretch of a mask ``[P]``; of none, an empty one."""
    changes = (torch.nonzero(mask[1:] != mask[:-1]).flatten() + 1).tolist()
    ends = [0, *changes, len(mask)]
    return [(begin, end) for begin, end in itertools.pairwise(ends) if begin < end and mask[begin]] or [(0, 0)]


def sizes(hyper: Hyper, model: FlatModel) -> dict[str, int]:
    """Return the dimensions of the two parts, and of the statistics that may be averaged."""
    shared = hyper.shared(model)
    return {
        "shared_parameters": int(shared.sum()),
        "own_parameters": int((~shared).sum()),
        "shared_statistics": int(statistics_of(model, shared).sum()),
    }
