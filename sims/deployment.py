"""The ``deployment`` engine: ``flwr run`` on a SuperLink that is there already, with devices that are there already.

The ServerApp runs on the SuperLink's machine and writes the results there, so ``fedkd run`` is said on that machine
too (or on one that shares its disk), and shows the progress from the result files like any other engine.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fedkd.config import Config
from fedkd.errors import UserError
from sims import hosts, watchdog
from sims.deploy import FLOWER
from sims.handout import CONNECTION
from sims.simulation import SimulationError, app_toml, tail

STOP_SECONDS = 30.0
_GONE = "Connection to the SuperLink is unavailable"
"""What Flower's command says."""


def connection(superlink: str) -> tuple[str, dict[str, str]]:
    """Return the name of a SuperLink in Flower's configuration, and the environment in which Flower finds it.

    Args:
        superlink: a folder of ``fedkd deploy init``, its ``server`` folder, or a name of the user's own configuration.

    Raises:
        UserError: a folder without Flower's configuration.
    """
    environment = os.environ | {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    folder = Path(superlink).expanduser()
    if not folder.is_dir():
        if os.sep in superlink:
            raise UserError(f"--superlink {superlink}: there is no such folder")
        return superlink, environment
    for place in (folder / "server" / FLOWER, folder / FLOWER):
        if (place / "config.toml").is_file():
            return CONNECTION, environment | {"FLWR_HOME": str(place.resolve())}
    raise UserError(f"--superlink {superlink}: the folder is none that `fedkd deploy init` wrote")


def run(configs: Sequence[Config], superlink: str) -> None:
    """Run experiments one after another in one Flower run on devices.

    Each one's ``run.dir`` receives its results; Flower's log is ``flower.log`` in the folder they share.  Interrupted,
    the run on the SuperLink is stopped too.  Killed, nothing of this is left here, and that run goes on.

    Args:
        configs: what to run.
        superlink: as for :func:`connection`.

    Raises:
        SimulationError: a run did not come to its end; the others may have.
    """
    name, environment = connection(superlink)
    folders = [Path(config.run.dir) for config in configs]
    log = Path(os.path.commonpath(folders)) / "flower.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        (folder / "error.txt").unlink(missing_ok=True)
    app = Path(tempfile.mkdtemp(prefix="fedkd-app-"))
    guard = watchdog.start(app)
    environment |= {watchdog.MARK: str(app)}
    try:
        home = environment.get("FLWR_HOME")
        owners = hosts.of_nodes(Path(home).parent, name, environment) if home else None
        (app / "pyproject.toml").write_text(app_toml(configs, owners), encoding="utf-8")
        _flwr_run(app, name, environment, log)
    except hosts.UnknownNodesError as error:
        log.write_text(f"{error}\n", encoding="utf-8")
        raise SimulationError(f"{_why(folders[0], log, superlink)} (log: {log})") from None
    finally:
        guard.communicate()  # it removes the folder
    for folder in folders:
        if not (folder / "summary.json").exists():
            raise SimulationError(f"{_why(folder, log, superlink)} (log: {log})")


def _why(folder: Path, log: Path, superlink: str) -> str:
    """Return why a run did not come to its end, and what to do where the server is to blame."""
    error = folder / "error.txt"
    if error.exists():
        return error.read_text(encoding="utf-8").strip()
    if _GONE in log.read_text(encoding="utf-8", errors="replace"):
        resume = f"fedkd resume {shlex.quote(str(folder))} --engine deployment --superlink {shlex.quote(superlink)}"
        return f"the SuperLink is gone; when it is back, `{resume}` goes on with a run that had begun"
    return tail(log)


def _flwr_run(app: Path, name: str, environment: dict[str, str], log: Path) -> None:
    """Start the run and wait for its end; stop it when this is interrupted."""
    with log.open("wb") as output:
        client = subprocess.Popen(
            ["flwr", "run", str(app), name, "--stream"],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        ended = False
        try:
            client.wait()
            ended = True
        finally:
            if client.poll() is None:
                client.kill()
                client.wait()
            if not ended:
                _stop(name, environment, log)


def _stop(name: str, environment: dict[str, str], log: Path) -> None:
    """Stop the run whose number Flower's log says."""
    found = re.search(r"started run (\d+)", log.read_text(encoding="utf-8", errors="replace"))
    if found:
        with contextlib.suppress(subprocess.SubprocessError):
            subprocess.run(
                ["flwr", "stop", found[1], name],
                env=environment,
                timeout=STOP_SECONDS,
                capture_output=True,
                check=False,
            )
