"""Sweeps: the grid over any settings as runs, each once, and which setting came out best."""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedkd.config import Config, Scalar, parse_assignment
from fedkd.errors import UserError
from fedkd.results import Run, spread
from sims.together import SECTIONS, prepare_all, unconcerned

if TYPE_CHECKING:
    from plots.style import CaptionedFigure

Axes = Mapping[str, Sequence[Scalar]]
"""The values of each setting that is swept."""


def parse_axis(text: str) -> tuple[str, list[Scalar]]:
    """Parse one ``section.key=value,value``; a value with a comma stands in quotes.

    Raises:
        UserError: no ``=``, an empty value, or one that is there twice.
    """
    key, sign, raw = (part.strip() for part in text.partition("="))
    if not sign or not key or not raw:
        raise UserError(f"--over '{text}' is no list of values; write section.key=value,value, e.g. train.lr=0.01,0.1")
    try:  # quoted values may hold commas
        values = list(tomllib.loads(f"values = [{raw}]")["values"])
    except tomllib.TOMLDecodeError:
        values = [parse_assignment(f"{key}={word}")[1] for word in raw.split(",")]
    if "" in (word.strip() for word in raw.split(",")) or not all(
        isinstance(v, (str, int, float, bool)) for v in values
    ):
        raise UserError(f"--over '{text}': between two commas stands one value")
    if len({(type(value) is bool, value) for value in values}) < len(values):
        raise UserError(f"--over '{text}' names a value twice")
    return key, values


def grid(axes: Axes, methods: Sequence[str], known: Sequence[str]) -> Iterator[tuple[str, dict[str, Scalar]]]:
    """Yield each method with each combination of the values of the settings that are common or its own, and concern it.

    Args:
        axes: the values of each setting.
        methods: what to run.
        known: the names of all methods, whose sections are theirs alone.
    """
    aside = unconcerned(axes, methods)
    for method in methods:
        own = [key for key in axes if (section := key.partition(".")[0]) == method or section not in known]
        own = [key for key in own if method not in aside or not key.startswith(SECTIONS)]
        for values in itertools.product(*(axes[key] for key in own)):
            yield method, dict(zip(own, values, strict=True))


def check_axes(axes: Axes) -> None:
    """Check that runs which differ in these settings can stand beside each other in a table.

    Raises:
        UserError: a setting that makes repetitions, or none that tells runs apart.
    """
    from plots.tables import NOT_SETTINGS

    for key in axes:
        if key in NOT_SETTINGS:
            why = "seeds make repetitions: use --seeds" if key.endswith("seed") else "it tells no settings apart"
            raise UserError(f"--over {key}: {why}")


def plan(
    axes: Axes,
    given: Mapping[str, Scalar],
    methods: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    prepare: Callable[[Mapping[str, Scalar]], Config],
) -> list[tuple[Config, bool]]:
    """Return the runs of a sweep in the folders where they are or will be, and whether each is finished.

    A run that is in ``out`` already is found by its settings, whatever its folder is called there, so a sweep that
    has other axes, or the same in another order, uses it.

    Args:
        axes: the values of each setting.
        given: the flat keys that all runs have.
        methods: what to run.
        seeds: one run per method, combination and seed.
        out: folder of the runs.
        prepare: makes the configuration of a run of its flat keys, and checks it.

    Raises:
        UserError: whatever is wrong with any of the runs; nothing has been started by then.
    """
    from fedkd.method import names
    from sims.launch import place_series

    combinations = [(*each, seed) for seed in seeds for each in grid(axes, methods, names())]
    wanted = [{**given, **values, "run.method": method, "run.seed": seed} for method, values, seed in combinations]
    every: dict[str, tuple[Config, str]] = {}
    for config, (method, values, seed) in zip(prepare_all(wanted, prepare, "sweep"), combinations, strict=True):
        every.setdefault(config.settings_hash(), (config, _name(method, values, seed)))
    places = {Run(path.parent).config.settings_hash(): path.parent for path in sorted(out.glob("*/config.toml"))}
    for number, (_, name) in every.items():
        taken = out / name in places.values()
        places.setdefault(number, out / (f"{name}-{number}" if taken else name))
    return [place_series(config, places[number]) for number, (config, _) in every.items()]


def _name(method: str, values: Mapping[str, Scalar], seed: int) -> str:
    """Return the name of a run's folder; what no file system may like becomes a hyphen."""
    parts = [f"{key.partition('.')[2]}={value}" for key, value in values.items()]
    return re.sub(r"[^\w.=+-]", "-", "-".join([method, *parts, f"s{seed}"]))


def best(runs: Sequence[Run]) -> list[str]:
    """Say with which settings each method came out best, a line each, and in a last line what that is worth.

    What is asked (sections ``data`` and ``run``: how skewed, how many clients) is not chosen: each has its own best.
    """
    from plots.tables import groups, over_seeds, settings, varied

    places: dict[tuple[str, str], list[tuple[str, float, float]]] = {}
    for group in groups(runs):
        keys = varied([run for run in runs if run.config.run.method == group.method])
        flat = settings(group.runs[0])
        told = {asked: ", ".join(f"{k}={flat[k]}" for k in keys if _is_asked(k) == asked) for asked in (True, False)}
        last = over_seeds([100 * run.summary()["last"] for run in group.runs])
        places.setdefault((group.method, told[True]), []).append((told[False], *last))
    lines = []
    for (method, asked), candidates in places.items():
        if len(candidates) == 1:
            continue
        (values, mean, deviation), *others = sorted(candidates, key=lambda candidate: -candidate[1])
        close = [other for other, its_mean, its in others if mean - its_mean <= _larger(deviation, its)]
        at = f" at {asked}" if asked else ""
        said = f"{method}{at} is best at the last round with {values}: {spread(mean, deviation)} %"
        lines.append(f"{said}; within one deviation over seeds: {'; '.join(close)}" if close else said)
    single = len({run.config.run.seed for run in runs}) == 1
    return lines and [*lines, f"{_OPTIMISTIC}{' With one seed, the order may be chance.' if single else ''}"]


def _is_asked(key: str) -> bool:
    return key.startswith(("data.", "run."))


_OPTIMISTIC = (
    "These were chosen on the test data that their accuracy is measured on, which makes it optimistic: for a claim, "
    "run the chosen setting again with other seeds."
)


def _larger(*deviations: float) -> float:
    """Return the larger deviation over seeds; below any difference where none is known."""
    return max((deviation for deviation in deviations if deviation == deviation), default=-1.0)


def draw(runs: Sequence[Run]) -> tuple[dict[str, CaptionedFigure], list[str]]:
    """Draw what a sweep varied: lines over one setting, a heat map over two; where methods vary others, one for each.

    Returns:
        the figures by name, and of which methods there is none, because they vary more.
    """
    from plots.figures import draw
    from plots.tables import varied

    def over(some: Sequence[Run]) -> int:
        return len(varied(some).keys() - {"run.method"})

    if over(runs) == 1:
        return {"setting": draw("setting", runs)}, []
    drawn, left_out = {}, []
    for method in dict.fromkeys(run.config.run.method for run in runs):
        mine = [run for run in runs if run.config.run.method == method]
        kind = {0: "", 1: "setting", 2: "heatmap"}.get(over(mine))
        if kind:
            drawn[f"{kind}-{method}"] = draw(kind, mine)
        elif kind is None:
            left_out.append(f"a figure of {method}, which varies {over(mine)} settings; the table has them all")
    return drawn, left_out
