"""``flower``: a simulation round against that of a plain Flower app (:mod:`bench.quickstart`)."""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from bench.common import ROUNDS, WARM_UP, Bench, Table, Work, compared, in_turn
from fedkd.data import federate
from sims.simulation import PrivateSuperLink, tail

SMALL = Work("mnist", "fedgen_cnn", clients=100, cohort=50, images=320, batch=32)
LARGE = Work("mnist", "fedavg_cnn", clients=100, cohort=50, images=50, batch=10)


def flower(bench: Bench) -> list[Table]:
    """Compare with the plain app for a small and a larger model; the ratio is its time to ours."""
    tables = []
    for work in (SMALL, LARGE):
        contestants = {
            "plain Flower app": partial(plain, bench, work),
            "ours": partial(bench.ours, work),
            "ours, exact sums": partial(bench.ours, work, run__exchange="sums"),
        }
        tables.append(compared(str(work), in_turn(contestants, bench.repetitions)))
    return tables


def plain(bench: Bench, work: Work) -> float:
    """Return the seconds per round of the plain app: from the beginning of a round to that of the next."""
    shards, out = _shards(bench, work), bench.folder() / "began.json"
    began = run_app(
        Path(__file__).with_name("quickstart.py"),
        {
            "shards": str(shards),
            "out": str(out),
            "model": work.model,
            "clients": work.clients,
            "cohort": work.cohort,
            "batch-size": work.batch,
            "lr": 0.01,
            "rounds": ROUNDS,
        },
        work.clients,
        out,
    )
    return float(statistics.median([b - a for a, b in itertools.pairwise(began)][WARM_UP:]))


def _shards(bench: Bench, work: Work) -> Path:
    """Return a folder with a file for each client: the images and classes that our clients train on."""
    config = work.config(bench.data(work), bench.folder())
    folder = bench.scratch / f"shards-{config.settings_hash()}"
    if not folder.exists():
        folder.mkdir()
        data = federate(config)
        for client in range(work.clients):
            shard = data.shard(client, "train")
            x, y = shard.batch(slice(None))
            np.savez(folder / f"{client:06d}.npz", x=x.numpy(), y=y.numpy())
    return folder


def run_app(file: Path, config: dict[str, Any], nodes: int, out: Path) -> Any:
    """Run a Flower app of one file and return the JSON that it leaves in ``out``.

    Args:
        file: a module with a ServerApp ``server`` and a ClientApp ``client``.
        config: the app's.
        nodes: number of SuperNodes, one CPU core each.
        out: what the app writes; Flower's log is put beside it.

    Raises:
        RuntimeError: it has not written it.
    """
    app, log = out.parent / "app", out.parent / "flower.log"
    app.mkdir()
    shutil.copy(file, app)
    components = {"serverapp": f"{file.stem}:server", "clientapp": f"{file.stem}:client"}
    flower = {"publisher": "fedkd", "components": components, "config": config}
    project = {"name": "plain", "version": "0.1.0", "description": "a benchmark", "license": "Apache-2.0"}
    (app / "pyproject.toml").write_text(tomli_w.dumps({"project": project, "tool": {"flwr": {"app": flower}}}))
    federation = f"num-supernodes={nodes} client-resources-num-cpus=1 client-resources-num-gpus=0.0"
    with PrivateSuperLink() as superlink, log.open("wb") as output:
        subprocess.run(
            ["flwr", "run", str(app), "own", "--stream", "--federation-config", federation],
            env=superlink.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
    if not out.exists():
        raise RuntimeError(f"the app of {file.name} failed: {tail(log)}")
    return json.loads(out.read_text())
