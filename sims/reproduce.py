"""Published tables again: rows of settings, seeds, and the published value beside ours.

An experiment is ``sims/<paper>/experiment.toml``: settings that all rows share, and for each row a method, what
differs, and the published value if there is one.  Finished runs are used, not run again.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkd.config import Config, Scalar
from fedkd.errors import UserError, nearest
from fedkd.results import Run, spread

if TYPE_CHECKING:
    import pandas as pd

HOME = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    name: str
    label: str
    method: str
    settings: Mapping[str, Scalar]
    published: str


@dataclass(frozen=True)
class Experiment:
    """A published table as settings.

    Args:
        name: folder under ``sims``.
        title: what it is.
        metric: column of :func:`fedkd.metrics.by_round`.
        best_rounds: how many best rounds of each seed are averaged, as the paper does.
        settings: keys that all rows share.
        rows: the rows.
    """

    name: str
    title: str
    metric: str
    best_rounds: int
    settings: Mapping[str, Scalar]
    rows: Sequence[Row]

    @classmethod
    def read(cls, name: str) -> Experiment:
        """Read ``sims/<name>/experiment.toml``.

        Raises:
            UserError: no such experiment.
        """
        if name not in experiments():
            raise UserError(
                f"unknown experiment '{name}'{nearest(name, experiments())} (known: {', '.join(experiments())})"
            )
        raw: dict[str, Any] = tomllib.loads((HOME / name / "experiment.toml").read_text(encoding="utf-8"))
        rows = [
            Row(key, row["label"], row["method"], row.get("settings", {}), row.get("published", ""))
            for key, row in raw["rows"].items()
        ]
        return cls(name, raw["title"], raw["metric"], raw["best-rounds"], raw["settings"], rows)


def experiments() -> tuple[str, ...]:
    """Return the names of the experiments there are."""
    return tuple(sorted(path.parent.name for path in HOME.glob("*/experiment.toml")))


def reproduce(
    experiment: Experiment, overrides: Mapping[str, Scalar], seeds: Sequence[int], out: Path, jobs: int
) -> dict[str, list[Run]]:
    """Run what is missing of an experiment and return every row's runs.

    Args:
        experiment: what to make again.
        overrides: settings that replace the experiment's (``data.root``, or fewer rounds for a trial).
        seeds: one run per row and seed.
        out: folder of the runs.
        jobs: runs at a time.
    """
    from sims.launch import launch_all, place_series, prepare

    folders: dict[str, list[str]] = {}
    waiting: list[Config] = []
    for seed in seeds:
        for row in experiment.rows:
            flat = {**experiment.settings, **row.settings, **overrides, "run.method": row.method, "run.seed": seed}
            config, finished = place_series(prepare(flat), out / f"{row.name}-s{seed}")
            folders.setdefault(row.name, []).append(config.run.dir)
            if not finished:
                waiting.append(config)
    if waiting:
        launch_all(waiting, "inline", None, jobs)
    return {name: [Run.open(folder) for folder in mine] for name, mine in folders.items()}


def table(experiment: Experiment, runs: Mapping[str, Sequence[Run]]) -> pd.DataFrame:
    """Return the table as text: label, published, best rounds, last round, best single round, seeds."""
    import numpy as np
    import pandas as pd

    from fedkd.metrics import by_round

    lines = []
    for row in experiment.rows:
        curves = [100 * by_round(run.evaluations)[experiment.metric].to_numpy() for run in runs[row.name]]
        best = np.concatenate([np.sort(curve)[-experiment.best_rounds :] for curve in curves])
        last = np.array([curve[-1] for curve in curves])
        tail = np.array([curve[-10:].mean() for curve in curves])
        lines.append(
            {
                "row": row.label,
                "published": row.published or "-",
                f"best {experiment.best_rounds} rounds": spread(float(best.mean()), float(best.std())),
                "last round": spread(float(last.mean()), _deviation(last)),
                "last 10 rounds": spread(float(tail.mean()), _deviation(tail)),
                "seeds": len(curves),
            }
        )
    return pd.DataFrame(lines)


def _deviation(values: Any) -> float:
    """Sample deviation over seeds; NaN for one seed."""
    return float(values.std(ddof=1)) if len(values) > 1 else float("nan")
