"""The ``simulation`` engine: ``flwr run`` on a private SuperLink, Ray underneath, nothing left behind.

A :class:`PrivateSuperLink` has its own ports and its own Flower and Ray folders, so it meets no other that runs on
the machine, and serves any number of runs one after another.  They are given to Flower as an app of one file, a
``pyproject.toml`` with the runs' whole configurations; the code is what is installed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import tomli_w

from fedkd.config import Config
from fedkd.errors import UserError
from sims import watchdog
from sims.doctor import FLOWER_SWITCH

START_SECONDS, END_SECONDS, STOP_SECONDS = 60.0, 5.0, 10.0


class SimulationError(RuntimeError):
    """Flower, Ray or the app failed; the message says what and where the log is."""


class PrivateSuperLink:
    """A SuperLink of our own, as a context manager; leaving it, or being killed, ends every process it started.

    Raises:
        SimulationError: it does not start; the message holds the end of its log.
    """

    def __init__(self) -> None:
        self._home = _short_folder()
        self._port = _free_port()
        self._log = self._home / "superlink.log"
        self._process: psutil.Popen | None = None
        self._watchdog = watchdog.start(self._home)
        # By Ray's own default, 15, clients would wait for everything else that runs here.
        self.environment = (
            {"RAY_worker_niceness": "0"}
            | os.environ
            | {
                watchdog.HOME: str(self._home),
                FLOWER_SWITCH: "1",
                "FLWR_DISABLE_UPDATE_CHECK": "1",
                "FLWR_TELEMETRY_ENABLED": "0",
                "RAY_TMPDIR": str(self._home),
                "RAY_USAGE_STATS_ENABLED": "0",
                "OMP_NUM_THREADS": "1",
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            }
        )

    @property
    def _address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:  # Ctrl-C while it starts leaves nothing behind either
            self.close()
            raise
        return self

    def _start(self) -> None:
        (self._home / "config.toml").write_text(
            tomli_w.dumps({"superlink": {"default": "own", "own": {"address": self._address, "insecure": True}}})
        )
        with self._log.open("wb") as log:
            self._process = psutil.Popen(
                [
                    *("flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"),
                    *("--host", "127.0.0.1", "--port", str(self._port)),
                ],
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise SimulationError(f"Flower's SuperLink did not start: {tail(self._log)}")
            time.sleep(0.1)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, configs: Sequence[Config], nodes: int, cpus: int = 1, gpus: float | None = None) -> None:
        """Run experiments one after another in one Flower run, so that Ray and the workers start once.

        Each one's ``run.dir`` receives its results; Flower's log is ``flower.log`` in the folder they share.

        Args:
            configs: what to run.
            nodes: simulated SuperNodes, each of which can train every client.
            cpus: CPU cores that Ray reserves for a node.
            gpus: share of a GPU that Ray reserves for a node; None: the GPUs there are, divided by the nodes.

        Raises:
            SimulationError: a run did not come to its end; the others may have.
        """
        folders = [Path(config.run.dir) for config in configs]
        log = Path(os.path.commonpath(folders)) / "flower.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        for folder in folders:  # what an interrupted run said is not what this one says
            (folder / "error.txt").unlink(missing_ok=True)
        app = self._home / "app"
        shutil.rmtree(app, ignore_errors=True)
        app.mkdir()
        (app / "pyproject.toml").write_text(app_toml(configs), encoding="utf-8")
        share = gpu_share(nodes, _gpus(configs[0])) if gpus is None else gpus
        federation = f"num-supernodes={nodes} client-resources-num-cpus={cpus} client-resources-num-gpus={share}"
        before = self._servers()
        with log.open("wb") as output:
            client = subprocess.Popen(
                ["flwr", "run", str(app), "own", "--stream", "--federation-config", federation],
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                killed = self._wait(client, before)
            finally:
                if client.poll() is None:
                    client.kill()
                    client.wait()
        for folder in folders:
            if not (folder / "summary.json").exists():
                raise SimulationError(f"{_reason(folder, log, killed)} (log: {log})")

    def _wait(self, client: subprocess.Popen[bytes], before: set[int]) -> bool:
        """Wait until Flower's run has ended; return whether it will never say so, because its process was killed.

        Flower would notice that by a heartbeat, after a minute.

        Args:
            client: what ends with the run.
            before: what :meth:`_servers` was before it; a process of the run before this one may take time to end.
        """
        seen = False
        while client.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                client.wait(1)
            if self._servers() - before:
                seen = True
            elif seen:
                try:
                    client.wait(END_SECONDS)
                except subprocess.TimeoutExpired:
                    if not self._servers() - before:
                        return True
        return False

    def _servers(self) -> set[int]:
        """Return the numbers of the processes in which a ServerApp runs."""
        assert self._process is not None
        children: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            children = self._process.children(recursive=True)
        return {process.pid for process in children if _is_server(process)}

    def close(self) -> None:
        """End the SuperLink and all that it started, by process id, and remove its folder.

        What has lost its parent is killed at once: Ray's agents take no notice when they are asked to end.  A second
        Ctrl-C does not interrupt this.
        """
        with _deaf():
            family = self._family()
            orphans = [process for process in watchdog.processes_of(self._home) if process not in family]
            _each(psutil.Process.kill, orphans)
            _each(psutil.Process.terminate, family)
            _, alive = psutil.wait_procs(family, timeout=STOP_SECONDS)
            left = [*alive, *watchdog.processes_of(self._home)]
            _each(psutil.Process.kill, left)
            psutil.wait_procs([*orphans, *left], timeout=STOP_SECONDS)
            shutil.rmtree(self._home, ignore_errors=True)
            self._watchdog.communicate()

    def _family(self) -> list[psutil.Process]:
        """Return the SuperLink and its descendants."""
        if self._process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                return [self._process, *self._process.children(recursive=True)]
        return []

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self._address}/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


def app_toml(configs: Sequence[Config], hosts: Mapping[int, str] | None = None) -> str:
    """Return the ``pyproject.toml`` of a Flower app that is these runs.

    Args:
        configs: what to run.
        hosts: which clients each node may host; None: any.
    """
    own = {} if hosts is None else {"hosts": json.dumps(hosts)}
    return app_of({"series": json.dumps([config.flat() for config in configs])} | own)


def app_of(config: Mapping[str, Any]) -> str:
    """Return the ``pyproject.toml`` of a Flower app of one file: the installed code with this configuration."""
    app = {
        "publisher": "fedkd",
        "components": {"serverapp": "strategies.app:app", "clientapp": "clients.app:app"},
        "config": config,
    }
    return tomli_w.dumps(
        {
            "project": {"name": "fedkd-run", "version": "0.1.0", "description": "a run", "license": "Apache-2.0"},
            "tool": {"flwr": {"app": app}},
        }
    )


def default_nodes() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count() or 1


def require_ray() -> None:
    """Check that Ray is there.

    Raises:
        UserError: it is not.
    """
    import importlib.util

    if importlib.util.find_spec("ray") is None:
        raise UserError("the simulation engine needs Ray: pip install 'flwr[simulation]', or take --engine inline")


def require_room(cpus: int, gpus: float) -> None:
    """Check that one node fits on this machine, since Ray would wait for what never comes.

    With ``RAY_ADDRESS`` the nodes are on the cluster there, which has to answer.

    Args:
        cpus: CPU cores of a node.
        gpus: GPUs of a node.

    Raises:
        UserError: it does not fit, no cluster answers, or ``gpus`` is a fraction above one, which Ray cannot give.
    """
    if gpus > 1 and gpus != int(gpus):
        raise UserError(f"--gpus-per-node {gpus:g}: a share of one GPU, or a whole number of them")
    if address := os.environ.get("RAY_ADDRESS", ""):
        _require_cluster(address)
        return
    if cpus > default_nodes():
        raise UserError(f"--cpus-per-node {cpus} is more than the {default_nodes()} CPU cores of this machine")
    if not gpus:
        return
    import torch

    if gpus > torch.cuda.device_count():
        raise UserError(f"--gpus-per-node {gpus:g}: PyTorch finds {torch.cuda.device_count()} GPUs on this machine")


def _require_cluster(address: str) -> None:
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():  # such as "auto", which Ray looks up
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"RAY_ADDRESS = '{address}': no Ray cluster answers there ({error}); `ray start --head` begins one, "
            "without the variable the nodes are processes of this machine"
        ) from None


def gpu_share(nodes: int, gpus: int) -> float:
    """Return the share of a GPU for each of ``nodes``, so that all fit on ``gpus`` at once; at most one each."""
    if not gpus:
        return 0.0
    return math.floor(10_000 / math.ceil(nodes / gpus)) / 10_000


def _gpus(config: Config) -> int:
    if config.run.device == "cpu":
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _each(end: Callable[[psutil.Process], None], processes: Sequence[psutil.Process]) -> None:
    """End those processes that are still there."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            end(process)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Ignore requests to stop while the block runs (in the main thread, where signals arrive)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _short_folder() -> Path:
    """Make a temporary folder whose path is short: Ray's sockets lie 70 characters below it, and 103 are allowed."""
    base = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="fedkd-", dir=base if len(base) < 20 or os.name == "nt" else "/tmp"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tail(log: Path, lines: int = 5) -> str:
    """Return the end of a log in one line."""
    return " | ".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-lines:])


def _is_server(process: psutil.Process) -> bool:
    """Return whether the ServerApp runs in this process; one that has ended but not been waited for has no command."""
    try:
        return any(word.endswith("flwr-simulation") for word in process.cmdline())
    except psutil.Error:
        return False


def _reason(folder: Path, log: Path, killed: bool) -> str:
    """Say why a run ended early: what the server wrote down, that it was killed, or the end of Flower's log."""
    error = folder / "error.txt"
    if error.exists():
        return error.read_text(encoding="utf-8").strip()
    return "the process of Flower's ServerApp was killed" if killed else tail(log)
