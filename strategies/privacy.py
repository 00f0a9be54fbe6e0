"""Client-level differential privacy, server side: DP-FedAvg (McMahan, Ramage, Talwar, Zhang, ICLR 2018).

Each of a fixed number m of clients, sampled without replacement from all n, sends a model whose change has at most the
norm C; the server releases ``theta + 1/m (sum_k (theta_k - theta) + N(0, (z C)^2 I))``.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from scipy.special import ndtri

from fedkd.clipping import MODEL
from fedkd.config import Config
from fedkd.errors import UserError
from fedkd.method import Method
from fedkd.payload import Record
from fedkd.setup import Setup
from strategies import robust

ORDERS = (*range(2, 9), *range(10, 18, 2), *range(20, 36, 4), 40, 48, 64)
"""Renyi orders of the bound for sampled cohorts: whole ones, the others being interpolated between them anyway."""


def check(setup: Setup, method: Method, half: ModuleType) -> None:
    """Check that the guarantee would hold: that the released model is the noisy mean of clipped models, and no more.

    Args:
        method: the contract under the run's settings.
        half: the method's server half.

    Raises:
        UserError: it would not, or the library that accounts for it is missing.
    """
    from strategies import fedavg, partial  # which import base, which imports this

    config = setup.config
    if not config.privacy.on:
        return
    plain = half.update in (fedavg.update, partial.update) and set(method.Update.specs()) <= {*MODEL, "examples"}
    taken = robust.key_of(config.aggregation)
    refusals = [
        (not plain, f"{method.name}'s server does more than average models"),
        (
            getattr(config.hyper, "weighting", "uniform") != "uniform",
            f"it needs equal weights; set {method.name}.weighting=uniform",
        ),
        (
            bool(taken),
            "it is for the mean of models that the clients clip themselves; leave out " + taken,
        ),
        (
            setup.sizes["shared_statistics"] > 0,
            "averaged BatchNorm statistics would be released without noise; set model.norm-statistics=personal or "
            "model.norm=group",
        ),
        (
            config.data.scaling == "standard",
            "data.scaling = 'standard' is computed from all clients' images; take symmetric or unit",
        ),
        (
            config.data.partition == "devices" and config.privacy.noise != "secret",
            "every device knows run.seed, and could take noise that is drawn from it off; set privacy.noise=secret",
        ),
        (
            config.privacy.noise_multiplier > 0 and importlib.util.find_spec("dp_accounting") is None,
            "epsilon needs the package dp-accounting; pip install 'fedkd[privacy]'",
        ),
    ]
    for holds, why in refusals:
        if holds:
            raise UserError(f"privacy.clip-norm = {config.privacy.clip_norm}: {why}")


def noised(setup: Setup, state: Record, round: int) -> Record:
    """Return the server's state with ``N(0, (z C / m)^2)`` on every parameter, from a stream of the round or secret."""
    privacy = setup.config.privacy
    if not privacy.noise_multiplier:
        return state
    deviation = privacy.noise_multiplier * privacy.clip_norm / setup.config.run.cohort
    mean = state.tensors()["parameters"]
    if privacy.noise == "secret":
        noise = secret_normal(mean.numel()).reshape(mean.shape)
    else:
        noise = torch.randn(mean.shape, generator=setup.streams.torch("privacy-noise", round), dtype=torch.float64)
    fields: dict[str, Any] = {"parameters": (mean.double() + deviation * noise).float()}
    return dataclasses.replace(state, **fields)


def secret_normal(count: int) -> torch.Tensor:
    """Return so many standard normal numbers ``[count]`` from the operating system's random bytes.

    Not from a generator: PyTorch's takes a seed of 32 bits, which can be tried out, and what others make can be
    computed from numbers that were seen.
    """
    whole = np.frombuffer(os.urandom(8 * count), dtype=np.uint64) >> np.uint64(12)
    return torch.from_numpy(ndtri((whole + 0.5) * 2.0**-52))  # 52 bits and a half: strictly between 0 and 1


def spent(config: Config, rounds: int, cohort: Callable[[int], Sequence[int]]) -> dict[str, float]:
    """Return ``{"epsilon"}`` of the models released in so many rounds at ``privacy.delta``; empty without noise.

    With secret noise, those who hold the model are taken to know whose rounds were whose: cohorts are drawn from the
    seed, and members of a cohort of known size tell each other who else was in it.  So nothing is gained by sampling,
    but a client pays for the rounds in which it took part alone, and epsilon is that of the client with most of them.

    Args:
        cohort: gives the clients of a round.
    """
    privacy, run = config.privacy, config.run
    if not privacy.noise_multiplier:
        return {}
    sampled_from = run.clients
    if privacy.noise == "secret":
        took_part = Counter(client for round in range(1, rounds + 1) for client in cohort(round))
        sampled_from, rounds = run.cohort, max(took_part.values())
    return {"epsilon": epsilon(privacy.noise_multiplier, sampled_from, run.cohort, rounds, privacy.delta)}


@cache
def epsilon(noise_multiplier: float, clients: int, cohort: int, rounds: int, delta: float) -> float:
    """Return epsilon of so many rounds, when the data of one client is replaced by any other.

    Replacing a client changes the sum of the changes by up to 2 C, so the accountant's noise multiplier, the deviation
    over the sensitivity, is ``z / 2``.  Two bounds hold, and the smaller one is returned: Renyi accounting of sampling
    without replacement (Wang, Balle, Kasiviswanathan, AISTATS 2019), and the Gaussian mechanism's as if every client
    took part in every round, which is the smaller one when nearly all do.

    Args:
        noise_multiplier: z.
        clients: n, the clients sampled from.
        cohort: m, the clients of a round.
        rounds: how often.
        delta: the probability with which epsilon may be exceeded.
    """
    from dp_accounting import GaussianDpEvent, NeighboringRelation, SampledWithoutReplacementDpEvent
    from dp_accounting.rdp import RdpAccountant

    gaussian = GaussianDpEvent(noise_multiplier / 2)
    everybody = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE).compose(gaussian, rounds)
    found = float(everybody.get_epsilon(delta))
    if cohort < clients:
        sampled = RdpAccountant(ORDERS, NeighboringRelation.REPLACE_ONE)
        sampled.compose(SampledWithoutReplacementDpEvent(clients, cohort, gaussian), rounds)
        found = min(found, float(sampled.get_epsilon(delta)))
    return found
