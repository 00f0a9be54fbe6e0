"""One page of any runs: a single HTML file that needs nothing else, neither a network nor this program.

Everything that comes from files travels as JSON and reaches the page as text, never as HTML; the page's policy allows
only the script and the style that are written here.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedkd.errors import UserError
from fedkd.results import Run, spread
from plots import clients, style
from plots.convergence import By, Column, curve
from plots.significance import CONTROLS, LEVEL, claims, controls
from plots.tables import Group, comparison, describe, groups

_HOME = Path(__file__).resolve().parent
_CURVES: dict[Column, str] = {
    "accuracy": "mean client accuracy (%)",
    "global": "global model accuracy (%)",
    "worst_decile": "accuracy of the worst tenth (%)",
}
_AXES: dict[By, tuple[str, float]] = {
    "round": ("communication round", 1.0),
    "bytes": ("bytes sent, up and down, all clients (MB)", 1e6),
    "seconds": ("wall-clock time, evaluations included (s)", 1.0),
}
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src '{script_hash}'; style-src '{style_hash}'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<noscript>This page draws its tables and figures with JavaScript, which is switched off here.</noscript>
<main id="page"></main>
<div id="tip" role="status" hidden></div>
<script id="data" type="application/json">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def report(runs: Sequence[Run]) -> str:
    """Return the page as HTML: claims with what they rest on, tables, figures, and in what the runs differ.

    Args:
        runs: runs of one or more methods and seeds.

    Raises:
        UserError: no runs, a run without an evaluation, or one that is there twice.
    """
    content = collect(runs)
    data = json.dumps(_plain(content), allow_nan=False, separators=(",", ":"))
    for sign in "<>&":  # nothing in the data can end the element that holds it
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    script, sheet = ((_HOME / f"report.{suffix}").read_text(encoding="utf-8") for suffix in ("js", "css"))
    return _PAGE.format(
        title=html.escape(content["title"]),
        style=sheet,
        script=script,
        style_hash=_hash(sheet),
        script_hash=_hash(script),
        data=data,
    )


def collect(runs: Sequence[Run]) -> dict[str, Any]:
    """Return what the page shows, as numbers and texts; its arguments and errors are those of :func:`report`."""
    found = groups(runs)
    of = {run.folder: number for number, group in enumerate(found) for run in group.runs}
    methods = len({group.method for group in found})
    summaries = [run.summary() for run in runs]
    return {
        "title": f"{_count(len(runs), 'run')} of {_count(methods, 'method')}",
        "about": describe(runs),
        "groups": [{"label": group.label, **_look(group)} for group in found],
        "claims": _claims(runs, found),
        "tables": {
            "methods": _methods(runs),
            "runs": _runs(runs, summaries, of),
            "settings": _settings(runs, of),
            "common": _common(runs),
        },
        "curves": {"names": _CURVES, "axes": {by: label for by, (label, _) in _AXES.items()}, "lines": _lines(found)},
        "clients": [_clients(run, runs, of[run.folder]) for run in runs],
        "costs": [
            {
                "group": of[run.folder],
                "seed": run.config.run.seed,
                "megabytes": (summary["bytes_up"] + summary["bytes_down"]) / 1e6,
                "accuracy": 100 * summary["last"],
            }
            for run, summary in zip(runs, summaries, strict=True)
        ],
    }


@dataclass(frozen=True)
class _Column:
    """A column of a table: its name, and of each row what is shown and what it is sorted by."""

    name: str
    shown: Sequence[str]
    order: Sequence[float | str | None]


def _table(columns: Sequence[_Column], rows: Sequence[int | None]) -> dict[str, Any]:
    """Return a table; ``rows`` are the groups that its rows belong to, None for none."""
    return {"columns": [{"name": c.name, "shown": c.shown, "order": c.order} for c in columns], "rows": rows}


def _texts(name: str, values: Sequence[str]) -> _Column:
    return _Column(name, values, values)


def _numbers(name: str, values: Sequence[float], digits: int, deviations: Sequence[float] = ()) -> _Column:
    nothing = [float("nan")] * len(values)
    shown = [
        "–" if value != value else spread(value, deviation, digits)
        for value, deviation in zip(values, deviations or nothing, strict=True)
    ]
    return _Column(name, shown, [float(value) for value in values])


def _claims(runs: Sequence[Run], found: Sequence[Group]) -> dict[str, Any]:
    """Return a row per method and control, in words and numbers, and what all of them rest on."""
    number = {group.label: place for place, group in enumerate(found)}
    made, notes = [], []
    for control in controls(runs):
        try:
            made += claims(runs, control)
        except UserError as error:
            notes.append(f"Nothing is said against {control}: {error}.")
    if not controls(runs):
        notes.append(f"There is no control among the runs ({', '.join(CONTROLS)}), so nothing is claimed.")
    elif not made and not notes:
        notes.append("No other method has a seed and the clients in common with a control, so nothing is claimed.")
    intervals = [
        "–" if math.isnan(claim.half) else f"{claim.mean - claim.half:+.2f} to {claim.mean + claim.half:+.2f}"
        for claim in made
    ]
    seeds = [", ".join(f"{seed}: {value:+.2f}" for (seed, _), value in claim.differences.items()) for claim in made]
    means = [claim.mean for claim in made]
    table = _table(
        [
            _texts("method", [claim.label for claim in made]),
            _texts("control", [claim.control for claim in made]),
            _texts("verdict", [claim.verdict for claim in made]),
            _Column("difference (points)", [_signed(claim.mean, claim.std) for claim in made], means),
            _Column("95 % interval", intervals, [claim.mean - claim.half for claim in made]),
            _numbers("p, corrected", [claim.corrected for claim in made], 3),
            _numbers("p", [claim.p for claim in made], 3),
            _numbers("seeds", [len(claim.differences) for claim in made], 0),
            _Column("by seed", seeds, [claim.mean for claim in made]),
        ],
        [number[claim.label] for claim in made],
    )
    basis = (
        "A difference is the mean client accuracy of the method minus that of the control, in percentage points, of "
        "two runs with the same seed and the same clients, at the last round that both evaluated. ± is the sample "
        "standard deviation over seeds; the interval and p are those of the paired t-test, and p is then corrected "
        "after Holm for the number of methods that are compared with one control. A verdict needs a corrected p below "
        f"{LEVEL:g}."
    )
    return {"table": table, "basis": basis, "notes": notes}


def _signed(mean: float, deviation: float) -> str:
    return f"{mean:+.2f}" if deviation != deviation else f"{mean:+.2f} ± {deviation:.2f}"


def _methods(runs: Sequence[Run]) -> dict[str, Any]:
    frame = comparison(runs)

    def column(name: str, key: str, digits: int = 2) -> _Column:
        deviations = frame[f"{key}_std"].tolist() if f"{key}_std" in frame else ()
        return _numbers(name, frame[key].tolist(), digits, deviations)

    columns = [
        _texts("method", frame["method"].tolist()),
        column("seeds", "seeds", 0),
        column("last round (%)", "last"),
        column("best round (%)", "best"),
        column("global model (%)", "global_last"),
        column("worst tenth (%)", "worst_decile"),
        column("deviation over clients (points)", "deviation"),
        column("clients hurt", "hurt", 1),
        column("MB", "megabytes"),
        column("seconds", "seconds", 1),
        column("rounds", "rounds", 0),
    ]
    return _table(columns, list(range(len(frame))))


def _runs(runs: Sequence[Run], summaries: Sequence[dict[str, Any]], of: dict[Path, int]) -> dict[str, Any]:
    def numbers(name: str, value: Callable[[dict[str, Any]], float], digits: int) -> _Column:
        return _numbers(name, [value(summary) for summary in summaries], digits)

    columns = [
        _texts("method", [run.config.run.method for run in runs]),
        _numbers("seed", [run.config.run.seed for run in runs], 0),
        _texts("state", [_state(run) for run in runs]),
        numbers("last round (%)", lambda s: 100 * s["last"], 2),
        numbers("by examples (%)", lambda s: 100 * s["last_weighted"], 2),
        numbers("best round (%)", lambda s: 100 * s["best"], 2),
        numbers("at round", lambda s: s["best_round"], 0),
        numbers("worst tenth (%)", lambda s: 100 * s["fairness"]["worst_decile"], 2),
        numbers("Jain", lambda s: s["fairness"]["jain"], 3),
        numbers("Gini", lambda s: s["fairness"]["gini"], 3),
        numbers("MB up", lambda s: s["bytes_up"] / 1e6, 2),
        numbers("MB down", lambda s: s["bytes_down"] / 1e6, 2),
        numbers("seconds", lambda s: s["seconds"], 1),
        _texts("data", [run.data for run in runs]),
        _texts("digest", [summary["digest"][:16] for summary in summaries]),
        _texts("folder", [str(run.folder) for run in runs]),
    ]
    return _table(columns, [of[run.folder] for run in runs])


def _state(run: Run) -> str:
    """Return whether a run is finished, and if it failed, why."""
    if run.finished:
        return "finished"
    try:
        return f"failed: {(run.folder / 'error.txt').read_text(encoding='utf-8', errors='replace').strip()}"
    except OSError:
        return f"stopped after round {len(run.rows('rounds'))}"


def _settings(runs: Sequence[Run], of: dict[Path, int]) -> dict[str, Any]:
    """Return a row per run and a column per setting, version or machine in which the runs differ."""
    known = [_facts(run) for run in runs]
    columns = [_texts("run", [f"{run.config.run.method}, seed {run.config.run.seed}" for run in runs])]
    for key in dict.fromkeys(key for facts in known for key in facts):
        values = [facts.get(key) for facts in known]
        if len({str(value) for value in values if value is not None}) > 1:
            shown = ["" if value is None else str(value) for value in values]
            numbers = all(value is None or type(value) in (int, float) for value in values)
            columns.append(_Column(key, shown, values if numbers else shown))
    return _table(columns, [of[run.folder] for run in runs])


def _common(runs: Sequence[Run]) -> dict[str, Any]:
    """Return a row per setting, version or machine that all runs have which have any."""
    known = [_facts(run) for run in runs]
    rows = []
    for key in dict.fromkeys(key for facts in known for key in facts):
        values = [facts[key] for facts in known if key in facts]
        if len({str(value) for value in values}) == 1:
            rows.append((key, str(values[0])))
    columns = [_texts("setting", [key for key, _ in rows]), _texts("value", [value for _, value in rows])]
    return _table(columns, [None] * len(rows))


def _facts(run: Run) -> dict[str, Any]:
    """Return a run's settings, but for its folder, and what it ran on."""
    facts = {key: value for key, value in run.config.flat().items() if key != "run.dir"}
    environment = run.environment
    packages = environment.get("packages", {})
    facts |= {f"environment.{key}": environment.get(key, "") for key in ("python", "platform", "processor")}
    return facts | {f"environment.{name}": version for name, version in packages.items()}


def _lines(found: Sequence[Group]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return, by what is drawn and over what, a line per group that has one: places, means and deviations."""
    out: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for column in _CURVES:
        for by, (_, divisor) in _AXES.items():
            lines = out.setdefault(column, {}).setdefault(by, [])
            for number, group in enumerate(found):
                x, values = curve(group, by, column)
                if not len(x) or np.isnan(values).all():
                    continue
                deviation = values.std(axis=0, ddof=1) if len(values) > 1 else np.full(len(x), np.nan)
                line = {"x": x / divisor, "y": values.mean(axis=0), "deviation": deviation}
                lines.append({"group": number, "seeds": len(values), **line})
    return out


def _clients(run: Run, runs: Sequence[Run], group: int) -> dict[str, Any]:
    """Return columns of a run's clients; ``partition`` is equal where client numbers mean the same clients."""
    table = clients.table(run, runs)
    held = zlib.crc32(f"{run.config.data.name} {run.config.data_seed}\n{run.partition.to_csv()}".encode())
    return {
        "group": group,
        "seed": run.config.run.seed,
        "partition": held,
        "client": table.index.to_numpy(),
        **{name: table[name].to_numpy() for name in ("accuracy", "alone", "examples", "classes", "entropy")},
    }


def _look(group: Group) -> dict[str, Any]:
    """Return the colour of a group and the dashes of its line, in multiples of its width."""
    look = style.line(group.method, group.variant)
    known = {"-": [], "-.": [6.4, 1.6, 1, 1.6]}
    dashes = look["linestyle"]
    return {"colour": look["color"], "dashes": known[dashes] if isinstance(dashes, str) else list(dashes[1])}


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: arrays as lists, floats with six significant digits, what is no number as null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _hash(text: str) -> str:
    """Return the hash by which the page's policy knows a script or a style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
