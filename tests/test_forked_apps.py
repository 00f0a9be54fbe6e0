"""Forks in the place of Flower's processes: one that fails is seen, one that is killed has not failed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import forked_apps
import pytest

pytestmark = pytest.mark.slow

WITH_OTHER_COMMANDS = """\
import os, sys, time, types
import forked_apps
from pathlib import Path

def flower_superexec():
    time.sleep(600)

def flwr_clientapp():
    how = sys.argv[1]
    if how == "raises":
        raise ValueError("mine")
    if how == "exits":
        sys.exit(3)
    Path(os.environ["FLWR_HOME"] + "-" + how).write_text(str(os.getpid()))
    if how == "waits":
        time.sleep(600)

sys.modules["other"] = types.ModuleType("other")
sys.modules["other"].__dict__.update(flower_superexec=flower_superexec, flwr_clientapp=flwr_clientapp)
forked_apps.COMMANDS = {name: ("other", function) for name, (_, function) in forked_apps.COMMANDS.items()}
sys.argv[0:1] = []
forked_apps.main()
"""


@pytest.mark.parametrize(
    ("orders", "failed"),
    [(["killed", "ends"], []), (["ends", "exits", "raises"], ["3", "70"])],
)
def test_a_fork_that_fails_is_noted_and_in_the_exit_code(tmp_path: Path, orders: list[str], failed: list[str]) -> None:
    folder = tmp_path / "bin"
    [_, program, _] = forked_apps.place(folder)
    command = [sys.executable, "-c", WITH_OTHER_COMMANDS, program, str(folder)]
    environment = os.environ | {"PYTHONPATH": str(Path(program).parent)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        for number, order in enumerate(orders):
            how = "waits" if order == "killed" else order
            home = tmp_path / f"node-{number}"
            subprocess.run([folder / "flwr-clientapp", how], env=environment | {"FLWR_HOME": str(home)}, check=True)
            if order == "killed":
                path = tmp_path / "node-0-waits"
                wait_for(lambda: path.exists() and path.read_text() != "")  # noqa: B023
                os.kill(int(path.read_text()), signal.SIGKILL)
            if order == "ends":
                wait_for((tmp_path / f"node-{number}-ends").exists)
        note = folder / "failed"
        wait_for(lambda: not failed or (note.exists() and len(note.read_text().splitlines()) == len(failed)))
    finally:
        process.terminate()
        _, said = process.communicate(timeout=30)
    assert process.returncode == int(bool(failed)), said
    expected = [f"node-{orders.index('exits' if code == '3' else 'raises')} flwr-clientapp {code}" for code in failed]
    assert (sorted(note.read_text().splitlines()) if failed else []) == sorted(expected)
    assert ("ValueError: mine" in said) == ("raises" in orders)


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
