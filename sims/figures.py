"""Draw the tables of the committed results, from the numbers committed with them: ``python -m sims.figures``.

``python -m sims.figures NAME FOLDER`` first takes the results of ``fedkd reproduce --out FOLDER`` over into the page
``docs/results/NAME.md``: its tables, the numbers beside it and, where the page shows ``docs/figures/NAME.png``, the
figure by round.  What the page says of them stays to be read again.

``docs/results/runs/NAME.csv`` holds what ``runs.csv`` of the table on the page ``docs/results/NAME.md`` holds, as far
as it is on record.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from fedkd.errors import UserError, nearest
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


def committed(page: Path) -> pd.DataFrame:
    """Return the numbers committed with a page, a line per row and seed."""
    return pd.read_csv(page.parent / "runs" / f"{page.stem}.csv", dtype={"digest": str})


def figures(name: str, page: Path) -> dict[str, style.CaptionedFigure]:
    """Draw a table from the numbers committed with its page: its rows, and a table over some settings over these too.

    Returns:
        the figures by the names of their files.
    """
    experiment, made = Experiment.read(name, SCALES[1]), committed(page)
    drawn = {f"{page.stem}-rows": side_by_side(experiment, made)}
    return drawn | ({page.stem: over(experiment, made)} if experiment.over else {})


def take(name: str, folder: Path, docs: Path = DOCS) -> None:
    """Put the tables that were written to a folder into a page, each in the place of the one that begins alike.

    Args:
        name: of the page.
        folder: where ``fedkd reproduce`` wrote them, and its figures, at scale ``cpu``.
        docs: whose ``results`` the page is one of.

    Raises:
        UserError: there is no such page, the folder has no such tables or figure, or the page has not the same tables,
            each once.
    """
    page = docs / "results" / f"{name}.md"
    tables = {path.stem: table for table, path in pages(docs).items()}
    if name not in tables:
        raise UserError(f"no page of results '{name}'{nearest(name, tables)} (known: {', '.join(tables)})")
    experiment = Experiment.read(tables[name], SCALES[1])
    drawn = docs / "figures" / f"{name}.png"
    try:
        text, made = page.read_text(encoding="utf-8"), pd.read_csv(folder / "runs.csv")
        written = (folder / "table.md").read_text(encoding="utf-8")
        by_round = f"(../figures/{drawn.name})" in text and not experiment.over
        figure = "newcomers" if experiment.adapt_epochs else "convergence"
        picture = (folder / f"{figure}.png").read_bytes() if by_round else b""
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; a folder of `fedkd reproduce` is wanted") from error
    wanted = dict.fromkeys(["row", "seed", "last", experiment.compared, "reached", "digest"])
    made = made[[column for column in wanted if column in made]].assign(digest=made["digest"].str[:8])
    made = made.astype({"reached": "Int64"} if "reached" in made else {})
    for table in [*_TABLE.findall(written), _by_seed(experiment, made, experiment.counted)]:
        head = "|".join(table.split("|")[:3])  # what its first two columns are called
        found = [other for other in _TABLE.findall(text) if other.startswith(head)]
        if len(found) != 1:
            raise UserError(f"{page}: has {len(found)} tables that begin with `{head}|`, and one is to be replaced")
        text = text.replace(found[0], table)
    page.write_text(text, encoding="utf-8")
    if by_round:
        drawn.write_bytes(picture)
    made.to_csv(page.parent / "runs" / f"{name}.csv", index=False, float_format="%.2f")


_TABLE = re.compile(r"^\| row (?:\|.*\n)+", re.MULTILINE)


def _by_seed(experiment: Experiment, made: pd.DataFrame, column: str) -> str:
    """Return the table of what every run came to, with its digest."""
    seeds = sorted(made["seed"].unique())
    lines = [["row", *(f"seed {seed}" for seed in seeds), "digests"]]
    for row in experiment.rows:
        if row.name not in set(made["row"]):
            continue  # of some tables not all rows are measured
        mine = made[made["row"] == row.name].set_index("seed").loc[seeds]
        values = [f"{value:.2f}" for value in mine[column]]
        lines.append([row.label, *values, " ".join(f"`{digest}`" for digest in mine["digest"])])
    head, *body = [f"| {' | '.join(line)} |\n" for line in lines]
    return "".join([head, f"|---|{'---:|' * len(seeds)}---|\n", *body])


def main(docs: Path = DOCS) -> None:
    """Draw the figures of every page ``docs/results/NAME.md`` that has a table, to ``docs/figures``."""
    for name, page in pages(docs).items():
        for stem, figure in figures(name, page).items():
            with TemporaryDirectory() as folder:
                png, *_ = style.save(figure, Path(folder) / "figure")
                shutil.copyfile(png, docs / "figures" / f"{stem}.png")


if __name__ == "__main__":
    if sys.argv[1:]:
        page_name, results = sys.argv[1:]
        take(page_name, Path(results))
    main()
