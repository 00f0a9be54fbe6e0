"""What the session looks for at its end would be found."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from leftovers import leaving_nothing


def _process(undo: ExitStack) -> None:
    child = undo.enter_context(subprocess.Popen(["sleep", "600"]))
    undo.callback(child.kill)


def _orphan(undo: ExitStack) -> None:
    script = "import subprocess; print(subprocess.Popen(['sleep', '600'], start_new_session=True, stdout=2).pid)"
    pid = int(subprocess.check_output([sys.executable, "-c", script], stderr=subprocess.DEVNULL))
    undo.callback(os.kill, pid, 9)


def _port(undo: ExitStack) -> None:
    undo.enter_context(socket.create_server(("127.0.0.1", 0)))


def _file(undo: ExitStack) -> None:
    number, path = tempfile.mkstemp()
    os.close(number)
    undo.callback(Path(path).unlink)


def _flower(undo: ExitStack) -> None:
    home = Path(os.environ["FLWR_HOME"])
    home.mkdir()
    undo.callback(home.rmdir)


@pytest.mark.parametrize(
    ("leave", "said"),
    [(_process, "sleep 600"), (_orphan, "sleep 600"), (_port, "port "), (_file, "/tmp"), (_flower, "/flower")],
)
def test_what_remains_is_said(leave: Callable[[ExitStack], None], said: str) -> None:
    """A process, also one whose parent has ended; a port; a file; and what Flower keeps at home."""
    with ExitStack() as undo:
        undo.callback(lambda: folder.rmdir())
        with pytest.raises(AssertionError, match=f"left behind: .*{said}"), leaving_nothing(0) as folder:
            leave(undo)


def test_nothing_that_remains_is_nothing() -> None:
    """What ended in time, and was removed, is no finding; other environments are back as they were."""
    before = os.environ.get("TMPDIR")
    with leaving_nothing() as folder:
        subprocess.run(["sleep", "0"], check=True)
        with tempfile.TemporaryDirectory() as scratch:
            assert Path(scratch).parent == folder
    assert not folder.exists()
    assert os.environ.get("TMPDIR") == before
