"""Nothing outlives the process that started Flower: a helper waits for its death, whatever the cause, and cleans up.

It is a process of its own, since a process that is killed (SIGKILL, out of memory) can do nothing any more.  It holds
one end of a pipe whose other end only the watched process has, and reads until that end is gone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil

HOME, MARK = "FLWR_HOME", "FEDKD_WATCHED"
"""Variables, of which one is in the environment of every process that is started; its value is the folder they share.

Flower's own is that of a private SuperLink's processes; where Flower has another folder, ours is added.
"""


def start(home: Path) -> subprocess.Popen[bytes]:
    """Start the helper for the processes of a folder; closing its ``stdin``, or dying, sets it to work."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "sims.watchdog", str(home)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def processes_of(home: Path) -> list[psutil.Process]:
    """Return the processes that were started for the folder ``home``.

    They have it, or a folder in it, in their environment, or are in the session of which such a one is the leader:
    Ray's agents write their titles over their environments, and lose their parents when these are killed.
    """
    marked = [process for process in psutil.process_iter() if _has_home(process, home)]
    leaders = {process.pid for process in marked if _session(process) == process.pid}
    return [*marked, *(p for p in psutil.process_iter() if p not in marked and _session(p) in leaders)]


def _has_home(process: psutil.Process, home: Path) -> bool:
    try:
        own = process.environ()
    except psutil.Error:
        return False
    return any(mark in own and Path(own[mark]).is_relative_to(home) for mark in (HOME, MARK))


def _session(process: psutil.Process) -> int | None:
    """Return the session of a process; None: it has ended, or the system has no sessions."""
    try:
        return os.getsid(process.pid) if os.name == "posix" else None
    except OSError:
        return None


def _main() -> None:
    home = Path(sys.argv[1])
    sys.stdin.buffer.read()
    while processes := processes_of(home):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=1)
    shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    _main()
