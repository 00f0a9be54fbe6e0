"""Past one machine: the simulation engine on a Ray cluster that is there already, here one of two Ray nodes."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedkd.results import Run

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
SWEEP = ["sweep", "fedgen", "--over", "fedgen.temperature=1,4", "--seeds", "1", "--rounds", "2", "--clients", "6"]
SMALL = ["--clients-per-round", "4", "--set", "train.local-steps=2", "--set", "fedgen.generator-steps=2"]


def wait_for(port: int) -> None:
    """Wait until somebody listens on a port of this machine."""
    deadline = time.monotonic() + 60
    while True:
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                return
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture
def cluster() -> Iterator[tuple[str, list[psutil.Process]]]:
    """A Ray cluster of two nodes with a core each: its address, and the processes that hold the nodes."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # Ray's sockets lie far below it
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    # Ray's workers take ports from 10002 to 19999, the system gives from 32768 on
    common = ["--num-cpus", "1", "--object-store-memory", "100000000", "--disable-usage-stats", "--block"]
    head = ["--head", "--port", str(port), "--temp-dir", folder, "--include-dashboard", "false"]
    holders: list[psutil.Popen] = []
    try:
        for arguments in (head, ["--address", f"127.0.0.1:{port}"]):
            holders.append(
                psutil.Popen(
                    [str(BIN / "ray"), "start", *arguments, *common],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                )
            )
            wait_for(port)
        raylets: list[psutil.Process] = []
        deadline = time.monotonic() + 60
        while len(raylets) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.2)
            below = [child for holder in holders for child in holder.children(recursive=True)]
            raylets = [process for process in below if _is_raylet(process)]
        yield f"127.0.0.1:{port}", raylets
        assert all(process.is_running() for process in raylets)  # the cluster is not ours to end
    finally:
        everything = [child for holder in holders for child in holder.children(recursive=True)] + holders
        for holder in reversed(holders):
            holder.terminate()
        psutil.wait_procs(everything, timeout=10)
        for process in everything:
            if process.is_running():
                process.kill()
        psutil.wait_procs(everything, timeout=10)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_sweep_joins_a_ray_cluster(cluster: tuple[str, list[psutil.Process]], tmp_path: Path) -> None:
    """``RAY_ADDRESS`` is all it takes; both Ray nodes work, and the digests are those of one process."""
    address, raylets = cluster
    command = [str(BIN / "fedkd"), *SWEEP, *SMALL]
    there = [*command, "--engine", "simulation", "--nodes", "2", "--out", str(tmp_path / "there")]
    homes: set[int] = set()
    with psutil.Popen(there, env=os.environ | {"RAY_ADDRESS": address}, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            workers = [(raylet.pid, child) for raylet in raylets for child in raylet.children()]
            homes |= {pid for pid, child in workers if "ClientAppActor" in " ".join(_command(child))}
            time.sleep(0.1)
        assert process.returncode == 0, process.stdout.read()
    assert homes == {raylet.pid for raylet in raylets}
    subprocess.run([*command, "--out", str(tmp_path / "here")], check=True, stdout=subprocess.DEVNULL)
    runs = sorted(path.parent.relative_to(tmp_path / "here") for path in (tmp_path / "here").rglob("summary.json"))
    assert len(runs) == 2
    for run in runs:
        assert Run.open(tmp_path / "there" / run).digest() == Run.open(tmp_path / "here" / run).digest()


def test_a_cluster_that_is_not_there_is_said(tmp_path: Path) -> None:
    """One line, before anything starts."""
    command = [str(BIN / "fedkd"), "run", "fedavg", "--engine", "simulation", "--out", str(tmp_path / "run")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        done = subprocess.run(command, env=os.environ | {"RAY_ADDRESS": address}, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"RAY_ADDRESS = '{address}': no Ray cluster answers there" in done.stderr.replace("\n", " ")
    assert not (tmp_path / "run").exists()


def _is_raylet(process: psutil.Process) -> bool:
    return Path((_command(process) or [""])[0]).name == "raylet"


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
