"""Who holds what."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.lines import Line2D

from fedkd.errors import UserError
from fedkd.results import Run
from plots import style

_SORTED_FROM = 31
"""From this number of clients on they are sorted by class, and the figure is across two columns."""

_LABEL_POINTS = 8.5
"""Height of a line of tick labels."""

_SMALLEST_AREA = 0.4
"""Area of a bubble, in square points, below which it could not be seen."""

Integers = npt.NDArray[np.int64]


@style.styled()
def partition(source: Run | pd.DataFrame, split: str = "train") -> style.CaptionedFigure:
    """Draw a bubble per client and class; its area is in proportion to the number of examples.

    Many clients are sorted by the class that they hold most of, and then have no numbers.

    Args:
        source: a run, or its ``partition.csv`` as a frame: ``client``, ``split``, ``class_*``.
        split: ``train`` or ``test``.

    Returns:
        a figure as wide as one column, or two for more than 30 clients.

    Raises:
        UserError: a frame with other columns, or without this split.
    """
    frame = source.partition if isinstance(source, Run) else source
    classes = [name for name in frame.columns if name.startswith("class_")]
    if not classes or not {"client", "split"} <= set(frame.columns):
        raise UserError("a partition has the columns client, split and class_*; this frame has others")
    shown = frame[frame["split"] == split]
    if shown.empty:
        raise UserError(f"the partition has no split '{split}' (there are: {', '.join(sorted(set(frame['split'])))})")
    counts = shown[classes].to_numpy(dtype=int)
    clients = shown["client"].to_numpy(dtype=int)
    many = len(clients) >= _SORTED_FROM
    if many:
        order = np.lexsort((-counts.max(axis=1), counts.argmax(axis=1)))
        counts, clients = counts[order], clients[order]

    width = style.DOUBLE if many else style.SINGLE
    readable = _LABEL_POINTS if len(classes) <= 20 else 4.0
    cell = max(72 * (width - 0.6) / max(len(clients), 12), readable)
    height = float(np.clip(cell * len(classes) / 72, 1.0, 4.5)) + 0.75
    figure = style.new_figure(width, height)
    axes = figure.add_subplot()
    columns, rows = np.nonzero(counts)
    bubbles = axes.scatter(columns, rows, color=style.PALETTE[0], linewidths=0, zorder=2, clip_on=False)
    axes.set_xlim(-0.7, len(clients) - 0.3)
    axes.set_ylim(len(classes) - 0.3, -0.7)
    axes.set_ylabel("class")
    axes.tick_params(length=1.5)
    if many:
        axes.set_xlabel(f"{len(clients)} clients, sorted by their largest class")
        axes.set_xticks([])
    else:
        axes.set_xlabel("client")
        widest = max(len(str(client)) for client in clients)
        step = _step(len(clients), _LABEL_POINTS * (0.5 + 0.5 * widest), 72 * (width - 0.6))
        axes.set_xticks(range(0, len(clients), step), [str(client) for client in clients[::step]])
    step = _step(len(classes), _LABEL_POINTS, 72 * (height - 0.7))
    axes.set_yticks(range(0, len(classes), step), [name.removeprefix("class_") for name in classes[::step]])
    _size(figure, bubbles, counts)
    figure.caption = _caption(counts, split, many)
    return figure


def partition_of(runs: Sequence[Run]) -> style.CaptionedFigure:
    """Draw the partition of the first of some runs; its caption says which runs have another one.

    Raises:
        UserError: no runs.
    """
    if not runs:
        raise UserError("there are no runs to draw the partition of")
    first = runs[0]
    figure = partition(first)
    others = sorted({run.config.data_seed for run in runs if not run.partition.equals(first.partition)})
    figure.caption += f" Seed of the partition: {first.config.data_seed}."
    if others:
        figure.caption += f" Runs with another partition, not drawn here, have the seeds {', '.join(map(str, others))}."
    return figure


def _step(count: int, needed: float, room: float) -> int:
    """Return the smallest round step between labels that need so many points each."""
    return next(step for step in (1, 2, 5, 10, 20, 50, 100, count) if needed * count / step <= room or step >= count)


def _size(figure: style.CaptionedFigure, bubbles: PathCollection, counts: Integers) -> None:
    """Scale the bubbles as large as neighbours allow, and put a legend of sizes above."""
    axes = figure.axes[0]
    most = int(counts.max())
    shown = sorted({most, max(1, _round(most / 3)), max(1, _round(most / 20))})
    handles = [Line2D([], [], color=style.PALETTE[0], marker="o", linestyle="", markeredgewidth=0) for _ in shown]
    labels = [f"{number} examples" if number == most else str(number) for number in shown]
    legend = figure.legend(handles, labels, loc="outside upper center", ncols=len(shown))
    figure.draw_without_rendering()  # settles the layout, and with it how large a cell is
    diameter = _diameter(axes, counts)
    bubbles.set_sizes(np.maximum(counts[counts > 0] / most * diameter**2, _SMALLEST_AREA))
    for handle, number in zip(legend.legend_handles, shown, strict=True):
        assert isinstance(handle, Line2D)
        handle.set_markersize(max(diameter * np.sqrt(number / most), np.sqrt(_SMALLEST_AREA)))


def _diameter(axes: Axes, counts: Integers) -> float:
    """Return the diameter in points of the largest bubble: none touches those beside, above or below it."""
    box = axes.get_window_extent()
    to_points = 72 / axes.figure.dpi
    across = to_points * box.width / np.ptp(axes.get_xlim())
    down = to_points * box.height / np.ptp(axes.get_ylim())
    radii = np.sqrt(counts / counts.max())
    beside = np.max(radii[1:] + radii[:-1], initial=1.0)
    below = np.max(radii[:, 1:] + radii[:, :-1], initial=1.0)
    free = min(2 * across / beside, 2 * down / below, 1.5 * across, 1.5 * down)
    return float(np.clip(0.94 * free, 2.4, 14))


def _round(number: float) -> int:
    """Round to one significant digit."""
    return int(float(f"{number:.0e}"))


def _caption(counts: Integers, split: str, many: bool) -> str:
    examples, held = counts.sum(axis=1), (counts > 0).sum(axis=1)
    return (
        f"Examples per client and class, {split} split: {counts.sum()} examples, {len(counts)} clients, "
        f"{counts.shape[1]} classes. The area of a bubble is in proportion to the number of examples, of which a cell "
        f"has at most {counts.max()}; the smallest are enlarged so that they can be seen. "
        f"A client has {examples.min()} to {examples.max()} examples of {held.min()} to {held.max()} classes. "
        + ("Clients are sorted by the class that they hold most of. " if many else "")
        + "Counts are exact, so there are no error bands."
    )
