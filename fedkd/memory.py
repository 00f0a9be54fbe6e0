"""Whether what the settings ask for fits into memory: asked before it is made, so that nobody waits for a crash."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fedkd.config import Config, Scalar
from fedkd.errors import UserError
from fedkd.models import FlatModel, StagedModel, too_much
from fedkd.payload import Record, Sizes

ORDINARY = 4096
"""Up to this width nothing is asked: the question costs the first one who asks it a second."""
_COPIES = 3
"""Each parameter of a workspace is there, in its gradient, and in what is broadcast or sent back."""


def large(config: Config) -> dict[str, Scalar]:
    """Return the whole numbers of the model and the method that are beyond the ordinary."""
    own = ("model.", f"{config.run.method}.")
    return {
        key: value
        for key, value in config.flat().items()
        if isinstance(value, int) and value > ORDINARY and key.startswith(own) and key != "model.seed"
    }


@contextmanager
def enough(config: Config) -> Iterator[None]:
    """Say which settings ask for too much, where the block runs out of memory.

    Raises:
        UserError: in place of PyTorch's error.
    """
    try:
        yield
    except (RuntimeError, TypeError, ValueError, MemoryError) as error:
        if not too_much(error):
            raise
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{_blamed(config)} needs more memory than there is ({said}); take less") from error


def check_workspaces(
    config: Config, device: torch.device, make: Callable[[], tuple[StagedModel, dict[str, FlatModel]]]
) -> None:
    """Check that a model and a method's other workspaces fit.

    Args:
        device: where they will be.
        make: makes them; it is called on PyTorch's device without memory.

    Raises:
        UserError: they do not.
    """
    if not large(config):
        return
    with enough(config), torch.device("meta"):
        model, extras = make()
    tensors = [*model.parameters(), *(tensor for extra in extras.values() for tensor in extra.module.parameters())]
    _check(config, device, _COPIES * sum(t.numel() * t.element_size() for t in tensors))


def check_records(config: Config, device: torch.device, kinds: Iterable[type[Record] | None], sizes: Sizes) -> None:
    """Check that one record of each of some kinds fits.

    Raises:
        UserError: they do not.
    """
    if large(config):
        specs = [spec for kind in kinds if kind for spec in kind.specs().values()]
        _check(config, device, sum(math.prod(spec.resolve(sizes)) * spec.dtype.itemsize for spec in specs))


def _check(config: Config, device: torch.device, needed: int) -> None:
    free = _free(device)
    if free is not None and needed > free:
        raise UserError(
            f"{_blamed(config)} needs {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free; take less"
        )


def _blamed(config: Config) -> str:
    found = [f"{key} = {value}" for key, value in large(config).items()]
    return " with ".join(found) or f"model.name = '{config.model.name}'"


def _free(device: torch.device) -> int | None:
    """Return the bytes that are free on a device; None where nobody says so."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        told = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        return int(told["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):  # not Linux
        return None
