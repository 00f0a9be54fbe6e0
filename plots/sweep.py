"""Accuracy over one setting or two."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from fedkd.errors import UserError
from fedkd.results import Run
from plots import style
from plots.tables import describe, describe_seeds, groups, over_seeds, settings, varied

_TEXT_UP_TO = 12
"""Up to this number of columns the cells have their numbers written in them."""


@style.styled()
def heatmap(runs: Sequence[Run]) -> style.CaptionedFigure:
    """Draw the accuracy at the last evaluation over the two keys in which the runs differ; the method may be one.

    Args:
        runs: runs that differ in two settings, and in their seeds.

    Returns:
        a figure as wide as one column for up to six columns of cells, else two.

    Raises:
        UserError: the runs differ in more or fewer settings, or one has no evaluation.
    """
    for run in runs:
        if run.evaluations.empty:
            raise UserError(f"{run.folder} holds no evaluation; leave it out or run it again")
    keys = varied(runs)
    if len(keys) != 2:
        found = ", ".join(f"{key} ({len(values)} values)" for key, values in keys.items())
        raise UserError(
            f"heatmap is drawn over two settings in which the runs differ, and these differ in: {found or 'none'}"
        )
    if lacking := [run.folder for run in runs if not keys.keys() <= settings(run).keys()]:
        raise UserError(f"heatmap is drawn over {' and '.join(keys)}, and {lacking[0]} does not have both")
    (across, columns), (down, rows) = sorted(keys.items(), key=lambda item: (item[0] == "run.method", -len(item[1])))
    cells: dict[tuple[int, int], list[float]] = {}
    for run in runs:
        flat = settings(run)
        place = rows.index(flat[down]), columns.index(flat[across])
        cells.setdefault(place, []).append(100 * run.summary()["last"])
    means = np.full((len(rows), len(columns)), np.nan)
    for place, values in cells.items():
        means[place] = np.mean(values)

    text = len(columns) <= _TEXT_UP_TO
    width = style.SINGLE if len(columns) <= 6 else style.DOUBLE
    figure = style.new_figure(width, float(np.clip(0.32 * len(rows), 1.3, 6)) + 0.75)
    axes = figure.add_subplot()
    image = axes.pcolormesh(means, cmap="viridis", edgecolors="white", linewidth=0.5)
    axes.set_xticks(np.arange(len(columns)) + 0.5, [_written(value) for value in columns])
    axes.set_yticks(np.arange(len(rows)) + 0.5, [_written(value) for value in rows])
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xlabel(across)
    axes.set_ylabel("" if down == "run.method" else down)
    for spine in axes.spines.values():
        spine.set_visible(False)
    middle = (np.nanmin(means) + np.nanmax(means)) / 2
    for (row, column), values in cells.items():
        mean, deviation = over_seeds(values)
        figure.note("heatmap", _written(rows[row]), x=_written(columns[column]), y=mean, deviation=deviation)
        if text:
            shown = f"{mean:.1f}" if deviation != deviation else f"{mean:.1f}\n±{deviation:.1f}"
            colour = "black" if mean > middle else "white"
            axes.text(
                column + 0.5, row + 0.5, shown, ha="center", va="center", fontsize=6, color=colour, linespacing=0.95
            )
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("accuracy (%)")
    bar.outline.set_linewidth(0)
    seeds = describe_seeds(
        {f"{_written(rows[r])}/{_written(columns[c])}": len(v) for (r, c), v in sorted(cells.items())}
    )
    missing = means.size - len(cells)
    figure.caption = (
        f"Accuracy of the clients, weighted equally, at the last evaluation, over {across} and {down}: mean over seeds "
        f"({seeds}), with plus and minus one sample standard deviation over seeds where there are several. "
        + (f"White: {missing} combinations that were not run. " if missing else "")
        + ("" if text else "Deviations are in the table beside this figure. ")
    ).strip()
    return figure


@style.styled()
def setting(runs: Sequence[Run]) -> style.CaptionedFigure:
    """Draw the accuracy at the last evaluation over the one key in which the runs of a method differ, a line a method.

    A method without that key is a level line.

    Args:
        runs: runs that differ in one setting beside the method and their seeds.

    Returns:
        a figure as wide as one column.

    Raises:
        UserError: the runs differ in no setting or in several, or one has no evaluation.
    """
    found = groups(runs)
    keys = {key: values for key, values in varied(runs).items() if key != "run.method"}
    if len(keys) != 1:
        several = ", ".join(keys) or "none"
        raise UserError(f"setting is drawn over one setting in which the runs differ, and these differ in: {several}")
    [(key, values)] = keys.items()
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    places = np.array(values if numbers else range(len(values)), dtype=float)
    figure = style.new_figure(style.SINGLE, 2.25)
    axes = figure.add_subplot()
    for method in dict.fromkeys(group.method for group in found):
        at = {settings(group.runs[0]).get(key): group for group in found if group.method == method}
        if level := None in at:
            at = dict.fromkeys(values, at[None])
        here = [index for index, value in enumerate(values) if value in at]
        seeds = [[100 * run.summary()["last"] for run in at[values[index]].runs] for index in here]
        look = style.line(method) | ({"marker": ""} if level else {})
        mean, deviation = np.transpose([over_seeds(each) for each in seeds])
        axes.plot(places[here], mean, label=method, **look)
        axes.fill_between(
            places[here], mean - deviation, mean + deviation, color=look["color"], alpha=0.18, linewidth=0
        )
        counts = [len(each) for each in seeds]
        figure.note("setting", method, x=[_written(values[i]) for i in here], y=mean, deviation=deviation, seeds=counts)
    if numbers and places.min() > 0 and places.max() >= 8 * places.min():
        axes.set_xscale("log")
    axes.minorticks_off()
    written = [_written(value) for value in values]
    long = sum(map(len, written)) > 40
    axes.set_xticks(places, written, rotation=30 if long else 0, ha="right" if long else "center")
    style.percent(axes)
    axes.set_xlabel(key)
    axes.set_ylabel("accuracy (%)")
    style.legend(figure, *axes.get_legend_handles_labels())
    figure.caption = (
        f"Accuracy of the clients, weighted equally, at the last evaluation, over {key}: mean over seeds, with a band "
        f"of one sample standard deviation where there are several "
        f"({describe_seeds({group.label: len(group.runs) for group in found})}); {describe(runs)}."
    )
    return figure


@style.styled()
def gains(above: pd.DataFrame, key: str, control: str) -> style.CaptionedFigure:
    """Draw how far rows are above a control over the steps of what was varied, a line a row.

    Args:
        above: a line per row, step and seed: ``row``, its ``method``, ``at`` (name of the step) and ``gain`` in points.
        key: what was varied.
        control: what the gains are above.

    Returns:
        a figure as wide as one column.
    """
    names = list(dict.fromkeys(above["at"]))
    figure = style.new_figure(style.SINGLE, 2.25)
    axes = figure.add_subplot()
    axes.axhline(0, color=style.GREY, linewidth=0.8, zorder=1.5)
    places = np.arange(len(names), dtype=float)
    seen: dict[str, int] = {}
    for row, mine in above.groupby("row", sort=False):
        method = mine["method"].iloc[0]
        seen[method] = variant = seen.get(method, -1) + 1
        values = np.array([mine.loc[mine["at"] == name, "gain"] for name in names]).T
        style.band(figure, axes, key, str(row), style.line(method, variant), places, values, 0)
    axes.set_xticks(places, [name.replace(", ", "\n") for name in names])
    axes.minorticks_off()
    axes.set_xlabel(key)
    axes.set_ylabel(f"points above {control}")
    style.legend(figure, *axes.get_legend_handles_labels())
    figure.caption = (
        f"Accuracy of the clients at the last evaluation minus that of {control} with the same seed, over {key}: mean "
        "over seeds, with a band of one sample standard deviation where there are several."
    )
    return figure


def _written(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
