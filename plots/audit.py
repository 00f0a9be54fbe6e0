"""How well members are told from non-members, from what ``fedkd audit`` wrote: a table and ROC curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, NullFormatter

from fedkd.results import Row, spread
from plots import style
from plots.tables import describe_seeds, over_seeds

GRID = tuple(float(level) for level in np.round(np.logspace(-3, 0, 31), 6))
"""False positive rates at which ROC curves are kept."""
_FIGURES = {"auc": "AUC", "advantage": "advantage", "tpr_at_1": "TPR at 1 % FPR", "tpr_at_10": "TPR at 10 % FPR"}
_INITIAL = "initial model (control)"


def table(audits: Sequence[Row]) -> pd.DataFrame:
    """Return a row per label and model, text: mean ± deviation over seeds, for one seed its 95 % interval.

    The initial model is there once for each label whose members differ from those of the labels before it.

    Args:
        audits: what :func:`sims.audit.audit` returned.
    """
    rows = []
    for label, model, mine in _by_model(audits):
        row = {"model": _INITIAL if model == "initial" else f"{label}, {model}"}
        for name in ("members", "nonmembers"):
            row[name] = f"{np.mean([one[name] for one in mine]):.0f}"
        for name in ("train", "test"):
            row[f"{name} (%)"] = spread(*over_seeds([100 * one[f"{name}_accuracy"] for one in mine]), 1)
        row["AUC, modified entropy"] = _cell([one["entropy"]["auc"] for one in mine])
        for key, heading in _FIGURES.items():
            row[heading] = _cell([one["loss"][key] for one in mine])
        rows.append(row)
    first = ["model", "members", "nonmembers", "train (%)", "test (%)", "AUC"]
    frame = pd.DataFrame(rows)
    return frame[[*first, *(name for name in frame.columns if name not in first)]]


def _cell(figures: Sequence[Row]) -> str:
    if len(figures) > 1:
        return spread(*over_seeds([one["value"] for one in figures]), 3)
    low, high = figures[0].get("interval", (float("nan"), float("nan")))
    return f"{figures[0]['value']:.3f} [{low:.3f}, {high:.3f}]"


def _by_model(audits: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
    """Return label, model and that model's figures of every seed, the controls last and each of them once."""
    found: dict[tuple[str, str], list[Row]] = {}
    for one in audits:
        for model, figures in one["models"].items():
            found.setdefault((one["label"], model), []).append(figures)
    controls: list[tuple[str, str, list[Row]]] = []
    for (label, model), mine in found.items():
        if model == "initial" and mine not in [other for _, _, other in controls]:
            controls.append((label, model, mine))
    return [(*key, mine) for key, mine in found.items() if key[1] != "initial"] + controls


@style.styled()
def roc(audits: Sequence[Row]) -> style.CaptionedFigure:
    """Draw the ROC curve of the loss on two logarithmic axes, a panel for global and one for personal models.

    Args:
        audits: what :func:`sims.audit.audit` returned.
    """
    found = _by_model(audits)
    methods = {one["label"]: one["method"] for one in audits}
    kinds = [kind for kind in ("global", "personal") if any(model == kind for _, model, _ in found)]
    figure, panels = style.panels(len(kinds), 2.6 if len(kinds) == 1 else 1.6)
    counts = {label: len(mine) for label, _, mine in found}
    handles: dict[str, Any] = {}
    order = list(methods)
    variants = {label: [o for o in order if methods[o] == methods[label]].index(label) for label in order}
    for axes, kind in zip(panels, kinds, strict=True):
        axes.plot(GRID, GRID, color=style.GREY, linewidth=0.8, linestyle=":", label="guessing")
        for label, model, mine in found:
            if model == kind:
                values = np.array([one["roc"] for one in mine])
                look = style.line(methods[label], variants[label])
                style.band(figure, axes, kind, label, look, np.array(GRID), values, order.index(label))
        axes.loglog()
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlim(GRID[0], 1)
        axes.set_ylim(GRID[0], 1)
        axes.set_xlabel("false positive rate")
        if len(kinds) > 1:
            style.title(figure, axes, f"{kind} model")
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    panels[0].set_ylabel("true positive rate")
    style.legend(figure, list(handles.values()), list(handles))
    figure.caption = (
        "How many of the clients' training images a threshold on the loss finds (true positive rate), at how many of "
        "their other images taken for training images (false positive rate), matched per client and class. "
        f"Lines: mean over seeds ({describe_seeds(counts)}). Bands: plus and minus one sample standard deviation over "
        "seeds; a line of one seed has none. Dotted: guessing."
    )
    return figure
