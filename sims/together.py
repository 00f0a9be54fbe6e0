"""A comparison whose settings are not for every method: those of ``[aggregation]`` and ``[privacy]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedkd.config import Config, Scalar
from fedkd.errors import UserError
from fedkd.method import load
from sims.launch import prepare

SECTIONS = ("aggregation.", "privacy.")
"""What becomes of the models that clients send."""


def sends_counts_alone(method: str) -> bool:
    """Return whether a method's clients send nothing that could be averaged or tell of their data (``local``)."""
    return not any(spec.dtype.is_floating_point for spec in load(method).Update.specs().values())


def unconcerned(flat: Mapping[str, Scalar], methods: Sequence[str]) -> list[str]:
    """Return the methods of a comparison that such settings, if there are any, do not concern."""
    given = any(key.startswith(SECTIONS) for key in flat)
    return [method for method in methods if sends_counts_alone(method)] if given and len(methods) > 1 else []


def prepare_all(flat: Mapping[str, Scalar], methods: Sequence[str], seeds: Sequence[int]) -> list[Config]:
    """Build and try the configurations of a comparison, seed by seed.

    A method that such settings do not concern is the control that it would be without them, and runs without them.
    Any other one that cannot have them would stand beside those that can as if it had: it is refused.

    Raises:
        UserError: whatever is wrong with one of the runs; where these settings are for some of the methods only, it
            names all others.
    """
    configs: list[Config] = []
    refused: dict[str, str] = {}
    plain = {key: value for key, value in flat.items() if not key.startswith(SECTIONS)}
    for seed in seeds:
        for method in methods:
            own = plain if method in unconcerned(flat, methods) else flat
            try:
                configs.append(prepare({**own, "run.method": method, "run.seed": seed}))
            except UserError as error:
                if not str(error).startswith(SECTIONS):
                    raise
                refused[method] = str(error)
        if refused:
            break
    if refused:
        others = len(refused) < len(methods) - len(unconcerned(flat, methods))
        apart = f". Or compare {' '.join(refused)} in an --out of their own, without: `fedkd plot` takes runs of both"
        raise UserError("; ".join(dict.fromkeys(refused.values())) + (apart if others else ""))
    return configs
