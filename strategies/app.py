"""The Flower ServerApp: the same for every method and every engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from fedkd.config import Config
from fedkd.data import FederatedData, federate
from fedkd.data.devices import Federation, parse_clients
from fedkd.device import pick_device, single_thread
from fedkd.results import Recorder, Run, run_folder
from strategies.base import build
from strategies.devices import Devices, RefusalError
from strategies.grid import DEVICES_WAIT, PromptGrid

app = ServerApp()

SERIES = "series"
"""Key of a JSON list of configurations (flat keys) to run one after another, in place of one."""
HOSTS = "hosts"
"""Key of a JSON object with the clients that each node may host; where it is missing, any node may host any."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the configured experiment, or a series of them, and leave the results in each one's ``run.dir``.

    A ``run.dir`` that holds this very run, interrupted, goes on where it was.  A run that fails does not stop the
    series; the first failure is raised at its end.
    """
    single_thread()
    flat = dict(context.run_config)
    hosts = json.loads(str(flat.pop(HOSTS, "null")))
    series = json.loads(str(flat.pop(SERIES, "null"))) or [flat]
    methods = sorted({str(member["run.method"]) for member in series if "run.method" in member})
    allowed = None if hosts is None else {int(node): parse_clients(clients) for node, clients in hosts.items()}
    devices = Devices(PromptGrid(grid, DEVICES_WAIT), methods, allowed)
    failures = []
    for member in series:
        try:
            config = Config.from_flat(member)
            with said(config, context.run_id):
                if config.data.partition == "devices":
                    _run(config, devices.grid, context.run_id, devices.federation(config))
                else:
                    _run(config, PromptGrid(grid), context.run_id, federate(config))
        except Exception as error:
            failures.append(error)
    if failures:
        raise failures[0]


@contextmanager
def said(config: Config, run_id: int) -> Iterator[None]:
    """Leave the reason in the run's ``error.txt`` when the devices cannot do the run: nobody else says it there."""
    try:
        yield
    except RefusalError as error:
        folder = run_folder(config, run_id)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(f"{error}\n", encoding="utf-8")
        raise


def _run(config: Config, grid: Grid, run_id: int, data: FederatedData | Federation) -> None:
    folder = run_folder(config, run_id)
    strategy = build(config, data, pick_device(config.run.device))
    recorder = strategy.recorder = Recorder(folder, config, data.csv(), data.fingerprint())
    strategy.run_name = _name(Run(folder))
    try:
        left = strategy.resume(recorder.resume(strategy.state, strategy.setup.sizes))
        strategy.start(grid, ArrayRecord(), num_rounds=left, timeout=config.run.timeout)
        recorder.finish(strategy.state)
    except Exception as error:
        recorder.fail(error)
        raise
    finally:
        recorder.close()
    if not config.run.dir:  # nobody but us knows where the results are
        print(f"fedkd: results in {folder}", flush=True)


def _name(run: Run) -> str:
    """Return what devices call a run: the same when it goes on, wherever its folder is by then."""
    begun = f"{run.environment['started']} {run.config.settings_hash()}"
    return hashlib.sha256(begun.encode()).hexdigest()[:16]
