"""One look for all figures: widths of the usual venues, embedded fonts, and a colour that stays with its method."""

from __future__ import annotations

import textwrap
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath

from fedkd.errors import UserError
from fedkd.method import names

SINGLE, DOUBLE = 3.25, 6.75
"""Widths in inches of a figure in one column and across two."""

# Okabe and Ito's colours with their grey; their yellow is left out because a yellow line is illegible on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#999999")
GREY = "#666666"
CONTROLS = ("local", "fedavg_ft")

# Nine markers over eight colours: the pair repeats only after 72 methods.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_LINES: tuple[Any, ...] = ("-", "-.", ":", (0, (3, 1, 1, 1, 1, 1)))
_CONTROL_LINES: tuple[Any, ...] = ((0, (4, 1.5)), (0, (1.5, 1)), (0, (8, 2)), (0, (6, 1, 3, 1)))

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
    """A figure with the text that says what is drawn and what its error bands are."""

    caption: str = ""


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
    return PALETTE[_number(method) % len(PALETTE)]


def line(method: str, variant: int = 0) -> dict[str, Any]:
    """Return colour, line style and marker of a method; controls are dashed.

    Args:
        method: its name.
        variant: 0, or the number of another setting of the same method in the same figure: the colour stays.
    """
    number = _number(method)
    lines = _CONTROL_LINES if method in CONTROLS else _LINES
    return {
        "color": colour(method),
        "linestyle": lines[(number // len(PALETTE) + variant) % len(lines)],
        "marker": _MARKERS[(number + 4 * variant) % len(_MARKERS)],
    }


def _number(method: str) -> int:
    """Return the place of a method among the registered ones; a stable number for any other name."""
    known = names()
    return known.index(method) if method in known else zlib.crc32(method.encode()) % 72


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
    """Write a figure as PNG (200 dpi) and PDF, and its caption as text; the same data gives the same bytes.

    Args:
        figure: what one of the functions of this package returned.
        stem: the path without a suffix; its folder is made if need be.

    Returns:
        the three files.

    Raises:
        UserError: the files cannot be written.
    """
    png, pdf, text = (stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "pdf", "txt"))
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        with styled():
            figure.savefig(png, dpi=200, metadata={"Software": None})
            figure.savefig(pdf, metadata={"Creator": None, "Producer": None, "CreationDate": None})
        text.write_text(textwrap.fill(figure.caption, 100) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"the figure cannot be written to {stem.parent}: {error.strerror}") from error
    return [png, pdf, text]
