"""One look for all figures: widths of the usual venues, embedded fonts, and a colour that stays with its method."""

from __future__ import annotations

import textwrap
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fedkd.errors import UserError
from fedkd.metrics import Floats

SINGLE, DOUBLE = 3.25, 6.75
"""Widths in inches of a figure in one column and across two."""

# Okabe and Ito's colours with their grey; their yellow is left out because a yellow line is illegible on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#999999")
GREY = "#666666"
CONTROLS = ("local", "fedavg_ft")

# A row per line style and a column per colour; of a column no two rows have the same marker either, since some figures
# have no lines and others no markers.  A method keeps its place for good: new ones take a free place ("") or none.  The
# first two rows are what is compared most, in eight colours.
_PLACES = (
    ("fedgen", "fedftg", "fedd2s", "apfl", "fedavg", "pgfed", "", ""),
    ("", "", "", "", "", "", "fedavg_ft", "local"),
    ("fedprox", "scaffold", "feddf", "ditto", "moon", "feddyn", "feddistill", "fedensemble"),
    ("fedper", "fedrep", "fedbabu", "fedrod", "lg_fedavg", "", "pfedme", "fedfomo"),
    ("fedbn", "fedproto", "per_fedavg", "", "", "", "", ""),
)
_LINES: tuple[Any, ...] = ("-", (0, (4, 1.5)), "-.", (0, (1.2, 1)), (0, (6, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_OTHER_MARKERS = ("*", "p", "h", "d", "8")  # of methods without a place, so that they differ from all that have one

_LEGEND_SIZE = 7.0
_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so it is the same on every machine
    "font.size": 7.5,
    "axes.labelsize": 7.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.5,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.2,
    "legend.fontsize": _LEGEND_SIZE,
    "legend.title_fontsize": _LEGEND_SIZE,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "legend.handletextpad": 0.6,
    "legend.columnspacing": 1.0,
    "legend.borderpad": 0.0,
    "legend.borderaxespad": 0.5,
    "text.parse_math": False,
    "pdf.fonttype": 42,
    "savefig.bbox": None,
}


class CaptionedFigure(Figure):
    """A figure with the text that says what is drawn and what its error bands are, and with the numbers drawn."""

    caption: str = ""

    def note(self, panel: str, series: str, **columns: Any) -> None:
        """Keep numbers that are drawn, for the table beside the figure: arrays of one length, or one value for all."""
        noted: list[pd.DataFrame] = self.__dict__.setdefault("_noted", [])
        count = max(np.size(column) for column in columns.values())
        noted.append(pd.DataFrame({"panel": [panel] * count, "series": series, **columns}))

    @property
    def numbers(self) -> pd.DataFrame:
        """The numbers drawn: ``panel``, ``series`` and what :meth:`note` was given; empty where none were."""
        noted: list[pd.DataFrame] = self.__dict__.get("_noted", [])
        return pd.concat(noted, ignore_index=True) if noted else pd.DataFrame()


@contextmanager
def styled() -> Iterator[None]:
    """Draw in the project's style whatever the user's matplotlibrc says; also a decorator."""
    with matplotlib.style.context(["default", _STYLE]):
        yield


def new_figure(width: float, height: float) -> CaptionedFigure:
    """Return an empty figure, in inches, that is no part of pyplot's global state."""
    figure = CaptionedFigure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def colour(method: str) -> str:
    """Return the colour of a method, the same in every figure."""
    return PALETTE[_place(method)[1]]


def line(method: str, variant: int = 0) -> dict[str, Any]:
    """Return colour, line style and marker of a method; controls are dashed.

    Args:
        method: its name.
        variant: 0, or the number of another setting of the same method in the same figure: the colour stays.
    """
    row, column, known = _place(method)
    markers = _MARKERS if known else _OTHER_MARKERS
    return {
        "color": PALETTE[column],
        "linestyle": _LINES[(row + variant) % len(_LINES)],
        "marker": markers[(column + 3 * row + row // 3 + 4 * variant) % len(markers)],
    }


def _place(method: str) -> tuple[int, int, bool]:
    """Return row and column of a method's look, and whether it has a place of its own or one made from its name."""
    for row, places in enumerate(_PLACES):
        if method in places:
            return row, places.index(method), True
    number = zlib.crc32(method.encode()) % (len(_PLACES) * len(PALETTE))
    return number // len(PALETTE), number % len(PALETTE), False


def class_colour(number: int) -> str:
    """Return the colour of a class, by its number; more classes than colours share some."""
    return PALETTE[number % len(PALETTE)]


def band(
    figure: CaptionedFigure,
    axes: Axes,
    panel: str,
    label: str,
    look: dict[str, Any],
    x: Floats,
    values: Floats,
    number: int,
    step: bool = False,
) -> None:
    """Draw the mean over seeds, with a band of one sample standard deviation if there are several, and note both.

    Args:
        figure: where the numbers are noted.
        axes: where to draw.
        panel: name of the axes in the noted numbers.
        label: name of the line.
        look: what :func:`line` returned.
        x: ``[points]``.
        values: ``[seeds, points]``.
        number: of the line in the figure, which places its markers.
        step: a value holds from its point to the next.
    """
    mean, several = values.mean(axis=0), len(values) > 1
    deviation = values.std(axis=0, ddof=1) if several else np.full(len(mean), np.nan)
    marks = sparse_markers(len(x), number)
    axes.plot(x, mean, label=label, markevery=marks, drawstyle="steps-post" if step else "default", **look)
    if several:
        low, high = mean - deviation, mean + deviation
        shade = {"color": look["color"], "alpha": 0.18, "linewidth": 0}
        axes.fill_between(x, low, high, step="post" if step else None, **shade)
    figure.note(panel, label, x=x, y=mean, deviation=deviation, seeds=len(values))


def percent(axes: Axes) -> None:
    """Keep the vertical axis of an accuracy inside 0 to 100 %, where a band may leave it."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -3.0), min(high, 103.0))


def logarithmic(axes: Axes) -> None:
    """Make the horizontal axis logarithmic, with plain numbers at its ticks."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def panels(count: int, height: float) -> tuple[CaptionedFigure, list[Axes]]:
    """Return a figure of equal panels with shared axes: one is a column wide, more go across two columns.

    Args:
        count: how many.
        height: of one of four beside each other, in inches; from thirteen panels on there are six, and they are lower.

    Returns:
        the figure and its panels in reading order; those without another below have tick labels.
    """
    most = 4 if count <= 12 else 6
    columns = min(count, most)
    rows = -(-count // columns)
    figure = new_figure(SINGLE if count == 1 else DOUBLE, height * 4 / most * rows + 0.35)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    every = list(grid.flat)
    for axes in every[count:]:
        axes.remove()
    for axes in every[max(0, count - columns) : count]:
        axes.tick_params(labelbottom=True)
    return figure, every[:count]


def title(figure: Figure, axes: Axes, text: str) -> None:
    """Put a small title over one of several :func:`panels`, its lines broken where they would be too long."""
    spec = axes.get_subplotspec()
    room = figure.get_figwidth() / (spec.get_gridspec().ncols if spec else 1) - 0.3
    letters = max(8, int(72 * room / (0.6 * _LEGEND_SIZE)))
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, letters, break_long_words=False)]
    axes.set_title("\n".join(lines), fontsize=_LEGEND_SIZE, pad=3)


def direct_labels(
    figure: CaptionedFigure, axes: Axes, points: Floats, labels: Sequence[str], colours: Sequence[str], size: float
) -> None:
    """Write a label at each point, or beside it with a line where labels would overlap.

    Args:
        figure: the figure; nothing that moves its axes may come after.
        axes: where to write.
        points: in data coordinates, ``[labels, 2]``.
        labels: what to write.
        colours: of the labels.
        size: of the letters, in points.
    """
    figure.draw_without_rendering()  # settles the layout
    scale = figure.dpi / 72
    home = np.asarray(axes.transData.transform(points))
    boxes = [TextPath((0, 0), label, size=size).get_extents() for label in labels]
    sizes = scale * np.array([(box.width + 3, size + 1) for box in boxes])
    frame = axes.get_window_extent()
    low, high = np.array([frame.x0, frame.y0]) + sizes / 2, np.array([frame.x1, frame.y1]) - sizes / 2
    places = home.copy()
    order = np.sign(np.subtract.outer(np.arange(len(labels)), np.arange(len(labels))))
    for _ in range(500):
        apart = places[:, None] - places[None]
        overlap = (sizes[:, None] + sizes[None]) / 2 - np.abs(apart)  # along x and y
        touching = (overlap > 0).all(axis=2) & (order != 0)
        if not touching.any():
            break
        along = overlap.argmin(axis=2)[..., None] == np.arange(2)
        towards = np.where(apart == 0, order[..., None], np.sign(apart))
        places += 0.5 * (overlap * towards * along * touching[..., None]).sum(axis=1)
        places = np.clip(places, low, high)
    for label, text_colour, at, place in zip(labels, colours, points, (places - home) / scale, strict=True):
        moved = np.abs(place).max() > size
        axes.annotate(
            label,
            at,
            place,
            textcoords="offset points",
            ha="center",
            va="center_baseline",
            fontsize=size,
            fontweight="bold",
            color=text_colour,
            bbox={"boxstyle": "square,pad=0.05", "facecolor": "white", "alpha": 0.7, "linewidth": 0},
            arrowprops={"arrowstyle": "-", "color": text_colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0}
            if moved
            else None,
        )


def broken(label: str, letters: int = 24) -> str:
    """Return a label that stands beside a row, its lines broken where they would be too long."""
    return "\n".join(textwrap.wrap(label, letters, break_long_words=False))


def sparse_markers(points: int, line_number: int) -> tuple[int, int]:
    """Return (first, step) of the markers of a line: at most about ten, not at the same places as the other lines'."""
    step = max(1, points // 8)
    return (line_number * max(1, step // 3)) % step, step


def legend(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """Put a legend above the axes, in as many columns as fit, and make the figure higher by its rows."""
    ems = _STYLE["legend.handlelength"] + _STYLE["legend.handletextpad"] + _STYLE["legend.columnspacing"]
    widest = max(TextPath((0, 0), label, size=_LEGEND_SIZE).get_extents().width for label in labels)
    fitting = max(1, int(72 * figure.get_figwidth() // (widest + ems * _LEGEND_SIZE)))
    rows = -(-len(labels) // fitting)
    figure.legend(handles, labels, loc="outside upper center", ncols=-(-len(labels) // rows))
    figure.set_figheight(figure.get_figheight() + rows * 1.5 * _LEGEND_SIZE / 72)


def save(figure: CaptionedFigure, stem: Path) -> list[Path]:
    """Write a figure as PNG (200 dpi) and PDF, its caption as text and its numbers as CSV: same data, same bytes.

    Args:
        figure: what one of the functions of this package returned.
        stem: the path without a suffix; its folder is made if need be.

    Returns:
        PNG, PDF, caption and, if the figure has noted its numbers, CSV.

    Raises:
        UserError: the files cannot be written.
    """
    png, pdf, text, table = (stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "pdf", "txt", "csv"))
    numbers = figure.numbers
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        with styled():
            figure.savefig(png, dpi=200, metadata={"Software": None})
            figure.savefig(pdf, metadata={"Creator": None, "Producer": None, "CreationDate": None})
        text.write_text(textwrap.fill(figure.caption, 100) + "\n", encoding="utf-8")
        if not numbers.empty:
            numbers.to_csv(table, index=False, float_format="%.6g")
    except OSError as error:
        raise UserError(f"the figure cannot be written to {stem.parent}: {error.strerror}") from error
    return [png, pdf, text, *([] if numbers.empty else [table])]
