"""Each client against its own circumstances: its local-only model, the size of its shard, the mix of its labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from fedkd.errors import UserError
from fedkd.metrics import Floats
from fedkd.results import Run
from plots import clients, style
from plots.tables import describe, describe_seeds, groups

_POINTS_UP_TO = 3
"""Up to this number of methods, each client is drawn as a point beside the lines."""

_PER_BIN = 10
_MOST_BINS = 6


@style.styled()
def gain(runs: Sequence[Run]) -> style.CaptionedFigure:
    """Draw each client's accuracy against that of its local-only model, a panel per method.

    Both at the last evaluation; clients of all seeds with a run of ``local``.

    Args:
        runs: runs of one or more methods and seeds, and of ``local`` with the same seeds and clients.

    Returns:
        a figure as wide as one column for one method, else two.

    Raises:
        UserError: no run has a run of ``local`` to compare with, or a run without an evaluation.
    """
    found = [group for group in groups(runs) if group.method != "local"]
    tables = {group.label: [clients.table(run, runs).dropna(subset="alone") for run in group.runs] for group in found}
    tables = {label: [frame for frame in frames if len(frame)] for label, frames in tables.items()}
    found = [group for group in found if tables[group.label]]
    if not found:
        raise UserError(
            "gain compares methods with runs of 'local' with the same seeds and clients, and there is no such pair; "
            "run `fedkd compare local ...` with them"
        )
    figure, panels = style.panels(len(found), 1.75 if len(found) > 1 else 2.4)
    for axes, group in zip(panels, found, strict=True):
        frame = pd.concat(tables[group.label])
        worse = (frame["accuracy"] < frame["alone"]).to_numpy()
        axes.plot([0, 100], [0, 100], color=style.GREY, linewidth=0.8, zorder=1.5)
        look = style.line(group.method) | {"linestyle": "", "alpha": 0.6, "clip_on": False, "markeredgewidth": 0.8}
        for marker, part in (("o", frame[~worse]), ("x", frame[worse])):
            if len(part):  # an empty line that is not clipped would upset the layout
                axes.plot(part["alone"], part["accuracy"], **{**look, "marker": marker})
        style.title(figure, axes, f"{group.label}\n{worse.sum()}/{len(frame)} worse")
        axes.set_xticks([0, 50, 100])
        axes.set_yticks([0, 50, 100])
        figure.note("gain", group.label, client=frame.index, x=frame["alone"].array, y=frame["accuracy"].array)
    panels[0].set_xlim(0, 100)
    panels[0].set_ylim(0, 100)
    figure.supxlabel("accuracy of the client's local-only model (%)", fontsize=7.5)
    figure.supylabel("client accuracy (%)", fontsize=7.5)
    seeds = describe_seeds({label: len(frames) for label, frames in tables.items() if frames})
    figure.caption = (
        f"Accuracy of each client against that of its local-only model, both at the last evaluation; {describe(runs)}. "
        f"A point is a client of a seed ({seeds}); crosses are worse off than alone. "
        "Every client is drawn, so there are no error bands."
    )
    return figure


@style.styled()
def heterogeneity(runs: Sequence[Run]) -> style.CaptionedFigure:
    """Draw the clients' accuracies against the size of their shards and against the entropy of their labels.

    Lines are means over bins of equally many clients, of all seeds together; up to three methods also have their
    clients as points.

    Args:
        runs: runs of one or more methods and seeds.

    Returns:
        a figure across two columns.

    Raises:
        UserError: no runs, or a run without an evaluation.
    """
    found = groups(runs)
    figure = style.new_figure(style.DOUBLE, 2.4)
    panels = figure.subplots(1, 2, sharey=True)
    columns = {
        "examples": "training examples of the client",
        "entropy": "entropy of the client's labels (1: all alike)",
    }
    ranks = []
    for group in found:
        frame = pd.concat([clients.table(run, runs) for run in group.runs])
        look = style.line(group.method, group.variant)
        correlations = []
        for axes, column in zip(panels, columns, strict=True):
            x, y = frame[column].to_numpy(dtype=float), frame["accuracy"].to_numpy(dtype=float)
            if len(found) <= _POINTS_UP_TO:
                axes.plot(x, y, **{**look, "linestyle": ""}, markersize=2, alpha=0.3, markeredgewidth=0)
            middles, means = _binned(x, y)
            axes.plot(middles, means, label=group.label, **look)
            correlations.append(_rank_correlation(x, y))
            figure.note(column, group.label, x=middles, y=means, clients=len(x))
        ranks.append(f"{group.label} {correlations[0]} and {correlations[1]}")
    low, high = panels[0].dataLim.intervalx
    if high > 10 * low:
        style.logarithmic(panels[0])
    panels[0].set_ylabel("client accuracy (%)")
    for axes, label in zip(panels, columns.values(), strict=True):
        axes.set_xlabel(label)
    style.percent(panels[0])
    style.legend(figure, *panels[0].get_legend_handles_labels())
    figure.caption = (
        "Accuracy of the clients at the last evaluation, against the number of their training examples (left) and the "
        f"normalised entropy of their labels (right); {describe(runs)}. Lines: means over bins of equally many "
        f"clients, of all seeds together ({describe_seeds({group.label: len(group.runs) for group in found})}); "
        f"{'points: clients; ' if len(found) <= _POINTS_UP_TO else ''}there are no error bands. "
        f"Spearman's rank correlation, left and right: {', '.join(ranks)}."
    )
    return figure


def _binned(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Return the mean of y, and of x, in bins of equally many clients; equal x are never parted.

    Args:
        x: ``[clients]``.
        y: ``[clients]``.
    """
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    bins = int(np.clip(len(x) // _PER_BIN, 1, _MOST_BINS))
    cuts = np.unique([np.searchsorted(x, x[len(x) * k // bins]) for k in range(1, bins)])
    parts = [part for part in np.split(np.arange(len(x)), cuts) if len(part)]
    return np.array([x[part].mean() for part in parts]), np.array([y[part].mean() for part in parts])


def _rank_correlation(x: Floats, y: Floats) -> str:
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return "undefined"
    return f"{stats.spearmanr(x, y).statistic:.2f}"
