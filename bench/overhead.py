"""``make bench``: a simulation round against the bare training loop, side by side in one run.

The *bare loop* is the physical limit of eager PyTorch on this machine: the same model, batch size and number of
steps over preloaded tensors, in as many single-thread processes as cores, with no federation at all.  Both are run
alternately, several times, and the ratio of each pair is reported, since machines are noisy and shared.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedkd.config import Config
from fedkd.models import build
from fedkd.results import Run, environment
from fedkd.rng import Streams
from sims.simulation import PrivateSuperLink, default_nodes

CLIENTS, BATCHES, BATCH, ROUNDS, WARM_UP = 100, 10, 32, 8, 2
LONGEST = 300.0
"""Seconds after which the bare loop is given up."""


@dataclass(frozen=True)
class Pair:
    """One repetition: seconds per round of the bare loop and of ours, the latter without evaluation."""

    bare: float
    ours: float

    @property
    def ratio(self) -> float:
        return self.ours / self.bare


def main() -> None:
    """Run the benchmark and print a table; ``--out`` also writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="folder with MNIST; default: invented images of its shape")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    nodes = default_nodes()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["FEDKD_CACHE"] = scratch
        root = arguments.root or _invented(Path(scratch))
        with PrivateSuperLink() as superlink:
            pairs = []
            for number in range(arguments.repetitions):
                folder = Path(scratch) / f"run{number}"
                bare = bare_loop(nodes)
                superlink.run([_config(root, folder)], nodes)
                pairs.append(Pair(bare, _seconds(folder)))
                print(f"bare {bare:.3f} s, ours {pairs[-1].ours:.3f} s, ratio {pairs[-1].ratio:.3f}", flush=True)
    ratios = sorted(pair.ratio for pair in pairs)
    print(
        f"round of {CLIENTS} clients x {BATCHES} batches of {BATCH}, {nodes} nodes: "
        f"ratio to the bare loop {statistics.median(ratios):.3f} (median; {ratios[0]:.3f} to {ratios[-1]:.3f})"
    )
    if arguments.out:
        figures = {"pairs": [vars(pair) for pair in pairs], "nodes": nodes, "environment": environment()}
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def bare_loop(processes: int) -> float:
    """Return the seconds that the training steps of one round take in bare processes, the slowest one's."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.Queue()
    shares = [CLIENTS // processes + (n < CLIENTS % processes) for n in range(processes)]
    workers = [context.Process(target=_bare_worker, args=(share, barrier, results)) for share in shares]
    for worker in workers:
        worker.start()
    try:
        return max(_next(results, workers) for _ in workers)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _next(results: Any, workers: Sequence[Any]) -> float:
    """Return the next worker's seconds; an error as soon as one has failed, since the others wait for it."""
    deadline = time.monotonic() + LONGEST
    while time.monotonic() < deadline:
        try:
            return float(results.get(timeout=1))
        except queue.Empty:
            if failed := [worker.exitcode for worker in workers if worker.exitcode]:
                raise RuntimeError(f"a process of the bare loop ended with exit code {failed[0]}") from None
    raise RuntimeError(f"the bare loop gave nothing within {LONGEST:.0f} s")


def _bare_worker(clients: int, barrier: Any, results: Any) -> None:
    torch.set_num_threads(1)
    config = Config.from_flat({"run.method": "fedavg", "model.name": "fedgen_cnn"})
    network = nn.Sequential(*build(config.model, (1, 28, 28), 10, Streams(1)).stages.values())
    size = BATCHES * BATCH  # every client has images of its own, as in the run that this is compared with
    shards = [(torch.randn(size, 1, 28, 28), torch.randint(0, 10, (size,))) for _ in range(clients)]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    seconds = []
    for _ in range(ROUNDS):
        barrier.wait()
        began = time.perf_counter()
        for images, labels in shards:
            for rows in torch.split(torch.randperm(len(labels)), BATCH):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(network(images[rows]), labels[rows])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        seconds.append(time.perf_counter() - began)
    results.put(statistics.median(seconds[WARM_UP:]))


def _config(root: Path, folder: Path) -> Config:
    return Config.from_flat(
        {
            "run.method": "fedavg",
            "run.clients": CLIENTS,
            "run.clients-per-round": 0,
            "run.rounds": ROUNDS,
            "run.eval-every": ROUNDS,
            "run.device": "cpu",
            "run.dir": str(folder),
            "data.name": "mnist",
            "data.root": str(root),
            "data.partition": "iid",
            "model.name": "fedgen_cnn",
            "train.local-steps": BATCHES,
            "train.batch-size": BATCH,
            "train.lr": 0.01,
        }
    )


def _seconds(folder: Path) -> float:
    """Return the median seconds of a round without its evaluation, after the warm-up rounds."""
    rows = Run.open(folder).rows("rounds")[WARM_UP:]
    return float(statistics.median(row["seconds_train"] + row["seconds_server"] for row in rows))


def _invented(scratch: Path) -> Path:
    """Write images of MNIST's shape in the hub's schema: enough for every client's batches."""
    import datasets
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    folder = scratch / "data" / "mnist"
    folder.mkdir(parents=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    for split, count in (("train", CLIENTS * BATCHES * BATCH), ("test", 2000)):
        images = [Image.fromarray(image) for image in rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)]
        labels = rng.integers(0, 10, count)
        rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return scratch / "data"
