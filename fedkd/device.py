"""Which device computes, and how many threads it may use."""

from __future__ import annotations

import torch

from fedkd.errors import UserError


def pick_device(wanted: str) -> torch.device:
    """Return the device for ``run.device``: ``auto`` takes a GPU when there is one.

    Raises:
        UserError: ``cuda`` without a GPU that PyTorch can use.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device = 'cuda', but PyTorch finds no GPU; take run.device=auto, or see `fedkd doctor`")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def single_thread() -> None:
    """Use one intra-op thread in this process: parallelism is over clients, and sums keep one order."""
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)
