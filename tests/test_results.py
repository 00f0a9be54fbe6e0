"""One cell of every committed table again, from the settings of the command that stands beside it.

The tables were measured on real data, which is not part of the project: ``FEDKD_DATA`` names its folder (that of
``data.root``), and without it the tests are skipped.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from sims.reproduce import SCALES, Experiment, digests, experiments, reproduce, table

PAGES = Path(__file__).resolve().parent.parent / "docs" / "results"
COMMAND = re.compile(r"^    fedkd reproduce (\S+)", re.MULTILINE)


def page_of(name: str) -> str:
    """Return the page that shows a table's results."""
    return next(text for path in sorted(PAGES.glob("*.md")) if name in COMMAND.findall(text := path.read_text("utf-8")))


def committed() -> list[str]:
    """Return the names of the tables whose results are committed."""
    return sorted(name for path in PAGES.glob("*.md") for name in COMMAND.findall(path.read_text("utf-8")))


def one_cell(page: str) -> tuple[str, int, float, str]:
    """Return label, seed, accuracy in % and first digits of the digest of a cell of a page's table by seed.

    Of the row of clients that train alone, where there is one: it takes the least time, and a rounding does not grow
    over its rounds into another accuracy, so that the figure can be compared on another processor.
    """
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    head = next(number for number, cells in enumerate(lines) if cells[1].startswith("seed ") and cells[-1] == "digests")
    alone = (cells for cells in lines[head + 2 :] if cells[0] == "local" and len(cells) == len(lines[head]))
    label, value, *_, digest = next(alone, lines[head + 2])
    return label, int(lines[head][1].removeprefix("seed ")), float(value), digest.split("`")[1]


def test_every_page_of_results_has_a_cell_to_make_again() -> None:
    """Every table has a page, and a page whose table cannot be read would never be checked."""
    assert committed() == sorted(experiments())
    for name in committed():
        label, *_, digest = one_cell(page_of(name))
        assert label in {row.label for row in Experiment.read(name, SCALES[1]).rows}
        assert re.fullmatch(r"[0-9a-f]{8}", digest)


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
