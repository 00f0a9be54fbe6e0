"""The rows of a published table: ours over seeds, the published value and the controls beside each other."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.transforms import blended_transform_factory

from plots import style
from plots.tables import describe_seeds, over_seeds

_LETTERS, _SIZE = 28, 6.5
"""Of the labels: most letters in a line, and their size in points."""
_LINE, _BETWEEN, _APART = 0.11, 0.065, 0.06
"""In inches: the height of a line of a label, what is between two rows, and between what is drawn in a row."""
_DASHES: dict[str, Any] = {"local": (0, (4, 2)), "fedavg_ft": (0, (1, 1.5)), "fedavg": (0, (6, 1.5, 1, 1.5))}
_OTHER_DASHES: Any = (0, (6, 1.5, 1, 1.5, 1, 1.5))
"""Of the lines through controls, by their method."""
_SEED: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 1.6, "markeredgewidth": 0}


@style.styled()
def rows(
    values: pd.DataFrame, measure: str, over: str = "", from_zero: bool = False, published_of: str = ""
) -> style.CaptionedFigure:
    """Draw a published table, a row of it per line.

    Args:
        values: a line per row and seed: ``row`` (its label), ``method``, ``control`` (whether it is one), ``line``
            (whether its mean is a line through all rows), ``at`` (the step of what was varied; empty: none),
            ``published`` (mean, or mean ± deviation, as text; empty: none), ``seed`` and ``value``.
        measure: what the values are, with their unit.
        over: what was varied, which stands before each step of it; empty: the steps say it.
        from_zero: whether the axis begins at 0, where only ratios compare.
        published_of: what the published values are of; empty: of the same as the others.

    Returns:
        a figure as wide as one column.
    """
    each = [part for _, part in values.groupby(["at", "row"], sort=False)]
    headings = {at: part.index[0] for at, part in values.groupby("at", sort=False) if at}
    places, labels, height = [], [], 0.0
    for part in each:
        first = part.iloc[0]
        if headings.get(first["at"]) == part.index[0]:
            labels.append((height + _LINE, f"{over}: {first['at']}" if over else first["at"], True))
            height += 1.5 * _LINE
        label = style.broken(first["row"], _LETTERS)
        tall = max(_LINE * (1 + label.count("\n")), 3 * _APART if first["published"] else 0) + _BETWEEN
        places.append(height + tall / 2)
        labels.append((height + tall / 2, label, False))
        height += tall
    figure = style.new_figure(style.SINGLE, height + 0.5)
    axes = figure.add_subplot()
    for part, middle in zip(each, places, strict=True):
        _draw(figure, axes, part, middle)
    lines = [part for part in each if part["line"].iloc[0]]
    for at in dict.fromkeys(values["at"]):
        here = [middle for part, middle in zip(each, places, strict=True) if part["at"].iloc[0] == at]
        for part in (part for part in lines if part["at"].iloc[0] in ("", at)):
            dashes = _dashes(part["method"].iloc[0])
            x, y = [float(part["value"].mean())] * 2, [min(here) - _LINE, max(here) + _LINE]
            axes.plot(x, y, color=style.GREY, linewidth=0.8, linestyle=dashes, zorder=1.5)
    _label(axes, labels)
    axes.set_ylim(height, 0)
    axes.margins(x=0.04)
    if from_zero:
        axes.set_xlim(left=0)
    axes.set_xlabel(measure)
    _legend(figure, values, f"published ({published_of})" if published_of else "published")
    figure.caption = _caption(values, each, lines, measure)
    if published_of and values["published"].any():
        figure.caption += f" Published values are of {published_of}, so that only order and differences compare."
    return figure


def _draw(figure: style.CaptionedFigure, axes: Axes, part: pd.DataFrame, middle: float) -> None:
    """Draw one row at a height: the mean with its deviation, beneath it the seeds, beneath them what was published."""
    first, seeds = part.iloc[0], part["value"].to_numpy(dtype=float)
    published, spread = number(first["published"])
    mean, deviation = over_seeds(seeds)
    colour = style.GREY if first["control"] else style.colour(first["method"])
    top = middle - _APART if first["published"] else middle - 0.5 * _APART
    bars: dict[str, Any] = {"color": colour, "elinewidth": 0.9, "capsize": 1.5, "capthick": 0.9}
    marker = style.line(first["method"])["marker"]
    axes.errorbar(mean, top, xerr=None if np.isnan(deviation) else deviation, fmt=marker, markersize=3.6, **bars)
    axes.plot(seeds, [top + _APART] * len(seeds), color=colour, zorder=3, **_SEED)
    if first["published"]:
        error = None if np.isnan(spread) else spread
        hollow: dict[str, Any] = {"fmt": "D", "markersize": 3.4, "markerfacecolor": "white", "markeredgewidth": 0.9}
        axes.errorbar(published, middle + _APART, xerr=error, **hollow, **bars)
    label = f"{first['row']}, {first['at']}" if first["at"] else first["row"]
    noted = {"x": mean, "deviation": deviation, "published": published, "published_deviation": spread}
    figure.note("rows", label, **noted, seeds=len(seeds))


def number(published: str) -> tuple[float, float]:
    """Return the mean and the deviation of a published value; NaN for what it does not have."""
    mean, _, deviation = re.sub(r"\s", "", published).partition("±")
    return float(mean or "nan"), float(deviation or "nan")


def _dashes(method: str) -> Any:
    """Return the dashes of the line through a control."""
    return _DASHES.get(method, _OTHER_DASHES)


def _label(axes: Axes, labels: list[tuple[float, str, bool]]) -> None:
    """Write the rows' labels beside the axis, and the steps above their rows, in bold, from the axis on."""
    beside = [(place, text) for place, text, heading in labels if not heading]
    axes.set_yticks([place for place, _ in beside], [text for _, text in beside])
    axes.tick_params(axis="y", length=0, labelsize=_SIZE)
    axes.grid(axis="y", visible=False)
    where = blended_transform_factory(axes.transAxes, axes.transData)
    for place, text, heading in labels:
        if heading:
            axes.text(0.01, place, text, transform=where, fontsize=_SIZE, fontweight="bold", va="center")


def _legend(figure: style.CaptionedFigure, values: pd.DataFrame, published: str) -> None:
    """Say what the symbols are, those that there are."""
    plain: dict[str, Any] = {"color": "black", "linestyle": "", "markersize": 3.6}
    handles = {"mean over seeds": Line2D([], [], marker="o", **plain)}
    if not values["control"].all() and values["control"].any():
        handles["control"] = Line2D([], [], marker="o", **plain | {"color": style.GREY})
    handles["one seed"] = Line2D([], [], color="black", **_SEED)
    if values["published"].any():
        handles[published] = Line2D([], [], marker="D", markerfacecolor="white", **plain)
    for row, method in values.loc[values["line"], ["row", "method"]].drop_duplicates().itertuples(index=False):
        handles[str(row)] = Line2D([], [], color=style.GREY, linewidth=0.8, linestyle=_dashes(method))
    style.legend(figure, list(handles.values()), list(handles))


def _caption(values: pd.DataFrame, each: list[pd.DataFrame], lines: list[pd.DataFrame], measure: str) -> str:
    seeds = describe_seeds({str(part["row"].iloc[0]): len(part) for part in each})
    means = dict.fromkeys(part["row"].iloc[0] for part in lines)
    drawn = [f"Rows of the table: {measure}. Filled: mean over seeds ({seeds}), a shape per method, controls in grey."]
    drawn.append("Bars: plus and minus one sample standard deviation over seeds; a row of one seed has none.")
    drawn.append("Small dots: the single seeds.")
    if values["published"].any():
        drawn.append("Hollow diamonds: the published value, with its ± as published, where there is one.")
    if means:
        drawn.append(f"Broken lines: the mean of {' and of '.join(means)}.")
    return " ".join(drawn)
