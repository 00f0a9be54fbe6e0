"""What differences rest on: pairs of runs with the same seed, intervals, corrected p-values, mean ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes
from scipy import stats

from fedkd.errors import UserError, nearest
from fedkd.metrics import Floats
from fedkd.results import Run
from plots import style
from plots.tables import (
    Group,
    describe,
    groups,
    over_seeds,
    p_value,
    paired_differences,
    repetition,
    same_clients,
    settings,
    varied,
)

CONTROLS = ("fedavg_ft", "local", "fedavg")
"""What a method is compared with, the most telling first."""

LEVEL = 0.05
"""Corrected p-values below it tell two methods apart."""


@dataclass(frozen=True)
class Claim:
    """What can be said of a method against a control.

    Args:
        label: the method's, as in :func:`plots.tables.comparison`.
        control: the control's.
        method: the method's name.
        variant: the number of its setting.
        differences: method minus control in points, by (run seed, partition seed): mean client accuracies at the last
            round that both evaluated, of the same clients.
        mean: of the differences.
        std: sample standard deviation of the differences; NaN for one seed.
        half: half the width of the 95 % interval of the mean by Student's t; NaN for one seed.
        p: two-sided, of the paired t-test; NaN for one seed and where all differences are equal.
        corrected: p after Holm's correction over all methods that are compared with the same control.
    """

    label: str
    control: str
    method: str
    variant: int
    differences: Mapping[tuple[int, int], float]
    mean: float
    std: float
    half: float
    p: float
    corrected: float = float("nan")

    @property
    def verdict(self) -> str:
        """What the seeds say, in words."""
        if len(self.differences) < 2:
            return "one seed: no test"
        if self.p != self.p:
            return "all differences equal: no test"
        if self.corrected >= LEVEL:
            return "not told apart"
        return "better" if self.mean > 0 else "worse"


def controls(runs: Sequence[Run]) -> list[str]:
    """Return the methods among the runs that serve as controls, the most telling first."""
    there = {run.config.run.method for run in runs}
    return [name for name in CONTROLS if name in there]


def claims(runs: Sequence[Run], control: str) -> list[Claim]:
    """Return what can be said of every method against a control, in order of first appearance.

    A method is paired with the setting of the control that is nearest to its own and has the same clients; methods
    without such a one, or without a seed in common with it, are left out.

    Args:
        runs: runs of methods and of the control.
        control: the name of a method.

    Raises:
        UserError: no run of the control, no runs, a run without an evaluation, or one that is there twice.
    """
    found = groups(runs)
    there = dict.fromkeys(group.method for group in found)
    if control not in there:
        raise UserError(
            f"no run of '{control}' to compare with{nearest(control, there)} (there are: {', '.join(there)})"
        )
    out = []
    for group in found:
        other = _nearest(group, [candidate for candidate in found if candidate.method == control])
        if other is None or group.method == control:
            continue
        differences = paired_differences(runs, group.label, other.label)
        values = np.array(list(differences.values()))
        mean, std = over_seeds(values)
        count = len(values)
        half = float(stats.t.ppf(0.975, count - 1) * std / np.sqrt(count)) if count > 1 else float("nan")
        p = p_value(values.tolist())
        out.append(Claim(group.label, other.label, group.method, group.variant, differences, mean, std, half, p))
    corrected = holm([claim.p for claim in out])
    return [replace(claim, corrected=value) for claim, value in zip(out, corrected, strict=True)]


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values after Holm's correction for their number; NaN stays NaN and does not count."""
    out, largest = [float("nan")] * len(values), 0.0
    known = sorted((value, place) for place, value in enumerate(values) if value == value)
    for rank, (value, place) in enumerate(known):
        largest = max(largest, min(1.0, value * (len(known) - rank)))
        out[place] = largest
    return out


@style.styled()
def differences(runs: Sequence[Run], control: str = "") -> style.CaptionedFigure:
    """Draw the paired differences of all methods from a control, with 95 % intervals, a row per method.

    Args:
        runs: runs of methods and of the control.
        control: a method; empty: the first of ``fedavg_ft``, ``local``, ``fedavg`` that there is.

    Returns:
        a figure as wide as one column.

    Raises:
        UserError: no control, nothing that can be paired with it, or a run without an evaluation.
    """
    if not control and not controls(runs):
        raise UserError(f"differences is drawn against a control ({', '.join(CONTROLS)}), and there is no run of any")
    control = control or controls(runs)[0]
    found = claims(runs, control)
    if not found:
        raise UserError(f"differences: no other method has a seed and the clients in common with '{control}'")
    labels = [style.broken(claim.label) for claim in found]
    lines = max(label.count("\n") for label in labels)
    figure = style.new_figure(style.SINGLE, (0.2 + 0.11 * lines) * len(found) + 0.75)
    axes = figure.add_subplot()
    axes.axvline(0, color=style.GREY, linewidth=0.8, zorder=1.5)
    reach = max(abs(value) for claim in found for value in claim.differences.values()) or 1.0
    for row, claim in enumerate(found):
        look, values = style.line(claim.method, claim.variant), list(claim.differences.values())
        axes.plot(values, [row] * len(values), "|", color=look["color"], markersize=5, alpha=0.6)
        if claim.half == claim.half:
            low, high = claim.mean - claim.half, claim.mean + claim.half
            axes.plot([low, high], [row, row], color=look["color"], linewidth=1.0)
            reach = max(reach, min(abs(claim.mean) + claim.half, 2.5 * reach))
        axes.plot(claim.mean, row, marker=look["marker"], color=look["color"], markersize=4)
        shown = "–" if claim.corrected != claim.corrected else f"{claim.corrected:.2g}"
        axes.annotate(
            shown, (1, row), xycoords=("axes fraction", "data"), xytext=(3, 0), textcoords="offset points", va="center"
        )
        figure.note(
            "differences",
            claim.label,
            control=claim.control,
            seed=[seed for seed, _ in claim.differences],
            x=values,
            mean=claim.mean,
            half=claim.half,
            p=claim.p,
            corrected=claim.corrected,
        )
    axes.annotate(
        "p", (1, -0.9), xycoords=("axes fraction", "data"), xytext=(3, 0), textcoords="offset points", va="center"
    )
    axes.set_yticks(range(len(found)), labels)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlim(-1.08 * reach, 1.08 * reach)
    axes.set_xlabel(f"accuracy minus that of {control} (points)")
    axes.grid(axis="y", visible=False)
    counts = ", ".join(f"{claim.label}: {len(claim.differences)}" for claim in found)
    figure.caption = (
        f"Mean client accuracy minus that of {control}, at the last round that both evaluated; {describe(runs)}. "
        f"Ticks: pairs of runs with the same seed and the same clients ({counts}). Symbols: their mean; whiskers: 95 % "
        "interval of the mean by Student's t (none for one seed; they may leave the axes). p: paired t-test, "
        f"two-sided, after Holm's correction for {len(found)} comparisons."
    )
    return figure


@style.styled()
def ranks(runs: Sequence[Run]) -> style.CaptionedFigure:
    """Draw the mean ranks of the methods and the critical difference of Nemenyi's test.

    A block is a seed on a setting of data, model and clients; a method (with its own settings and those of local
    training) has to be in all blocks to be ranked.

    Source: J. Demšar, Statistical Comparisons of Classifiers over Multiple Data Sets, JMLR 7, 2006.

    Args:
        runs: runs of at least three methods in at least two blocks.

    Returns:
        a figure as wide as one column.

    Raises:
        UserError: fewer methods or blocks, or a run without an evaluation.
    """
    groups(runs)  # refuses what cannot be compared
    names, scores, left_out = _blocks(runs)
    blocks, count = scores.shape
    if count < 3 or blocks < 2:
        raise UserError(
            f"ranks needs at least three methods that share at least two seeds or settings; here {count} share {blocks}"
        )
    ranked = stats.rankdata(-scores.round(6), axis=1)
    means = ranked.mean(axis=0)
    critical = float(stats.studentized_range.ppf(1 - LEVEL, count, np.inf) / np.sqrt(2))
    critical *= np.sqrt(count * (count + 1) / (6 * blocks))
    friedman = (
        float(stats.friedmanchisquare(*scores.T).pvalue) if np.ptp(ranked, axis=0).any() or np.ptp(means) else 1.0
    )
    shown = [style.broken(name) for name in names]
    lines = max(name.count("\n") for name in shown)
    width = style.SINGLE if max(map(len, shown)) <= 12 else style.DOUBLE
    figure = style.new_figure(width, 0.11 * (1 + lines) * (count + 1) + 0.75)
    axes = figure.add_subplot()
    _draw_ranks(axes, shown, means, critical, 0.7 * (1 + 0.7 * lines))
    for label, mean in zip(names, means, strict=True):
        figure.note("ranks", label, x=mean, critical=critical, blocks=blocks)
    figure.caption = (
        f"Mean ranks of the methods (1 is best) by mean client accuracy at the last evaluation, over {blocks} blocks "
        f"of equal seed and setting; {describe(runs)}. Bars join methods whose ranks differ by less than the critical "
        f"difference {critical:.2f} of Nemenyi's test at {LEVEL:g}; Friedman's test: p = {friedman:.2g}. "
        + (f"Not in all blocks, so left out: {', '.join(left_out)}. " if left_out else "")
        + "Seeds on one data set are no independent data sets: the test says how stable the order is on this one. "
        "There are no error bands."
    )
    return figure


def _nearest(group: Group, candidates: Sequence[Group]) -> Group | None:
    """Return the candidate with the same clients, and a seed in common, whose settings are nearest; None without."""
    mine = {repetition(run): run for run in group.runs}
    fitting = [
        candidate
        for candidate in candidates
        if (shared := [run for run in candidate.runs if repetition(run) in mine])
        and all(same_clients(run, mine[repetition(run)]) for run in shared)
    ]
    here = settings(group.runs[0])

    def distance(candidate: Group) -> int:
        there = settings(candidate.runs[0])
        return sum(here.get(key, value) != value for key, value in there.items() if key != "run.method")

    return min(fitting, key=distance, default=None)


def _blocks(runs: Sequence[Run]) -> tuple[list[str], Floats, list[str]]:
    """Return the labels of the methods in all blocks, their accuracies ``[blocks, methods]``, and who is left out."""
    table: dict[tuple[object, ...], dict[tuple[tuple[str, object], ...], float]] = {}
    keys = varied(runs).keys() | {"run.method"}
    for run in runs:
        told = [(key, value) for key, value in settings(run).items() if key in keys]
        own = tuple(item for item in told if _is_own(item[0], run))
        shared = tuple(item for item in told if not _is_own(item[0], run))
        table.setdefault((*repetition(run), *shared), {})[own] = 100 * float(run.summary()["last"])
    every = list(dict.fromkeys(method for scores in table.values() for method in scores))
    complete = [method for method in every if all(method in scores for scores in table.values())]
    labels = dict(zip(every, _told(every), strict=True))
    values = np.array([[scores[method] for method in complete] for scores in table.values()])
    return [labels[m] for m in complete], values, [labels[m] for m in every if m not in complete]


def _is_own(key: str, run: Run) -> bool:
    return key == "run.method" or key.startswith((f"{run.config.run.method}.", "train."))


def _told(methods: Sequence[tuple[tuple[str, object], ...]]) -> list[str]:
    """Return the names of methods, with the settings that tell those of one name apart."""
    flats = [dict(method) for method in methods]
    out = []
    for flat in flats:
        others = [other for other in flats if other["run.method"] == flat["run.method"]]
        told = [f"{key}={value}" for key, value in flat.items() if any(other[key] != value for other in others)]
        out.append(f"{flat['run.method']} ({', '.join(told)})" if told else str(flat["run.method"]))
    return out


def _draw_ranks(axes: Axes, names: Sequence[str], means: Floats, critical: float, row: float) -> None:
    """Draw an axis of ranks above, the methods below on both sides, and bars between those not told apart.

    ``row`` is the height of a method, on the vertical axis on which a bar is 0.3.
    """
    count, order = len(names), np.argsort(means, kind="stable")
    half = -(-count // 2)
    bars = _cliques(means[order], critical)
    first = 0.55 + 0.3 * len(bars)
    for number, (start, end) in enumerate(bars):
        y = 0.4 + 0.3 * number
        axes.plot([means[order[start]] - 0.04, means[order[end]] + 0.04], [y, y], color="black", linewidth=2.4)
    for place, index in enumerate(order):
        left = place < half
        y = first + row * (place if left else count - 1 - place) + 0.3
        edge = 0.7 if left else count + 0.3
        colour = style.colour(names[index].split()[0])
        axes.plot([means[index], means[index], edge], [0, y, y], color=colour, linewidth=0.9)
        rank = f"{means[index]:.1f}"
        text = f"{names[index]}  {rank}" if left else f"{rank}  {names[index]}"
        side = "right" if left else "left"
        offset = (-2, 0) if left else (2, 0)
        axes.annotate(text, (edge, y), offset, textcoords="offset points", ha=side, va="center", annotation_clip=False)
    axes.plot([1, 1 + min(critical, count - 1)], [-0.9, -0.9], color="black", linewidth=1.2, clip_on=False, marker="|")
    axes.annotate(
        f"critical difference {critical:.2f}",
        (1, -0.9),
        textcoords="offset points",
        xytext=(0, 4),
        annotation_clip=False,
    )
    axes.set_xlim(0.7, count + 0.3)
    axes.set_ylim(first + row * half, 0)
    axes.xaxis.tick_top()
    axes.set_xticks(np.unique(np.linspace(1, count, min(count, 6)).round()))
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.spines["top"].set_visible(True)


def _cliques(means: Floats, critical: float) -> list[tuple[int, int]]:
    """Return (first, last) of the longest stretches of sorted ranks that span less than the critical difference."""
    found: list[tuple[int, int]] = []
    for start in range(len(means)):
        end = int(np.searchsorted(means, means[start] + critical, side="left")) - 1
        if end > start and (not found or end > found[-1][1]):
            found.append((start, end))
    return found
