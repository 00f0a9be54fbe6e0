"""A deployment on this machine for tests: a SuperLink and SuperNodes as processes, with TLS and keys.

Every process has the lab's folder in its environment, by which it is found; it is ended by its number, also when the
tests themselves are killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Self

import forked_apps
import psutil

from sims import watchdog
from sims.deploy import Deployment
from sims.doctor import FLOWER_SWITCH
from sims.handout import CONNECTION

MARK = "FEDKD_LAB"
APPS = -2
"""Number of the process that forks."""
START_SECONDS, STOP_SECONDS = 60.0, 10.0


class Lab:
    """A SuperLink and nodes, as a context manager.

    Args:
        base: an empty folder for everything.
        nodes: number of nodes.
        clients: number of clients.
        data: for each node, the folder of its data.
        address: where the SuperLink listens.
        inside: for the SuperLink (-1) and each node, a prefix of their commands: the way into a network of their own.
        forked: nodes whose SuperExec and ClientApps are forks of one process (:mod:`forked_apps`), which saves most of
            the time.
    """

    def __init__(
        self,
        base: Path,
        nodes: int,
        clients: int,
        data: Sequence[Path],
        address: str = "127.0.0.1",
        inside: Callable[[int], list[str]] = lambda node: [],
        forked: Container[int] = (),
    ) -> None:
        self.deployment = Deployment(base / "deployment", nodes, clients, address, free_port())
        self.base, self.data, self.inside, self.forked = base, list(data), inside, forked
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.homes = base / "homes"
        self.homes.mkdir()
        self._watchdog = watchdog.start(self.homes)

    def __enter__(self) -> Self:
        try:
            self.deployment.write()
            if any(node in self.forked for node in range(self.deployment.nodes)):
                self._start(APPS, forked_apps.place(self.base / "bin"), self.environment("apps"))
            self.start_superlink()
            nodes = range(self.deployment.nodes)
            self.register(nodes)
            for node in nodes:
                self.start_node(node)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def folder(self) -> Path:
        """What ``fedkd deploy init`` wrote."""
        return self.deployment.folder

    def environment(self, home: str, **more: str) -> dict[str, str]:
        """Return the environment of a process with a Flower folder of its own."""
        own = {
            MARK: str(self.base),
            FLOWER_SWITCH: "1",
            "FLWR_HOME": str(self.homes / home),
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.3",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "FEDKD_CACHE": str(self.homes / home / "cache"),
            "FEDKD_RUNS": str(self.homes / home / "runs"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        return {**os.environ, **own, **more}

    def superlink(self) -> list[str]:
        """Return the command of the SuperLink."""
        return self.deployment.superlink_command(self.base, self.deployment.address)

    def supernode(self, node: int) -> list[str]:
        """Return the command of a node."""
        keys, state = self.folder / "devices" / f"node-{node}", self.homes / f"node-{node}"
        return self.deployment.supernode_command(node, keys, self.data[node], state)

    def start_superlink(self) -> None:
        """Start the SuperLink and wait until it listens."""
        self._start(-1, self.superlink(), self.environment("superlink"))
        deadline = time.monotonic() + START_SECONDS
        while subprocess.run(
            [*self.inside(-1), sys.executable, "-c", _CONNECT, self.deployment.address, str(self.deployment.port)],
            capture_output=True,
            check=False,
        ).returncode:
            assert self.processes[-1].poll() is None, self.log(-1)
            assert time.monotonic() < deadline, self.log(-1)
            time.sleep(0.2)

    def register(self, nodes: Iterable[int]) -> None:
        """Let nodes' keys in: `flwr supernode register` for each, in one process."""
        keys = [str(self.folder / "server" / "nodes" / f"node-{node}.pub") for node in nodes]
        done = subprocess.run(
            [*self.inside(-1), sys.executable, "-c", _REGISTER, CONNECTION, *keys],
            env=self.environment("superlink") | {"FLWR_HOME": str(self.folder / "server" / "flower")},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def start_node(self, node: int, **more: str) -> None:
        """Start a node, with further variables in its environment."""
        command = self.supernode(node)
        if not self.inside(node):
            command += ["--port", str(free_port())]
        environment = self.environment(f"node-{node}", **more)
        if node in self.forked:
            environment["PATH"] = f"{self.base / 'bin'}{os.pathsep}{environment['PATH']}"
        self._start(node, command, environment)

    def kill(self, node: int) -> None:
        """Kill a node and all that it started, at once."""
        self.signal(node, signal.SIGKILL)
        self.processes.pop(node).wait()

    def signal(self, node: int, number: signal.Signals) -> None:
        """Send a signal to a node and all that it started."""
        first = psutil.Process(self.processes[node].pid)
        forked = psutil.Process(self.processes[APPS].pid).children(recursive=True) if APPS in self.processes else []
        mine = [process for process in forked if process.name() == f"node-{node}"]
        for process in (first, *first.children(recursive=True), *mine):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def fedkd(self, *words: str) -> subprocess.Popen[str]:
        """Start our command as on the server."""
        return self.start("fedkd", *words)

    def start(self, *command: str, node: int = -1) -> subprocess.Popen[str]:
        """Start any command as on the server (-1) or a node, in a folder of its own."""
        folder = self.base / "shell"
        folder.mkdir(exist_ok=True)
        return subprocess.Popen(
            [*self.inside(node), *command],
            env=self.environment("superlink" if node < 0 else f"node-{node}"),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def log(self, node: int) -> str:
        """Return what a node (-1: the SuperLink) has said so far."""
        return (self.base / f"log{node}").read_text(encoding="utf-8", errors="replace")

    def failed_apps(self) -> list[str]:
        """Return the forks that have failed so far: node, command and exit code of each."""
        path = self.base / "bin" / "failed"
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def end_apps(self) -> int:
        """End the process that forks, and return its exit code: not 0 if one of its forks has failed."""
        process = self.processes.pop(APPS)
        process.terminate()
        return process.wait(STOP_SECONDS)

    def close(self) -> None:
        """End every process of the lab, and remove their folders."""
        found = mine(self.base)
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        psutil.wait_procs(found, timeout=STOP_SECONDS)
        for process in mine(self.base):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for process in self.processes.values():
            process.wait(STOP_SECONDS)
        self.processes.clear()
        self._watchdog.communicate()

    def _start(self, node: int, command: list[str], environment: Mapping[str, str]) -> None:
        with (self.base / f"log{node}").open("ab") as log:
            self.processes[node] = subprocess.Popen(
                [*self.inside(node), *command],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )


def mine(base: Path) -> list[psutil.Process]:
    """Return the processes of the lab in a folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == str(base):
                found.append(process)
    return found


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


_REGISTER = """
import sys
from flwr.cli.app import app
for key in sys.argv[2:]:
    app(["supernode", "register", key, sys.argv[1]], standalone_mode=False)
"""
_CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=1).close()"
