"""``server``: what FedGen and FedFTG train on the server, with the round's models stacked and with them one by one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from bench.common import Bench, Table, in_turn, middle, ratios
from fedkd.config import Config
from fedkd.method import load
from fedkd.payload import Record
from fedkd.setup import Setup
from strategies import fedftg, fedgen

MODELS = (10, 50)
"""Clients of a round."""


def server(bench: Bench) -> list[Table]:
    """Time one aggregation, on one thread: FedGen's 50 generator steps, FedFTG's game of two iterations."""
    torch.set_num_threads(1)
    rows, figures = [], []
    for method, half in (("fedgen", fedgen), ("fedftg", fedftg)):
        for variant in load(method).variants:
            for models in MODELS:
                play = Play.of(half, method, variant, models)
                with one_by_one():
                    alone = losses(half, play)
                apart = max(abs(a - b) for a, b in zip(losses(half, play), alone, strict=True))
                contestants = {"stacked": partial(timed, half, play), "one by one": partial(single, half, play)}
                seconds = in_turn(contestants, bench.repetitions)
                gain = ratios(seconds, "one by one", "stacked")
                measured = [*map(middle, seconds.values()), middle(gain, 2), f"{apart:.0e}"]
                rows.append([f"{method}, {variant}", str(models), *measured])
                figures.append({"row": rows[-1][:2], **seconds, "losses_apart": apart})
    title = "One aggregation of `fedgen_cnn` with GroupNorm, MNIST's shape, one thread"
    columns = ["", "clients", "stacked, s", "one by one, s", "gain", "losses apart"]
    return [Table(title, columns, rows, figures)]


@dataclasses.dataclass(frozen=True)
class Play:
    """What the server half starts from.

    Args:
        setup: workspaces.
        state: before the first round.
        updates: of a round, around the initial model.
    """

    setup: Setup
    state: Any
    updates: Sequence[Record]

    @classmethod
    def of(cls, half: Any, method: str, variant: str, models: int, iterations: int = 2) -> Play:
        """Invent a round."""
        keys: dict[str, Any] = {"fedftg.iterations": iterations} if method == "fedftg" else {}
        keys |= {
            "run.method": method,
            f"{method}.variant": variant,
            "run.clients": models,
            "run.clients-per-round": 0,
            "run.device": "cpu",
        }
        config = Config.from_flat({**keys, "model.name": "fedgen_cnn", "model.norm": "group"})
        setup = Setup.build(config, (1, 28, 28), 10, torch.device("cpu"))
        kind, rng = load(method).under(config.hyper).Update, torch.Generator().manual_seed(1)
        updates = []
        for _ in range(models):
            fields: dict[str, torch.Tensor] = {}
            for name, spec in kind.specs().items():
                shape = spec.resolve(setup.sizes)
                if spec.dtype.is_floating_point:
                    fields[name] = 0.05 * torch.randn(shape, generator=rng)
                else:
                    fields[name] = torch.randint(1, 50, shape, generator=rng)
            fields["parameters"] += setup.model.parameters
            updates.append(kind(**fields))
        return cls(setup, half.init(setup), updates)


def timed(half: Any, play: Play) -> float:
    """Return the seconds of one aggregation."""
    began = time.perf_counter()
    half.update(play.setup, play.state, play.updates, 1)
    return time.perf_counter() - began


def single(half: Any, play: Play) -> float:
    """The same with the models one by one."""
    with one_by_one():
        return timed(half, play)


def losses(half: Any, play: Play) -> list[float]:
    """Return the mean losses that one aggregation reports."""
    metrics = half.update(play.setup, play.state, play.updates, 1)[1]
    return [total / weight for total, weight in metrics.values()]


@contextmanager
def one_by_one() -> Iterator[None]:
    """Let both server halves call the round's models one after another."""
    with patch.object(torch.func, "vmap", _loop):
        yield


def _loop(one: Callable[[dict[str, torch.Tensor], torch.Tensor], torch.Tensor], in_dims: tuple[int, None]) -> Any:
    """Do what ``torch.func.vmap`` does over the first axis of the models' tensors, without stacking the work."""
    del in_dims

    def each(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        models = len(next(iter(tensors.values())))
        return torch.stack([one({name: tensor[k] for name, tensor in tensors.items()}, x) for k in range(models)])

    return each
