"""pFedMe, server half: ``w <- (1 - beta) w + beta mean_k w_k`` (T. Dinh et al. 2020, the paper's algorithm)."""

from __future__ import annotations

from collections.abc import Sequence

from fedkd.methods.fedavg import Update
from fedkd.methods.pfedme import Hyper
from fedkd.setup import Setup
from strategies.averaging import average, shares
from strategies.base import Metrics
from strategies.fedavg import State, broadcast, init

__all__ = ["State", "broadcast", "init", "update"]


def update(setup: Setup, state: State, updates: Sequence[Update], round: int) -> tuple[State, Metrics]:
    """Move by beta towards the mean of the models, uniform (paper) or by examples (authors).

    Averaged BatchNorm statistics are the mean whatever beta is, since beyond it a variance could turn negative.
    """
    hyper: Hyper = setup.hyper
    weights = shares([int(u.examples) for u in updates], "examples" if hyper.variant == "authors" else "uniform")
    rule = setup.config.aggregation
    mean = average([u.parameters for u in updates], weights, rule)
    return (
        State(
            parameters=(1 - hyper.beta) * state.parameters + hyper.beta * mean,
            statistics=average([u.statistics for u in updates], weights, rule),
        ),
        {},
    )
