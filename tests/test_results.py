"""Every committed table: its numbers and its figure, and one cell again, from the command that stands beside it.

The tables were measured on real data, which is not part of the project: ``FEDKD_DATA`` names its folder (that of
``data.root``), and without it the tests are skipped.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from test_figures import assert_legible

from sims import figures
from sims.reproduce import SCALES, Experiment, digests, experiments, reproduce, table

PAGES = Path(__file__).resolve().parent.parent / "docs" / "results"
COMMAND = re.compile(r"^    fedkd reproduce (\S+)", re.MULTILINE)


def page_of(name: str) -> str:
    """Return the page that shows a table's results."""
    return next(text for path in sorted(PAGES.glob("*.md")) if name in COMMAND.findall(text := path.read_text("utf-8")))


def committed() -> list[str]:
    """Return the names of the tables whose results are committed."""
    return sorted(name for path in PAGES.glob("*.md") for name in COMMAND.findall(path.read_text("utf-8")))


def by_seed(page: str) -> list[tuple[str, int, float, str]]:
    """Return label, seed, accuracy in % and first digits of the digest of each cell of a page's table by seed."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()]
    head = next(n for n, cells in enumerate(lines) if cells[1:2] and cells[1][:5] == "seed " and cells[-1] == "digests")
    end = next((number for number in range(head, len(lines)) if lines[number] == [""]), len(lines))
    seeds = [int(cell.removeprefix("seed ")) for cell in lines[head][1:-1]]
    return [
        (label, seed, float(value), digest)
        for label, *values, digests in lines[head + 2 : end]
        for seed, value, digest in zip(seeds, values, re.findall("`(.*?)`", digests), strict=True)
    ]


def one_cell(page: str) -> tuple[str, int, float, str]:
    """Return label, seed, accuracy in % and first digits of the digest of a cell of a page's table by seed.

    Of the row of clients that train alone, where there is one: it takes the least time, and a rounding does not grow
    over its rounds into another accuracy, so that the figure can be compared on another processor.
    """
    cells = by_seed(page)
    return next((cell for cell in cells if cell[0] == "local"), cells[0])


def test_every_page_of_results_has_a_cell_to_make_again() -> None:
    """Every table has a page, and a page whose table cannot be read would never be checked."""
    assert committed() == sorted(experiments())
    for name in committed():
        label, *_, digest = one_cell(page_of(name))
        assert label in {row.label for row in Experiment.read(name, SCALES[1]).rows}
        assert re.fullmatch(r"[0-9a-f]{8}", digest)


@pytest.mark.parametrize("name", committed())
def test_the_numbers_are_those_of_the_page(name: str) -> None:
    """Row for row and seed for seed, to the digits that the page has, of the rows that were measured."""
    experiment, page = Experiment.read(name, SCALES[1]), figures.pages(PAGES.parent)[name]
    made, cells = figures.committed(page), by_seed(page.read_text(encoding="utf-8"))
    column = experiment.compared if experiment.best_rounds > 1 else "last"
    labels = {row.label: row.name for row in experiment.rows}
    assert list(made["row"].unique()) == [row.name for row in experiment.rows if row.name in set(made["row"])]
    for line, (label, seed, value, digest) in zip(made.to_dict("records"), cells, strict=True):
        assert labels.get(label, line["row"]) == line["row"]  # some pages have shorter labels, in the same order
        assert line["seed"] == seed
        assert line[column] == pytest.approx(value, abs=0.0051)
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
    figure = figures.figure(name, page)
    assert_legible(figure)
    drawn = figure.numbers.set_index("series")
    published = drawn["published"].dropna()
    made = figures.committed(page)
    measured = [row for row in experiment.rows if row.name in set(made["row"])]
    assert [f"{value:.2f}" for value in published] == [row.published[:5] for row in measured if row.published]
    if experiment.compared in made:
        for row in measured:
            assert drawn.loc[row.label, "x"] == pytest.approx(
                made.loc[made["row"] == row.name, experiment.compared].mean()
            )


@pytest.mark.slow
def test_times_are_those_of_the_page() -> None:
    """Their means alone are on record."""
    page = figures.pages(PAGES.parent)["fedgen/table3"]
    cells = [line.split(" | ") for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    head = next(number for number, line in enumerate(cells) if "milliseconds" in line)
    made = figures.committed(page, "milliseconds")
    texts = [f"{line['milliseconds']:.2f} ± {line['milliseconds_std']:.2f}" for line in made.to_dict("records")]
    assert texts == [line[cells[head].index("milliseconds")] for line in cells[head + 2 : head + 2 + len(made)]]


@pytest.mark.slow
def test_figures_are_drawn_anew(tmp_path: Path) -> None:
    """From a page and its numbers, and nothing else."""
    (tmp_path / "results" / "runs").mkdir(parents=True)
    (tmp_path / "figures").mkdir()
    for file in ("apfl-iid.md", "runs/apfl-iid.csv"):
        (tmp_path / "results" / file).write_bytes((PAGES / file).read_bytes())
    figures.main(tmp_path)
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["apfl-iid-rows.png"]


@pytest.mark.slow
@pytest.mark.reproduction
@pytest.mark.skipif("FEDKD_DATA" not in os.environ, reason="real data has to be in $FEDKD_DATA")
@pytest.mark.parametrize("name", committed())
def test_a_committed_cell_comes_out_again(name: str, tmp_path: Path) -> None:
    """The same digest on the same type of processor and PyTorch; elsewhere the same accuracy within half a point."""
    label, seed, accuracy, digest = one_cell(page_of(name))
    experiment = Experiment.read(name, SCALES[1])
    rows = {row.name: row for row in experiment.rows}
    wanted = next(row for row in experiment.rows if row.label == label)
    one = replace(experiment, rows=[replace(rows[wanted.runs], score=wanted.score, against=())])
    made = reproduce(one, {"data.root": os.environ["FEDKD_DATA"]}, [seed], tmp_path, jobs=1)
    ours = table(one, made)["last" if experiment.best_rounds == 1 else "best"][0]
    again = digests(one, made)["digest"][0]
    assert again.startswith(digest) or abs(ours - accuracy) < 0.5, f"{ours:.2f} %, {accuracy} % committed; {again}"
