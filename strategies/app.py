"""The Flower ServerApp: the same for every method and every engine."""

from __future__ import annotations

import json

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from fedkd.config import Config
from fedkd.data import federate
from fedkd.device import pick_device, single_thread
from fedkd.results import Recorder, run_folder
from strategies.base import build
from strategies.grid import PromptGrid

app = ServerApp()

SERIES = "series"
"""Key of a JSON list of configurations (flat keys) to run one after another, in place of one."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the configured experiment, or a series of them, and leave the results in each one's ``run.dir``.

    A run that fails does not stop the series; the first failure is raised at its end.
    """
    single_thread()
    flat = dict(context.run_config)
    series = json.loads(str(flat.pop(SERIES, "null"))) or [flat]
    failures = []
    for member in series:
        try:
            _run(Config.from_flat(member), PromptGrid(grid), context.run_id)
        except Exception as error:
            failures.append(error)
    if failures:
        raise failures[0]


def _run(config: Config, grid: Grid, run_id: int) -> None:
    folder = run_folder(config, run_id)
    data = federate(config)
    strategy = build(config, data, pick_device(config.run.device))
    recorder = strategy.recorder = Recorder(folder, config, data.csv(), data.fingerprint())
    try:
        strategy.start(grid, ArrayRecord(), num_rounds=config.run.rounds)
        recorder.finish(strategy.state)
    except Exception as error:
        recorder.fail(error)
        raise
    finally:
        recorder.close()
    if not config.run.dir:  # nobody but us knows where the results are
        print(f"fedkd: results in {folder}", flush=True)
