"""How accuracy is spread over the clients, and which of them would be better off alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from fedkd.metrics import Floats, decile
from fedkd.results import Run
from plots import clients, style
from plots.tables import Group, describe, describe_seeds, groups

_BANDS = "Bands: plus and minus one sample standard deviation over seeds; a line of one seed has none."
_BINS = np.linspace(0, 100, 11)


@style.styled()
def fairness(runs: Sequence[Run]) -> style.CaptionedFigure:
    """Draw the sorted accuracies of the clients, and their gain or loss against their local-only models.

    Both at the last evaluation of each run.  The second panel needs a run of ``local`` with the same seed and the same
    clients; without any it is the cumulative distribution of the clients' accuracies.  A curve is the mean over seeds
    of the sorted values, so a place on it is a rank, not a particular client (:func:`plots.heterogeneity.gain` has
    each client).

    Args:
        runs: runs of one or more methods and seeds.

    Returns:
        a figure across two columns.

    Raises:
        UserError: no runs, or a run without an evaluation.
    """
    found = groups(runs)
    figure = style.new_figure(style.DOUBLE, 2.4)
    left, right = figure.subplots(1, 2)
    for number, group in enumerate(found):
        _sorted_curves(figure, left, "sorted", group, [_sorted(run) for run in group.runs], number)
    left.set_xlabel("clients, worst to best (%)")
    left.set_ylabel("client accuracy (%)")
    left.set_xlim(0, 100)
    style.percent(left)
    gains = {group.label: _gains(group, runs) for group in found if group.method != "local"}
    if any(gains.values()):
        second = _gain_panel(figure, right, found, gains)
    else:
        second = "Right: " + _distribution_panel(figure, right, found)
    style.legend(figure, *left.get_legend_handles_labels())
    figure.caption = (
        f"Accuracy of the clients at the last evaluation; {describe(runs)}. Left: accuracies, sorted. {second} "
        f"Lines: mean over seeds ({_seeds(found)}). {_BANDS}"
    )
    return figure


@style.styled()
def distribution(runs: Sequence[Run]) -> style.CaptionedFigure:
    """Draw the cumulative distribution of the clients' accuracies at the last evaluation, a line per method.

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
    what = _distribution_panel(figure, axes, found)
    style.legend(figure, *axes.get_legend_handles_labels())
    figure.caption = (
        f"{what} At the last evaluation; {describe(runs)}. Lines: mean over seeds ({_seeds(found)}). {_BANDS}"
    )
    return figure


@style.styled()
def histogram(runs: Sequence[Run]) -> style.CaptionedFigure:
    """Draw a histogram of the clients' accuracies at the last evaluation, a panel per method.

    Args:
        runs: runs of one or more methods and seeds.

    Returns:
        a figure as wide as one column for one method, else two.

    Raises:
        UserError: no runs, or a run without an evaluation.
    """
    found = groups(runs)
    figure, panels = style.panels(len(found), 1.05)
    for axes, group in zip(panels, found, strict=True):
        last = [np.histogram(_sorted(run), _BINS)[0] for run in group.runs]
        shares = np.array([100 * counts / counts.sum() for counts in last])
        mean, several = shares.mean(axis=0), len(shares) > 1
        deviation = shares.std(axis=0, ddof=1) if several else np.full(len(mean), np.nan)
        middles = (_BINS[1:] + _BINS[:-1]) / 2
        axes.bar(middles, mean, width=9, color=style.colour(group.method), zorder=2)
        if several:
            axes.errorbar(middles, mean, deviation, fmt="none", ecolor=style.GREY, elinewidth=0.8, capsize=1.2)
        figure.note("histogram", group.label, x=middles, y=mean, deviation=deviation, seeds=len(shares))
        style.title(figure, axes, group.label)
        axes.set_xlim(0, 100)
        axes.set_xticks([0, 50, 100])
    panels[0].set_ylim(bottom=0)
    figure.supxlabel("client accuracy (%)", fontsize=7.5)
    figure.supylabel("share of the clients (%)", fontsize=7.5)
    figure.caption = (
        f"Share of the clients by accuracy at the last evaluation, in bins of ten points; {describe(runs)}. Bars: mean "
        f"over seeds ({_seeds(found)}). Whiskers: plus and minus one sample standard deviation over seeds; bars of one "
        "seed have none."
    )
    return figure


@style.styled()
def violin(runs: Sequence[Run]) -> style.CaptionedFigure:
    """Draw the density of the clients' accuracies, their mean, median and worst tenth, a row per method.

    At the last evaluation, the clients of all seeds together.

    Args:
        runs: runs of one or more methods and seeds.

    Returns:
        a figure as wide as one column.

    Raises:
        UserError: no runs, or a run without an evaluation.
    """
    found = groups(runs)
    labels = [style.broken(group.label) for group in found]
    lines = max(label.count("\n") for label in labels)
    figure = style.new_figure(style.SINGLE, (0.24 + 0.08 * lines) * len(found) + 0.6)
    axes = figure.add_subplot()
    for row, group in enumerate(found):
        values = np.concatenate([_sorted(run) for run in group.runs])
        look = style.colour(group.method)
        places, density = _density(values)
        axes.fill_between(places, row - 0.42 * density, row + 0.42 * density, color=look, alpha=0.45, linewidth=0)
        marks = {"mean": values.mean(), "median": np.median(values), "worst tenth": _worst(group)}
        axes.plot(marks["worst tenth"], row, "<", color="black", markersize=4, label="worst tenth", clip_on=False)
        axes.plot(marks["median"], row, "|", color="black", markersize=7, label="median", clip_on=False)
        axes.plot(marks["mean"], row, "o", color="white", markeredgecolor="black", label="mean", clip_on=False)
        figure.note("violin", group.label, statistic=list(marks), x=list(marks.values()), clients=len(values))
    axes.set_yticks(range(len(found)), labels)
    axes.set_ylim(len(found) - 0.45, -0.55)
    axes.set_xlim(0, 100)
    axes.set_xlabel("client accuracy (%)")
    axes.grid(axis="y", visible=False)
    handles, marks_shown = axes.get_legend_handles_labels()
    style.legend(figure, handles[:3], marks_shown[:3])
    figure.caption = (
        f"Accuracy of the clients at the last evaluation; {describe(runs)}. Shapes: density over the clients of all "
        f"seeds together ({_seeds(found)}), Gaussian kernel, cut at the lowest and the highest client, each as high "
        "as its own maximum. Circle: mean; line: median; triangle: mean of the worst tenth, averaged over seeds. The "
        "shapes are the spread over clients; there are no error bands."
    )
    return figure


def _sorted(run: Run) -> Floats:
    """Return the accuracies ``[clients]`` at the last evaluation, in percent, sorted."""
    return np.sort(clients.last(run).to_numpy(dtype=float))


def _worst(group: Group) -> float:
    return float(np.mean([decile(_sorted(run), worst=True) for run in group.runs]))


def _seeds(found: Sequence[Group]) -> str:
    return describe_seeds({group.label: len(group.runs) for group in found})


def _density(values: Floats) -> tuple[Floats, Floats]:
    """Return places from the lowest to the highest value and the kernel density there, its maximum being one.

    The width of the kernel is Silverman's, but at least one point, so that equal values have a shape as well.
    """
    quartiles = np.percentile(values, [25, 75])
    spread = min(values.std(), np.ptp(quartiles) / 1.34) or values.std()
    width = max(1.0, 0.9 * spread * len(values) ** -0.2)
    places = np.linspace(max(0, values.min() - 0.5), min(100, values.max() + 0.5), 200)
    density = np.exp(-0.5 * ((places[:, None] - values) / width) ** 2).sum(axis=1)
    return places, density / density.max()


def _gain_panel(
    figure: style.CaptionedFigure, axes: Axes, found: Sequence[Group], gains: Mapping[str, Sequence[Floats]]
) -> str:
    """Draw sorted gains ``[clients]`` over the local models, per label and seed; return the panel's caption."""
    axes.axhline(0, color=style.GREY, linewidth=0.8, zorder=1.5)
    for number, group in enumerate(found):
        _sorted_curves(figure, axes, "gain", group, gains.get(group.label, ()), number)
    axes.set_xlabel("clients, largest loss to largest gain (%)")
    axes.set_ylabel("gain over the local model (points)")
    axes.set_xlim(0, 100)
    seeds = describe_seeds({label: len(values) for label, values in gains.items()})
    return (
        f"Right: accuracy minus that of the client's local-only model of the same seed, sorted ({seeds}); "
        "where a line reaches zero is about the share of clients that are worse off than alone."
    )


def _distribution_panel(figure: style.CaptionedFigure, axes: Axes, found: Sequence[Group]) -> str:
    """Draw the cumulative distributions, with a step at each accuracy of any seed; return the panel's caption."""
    for number, group in enumerate(found):
        curves = [_sorted(run) for run in group.runs]
        places = np.unique(np.concatenate([[0.0], *curves, [100.0]]))
        shares = [100 * np.searchsorted(curve, places, side="right") / len(curve) for curve in curves]
        look = style.line(group.method, group.variant)
        style.band(figure, axes, "distribution", group.label, look, places, np.array(shares), number, step=True)
    axes.set_xlabel("client accuracy (%)")
    axes.set_ylabel("clients at or below (%)")
    style.percent(axes)
    return "Cumulative distribution of the clients' accuracies."


def _gains(group: Group, runs: Sequence[Run]) -> list[Floats]:
    """Return, per seed with a local run, the sorted gains ``[clients]`` over it, in points."""
    tables = [clients.table(run, runs) for run in group.runs]
    gains = [(table["accuracy"] - table["alone"]).dropna().to_numpy(dtype=float) for table in tables]
    return [np.sort(gain) for gain in gains if len(gain)]


def _sorted_curves(
    figure: style.CaptionedFigure, axes: Axes, panel: str, group: Group, curves: Sequence[Floats], number: int
) -> None:
    """Draw the mean of sorted curves ``[clients]`` over seeds; curves of other lengths are brought to the shortest."""
    if not curves:
        return
    places = _places(min(len(curve) for curve in curves))
    values = np.array([np.interp(places, _places(len(curve)), curve) for curve in curves])
    style.band(figure, axes, panel, group.label, style.line(group.method, group.variant), places, values, number)


def _places(count: int) -> Floats:
    return np.asarray(100 * (np.arange(count) + 0.5) / count, dtype=float)
