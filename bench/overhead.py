"""``overhead`` and ``pfl``: a simulation round against the bare training loop, side by side in one run.

The *bare loop* is the physical limit of eager PyTorch on this machine: the same model, batch size and number of
steps over preloaded tensors, in as many single-thread processes as cores, with no federation at all.
"""

from __future__ import annotations

import multiprocessing
import queue
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from bench import flower, images
from bench.common import ROUNDS, WARM_UP, Bench, Table, Work, compared, in_turn, middle
from fedkd.config import ModelSection
from fedkd.models import build
from fedkd.rng import Streams

LONGEST = 300.0
"""Seconds after which the bare loop is given up."""
MNIST = Work("mnist", "fedgen_cnn", clients=100, cohort=100, images=320, batch=32)
FIXED = Work("mnist", "fedavg_cnn", clients=100, cohort=100, images=1, batch=1)
"""Next to no training, so that what is left is what a round costs in itself."""
PFL = Work("cifar10", "pfl_cnn", clients=1000, cohort=50, images=50, batch=10)
"""The work of pfl-research's benchmark (Apple): 1,000 users of CIFAR-10."""


def overhead(bench: Bench) -> list[Table]:
    """Compare with the bare loop: rounds of ordinary work, and rounds of next to no work."""
    tables = []
    for work in (MNIST, FIXED):
        contestants = {
            "bare loop": partial(bare, work, bench.nodes),
            "ours": partial(bench.ours, work),
            "ours, exact sums": partial(bench.ours, work, run__exchange="sums"),
        }
        seconds = in_turn(contestants, bench.repetitions)
        tables.append(compared(str(work), seconds))
    fixed = {name: [a - b for a, b in zip(seconds[name], seconds["bare loop"], strict=True)] for name in seconds}
    rows = [[name, middle(values)] for name, values in fixed.items() if name != "bare loop"]
    return [*tables, Table(f"What a round costs beyond the bare loop: {FIXED}", ["", "s"], rows, fixed)]


def pfl(bench: Bench) -> list[Table]:
    """Compare the work of pfl-research's benchmark with the bare loop and with a plain Flower app."""
    sums = partial(bench.ours, PFL, run__exchange="sums")
    last = partial(sums, model__memory_format="channels-last")
    contestants = {
        "bare loop": partial(bare, PFL, bench.nodes),
        "ours": partial(bench.ours, PFL),
        "ours, exact sums": sums,
        "ours, exact sums, channels-last": last,
        "ours, exact sums, channels-last, bfloat16": partial(last, model__precision="bfloat16"),
        "plain Flower app": partial(flower.plain, bench, PFL),
    }
    return [compared(str(PFL), in_turn(contestants, bench.repetitions))]


def bare(work: Work, processes: int) -> float:
    """Return the seconds that the training steps of one round take in bare processes, the slowest one's."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.Queue()
    shares = [work.cohort // processes + (n < work.cohort % processes) for n in range(processes)]
    workers = [context.Process(target=_bare_worker, args=(work, share, barrier, results)) for share in shares]
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


def _bare_worker(work: Work, clients: int, barrier: Any, results: Any) -> None:
    torch.set_num_threads(1)
    shape = images.SHAPES[work.data]
    network = nn.Sequential(*build(ModelSection(name=work.model), shape, 10, Streams(1)).stages.values())
    # every client has images of its own, as in the run that this is compared with
    shards = [(torch.randn(work.images, *shape), torch.randint(0, 10, (work.images,))) for _ in range(clients)]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    seconds = []
    for _ in range(ROUNDS):
        barrier.wait()
        began = time.perf_counter()
        for x, y in shards:
            for rows in torch.split(torch.randperm(len(y)), work.batch):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(network(x[rows]), y[rows])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        seconds.append(time.perf_counter() - began)
    results.put(statistics.median(seconds[WARM_UP:]))
