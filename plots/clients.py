"""A row per client: what it holds, and how it fares at the last evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from fedkd.results import Run
from plots.tables import alone


def last(run: Run) -> pd.Series[float]:
    """Return the accuracies at the last evaluation, in percent, by client."""
    frame = run.evaluations
    final = frame[frame["round"] == frame["round"].max()].sort_values("client")
    return pd.Series(100 * final["accuracy"].to_numpy(dtype=float), index=pd.Index(final["client"], name="client"))


def holdings(run: Run) -> pd.DataFrame:
    """Return what each client trains on, by client.

    Columns: ``examples``; ``classes``, how many it has any of; ``entropy`` of its labels divided by the logarithm of
    the number of classes: 0 for one class alone, 1 for all alike.
    """
    frame = run.partition[run.partition["split"] == "train"].set_index("client").sort_index()
    counts = frame[[name for name in frame.columns if name.startswith("class_")]].to_numpy(dtype=float)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    logs = np.log(shares, where=shares > 0, out=np.zeros_like(shares))
    spread = -(shares * logs).sum(axis=1) / np.log(max(counts.shape[1], 2))
    return pd.DataFrame(
        {"examples": counts.sum(axis=1).astype(int), "classes": (counts > 0).sum(axis=1), "entropy": np.abs(spread)},
        index=frame.index,
    )


def table(run: Run, runs: Sequence[Run]) -> pd.DataFrame:
    """Return :func:`holdings` of the scored clients with ``accuracy`` and ``alone`` (%), by client.

    ``alone`` is the accuracy of the client's local-only model: of the run of ``local`` among ``runs`` with the same
    seed and the same clients; NaN without one.
    """
    found = last(run)
    other = alone(run, runs)
    frame = holdings(run).reindex(found.index).assign(accuracy=found)
    return frame.assign(alone=float("nan") if other is None else last(other).reindex(found.index))
