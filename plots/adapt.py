"""Newcomers' accuracy by epochs of adaptation, from the rows that ``fedkd adapt`` wrote."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from fedkd.errors import UserError
from fedkd.metrics import Floats, fairness
from fedkd.results import spread
from plots import style
from plots.tables import describe_seeds, over_seeds


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a row per label and epoch, in order of first appearance; accuracies in percent.

    Columns: ``label``, ``method``, ``epoch``, ``seeds``, ``clients`` (with test images, the mean number over seeds);
    means over seeds of ``mean`` (clients equal), ``deviation`` over clients, ``worst_decile`` and ``loss`` per test
    example; and ``mean_std``, the sample standard deviation of ``mean`` over seeds (NaN for one).

    Raises:
        UserError: no newcomer has test images.
    """
    rows = rows[rows["total"] > 0]
    if rows.empty:
        raise UserError("none of the newcomers has test images")
    found = []
    for (label, method, epoch), of_epoch in rows.groupby(["label", "method", "epoch"], sort=False):
        seeds = [_figures(of_seed) for _, of_seed in of_epoch.groupby(["seed", "partition_seed"])]
        over = {name: over_seeds([figures[name] for figures in seeds]) for name in seeds[0]}
        row: dict[str, Any] = {"label": label, "method": method, "epoch": epoch, "seeds": len(seeds)}
        found.append(row | {name: mean for name, (mean, _) in over.items()} | {"mean_std": over["mean"][1]})
    return pd.DataFrame(found)


def _figures(rows: pd.DataFrame) -> dict[str, float]:
    """Return the figures of one epoch and seed."""
    over_clients = fairness(100 * (rows["correct"] / rows["total"]).to_numpy(dtype=float))
    return {
        "clients": float(len(rows)),
        **{name: over_clients[name] for name in ("mean", "deviation", "worst_decile")},
        "loss": float(rows["loss_sum"].sum() / rows["total"].sum()),
    }


def by_epoch(summed: pd.DataFrame) -> pd.DataFrame:
    """Return a line per epoch and a column per label of text ``mean ± deviation over clients / worst tenth``.

    The last line has the best mean and its epoch.

    Args:
        summed: what :func:`summary` returned.
    """
    epochs = [str(epoch) for epoch in summed["epoch"].unique()]
    columns: dict[str, list[str]] = {"epoch": [*epochs, "best"]}
    for label, mine in summed.groupby("label", sort=False):
        lines = mine.to_dict("records")
        cells = [f"{spread(line['mean'], line['deviation'], 1)} / {line['worst_decile']:.1f}" for line in lines]
        best = max(lines, key=lambda line: line["mean"])
        columns[str(label)] = [*cells, f"{best['mean']:.1f} (epoch {best['epoch']})"]
    return pd.DataFrame(columns)


@style.styled()
def adaptation(rows: pd.DataFrame) -> style.CaptionedFigure:
    """Draw a line per label: the newcomers' mean accuracy, mean over seeds with a band of one deviation over them.

    Args:
        rows: a row per label, seed, client and epoch.

    Returns:
        a figure as wide as one column.

    Raises:
        UserError: no newcomer has test images.
    """
    figure = style.new_figure(style.SINGLE, 2.25)
    axes = figure.add_subplot()
    counts: dict[str, int] = {}
    for number, (label, look, epochs, values) in enumerate(_curves(rows)):
        style.band(figure, axes, "epoch", label, look, epochs, values, number)
        counts[label] = len(values)
    style.percent(axes)
    axes.set_xlabel("local epochs on the newcomer's own data")
    axes.set_ylabel("mean newcomer accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    style.legend(figure, *axes.get_legend_handles_labels())
    clients = rows[rows["total"] > 0]["client"].nunique()
    figure.caption = (
        f"Accuracy of {clients} clients that were held out of training, weighted equally, after epochs of adaptation; "
        "epoch 0 is what they are given, local starts from the initial model. "
        f"Lines: mean over seeds ({describe_seeds(counts)}). Bands: plus and minus one sample standard deviation over "
        "seeds; a line of one seed has none."
    )
    return figure


def _curves(rows: pd.DataFrame) -> Iterator[tuple[str, dict[str, Any], Floats, Floats]]:
    """Yield label, look, epochs ``[epochs]`` and mean accuracies in percent ``[seeds, epochs]``."""
    summary(rows)  # says what is wrong with the rows
    rows = rows[rows["total"] > 0].assign(accuracy=lambda r: 100 * r["correct"] / r["total"])
    variants: dict[str, int] = {}
    for (label, method), mine in rows.groupby(["label", "method"], sort=False):
        table = mine.pivot_table("accuracy", ["seed", "partition_seed"], "epoch", aggfunc="mean")
        look = style.line(str(method), variants.get(str(method), 0))
        variants[str(method)] = variants.get(str(method), 0) + 1
        yield str(label), look, table.columns.to_numpy(dtype=float), np.asarray(table, dtype=float)
