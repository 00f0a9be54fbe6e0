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
from sims.reproduce import SCALES, Experiment, over, side_by_side

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


def figures(name: str, page: Path) -> dict[str, style.CaptionedFigure]:
    """Draw a table from the numbers committed with its page: its rows, and a table over some settings over these too.

    Returns:
        the figures by the names of their files.
    """
    experiment, made = Experiment.read(name, SCALES[1]), committed(page)
    shown = made if experiment.compared in made else committed(page, experiment.compared)
    drawn = {f"{page.stem}-rows": side_by_side(experiment, shown)}
    return drawn | ({page.stem: over(experiment, made)} if experiment.over else {})


def main(docs: Path = DOCS) -> None:
    """Draw the figures of every page ``docs/results/NAME.md`` that has a table, to ``docs/figures``."""
    for name, page in pages(docs).items():
        for stem, figure in figures(name, page).items():
            with TemporaryDirectory() as folder:
                png, *_ = style.save(figure, Path(folder) / "figure")
                shutil.copyfile(png, docs / "figures" / f"{stem}.png")


if __name__ == "__main__":
    main()
