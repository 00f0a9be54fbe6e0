"""``methods``: where the seconds of a round go, method by method, evaluation of all clients included."""

from __future__ import annotations

import json
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bench.common import WARM_UP, Bench, Table, Work
from bench.flower import run_app
from fedkd.config import Config, Scalar
from fedkd.method import names
from fedkd.results import Run

WORK = Work("mnist", "fedgen_cnn", clients=20, cohort=10, images=200, batch=20)
ROUNDS = 7
PARTS = ("broadcast", "client compute", "packing, state", "server compute", "evaluation", "polling, other")
Row = dict[str, Any]


def methods(bench: Bench) -> list[Table]:
    """Run every method once, all in one Flower run, and split the seconds of its rounds; medians over the rounds."""
    times = bench.folder()
    root = bench.data(WORK)
    with patch.dict(os.environ, {"FEDKD_BENCH_TIMES": str(times)}):
        configs = [_config(name, root, bench.folder()) for name in names()]
        series = json.dumps([config.flat() for config in configs])
        last = Path(configs[-1].run.dir) / "summary.json"
        run_app(Path(__file__).with_name("timed.py"), {"series": series}, bench.nodes, last)
    lines = [json.loads(line) for file in times.glob("*.jsonl") for line in file.read_text().splitlines()]
    figures = {
        config.run.method: split(Run.open(config.run.dir).rows("rounds"), _of(lines, config.run.dir))
        for config in configs
    }
    rows = [
        [name, f"{sum(parts.values()):.3f}", *(f"{parts[p]:.3f}" for p in PARTS)] for name, parts in figures.items()
    ]
    title = f"{WORK}, all {WORK.clients} scored in every round, {bench.nodes} nodes; seconds of a round"
    return [Table(title, ["method", "round", *PARTS], rows, figures)]


def _config(name: str, root: Path, folder: Path) -> Config:
    norm = "batch" if name == "fedbn" else "group"  # feddf's server cannot run models whose statistics stay away
    keys: dict[str, Scalar] = {"run__method": name, "run__rounds": ROUNDS, "run__eval_every": 1, "model__norm": norm}
    return WORK.config(root, folder, **keys)


def _of(lines: Iterable[Row], run: str) -> list[Row]:
    return [line for line in lines if line["run"] == run]


def split(rounds: Iterable[Row], lines: Iterable[Row]) -> dict[str, float]:
    """Return the median seconds of each part of a round, after the warm-up.

    What several nodes do at once counts once, as the slowest of them spent it.

    Args:
        rounds: the run's ``rounds.jsonl``.
        lines: what the stopwatches wrote down in it.
    """
    slowest: dict[int, Row] = {}
    servers: dict[int, Row] = {}
    for line in lines:
        if line["role"] == "server":
            servers[line["round"]] = line
        elif line["total"] > slowest.get(line["round"], {"total": 0.0})["total"]:
            slowest[line["round"]] = line
    found: dict[str, list[float]] = defaultdict(list)
    for row in rounds:
        if row["round"] <= WARM_UP:
            continue
        node, server = slowest[row["round"]], servers[row["round"]]
        parts = {
            "broadcast": server["order"] + node["decode"],
            "client compute": node["compute"],
            "packing, state": node["total"] - node["decode"] - node["compute"] + server["arrived"],
            "server compute": row["seconds_server"],
            "evaluation": row["seconds_evaluate"],
        }
        parts["polling, other"] = row["seconds"] - sum(parts.values())
        for part, seconds in parts.items():
            found[part].append(seconds)
    return {part: statistics.median(found[part]) for part in PARTS}
