"""``groups``: rounds in which a node trains its clients one by one, and all of them in one call (``run.group``)."""

from __future__ import annotations

from functools import partial

from bench.common import Bench, Table, Work, compared, in_turn

WORKS = (
    Work("mnist", "mlp", clients=100, cohort=50, images=160, batch=16),
    Work("mnist", "fedgen_cnn", clients=100, cohort=50, images=100, batch=10),
    Work("cifar10", "lenet5", clients=100, cohort=50, images=100, batch=10),
)
"""Smaller and larger models, the second with GroupNorm."""


def groups(bench: Bench) -> list[Table]:
    """Compare both ways for each model; a group is as large as all nodes can have one."""
    tables = []
    for work in WORKS:
        size = work.cohort // bench.nodes
        contestants = {
            name: partial(bench.ours, work, run__exchange="sums", model__norm="group", run__group=group)
            for name, group in (("one by one", 1), (f"{size} at once", size))
        }
        tables.append(compared(f"{work}, exact sums", in_turn(contestants, bench.repetitions)))
    return tables
