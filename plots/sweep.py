"""Accuracy over two settings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedkd.errors import UserError
from fedkd.results import Run
from plots import style
from plots.tables import describe_seeds, over_seeds, settings, varied

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


def _written(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
