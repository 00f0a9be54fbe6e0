"""MOON, server half: FedAvg's; the contrastive term is the clients'."""

from __future__ import annotations

from fedkd.methods.moon import Hyper
from fedkd.setup import Setup
from strategies import fedavg
from strategies.fedavg import State, broadcast, update

__all__ = ["State", "broadcast", "init", "update"]


def init(setup: Setup) -> State:
    """Start as FedAvg.

    Raises:
        UserError: the model has no stage ``moon.layer``.
    """
    hyper: Hyper = setup.hyper
    setup.staged.input_of(hyper.layer, "moon.layer")
    return fedavg.init(setup)
