"""Launching runs: checked before anything starts, followed while they run, readable whatever happens."""

from __future__ import annotations

import concurrent.futures
import importlib
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from fedkd.config import Config, Scalar
from fedkd.errors import UserError
from fedkd.results import Run, check_goes_on, check_same, lock, started
from sims.progress import Watched, watching
from sims.show import error_console
from sims.trackers import tracking

Engine = Literal["inline", "simulation", "deployment"]


def prepare(flat: Mapping[str, Scalar]) -> Config:
    """Build a configuration and try everything that can fail because of it: data, partition, model, method.

    Raises:
        UserError: whatever is wrong, before anything has started.
    """
    from fedkd.data import federate
    from fedkd.device import pick_device
    from strategies import build

    config = checked(flat)
    if config.data.partition == "devices":
        return config  # the server asks the devices what they have, before anything is trained
    data = federate(config)
    if not sum(map(len, data.test)):
        raise UserError(
            f"none of the {config.run.clients} clients has a test example under data.test = '{config.data.test}'; "
            "take fewer clients or more data"
        )
    build(config, data, pick_device(config.run.device))
    return config


def checked(flat: Mapping[str, Scalar]) -> Config:
    """Build a configuration whose ``data.root`` is absolute.

    Raises:
        UserError: a wrong key or value, or a ``data.root`` for data that comes from no folder.
    """
    if root := flat.get("data.root"):
        flat = {**flat, "data.root": str(Path(str(root)).expanduser().resolve())}
    config = Config.from_flat(flat)
    if config.data.root and config.data.name == "digits" and config.data.partition != "devices":
        raise UserError(
            f"data.root = '{config.data.root}': 'digits' is embedded and comes from no folder; "
            "name the data with --data, or leave --root out"
        )
    return config


def writable(folder: Path) -> Path:
    """Return a folder after trying to write to it; what had to be made for that is removed again.

    Raises:
        UserError: it cannot be made or written to.
    """
    made: list[Path] = []
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        why = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise UserError(f"the results cannot be written to {folder}: {why}; take another folder with --out") from error
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()
    return folder


def place(config: Config, out: Path | None) -> Config:
    """Return the configuration with an absolute folder for its results: ``out``, or a new one under ``runs``.

    Raises:
        UserError: the folder cannot be written, or holds a run already.
    """
    if out is None:
        run = config.run
        name = f"{run.method}-{config.data.name.replace('/', '-')}-s{run.seed}"
        out = Path("runs") / name
        count = 1
        while out.exists():
            count += 1
            out = Path("runs") / f"{name}-{count}"
    if started(writable(out)):
        raise UserError(f"--out {out} already holds a run; take another folder, or `fedkd resume {out}`")
    return in_folder(config, out)


def place_series(config: Config, folder: Path) -> tuple[Config, bool]:
    """Return the configuration with its place in a series of runs, and whether that run is there and finished.

    One that was interrupted goes on where it was.

    Raises:
        UserError: the folder cannot be written, holds a run with other settings or data or an interrupted one of
            another version, or another process writes to it.
    """
    from fedkd.data import federate

    placed = in_folder(config, writable(folder))
    if not started(folder):
        return placed, False
    lock(folder).close()
    finished = Run(folder).finished
    check = check_same if finished else check_goes_on
    on_devices = config.data.partition == "devices"  # then the server compares them, when it has asked
    check(folder, placed, Run(folder).data if on_devices else federate(config).fingerprint())
    return placed, finished


def launch(
    config: Config,
    engine: Engine,
    nodes: int | None,
    cpus: int | None = None,
    gpus: float | None = None,
    superlink: str = "",
    track: str = "",
) -> Run:
    """Run one experiment with a live progress display and return its results."""
    launch_all([config], engine, nodes, 1, cpus, gpus, superlink, track)
    return Run.open(config.run.dir)


def launch_all(
    configs: Sequence[Config],
    engine: Engine,
    nodes: int | None,
    jobs: int,
    cpus: int | None = None,
    gpus: float | None = None,
    superlink: str = "",
    track: str = "",
) -> None:
    """Run experiments: one after another on one SuperLink, or (inline) up to ``jobs`` at a time in processes.

    Args:
        configs: the runs; each ``run.dir`` is an absolute folder.
        engine: ``inline``, ``simulation`` or ``deployment``.
        nodes: nodes of a run; None: one inline, as many as the CPU cores have room for in simulation.
        jobs: inline runs at a time.
        cpus: CPU cores that the simulation reserves for a node; None: one.
        gpus: GPUs, or a share of one, that it reserves for a node; None: those there are, divided by the nodes.
        superlink: of a deployment.
        track: a tracker that is shown each round too (:mod:`sims.trackers`); empty: none.

    Raises:
        UserError: what a node is to have is not there, or is asked of the inline engine; nodes without a client; or a
            tracker whose package is not installed.
    """
    check_resources(engine, cpus, gpus)
    most = max(config.run.clients for config in configs)
    if nodes is not None and nodes > most:
        raise UserError(f"--nodes {nodes} is more than run.clients = {most}; a node without clients has nothing to do")
    watched = [Watched(Path(c.run.dir), Path(c.run.dir).name, c.run.rounds) for c in configs]
    at_once = min(jobs, len(configs)) if engine == "inline" else 1
    with watching(watched, error_console, at_once), tracking(configs, track, error_console):
        if engine == "simulation":
            from sims.simulation import PrivateSuperLink, default_nodes

            reserved = cpus or 1
            with PrivateSuperLink() as own:
                own.run(configs, nodes or min(max(1, default_nodes() // reserved), most), reserved, gpus)
        elif engine == "deployment":
            from sims import deployment

            deployment.run(configs, superlink)
        elif at_once == 1:
            from sims import inline

            for config in configs:
                inline.run(config, nodes or 1)
        else:
            with _processes(at_once) as pool:
                with _unheard():
                    started = [pool.submit(_inline, config.flat(), nodes or 1) for config in configs]
                for run in concurrent.futures.as_completed(started):
                    run.result()


def check_resources(engine: Engine, cpus: int | None, gpus: float | None) -> None:
    """Check that the engine can give each node these CPU cores and GPUs.

    Raises:
        UserError: it cannot.
    """
    if engine == "simulation":
        from sims.simulation import require_ray, require_room

        require_ray()
        require_room(cpus or 1, gpus or 0.0)
    elif cpus is not None or gpus is not None:
        raise UserError("--cpus-per-node and --gpus-per-node need --engine simulation; inline is this one process")


def on_devices(flat: Mapping[str, Scalar], engine: Engine, nodes: int | None, superlink: str) -> dict[str, Scalar]:
    """Return the keys of a run with the partition that its engine needs: that of the devices in a deployment.

    Raises:
        UserError: the engine and what else is given do not fit.
    """
    given = flat.get("data.partition", "devices" if engine == "deployment" else "")
    if (given == "devices") != (engine == "deployment"):
        raise UserError(
            f"data.partition = '{given}' and --engine {engine}: a deployment, and nothing else, trains on what the "
            "devices have (`fedkd deploy split` writes any partition as their folders)"
        )
    if bool(superlink) != (engine == "deployment"):
        raise UserError("--engine deployment needs --superlink, and no other engine takes it")
    if nodes is not None and engine == "deployment":
        raise UserError("--nodes is for the other engines; a deployment has the nodes that it has")
    return {**flat, **({"data.partition": given} if given else {})}


@contextmanager
def _processes(count: int) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """Give a pool of fresh processes that is ended at once when something goes wrong."""
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(count, mp_context=context, initializer=_die_with_parent)
    try:
        yield pool
    except BaseException:
        workers = list(pool._processes.values())
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()
        raise
    pool.shutdown()


@contextmanager
def _unheard() -> Iterator[None]:
    """Keep Ctrl-C from processes that the block starts: this one hears it after the block, and ends them in silence.

    They inherit the mask.  It is not enough here: another thread may take the signal, and Python would break off the
    block in this one, between a process and what it is told.
    """
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield  # Windows, and where Python hears no signals
        return
    heard: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
    if heard:
        signal.raise_signal(signal.SIGINT)


def _inline(flat: Mapping[str, Scalar], nodes: int) -> None:
    """Run an experiment of flat keys in a process of its own; the section of a method need not be picklable."""
    os.environ["OMP_NUM_THREADS"] = "1"
    importlib.import_module("sims.inline").run(Config.from_flat(flat), nodes)


def _die_with_parent() -> None:
    """End this process when the one that started it has ended: a worker of a pool would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def in_folder(config: Config, folder: Path) -> Config:
    """Return the configuration with another folder for its results."""
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": str(folder.resolve())})})
