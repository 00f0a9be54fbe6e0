"""Methods side by side, as numbers: the table over seeds, and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from fedkd.errors import UserError, nearest
from fedkd.metrics import Floats, by_round, hurt
from fedkd.results import Run, spread

# What may differ between two runs of one setting.  Seeds make repetitions; the others do not change a round.
NOT_SETTINGS = {"run.seed", "data.seed", "run.dir", "run.device", "run.rounds", "run.eval-every", "data.root"}


@dataclass(frozen=True)
class Group:
    """The runs of one method in one setting, a run per seed.

    Args:
        label: that of the runs, or the method's name, with the settings that tell it from the method's other groups.
        method: the method's name.
        variant: which of the method's groups it is, from 0.
        runs: the runs, in the order in which they were given.
    """

    label: str
    method: str
    variant: int
    runs: tuple[Run, ...]


def groups(runs: Sequence[Run]) -> list[Group]:
    """Sort runs into groups, in order of first appearance.

    Raises:
        UserError: no runs, a run without an evaluation, or one that is there twice.
    """
    if not runs:
        raise UserError("there are no runs to compare")
    settings: dict[str, list[tuple[dict[str, Any], list[Run]]]] = {}
    order: list[tuple[str, int]] = []
    for run in runs:
        if run.evaluations.empty:
            raise UserError(
                f"{run.folder} holds no evaluation (the run stopped before its first); leave it out or run it again"
            )
        method = run.config.run.method
        mine = {key: value for key, value in run.config.flat().items() if key not in NOT_SETTINGS}
        known = settings.setdefault(method, [])
        for other, members in known:
            if other == mine:
                members.append(run)
                break
        else:
            order.append((method, len(known)))
            known.append((mine, [run]))
    found = []
    for method, variant in order:
        mine, members = settings[method][variant]
        _check_repetitions(method, members)
        others = [other for other, _ in settings[method]]
        told = [f"{key}={value}" for key, value in mine.items() if any(other[key] != value for other in others)]
        label = members[0].label or (f"{method} ({', '.join(told)})" if told else method)
        found.append(Group(label, method, variant, tuple(members)))
    return found


def _check_repetitions(method: str, runs: Sequence[Run]) -> None:
    seen: dict[tuple[int, int], Run] = {}
    for run in runs:
        other = seen.setdefault(repetition(run), run)
        if other is not run:
            raise UserError(
                f"{other.folder} and {run.folder} are both {method} with run.seed = {run.config.run.seed}; give one"
            )


def settings(run: Run) -> dict[str, Any]:
    """Return the settings that tell runs apart which are no repetitions of each other, by key."""
    return {key: value for key, value in run.config.flat().items() if key not in NOT_SETTINGS}


def varied(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return the settings that have several values among runs of one method, with their values, numbers in order.

    ``run.method`` is one of them if there are several methods; what merely comes with a method is not.
    """
    found: dict[str, list[Any]] = {}
    flats = [settings(run) for run in runs]
    for key in dict.fromkeys(key for flat in flats for key in flat):
        here = [flat for flat in flats if key in flat]
        values = list(dict.fromkeys(flat[key] for flat in here))
        pairs = {(flat["run.method"], flat[key]) for flat in here}
        if len(values) > 1 and (key == "run.method" or len(pairs) > len({method for method, _ in pairs})):
            found[key] = values if isinstance(values[0], str) else sorted(values)
    return found


def repetition(run: Run) -> tuple[int, int]:
    """Return what tells repetitions apart and pairs them across methods: the run's seed and the partition's."""
    return run.config.run.seed, run.config.data_seed


def alone(run: Run, runs: Sequence[Run]) -> Run | None:
    """Return the run of ``local`` with the same seed and the same clients, or None.

    Of several, the one whose settings are nearest.
    """
    mine = run.config.flat()
    matching = [
        other
        for other in runs
        if other.config.run.method == "local" and repetition(other) == repetition(run) and same_clients(other, run)
    ]
    return min(
        matching,
        key=lambda other: sum(mine.get(key, value) != value for key, value in other.config.flat().items()),
        default=None,
    )


def same_clients(one: Run, other: Run) -> bool:
    """Return whether two runs have the same data set and the same number of examples per client and class."""
    return one.config.data.name == other.config.data.name and one.partition.equals(other.partition)


def over_seeds(values: Sequence[float] | Floats) -> tuple[float, float]:
    """Return the mean and the sample standard deviation (NaN for one value)."""
    array = np.asarray(values, dtype=float)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else float("nan")


def comparison(runs: Sequence[Run]) -> pd.DataFrame:
    """Return a row per method (and setting, where a method has several), in order of first appearance.

    Columns, accuracies in percent, means over seeds, ``*_std`` sample standard deviations over seeds (NaN for one):

    - ``method``, ``seeds``;
    - ``last``, ``last_std``, ``best``, ``best_std``: mean client accuracy at the last and at the best evaluation;
    - ``global_last``: the global model's, at the last evaluation (NaN without one);
    - ``worst_decile``, ``worst_decile_std``, ``deviation``: of the clients' accuracies at the last evaluation: the
      mean of the worst tenth, and the standard deviation over clients in points;
    - ``hurt``: number of clients worse than their local-only model (NaN without runs of ``local`` to compare with);
    - ``megabytes``: 10^6 bytes, up and down, all clients and rounds; ``seconds``: wall clock, evaluations included;
    - ``rounds``: the last evaluated round (the fewest over seeds), because ``last`` is only comparable at equal ones.

    Raises:
        UserError: no runs, a run without an evaluation, or one that is there twice.
    """
    return pd.DataFrame([_row(group, runs) for group in groups(runs)])


def summaries(runs: Sequence[Run], targets: Sequence[float] = ()) -> list[dict[str, Any]]:
    """Return the summary of each run, with the number of clients worse than alone where there is a run of ``local``.

    Args:
        runs: runs of any methods and seeds.
        targets: accuracies in [0, 1] beside :data:`fedkd.metrics.TARGETS`.
    """
    found = []
    for run in runs:
        control = alone(run, runs)
        summary: dict[str, Any] = {"run": str(run.folder), **run.summary(targets)}
        if control is not None:
            summary |= {"control": str(control.folder), "hurt": hurt(run.evaluations, control.evaluations)}
        found.append(summary)
    return found


def _row(group: Group, runs: Sequence[Run]) -> dict[str, Any]:
    summaries = [run.summary() for run in group.runs]
    row: dict[str, Any] = {"method": group.label, "seeds": len(group.runs)}
    for name in ("last", "best"):
        row[name], row[f"{name}_std"] = over_seeds([100 * summary[name] for summary in summaries])
    row["global_last"], _ = over_seeds([100 * summary["last_global"] for summary in summaries])
    worst = [100 * summary["fairness"]["worst_decile"] for summary in summaries]
    row["worst_decile"], row["worst_decile_std"] = over_seeds(worst)
    row["deviation"], _ = over_seeds([100 * summary["fairness"]["deviation"] for summary in summaries])
    pairs = [(run, alone(run, runs)) for run in group.runs]
    counts = [hurt(run.evaluations, other.evaluations) for run, other in pairs if other is not None]
    row["hurt"] = over_seeds(counts)[0] if counts else float("nan")
    row["megabytes"], _ = over_seeds([(summary["bytes_up"] + summary["bytes_down"]) / 1e6 for summary in summaries])
    row["seconds"], _ = over_seeds([summary["seconds"] for summary in summaries])
    row["rounds"] = min(summary["last_round"] for summary in summaries)
    return row


_HEADINGS = {
    "method": "method",
    "seeds": "seeds",
    "last": "last round (%)",
    "best": "best round (%)",
    "global_last": "global model (%)",
    "worst_decile": "worst decile (%)",
    "deviation": "deviation over clients (points)",
    "hurt": "clients hurt",
    "megabytes": "MB",
    "seconds": "seconds",
    "rounds": "rounds",
}
_DIGITS = {"hurt": 1, "seconds": 1}


def markdown(frame: pd.DataFrame) -> str:
    """Write :func:`comparison`'s frame (or some of its columns) as a Markdown table, ``mean ± deviation`` in one cell.

    NaN is written as a dash.
    """
    heading, *rows = cells(frame)
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *rows]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def cells(frame: pd.DataFrame) -> list[list[str]]:
    """Return the text of :func:`comparison`'s frame (or some of its columns): the headings, then a line per row."""
    columns = [str(name) for name in frame.columns if not str(name).endswith("_std")]
    lines = [[_HEADINGS.get(name, name) for name in columns]]
    for _, row in frame.iterrows():
        lines.append([_cell(name, row[name], row.get(f"{name}_std", float("nan"))) for name in columns])
    return lines


def _cell(name: str, value: Any, deviation: float) -> str:
    if isinstance(value, str):
        return value
    if value != value:
        return "–"
    if name in ("seeds", "rounds"):
        return str(value)
    return spread(value, deviation, _DIGITS.get(name, 2))


@dataclass(frozen=True)
class Difference:
    """Accuracy of one method minus another's, over the seeds that both have.

    Args:
        mean: mean difference, in percentage points.
        std: sample standard deviation of the differences, in points; NaN for one seed.
        n: number of seeds.
        p: two-sided p-value of the paired t-test; NaN for one seed, without scipy, and where all differences are equal.
    """

    mean: float
    std: float
    n: int
    p: float


def paired(runs: Sequence[Run], a: str, b: str) -> Difference:
    """Return the paired difference ``a - b`` of the mean client accuracy.

    Each pair is two runs with the same seed and the same clients, both at the last round that both evaluated.

    Args:
        runs: runs of both, and of others.
        a: a label as in the ``method`` column of :func:`comparison`.
        b: another.

    Raises:
        UserError: no such label, no seed that both have, or a pair whose clients differ.
    """
    differences = list(paired_differences(runs, a, b).values())
    mean, std = over_seeds(differences)
    return Difference(mean, std, len(differences), p_value(differences))


def paired_differences(runs: Sequence[Run], a: str, b: str) -> dict[tuple[int, int], float]:
    """Return the differences of :func:`paired` in points, by :func:`repetition`; its arguments and errors."""
    by_label = {group.label: {repetition(run): run for run in group.runs} for group in groups(runs)}
    for label in (a, b):
        if label not in by_label:
            raise UserError(f"no run of '{label}'{nearest(label, by_label)} (there are: {', '.join(by_label)})")
    differences = {
        seed: _difference(run, by_label[b][seed], a, b) for seed, run in by_label[a].items() if seed in by_label[b]
    }
    if not differences:
        raise UserError(f"'{a}' and '{b}' have no seed in common, so they cannot be paired")
    return differences


def _difference(one: Run, other: Run, a: str, b: str) -> float:
    if not same_clients(one, other):
        raise UserError(f"'{a}' and '{b}' have other clients at run.seed = {one.config.run.seed}: {other.folder}")
    curves = [by_round(run.evaluations)["mean"] for run in (one, other)]
    common = curves[0].index.intersection(curves[1].index)
    if common.empty:
        raise UserError(f"{one.folder} and {other.folder} evaluated no round in common")
    return float(100 * (curves[0][common.max()] - curves[1][common.max()]))


def p_value(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of the paired t-test; NaN for one difference, and where all are equal."""
    from scipy import stats  # here, not above: a tenth of a second that only a comparison over seeds needs

    if len(differences) < 2 or np.ptp(differences) < 1e-9:
        return float("nan")
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def describe(runs: Sequence[Run]) -> str:
    """Return what the runs are about: data set, partition and clients, each setting once."""
    seen: dict[str, None] = {}
    for run in runs:
        data, section = run.config.data, run.config.run
        alpha, classes = f" (alpha {data.alpha:g})", f" ({data.classes_per_client} classes each)"
        skew = {"dirichlet": alpha, "fedgen": alpha, "pathological": classes}.get(data.partition, "")
        seen[f"{data.name}, {data.partition}{skew}, {section.clients} clients, {section.cohort} per round"] = None
    return "; ".join(seen)


def describe_seeds(counts: Mapping[str, int]) -> str:
    """Return how many seeds each label has."""
    if len(set(counts.values())) > 1:
        return ", ".join(f"{label}: {count}" for label, count in counts.items())
    count = next(iter(counts.values()))
    return "one seed each" if count == 1 else f"{count} seeds each"
