"""Newcomers: clients that a run never saw get what it ended with, adapt it for some epochs, and are scored.

A newcomer is a client without state that takes part in the run's last round, with a number behind those of the run.
Epoch 0 is what it is given: the global model, or where there is none what the method gives a client that has never
taken part.  Then its method's own client half trains it: by ``adapt``, where there is one, in one go; else epoch e is
an ``update`` of its own, of e local epochs from what was given, after which the newcomer predicts as any client does,
with its own trained model in the place of the average.  The control ``local`` does the same from the initial model.

Nothing of the run is written to; a newcomer's draws are named by its number, so who else adapts does not matter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from clients.app import Worker, _score
from fedkd.config import Config
from fedkd.data import FederatedData, Shard, federate
from fedkd.data.federated import held_out
from fedkd.data.unseen import unseen_writers
from fedkd.device import pick_device, single_thread
from fedkd.errors import UserError
from fedkd.files import write_whole
from fedkd.payload import PayloadError, Record
from fedkd.results import Row, Run
from plots import style
from plots.adapt import adaptation, by_epoch, summary
from plots.tables import groups, markdown, repetition
from strategies import build

MODEL = ("parameters", "statistics")
"""Fields of updates and broadcasts that hold the model, or the part of it that travels."""


class AdaptationError(RuntimeError):
    """An adaptation that came to nothing; the message names the newcomer."""


@dataclass(frozen=True)
class Newcomers:
    """The newcomers' data.

    Args:
        first: the first one's number; the others follow.
        data: their images, in the order of their numbers.
    """

    first: int
    data: FederatedData

    def shard(self, client: int, split: str, device: torch.device) -> Shard:
        """Return a newcomer's ``train`` or ``test`` images on a device."""
        return self.data.shard(client - self.first, split, device)

    def who(self) -> tuple[int, str]:
        """Return what tells these newcomers from others: numbers, and examples per class."""
        return self.first, self.data.csv()


@dataclass(frozen=True)
class Task:
    """One run, or its control, with the newcomers that adapt.

    Args:
        label: what tables and figures call it.
        config: the run's configuration, or the control's.
        folder: the run's folder; None for the control, which starts where a run does.
        newcomers: all there are.
        clients: numbers of those that adapt.
    """

    label: str
    config: Config
    folder: Path | None
    newcomers: Newcomers
    clients: tuple[int, ...]


def plan(runs: Sequence[Run], clients: str = "", split: str = "", root: str = "") -> list[Task]:
    """Return what there is to do: each run, and beside it the control of the same settings, once.

    Args:
        runs: finished runs of any methods and seeds.
        clients: numbers and ranges such as ``20-24,30``; empty: all newcomers.
        split: the newcomers are the writers of this split of the data's folder; empty: those of ``data.newcomers``.
        root: where the data is, if not where the run found it.

    Raises:
        UserError: whatever is wrong, before anything has started.
    """
    configs = {run.folder: _config(run, root) for run in runs}
    newcomers = {run.folder: _newcomers(run, configs[run.folder], split) for run in runs}
    for run in runs:
        other = next(each for each in runs if repetition(each) == repetition(run))
        if newcomers[other.folder].who() != newcomers[run.folder].who():
            raise UserError(
                f"{other.folder} and {run.folder} have other newcomers at run.seed = {run.config.run.seed}; "
                "compare runs with equal data, run.clients and data.newcomers"
            )
    controls = {(repetition(run), _alone(configs[run.folder]).settings_hash()) for run in runs}
    one_each = len(controls) == len({repetition(run) for run in runs})
    tasks: dict[str, Task] = {}
    for group in groups(runs):
        control = "local" if one_each else f"local, as {group.label}"
        for run in group.runs:
            config, mine = configs[run.folder], newcomers[run.folder]
            chosen = _chosen(clients, mine, run)
            alone = _alone(config)
            if group.method != "local":
                tasks[config.settings_hash()] = Task(group.label, config, run.folder, mine, chosen)
            tasks.setdefault(alone.settings_hash(), Task(control, alone, None, mine, chosen))
    return list(tasks.values())


def adapt(task: Task, epochs: int) -> Iterator[list[Row]]:
    """Yield, for each newcomer, a row per epoch from 0: label, method, seeds, client, epoch, correct, total, loss_sum.

    The loss is the summed cross-entropy.  A newcomer without test images has a total of zero.

    Raises:
        AdaptationError: a newcomer's model diverged.
    """
    single_thread()
    config, worker = task.config, Worker(task.config, run_id=0)
    final = Final.of(config, task.folder)
    known = {
        "label": task.label,
        "method": config.run.method,
        "seed": config.run.seed,
        "partition_seed": config.data_seed,
    }
    for client in task.clients:
        rows = []
        train, test = (task.newcomers.shard(client, split, worker.device) for split in ("train", "test"))
        predictors = _predictors(worker, final, client, epochs, train)
        for epoch in range(epochs + 1):
            correct, loss = _score(partial(next, predictors), test)
            if not math.isfinite(loss):
                raise AdaptationError(
                    f"{task.label}: newcomer {client} diverged within {epoch} epochs; "
                    "a run with a smaller train.lr is the usual cure"
                )
            row = {"client": client, "epoch": epoch, "correct": correct, "total": len(test), "loss_sum": loss}
            rows.append(known | row)
        yield rows


def write(rows: Sequence[Row], folder: Path) -> tuple[pd.DataFrame, list[Path]]:
    """Write the rows (``adapt.jsonl``), their table and their figure; return the table by epoch, and the files.

    Raises:
        UserError: no newcomer has test images.
    """
    frame = pd.DataFrame(rows)
    summed = summary(frame)
    table = by_epoch(summed)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "adapt.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows).encode())
    write_whole(folder / "table.csv", summed.to_csv(index=False).encode())
    write_whole(folder / "table.md", f"{markdown(table)}\n".encode())
    figure = style.save(adaptation(frame), folder / "adapt")
    return table, [*(folder / name for name in ("adapt.jsonl", "table.csv", "table.md")), *figure]


@dataclass(frozen=True)
class Final:
    """What a run's server has for clients after its last round.

    Args:
        broadcast: for a client that trains.
        scoring: for a client that is scored.
        personal: ``(client)`` to what the server sends to that client alone, None for methods without.
    """

    broadcast: Record
    scoring: Record
    personal: Any

    @classmethod
    def of(cls, config: Config, folder: Path | None) -> Final:
        """Return it from the state that lies in a run's folder; without a folder, from the initial state.

        Raises:
            UserError: there is no final state, or not this run's.
        """
        strategy = build(config, federate(config), pick_device(config.run.device))
        half, setup, method, state = strategy.half, strategy.setup, strategy.method, strategy.state
        if folder is not None:
            path = folder / "final.safetensors"
            try:
                state = type(state)(**load_file(path)).check(setup.sizes, "the server")
            except (OSError, SafetensorError, TypeError, PayloadError) as error:
                raise UserError(f"{path} does not hold the final state of this run: {error}") from error
        sent = [setup, state, config.run.rounds]
        broadcast = half.broadcast(*sent)
        return cls(
            broadcast=broadcast,
            scoring=half.scoring(*sent) if method.Scoring else broadcast,
            personal=lambda client: half.personal(*sent, client) if method.Personal else None,
        )


def _predictors(worker: Worker, final: Final, client: int, epochs: int, shard: Shard) -> Iterator[Any]:
    """Yield what a newcomer predicts with at first and after each epoch, each good until the next is asked for."""
    half, config = worker.half, worker.config
    job = worker.job(config.run.rounds, client)

    def lasting(epochs: int) -> Any:
        train = config.train.model_copy(update={"local_steps": 0, "local_epochs": epochs})
        return replace(job, config=config.model_copy(update={"train": train}))

    given = half.models(job, final.scoring, None, shard)
    yield (given.shared or given.personal)()
    if hasattr(half, "adapt"):
        yield from half.adapt(lasting(epochs), final.broadcast, shard)
        return
    personal = final.personal(client)
    for epoch in range(1, epochs + 1):
        mine = lasting(epoch)
        outcome = half.update(replace(mine, personal=personal), final.broadcast, None, shard)
        models = half.models(mine, _with_own(final.scoring, outcome.update.tensors()), outcome.state, shard)
        yield (models.personal or models.shared)()


def _with_own(sent: Record, update: Mapping[str, Any]) -> Record:
    """Return what the server sent with the client's own trained model in the place of the average."""
    return replace(sent, **{name: update[name] for name in MODEL if name in update and name in sent.specs()})


def _config(run: Run, root: str) -> Config:
    """Return the configuration of a finished run whose data and final state are at hand."""
    if not run.finished:
        raise UserError(f"{run.folder} is not finished; newcomers get what a run ends with")
    config = run.config
    if root:
        place = str(Path(root).expanduser().resolve())
        config = config.model_copy(update={"data": config.data.model_copy(update={"root": place})})
    if federate(config).fingerprint() != run.data:
        raise UserError(
            f"{run.folder} was made with other data than the {config.data.name} at hand; "
            "name the right folder with --root"
        )
    Final.of(config, run.folder)
    return config


def _newcomers(run: Run, config: Config, split: str) -> Newcomers:
    if split:
        first = config.run.clients + config.data.newcomers
        return Newcomers(first, unseen_writers(config, federate(config).images, split))
    if not config.data.newcomers:
        raise UserError(
            f"{run.folder} held no clients out (data.newcomers = 0); run with --set data.newcomers=N, or name a split "
            "of unseen writers with --split"
        )
    return Newcomers(config.run.clients, held_out(config))


def _chosen(text: str, newcomers: Newcomers, run: Run) -> tuple[int, ...]:
    """Return the numbers that ``20-24,30`` names, in ascending order; all for an empty text."""
    first, count = newcomers.first, newcomers.data.clients
    if not text:
        return tuple(range(first, first + count))
    chosen: set[int] = set()
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not (low.isdecimal() and (high.isdecimal() or not dash)) or int(high or low) < int(low):
            raise UserError(f"--clients '{text}': '{part.strip()}' is no number and no range such as 20-24")
        if int(low) < first or int(high or low) >= first + count:
            raise UserError(f"--clients '{text}': the newcomers of {run.folder} are {first} to {first + count - 1}")
        chosen |= set(range(int(low), int(high or low) + 1))
    return tuple(sorted(chosen))


def _alone(config: Config) -> Config:
    """Return the control's configuration: every client alone, with all settings that its training depends on."""
    flat = config.flat()
    kept = [key for key in flat if key.startswith(("data.", "model.", "train."))]
    kept += ["run.seed", "run.rounds", "run.clients", "run.device", "run.dir"]
    return Config.from_flat({key: flat[key] for key in kept} | {"run.method": "local", "run.clients-per-round": 0})
