"""How accuracy is spread over the clients, and which of them would be better off alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from fedkd.metrics import Floats
from fedkd.results import Run
from plots import style
from plots.tables import Group, alone, describe, describe_seeds, groups


@style.styled()
def fairness(runs: Sequence[Run]) -> style.CaptionedFigure:
    """Draw the sorted accuracies of the clients, and their gain or loss against their local-only models.

    Both at the last evaluation of each run.  The second panel needs a run of ``local`` with the same seed and the same
    clients; without any it is the cumulative distribution of the clients' accuracies.  A curve is the mean over seeds
    of the sorted values, so a place on it is a rank, not a particular client.

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
        _sorted_curves(left, group, [100 * np.sort(_last(run)) for run in group.runs], number)
    left.set_xlabel("clients, worst to best (%)")
    left.set_ylabel("client accuracy (%)")
    left.set_xlim(0, 100)
    gains = {group.label: _gains(group, runs) for group in found if group.method != "local"}
    second = _gain_panel(right, found, gains) if any(gains.values()) else _distribution_panel(right, found)
    style.legend(figure, *left.get_legend_handles_labels())
    figure.caption = (
        f"Accuracy of the clients at the last evaluation; {describe(runs)}. Left: accuracies, sorted. {second} "
        f"Lines: mean over seeds ({describe_seeds({group.label: len(group.runs) for group in found})}). "
        "Bands: plus and minus one sample standard deviation over seeds; a line of one seed has none."
    )
    return figure


def _gain_panel(axes: Axes, found: Sequence[Group], gains: Mapping[str, Sequence[Floats]]) -> str:
    """Draw sorted gains ``[clients]`` over the local models, per label and seed; return the panel's caption."""
    axes.axhline(0, color=style.GREY, linewidth=0.8, zorder=1.5)
    for number, group in enumerate(found):
        _sorted_curves(axes, group, gains.get(group.label, ()), number)
    axes.set_xlabel("clients, largest loss to largest gain (%)")
    axes.set_ylabel("gain over the local model (points)")
    axes.set_xlim(0, 100)
    seeds = describe_seeds({label: len(values) for label, values in gains.items()})
    return (
        f"Right: accuracy minus that of the client's local-only model of the same seed, sorted ({seeds}); "
        "where a line reaches zero is about the share of clients that are worse off than alone."
    )


def _distribution_panel(axes: Axes, found: Sequence[Group]) -> str:
    """Draw the cumulative distributions, with a step at each accuracy of any seed; return the panel's caption."""
    for number, group in enumerate(found):
        curves = [np.sort(100 * _last(run)) for run in group.runs]
        places = np.unique(np.concatenate([[0.0], *curves, [100.0]]))
        shares = [100 * np.searchsorted(curve, places, side="right") / len(curve) for curve in curves]
        _band(axes, group, places, np.array(shares), number, step=True)
    axes.set_xlabel("client accuracy (%)")
    axes.set_ylabel("clients at or below (%)")
    return "Right: cumulative distribution of the clients' accuracies."


def _last(run: Run) -> Floats:
    """Return the accuracies ``[clients]`` at the last evaluation, in [0, 1]."""
    frame = run.evaluations
    return np.asarray(frame.loc[frame["round"] == frame["round"].max(), "accuracy"], dtype=float)


def _gains(group: Group, runs: Sequence[Run]) -> list[Floats]:
    """Return, per seed with a local run, the sorted gains ``[clients]`` over it, in points."""
    out = []
    for run in group.runs:
        other = alone(run, runs)
        if other is not None:
            mine, local = (
                frame[frame["round"] == frame["round"].max()].set_index("client")["accuracy"]
                for frame in (run.evaluations, other.evaluations)
            )
            out.append(np.sort((100 * (mine - local)).dropna().to_numpy(dtype=float)))
    return out


def _sorted_curves(axes: Axes, group: Group, curves: Sequence[Floats], number: int) -> None:
    """Draw the mean of sorted curves ``[clients]`` over seeds; curves of other lengths are brought to the shortest."""
    if not curves:
        return
    places = _places(min(len(curve) for curve in curves))
    _band(axes, group, places, np.array([np.interp(places, _places(len(c)), c) for c in curves]), number)


def _places(clients: int) -> Floats:
    return np.asarray(100 * (np.arange(clients) + 0.5) / clients, dtype=float)


def _band(axes: Axes, group: Group, x: Floats, values: Floats, number: int, step: bool = False) -> None:
    look = style.line(group.method, group.variant)
    mean = values.mean(axis=0)
    axes.plot(
        x,
        mean,
        label=group.label,
        markevery=style.sparse_markers(len(x), number),
        drawstyle="steps-post" if step else "default",
        **look,
    )
    if len(values) > 1:
        band = values.std(axis=0, ddof=1)
        axes.fill_between(
            x, mean - band, mean + band, color=look["color"], alpha=0.18, linewidth=0, step="post" if step else None
        )
