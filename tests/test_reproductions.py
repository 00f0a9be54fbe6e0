"""Every published table at scale smoke, by the command that the documentation gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sims import reproduce

pytestmark = [pytest.mark.slow, pytest.mark.reproduction]


def files(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """Return content and time of every file."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", reproduce.experiments())
def test_a_table_is_made_and_a_second_call_runs_nothing(name: str, tmp_path: Path) -> None:
    """A table and figures with published values and controls; then the same bytes, and no run is touched."""
    words = ["reproduce", name, "--scale", "smoke", "--seeds", "1", "--jobs", "1", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "sims.cli", *words]
    subprocess.run(command, check=True, timeout=600)
    first = files(tmp_path)
    experiment = reproduce.Experiment.read(name, "smoke")
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert all(row.label in table for row in experiment.rows)
    figure = "over" if experiment.over else "convergence"
    assert {"table.csv", "table.tex", f"{figure}.png", f"{figure}.pdf"} <= {path.name for path in first}
    runs = {path: found for path, found in first.items() if path.name == "rounds.jsonl"}
    assert len(runs) == len({row.runs for row in experiment.rows})
    subprocess.run(command, check=True, timeout=600)
    second = files(tmp_path)
    assert {path: content for path, (content, _) in second.items()} == {p: content for p, (content, _) in first.items()}
    assert {path: second[path] for path in runs} == runs
