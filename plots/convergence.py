"""Accuracy over rounds, bytes or time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from fedkd.errors import UserError, nearest
from fedkd.metrics import Floats, by_round, rounds_to
from fedkd.results import Run
from plots import style
from plots.tables import Group, describe, describe_seeds, groups

By = Literal["round", "bytes", "seconds"]
Column = Literal["accuracy", "weighted", "global", "personal", "worst_decile"]


def _rounds(run: Run) -> pd.Series[float]:
    numbers = run.frame("rounds")["round"]
    return pd.Series(numbers.to_numpy(dtype=float), index=numbers)


def _bytes(run: Run) -> pd.Series[float]:
    clients = run.frame("clients")
    return (clients["bytes_down"] + clients["bytes_up"]).groupby(clients["round"]).sum().cumsum().astype(float)


def _seconds(run: Run) -> pd.Series[float]:
    return run.frame("rounds").set_index("round")["seconds"].cumsum()


_AXES: dict[str, tuple[Callable[[Run], pd.Series[float]], str]] = {
    "round": (_rounds, "communication round"),
    "bytes": (_bytes, "bytes sent, up and down, all clients"),
    "seconds": (_seconds, "wall-clock time, evaluations included"),
}
_COLUMNS = {
    "accuracy": "mean client accuracy (%)",
    "weighted": "accuracy on all test images (%)",
    "global": "global model accuracy (%)",
    "personal": "personal model accuracy (%)",
    "worst_decile": "accuracy of the worst tenth (%)",
}
_STATISTICS = {"weighted": ("accuracy", "weighted"), "worst_decile": ("accuracy", "worst_decile")}
"""What of :func:`fedkd.metrics.by_round` a column is, of which accuracy, where it is not the mean of its own name."""
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@style.styled()
def convergence(
    runs: Sequence[Run],
    by: By = "round",
    column: Column = "accuracy",
    targets: Sequence[float] = (),
    settled: bool = False,
) -> style.CaptionedFigure:
    """Draw a line per method: the mean over its seeds, with a band of one standard deviation, at evaluated rounds.

    A line ends at the last round that all seeds of the method have reached.  Methods without the model that
    ``column`` asks for (``local`` has no global one) are left out.

    Args:
        runs: runs of one or more methods and seeds.
        by: the horizontal axis: round, bytes or seconds so far (mean over seeds).
        column: whose accuracy: of the model a client would use, of the global model, of the personal one, or, of the
            first, ``weighted`` by each client's test images, or the mean over the worst tenth of the clients at each
            round.
        targets: accuracies in [0, 1] to mark; the caption says who reaches them when.
        settled: whether the vertical axis begins near the lowest mean after the first fifth of the horizontal one, and
            ends near the top, so that what rises steeply at first and lies close together afterwards can be told apart.

    Returns:
        a figure as wide as one column.

    Raises:
        UserError: no runs, a run without an evaluation, an unknown ``by`` or ``column``, or nothing to draw.
    """
    for name, value, known in (("by", by, list(_AXES)), ("column", column, list(_COLUMNS))):
        if value not in known:
            raise UserError(f"{name} = '{value}'{nearest(value, known)} (known: {', '.join(known)})")
    found = groups(runs)
    curves = [(group, *curve(group, by, column)) for group in found]
    curves = [curve for curve in curves if len(curve[1]) and not np.isnan(curve[2]).all()]
    if not curves:
        raise UserError(f"none of the runs has {_COLUMNS[column].removesuffix(' (%)')} at a round that its seeds share")

    divisor, label = 1.0, _AXES[by][1]
    if by == "bytes":
        most = max(float(x.max()) for _, x, _ in curves)
        divisor, unit = _unit(most)
        label = f"{label} ({unit})"
    elif by == "seconds":
        label = f"{label} (s)"
    figure = style.new_figure(style.SINGLE, 2.25)
    axes = figure.add_subplot()
    for number, (group, x, values) in enumerate(curves):
        look = style.line(group.method, group.variant)
        style.band(figure, axes, label, group.label, look, x / divisor, values, number)
    for target in targets:
        axes.axhline(100 * target, color=style.GREY, linewidth=0.8, linestyle=":", zorder=1.5)
    style.percent(axes)
    if settled:
        means = [values.mean(axis=0)[x >= x[0] + 0.2 * (x[-1] - x[0])] for _, x, values in curves]
        lowest, highest = min(float(mean.min()) for mean in means), axes.dataLim.y1
        margin = 0.05 * (highest - lowest)
        axes.set_ylim(max(axes.get_ylim()[0], lowest - margin), min(highest + margin, axes.get_ylim()[1]))
    low, high = axes.get_ylim()
    place, letter = float("-inf"), 0.065 * (high - low)
    for target in sorted(targets):
        place = max(100 * target, place + letter)  # so that the labels of near ones stay apart
        axes.annotate(
            f"{100 * target:g}",
            (1, place),
            xycoords=("axes fraction", "data"),
            xytext=(2, 0),
            textcoords="offset points",
            va="center",
            color=style.GREY,
        )
    if by == "round" and axes.dataLim.width == 0:  # one round
        axes.set_xlim(axes.dataLim.x0 - 1, axes.dataLim.x0 + 1)
    axes.set_xlabel(label)
    axes.set_ylabel(_COLUMNS[column])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=by == "round", steps=[1, 2, 5, 10]))
    style.legend(figure, *axes.get_legend_handles_labels())
    figure.caption = _caption(runs, [curve[0] for curve in curves], found, by, column, targets)
    return figure


def curve(group: Group, by: By, column: Column) -> tuple[Floats, Floats]:
    """Return the places ``[rounds]`` on the horizontal axis and the percentages ``[seeds, rounds]``.

    Both at the rounds that all seeds evaluated; rounds, bytes or seconds so far, mean over seeds.
    """
    of, statistic = _STATISTICS.get(column, (column, "mean"))
    curves = [100 * by_round(run.evaluations, of)[statistic] for run in group.runs]
    places = [_AXES[by][0](run) for run in group.runs]
    common = curves[0].index
    for other in (*curves[1:], *places):
        common = common.intersection(other.index)
    common = common.sort_values()
    x = np.mean([place.loc[common].to_numpy(dtype=float) for place in places], axis=0)
    return x, np.array([curve.loc[common].to_numpy(dtype=float) for curve in curves])


def _caption(
    runs: Sequence[Run],
    drawn: Sequence[Group],
    found: Sequence[Group],
    by: By,
    column: Column,
    targets: Sequence[float],
) -> str:
    whose = {
        "accuracy": "the clients",
        "weighted": "the clients",
        "global": "the clients with the global model",
        "personal": "the clients with their personal models",
        "worst_decile": "the worst tenth of the clients at each round",
    }[column]
    weights = "weighted by their test images" if column == "weighted" else "weighted equally"
    seeds = describe_seeds({group.label: len(group.runs) for group in drawn})
    parts = [
        f"Accuracy of {whose}, {weights}, against {_AXES[by][1]}; {describe(runs)}.",
        f"Lines: mean over seeds ({seeds}), up to the last round that all of them reached.",
        "Bands: plus and minus one sample standard deviation over seeds; a line of one seed has none.",
    ]
    left_out = [group.label for group in found if group not in drawn]
    if left_out:
        parts.append(f"Left out, having no such model or no round in common: {', '.join(left_out)}.")
    for target in targets:
        reached = [f"{group.label} {_reached(group, by, column, target)}" for group in drawn]
        parts.append(f"The mean over seeds first reaches {100 * target:g} % in: {', '.join(reached)}.")
    return " ".join(parts)


def _reached(group: Group, by: By, column: Column, target: float) -> str:
    """Return the round at which the mean over seeds reaches a target, and what it had cost until then."""
    numbers, values = curve(group, "round", column)
    first = rounds_to(pd.Series(values.mean(axis=0) / 100, index=numbers), target)
    if first is None:
        return "never"
    # Seconds only where they are asked for: without them, equal results have equal captions.
    cost = float(curve(group, "seconds" if by == "seconds" else "bytes", column)[0][numbers == first][0])
    divisor, unit = (1.0, "s") if by == "seconds" else _unit(cost)
    return f"round {first} ({cost / divisor:.3g} {unit})"


def _unit(most: float) -> tuple[float, str]:
    """Return the size and name of the unit for this many bytes."""
    return next(((size, unit) for size, unit in _UNITS if most >= size), _UNITS[-1])
