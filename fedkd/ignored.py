"""Settings that a run does not read because of another one, so that giving them can be answered with a warning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from fedkd.config import Config, Scalar
from fedkd.method import load

_COMMON: dict[str, tuple[str, Callable[[Config], bool]]] = {
    **{
        f"data.{name}": ("data.partition", lambda c: c.data.partition != "devices")
        for name in ("config", "fraction", "newcomers", "seed", "test")
    },
    "run.exchange": ("run.method", lambda c: load(c.run.method).Sum is not None),
    "data.alpha": ("data.partition", lambda c: c.data.partition in ("dirichlet", "fedgen")),
    "data.min-size": ("data.partition", lambda c: c.data.partition in ("dirichlet", "fedgen")),
    "data.classes-per-client": ("data.partition", lambda c: c.data.partition == "pathological"),
    "data.test-fraction": ("data.test", lambda c: c.data.test == "pooled"),
    "model.hidden": ("model.name", lambda c: bool({c.model.name, *c.model.assigned} & {"auto", "mlp"})),
    "train.local-epochs": ("train.local-steps", lambda c: c.train.local_steps == 0),
    "aggregation.trim": ("aggregation.rule", lambda c: c.aggregation.rule == "trimmed-mean"),
    "aggregation.byzantine": ("aggregation.rule", lambda c: c.aggregation.rule in ("krum", "multi-krum")),
    "aggregation.clip-norm": (
        "aggregation.refuse-norm",
        lambda c: not 0 < c.aggregation.refuse_norm <= c.aggregation.clip_norm,
    ),
    "privacy.delta": ("privacy.noise-multiplier", lambda c: c.privacy.noise_multiplier > 0),
    "privacy.noise": ("privacy.noise-multiplier", lambda c: c.privacy.noise_multiplier > 0),
    "train.lr-decay-from": ("train.lr-decay", lambda c: c.train.lr_decay < 1),
}
"""Key to the key that decides whether it is read, and whether it is."""


def ignored(config: Config, keys: Iterable[str]) -> list[str]:
    """Return a line for each of some keys that this run does not read, with the setting that is why.

    A method marks its own settings with ``json_schema_extra={"only": {field or key: value}}`` (the tests rely on it
    too).  Of a choice or a switch, another value than this one means that the setting is not read; of a number, where
    the value is but an example at which it is, only zero does.
    """
    flat = config.flat()
    reasons = {key: _reason(config, flat, key) for key in keys}
    return [f"{key} has no effect beside {why} = {flat[why]!r}" for key, why in reasons.items() if why]


def _reason(config: Config, flat: Mapping[str, Scalar], key: str) -> str | None:
    """Return the key because of which one is not read; that key's own word counts only where it is read itself."""
    for other, holds in _needs(config, flat, key).items():
        if not holds(config) and _reason(config, flat, other) is None:
            return other
    return None


def _needs(config: Config, flat: Mapping[str, Scalar], key: str) -> dict[str, Callable[[Config], bool]]:
    if key in _COMMON:
        return dict([_COMMON[key]])
    section, name = key.split(".", 1)
    field = type(config.hyper).model_fields.get(name.replace("-", "_")) if section == config.run.method else None
    extra: Any = (field.json_schema_extra if field else None) or {}
    keys = {
        o if "." in o else f"{section}.{o.replace('_', '-')}": wanted for o, wanted in extra.get("only", {}).items()
    }
    needs: dict[str, Callable[[Config], bool]] = {o: partial(_holds, flat[o], wanted) for o, wanted in keys.items()}
    return needs | {"aggregation.rule": _weighs} if name == "weighting" else needs


def _weighs(config: Config) -> bool:
    return config.aggregation.rule in ("mean", "multi-krum")


def _holds(value: Scalar, wanted: Scalar, _: Config) -> bool:
    return value == wanted if isinstance(wanted, (str, bool)) else bool(value) or not wanted
