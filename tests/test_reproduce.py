"""Published tables: what their files say, and a table made again from start to end."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import TINY

from fedkd.config import Config
from fedkd.errors import UserError
from plots.significance import holm
from sims import adapt, figures, inline, launch, reproduce
from sims.reproduce import SCALES, Experiment

pytestmark = pytest.mark.slow

PAPERS = sorted(path.parent for path in reproduce.HOME.glob("*/experiment.toml"))
TABLES = reproduce.experiments()
TABLE_KEYS = {
    "title",
    "published-table",
    "published-column",
    "metric",
    "best-rounds",
    "last-rounds",
    "against",
    "log",
    "like",
    "keep",
    "adapt-epochs",
    "over",
    "over-label",
    "seeds",
    "target",
    "curves",
    "published-of",
    "not-measured",
}
ROW_KEYS = {"label", "method", "settings", "runs", "score", "control", "against", "published", "scales"}

Run = Callable[..., int]


def scales(name: str) -> list[Experiment]:
    """Return a table at each of the scales that it has."""
    paper, table = name.split("/")
    raw = reproduce._table(reproduce._read(reproduce.HOME / paper / "experiment.toml"), table)
    return [Experiment.read(name, scale) for scale in raw["scales"]]


@pytest.mark.parametrize("name", TABLES)
def test_every_row_is_a_valid_configuration_at_every_scale(name: str) -> None:
    """Unknown keys, values out of range and rows that name no row would come to light hours into a sweep."""
    found = scales(name)
    assert {"smoke", "cpu"} <= {experiment.scale for experiment in found} <= set(SCALES)
    for experiment in found:
        rows = {row.name: row for row in experiment.rows}
        assert experiment.metric in ("mean", "weighted")
        assert any(row.control for row in experiment.rows)
        assert len({row.label for row in experiment.rows}) == len(rows)
        hashes = []
        for row in experiment.rows:
            flat = experiment.flat(row, 1, {})
            config = Config.from_flat(flat)
            assert {key: value for key, value in config.flat().items() if key in flat}.items() <= flat.items()
            assert row.score in ("personal", "global")
            assert set(row.against) < set(rows)
            assert row.name not in row.against
            assert not (row.control and row.against), "controls are compared with, not compared"
            assert rows[row.runs].runs == row.runs
            assert rows[row.runs].method == row.method
            if row.runs == row.name:
                hashes.append(config.toml())
            else:
                assert not row.settings
        assert len(set(hashes)) == len(hashes), "two rows are the same run; name it with runs"


@pytest.mark.parametrize("name", TABLES)
def test_smoke_needs_no_data_and_no_patience(name: str) -> None:
    """What a continuous check runs: embedded data, a handful of rounds, every row of the paper."""
    smoke, *others = scales(name)
    assert smoke.scale == "smoke"
    assert all(row in smoke.rows for row in others[-1].rows if others[-1].scale == "paper")
    for row in smoke.rows:
        config = Config.from_flat(smoke.flat(row, 1, {}))
        assert config.data.name == "digits"
        assert config.run.rounds <= 10


@pytest.mark.parametrize("paper", PAPERS, ids=lambda path: path.name)
def test_files_say_what_is_read(paper: Path) -> None:
    """A misspelt key would be passed over in silence."""
    raw = reproduce._read(paper / "experiment.toml")
    tables = {name: reproduce._table(raw, name) for name in raw}
    for table in tables.values():
        assert set(table) <= TABLE_KEYS | {"settings", "scales", "rows"}
        for row in table.get("rows", {}).values():
            assert set(row) <= ROW_KEYS
            assert set(row.get("scales", ())) <= set(table["scales"])
        assert set(table.get("curves", ())) <= set(table["rows"])
        assert set(table.get("published-of", ())) <= set(table["scales"])
    text = (paper / "README.md").read_text(encoding="utf-8")
    for table in tables:
        assert f"{paper.name}/{table}" in text


@pytest.mark.parametrize("paper", PAPERS, ids=lambda path: path.name)
def test_published_numbers_have_sources_and_rows_find_theirs(paper: Path) -> None:
    """A number without a source is an invention; a table that names a column compares with it, and others do not."""
    published = reproduce._read(paper / "published.toml")
    assert set(published) <= {"number", "claim"}
    assert published["claim"]
    for claim in published["claim"]:
        assert set(claim) == {"text", "source"}
        assert all(claim.values())
    numbers = published.get("number", [])
    for number in numbers:
        assert set(number) == {"table", "row", "column", "value", "source"}
        assert all(number.values())
        assert re.fullmatch(r"\d+\.\d+( ± \d+\.\d+)?", number["value"])
    places = [(number["table"], number["row"], number["column"]) for number in numbers]
    assert len(set(places)) == len(places)
    raw = reproduce._read(paper / "experiment.toml")
    for table in (reproduce._table(raw, name) for name in raw):
        named = {row.get("published") for row in table.get("rows", {}).values()} - {None}
        here = {row for t, row, column in places if (t, column) == _column(table)}
        assert named <= here
        assert bool(named) == ("published-table" in table)


def _column(table: dict[str, Any]) -> tuple[str | None, str | None]:
    return table.get("published-table"), table.get("published-column")


def test_published_values_stand_beside_the_rows() -> None:
    """Against the papers, by hand."""
    found = {row.name: row.published for row in Experiment.read("pgfed/cifar10", "paper").rows}
    assert found["pgfed"] == "81.02 ± 0.41"
    assert found["fedavg"] == "65.07 ± 0.25"
    assert found["fedavg-ft"] == ""
    found = {row.name: row.published for row in Experiment.read("pgfed/cifar100", "paper").rows}
    assert (found["pgfed"], found["apfl"]) == ("43.12 ± 0.03", "39.16 ± 0.93")
    assert {row.name: row.published for row in Experiment.read("fedgen/table1").rows}["fedgen-paper"] == "93.03 ± 0.32"


def test_fedgen_table_is_the_one_that_was_measured() -> None:
    """The committed results hold for these settings and no others; both larger scales are the paper's own size."""
    cpu, paper = Experiment.read("fedgen/table1", "cpu"), Experiment.read("fedgen/table1", "paper")
    assert cpu.settings == paper.settings
    assert (cpu.metric, cpu.best_rounds) == ("weighted", 5)
    config = Config.from_flat(cpu.flat(cpu.rows[0], 0, {}))
    assert (config.run.rounds, config.run.clients, config.run.cohort, config.train.local_steps) == (200, 20, 10, 20)
    assert (config.data.partition, config.data_seed, config.data.test) == ("fedgen", 42, "own-labels")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fedgan"], "unknown experiment 'fedgan'; did you mean 'fedgen'?"),
        (["pgfed/cifar11"], "unknown experiment 'pgfed/cifar11'; did you mean 'pgfed/cifar10'?"),
        (["fedftg", "--scale", "cpus"], "unknown scale 'cpus'; did you mean 'cpu'? (known: smoke, cpu, paper)"),
        (["fedd2s/cifar10", "--scale", "paper"], "fedd2s/cifar10 has no scale 'paper' (it has: smoke, cpu)"),
        (["fedd2s"], "'fedd2s' has several tables; name one: fedd2s/cifar10, fedd2s/femnist, fedd2s/"),
        (["fedftg", "--scale", "smoke", "--seeds", "1,x"], "--seeds '1,x' is not a list of whole numbers"),
        (["fedftg", "--scale", "smoke", "--set", "train.lrr=1"], "unknown key 'train.lrr'; did you mean 'train.lr'?"),
    ],
)
def test_mistakes_get_one_line_and_code_2(
    words: list[str], said: str, fedkd: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Nothing has started by then: no folder is made."""
    assert fedkd("reproduce", *words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_list_names_every_table_with_its_scales(fedkd: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """With and without --list."""
    assert fedkd("reproduce", "--list") == 0
    listed = capsys.readouterr().out
    assert [line.split(":")[0] for line in listed.splitlines()] == list(TABLES)
    assert "(scales: smoke, cpu)" in listed
    unmeasured = {name for name in TABLES if Experiment.read(name, "smoke").not_measured}
    assert {line.split(":")[0] for line in listed.splitlines() if "; not measured: " in line} == unmeasured
    assert fedkd("reproduce") == 0
    assert capsys.readouterr().out == listed


EXAMPLE = """
[one]
title = "An example"
published-table = "1"
published-column = "digits"
metric = "mean"
against = ["after"]
log = ["alpha"]
settings = {settings}
scales = {{ smoke = {{ }}, cpu = {{ "run.rounds" = 4 }} }}

[one.rows.global]
label = "FedAvg_"
method = "fedavg_ft"
runs = "after"
score = "global"
published = "FedAvg"

[one.rows.after]
label = "FedAvg, then local steps"
method = "fedavg_ft"
control = true

[one.rows.mixed]
label = "APFL"
method = "apfl"
settings = {{ "apfl.alpha" = 0.25 }}
published = "APFL"

[one.rows.late]
label = "another"
method = "local"
scales = ["cpu"]

[two]
like = "one"
title = "Another example"
best-rounds = 2
last-rounds = 2
seeds = [4, 6]
settings = {{ "train.lr" = 0.5 }}
scales = {{ smoke = {{ }} }}

[two.rows.more]
label = "one more"
method = "local"

[three]
like = "one"
title = "A sweep"

over-label = "share"

[three.over]
"Half, at most" = {{ "apfl.alpha" = 0.5 }}
"none" = {{ "apfl.alpha" = 0.0 }}

[three.rows.free]
label = "APFL, any"
method = "apfl"
against = ["mixed"]

[four]
like = "three"

[four.over]
"one step" = {{ "train.local-steps" = 1 }}
"two" = {{ "train.local-steps" = 2 }}

[five]
like = "two"
keep = ["more", "after"]
"""
NUMBERS = """
[[number]]
table = "1"
row = "FedAvg"
column = "digits"
value = "50.00 ± 1.00"
source = "nowhere"

[[number]]
table = "1"
row = "APFL"
column = "digits"
value = "60.00"
source = "nowhere"
"""


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two tables of a paper of our own, two training runs each."""
    home = tmp_path_factory.mktemp("sims")
    (home / "example").mkdir()
    inner = ", ".join(f'"{key}" = {json.dumps(value)}' for key, value in TINY.items())
    (home / "example" / "experiment.toml").write_text(EXAMPLE.format(settings=f"{{ {inner} }}"), encoding="utf-8")
    (home / "example" / "published.toml").write_text(NUMBERS, encoding="utf-8")
    monkeypatch.setattr(reproduce, "HOME", home)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder and below, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


ONE = ["reproduce", "example/one", "--scale", "smoke", "--seeds", "1,2", "--jobs", "1"]


@pytest.mark.usefixtures("example")
def test_a_table_from_start_to_end(
    fedkd: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Every number of the table is recomputed from the logs; a second call runs nothing and leaves the same bytes."""
    assert fedkd(*ONE) == 0
    shown = capsys.readouterr().out
    out = tmp_path / "runs" / "reproduce" / "example" / "one" / "smoke"
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == [
        f"{row}-s{seed}" for row in ("after", "mixed") for seed in (1, 2)
    ]
    curves = {
        (row, score, seed): _curve(out / f"{row}-s{seed}", score)
        for row, score in (("after", "global"), ("after", "personal"), ("mixed", "personal"))
        for seed in (1, 2)
    }
    table = pd.read_csv(out / "table.csv")
    assert list(table["row"]) == ["FedAvg_", "control: FedAvg, then local steps", "APFL"]
    assert list(table["published"]) == ["50.00 ± 1.00", "-", "60.00"]
    for line, (row, score) in zip(
        table.to_dict("records"), (("after", "global"), ("after", "personal"), ("mixed", "personal")), strict=True
    ):
        mine = [curves[row, score, seed] for seed in (1, 2)]
        last, best = [curve[-1] for curve in mine], [curve.max() for curve in mine]
        assert line["last"] == pytest.approx(np.mean(last))
        assert line["last_std"] == pytest.approx(np.std(last, ddof=1))
        assert line["best"] == pytest.approx(np.mean(best))
        assert line["best_std"] == pytest.approx(np.std(best, ddof=1))
        assert line["seeds"] == 2
    assert table["alpha"].isna().tolist() == [True, True, False]
    assert table["alpha"].iloc[2] == pytest.approx(0.25)

    paired = pd.read_csv(out / "differences.csv")
    assert list(paired["row"]) == ["FedAvg_", "APFL"]  # controls are compared with, not compared
    gains = [curves["mixed", "personal", seed][-1] - curves["after", "personal", seed][-1] for seed in (1, 2)]
    assert paired["difference"].iloc[1] == pytest.approx(np.mean(gains))
    assert paired["difference_std"].iloc[1] == pytest.approx(np.std(gains, ddof=1))
    assert paired["higher"].iloc[1] == sum(gain > 0 for gain in gains)
    assert 0 < paired["p"].iloc[1] <= 1
    assert paired["corrected"].tolist() == pytest.approx(holm(paired["p"].tolist()))  # both with the same row

    text = (out / "table.md").read_text(encoding="utf-8")
    assert text in shown
    assert f"| APFL | 60.00 | {table['last'].iloc[2]:.2f} ± {table['last_std'].iloc[2]:.2f} |" in text
    latex = (out / "table.tex").read_text(encoding="utf-8")
    assert r"FedAvg\_ & 50.00 $\pm$ 1.00 &" in latex
    assert latex.count(r"\\") == 4
    for stem in ("convergence", "convergence-global", "fairness", "rows"):
        assert (out / f"{stem}.png").stat().st_size > 1000
    runs = pd.read_csv(out / "runs.csv")
    assert list(runs) == ["row", "seed", "last", "best", "digest"]
    assert runs["digest"].nunique() == 4  # six lines: two rows share their runs
    drawn = pd.read_csv(out / "rows.csv").set_index("series")
    assert drawn["x"].tolist() == pytest.approx(table["last"].tolist(), abs=1e-4)
    assert drawn["deviation"].tolist() == pytest.approx(table["last_std"].tolist(), abs=1e-4)
    assert drawn.loc[["FedAvg_", "APFL"], "published"].tolist() == [50, 60]
    assert "first reaches 60 %" in " ".join((out / "convergence.txt").read_text(encoding="utf-8").split())

    before = contents(out)
    monkeypatch.setattr(launch, "launch_all", None)
    assert fedkd(*ONE) == 0
    assert contents(out) == before
    assert capsys.readouterr().out == shown


@pytest.mark.usefixtures("example")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--jobs", "3"], ("inline", None, 3, None, None)),
        (["--nodes", "2", "--jobs", "1"], ("inline", 2, 1, None, None)),
        (
            ["--engine", "simulation", "--nodes", "2", "--cpus-per-node", "1", "--gpus-per-node", "0", "--jobs", "1"],
            ("simulation", 2, 1, 1, 0.0),
        ),
    ],
)
def test_the_engine_is_the_one_that_is_asked_for(
    words: list[str], expected: tuple[object, ...], fedkd: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what its nodes are to have."""
    asked: list[tuple[object, ...]] = []

    def launched(configs: list[Config], *given: object, track: str) -> None:
        asked.append(given)
        raise UserError("enough")

    monkeypatch.setattr(launch, "launch_all", launched)
    assert fedkd("reproduce", "example/one", "--scale", "smoke", *words) == 2
    assert asked == [expected]


@pytest.mark.usefixtures("example")
def test_what_an_engine_does_not_have_is_refused(fedkd: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is run."""
    assert fedkd(*ONE, "--cpus-per-node", "1") == 2
    assert "need --engine simulation" in capsys.readouterr().err
    assert fedkd(*ONE, "--engine", "deployment") == 2
    assert "'deployment' is not one of" in capsys.readouterr().err


@pytest.mark.usefixtures("example")
def test_a_table_is_the_same_on_both_engines(fedkd: Run, tmp_path: Path) -> None:
    """Digests, tables and differences, byte for byte."""
    words = ["reproduce", "example/one", "--scale", "smoke", "--seeds", "1", "--set", "run.rounds=2"]
    assert fedkd(*words, "--jobs", "1", "--out", "here") == 0
    assert fedkd(*words, "--engine", "simulation", "--nodes", "2", "--out", "there") == 0
    for name in ("runs.csv", "table.csv", "table.md", "differences.csv"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


def test_signs_are_what_latex_prints() -> None:
    """In text of its old encoding ``<`` is an inverted exclamation mark, and the others are commands."""
    cells = [reproduce._cell("p", value, float("nan")) for value in (0.0004, 0.05)]
    latex = reproduce._latex([["row", "p", "p, Holm"], ["A_1 & B > 5 %", *cells]])
    assert r"A\_1 \& B $>$ 5 \% & $<$ 0.001 & 0.050 \\" in latex


@pytest.mark.usefixtures("example")
def test_differences_are_of_what_published_values_are_compared_with_first(tmp_path: Path) -> None:
    """Of the best rounds, the last one and the last ones, each corrected for the rows with the same comparison."""
    two = Experiment.read("example/two", "smoke")
    runs = reproduce.reproduce(two, {}, [1, 2], tmp_path, jobs=1)
    frame = reproduce.differences(two, runs)
    kinds = ["best 2 rounds", "last round", "last 2 rounds"]
    assert frame["of"].tolist() == kinds * 3
    mine, theirs = ([_curve(tmp_path / f"{row}-s{n}", "personal") for n in (1, 2)] for row in ("mixed", "after"))
    best = [np.sort(one)[-2:].mean() - np.sort(another)[-2:].mean() for one, another in zip(mine, theirs, strict=True)]
    line = frame[(frame["row"] == "APFL") & (frame["of"] == kinds[0])].iloc[0]
    assert line["difference"] == pytest.approx(np.mean(best))
    assert line["higher"] == sum(value > 1e-9 for value in best)
    for kind in kinds:
        family = frame[frame["of"] == kind]
        assert family["corrected"].tolist() == pytest.approx(holm(family["p"].tolist()), nan_ok=True)
    headings, *lines = reproduce._text(two, frame)
    assert headings == ["row", "minus", "of", "difference", "p", "p, Holm", "seeds above", "seeds"]
    assert all(len(cells) == len(headings) for cells in lines)


def test_rounding_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed in which a row is not above another but by what a mean is rounded to does not count."""
    rows = [row for row in Experiment.read("fedgen/table2").rows if row.name in ("fedavg", "widths-64-256")]
    table = dataclasses.replace(Experiment.read("fedgen/table2"), rows=rows, best_rounds=0, last_rounds=1)
    curves = {"fedavg": [50.0, 60.0, 70.0], "widths-64-256": [50.0 + 1e-12, 61.0, 70.0]}
    monkeypatch.setattr(
        reproduce, "_curves", lambda table, row, runs: [np.array([value]) for value in curves[row.name]]
    )
    [line] = reproduce.differences(table, {}).to_dict("records")
    assert (line["higher"], line["seeds"]) == (1, 3)


def test_steps_of_a_sweep_are_one_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row at three steps is compared three times with the control, which is another run at each."""
    table, draws = Experiment.read("fedd2s/heterogeneity"), np.random.default_rng(3)
    curves = {row.name: [np.array([value]) for value in draws.normal(60, 2, 3)] for row in table.rows}
    monkeypatch.setattr(reproduce, "_curves", lambda table, row, runs: curves[row.name])
    frame = reproduce.differences(table, {})
    alone = frame[frame["against"].str.startswith("local")]
    assert len(alone) == 12
    assert alone["corrected"].tolist() == pytest.approx(holm(alone["p"].tolist()))


@pytest.mark.usefixtures("example")
def test_a_table_keeps_what_it_names_of_the_one_that_it_is_like() -> None:
    """In the order in which it names them; the other table keeps all of its rows."""
    two, five = Experiment.read("example/two", "smoke"), Experiment.read("example/five", "smoke")
    assert [row.name for row in two.rows] == ["global", "after", "mixed", "more"]
    assert [row.name for row in five.rows] == ["more", "after"]
    assert (five.settings, five.seeds) == (two.settings, two.seeds)


@pytest.mark.usefixtures("example")
@pytest.mark.parametrize("words", [[], ["--seeds", "5", "--track", "tensorboard"]])
def test_seeds_are_the_tables_and_rounds_are_shown_where_asked(
    words: list[str], fedkd: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless others are given; and nothing is shown anywhere unless asked for."""
    asked = []

    def launched(configs: list[Config], *_: object, track: str) -> None:
        asked.append(([config.run.seed for config in configs], track))
        raise UserError("enough")

    monkeypatch.setattr(launch, "launch_all", launched)
    assert fedkd("reproduce", "example/two", "--scale", "smoke", *words) == 2
    assert asked == [([5, 5, 5], "tensorboard") if words else ([4, 4, 4, 6, 6, 6], "")]


def test_the_seeds_of_a_table_are_those_that_were_measured() -> None:
    """Of every committed table; what it is like hands them on."""
    for name in TABLES:
        page = figures.pages(reproduce.HOME.parent / "docs").get(name)
        if page is not None:
            assert sorted(figures.committed(page)["seed"].unique()) == list(Experiment.read(name).seeds), name


def test_lines_are_through_controls_that_all_rows_can_be_compared_with() -> None:
    """Controls of personal models say nothing where most rows score the global one."""
    assert reproduce._through(Experiment.read("fedftg/plug-in")) == set()
    assert reproduce._through(Experiment.read("fedd2s/cifar10")) == {"local", "FedAvg after the same local steps"}


def test_a_global_model_looks_like_fedavg() -> None:
    """Whichever method's runs it comes from."""
    rows = {row.name: row.look for row in Experiment.read("fedd2s/cifar10").rows}
    assert (rows["fedavg"], rows["fedavg-ft"], rows["deep-dropping"]) == ("fedavg", "fedavg_ft", "fedd2s")


def _curve(folder: Path, score: str) -> Any:
    frame = pd.read_json(folder / "evaluations.jsonl", lines=True)
    frame = frame[frame["total"] > 0]
    return (100 * frame[f"{score}_correct"] / frame["total"]).groupby(frame["round"]).mean().to_numpy()


@pytest.mark.usefixtures("example")
def test_an_interrupted_table_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stopped in the third run: the finished ones are kept as they are, and the table is that of an unbroken sweep."""
    one = Experiment.read("example/one", "smoke")
    whole = reproduce.reproduce(one, {}, [1, 2], tmp_path / "whole", jobs=1)
    started, real = [], inline.run

    def stopping(config: Config, nodes: int) -> Any:
        started.append(Path(config.run.dir).name)
        if len(started) == 3:
            raise KeyboardInterrupt
        return real(config, nodes)

    monkeypatch.setattr(inline, "run", stopping)
    parts = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        reproduce.reproduce(one, {}, [1, 2], parts, jobs=1)
    before = contents(parts / "after-s1"), contents(parts / "mixed-s1")
    runs = reproduce.reproduce(one, {}, [1, 2], parts, jobs=1)
    assert started == ["after-s1", "mixed-s1", "after-s2", "after-s2", "mixed-s2"]
    assert (contents(parts / "after-s1"), contents(parts / "mixed-s1")) == before
    for make in (reproduce.table, reproduce.differences, reproduce.digests):
        pd.testing.assert_frame_equal(make(one, runs), make(one, whole))


@pytest.mark.usefixtures("example")
def test_a_table_takes_over_what_it_is_like() -> None:
    """Rows, scores and settings of the other, with its own added; its scales are its own."""
    one, two = Experiment.read("example/one", "smoke"), Experiment.read("example/two", "smoke")
    assert [row.name for row in one.rows] == ["global", "after", "mixed"]
    assert [row.name for row in two.rows] == ["global", "after", "mixed", "more"]
    assert [row.name for row in Experiment.read("example/one", "cpu").rows][-1] == "late"
    assert two.settings == {**one.settings, "train.lr": 0.5}
    assert (one.best_rounds, two.best_rounds) == (0, 2)
    assert two.title == "Another example"


@pytest.mark.usefixtures("example")
def test_rows_are_repeated_over_settings_that_concern_them() -> None:
    """A row that has the setting itself, or a method that has no such setting, stands for all."""
    three, four = Experiment.read("example/three", "smoke"), Experiment.read("example/four", "smoke")
    rows = {row.name: row for row in three.rows}
    assert list(rows) == ["global", "after", "mixed", "free-half-at-most", "free-none"]
    assert rows["free-none"].label == "APFL, any, none"
    assert [rows[name].settings for name in ("free-half-at-most", "mixed")] == [{"apfl.alpha": a} for a in (0.5, 0.25)]
    assert rows["free-none"].against == ["after", "mixed"]
    rows = {row.name: row for row in four.rows}
    assert [name for name in rows if name.endswith("-two")] == ["global-two", "after-two", "mixed-two", "free-two"]
    assert (rows["global-two"].runs, rows["global-two"].settings) == ("after-two", {})
    assert rows["mixed-two"].settings == {"apfl.alpha": 0.25, "train.local-steps": 2}
    assert rows["free-two"].against == ["after-two", "mixed-two"]


@pytest.mark.usefixtures("example")
def test_a_sweep_uses_the_runs_of_the_tables_beside_it(
    fedkd: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What another table of the paper has run is not run again, and the figure is of the gains over the control."""
    words = ["--scale", "smoke", "--seeds", "1,2", "--jobs", "1"]
    assert fedkd("reproduce", "example/one", *words) == 0
    assert fedkd("reproduce", "example/three", *words) == 0
    out = tmp_path / "runs" / "reproduce" / "example"
    own = [f"free-{at}-s{seed}" for at in ("half-at-most", "none") for seed in (1, 2)]
    assert sorted(path.name for path in (out / "three" / "smoke").iterdir() if path.is_dir()) == own
    after, mixed = (
        [_curve(out / "one" / "smoke" / f"{row}-s{n}", "personal")[-1] for n in (1, 2)] for row in ("after", "mixed")
    )
    free = [_curve(out / "three" / "smoke" / f"free-none-s{n}", "personal")[-1] for n in (1, 2)]
    drawn = pd.read_csv(out / "three" / "smoke" / "over.csv").set_index(["series", "x"])
    assert (
        drawn.loc[("APFL", 0), "y"]
        == drawn.loc[("APFL", 1), "y"]
        == pytest.approx(np.subtract(mixed, after).mean(), abs=1e-4)
    )
    assert drawn.loc[("APFL, any", 1), "y"] == pytest.approx(np.subtract(free, after).mean(), abs=1e-4)
    labels = ["FedAvg_", "FedAvg, then local steps", "APFL", "APFL, any, Half, at most", "APFL, any, none"]
    rows = pd.read_csv(out / "three" / "smoke" / "rows.csv").set_index("series")
    assert list(rows.index) == labels
    assert rows.loc["APFL, any, none", "x"] == pytest.approx(np.mean(free), abs=1e-4)
    before = contents(out)
    monkeypatch.setattr(launch, "launch_all", None)
    assert fedkd("reproduce", "example/three", *words) == 0
    assert contents(out) == before
    with pytest.raises(TypeError):  # elsewhere there are no other tables
        fedkd("reproduce", "example/three", *words, "--out", str(tmp_path / "elsewhere"))


def test_a_table_of_newcomers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Epochs stand for rounds, the control starts from nothing, and a second call neither trains nor adapts."""
    whole = reproduce.Experiment.read("pgfed/new-clients", "smoke")
    few = dataclasses.replace(
        whole, adapt_epochs=2, rows=[row for row in whole.rows if row.name in ("local", "fedavg", "pgfed")]
    )
    runs = reproduce.reproduce(few, {}, [1], tmp_path, jobs=1)
    table = reproduce.table(few, runs)
    for row, line in zip(few.rows, table.to_dict("records"), strict=True):
        kept = pd.DataFrame(json.loads((tmp_path / "newcomers" / f"{row.name}-s1.json").read_text())["rows"])
        assert set(kept["client"]) == {8, 9}
        assert set(kept["label"]) == {"local" if row.method == "local" else row.method}
        curve = (100 * kept["correct"] / kept["total"]).groupby(kept["epoch"]).mean()
        assert [line["first"], line["last"], line["best"]] == pytest.approx([curve[0], curve[2], curve.max()])
    digests = reproduce.digests(few, runs)
    monkeypatch.setattr(launch, "launch_all", None)
    with monkeypatch.context() as patch:
        patch.setattr(adapt, "adapt", None)
        again = reproduce.reproduce(few, {}, [1], tmp_path, jobs=1)
    assert reproduce.digests(few, again).equals(digests)
    longer = reproduce.reproduce(dataclasses.replace(few, adapt_epochs=3), {}, [1], tmp_path, jobs=1)
    assert longer["pgfed"][0].evaluations["round"].max() == 3


@pytest.mark.usefixtures("example")
def test_several_best_rounds_are_pooled_over_seeds(tmp_path: Path) -> None:
    """As FedGen's tables have it: mean and deviation of the best rounds of all seeds together."""
    two = Experiment.read("example/two", "smoke")
    runs = reproduce.reproduce(two, {}, [1, 2], tmp_path, jobs=1)
    frame, made = reproduce.table(two, runs), reproduce.digests(two, runs)
    best = np.concatenate([np.sort(_curve(tmp_path / f"mixed-s{seed}", "personal"))[-2:] for seed in (1, 2)])
    assert frame["best"].iloc[2] == pytest.approx(best.mean())
    assert frame["best_std"].iloc[2] == pytest.approx(best.std())
    assert {"best 2 rounds", "last 2 rounds"} <= set(reproduce._text(two, frame)[0])
    assert made.groupby("row", sort=False)["best_2"].mean().tolist() == pytest.approx(frame["best"].tolist(), abs=1e-4)
    figure = reproduce.side_by_side(two, made)
    assert figure.axes[0].get_xlabel() == "accuracy in %, best 2 rounds"
    assert figure.numbers["x"].tolist() == pytest.approx(frame["best"].tolist(), abs=1e-4)
    assert reproduce.side_by_side(two, made, "last").numbers["published"].isna().all()  # another figure's


@pytest.mark.usefixtures("example")
def test_the_round_that_first_has_an_accuracy_is_compared_where_every_seed_has_it(tmp_path: Path) -> None:
    """In the table, by seed and as paired differences; a row that does not get there has none."""
    one = Experiment.read("example/one", "smoke")
    made = reproduce.reproduce(one, {}, [1, 2], tmp_path, jobs=1)
    curves = {row: [_curve(tmp_path / f"{row}-s{n}", "personal") for n in (1, 2)] for row in ("after", "mixed")}
    target = float(min(curve.max() for row in curves.values() for curve in row)) - 1e-6  # past the rounding of %
    first = {row: [1 + int(np.argmax(curve >= target)) for curve in found] for row, found in curves.items()}
    aimed = dataclasses.replace(one, target=target)
    frame = reproduce.table(aimed, made).set_index("row")
    assert frame["reached"]["APFL"] == np.mean(first["mixed"])
    heading = f"rounds to {target:g} %"
    assert heading in reproduce._text(aimed, frame.reset_index())[0]
    seeds = reproduce.digests(aimed, made).set_index(["row", "seed"])["reached"]
    assert [seeds["mixed", 1], seeds["mixed", 2]] == first["mixed"]
    paired = reproduce.differences(aimed, made)
    [line] = paired[(paired["row"] == "APFL") & (paired["of"] == heading)].to_dict("records")
    assert line["difference"] == np.mean(np.subtract(first["mixed"], first["after"]))
    never = dataclasses.replace(one, target=100.0)
    assert reproduce.table(never, made)["reached"].isna().all()
    assert set(reproduce.differences(never, made)["of"]) == {"last round"}


@pytest.mark.usefixtures("example")
def test_a_table_whose_published_values_are_best_rounds_compares_those_first(tmp_path: Path) -> None:
    """And the last round beside them, in the figure as in the differences."""
    one = dataclasses.replace(Experiment.read("example/one", "smoke"), best_rounds=1)
    made = reproduce.reproduce(one, {}, [1, 2], tmp_path, jobs=1)
    assert one.compared == "best"
    paired = reproduce.differences(one, made)
    assert list(dict.fromkeys(paired["of"])) == ["best round", "last round"]
    frame, found = reproduce.table(one, made), reproduce.digests(one, made)
    assert list(found.columns) == ["row", "seed", "last", "best", "digest"]
    figure = reproduce.side_by_side(one, found)
    assert figure.axes[0].get_xlabel() == "accuracy in %, best round"
    assert figure.numbers["x"].tolist() == pytest.approx(frame["best"].tolist(), abs=1e-4)


def test_what_published_values_are_of_is_said_where_it_is_something_else(tmp_path: Path) -> None:
    """In the table's heading, in the legend and in the caption."""
    wide = Experiment.read("fedgen/table2")
    assert [Experiment.read("fedgen/table1", scale).published_of for scale in ("smoke", "cpu")] == ["full size", ""]
    values = pd.DataFrame({"row": [row.name for row in wide.rows], "seed": 1, "best_5": 70.0})
    figure = reproduce.side_by_side(wide, values)
    assert "published (EMNIST)" in [text.get_text() for text in figure.legends[0].get_texts()]
    assert "Published values are of EMNIST" in figure.caption
    assert reproduce._text(wide, pd.DataFrame({"row": ["a"], "published": ["1"]}))[0] == ["row", "published (EMNIST)"]


def test_a_table_draws_the_curves_that_it_names(tmp_path: Path) -> None:
    """All of thirteen cannot be told apart; the lines begin near where they have settled."""
    table = dataclasses.replace(Experiment.read("fedgen/table1", "smoke"), curves=["fedavg", "fedgen-no-kl"], target=0)
    rows = [row for row in table.rows if row.name in ("fedavg", "fedgen-no-kl", "fedavg-lr01", "local")]
    table = dataclasses.replace(table, rows=[dataclasses.replace(row, against=()) for row in rows])
    reproduce.write(table, reproduce.reproduce(table, {}, [1], tmp_path, jobs=1), tmp_path)
    drawn = pd.read_csv(tmp_path / "convergence.csv")
    assert list(dict.fromkeys(drawn["series"])) == ["FedAvg, lr 0.01", "FedGen without the code-only KL term"]


@pytest.mark.usefixtures("example")
def test_the_time_of_local_training_is_the_median_over_all_participations(tmp_path: Path) -> None:
    """In milliseconds, beside the figures that clients log themselves."""
    one = Experiment.read("example/one", "smoke")
    (run,) = reproduce.reproduce(one, {}, [1], tmp_path, jobs=1)["after"]
    expected = 1000 * np.median([row["seconds"] for row in run.rows("clients")])
    timed, runs = dataclasses.replace(one, log=["milliseconds"]), {row.name: [run] for row in one.rows}
    assert set(reproduce.differences(timed, runs)["of"]) == {"milliseconds", "last round"}
    frame = reproduce.table(timed, runs)
    assert frame["milliseconds"].tolist() == pytest.approx([expected] * len(one.rows))
    figure = reproduce.side_by_side(timed, reproduce.digests(timed, runs))
    assert figure.axes[0].get_xlabel() == "local training (milliseconds)"
    assert figure.numbers["x"].tolist() == pytest.approx([expected] * len(one.rows), abs=1e-4)
    assert figure.numbers["published"].dropna().tolist() == [50, 60]


@pytest.mark.usefixtures("example")
def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    """A trial with fewer rounds does not end in the table of the whole."""
    one = Experiment.read("example/one", "smoke")
    reproduce.reproduce(one, {"run.rounds": 2}, [1], tmp_path, jobs=1)
    with pytest.raises(UserError, match="with other settings"):
        reproduce.reproduce(one, {"run.rounds": 3}, [1], tmp_path, jobs=1)
