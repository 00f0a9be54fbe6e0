"""What accuracy costs in bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedkd.results import Run
from plots import style
from plots.tables import describe, describe_seeds, groups, over_seeds

_LOG_FROM = 20
"""Ratio of the largest to the smallest traffic from which the axis is logarithmic."""


@style.styled()
def pareto(runs: Sequence[Run]) -> style.CaptionedFigure:
    """Draw the accuracy at the last evaluation against the bytes sent until the end, a point per method.

    A line joins the methods that no other beats in both.  A method that sends nothing (``local``) is a level.

    Args:
        runs: runs of one or more methods and seeds.

    Returns:
        a figure as wide as one column.

    Raises:
        UserError: no runs, or a run without an evaluation.
    """
    found = groups(runs)
    figure = style.new_figure(style.SINGLE, 2.25)
    axes = figure.add_subplot()
    points: list[tuple[float, float]] = []
    for group in found:
        summaries = [run.summary() for run in group.runs]
        accuracy, deviation = over_seeds([100 * summary["last"] for summary in summaries])
        megabytes, _ = over_seeds([(summary["bytes_up"] + summary["bytes_down"]) / 1e6 for summary in summaries])
        look = style.line(group.method, group.variant)
        shown = 0.0 if deviation != deviation else deviation
        if megabytes:
            points.append((megabytes, accuracy))
            axes.errorbar(megabytes, accuracy, shown, label=group.label, elinewidth=0.8, **{**look, "linestyle": ""})
        else:
            axes.axhline(accuracy, label=f"{group.label} (sends nothing)", **{**look, "marker": ""})
            axes.axhspan(accuracy - shown, accuracy + shown, color=look["color"], alpha=0.18, linewidth=0)
        figure.note("pareto", group.label, x=megabytes, y=accuracy, deviation=deviation, seeds=len(summaries))
    front = _front(points)
    axes.plot(*np.array(front).reshape(-1, 2).T, color=style.GREY, linewidth=0.8, drawstyle="steps-post", zorder=1.5)
    sizes = [megabytes for megabytes, _ in points]
    if sizes and max(sizes) > _LOG_FROM * min(sizes):
        style.logarithmic(axes)
    else:
        axes.set_xlim(left=0)
    axes.set_xlabel("bytes sent, up and down, all clients (MB)")
    axes.set_ylabel("mean client accuracy (%)")
    style.percent(axes)
    style.legend(figure, *axes.get_legend_handles_labels())
    figure.caption = (
        f"Accuracy of the clients, weighted equally, at the last evaluation, against the bytes of all training rounds; "
        f"{describe(runs)}. Points: mean over seeds ({describe_seeds({g.label: len(g.runs) for g in found})}); "
        "whiskers and the band of a level: plus and minus one sample standard deviation over seeds, none for one seed. "
        "Grey steps join the methods that no other beats in accuracy and in bytes. "
        f"Rounds: {', '.join(sorted({str(run.config.run.rounds) for run in runs}, key=int))}."
    )
    return figure


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (bytes, accuracy) that no other beats in both, by bytes."""
    front: list[tuple[float, float]] = []
    for size, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((size, accuracy))
    return front
