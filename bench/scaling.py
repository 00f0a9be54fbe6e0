"""``scaling``: rounds per second and memory, by the number of nodes and of clients; a round's work is the same."""

from __future__ import annotations

import statistics
from dataclasses import replace

from bench.common import Bench, Table, Work, middle
from bench.memory import Peak

CLIENTS = (20, 100, 1_000, 10_000)
EACH = 10
"""Training images of a client, so the data grow with the clients; the work of a round does not."""
MNIST_BYTES = 28 * 28 * 4
"""Of a scaled image."""


def scaling(bench: Bench) -> list[Table]:
    """Measure each number of clients on one node and on all; one line each."""
    rows, figures = [], []
    for clients in CLIENTS:
        work = Work("mnist", "fedgen_cnn", clients, min(50, clients), images=EACH, batch=EACH)
        for nodes in sorted({1, bench.nodes}):
            some, seconds, peaks = replace(bench, nodes=nodes), [], []
            for _ in range(bench.repetitions):
                with Peak() as peak:
                    seconds.append(some.ours(work, train__local_steps=10))
                peaks.append(peak.bytes)
            megabytes = {
                kind: statistics.median(each[kind] for each in peaks) / 2**20 for kind in ("server", "node", "all")
            }
            rows.append(
                [
                    f"{clients:,}",
                    str(nodes),
                    f"{clients * EACH * MNIST_BYTES / 2**20:.0f}",
                    middle([1 / s for s in seconds], 2),
                    *(f"{megabytes[kind]:.0f}" for kind in ("server", "node", "all")),
                ]
            )
            figures.append({"clients": clients, "nodes": nodes, "seconds": seconds, "peak_bytes": peaks})
            print("  " + ", ".join(rows[-1]), flush=True)
    title = "fedgen_cnn on MNIST's shape, 10 steps of 10 images, a cohort of 50 (20 of 20); peak resident memory, MiB"
    columns = ["clients", "nodes", "all clients' images, MiB", "rounds per second", "server", "largest node", "all"]
    return [Table(title, columns, rows, figures)]
