"""Trackers: what they are shown is what the logs say, and nothing that they do ends a run."""

from __future__ import annotations

import io
import json
import re
import struct
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import tiny
from invented import invent
from rich.console import Console

from fedkd.results import Run
from sims import cli, launch, trackers
from sims.follow import Figures, Follower, accuracies, means
from sims.progress import Watched, all_left, watching


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    """Two runs of three rounds and four clients, with invented logs."""
    return invent(tmp_path, ["apfl", "local"], rounds=3, clients=4)


def console() -> tuple[Console, io.StringIO]:
    """Return a console that is no terminal, and what is written to it."""
    said = io.StringIO()
    return Console(file=said, width=300), said


def follow(runs: list[Run], name: str) -> str:
    """Track runs that are there already, and return what the user was told."""
    where, said = console()
    with trackers.tracking([run.config for run in placed(runs)], name, where):
        pass
    return said.getvalue()


def placed(runs: list[Run]) -> list[Run]:
    """Return the runs with their folder in their configuration, as runs that are launched have it."""
    for run in runs:
        run.__dict__["config"] = launch.in_folder(run.config, run.folder)
    return runs


class Kept:
    """A tracker that keeps what it is shown."""

    every: ClassVar[list[Kept]] = []

    def __init__(self, config: Any) -> None:
        self.name, self.rounds, self.ends = Path(config.run.dir).name, dict[int, Figures](), list[bool]()
        Kept.every.append(self)

    def log(self, round: int, figures: Figures) -> None:
        assert round not in self.rounds
        self.rounds[round] = figures

    def close(self, finished: bool) -> None:
        self.ends.append(finished)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Kept]:
    monkeypatch.setattr(Kept, "every", [])
    monkeypatch.setitem(trackers.TRACKERS, "kept", ("json", Kept))
    return Kept.every


def test_a_tracker_is_shown_what_the_logs_say(runs: list[Run], kept: list[Kept]) -> None:
    """Against data frames of the same logs; each run has a tracker of its own, which is closed once."""
    (runs[0].folder / "summary.json").write_text("{}")
    assert follow(runs, "kept") == ""
    assert [tracker.name for tracker in kept] == [run.folder.name for run in runs]
    assert [tracker.ends for tracker in kept] == [[True], [False]]
    for run, tracker in zip(runs, kept, strict=True):
        clients, scores = run.frame("clients"), run.evaluations
        assert list(tracker.rounds) == [1, 2, 3]
        for round, figures in tracker.rounds.items():
            mine, score = clients[clients["round"] == round], scores[scores["round"] == round]
            assert figures["clients"] == len(mine)
            if run is runs[0]:
                assert figures["alpha"] == pytest.approx(mine["alpha_sum"].mean())
            assert figures["accuracy"] == pytest.approx(score["accuracy"].mean())
            assert figures["worst_decile"] == pytest.approx(score["accuracy"].min())
            until = clients[clients["round"] <= round]
            assert figures["bytes"] == (until["bytes_down"] + until["bytes_up"]).sum()


def test_a_run_that_cut_its_logs_back_shows_no_round_twice(runs: list[Run], kept: list[Kept]) -> None:
    """The follower begins again; its bytes are not counted twice."""
    folder, follower = runs[0].folder, Follower(runs[0].folder)
    whole = {path: path.read_bytes() for path in folder.glob("*.jsonl")}
    before = follower.new()
    assert [round for round, _ in before] == [1, 2, 3]
    assert follower.new() == []
    for path, text in whole.items():
        lines = [line for line in text.splitlines(keepends=True) if json.loads(line)["round"] < 3]
        path.write_bytes(b"".join(lines))
    assert follower.new() == before[:2]
    for path, text in whole.items():
        path.write_bytes(text)
    assert follower.new() == before[2:]


def test_half_a_line_waits_for_its_end(tmp_path: Path) -> None:
    """A log is read while it is written."""
    log, follower = tmp_path / "rounds.jsonl", Follower(tmp_path)
    log.write_text('{"round": 1, "seconds": 2.0}\n{"round": 2, "sec')
    assert [round for round, _ in follower.new()] == [1]
    with log.open("a") as file:
        file.write('onds": 3.0}\n')
    assert follower.new() == [(2, {"clients": 0.0, "bytes": 0.0, "seconds": 5.0})]


def test_means_and_accuracies() -> None:
    """By hand; figures without weight and clients without test data are left out."""
    assert means([{"a_sum": 1.0, "a_weight": 1}, {"a_sum": 5.0, "a_weight": 3}, {"b_sum": 1.0, "b_weight": 0}]) == {
        "a": 1.5
    }
    rows = [{"personal_correct": k, "global_correct": 1, "total": 20} for k in range(20)]
    found = accuracies([*rows, {"personal_correct": 0, "global_correct": 0, "total": 0}])
    assert found == pytest.approx({"accuracy": 9.5 / 20, "worst_decile": 0.5 / 20, "global_accuracy": 1 / 20})
    assert accuracies([]) == {}


@pytest.mark.parametrize("fails", ["__init__", "log", "close"])
def test_a_tracker_that_fails_warns_once_and_ends_nothing(
    fails: str, runs: list[Run], kept: list[Kept], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it does wrong."""

    def failing(*_: object) -> None:
        raise ZeroDivisionError("no server\n there")

    monkeypatch.setattr(Kept, fails, failing)
    said = follow(runs, "kept")
    assert said == "fedkd: --track kept failed and is given up; the runs go on: no server there\n"


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """Before anything starts: there is no folder."""
    monkeypatch.setitem(trackers.TRACKERS, "wandb", ("not_installed", Kept))
    monkeypatch.setattr(sys, "argv", ["fedkd", "run", "fedavg", "--track", "wandb", "--out", str(tmp_path / "run")])
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        'fedkd: --track wandb needs the package not_installed: pip install "fedkd[wandb]"\n'
    )
    assert not (tmp_path / "run").exists()


def test_a_launched_run_is_tracked_in_tensorboard(tmp_path: Path) -> None:
    """The event file is read back: a scalar for each figure of each round, and the settings."""
    config = launch.in_folder(tiny("fedavg"), tmp_path / "run")
    run = launch.launch(config, "inline", None, track="tensorboard")
    [file] = (run.folder / "tensorboard").iterdir()
    scalars, texts = events(file)
    expected = {
        (name, round): value for round, figures in Follower(run.folder).new() for name, value in figures.items()
    }
    assert {name for name, _ in expected} >= {"loss", "accuracy", "worst_decile", "bytes", "clients", "seconds"}
    assert scalars == pytest.approx(expected, rel=1e-6)
    last = run.frame("clients").query("round == 3")
    assert scalars["loss", 3] == pytest.approx(last["loss_sum"].sum() / last["loss_weight"].sum())
    assert "method" in texts
    assert run.digest() == launch.launch(launch.in_folder(config, tmp_path / "untracked"), "inline", None).digest()


def events(file: Path) -> tuple[dict[tuple[str, int], float], str]:
    """Read an event file: records of a length, a checksum, an event, and another checksum."""
    from tensorboardX.proto.event_pb2 import Event

    raw, scalars, texts, at = file.read_bytes(), {}, "", 0
    while at < len(raw):
        (length,) = struct.unpack("<Q", raw[at : at + 8])
        event = Event.FromString(raw[at + 12 : at + 12 + length])
        at += 16 + length
        for value in event.summary.value:
            if value.HasField("tensor"):
                texts += b"".join(value.tensor.string_val).decode()
            else:
                scalars[value.tag, event.step] = value.simple_value
    return scalars, texts


@pytest.mark.slow
def test_weights_and_biases_offline(runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an account: each run leaves a transaction log in its folder."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert follow(runs, "wandb") == ""
    for run in runs:
        [log] = run.folder.glob("wandb/offline-run-*/run-*.wandb")
        assert b"worst_decile" in log.read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what MLflow asks of SQLAlchemy is not ours
def test_mlflow_in_a_local_database(runs: list[Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Read back through MLflow's own client."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    (runs[0].folder / "summary.json").write_text("{}")
    assert follow(runs, "mlflow") == ""
    client = mlflow.MlflowClient()
    found = {
        run.info.run_name: run for run in client.search_runs([client.get_experiment_by_name("fedkd").experiment_id])
    }
    assert {name: run.info.status for name, run in found.items()} == {
        runs[0].folder.name: "FINISHED",
        runs[1].folder.name: "KILLED",
    }
    mine = found[runs[0].folder.name]
    assert mine.data.params["run.method"] == "apfl"
    shown = {metric.step: metric.value for metric in client.get_metric_history(mine.info.run_id, "accuracy")}
    assert shown == pytest.approx({n: figures["accuracy"] for n, figures in Follower(runs[0].folder).new()})


def test_the_progress_says_what_a_round_came_to(runs: list[Run]) -> None:
    """Round, loss, accuracies, bytes, sampled clients and the time left, in plain lines where there is no terminal."""
    where, said = console()
    watched = [Watched(run.folder, run.folder.name, 6) for run in runs]
    with watching(watched, where):
        pass
    figures = Follower(runs[0].folder).new()[-1][1]
    line = said.getvalue().splitlines()[0]
    assert line.startswith(f"{runs[0].folder.name}: round 3/6  ")
    assert f"accuracy {figures['accuracy']:.1%}  worst tenth {figures['worst_decile']:.1%}" in line
    assert f"{figures['clients']:.0f} clients" in line
    assert "  2.4 MB  " in line  # 3 rounds, 4 clients, 100 kB down and up
    assert watched[0].left == pytest.approx(figures["seconds"])  # half of the rounds
    waiting = Watched(runs[0].folder / "nothing", "waiting", 6)
    both = [watched[0], waiting]
    assert all_left(both, 2) == pytest.approx(1.5 * figures["seconds"])
    assert "left" in line


@pytest.mark.parametrize(("width", "rounds"), [(80, 200), (100, 200), (136, 2000), (137, 2000), (200, 200)])
def test_the_display_is_whole_on_ordinary_terminals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, rounds: int
) -> None:
    """Nothing is cut, and each run is a line: a table with headings where there is no room for a bar and words."""
    figures = [
        {
            "loss": 12.345,
            "accuracy": 1.0,
            "worst_decile": 0.834,
            "bytes": 123e6,
            "clients": 100.0,
            "seconds": 7800.0 * rounds / 200,
        },
        {"loss": 0.618, "accuracy": 0.912, "worst_decile": 0.071, "bytes": 1.23e9, "clients": 10.0, "seconds": 60.0},
    ]
    said = io.StringIO()
    where = Console(file=said, width=width, force_terminal=True, color_system=None)
    watched = [Watched(tmp_path / label, label, rounds) for label in ("fedgen-s1", "fedavg_ft-s3")]
    done, left = 120 * rounds // 200, timedelta(seconds=26 * rounds)
    for run, now in zip(watched, figures, strict=True):
        run.folder.mkdir()
        (run.folder / "config.toml").touch()
        monkeypatch.setattr(run, "update", lambda run=run, now=now: vars(run).update(done=done, figures=now))
    (tmp_path / "later").mkdir()
    with watching([*watched, Watched(tmp_path / "later", "local-s1", rounds)], where):
        pass
    *_, last = said.getvalue().replace("\x1b[?25h", "").split("\x1b[2K")
    heading, *lines = last.splitlines() if width < 137 else ["", *last.splitlines()]
    assert max(map(len, [heading, *lines])) <= width
    assert "…" not in last
    figures_of = [
        rf"fedgen-s1 .*{done}/{rounds} .*{left} left .*12\.345 .*100\.0% .*83\.4% .*123 MB .*100\b",
        rf"fedavg_ft-s3 .*{done}/{rounds} .*0:00:40 left .*0\.618 .*91\.2% .*7\.1% .*1\.23 GB .*10\b",
        rf"local-s1 .*0/{rounds} .*waiting",
        rf".*{2 * done}/{3 * rounds} .* left",
    ]
    for expected, line in zip(figures_of, lines, strict=False):
        assert re.match(expected, line)
    assert "0 of 3" in lines[3]
    for name in ("loss", "accuracy", "worst tenth", "clients"):
        assert name in (heading or lines[0])


def test_bars_of_many_runs_show_only_those_that_go(runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """And the whole, with the time left."""
    monkeypatch.setattr("sims.progress.MOST_BARS", 1)
    said = io.StringIO()
    where = Console(file=said, width=300, force_terminal=True, color_system=None)
    watched = [Watched(runs[0].folder, "going", 6), Watched(runs[1].folder, "gone", 3)]
    with watching([*watched, Watched(runs[0].folder / "nothing", "waiting", 6)], where):
        pass
    last = said.getvalue().split("\x1b[")[-1] + said.getvalue()
    assert "going" in last
    assert "1 of 3 runs finished" in last
    assert "waiting" not in last


def test_a_tracker_that_is_not_asked_for_is_not_opened(runs: list[Run], kept: list[Kept]) -> None:
    assert follow(runs, "") == ""
    assert kept == []
