"""Trackers: each round of a run, as it ends, in TensorBoard, Weights & Biases or MLflow.

They are fed by the launching process from the result files, like the progress display, so the engines know nothing of
them.  A tracker is a :class:`Tracker`; :data:`TRACKERS` says how each is opened and which package it needs.  A run
that goes on after an interruption is shown anew, with all its rounds.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console

from fedkd.config import Config
from fedkd.errors import UserError
from fedkd.results import Run
from sims.follow import Figures, Follower, alongside

INTERVAL = 1.0


class Tracker(Protocol):
    """Where the rounds of one run are shown."""

    def log(self, round: int, figures: Figures) -> None:
        """Show a round; the figures are those of :meth:`sims.follow.Follower.new`, without those that are NaN."""

    def close(self, finished: bool) -> None:
        """Say that no more rounds come, and whether the run came to its end."""


class TensorBoard:
    """Event files in the folder ``tensorboard`` of the run: ``tensorboard --logdir`` of any folder above shows them."""

    def __init__(self, config: Config) -> None:
        from tensorboardX import SummaryWriter

        folder = Path(config.run.dir) / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that goes on: all its rounds come again
        self._writer = SummaryWriter(str(folder), write_to_disk=True)
        self._writer.add_text("settings", "".join(f"    {line}\n" for line in config.toml().splitlines()))

    def log(self, round: int, figures: Figures) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, round)
        self._writer.flush()

    def close(self, finished: bool) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, in the project ``fedkd`` or ``$WANDB_PROJECT``."""

    def __init__(self, config: Config) -> None:
        import wandb

        folder = Path(config.run.dir)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fedkd"),
            group=folder.parent.name,
            name=folder.name,
            dir=folder,
            config=config.flat(),
            reinit="create_new",  # several runs go at a time
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, round: int, figures: Figures) -> None:
        self._run.log(dict(figures), step=round)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class MLflow:
    """A run of MLflow, in the experiment ``fedkd`` or ``$MLFLOW_EXPERIMENT_NAME`` of ``$MLFLOW_TRACKING_URI``."""

    def __init__(self, config: Config) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fedkd")
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        self._id = self._client.create_run(experiment, run_name=Path(config.run.dir).name).info.run_id
        settings = list(config.flat().items())
        for first in range(0, len(settings), 100):  # MLflow takes no more at a time
            some = settings[first : first + 100]
            self._client.log_batch(self._id, params=[Param(key, str(value)) for key, value in some])

    def log(self, round: int, figures: Figures) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self._id, [Metric(name, value, now, round) for name, value in figures.items()])

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


TRACKERS: dict[str, tuple[str, Callable[[Config], Tracker]]] = {
    "tensorboard": ("tensorboardX", TensorBoard),
    "wandb": ("wandb", WandB),
    "mlflow": ("mlflow", MLflow),
}
"""By name: the package that is needed, and what opens the tracker of a run."""


def require(name: str) -> None:
    """Check that a tracker can be had.

    Raises:
        UserError: its package is not installed, or it wants a login that is not there.
    """
    package, _ = TRACKERS[name]
    if importlib.util.find_spec(package) is None:
        raise UserError(f'--track {name} needs the package {package}: pip install "fedkd[{name}]"')
    if name == "wandb" and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        try:  # asks for the key on a terminal, here rather than under the progress display
            known = wandb.login()
        except wandb.Error as error:
            raise UserError(f"--track wandb: {_line(error)} (WANDB_MODE=offline needs no login)") from error
        if not known:
            raise UserError("--track wandb: `wandb login` first, or set WANDB_MODE=offline to stay on this machine")


@dataclass
class _Tracked:
    config: Config
    follower: Follower
    tracker: Tracker | None = None
    last: int = 0


@contextmanager
def tracking(configs: Sequence[Config], name: str, console: Console) -> Iterator[None]:
    """Show the rounds of runs in a tracker while the block runs.

    A tracker that fails is given up, with one warning for all runs; the runs go on.

    Args:
        configs: the runs; each ``run.dir`` is where its results appear.
        name: of :data:`TRACKERS`; empty: none.
        console: for the warning.

    Raises:
        UserError: the tracker cannot be had; the block has not begun.
    """
    if not name:
        yield
        return
    require(name)
    runs = [_Tracked(config, Follower(Path(config.run.dir))) for config in configs]
    with alongside(_track, runs, name, console):
        yield


def _track(runs: Sequence[_Tracked], name: str, console: Console, stop: threading.Event) -> None:
    try:
        ended = False
        while not ended:
            ended = stop.wait(INTERVAL)
            for run in runs:
                _pass_on(run, name, ended)
    except Exception as error:  # whatever another's program raises: the runs are worth more
        said = f"fedkd: --track {name} failed and is given up; the runs go on: {_line(error)}"
        console.print(said, style="yellow", markup=False, soft_wrap=True)
        for run in runs:
            if run.tracker is not None:
                with suppress(Exception):
                    run.tracker.close(False)


def _pass_on(run: _Tracked, name: str, ended: bool) -> None:
    """Show what a run has done since the last time, and close its tracker when no more can come."""
    finished = Run(run.follower.folder).finished
    for round, figures in run.follower.new():
        if run.tracker is None:
            run.tracker = TRACKERS[name][1](run.config)
        if round > run.last:  # a run that went on cut its logs back, and they come again
            run.last = round
            run.tracker.log(round, {key: value for key, value in figures.items() if value == value})
    if run.tracker is not None and (ended or finished):
        run.tracker.close(finished)
        run.tracker = None


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
