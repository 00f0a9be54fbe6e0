"""Launching runs: checked before anything starts, followed while they run, readable whatever happens."""

from __future__ import annotations

import concurrent.futures
import importlib
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from fedkd.config import Config, Scalar
from fedkd.errors import UserError
from fedkd.results import Run, lock
from sims.progress import Watched, watching

Engine = Literal["inline", "simulation"]


def prepare(flat: Mapping[str, Scalar]) -> Config:
    """Build a configuration and try everything that can fail because of it: data, partition, model, method.

    Raises:
        UserError: whatever is wrong, before anything has started.
    """
    from fedkd.data import federate
    from fedkd.device import pick_device
    from strategies import build

    if root := flat.get("data.root"):
        flat = {**flat, "data.root": str(Path(str(root)).expanduser().resolve())}
    config = Config.from_flat(flat)
    build(config, federate(config), pick_device(config.run.device))
    return config


def place(config: Config, out: Path | None) -> Config:
    """Return the configuration with an absolute folder for its results: ``out``, or a new one under ``runs``."""
    if out is None:
        run = config.run
        name = f"{run.method}-{config.data.name.replace('/', '-')}-s{run.seed}"
        out = Path("runs") / name
        count = 1
        while out.exists():
            count += 1
            out = Path("runs") / f"{name}-{count}"
    elif (out / "rounds.jsonl").exists():
        raise UserError(f"--out {out} already holds a run; take another folder")
    return _with_folder(config, out)


def place_series(config: Config, folder: Path) -> tuple[Config, bool]:
    """Return the configuration with its place in a series of runs, and whether that run is there and finished.

    A run with other settings or data in its place is an error, and so is one that is being written; one that was
    interrupted is moved aside and made again.

    Raises:
        UserError: the folder holds a run with other settings or data, or another process writes to it.
    """
    from fedkd.data import federate

    placed = _with_folder(config, folder)
    if not (folder / "config.toml").exists():
        return placed, False
    found = Run.open(folder)
    if found.config.digest() != placed.digest():
        raise UserError(f"{folder} holds a run with other settings; take another folder with --out")
    if found.data != federate(config).fingerprint():
        raise UserError(f"{folder} holds a run of other data (data.root differs?); take another folder with --out")
    lock(folder).close()
    if found.finished:
        return placed, True
    count = 1
    while (aside := folder.with_name(f"{folder.name}.interrupted-{count}")).exists():
        count += 1
    folder.rename(aside)
    return placed, False


def launch(config: Config, engine: Engine, nodes: int | None) -> Run:
    """Run one experiment with a live progress display and return its results."""
    launch_all([config], engine, nodes, jobs=1)
    return Run.open(config.run.dir)


def launch_all(configs: Sequence[Config], engine: Engine, nodes: int | None, jobs: int) -> None:
    """Run experiments: one after another on one SuperLink, or (inline) up to ``jobs`` at a time in processes.

    Args:
        configs: the runs; each ``run.dir`` is an absolute folder.
        engine: ``inline`` or ``simulation``.
        nodes: nodes of a run; None: one inline, one per CPU core in simulation.
        jobs: inline runs at a time.
    """
    watched = [Watched(Path(c.run.dir), Path(c.run.dir).name, c.run.rounds) for c in configs]
    if engine == "simulation":
        from sims.simulation import PrivateSuperLink, default_nodes, require_ray

        require_ray()
        with watching(watched), PrivateSuperLink() as superlink:
            superlink.run(configs, nodes or default_nodes())
    elif len(configs) == 1 or jobs == 1:
        from sims import inline

        with watching(watched):
            for config in configs:
                inline.run(config, nodes or 1)
    else:
        with watching(watched), _processes(min(jobs, len(configs))) as pool:
            started = [pool.submit(_inline, config, nodes or 1) for config in configs]
            for run in concurrent.futures.as_completed(started):
                run.result()


@contextmanager
def _processes(count: int) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """Give a pool of fresh processes that is ended at once when something goes wrong."""
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(count, mp_context=context)
    try:
        yield pool
    except BaseException:
        workers = list(pool._processes.values())
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()
        raise
    pool.shutdown()


def _inline(config: Config, nodes: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    importlib.import_module("sims.inline").run(config, nodes)


def _with_folder(config: Config, folder: Path) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": str(folder.resolve())})})
