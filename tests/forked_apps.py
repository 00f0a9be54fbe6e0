"""Flower's processes on a device, started at once: forks of this process, which has loaded everything.

Flower starts `flower-superexec` for every SuperNode, and that starts `flwr-clientapp` for every message, which spends
seconds of a core on imports.  The commands that a lab puts in their place say here, in a line to a named pipe, where
they were to run and with which arguments; what then runs is Flower's own, in a process of its own.  A SuperNode itself
is Flower's, but looks for messages twice a second, not every three seconds.

Nobody waits for a fork, so this process notes in a file which of them ended with another code than 0, as one does that
raised, and when it is terminated ends with 1 if any did.  A fork that was killed has not failed.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from fedkd.config import defaults

COMMANDS = {
    "flower-superexec": ("flwr.supercore.cli", "flower_superexec"),
    "flwr-clientapp": ("flwr.supernode.cli", "flwr_clientapp"),
}
SCRIPT = '#!/bin/sh\necho "${{0##*/}} $FLWR_HOME $*" > "{orders}"\n'
"""In place of a command; it waits until somebody reads, and a line of this length is written at once."""
SUPERNODE = f"""\
#!{sys.executable}
import sys, time, types
from flwr.supernode import cli, start_client_internal
often = {{"sleep": lambda seconds: time.sleep(min(seconds, 0.5))}}
start_client_internal.time = types.SimpleNamespace(**(vars(time) | often))
sys.exit(cli.flower_supernode())
"""


RAISED = 70
"""Code of a fork that raised anything but SystemExit."""


def main() -> None:
    """Fork for every order."""
    folder = Path(sys.argv[1])
    for name in ("torch", "httpcore", "datasets", "clients.app", "fedkd.data"):
        importlib.import_module(name)
    defaults()  # of every method
    commands = {
        name: getattr(importlib.import_module(module), function) for name, (module, function) in COMMANDS.items()
    }
    gc.freeze()  # no fork looks through what is here already
    running: dict[int, str] = {}
    signals = {signal.SIGCHLD, signal.SIGTERM}

    def note(*_: object) -> None:
        for child in list(running):
            found, status = os.waitpid(child, os.WNOHANG)
            if found and (code := os.waitstatus_to_exitcode(status)) > 0:
                with (folder / "failed").open("a", encoding="utf-8") as failed:
                    failed.write(f"{running[child]} {code}\n")
            if found:
                del running[child]

    def end(*_: object) -> None:
        note()
        os._exit((folder / "failed").exists())

    signal.signal(signal.SIGCHLD, note)
    signal.signal(signal.SIGTERM, end)
    with os.fdopen(os.open(folder / "orders", os.O_RDWR)) as orders:  # being a writer too, it never comes to an end
        for order in orders:
            name, home, *words = order.split()
            signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # a child that ends at once is known by then
            if child := os.fork():
                running[child] = f"{Path(home).name} {name}"
                signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
                continue
            code = RAISED
            try:
                for number in signals:
                    signal.signal(number, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
                code = _be(commands[name], folder, home, [name, *words])
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)


def _be(command: Callable[[], object], folder: Path, home: str, words: list[str]) -> int:
    """Be one of Flower's commands, and return its exit code."""
    Path("/proc/self/comm").write_text(Path(home).name, encoding="utf-8")  # which node it is of
    os.environ |= {"FLWR_HOME": home, "FEDKD_CACHE": f"{home}/cache", "FEDKD_RUNS": f"{home}/runs"}
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
    sys.argv = words
    try:
        command()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def place(folder: Path) -> list[str]:
    """Write the commands into ``folder``, to be found before Flower's, and return what starts their server."""
    folder.mkdir()
    os.mkfifo(folder / "orders")
    script = SCRIPT.format(orders=folder / "orders")
    for name, text in {**dict.fromkeys(COMMANDS, script), "flower-supernode": SUPERNODE}.items():
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o700)
    return [sys.executable, __file__, str(folder)]


if __name__ == "__main__":
    main()
