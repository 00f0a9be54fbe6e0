"""A comparison whose settings are not for every method: those of ``[aggregation]`` and ``[privacy]``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from fedkd.config import Config, Scalar
from fedkd.errors import UserError
from fedkd.method import load

SECTIONS = ("aggregation.", "privacy.")
"""What becomes of the models that clients send."""


def sends_counts_alone(method: str) -> bool:
    """Return whether a method's clients send nothing that could be averaged or tell of their data (``local``)."""
    return not any(spec.dtype.is_floating_point for spec in load(method).Update.specs().values())


def unconcerned(keys: Iterable[str], methods: Sequence[str]) -> list[str]:
    """Return the methods of a comparison that such settings, if there are any among the keys, do not concern."""
    given = any(key.startswith(SECTIONS) for key in keys)
    return [method for method in methods if sends_counts_alone(method)] if given and len(methods) > 1 else []


def prepare_all(
    wanted: Sequence[Mapping[str, Scalar]], prepare: Callable[[Mapping[str, Scalar]], Config], again: str = "compare"
) -> list[Config]:
    """Build and try the configurations of a comparison or a sweep, in order.

    A method that such settings do not concern is the control that it would be without them, and runs without them.
    Any other one that cannot have them would stand beside those that can as if it had: it is refused.

    Args:
        wanted: the flat keys of each run; ``run.method`` is among them.
        prepare: makes a configuration of them, and tries it.
        again: the command, for the message.

    Raises:
        UserError: whatever is wrong with one of the runs; where these settings are for some of the methods only, it
            names all others.
    """
    configs: list[Config] = []
    refused: dict[str, str] = {}
    methods = list(dict.fromkeys(str(flat["run.method"]) for flat in wanted))
    aside = unconcerned({key for flat in wanted for key in flat}, methods)
    for flat in wanted:
        method = str(flat["run.method"])
        if method in refused:
            continue
        own = {key: value for key, value in flat.items() if method not in aside or not key.startswith(SECTIONS)}
        try:
            configs.append(prepare(own))
        except UserError as error:
            if not str(error).startswith(SECTIONS):
                raise
            refused[method] = str(error)
    if refused:
        others = len(refused) < len(methods) - len(aside)
        apart = f". Or {again} {' '.join(refused)} in an --out of their own, without: `fedkd plot` takes runs of both"
        raise UserError("; ".join(dict.fromkeys(refused.values())) + (apart if others else ""))
    return configs
