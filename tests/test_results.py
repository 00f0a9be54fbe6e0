"""Every committed table: its numbers and its figure, and cells again, from the command that stands beside it.

The tables were measured on real data, which is not part of the project: ``FEDKD_DATA`` names its folder (that of
``data.root``), and without it the tests are skipped.  Where a table was measured on a part of a data set that has a
folder of its own there, ``NAME_small``, that one is taken, so that one call makes cells of all pages.
"""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import processors
import pytest
from PIL import Image
from test_figures import COARSENESS, TOLERANCE, assert_legible, distance

from fedkd.errors import UserError
from plots import style
from sims import figures
from sims.reproduce import SCALES, Experiment, Row, digests, experiments, reproduce, table

PAGES = Path(__file__).resolve().parent.parent / "docs" / "results"


def page_of(name: str) -> str:
    """Return the page that shows a table's results."""
    return figures.pages(PAGES.parent)[name].read_text(encoding="utf-8")


def committed() -> list[str]:
    """Return the names of the tables whose results are committed."""
    return sorted(figures.pages(PAGES.parent))


@dataclass(frozen=True)
class Cells:
    """A row of a page's table by seed."""

    accuracies: dict[int, float]
    digests: dict[int, str]


def by_seed(page: str) -> dict[str, Cells]:
    """Return, by label, accuracies in % and first digits of digests from a page's table by seed."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    head = next(number for number, cells in enumerate(lines) if cells[1].startswith("seed ") and cells[-1] == "digests")
    seeds = [int(cell.removeprefix("seed ")) for cell in lines[head][1:-1]]
    found = {}
    for label, *values, names in lines[head + 2 :]:
        if len(values) != len(seeds) or "`" not in names:
            break
        found[label] = Cells(
            dict(zip(seeds, map(float, values), strict=True)),
            dict(zip(seeds, re.findall(r"`([0-9a-f]+)`", names), strict=True)),
        )
    return found


def on_page(row: Row, cells: dict[str, Cells]) -> Cells | None:
    """Return the cells of a row; a page may leave out what all of its labels begin with."""
    found = [mine for label, mine in cells.items() if row.label == label or row.label.endswith(f" {label}")]
    return found[0] if found else None


@dataclass(frozen=True)
class Cell:
    """A cell of a page.

    Args:
        row: the row of the experiment.
        seed: its seed.
        accuracy: the committed accuracy, in %.
        digest: first digits of the committed digest.
        tolerance: how far another processor's accuracy may be from it, in points.
    """

    row: Row
    seed: int
    accuracy: float
    digest: str
    tolerance: float


LEAST = 0.5
"""Points that another processor's accuracy may always be away, as an image or two are of a few hundred."""
COSTLY = ("run.clients-per-round", "fedgen.hidden", "fedgen.batch")
"""What makes one row of a method longer than another."""


def cell_of_a_control(name: str) -> Cell:
    """Return a cell of the row of clients that train alone, where there is one, else of the first.

    It takes the least time, and a rounding does not grow over its rounds into another accuracy.
    """
    experiment, cells = Experiment.read(name, SCALES[1]), by_seed(page_of(name))
    rows = sorted(experiment.rows, key=lambda row: row.method != "local")
    row, mine = next((row, mine) for row in rows if (mine := on_page(row, cells)))
    return _first(row, mine, LEAST)


def cell_of_the_paper(name: str) -> Cell:
    """Return a cell of the cheapest row of the paper's own method, of a sweep one of its steps.

    Training is chaotic: on another processor a sum is rounded differently, and after enough steps that is another run
    of the same setting, with the same data.  It is no further from the committed one than runs of other seeds are: the
    tolerance is twice the deviation over seeds, of the accuracy itself or of its difference from a row that the page
    compares it with, whichever is smaller, since with some partitions all rows are higher.
    """
    experiment, cells = Experiment.read(name, SCALES[1]), by_seed(page_of(name))
    rows = [
        (row, mine)
        for row in experiment.rows
        if row.method == name.partition("/")[0] and not row.control and (mine := on_page(row, cells))
    ]
    row, mine = min(rows, key=lambda pair: [not pair[0].at, *(pair[0].settings.get(key, 0) for key in COSTLY)])
    values = list(mine.accuracies.values())
    others = [on_page(other, cells) for other in experiment.rows if other.name in row.against]
    pairs = [[v - w for v, w in zip(values, other.accuracies.values(), strict=True)] for other in others if other]
    return _first(row, mine, max(LEAST, 2 * min(map(statistics.stdev, [values, *pairs]))))


def _first(row: Row, mine: Cells, tolerance: float) -> Cell:
    seed = next(iter(mine.digests))
    return Cell(row, seed, mine.accuracies[seed], mine.digests[seed], tolerance)


def test_every_page_of_results_has_a_cell_to_make_again() -> None:
    """Every measured table has a page, and a page whose table cannot be read would never be checked."""
    assert committed() == sorted(name for name in experiments() if not Experiment.read(name).not_measured)
    for name in committed():
        for cell in (cell_of_a_control(name), cell_of_the_paper(name)):
            assert re.fullmatch(r"[0-9a-f]{8}", cell.digest)
            assert 0 < cell.accuracy < 100
        assert cell_of_the_paper(name).tolerance < 6


@pytest.mark.parametrize(
    ("model", "flags", "named"),
    [
        ("AMD EPYC 7B13", "avx2", "AMD EPYC"),
        ("AMD EPYC 9B14", "avx2 avx512f", "AMD EPYC with AVX-512"),
        ("Intel(R) Xeon(R) Processor", "avx512f amx_bf16", "Intel Xeon with AVX-512 and AMX"),
    ],
)
def test_a_page_names_its_processor(model: str, flags: str, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of its first table, whole; a page that names none, or another PyTorch, asks for no digest."""
    monkeypatch.setattr(processors, "_cpuinfo", lambda: {"model name": model, "flags": flags})
    monkeypatch.setattr(processors.torch, "__version__", "2.13.0+cpu")
    page = "Machine: a server{},\nCPU only, PyTorch {}. Digests.\n\nMachine: a server (AMD EPYC), PyTorch 2.13.\n"
    types = ("AMD EPYC", "AMD EPYC with AVX-512", "Intel Xeon with AVX-512", "Intel Xeon with AVX-512 and AMX")
    assert [name for name in types if processors.is_named(page.format(f" ({name})", "2.13"))] == [named]
    assert not processors.is_named(page.format("", "2.13"))
    assert not processors.is_named(page.format(f" ({named})", "2.12"))


@pytest.mark.parametrize("name", committed())
def test_the_numbers_are_those_of_the_page(name: str) -> None:
    """Row for row and seed for seed, to the digits that the page has, of the rows that were measured."""
    experiment, page = Experiment.read(name, SCALES[1]), figures.pages(PAGES.parent)[name]
    made = figures.committed(page)
    cells = [
        (label, seed, mine.accuracies[seed], mine.digests[seed])
        for label, mine in by_seed(page.read_text(encoding="utf-8")).items()
        for seed in mine.digests
    ]
    labels = {row.label: row.name for row in experiment.rows}
    assert list(made["row"].unique()) == [row.name for row in experiment.rows if row.name in set(made["row"])]
    for line, (label, seed, value, digest) in zip(made.to_dict("records"), cells, strict=True):
        assert labels.get(label, line["row"]) == line["row"]  # some pages have shorter labels, in the same order
        assert line["seed"] == seed
        assert line[experiment.counted] == pytest.approx(value, abs=0.0051)
        assert line["digest"].startswith(digest)


@pytest.mark.parametrize("name", committed())
def test_a_page_shows_its_figures(name: str) -> None:
    """One at least that is named after it, and only such that exist."""
    page = figures.pages(PAGES.parent)[name]
    shown = re.findall(r"!\[[^\]]+\]\((\S+)\)", page.read_text(encoding="utf-8"))
    assert all((PAGES / path).is_file() for path in shown)
    assert any(path.startswith(f"../figures/{page.stem}") for path in shown)
    assert (PAGES.parent / "figures" / f"{page.stem}-rows.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", committed())
def test_a_figure_is_drawn_from_the_numbers(name: str) -> None:
    """Mean over seeds and published value of every row, with nothing on anything else."""
    experiment, page = Experiment.read(name, SCALES[1]), figures.pages(PAGES.parent)[name]
    drawn_now = figures.figures(name, page)
    for figure in drawn_now.values():
        assert_legible(figure)
    figure = drawn_now[f"{page.stem}-rows"]
    drawn = figure.numbers.set_index("series")
    published = drawn["published"].dropna()
    made = figures.committed(page)
    measured = [row for row in experiment.rows if row.name in set(made["row"])]
    assert [f"{value:.2f}" for value in published] == [row.published[:5] for row in measured if row.published]
    for row in measured:
        assert drawn.loc[row.label, "x"] == pytest.approx(made.loc[made["row"] == row.name, experiment.compared].mean())


@pytest.mark.slow
@pytest.mark.parametrize("name", committed())
def test_a_committed_figure_is_what_is_drawn_now(name: str, tmp_path: Path) -> None:
    """Coarsely; after a change that is meant, ``python -m sims.figures`` draws all of them."""
    for stem, figure in figures.figures(name, figures.pages(PAGES.parent)[name]).items():
        now, *_ = style.save(figure, tmp_path / stem)
        with Image.open(now) as mine, Image.open(PAGES.parent / "figures" / now.name) as theirs:
            one, other = (image.convert("RGB").reduce(COARSENESS) for image in (mine, theirs))
        assert distance(one, other) < TOLERANCE


@pytest.mark.slow
def test_figures_are_drawn_anew(tmp_path: Path) -> None:
    """From a page and its numbers, and nothing else."""
    (tmp_path / "results" / "runs").mkdir(parents=True)
    (tmp_path / "figures").mkdir()
    for file in ("apfl-iid.md", "runs/apfl-iid.csv"):
        (tmp_path / "results" / file).write_bytes((PAGES / file).read_bytes())
    figures.main(tmp_path)
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["apfl-iid-rows.png"]


def test_results_are_taken_over_into_a_page(tmp_path: Path) -> None:
    """What was written to a folder takes the place of the page's tables and numbers, and nothing else changes."""
    before = (PAGES / "apfl-iid.md").read_text(encoding="utf-8")
    (tmp_path / "results" / "runs").mkdir(parents=True)
    (page := tmp_path / "results" / "apfl-iid.md").write_text(before, encoding="utf-8")
    made = pd.read_csv(PAGES / "runs" / "apfl-iid.csv", dtype={"digest": str})
    with pytest.raises(UserError, match=r"runs\.csv: No such file .* a folder of `fedkd reproduce` is wanted"):
        figures.take("apfl-iid", tmp_path, tmp_path)
    with pytest.raises(UserError, match=r"no page of results 'apfl-idd'; did you mean 'apfl-iid'"):
        figures.take("apfl-idd", tmp_path, tmp_path)
    head, values, *_ = tables = re.findall(r"^\| row \|(?: published| minus)(?:.*\n\|)+.*\n", before, re.MULTILINE)
    assert len(tables) == 2
    (tmp_path / "table.md").write_text("\n".join(tables), encoding="utf-8")
    made.assign(best=1.0, digest=made["digest"] + "0123").to_csv(tmp_path / "runs.csv", index=False)
    figures.take("apfl-iid", tmp_path, tmp_path)
    assert page.read_text(encoding="utf-8") == before
    assert (tmp_path / "results" / "runs" / "apfl-iid.csv").read_text() == (PAGES / "runs" / "apfl-iid.csv").read_text()
    (tmp_path / "table.md").write_text(f"{head.replace('53.89', '12.34')}\n{values}", encoding="utf-8")
    made.replace({"last": {made["last"].iloc[0]: 43.21}}).to_csv(tmp_path / "runs.csv", index=False)
    figures.take("apfl-iid", tmp_path, tmp_path)
    after = page.read_text(encoding="utf-8")
    assert ("control: local | - | 53.89" in before, "control: local | - | 12.34" in after) == (True, True)
    assert "\n| FedAvg, global model | 43.21 |" in after
    page.write_text(after + head, encoding="utf-8")
    with pytest.raises(UserError, match=r"has 2 tables that begin with `\| row \| published \|`"):
        figures.take("apfl-iid", tmp_path, tmp_path)


@pytest.mark.slow
@pytest.mark.reproduction
@pytest.mark.skipif("FEDKD_DATA" not in os.environ, reason="real data has to be in $FEDKD_DATA")
@pytest.mark.parametrize("cell_of", [cell_of_a_control, cell_of_the_paper])
@pytest.mark.parametrize("name", committed())
def test_a_committed_cell_comes_out_again(name: str, cell_of: Callable[[str], Cell], tmp_path: Path) -> None:
    """The same digest on the type of processor that the page names; elsewhere an accuracy within the tolerance."""
    cell, experiment = cell_of(name), Experiment.read(name, SCALES[1])
    rows = {row.name: row for row in experiment.rows}
    one = replace(experiment, rows=[replace(rows[cell.row.runs], score=cell.row.score, against=())])
    made = reproduce(one, {"data.root": str(root(experiment))}, [cell.seed], tmp_path, jobs=1)
    ours = table(one, made)["best" if experiment.best_rounds else "last"][0]
    again = digests(one, made)["digest"][0]
    said = f"{ours:.2f} %, {cell.accuracy} ± {cell.tolerance:.2f} % committed; {again[:8]}, {cell.digest} committed"
    print(f"{name}, {cell.row.label}, seed {cell.seed}: {said}")
    if not again.startswith(cell.digest):
        assert not processors.is_named(page_of(name)), said
        assert abs(ours - cell.accuracy) <= cell.tolerance, said


def root(experiment: Experiment) -> Path:
    """Return the folder of a table's data: that of the part that was measured, where it has one."""
    data = Path(os.environ["FEDKD_DATA"])
    small = data / f"{experiment.settings['data.name']}_small"
    return small if small.is_dir() else data
