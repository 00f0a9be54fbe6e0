"""The benchmarks' arithmetic and their stopwatches, without timing anything."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny

from bench import common, groups, images, memory, methods, timed
from bench.flower import LARGE, SMALL
from bench.memory import Peak, role
from bench.overhead import FIXED, MNIST, PFL
from bench.server import Play, losses, one_by_one
from clients import fedavg
from fedkd.config import ModelSection
from fedkd.data import federate
from fedkd.models import build
from fedkd.rng import Streams
from sims import inline
from strategies import FederatedStrategy, fedftg, fedgen


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", images.SHAPES)
def test_invented_images_are_read_as_the_data_set(tmp_path: Path, name: str) -> None:
    """Every client gets as many training images as the work says, and some to be scored on."""
    work = common.Work(name, "mlp", clients=5, cohort=2, images=8, batch=4)
    bench = common.Bench(tmp_path, nodes=1)
    root = bench.data(work)
    data = federate(work.config(root, bench.folder()))
    assert data.shape == images.SHAPES[name]
    assert list(data.sizes()) == [8] * 5
    assert all(len(rows) for rows in data.test)
    assert len(np.unique(data.images.train_y)) == 10
    assert bench.data(work) == root


def test_only_as_many_images_are_dealt_out_as_the_work_says(tmp_path: Path) -> None:
    """A folder that holds more does not make the work larger."""
    root = images.invented(tmp_path, "mnist", 200, 100)
    work = common.Work("mnist", "mlp", clients=5, cohort=2, images=8, batch=4)
    assert list(federate(work.config(root, tmp_path / "run")).sizes()) == [8] * 5


@pytest.mark.parametrize("work", [MNIST, FIXED, PFL, SMALL, LARGE, methods.WORK, *groups.WORKS], ids=str)
def test_a_pass_is_whole_batches(work: common.Work) -> None:
    """Else the contestants would not take the same steps."""
    assert work.images == work.steps * work.batch
    assert work.cohort <= work.clients


def test_the_models_have_the_size_that_the_aims_name() -> None:
    """26 thousand, 0.6 million, and pfl-research's."""

    works = (SMALL, LARGE, PFL)
    built = [build(ModelSection(name=work.model), images.SHAPES[work.data], 10, Streams(1)) for work in works]
    assert [sum(p.numel() for p in model.parameters()) for model in built] == [26_434, 582_026, 1_626_442]


def test_contestants_take_turns_and_are_compared_pair_by_pair() -> None:
    """Each ratio is of two measurements that stand beside each other."""
    left, right = iter([2.0, 9.0, 4.0]), iter([1.0, 3.0, 4.0])
    seconds = common.in_turn({"a": lambda: next(left), "b": lambda: next(right)}, 3)
    assert seconds == {"a": [2.0, 9.0, 4.0], "b": [1.0, 3.0, 4.0]}
    assert common.ratios(seconds, "a", "b") == [2.0, 3.0, 1.0]
    assert common.compared("t", {"b": [1.0, 3.0, 4.0], "a": [2.0, 9.0, 4.0]}).rows == [
        ["b", "3.000 (1.000 to 4.000)", ""],
        ["a", "4.000 (2.000 to 9.000)", "2.00 (1.00 to 3.00)"],
    ]


def test_tables_are_markdown() -> None:
    """The first column to the left, figures to the right."""
    assert common.Table("T", ["", "s"], [["a", "1"]]).markdown() == "T\n\n|  | s |\n|---|---:|\n| a | 1 |"


def test_a_rounds_seconds_leave_out_the_warm_up_and_what_is_scored(tmp_path: Path) -> None:
    """The slowest rounds are the first ones and the one at the end."""
    folder = tmp_path / "run"
    inline.run(tiny("fedavg", **{"run.dir": str(folder), "run.rounds": 5, "run.eval-every": 5}))
    rows = ['{"round": 1, "seconds": 50}', '{"round": 2, "seconds": 40}', '{"round": 3, "seconds": 1}']
    rows += ['{"round": 4, "seconds": 3}', '{"round": 5, "seconds": 90}']
    (folder / "rounds.jsonl").write_text("\n".join(rows) + "\n")
    assert common.seconds_per_round(folder) == 2


def test_a_round_is_split_into_parts_that_add_up() -> None:
    """What the slowest node spends counts, and what no stopwatch saw is polling and other."""
    rows = [
        {"round": r, "seconds": 2.0, "seconds_train": 1.5, "seconds_server": 0.2, "seconds_evaluate": 0.3}
        for r in range(1, 4)
    ]
    quick = {"role": "node", "total": 0.1, "decode": 0.01, "compute": 0.05}
    slow = {"role": "node", "total": 1.0, "decode": 0.1, "compute": 0.6}
    server = {"role": "server", "order": 0.05, "arrived": 0.15}
    lines: list[dict[str, Any]] = [{**line, "round": r} for r in range(1, 4) for line in (quick, slow, server)]
    parts = methods.split(rows, lines)
    assert list(parts) == list(methods.PARTS)
    expected = [0.15, 0.6, 0.45, 0.2, 0.3, 0.3]
    assert list(parts.values()) == pytest.approx(expected)


def test_the_stopwatches_find_their_functions_and_change_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function that was renamed would count as no time at all."""
    for owner, name in timed.TIMED.values():
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back at the end
    monkeypatch.setattr(fedavg, "update", fedavg.update)
    monkeypatch.setattr(FederatedStrategy, "aggregate_train", FederatedStrategy.aggregate_train)
    monkeypatch.setattr(timed, "names", lambda: ("fedavg",))
    monkeypatch.setenv("FEDKD_BENCH_TIMES", str(tmp_path))
    plain, watched = (tiny("fedavg", **{"run.dir": str(tmp_path / name), "run.rounds": 3}) for name in ("a", "b"))
    inline.run(plain)
    timed.install()
    inline.run_apps(timed.server, timed.client, watched, nodes=2)
    runs = [common.Run.open(config.run.dir) for config in (plain, watched)]
    assert runs[0].digest() == runs[1].digest()
    lines = [json.loads(line) for file in tmp_path.glob("*.jsonl") for line in file.read_text().splitlines()]
    parts = methods.split(runs[1].rows("rounds"), lines)
    assert parts["client compute"] > 0
    assert all(seconds >= 0 for part, seconds in parts.items() if part != "polling, other")
    assert sum(line["role"] == "node" for line in lines) == 6


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["ray::ClientAppActor.run"], "node"),
        (["python", "/bin/flwr-simulation", "--run-id", "1"], "server"),
        (["ray::IDLE"], "other"),
        ([], "other"),
    ],
)
def test_processes_are_told_apart(command: list[str], expected: str) -> None:
    """By what their command lines say."""
    assert role(command) == expected


def test_memory_is_watched_while_the_block_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a child there is a size; a test's process may have others, but none of a simulation."""
    monkeypatch.setattr(memory, "EVERY", 0.01)
    with Peak() as peak, subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        while not peak.bytes.get("all"):
            time.sleep(0.01)
        child.communicate(b"\n")
    assert 0 < peak.bytes["other"] <= peak.bytes["all"]
    assert peak.bytes["server"] == peak.bytes["node"] == 0


@pytest.mark.parametrize(("half", "variant"), [(fedgen, "paper"), (fedgen, "authors"), (fedftg, "paper")])
def test_stacked_models_give_the_losses_of_single_ones(half: Any, variant: str) -> None:
    """All of FedGen's generator steps, and FedFTG's first: from there on Adam magnifies what rounding tells apart."""
    play = Play.of(half, half.__name__.rpartition(".")[2], variant, models=3, iterations=1)
    with one_by_one():
        alone = losses(half, play)
    assert losses(half, play)[:3] == pytest.approx(alone[:3], abs=1e-5)
