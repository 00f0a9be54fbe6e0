"""Sweeps: the grid as runs, each once; going on; the table, the figure, and what is said of the best."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import TINY
from invented import invent

from fedkd.config import Config
from fedkd.errors import UserError
from fedkd.method import names
from fedkd.results import Run
from plots.sweep import heatmap, setting
from plots.tables import comparison
from sims import cli, inline, sweep

Command = Callable[..., int]
OWN = ("run.rounds", "train.lr", "data.alpha")
SMALL = [word for key, value in TINY.items() if key not in OWN for word in ("--set", f"{key}={value}")]
SMALL += ["--rounds", "2", "--jobs", "1", "--out", "out"]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("train.lr=0.01,1", [0.01, 1]),
        ("model.norm = batch, group", ["batch", "group"]),
        ('fedd2s.dropping-set="0,1","2"', ["0,1", "2"]),
        ("apfl.adaptive=true,false", [True, False]),
        ("run.clients=6", [6]),
    ],
)
def test_values_are_typed_as_those_of_set(text: str, values: list[object]) -> None:
    key, parsed = sweep.parse_axis(text)
    assert key == text.partition("=")[0].strip()
    assert parsed == values
    assert list(map(type, parsed)) == list(map(type, values))


@pytest.mark.parametrize(
    "text", ["train.lr", "train.lr=", "=1", "train.lr=1,,2", "train.lr=1,", "a.b=1,1.0", "a.b=[1],2"]
)
def test_what_is_no_list_of_values_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--over"):
        sweep.parse_axis(text)


def test_a_setting_of_one_method_is_varied_for_it_alone() -> None:
    """So a control is run once, and not once for each value of what it does not read."""
    axes = {"train.lr": [0.1, 1.0], "fedprox.mu": [1, 2, 3]}
    found = list(sweep.grid(axes, ["fedavg", "fedprox"], names()))
    assert [values for method, values in found if method == "fedavg"] == [{"train.lr": 0.1}, {"train.lr": 1.0}]
    assert [tuple(values.values()) for method, values in found if method == "fedprox"] == [
        (lr, mu) for lr in (0.1, 1.0) for mu in (1, 2, 3)
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--over", "train.lrr=1,2"], "unknown key 'train.lrr'; did you mean 'train.lr'?"),
        (["--over", "train.lr=0.1,fast"], "train.lr = 'fast': input should be a valid number"),
        (["--over", "train.lr=0.1,-1"], "train.lr = -1: input should be greater than 0"),
        (["--over", "fedgen.alpha=1,2"], "--over fedgen.alpha: 'fedgen' is not what runs (fedavg)"),
        (["--over", "run.seed=1,2"], "--over run.seed: that is what --seed or --seeds says"),
        (["--over", "data.seed=1,2"], "--over data.seed: seeds make repetitions: use --seeds"),
        (["--over", "run.rounds=1,2"], "--over run.rounds: it tells no settings apart"),
        (["--over", "train.lr=1", "--over", "train.lr=2"], "--over train.lr is given twice"),
        (["--over", "train.lr=1,2", "--set", "train.lr=3"], "train.lr is given twice: as 3 and with --over"),
        (["--over", "run.clients=6,5000"], "run.clients = 5000 is more than the 1797 examples"),
        (["--seeds", "1"], "Missing option '--over'"),
    ],
)
def test_mistakes_get_one_line_and_code_2(
    words: list[str], said: str, fedkd: Command, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Every run of the grid is checked before the first starts: no folder is made."""
    assert fedkd("sweep", "fedavg", *words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def starts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which the folder of every run that starts is added."""
    started, real = list[str](), inline.run

    def run(config: Config, nodes: int) -> Any:
        started.append(Path(config.run.dir).name)
        return real(config, nodes)

    monkeypatch.setattr(inline, "run", run)
    return started


@pytest.mark.slow
def test_a_sweep_from_start_to_end(
    fedkd: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Nothing is run twice: not by the same sweep, nor by one with more values, axes in another order, or one more."""
    started = starts(monkeypatch)
    two = ["--over", "train.lr=0.05,0.1", "--over", "fedprox.mu=0.1,1", "--seeds", "1,2"]
    assert fedkd("sweep", "local", "fedprox", *two, *SMALL) == 0
    assert len(started) == 2 * (2 + 4)
    out, shown = tmp_path / "out", capsys.readouterr().out
    table = pd.read_csv(out / "table.csv")
    assert len(table) == 6
    assert set(table["seeds"]) == {2}
    assert table["hurt"].notna().all()
    chosen = Run.open(out / "fedprox-lr=0.1-mu=1-s2").config.flat()
    assert (chosen["train.lr"], chosen["fedprox.mu"], chosen["run.seed"]) == (0.1, 1, 2)
    mine = table.set_index("method").loc["fedprox (train.lr=0.1, fedprox.mu=1.0)"]
    lasts = [100 * Run.open(out / f"fedprox-lr=0.1-mu=1-s{seed}").summary()["last"] for seed in (1, 2)]
    assert (mine["last"], mine["last_std"]) == pytest.approx((np.mean(lasts), np.std(lasts, ddof=1)))
    assert {path.stem for path in out.glob("*.png")} == {"convergence", "fairness", "heatmap-fedprox", "setting-local"}
    best = (out / "best.txt").read_text(encoding="utf-8")
    assert best in shown
    assert "fedprox is best at the last round with train.lr=" in best
    assert "optimistic" in best

    assert fedkd("sweep", "local", "fedprox", *two, *SMALL) == 0
    turned = ["--over", "fedprox.mu=0.1,1", "--over", "train.lr=0.05,0.1", "--seeds", "1,2"]
    assert fedkd("sweep", "fedprox", "local", *turned, *SMALL) == 0
    assert len(started) == 12
    more = ["--over", "train.lr=0.05", "--over", "fedprox.mu=0.1,2", "--over", "data.alpha=0.1,0.5", "--seeds", "1"]
    assert fedkd("sweep", "fedprox", *more, *SMALL) == 0
    assert started[12:] == [f"fedprox-lr=0.05-mu={mu}-alpha={a}-s1" for mu, a in ((0.1, 0.5), (2, 0.1), (2, 0.5))]


@pytest.mark.slow
def test_the_example_of_the_help_runs(fedkd: Command, tmp_path: Path) -> None:
    """As it stands there, with shorter training: also its most skewed data comes out for each seed."""
    text = cli.sweep.__doc__ or ""
    (words,) = (line.split()[1:] for line in text.splitlines() if line.strip().startswith("fedkd sweep fedgen"))
    short = ["--rounds", "1", "--clients-per-round", "2", "--set", "train.local-steps=1", "--jobs", "1", "--out", "out"]
    assert fedkd(*words, *short) == 0
    skews = {run.config.data.alpha for run in _runs(tmp_path / "out")}
    assert (skews, len(_runs(tmp_path / "out"))) == ({0.05, 0.1, 1.0}, 27)


@pytest.mark.slow
def test_a_sweep_that_was_stopped_goes_on(
    fedkd: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In the middle of its second run, after a checkpoint; the digests are those of a sweep that was not stopped."""
    from fedkd import results

    words = ["sweep", "fedavg", "--over", "train.lr=0.05,0.1", "--seeds", "1", "--set", "run.checkpoint-every=1"]
    assert fedkd(*words, *SMALL[:-1], "whole") == 0
    real, count = results.Recorder.checkpoint, 0

    def stopping(self: results.Recorder, round: int, state: Any) -> None:
        nonlocal count
        real(self, round, state)
        count += 1
        if count == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(results.Recorder, "checkpoint", stopping)
    assert fedkd(*words, *SMALL) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert fedkd(*words, *SMALL) == 0
    out = tmp_path / "out"
    resumed = [run.environment["resumed"] for run in _runs(out) if "resumed" in run.environment]
    assert [entry["after_round"] for entry in resumed[0]] == [1]
    assert [run.digest() for run in _runs(out)] == [run.digest() for run in _runs(tmp_path / "whole")]


@pytest.mark.slow
def test_runs_go_side_by_side(fedkd: Command, tmp_path: Path) -> None:
    """In processes of their own, which get their settings as flat keys: FedFTG's section cannot be pickled."""
    words = [*SMALL, "--over", "fedftg.iterations=1,2", "--seeds", "1"]
    words[words.index("--jobs") + 1] = "2"
    assert fedkd("sweep", "fedftg", *words) == 0
    assert len({run.digest() for run in _runs(tmp_path / "out")}) == 2


def _runs(folder: Path) -> list[Run]:
    return [Run.open(path.parent) for path in sorted(folder.glob("*/config.toml"))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Two methods over one setting of one of them, two seeds each, with invented logs."""
    folder, found = tmp_path_factory.mktemp("invented"), list[Run]()
    for mu in (1.0, 0.01, 0.1):
        found += invent(folder, ["fedprox"], seeds=2, rounds=2, **{"fedprox.mu": mu})
    return found + invent(folder, ["local"], seeds=2, rounds=2)


def test_best_names_each_method_that_has_several_settings(runs: list[Run]) -> None:
    frame = comparison(runs)
    mine = frame[frame["method"].str.startswith("fedprox")].sort_values("last", ascending=False)
    first, *others = mine.to_dict("records")
    said = sweep.best(runs)
    assert len(said) == 2
    assert said[0].startswith(f"fedprox is best at the last round with {first['method'][9:-1]}: {first['last']:.2f} ± ")
    near = [row for row in others if first["last"] - row["last"] <= max(first["last_std"], row["last_std"])]
    assert [row["method"][9:-1] for row in near] == (said[0].partition("seeds: ")[2].split("; ") if near else [])
    assert "optimistic" in said[1]
    assert "chance" not in said[1]
    single = sweep.best([run for run in runs if run.config.run.seed == 1])
    assert "within" not in single[0]
    assert single[1].endswith("With one seed, the order may be chance.")
    assert sweep.best([run for run in runs if run.config.run.method == "local"]) == []


def test_what_is_asked_is_not_chosen(runs: list[Run], tmp_path: Path) -> None:
    """A method is not better for being given an easier task: each skew has its own best setting, or none to choose."""
    skewed = [
        run
        for mu in (0.1, 1.0)
        for run in invent(tmp_path, ["fedprox"], seeds=2, rounds=2, **{"fedprox.mu": mu, "data.alpha": 0.9})
    ]
    said = sweep.best([*runs, *skewed])
    assert [line.partition(" is best")[0] for line in said[:-1]] == [
        "fedprox at data.alpha=0.1",
        "fedprox at data.alpha=0.9",
    ]
    assert "alpha" not in said[0].partition("with")[2]
    alone = [run for run in [*runs, *skewed] if run.config.flat().get("fedprox.mu") == 0.1]
    assert sweep.best(alone) == []


def test_lines_over_one_setting(runs: list[Run]) -> None:
    """Each point is the mean over seeds; a method without the setting is a level line."""
    figure = setting(runs)
    [axes] = figure.axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["fedprox"].get_xdata()) == [0.01, 0.1, 1.0]
    for mu, shown in zip((0.01, 0.1, 1.0), lines["fedprox"].get_ydata(), strict=True):
        cell = [run for run in runs if run.config.flat().get("fedprox.mu") == mu]
        assert shown == pytest.approx(np.mean([100 * run.summary()["last"] for run in cell]))
    assert len(set(lines["local"].get_ydata())) == 1
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "fedprox.mu"
    with pytest.raises(UserError, match="these differ in: none"):
        setting(runs[:2])
    with pytest.raises(UserError, match="does not have both"):
        heatmap(runs)


def test_the_figures_fit_what_each_method_varies(runs: list[Run], tmp_path: Path) -> None:
    """Lines for one setting, a heat map for two, and none, which is said, for three."""
    assert list(sweep.draw(runs)[0]) == ["setting"]
    more = invent(tmp_path, ["fedprox"], seeds=2, rounds=2, **{"fedprox.mu": 1.0, "train.lr": 0.5})
    drawn, left_out = sweep.draw([*runs, *more])
    assert list(drawn) == ["heatmap-fedprox"]
    assert left_out == []
    more += invent(tmp_path, ["fedprox"], seeds=2, rounds=2, **{"fedprox.mu": 1.0, "data.alpha": 0.5})
    drawn, left_out = sweep.draw([*runs, *more])
    assert drawn == {}
    assert left_out == ["a figure of fedprox, which varies 3 settings; the table has them all"]


def test_names_of_folders(tmp_path: Path) -> None:
    assert (
        sweep._name("fedgen", {"fedgen.temperature": 2, "data.name": "a/b c"}, 3)
        == "fedgen-temperature=2-name=a-b-c-s3"
    )
