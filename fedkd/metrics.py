"""Figures of a run: accuracy in both weightings, fairness between clients, bytes and seconds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import pandas as pd

    from fedkd.results import Run

Floats = npt.NDArray[np.float64]


TARGETS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Mean client accuracies whose cost every summary states."""


def decile(accuracies: Floats, worst: bool) -> float:
    """Return the mean of the worst (or best) tenth of the clients; a tenth is rounded up to whole clients."""
    count = math.ceil(len(accuracies) / 10)
    ordered = np.sort(accuracies)
    return float((ordered[:count] if worst else ordered[-count:]).mean())


def jain(values: Floats) -> float:
    """Return Jain's fairness index ``(sum x)^2 / (n sum x^2)``, from 1/n to 1 (all equal); NaN if all are zero."""
    square = float((values**2).sum())
    return float(values.sum() ** 2 / (len(values) * square)) if square else float("nan")


def gini(values: Floats) -> float:
    """Return the Gini coefficient ``sum_ij |x_i - x_j| / (2 n^2 mean)``, 0 (all equal) to 1; NaN if all are zero."""
    ordered, n = np.sort(values), len(values)
    total = float(ordered.sum())
    ranks = np.arange(1, n + 1)
    return float(((2 * ranks - n - 1) * ordered).sum() / (n * total)) if total else float("nan")


def entropy(values: Floats) -> float:
    """Return the entropy of ``x / sum x`` divided by ``log n``, 1 when all are equal; NaN if it is not defined."""
    total = float(values.sum())
    if not total or len(values) < 2:
        return float("nan")
    p = values[values > 0] / total
    return float(-(p * np.log(p)).sum() / np.log(len(values)))


def fairness(accuracies: Floats) -> dict[str, float]:
    """Return every fairness figure of per-client accuracies in [0, 1]."""
    return {
        "mean": float(accuracies.mean()),
        "deviation": float(accuracies.std()),
        "min": float(accuracies.min()),
        "worst_decile": decile(accuracies, worst=True),
        "best_decile": decile(accuracies, worst=False),
        "jain": jain(accuracies),
        "gini": gini(accuracies),
        "entropy": entropy(accuracies),
    }


def by_round(evaluations: pd.DataFrame, column: str = "accuracy") -> pd.DataFrame:
    """Return, per evaluated round, ``mean`` (clients equal), ``weighted`` (by test examples) and ``worst_decile``."""
    import pandas as pd

    rows = {}
    for number, group in evaluations.groupby("round"):
        values = group[column].to_numpy(dtype=float)
        weights = group["total"].to_numpy(dtype=float)
        rows[number] = {
            "mean": values.mean(),
            "weighted": float((values * weights).sum() / weights.sum()),
            "worst_decile": decile(values, worst=True),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("round")


def rounds_to(curve: pd.Series[float], target: float) -> int | None:
    """Return the first round whose value reaches a target, or None."""
    reached = curve[curve >= target]
    return None if reached.empty else int(reached.index.to_numpy()[0])


def hurt(evaluations: pd.DataFrame, local: pd.DataFrame) -> int:
    """Return how many clients are worse off than with their local-only model, each at its last evaluation."""
    last = [
        frame[frame["round"] == frame["round"].max()].set_index("client")["accuracy"] for frame in (evaluations, local)
    ]
    mine, alone = last[0].align(last[1], join="inner")
    return int((mine < alone).sum())


def costs(curve: pd.Series[float], clients: pd.DataFrame, targets: Iterable[float]) -> dict[str, Any]:
    """Return, per target, the round at which a curve first reaches it and the bytes sent until then, both ways.

    Args:
        curve: accuracy in [0, 1] by evaluated round.
        clients: the log of that name.
        targets: accuracies in [0, 1].

    Returns:
        ``{"round", "bytes"}`` by target as text, in ascending order; None for one that is never reached.
    """
    found: dict[str, Any] = {}
    for target in sorted(set(targets)):
        first = rounds_to(curve, target)
        sent = clients[clients["round"] <= first] if first is not None else None
        found[f"{target:g}"] = (
            None if sent is None else {"round": first, "bytes": int((sent["bytes_down"] + sent["bytes_up"]).sum())}
        )
    return found


def summarize(run: Run, targets: Sequence[float] = ()) -> dict[str, Any]:
    """Return the figures of a run as plain numbers; accuracies in [0, 1].

    Args:
        run: a run, finished or not.
        targets: accuracies beside :data:`TARGETS` whose cost is wanted.
    """
    clients, rounds = run.frame("clients"), run.frame("rounds")
    out: dict[str, Any] = {
        "method": run.config.run.method,
        "seed": run.config.run.seed,
        "digest": run.digest(),
        "rounds": len(rounds),
        "bytes_down": int(clients["bytes_down"].sum()) if len(clients) else 0,
        "bytes_up": int(clients["bytes_up"].sum()) if len(clients) else 0,
        "seconds": float(rounds["seconds"].sum()) if len(rounds) else 0.0,
    }
    if "dropped" in rounds:
        gone = [each for row in rounds["dropped"].dropna() for each in row]
        out["dropped"] = {
            "rounds": int(rounds["dropped"].notna().sum()),
            "clients": sorted({client for each in gone for client in each["clients"]}),
        }
    if "epsilon" in rounds:
        asked = run.config.privacy
        out["privacy"] = {"epsilon": float(rounds["epsilon"].iloc[-1]), "delta": asked.delta, "noise": asked.noise}
    evaluations = run.evaluations
    if evaluations.empty:
        return out
    curves = by_round(evaluations)
    numbers = curves.index.to_numpy()
    last, best = int(numbers[-1]), int(numbers[curves["mean"].to_numpy().argmax()])
    final = evaluations[evaluations["round"] == last]
    out |= {
        "last_round": last,
        "last": float(curves["mean"].iloc[-1]),
        "last_weighted": float(curves["weighted"].iloc[-1]),
        "best_round": best,
        "best": float(curves["mean"].max()),
        "best_weighted": float(curves["weighted"].max()),
        "last_global": float(final["global"].mean()),
        "fairness": fairness(final["accuracy"].to_numpy(dtype=float)),
        "reached": costs(curves["mean"], clients, (*TARGETS, *targets)),
    }
    return out
