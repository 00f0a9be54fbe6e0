"""``python -m bench.hostile``: one hostile client of 20 under each rule of ``[aggregation]``, and the price of privacy.

The hostile client is client 0, in this process: nothing of the project lets a client be hostile.  Accuracies are those
of the global model on the test data of the other 19 clients after the last round.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from clients import fedavg
from fedkd.config import Config, Scalar
from fedkd.data import Shard
from fedkd.device import single_thread
from fedkd.methods.fedavg import Broadcast, Update
from fedkd.results import Run, spread
from sims import inline

SEEDS = (1, 2, 3)
COMMON: dict[str, Scalar] = {
    "run.method": "fedavg",
    "run.rounds": 20,
    "run.clients": 20,
    "run.clients-per-round": 0,
    "run.eval-every": 20,
    "run.device": "cpu",
    "train.lr": 0.05,
    "train.local-steps": 10,
}
PARTITIONS: dict[str, dict[str, Scalar]] = {"iid": {"data.partition": "iid"}, "skewed": {"data.alpha": 0.1}}
RULES: dict[str, dict[str, Scalar]] = {
    "mean": {},
    "mean, clip-norm 0.5": {"aggregation.clip-norm": 0.5},
    "median": {"aggregation.rule": "median"},
    "trimmed-mean, trim 0.1": {"aggregation.rule": "trimmed-mean", "aggregation.trim": 0.1},
    "krum, byzantine 1": {"aggregation.rule": "krum"},
    "multi-krum, byzantine 1": {"aggregation.rule": "multi-krum"},
}
PRIVATE: dict[str, Scalar] = {
    "run.rounds": 10,
    "run.clients": 100,
    "data.partition": "iid",
    "train.lr": 0.2,
    "model.hidden": 16,
    "fedavg.weighting": "uniform",
    "privacy.clip-norm": 1.0,
}
"""Many clients and few parameters, which is what the noise asks for."""
MULTIPLIERS = (0.0, 2.0, 4.0, 8.0, 16.0)
ATTACKS = ("nobody", "large", "sign-flipped", "label-flipped")


def hostile(attack: str, broadcast: Broadcast, update: Update) -> Update:
    """Return what the hostile client sends in place of its update.

    large: 10 from a standard normal on every parameter; sign-flipped: its own change, reversed and ten times as long.
    """
    if attack == "large":
        noise = torch.randn(update.parameters.shape, generator=torch.Generator().manual_seed(0))
        return dataclasses.replace(update, parameters=broadcast.parameters + 10 * noise)
    if attack == "sign-flipped":
        change = update.parameters.cpu() - broadcast.parameters
        return dataclasses.replace(update, parameters=broadcast.parameters - 10 * change)
    return update


@contextmanager
def under(attack: str) -> Iterator[None]:
    """Make client 0 hostile; label-flipped: it learns 9 - y in place of y, and sends what it has learnt."""
    honest = fedavg.update

    def update(job: Any, broadcast: Broadcast, state: Any, shard: Shard) -> Any:
        if job.client:
            return honest(job, broadcast, state, shard)
        learnt = dataclasses.replace(shard, y=9 - shard.y) if attack == "label-flipped" else shard
        outcome = honest(job, broadcast, state, learnt)
        assert isinstance(outcome.update, Update)
        return outcome._replace(update=hostile(attack, broadcast, outcome.update))

    with patch.object(fedavg, "update", update):
        yield


def score(attack: str, *keys: dict[str, Scalar]) -> tuple[list[float], float]:
    """Return the accuracy in per cent for every seed, and epsilon."""
    found = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder, under(attack):
            flat: dict[str, Scalar] = {**COMMON, "run.seed": seed, "run.dir": folder}
            for some in keys:
                flat |= some
            inline.run(Config.from_flat(flat), 1)
            run = Run.open(folder)
            frame = run.evaluations
            last = frame[(frame["round"] == frame["round"].max()) & (frame["client"] != 0)]
            found.append(100 * float(last["global"].mean()))
            summary = run.summary()
    return found, summary.get("privacy", {}).get("epsilon", float("inf"))


def rules(partition: str) -> dict[str, list[float]]:
    """Print the table of a partition; return its accuracies."""
    figures = {}
    print(f"\n| {partition} | {' | '.join(ATTACKS)} |\n|{'---|' * (len(ATTACKS) + 1)}")
    for rule, keys in RULES.items():
        row = []
        for attack in ATTACKS:
            found, _ = score(attack, PARTITIONS[partition], keys)
            figures[f"{partition}/{rule}/{attack}"] = found
            row.append(spread(statistics.mean(found), statistics.stdev(found)))
        print(f"| {rule} | {' | '.join(row)} |", flush=True)
    return figures


def private() -> dict[str, list[float]]:
    """Print the table of noise multipliers; return its accuracies."""
    figures = {}
    print("\n| noise-multiplier | epsilon | accuracy |\n|---|---|---|")
    for multiplier in MULTIPLIERS:
        found, epsilon = score("nobody", PRIVATE, {"privacy.noise-multiplier": multiplier})
        figures[f"privacy/{multiplier:g}"] = found
        text = spread(statistics.mean(found), statistics.stdev(found))
        print(f"| {multiplier:g} | {epsilon:.2f} | {text} |", flush=True)
    return figures


TABLES: dict[str, Callable[[], dict[str, list[float]]]] = {
    "iid": lambda: rules("iid"),
    "skewed": lambda: rules("skewed"),
    "private": private,
}


def main() -> None:
    """Print tables in Markdown; ``--out`` also writes the accuracies of every seed as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", help=f"some of {', '.join(TABLES)}; none: all")
    parser.add_argument("--out", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    single_thread()
    figures: dict[str, list[float]] = {}
    for name in arguments.tables or TABLES:
        figures |= TABLES[name]()
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
