"""Going on with an interrupted run: what is checked before anything starts, and what the user is told."""

from __future__ import annotations

from pathlib import Path

from fedkd import checkpoints
from fedkd.config import Config
from fedkd.errors import UserError
from fedkd.results import Run, check_goes_on, environment, lock, started
from sims.launch import checked, in_folder


def going_on(folder: Path, root: Path | None = None) -> tuple[Config, list[str]]:
    """Return the configuration of an interrupted run, to be launched again, and what to tell the user about it.

    Args:
        folder: the run's folder, wherever it is by now.
        root: where the data is by now; None: where it was.

    Raises:
        UserError: no run there, a finished one, one that another process writes, or one that cannot go on here: its
            settings, data or version of fedkd are not what it was begun with.
    """
    from fedkd.data import federate
    from fedkd.device import pick_device
    from strategies import build

    if not started(folder):
        raise UserError(f"{folder} holds no run to go on with; `fedkd run METHOD --out {folder}` begins one there")
    lock(folder).close()
    run = Run(folder)
    config = in_folder(checked(run.config.flat() | ({"data.root": str(root)} if root else {})), folder)
    if config.data.partition == "devices":  # the server compares their data, when it has asked them
        check_goes_on(folder, config, run.data)
        return config, ["going on from the last checkpoint", *_differences(run)]
    data = federate(config)
    strategy = build(config, data, pick_device(config.run.device))
    check_goes_on(folder, config, data.fingerprint())
    found = checkpoints.newest(folder, strategy.state, strategy.setup.sizes, config.run.eval_every)
    said = [f"the checkpoint of round {round} does not count: {why}" for round, why in found.unusable.items()]
    where = f"going on after round {found.round} of {config.run.rounds}"
    said.append(where if found.round else "there is no checkpoint to go on after; beginning again")
    return config, said + _differences(run)


def _differences(run: Run) -> list[str]:
    """Say where this installation and machine differ from the run's in what numbers may depend on."""
    then, now = run.environment, environment()
    before = {"processor": then.get("processor"), **then.get("packages", {})}
    after = {"processor": now["processor"], **now["packages"]}
    return [
        f"{name} was {before.get(name)} and is {after[name]}: the numbers may differ from an uninterrupted run's"
        for name in ("torch", "numpy", "processor")
        if before.get(name) != after[name]
    ]
