"""The ``simulation`` engine: ``flwr run`` on a private SuperLink, Ray underneath, nothing left behind.

A :class:`PrivateSuperLink` has its own ports and its own Flower and Ray folders, so it meets no other that runs on
the machine, and serves any number of runs one after another.  They are given to Flower as an app of one file, a
``pyproject.toml`` with the runs' whole configurations; the code is what is installed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import tomli_w

from fedkd.config import Config
from fedkd.errors import UserError

START_SECONDS, STOP_SECONDS = 60.0, 10.0


class SimulationError(RuntimeError):
    """Flower, Ray or the app failed; the message says what and where the log is."""


class PrivateSuperLink:
    """A SuperLink of our own, as a context manager; leaving it ends every process it started.

    Raises:
        SimulationError: it does not start; the message holds the end of its log.
    """

    def __init__(self) -> None:
        self._home = _short_folder()
        self._port = _free_port()
        self.environment = os.environ | {
            "FLWR_HOME": str(self._home),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "RAY_TMPDIR": str(self._home),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        (self._home / "config.toml").write_text(
            tomli_w.dumps({"superlink": {"default": "own", "own": {"address": self._address, "insecure": True}}})
        )
        self._log = self._home / "superlink.log"
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

    @property
    def _address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        deadline = time.monotonic() + START_SECONDS
        while not self._healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                tail = _tail(self._log)
                self.close()
                raise SimulationError(f"Flower's SuperLink did not start: {tail}")
            time.sleep(0.1)
        return self

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
        app = self._home / "app"
        shutil.rmtree(app, ignore_errors=True)
        app.mkdir()
        (app / "pyproject.toml").write_text(app_toml(configs), encoding="utf-8")
        share = _gpu_share(nodes) if gpus is None else gpus
        federation = f"num-supernodes={nodes} client-resources-num-cpus={cpus} client-resources-num-gpus={share}"
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
                client.wait()
            finally:
                if client.poll() is None:
                    client.kill()
                    client.wait()
        for folder in folders:
            if not (folder / "summary.json").exists():
                raise SimulationError(f"{_reason(folder, log)} (log: {log})")

    def close(self) -> None:
        """End the SuperLink and all that it started, by process id, and remove its folder."""
        processes: list[psutil.Process] = [self._process]
        with contextlib.suppress(psutil.NoSuchProcess):
            processes += self._process.children(recursive=True)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(processes, timeout=STOP_SECONDS)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=STOP_SECONDS)
        shutil.rmtree(self._home, ignore_errors=True)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self._address}/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


def app_toml(configs: Sequence[Config]) -> str:
    """Return the ``pyproject.toml`` of a Flower app that is these runs."""
    app = {
        "publisher": "fedkd",
        "components": {"serverapp": "strategies.app:app", "clientapp": "clients.app:app"},
        "config": {"series": json.dumps([config.flat() for config in configs])},
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


def _gpu_share(nodes: int) -> float:
    import torch

    return round(torch.cuda.device_count() / nodes, 4) if torch.cuda.is_available() else 0.0


def _short_folder() -> Path:
    """Make a temporary folder whose path is short: Ray's sockets lie 70 characters below it, and 103 are allowed."""
    base = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="fedkd-", dir=base if len(base) < 20 or os.name == "nt" else "/tmp"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tail(log: Path, lines: int = 5) -> str:
    return " | ".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-lines:])


def _reason(folder: Path, log: Path) -> str:
    """Say why a run ended early: what the server wrote down, or the end of Flower's log."""
    error = folder / "error.txt"
    return error.read_text(encoding="utf-8").strip() if error.exists() else _tail(log)
