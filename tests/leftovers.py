"""Nothing remains of the tests: no process, no port, no temporary file, whoever else runs what on this machine.

The session has a folder of its own for temporary files, also Flower's.  Every process that a test starts has it in its
environment, by which it is found, whoever is its parent by then.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from sims.watchdog import HOME, MARK, processes_of

_OF_PYTHON, _OF_PYTORCH = "multiprocessing.resource_tracker", "torchinductor_"
"""What may remain: a process that ends with this one, and a folder that PyTorch keeps for each user."""


@contextmanager
def leaving_nothing(seconds: float = 30.0) -> Iterator[Path]:
    """Give what runs in it a folder for temporary files, and look at its end whether anything remains.

    Args:
        seconds: time that processes have to end.

    Raises:
        AssertionError: something remains; the message says what.
    """
    folder = Path(tempfile.mkdtemp(prefix="ft-", dir=None if os.name == "nt" else "/tmp"))  # short, for Ray's sockets
    ports = _listening()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", None)
        patch.setenv(MARK, str(folder))
        patch.setenv(HOME, str(folder / "flower"))
        yield folder
    deadline = time.monotonic() + seconds
    while (left := _left(folder, ports)) and time.monotonic() < deadline:
        time.sleep(0.2)
    if not left:
        shutil.rmtree(folder)
    assert not left, f"the tests left behind: {'; '.join(left)}"


def _left(folder: Path, ports: set[int]) -> list[str]:
    """Return what remains of the processes and files of a session, and ports that this process listens at."""
    found = [f"port {port}" for port in sorted(_listening() - ports)]
    for process in processes_of(folder):
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if words and not any(_OF_PYTHON in word for word in words):  # one that has ended has no words
            found.append(f"process {process.pid} ({' '.join(words)[:200]})")
    return found + [str(path) for path in sorted(folder.iterdir()) if not path.name.startswith(_OF_PYTORCH)]


def _listening() -> set[int]:
    """Return the ports at which this process listens."""
    connections = psutil.Process().net_connections("inet")
    return {one.laddr.port for one in connections if one.status == psutil.CONN_LISTEN}
