"""What is particular to one method: APFL's alpha, PGFed's alpha matrix, FedD2S's drop schedule."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.colors import CenteredNorm
from matplotlib.ticker import MaxNLocator

from fedkd.errors import UserError
from fedkd.metrics import by_round
from fedkd.results import Run
from fedkd.samples import final_state
from plots import clients, style
from plots.tables import Group, describe, describe_seeds, groups

_SORTED_FROM = 31
"""From this number of clients on they are sorted by class, and have no numbers."""


@style.styled()
def apfl_alpha(runs: Sequence[Run]) -> style.CaptionedFigure:
    """Draw APFL's mixing weights: of each client over the rounds, and at the end against its labels' entropy.

    Args:
        runs: among others, runs of ``apfl`` with trained weights.

    Returns:
        a figure across two columns.

    Raises:
        UserError: no such run.
    """
    mine = [run for run in of_method(runs, "apfl", "apfl-alpha") if run.config.flat()["apfl.adaptive"]]
    if not mine:
        raise UserError(
            "apfl-alpha is drawn from runs that train alpha, and apfl.adaptive is false in all; run with "
            "--set apfl.adaptive=true"
        )
    found = groups(mine)
    figure = style.new_figure(style.DOUBLE, 2.3)
    left, right = figure.subplots(1, 2, sharey=True)
    for number, group in enumerate(found):
        look = style.line(group.method, group.variant)
        paths = [_alphas(run) for run in group.runs]
        if len(found) == 1:
            left.plot(paths[0].index, paths[0], color=look["color"], linewidth=0.5, alpha=0.5)
            for client, alphas in paths[0].items():
                figure.note("clients", group.label, client=client, x=alphas.index, y=alphas.array)
        rounds = min(len(path) for path in paths)
        means = np.array([path.mean(axis=1).to_numpy()[:rounds] for path in paths])
        x = np.arange(1, rounds + 1, dtype=float)
        style.band(figure, left, "mean", group.label, look, x, means, number)
        for run, path in zip(group.runs, paths, strict=True):
            entropy = clients.holdings(run)["entropy"].reindex(path.columns)
            last = path.iloc[-1]
            points = {**look, "linestyle": "", "alpha": 0.7}
            right.plot(entropy, last, label=group.label, clip_on=False, markeredgewidth=0, **points)
            figure.note(
                "last", group.label, client=path.columns, x=entropy.array, y=last.array, seed=run.config.run.seed
            )
    left.set_xlabel("communication round")
    left.set_ylabel("alpha: weight of the own model")
    left.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    right.set_xlabel("entropy of the client's labels (1: all alike)")
    right.set_xlim(-0.03, 1.03)
    style.legend(figure, *left.get_legend_handles_labels())
    thin = f"thin lines: each client of seed {found[0].runs[0].config.run.seed}; " if len(found) == 1 else ""
    figure.caption = (
        f"APFL's mixing weight; {describe(mine)}. Left: {thin}thick lines: mean over clients, then over seeds "
        f"({_seeds(found)}); a client has apfl.alpha until it first takes part, and keeps its weight between its "
        "participations. Right: at the end, a point per client and seed. "
        "Bands: plus and minus one sample standard deviation over seeds; a line of one seed has none."
    )
    return figure


@style.styled()
def pgfed_alpha(runs: Sequence[Run]) -> style.CaptionedFigure:
    """Draw the matrix of PGFed's weights at the end of a run: how much client i minds the risk of client j.

    Args:
        runs: among others, finished runs of ``pgfed``; the first is drawn.

    Returns:
        a figure as wide as one column.

    Raises:
        UserError: no such run.
    """
    run = finished_run(runs, "pgfed", "pgfed-alpha")
    state = final_state(run)
    if "alpha" not in state:
        raise UserError(f"pgfed-alpha: {run.folder / 'final.safetensors'} has no 'alpha'")
    alpha = state["alpha"].numpy()
    count, start = len(alpha), 1 / run.config.run.cohort
    order, many = np.arange(count), count >= _SORTED_FROM
    if many:
        frame = run.partition[run.partition["split"] == "train"].sort_values("client")
        counts = frame[[name for name in frame.columns if name.startswith("class_")]].to_numpy()
        order = np.lexsort((-counts.max(axis=1), counts.argmax(axis=1)))
    figure = style.new_figure(style.SINGLE, 2.75)
    axes = figure.add_subplot()
    reach = float(np.abs(alpha - start).max()) or 1e-6
    # Rectangles, not an image: sharp in a PDF at any size.
    image = axes.pcolormesh(
        alpha[np.ix_(order, order)], cmap="PuOr_r", norm=CenteredNorm(start, reach), rasterized=many
    )
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.grid(visible=False)
    if many:
        axes.set_xlabel(f"client j ({count}, by their largest class)")
        axes.set_ylabel("client i")
        axes.set_xticks([])
        axes.set_yticks([])
    else:
        step = 1 if count <= 12 else 5
        ticks = np.arange(0, count, step)
        axes.set_xticks(ticks + 0.5, [str(tick) for tick in ticks])
        axes.set_yticks(ticks + 0.5, [str(tick) for tick in ticks])
        axes.set_xlabel("client j, whose risk")
        axes.set_ylabel("client i, whose objective")
    bar = figure.colorbar(image, ax=axes, shrink=0.85, pad=0.03)
    bar.set_label("alpha, white: as at the start")
    bar.ax.set_ylim(max(0.0, start - reach), start + reach)
    bar.ax.ticklabel_format(useOffset=False)
    bar.locator = MaxNLocator(nbins=5)
    bar.outline.set_linewidth(0.6)
    i, j = (index.ravel() for index in np.indices(alpha.shape))
    figure.note("alpha", "pgfed", client=i, other=j, value=alpha.ravel())
    moved = int((np.abs(alpha - start) > 1e-7).sum())
    figure.caption = (
        f"PGFed's weights alpha_ij at the end, pgfed seed {run.config.run.seed}; {describe([run])}. Row: the client "
        f"whose objective it is; column: the client whose risk is weighed. All start at {start:.3g}; {moved} of "
        f"{alpha.size} have moved, to {alpha.min():.3g} at least and {alpha.max():.3g} at most. "
        + ("Clients are sorted by the class that they hold most of. " if many else "")
        + "Values of one run, so there are no error bands."
    )
    return figure


@style.styled()
def fedd2s_drops(runs: Sequence[Run]) -> style.CaptionedFigure:
    """Draw FedD2S's accuracy and, below, the deepest stage that takes part, over the rounds.

    Args:
        runs: among others, runs of ``fedd2s``.

    Returns:
        a figure as wide as one column.

    Raises:
        UserError: no such run.
    """
    mine = of_method(runs, "fedd2s", "fedd2s-drops")
    found = groups(mine)
    figure = style.new_figure(style.SINGLE, 2.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    deepest = 1
    for number, group in enumerate(found):
        look = style.line(group.method, group.variant)
        curves = [100 * by_round(run.evaluations)["mean"] for run in group.runs]
        common = curves[0].index
        for curve in curves[1:]:
            common = common.intersection(curve.index)
        values = np.array([curve.loc[common].to_numpy() for curve in curves])
        style.band(figure, above, "accuracy", group.label, look, common.to_numpy(dtype=float), values, number)
        rounds = group.runs[0].frame("rounds")
        depth = (rounds["depth_sum"] / rounds["depth_weight"]).to_numpy(dtype=float)
        deepest = max(deepest, int(depth.max()))
        steps = {**look, "marker": "", "drawstyle": "steps-mid"}
        below.plot(rounds["round"], depth, **steps)
        figure.note("depth", group.label, x=rounds["round"].array, y=depth)
        if len(found) == 1:
            for drop in rounds["round"][1:][np.diff(depth) != 0]:
                above.axvline(drop - 0.5, color=style.GREY, linewidth=0.8, linestyle=":", zorder=1.5)
    above.set_ylabel("mean client accuracy (%)")
    style.percent(above)
    below.set_ylabel("deepest stage")
    below.set_yticks(range(1, deepest + 1))
    below.set_ylim(0.6, deepest + 0.4)
    below.set_xlabel("communication round")
    below.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    style.legend(figure, *above.get_legend_handles_labels())
    figure.caption = (
        f"FedD2S; {describe(mine)}. Above: accuracy of the clients, weighted equally, mean over seeds "
        f"({_seeds(found)}); bands: plus and minus one sample standard deviation over seeds; a line of one seed has "
        f"none. Below: the deepest stage of model.name that takes part in the federation (1 is the first"
        f"{', dotted lines: drops' if len(found) == 1 else ''})."
    )
    return figure


def of_method(runs: Sequence[Run], method: str, figure: str) -> list[Run]:
    """Return the runs of one method.

    Raises:
        UserError: there are none.
    """
    mine = [run for run in runs if run.config.run.method == method]
    if not mine:
        others = ", ".join(sorted({run.config.run.method for run in runs}))
        raise UserError(f"{figure} is drawn from runs of '{method}'; there are runs of: {others or 'nothing'}")
    return mine


def finished_run(runs: Sequence[Run], method: str, figure: str) -> Run:
    """Return the first finished run of a method.

    Raises:
        UserError: there is none.
    """
    mine = of_method(runs, method, figure)
    for run in mine:
        if run.finished:
            return run
    raise UserError(f"{figure} is drawn from the state at the end of a run, and {mine[0].folder} has not finished")


def _alphas(run: Run) -> pd.DataFrame:
    """Return the weights after each round: a row per round from 1, a column per client that has taken part."""
    rows = run.frame("clients")
    rows["alpha"] = rows["alpha_sum"] / rows["alpha_weight"]
    table = rows.pivot(index="round", columns="client", values="alpha")
    return table.reindex(range(1, int(rows["round"].max()) + 1)).ffill().fillna(float(run.config.flat()["apfl.alpha"]))


def _seeds(found: Sequence[Group]) -> str:
    return describe_seeds({group.label: len(group.runs) for group in found})
