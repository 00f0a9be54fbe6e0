"""Flower's processes on a device, started at once: forks of this process, which has loaded everything.

Flower starts `flower-superexec` for every SuperNode, and that starts `flwr-clientapp` for every message, which spends
seconds of a core on imports.  The commands that a lab puts in their place say here, in a line to a named pipe, where
they were to run and with which arguments; what then runs is Flower's own, in a process of its own.  A SuperNode itself
is Flower's, but looks for messages twice a second, not every three seconds.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
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
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    with os.fdopen(os.open(folder / "orders", os.O_RDWR)) as orders:  # being a writer too, it never comes to an end
        for order in orders:
            name, home, *words = order.split()
            if os.fork():
                continue
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            Path("/proc/self/comm").write_text(Path(home).name, encoding="utf-8")  # which node it is of
            os.environ |= {"FLWR_HOME": home, "FEDKD_CACHE": f"{home}/cache", "FEDKD_RUNS": f"{home}/runs"}
            os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
            sys.argv = [name, *words]
            try:
                commands[name]()
            finally:
                os._exit(0)


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
