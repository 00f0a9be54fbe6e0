"""Draw the tables of the committed results, from the numbers committed with them: ``python -m sims.figures``.

``docs/results/runs/NAME.csv`` holds what ``runs.csv`` of the table on the page ``docs/results/NAME.md`` holds, as far
as it is on record; where what published values are compared with is known as means over seeds only, those are in
``NAME-COLUMN.csv``.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from plots import style
from sims.reproduce import SCALES, Experiment, side_by_side

DOCS = Path("docs")
COMMAND = re.compile(r"^    fedkd reproduce (\S+)", re.MULTILINE)


def pages(docs: Path = DOCS) -> dict[str, Path]:
    """Return the page of each table whose results are committed, by the table's name."""
    found = {}
    for path in sorted((docs / "results").glob("*.md")):
        if command := COMMAND.search(path.read_text(encoding="utf-8")):
            found[command[1]] = path
    return found


def committed(page: Path, column: str = "") -> pd.DataFrame:
    """Return the numbers committed with a page: a line per row and seed, or the means of a column over seeds."""
    name = f"{page.stem}-{column}" if column else page.stem
    return pd.read_csv(page.parent / "runs" / f"{name}.csv", dtype={"digest": str})


def figure(name: str, page: Path) -> style.CaptionedFigure:
    """Draw a table from the numbers committed with its page."""
    experiment = Experiment.read(name, SCALES[1])
    made = committed(page)
    return side_by_side(experiment, made if experiment.compared in made else committed(page, experiment.compared))


def main(docs: Path = DOCS) -> None:
    """Draw ``docs/figures/NAME-rows.png`` for every page ``docs/results/NAME.md`` that has a table."""
    for name, page in pages(docs).items():
        with TemporaryDirectory() as folder:
            png, *_ = style.save(figure(name, page), Path(folder) / "rows")
            shutil.copyfile(png, docs / "figures" / f"{page.stem}-rows.png")


if __name__ == "__main__":
    main()
