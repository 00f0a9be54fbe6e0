"""Clipping: a client's change of the model is scaled down to a largest norm, by the client or by the server."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import torch

from fedkd.payload import Record

MODEL = ("parameters", "statistics")
"""The fields of a payload that are the model: its parameters, and its BatchNorm statistics where those travel."""

R = TypeVar("R", bound=Record)


def change(update: Record, start: Record) -> torch.Tensor:
    """Return what a client has changed, ``[P + S]`` in double precision: its model less the one that it was sent."""
    ends, starts = ([getattr(one, name).cpu().double() for name in MODEL] for one in (update, start))
    return torch.cat(ends) - torch.cat(starts)


def length(update: Record, start: Record) -> float:
    """Return the L2 norm of what a client has changed."""
    return float(torch.linalg.vector_norm(change(update, start)))


def clipped(update: R, start: Record, most: float) -> R:
    """Return ``theta + (theta_k - theta) min(1, C / ||theta_k - theta||)`` in the place of ``theta_k``.

    An update within the bound is returned as it is, so a bound that nobody exceeds changes no bit.

    Args:
        update: a client's update, whose model is ``theta_k``.
        start: the broadcast, whose model is ``theta``.
        most: C, the largest L2 norm of the change.
    """
    moved = change(update, start)
    norm = float(torch.linalg.vector_norm(moved))
    if norm <= most:
        return update
    begun = torch.cat([getattr(start, name).double() for name in MODEL])
    model = (begun + moved * (most / norm)).float()
    parts = torch.split(model, [getattr(update, name).numel() for name in MODEL])
    return dataclasses.replace(update, **dict(zip(MODEL, parts, strict=True)))
