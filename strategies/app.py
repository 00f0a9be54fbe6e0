"""The Flower ServerApp: the same for every method and every engine."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from fedkd.config import Config
from fedkd.data import federate
from fedkd.device import pick_device, single_thread
from fedkd.results import Recorder, run_folder
from strategies.base import build
from strategies.grid import PromptGrid

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the configured experiment and leave its results in ``run.dir``."""
    single_thread()
    config = Config.from_flat(dict(context.run_config))
    folder = run_folder(config, context.run_id)
    data = federate(config)
    recorder = Recorder(folder, config, data.csv())
    try:
        strategy = build(config, data, pick_device(config.run.device), recorder)
        strategy.start(PromptGrid(grid), ArrayRecord(), num_rounds=config.run.rounds)
        recorder.finish(strategy.state)
    except Exception as error:
        recorder.fail(error)
        raise
    finally:
        recorder.close()
    if not config.run.dir:  # nobody but us knows where the results are
        print(f"fedkd: results in {folder}", flush=True)
