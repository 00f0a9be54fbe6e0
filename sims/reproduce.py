"""Published tables again: rows of settings, seeds, and the published value and the control beside ours.

``sims/<paper>/experiment.toml`` holds one table of a paper, or several, each with the settings that its rows share, its
scales, and for each row a method and what differs.  A table may repeat its rows over some settings.
``sims/<paper>/published.toml`` holds the published numbers with their sources.  Finished runs are used, not run again.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedkd.config import Config, Scalar
from fedkd.errors import UserError, nearest
from fedkd.files import write_whole
from fedkd.metrics import Floats
from fedkd.results import Run, spread

if TYPE_CHECKING:
    import pandas as pd

    from plots.style import CaptionedFigure
    from sims.launch import Engine

HOME = Path(__file__).resolve().parent
SCALES = ("smoke", "cpu", "paper")
"""Sizes of an experiment: a minute, what the project measured on two cores, and as published."""


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Args:
        name: its key, and the name of its runs.
        label: what the table calls it.
        method: registered name.
        settings: what differs from the other rows.
        runs: name of the row whose runs this one scores; its own, but where the same run gives two rows.
        score: whose accuracy: of the model a client would use (``personal``), or of the ``global`` one.
        control: whether it is a control and no method of the paper.
        against: names of the rows that it is compared with, seed by seed.
        published: the published value, or an empty string.
        line: in a table that is over some settings, the label without them.
        at: which of them this row has; empty: it stands for all.
    """

    name: str
    label: str
    method: str
    settings: Mapping[str, Scalar]
    runs: str
    score: Literal["personal", "global"]
    control: bool
    against: Sequence[str]
    published: str
    line: str
    at: str

    @property
    def look(self) -> str:
        """The method whose look it has in figures: the global model of ``fedavg_ft`` is FedAvg's."""
        return "fedavg" if (self.method, self.score) == ("fedavg_ft", "global") else self.method


@dataclass(frozen=True)
class Experiment:
    """A published table as settings, at one scale.

    Args:
        name: ``<paper>/<table>``.
        title: what it is.
        scale: one of :data:`SCALES`.
        metric: column of :func:`fedkd.metrics.by_round`: ``mean`` (clients equal) or ``weighted`` (by test examples).
        best_rounds: how many best rounds of each seed are averaged, as published values are; 0: those are of the last.
        last_rounds: how many last evaluated rounds are averaged, beside the last one, where single rounds swing.
        log: names of the clients' logged figures that the table shows, each client's last one, mean over clients, or
            ``milliseconds``: of a client's local training, the median of all.
        settings: keys that all rows share.
        rows: the rows of this scale.
        adapt_epochs: epochs for which clients that were held out adapt what each run ends with; the table is of them,
            an epoch in the place of a round.  0: it is of the runs' own clients.
        over: the settings over which the rows are repeated, each with its name in the table; empty: they are not.
        over_label: what is varied then, in figures.
        seeds: those that are run where no others are asked for.
        target: an accuracy in %, for which the table says in which round each row reaches it first; 0: for none.
        curves: names of the rows that are drawn round by round, and client by client; empty: all.
        published_of: what published values are of where that is not what this scale makes; empty: the same.
        not_measured: why the project has no results of it; empty: it has.
    """

    name: str
    title: str
    scale: str
    metric: str
    best_rounds: int
    last_rounds: int
    log: Sequence[str]
    settings: Mapping[str, Scalar]
    rows: Sequence[Row]
    adapt_epochs: int = 0
    over: Mapping[str, Mapping[str, Scalar]] = field(default_factory=dict)
    over_label: str = ""
    seeds: Sequence[int] = (1, 2, 3)
    target: float = 0
    curves: Sequence[str] = ()
    published_of: str = ""
    not_measured: str = ""

    @classmethod
    def read(cls, name: str, scale: str = "cpu") -> Experiment:
        """Read a table of ``sims/<paper>/experiment.toml``; the paper alone will do if it has one table.

        Raises:
            UserError: no such experiment or scale.
        """
        if scale not in SCALES:
            raise UserError(f"unknown scale '{scale}'{nearest(scale, SCALES)} (known: {', '.join(SCALES)})")
        name, raw = _find(name)
        if scale not in raw["scales"]:
            raise UserError(f"{name} has no scale '{scale}' (it has: {', '.join(raw['scales'])})")
        published = {
            number["row"]: str(number["value"])
            for number in _read(HOME / name.partition("/")[0] / "published.toml").get("number", [])
            if (number["table"], number["column"]) == (raw.get("published-table"), raw.get("published-column"))
        }
        return cls(
            name=name,
            title=raw["title"],
            scale=scale,
            metric=raw["metric"],
            best_rounds=raw.get("best-rounds", 0),
            last_rounds=raw.get("last-rounds", 1),
            log=raw.get("log", []),
            settings=raw["settings"] | raw["scales"][scale],
            rows=[
                _row(key, row, published)
                for key, row in _repeated(raw["rows"], raw.get("against", []), raw.get("over", {})).items()
                if scale in row.get("scales", SCALES)
            ],
            adapt_epochs=raw.get("adapt-epochs", 0),
            over=raw.get("over", {}),
            over_label=raw.get("over-label", ""),
            seeds=raw.get("seeds", cls.seeds),
            target=raw.get("target", cls.target),
            curves=raw.get("curves", cls.curves),
            published_of=raw.get("published-of", {}).get(
                scale, "full size" if published and scale == SCALES[0] else ""
            ),
            not_measured=raw.get("not-measured", ""),
        )

    @property
    def compared(self) -> str:
        """What a published value is compared with: ``milliseconds``, or what :attr:`counted` is."""
        return "milliseconds" if "milliseconds" in self.log else self.counted

    @property
    def counted(self) -> str:
        """Which accuracy of a run is the one that counts: ``last``, ``best`` or ``best_K``, of K rounds."""
        return {0: "last", 1: "best"}.get(self.best_rounds, f"best_{self.best_rounds}")

    @property
    def step(self) -> str:
        """What an evaluation is after."""
        return "epoch" if self.adapt_epochs else "round"

    def flat(self, row: Row, seed: int, overrides: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """Return the settings of one run."""
        return {**self.settings, **row.settings, **overrides, "run.method": row.method, "run.seed": seed}


def experiments() -> tuple[str, ...]:
    """Return the names of the experiments there are, ``<paper>/<table>``."""
    return tuple(
        f"{path.parent.name}/{table}" for path in sorted(HOME.glob("*/experiment.toml")) for table in _read(path)
    )


def title(name: str) -> str:
    """Return the title of an experiment, the scales it has, and whether the project has no results of it."""
    _, raw = _find(name)
    measured = f"; not measured: {raw['not-measured']}" if "not-measured" in raw else ""
    return f"{raw['title']} (scales: {', '.join(raw['scales'])}{measured})"


def _repeated(
    rows: Mapping[str, Mapping[str, Any]], against: Sequence[str], over: Mapping[str, Mapping[str, Scalar]]
) -> dict[str, Mapping[str, Any]]:
    """Return the rows with all that they are compared with, each repeated over some settings.

    A row that has these settings itself, or a method that they do not concern, is there once and stands for all.  Runs
    and comparisons are with the row of the same settings.
    """
    from fedkd.method import names

    keys = {key for settings in over.values() for key in settings}

    def concerned(row: Mapping[str, Any]) -> bool:
        mine = rows[row["runs"]] if "runs" in row else row
        others = set(names()) - {mine["method"]}
        return any(key.partition(".")[0] not in others and key not in mine.get("settings", {}) for key in keys)

    def named(name: str, at: str) -> str:
        return f"{name}-{re.sub(r'[^a-z0-9.]+', '-', at.lower())}" if at and concerned(rows[name]) else name

    found: dict[str, Mapping[str, Any]] = {}
    for name, row in rows.items():
        for at in over if concerned(row) else [""]:
            mine = {
                "label": f"{row['label']}, {at}" if at else row["label"],
                "settings": {} if "runs" in row else row.get("settings", {}) | over.get(at, {}),
                "runs": named(row.get("runs", name), at),
                "against": [named(other, at) for other in (*against, *row.get("against", [])) if other != name],
                "line": row["label"],
                "at": at,
            }
            found[named(name, at)] = {**row, **mine}
    return found


def _row(name: str, raw: Mapping[str, Any], published: Mapping[str, str]) -> Row:
    control = raw.get("control", False)
    return Row(
        name=name,
        label=raw["label"],
        method=raw["method"],
        settings=raw["settings"],
        runs=raw["runs"],
        score=raw.get("score", "personal"),
        control=control,
        against=[] if control else raw["against"],
        published=published[raw["published"]] if "published" in raw else "",
        line=raw["line"],
        at=raw["at"],
    )


def _find(name: str) -> tuple[str, dict[str, Any]]:
    """Return the full name of an experiment and what its file says of it."""
    known = experiments()
    mine = [other for other in known if name in (other, other.partition("/")[0])]
    if len(mine) > 1:
        raise UserError(f"'{name}' has several tables; name one: {', '.join(mine)}")
    if not mine:
        guess = nearest(name, [*known, *(other.partition("/")[0] for other in known)])
        raise UserError(f"unknown experiment '{name}'{guess} (known: {', '.join(known)})")
    paper, _, table = mine[0].partition("/")
    return mine[0], _table(_read(HOME / paper / "experiment.toml"), table)


def _table(tables: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a table of an ``experiment.toml``.

    One that is ``like`` another adds to its settings and rows; where it has ``keep``, it has only the rows named there.
    """
    own: dict[str, Any] = tables[name]
    if "like" not in own:
        return own
    base = _table(tables, own["like"])
    merged = {key: base[key] | own.get(key, {}) for key in ("settings", "rows")}
    merged["rows"] = {name: merged["rows"][name] for name in own.get("keep", merged["rows"])}
    return {**base, **own, **merged}


def _read(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def reproduce(
    experiment: Experiment,
    overrides: Mapping[str, Scalar],
    seeds: Sequence[int],
    out: Path,
    jobs: int,
    beside: Sequence[Path] = (),
    track: str = "",
    engine: Engine = "inline",
    nodes: int | None = None,
    cpus: int | None = None,
    gpus: float | None = None,
) -> dict[str, list[Run]]:
    """Run what is missing of an experiment and return every row's runs, a run per seed.

    Args:
        experiment: what to make again.
        overrides: settings that replace the experiment's (``data.root``, or fewer rounds for a trial).
        seeds: one run per row and seed.
        out: folder of the runs.
        jobs: inline runs at a time.
        beside: folders of other tables, whose finished runs are used where the settings are the same.
        track: where each round is shown as it ends (:mod:`sims.trackers`); empty: nowhere.
        engine: ``inline`` or ``simulation``, with the same results; a published table deals its data out itself.
        nodes: nodes of a run, as :func:`sims.launch.launch_all` takes them.
        cpus: CPU cores that the simulation reserves for a node; None: one.
        gpus: GPUs, or a share of one, that it reserves for a node; None: those there are, divided by the nodes.

    Raises:
        UserError: whatever is wrong with any of the runs, or what a node is to have is not there.
    """
    from sims.launch import launch_all, place_series, prepare

    folders: dict[str, list[str]] = {}
    waiting: list[Config] = []
    others = [Run(path.parent) for folder in beside for path in sorted(folder.glob("*/config.toml"))]
    made = {run.config.settings_hash(): run.folder for run in others if run.finished}
    for seed in seeds:
        for row in experiment.rows:
            if row.runs == row.name:
                config = prepare(experiment.flat(row, seed, overrides))
                folder = out / f"{row.name}-s{seed}"
                where = folder if folder.exists() else made.get(config.settings_hash(), folder)
                config, finished = place_series(config, where)
                folders.setdefault(row.name, []).append(config.run.dir)
                if not finished:
                    waiting.append(config)
    if waiting:
        launch_all(waiting, engine, nodes, jobs, cpus, gpus, track=track)
    opened = {name: [Run.open(folder) for folder in mine] for name, mine in folders.items()}
    if epochs := experiment.adapt_epochs:
        opened = {name: [_adapted(run, epochs, out / "newcomers") for run in mine] for name, mine in opened.items()}
    return {row.name: opened[row.runs] for row in experiment.rows}


@dataclass(frozen=True)
class Adapted(Run):
    """A run whose evaluations are those of its newcomers, epoch after epoch of adaptation (:mod:`sims.adapt`)."""

    newcomers: Sequence[Mapping[str, Any]] = ()

    @cached_property
    def evaluations(self) -> pd.DataFrame:
        """A row per newcomer with test images and epoch, which stands in the place of the round."""
        import pandas as pd

        frame = pd.DataFrame(self.newcomers).rename(columns={"epoch": "round"})
        frame = frame[frame["total"] > 0].copy()
        for kind in ("global", "personal", "accuracy"):
            frame[kind] = frame["correct"] / frame["total"]
        return frame

    def digest(self) -> str:
        """Return the sha256 of the newcomers' rows; equal digests mean equal results."""
        return hashlib.sha256(json.dumps(self.newcomers, sort_keys=True).encode()).hexdigest()


def _adapted(run: Run, epochs: int, folder: Path) -> Adapted:
    """Return a run with its newcomers' rows, which are kept in a folder; a run of ``local`` has the control's."""
    from rich.console import Console
    from rich.progress import track

    from sims.adapt import adapt, plan

    path = folder / f"{run.folder.name}.json"
    made_of = {"run": run.digest(), "epochs": epochs}
    if path.is_file() and (kept := json.loads(path.read_bytes()))["of"] == made_of:
        return Adapted(run.folder, run.label, kept["rows"])
    alone = run.config.run.method == "local"
    [task] = [task for task in plan([run]) if (task.folder is None) == alone]
    said, count = f"{run.folder.name}: newcomers", len(task.clients)
    each = track(adapt(task, epochs), said, count, console=Console(stderr=True), transient=True)
    rows = [row for one in each for row in one]
    folder.mkdir(exist_ok=True)
    write_whole(path, json.dumps({"of": made_of, "rows": rows}).encode())
    return Adapted(run.folder, run.label, rows)


Runs = Mapping[str, Sequence[Run]]
"""The runs of each row, by its name."""


def _curves(experiment: Experiment, row: Row, runs: Runs) -> list[Floats]:
    """Return, per seed, the accuracy in % at each evaluated round."""
    from fedkd.metrics import by_round

    return [100 * by_round(run.evaluations, row.score)[experiment.metric].to_numpy() for run in runs[row.name]]


def _best(experiment: Experiment, curve: Floats) -> Floats:
    """Return the best rounds of a seed, as many as are averaged."""
    best: Floats = curve[curve.argsort()[-max(experiment.best_rounds, 1) :]]
    return best


def _reached(experiment: Experiment, row: Row, runs: Runs) -> list[float]:
    """Return, per seed, the evaluated round that first has the accuracy that is asked for; NaN where none has."""
    from fedkd.metrics import by_round, rounds_to

    curves = [by_round(run.evaluations, row.score)[experiment.metric] for run in runs[row.name]]
    first = [rounds_to(curve, experiment.target / 100) for curve in curves]
    return [float("nan") if number is None else float(number) for number in first]


def table(experiment: Experiment, runs: Runs) -> pd.DataFrame:
    """Return the table, a line per row; accuracies in % of the clients' own test data.

    Columns: ``row``, ``published``, ``first`` (epoch, of newcomers: what they are given), ``last`` (round), ``tail``
    (mean of the ``last_rounds`` last), ``best`` (round, or mean of the ``best_rounds`` best), ``reached`` (round that
    first has the ``target``, where there is one; NaN unless every seed reaches it), ``worst`` (tenth of the clients)
    and ``deviation`` (over clients) at the last round, the logged figures, ``seeds``; ``*_std`` are sample deviations
    over seeds (NaN for one), but that of several best rounds is the deviation of all of them, as FedGen's tables have
    it.
    """
    import numpy as np
    import pandas as pd

    from fedkd.metrics import fairness
    from plots.tables import over_seeds

    lines = []
    for row in experiment.rows:
        curves = _curves(experiment, row, runs)
        line: dict[str, Any] = {
            "row": f"control: {row.label}" if row.control else row.label,
            "published": row.published or "-",
        }
        best = np.concatenate([_best(experiment, curve) for curve in curves])
        pooled = (float(best.mean()), float(best.std()))
        if experiment.adapt_epochs:
            line["first"], line["first_std"] = over_seeds([curve[0] for curve in curves])
        line["last"], line["last_std"] = over_seeds([curve[-1] for curve in curves])
        line["tail"], line["tail_std"] = over_seeds([curve[-experiment.last_rounds :].mean() for curve in curves])
        line["best"], line["best_std"] = pooled if experiment.best_rounds > 1 else over_seeds(best)
        if experiment.target:
            line["reached"], line["reached_std"] = over_seeds(_reached(experiment, row, runs))
        last = [fairness(100 * _last(run)[row.score].to_numpy(dtype=float)) for run in runs[row.name]]
        line["worst"], line["worst_std"] = over_seeds([figures["worst_decile"] for figures in last])
        line["deviation"], line["deviation_std"] = over_seeds([figures["deviation"] for figures in last])
        for name in experiment.log:
            line[name], line[f"{name}_std"] = over_seeds([_logged(run, name) for run in runs[row.name]])
        lines.append(line | {"seeds": len(curves)})
    return pd.DataFrame(lines)


def _last(run: Run) -> pd.DataFrame:
    last: pd.DataFrame = run.evaluations[run.evaluations["round"] == run.evaluations["round"].max()]
    return last


def _logged(run: Run, name: str) -> float:
    """Return the mean over clients of the figure that each logged when it last took part; NaN without it."""
    clients = run.frame("clients")
    if name == "milliseconds":
        return float(1000 * clients["seconds"].median())
    if f"{name}_sum" not in clients:
        return float("nan")
    last = clients.groupby("client").last()
    return float((last[f"{name}_sum"] / last[f"{name}_weight"]).mean())


def differences(experiment: Experiment, runs: Runs) -> pd.DataFrame:
    """Return the paired differences of rows, seed by seed, in percentage points, milliseconds or rounds.

    Columns: ``row``, ``against``, ``of`` (what published values are of, the last round, the mean of the ``last_rounds``
    last, and the round that first has the ``target``, where every seed reaches it), ``difference`` and its sample
    deviation over seeds, ``p`` of the paired t-test (NaN for one seed), ``corrected`` (p after Holm's correction over
    all rows that are compared with the same one, at all steps of what a table is over), ``higher`` (seeds in which the
    row is above the other) and ``seeds``.
    """
    import pandas as pd

    from plots.significance import holm
    from plots.tables import over_seeds, p_value

    by_name = {row.name: row for row in experiment.rows}
    lines, families = [], []
    for row in experiment.rows:
        for other in (by_name[name] for name in row.against):
            mine, theirs = _scores(experiment, row, runs), _scores(experiment, other, runs)
            for of in mine:
                values = [one - another for one, another in zip(mine[of], theirs[of], strict=True)]
                if any(value != value for value in values):  # a seed that never reaches the target
                    continue
                mean, deviation = over_seeds(values)
                line: dict[str, Any] = {"row": row.label, "against": other.label, "of": of}
                line |= {"difference": mean, "difference_std": deviation, "p": p_value(values), "corrected": 0.0}
                # Equal accuracies differ by what their means are rounded to.
                lines.append(line | {"higher": sum(value > 1e-9 for value in values), "seeds": len(values)})
                families.append((of, other.line))
    frame = pd.DataFrame(lines)
    if lines:
        frame["corrected"] = frame["p"].groupby(pd.Series(families)).transform(lambda p: holm(p.tolist()))
    return frame


def _scores(experiment: Experiment, row: Row, runs: Runs) -> dict[str, list[float]]:
    """Return what of a row is compared, by seed: what published values are of, and its accuracies in %."""
    curves, step = _curves(experiment, row, runs), experiment.step
    found = {}
    if experiment.compared == "milliseconds":
        found["milliseconds"] = [_logged(run, "milliseconds") for run in runs[row.name]]
    if experiment.best_rounds:
        found[_best_of(experiment)] = [float(_best(experiment, curve).mean()) for curve in curves]
    found[f"last {step}"] = [float(curve[-1]) for curve in curves]
    if (last := experiment.last_rounds) > 1:
        found[f"last {last} {step}s"] = [float(curve[-last:].mean()) for curve in curves]
    if experiment.target:
        found[_rounds_to(experiment)] = _reached(experiment, row, runs)
    return found


def _best_of(experiment: Experiment) -> str:
    """Name the best round, or several."""
    best = experiment.best_rounds
    return f"best {best} {experiment.step}s" if best > 1 else f"best {experiment.step}"


def _rounds_to(experiment: Experiment) -> str:
    """Name the round that first has the accuracy that is asked for."""
    return f"{experiment.step}s to {experiment.target:g} %"


def digests(experiment: Experiment, runs: Runs) -> pd.DataFrame:
    """Return row, seed, accuracy at the last and at the best round (%) and digest of every run.

    Between them stands what a published value is compared with, where that is something else
    (:attr:`Experiment.compared`), and the round ``reached`` that first has the ``target``, where there is one.
    """
    import pandas as pd

    return pd.DataFrame(
        {
            "row": row.name,
            "seed": run.config.run.seed,
            "last": round(float(curve[-1]), 4),
            "best": round(float(curve.max()), 4),
            experiment.compared: round(_compared(experiment, run, curve), 4),
            **({"reached": reached} if experiment.target else {}),
            "digest": run.digest(),
        }
        for row in experiment.rows
        for run, curve, reached in zip(
            runs[row.name],
            _curves(experiment, row, runs),
            _reached(experiment, row, runs),
            strict=True,
        )
    )


def _compared(experiment: Experiment, run: Run, curve: Floats) -> float:
    """Return what a published value is compared with (:attr:`Experiment.compared`)."""
    if experiment.compared == "milliseconds":
        return _logged(run, "milliseconds")
    return float(curve[-1] if experiment.compared == "last" else _best(experiment, curve).mean())


def side_by_side(experiment: Experiment, made: pd.DataFrame, column: str = "") -> CaptionedFigure:
    """Draw the table: ours over seeds, the published values and the controls beside each other.

    Args:
        experiment: the table.
        made: a line per row and seed with the columns ``row`` (its name) and ``seed``, as of :func:`digests`.
        column: what is drawn; empty: what published values are compared with.  Those stand beside that alone.
    """
    import pandas as pd

    from plots.rows import rows

    column = column or experiment.compared
    lines = _through(experiment)
    by_name = {row.name: row for row in experiment.rows}
    return rows(
        pd.DataFrame(
            {
                "row": row.line,
                "method": row.look,
                "control": row.control,
                "line": row.line in lines,
                "at": row.at,
                "published": row.published if column == experiment.compared else "",
                "seed": line["seed"],
                "value": line[column],
            }
            for line in made.to_dict("records")
            for row in [by_name[line["row"]]]
        ).sort_values("at", key=lambda at: at.map(["", *experiment.over].index), kind="stable", ignore_index=True),
        _measure(experiment, column),
        over=experiment.over_label,
        from_zero=column == "milliseconds",
        published_of=experiment.published_of,
    )


def _through(experiment: Experiment) -> set[str]:
    """Return the labels of the controls that all rows are compared with and whose score is that of most rows."""
    by_name = {row.name: row for row in experiment.rows}
    against = [{row.line, *(by_name[name].line for name in row.against)} for row in experiment.rows if row.against]
    scores = [row.score for row in experiment.rows]
    usual = max(scores, key=scores.count)
    return set.intersection({row.line for row in experiment.rows if row.control and row.score == usual}, *against)


def _measure(experiment: Experiment, column: str) -> str:
    """Return what a column of a table is, with its unit."""
    if column == "milliseconds":
        return "local training (milliseconds)"
    return f"accuracy in %, {f'last {experiment.step}' if column == 'last' else _best_of(experiment)}"


def write(experiment: Experiment, runs: Runs, out: Path) -> list[Path]:
    """Write tables (Markdown, CSV, LaTeX), digests and figures; equal runs give equal files.

    Returns:
        the files.
    """
    from plots import style
    from plots.convergence import Column, convergence
    from plots.fairness import fairness

    frames = {"table": table(experiment, runs), "differences": differences(experiment, runs)}
    texts = {name: _text(experiment, frame) for name, frame in frames.items() if len(frame)}
    files = {out / "table.md": "\n".join(_markdown(text) for text in texts.values())}
    files |= {out / f"{name}.tex": _latex(text) for name, text in texts.items()}
    files |= {out / f"{name}.csv": frames[name].to_csv(index=False) for name in texts}
    made = digests(experiment, runs)
    files[out / "runs.csv"] = made.to_csv(index=False)
    for path, content in files.items():
        path.write_text(content, encoding="utf-8")
    own = [(row, run) for row in experiment.rows if row.runs == row.name for run in runs[row.name]]
    trained = [(row, run) for row, run in own if not (experiment.adapt_epochs and row.method == "local")]
    drawn = [Run(run.folder, row.label) for row, run in trained if _is_drawn(experiment, row)]
    if experiment.over:
        figures = {"over": over(experiment, made)}
    else:
        column: Column = "weighted" if experiment.metric == "weighted" else "accuracy"  # as published values are
        figures = {
            "convergence": convergence(drawn, "round", column, _targets(experiment), settled=True),
            "fairness": fairness(drawn),
        }
    figures["rows"] = side_by_side(experiment, made)
    if _targets(experiment):
        figures["convergence"].caption += " Dotted: published values."
    if experiment.adapt_epochs:
        figures["newcomers"] = _newcomers([(row.label, run) for row, run in own if isinstance(run, Adapted)])
    if any(row.score == "global" for row in experiment.rows) and not experiment.over:
        figures["convergence-global"] = convergence(drawn, column="global", settled=True)
    for name, figure in figures.items():
        files |= dict.fromkeys(style.save(figure, out / name), "")
    return list(files)


def _is_drawn(experiment: Experiment, row: Row) -> bool:
    """Return whether a row is drawn round by round and client by client."""
    return not experiment.curves or row.name in experiment.curves


def _targets(experiment: Experiment) -> list[float]:
    """Return the published accuracies in [0, 1] of what is drawn round by round, if they are few enough to read."""
    from plots.rows import number

    shown = [row for row in experiment.rows if row.published and _is_drawn(experiment, row)]
    found = sorted({number(row.published)[0] / 100 for row in shown})
    of_rounds = not (experiment.over or experiment.adapt_epochs) and experiment.compared != "milliseconds"
    return found if of_rounds and len(found) <= 3 else []


def _newcomers(runs: Sequence[tuple[str, Adapted]]) -> CaptionedFigure:
    """Draw the newcomers' accuracy by epoch, under the rows' labels."""
    import pandas as pd

    from plots.adapt import adaptation

    return adaptation(pd.DataFrame({**row, "label": label} for label, run in runs for row in run.newcomers))


def over(experiment: Experiment, made: pd.DataFrame) -> CaptionedFigure:
    """Draw what the rows' last rounds are above the control that they are compared with first, seed by seed.

    Rows of global models are left out.

    Args:
        experiment: a table that is over some settings.
        made: a line per row and seed with the columns ``row`` (its name), ``seed`` and ``last``, as of :func:`digests`.
    """
    import pandas as pd

    from plots.sweep import gains

    last = {str(name): mine["last"].tolist() for name, mine in made.groupby("row", sort=False)}
    line = {row.name: row.line for row in experiment.rows}
    control = line[next(row.against[0] for row in experiment.rows if row.against)]
    alone = {row.at: last[row.name] for row in experiment.rows if row.line == control}
    above = pd.DataFrame(
        {"row": row.line, "method": row.method, "at": at, "gain": mine - its}
        for row in experiment.rows
        if row.score == "personal" and row.line != control
        for at in ([row.at] if row.at else experiment.over)
        for mine, its in zip(last[row.name], alone.get(at, alone.get("", [])), strict=True)
    )
    keys = dict.fromkeys(key for settings in experiment.over.values() for key in settings)
    return gains(above, experiment.over_label or ", ".join(keys), control)


_HEADINGS = {
    "first": "epoch 0",
    "worst": "worst tenth",
    "deviation": "deviation over clients",
    "against": "minus",
    "corrected": "p, Holm",
    "higher": "seeds above",
}


_WORDS = ("row", "minus", "of")


def _text(experiment: Experiment, frame: pd.DataFrame) -> list[list[str]]:
    """Return the lines of a table as text, headings first, ``mean ± deviation`` in one cell."""
    hidden = {"worst", "deviation"} if experiment.best_rounds > 1 else set()
    if experiment.last_rounds == 1:
        hidden.add("tail")
    if "of" in frame and frame["of"].nunique() == 1:
        hidden.add("of")
    headings = _HEADINGS | {
        "last": f"last {experiment.step}",
        "best": _best_of(experiment),
        "tail": f"last {experiment.last_rounds} {experiment.step}s",
        "reached": _rounds_to(experiment),
        "published": f"published ({experiment.published_of})" if experiment.published_of else "published",
    }
    columns = [name for name in frame.columns if not name.endswith("_std") and name not in hidden]
    lines = [[headings.get(name, name) for name in columns]]
    for row in frame.to_dict("records"):
        lines.append([_cell(name, row[name], row.get(f"{name}_std", float("nan"))) for name in columns])
    return lines


def _cell(name: str, value: Any, deviation: float) -> str:
    if isinstance(value, str):
        return value
    if value != value:
        return "-"
    if name in ("p", "corrected"):
        return f"{value:.3f}" if value >= 0.001 else "< 0.001"
    return f"{'+' * (name == 'difference' and value > 0)}{spread(value, deviation, 0 if isinstance(value, int) else 2)}"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    rule = ["---" if heading in _WORDS else "---:" for heading in lines[0]]
    return "".join(f"| {' | '.join(line)} |\n" for line in (lines[0], rule, *lines[1:]))


def _latex(lines: Sequence[Sequence[str]]) -> str:
    """Write a tabular for the booktabs package."""
    marks = str.maketrans({"%": r"\%", "_": r"\_", "&": r"\&", "±": r"$\pm$", "<": "$<$", ">": "$>$"})
    escaped = [[cell.translate(marks) for cell in row] for row in lines]
    body = [f"{' & '.join(row)} \\\\" for row in escaped]
    columns = "".join("l" if heading in _WORDS else "r" for heading in lines[0])
    parts = [f"\\begin{{tabular}}{{{columns}}}", "\\toprule", body[0], "\\midrule", *body[1:], "\\bottomrule"]
    return "\n".join([*parts, "\\end{tabular}\n"])
