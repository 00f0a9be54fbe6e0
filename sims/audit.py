"""What the models that a run ends with tell about who was in it: membership inference against each of them.

For every client that took part, its training images (members) stand against its test images (non-members), and where
the data set has images that nobody holds against those too.  Attacked are the global model, as each client has it, and
each client's personal model; the initial model, which has seen nobody, is the control.

Members and non-members are matched per client and class: a non-member counts as much as its client has members of its
class per non-member of it, and who has no counterpart is left out.  Else an attack could guess classes, or clients,
where their shares differ between the two splits, and pass that off as membership.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch.nn import functional

from clients.app import EVALUATION_BATCH, Worker
from fedkd.checkpoints import versions
from fedkd.config import Config
from fedkd.data import FederatedData, Shard, federate
from fedkd.device import single_thread
from fedkd.errors import UserError
from fedkd.files import write_whole
from fedkd.results import Row, Run
from fedkd.rng import Streams
from plots import style
from plots.audit import GRID, roc, table
from plots.tables import groups, markdown
from sims.adapt import Final, _config

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Predictor = Callable[[torch.Tensor], torch.Tensor]

RESAMPLES = 1000
"""Bootstrap samples behind an interval."""
MODELS = ("global", "personal", "initial")


@dataclass(frozen=True)
class Task:
    """A run to audit.

    Args:
        label: what tables and figures call it.
        config: its configuration; its data is at hand.
        run: the run.
    """

    label: str
    config: Config
    run: Run


def plan(runs: Sequence[Run], root: str = "") -> list[Task]:
    """Return what there is to do.

    Args:
        runs: finished runs of any methods and seeds.
        root: where the data is, if not where the run found it.

    Raises:
        UserError: a run that is not finished or damaged, or whose data is not here.
    """
    for run in runs:
        if run.config.data.partition == "devices":
            raise UserError(
                f"{run.folder} was made on devices, and the images that its models may have kept are there alone"
            )
        if not run.finished:
            raise UserError(f"{run.folder} is not finished; an audit is of what a run ends with")
    configs = {run.folder: _config(run, root) for run in runs}
    return [Task(group.label, configs[run.folder], run) for group in groups(runs) for run in group.runs]


def audit(task: Task, resamples: int = RESAMPLES) -> Row:
    """Attack the models of a run; return what ``audit.json`` holds.

    Raises:
        UserError: the clients' states are not those of the end of the run, or nothing can be matched.
    """
    single_thread()
    config = task.config
    known: Row = {"label": task.label, "method": config.run.method, "seed": config.run.seed}
    known |= {"partition_seed": config.data_seed, "resamples": resamples}
    scored = _scored(task)
    models: Row = {}
    for name, columns in scored.items():
        # the same resamples for every model, so that what they have in common does not tell them apart
        rng = Streams(config.run.seed).numpy("audit")
        models[name] = attack(**columns, rng=rng, resamples=resamples)
    return known | {"models": models}


def write(rows: Sequence[Row], tasks: Sequence[Task], folder: Path) -> tuple[pd.DataFrame, list[Path]]:
    """Write ``audit.json`` into each run's folder, and the table and figure of all; return the table and the files.

    Args:
        rows: what :func:`audit` returned, a row per task.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for row, task in zip(rows, tasks, strict=True):
        files.append(task.run.folder / "audit.json")
        write_whole(files[-1], (json.dumps(row, indent=1) + "\n").encode())
    found = table(rows)
    write_whole(folder / "table.csv", found.to_csv(index=False).encode())
    write_whole(folder / "table.md", f"{markdown(found)}\n".encode())
    return found, [*files, folder / "table.csv", folder / "table.md", *style.save(roc(rows), folder / "roc")]


def attack(
    values: dict[str, Floats],
    correct: npt.NDArray[np.bool_],
    member: npt.NDArray[np.bool_],
    stratum: Integers,
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
) -> Row:
    """Return how well scores tell members from non-members, each figure with its 95 % interval.

    Args:
        values: by name, what is higher for a suspected member ``[examples]``.
        correct: whether the model is right ``[examples]``.
        member: who is one ``[examples]``.
        stratum: the client and class that an example is matched within ``[examples]``.
        rng: draws the resamples.
        resamples: how many; 0: no intervals.

    Returns:
        numbers of members and non-members that have a counterpart, accuracies on both, for each score ``auc``,
        ``advantage`` and ``tpr_at_*``, and the ROC curve of the loss on :data:`plots.audit.GRID`.

    Raises:
        UserError: no member has a counterpart.
    """
    weights = matched(np.ones(len(member)), member, stratum)
    if not weights.any():
        raise UserError("no client that took part has test images of a class that it has training images of")
    found: Row = {"members": int((weights[member] > 0).sum()), "nonmembers": int((weights[~member] > 0).sum())}
    for name, who in (("train", member), ("test", ~member)):
        found[f"{name}_accuracy"] = _rounded(np.average(correct[who], weights=weights[who]))
    curves = {name: Curve(value, member) for name, value in values.items()}
    draws: dict[str, list[dict[str, float]]] = {name: [] for name in values}
    for _ in range(resamples):
        drawn = matched(_resampled(member, rng), member, stratum)
        for name, curve in curves.items() if drawn.any() else ():
            draws[name].append(curve.figures(drawn))
    for name, curve in curves.items():
        found[name] = {key: {"value": _rounded(value)} for key, value in curve.figures(weights).items()}
        for key, figure in found[name].items() if draws[name] else ():
            ends = np.quantile([draw[key] for draw in draws[name]], (0.025, 0.975))
            figure["interval"] = [_rounded(end) for end in ends]
    found["roc"] = [_rounded(curves["loss"].at(weights, level)) for level in GRID]
    return found


def matched(counts: Floats, member: npt.NDArray[np.bool_], stratum: Integers) -> Floats:
    """Return weights ``[examples]`` under which non-members have the members' clients and classes.

    Args:
        counts: how often each example is there ``[examples]``.
        member: who is one ``[examples]``.
        stratum: what is matched ``[examples]``.
    """
    inside = np.bincount(stratum, counts * member)[stratum]
    outside = np.bincount(stratum, counts * ~member)[stratum]
    both = (inside > 0) & (outside > 0)
    return np.where(both, np.where(member, counts, counts * inside / np.where(both, outside, 1.0)), 0.0)


class Curve:
    """ROC curves of one score, for any weights of the examples; ties are one point of the curve.

    Args:
        values: higher for a suspected member ``[examples]``.
        member: who is one ``[examples]``.
    """

    def __init__(self, values: Floats, member: npt.NDArray[np.bool_]) -> None:
        distinct, place = np.unique(-values, return_inverse=True)
        self._count, self._place, self._member = len(distinct), place, member

    def rates(self, weights: Floats) -> tuple[Floats, Floats]:
        """Return false and true positive rates ``[points]``, from (0, 0) to (1, 1)."""
        rates = []
        for who in (~self._member, self._member):
            found = np.cumsum(np.bincount(self._place[who], weights[who], self._count))
            rates.append(np.concatenate([[0.0], found / found[-1]]))
        return rates[0], rates[1]

    def figures(self, weights: Floats) -> dict[str, float]:
        """Return AUC, the best threshold's advantage (TPR - FPR), and TPR at an FPR of at most 1 % and 10 %."""
        fpr, tpr = self.rates(weights)
        return {
            "auc": float((np.diff(fpr) * (tpr[1:] + tpr[:-1])).sum() / 2),
            "advantage": float(np.max(tpr - fpr)),
            **{f"tpr_at_{percent}": _at(fpr, tpr, percent / 100) for percent in (1, 10)},
        }

    def at(self, weights: Floats, level: float) -> float:
        """Return the highest TPR whose FPR is at most ``level``; nothing is interpolated."""
        return _at(*self.rates(weights), level)


def _at(fpr: Floats, tpr: Floats, level: float) -> float:
    return float(tpr[fpr <= level + 1e-12].max())


def _resampled(member: npt.NDArray[np.bool_], rng: np.random.Generator) -> Floats:
    """Return how often each example is drawn, members and non-members apart: their numbers are not chance."""
    counts = np.zeros(len(member))
    for who in (np.flatnonzero(member), np.flatnonzero(~member)):
        counts[who] = np.bincount(rng.integers(0, len(who), len(who)), minlength=len(who))
    return counts


def scores(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return, per example, what is higher for a suspected member.

    ``loss``: ``log p_y``, minus the cross-entropy (Yeom et al. 2018).  ``entropy``: ``(1 - p_y) log p_y +
    sum_{k != y} p_k log(1 - p_k)``, minus the modified entropy (Song and Mittal 2021).

    Args:
        logits: ``[batch, classes]``.
        labels: ``[batch]``.
    """
    logs = functional.log_softmax(logits.double(), dim=1)
    p, own = logs.exp(), labels[:, None]
    # log(1 - p) without the cancellation of a confident model: the others' probabilities summed
    others = torch.stack([torch.cat([logs[:, :k], logs[:, k + 1 :]], dim=1).logsumexp(1) for k in range(p.shape[1])], 1)
    sums = p * others
    loss, rest = logs.gather(1, own)[:, 0], others.gather(1, own)[:, 0]
    return {"loss": loss, "entropy": rest.exp() * loss + sums.sum(1) - sums.gather(1, own)[:, 0]}


def _scored(task: Task) -> dict[str, Row]:
    """Return, for each model that there is, the arguments of :func:`attack` over all clients that took part."""
    config, run = task.config, task.run
    worker = Worker(_here(config, run.folder), run_id=0)
    final, spare = Final.of(config, run.folder), _spare(config)
    last = versions(run.folder, config.run.rounds)
    said = {row["client"]: row for row in run.rows("evaluations") if row["round"] == config.run.rounds}
    found: dict[str, list[dict[str, Any]]] = {}
    for client in sorted(last):
        train, test = (worker.shard(client, split) for split in ("train", "test"))
        parts = [(train, True), (test, False), (worker.data._shard(spare[client], worker.device), False)]
        for name, predict in _models(worker, final, client, last[client], train):
            columns = [_columns(predict, shard) for shard, _ in parts]
            if name != "initial":
                _check(columns[1], said.get(client, {}), name, client, run.folder)
            one = {key: np.concatenate([column[key] for column in columns]) for key in columns[0]}
            one["member"] = np.concatenate([np.full(len(shard), inside) for shard, inside in parts])
            one["stratum"] = client * worker.data.classes + one.pop("label")
            found.setdefault(name, []).append(one)
    joined = {}
    for name in (name for name in MODELS if name in found):
        whole = {key: np.concatenate([one[key] for one in found[name]]) for key in found[name][0]}
        values = {key: whole.pop(key) for key in ("loss", "entropy")}
        joined[name] = {"values": values, **whole}
    return joined


def _models(worker: Worker, final: Final, client: int, version: int, train: Shard) -> Iterator[tuple[str, Predictor]]:
    """Yield the models of a client, whose state is of round ``version``, each good until the next is asked for."""
    job = worker.job(worker.config.run.rounds, client, last_round=version)
    state = worker.state(client, version)
    models = worker.half.models(job, final.scoring, state, train)
    for name, model in (("global", models.shared), ("personal", models.personal)):
        if model is not None:
            yield name, model()
    job.load(job.initial_parameters, torch.zeros(0), None)
    yield "initial", job.predictor()


def _columns(predict: Predictor, shard: Shard) -> dict[str, npt.NDArray[Any]]:
    """Return what an attack sees of some images: labels, scores, and whether the model is right."""
    parts: dict[str, list[npt.NDArray[Any]]] = {"label": [], "correct": [], "loss": [], "entropy": []}
    for start in range(0, max(len(shard), 1), EVALUATION_BATCH):
        x, y = shard.batch(slice(start, start + EVALUATION_BATCH))
        logits = predict(x) if len(y) else torch.zeros(0, 2, device=y.device)
        seen = {"label": y, "correct": logits.argmax(dim=1) == y, **scores(logits, y)}
        for name, column in seen.items():
            parts[name].append(column.cpu().numpy())
    return {name: np.concatenate(columns) for name, columns in parts.items()}


def _check(test: dict[str, npt.NDArray[Any]], said: Row, name: str, client: int, folder: Path) -> None:
    """Compare a model's scores with those that the run ended with.

    Raises:
        UserError: they differ, or are not finite.
    """
    loss, expected = -float(test["loss"].sum()), said.get(f"{name}_loss_sum", math.nan)
    if not math.isclose(loss, expected, rel_tol=1e-3, abs_tol=1e-3):
        raise UserError(
            f"{folder}: the {name} model of client {client} is not what the run ended with (test loss {loss:g}, "
            f"and {expected:g} in evaluations.jsonl); is the folder state/ complete?"
        )


def _spare(config: Config) -> list[Integers]:
    """Return, for each client, positions of images that nobody holds, as its own share: no image goes to two.

    Of each class a client gets in proportion to its training images, and no more than these are.  Under the natural
    partition there are none: another writer's images differ from a client's in more than membership.
    """
    data = federate(config)
    if config.data.partition == "natural":
        return [np.zeros(0, dtype=np.int64)] * data.clients
    free = _free(config, data)
    shuffled = free[Streams(config.data_seed).numpy("audit").permutation(len(free))]
    counts = data.class_counts("train")
    shares: list[list[Integers]] = [[] for _ in range(data.clients)]
    for label in range(data.classes):
        rows, mine = shuffled[data.labels[shuffled] == label], counts[:, label]
        ends = np.cumsum(np.minimum(mine, len(rows) * mine // max(mine.sum(), 1)))
        for share, part in zip(shares, np.split(rows, ends)[:-1], strict=True):
            share.append(part)
    return [np.sort(np.concatenate(share)) for share in shares]


def _free(config: Config, data: FederatedData) -> Integers:
    """Return the positions in the pool that no client and no server saw, newcomers' among them."""
    seen = [data.set_aside, *data.train, *data.test]
    return np.setdiff1d(np.arange(len(data.labels)), np.concatenate(seen))


def _here(config: Config, folder: Path) -> Config:
    """Return the configuration with the run's folder as it is now, since the clients' states are in it."""
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": str(folder.resolve())})})


def _rounded(value: float) -> float:
    return round(float(value), 6)
