"""Folders that the environment names: absolute, or refused in one line, since Flower and Ray work elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import tiny

from fedkd.data.devices import Place
from fedkd.errors import UserError
from fedkd.places import cache_root, results_root
from fedkd.results import run_folder

PLACES = [("FEDKD_RUNS", results_root), ("FEDKD_CACHE", cache_root)]
each = pytest.mark.parametrize(("variable", "place"), PLACES, ids=["runs", "cache"])


@each
def test_a_folder_is_taken_as_it_is_named(
    variable: str, place: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An absolute one, or one in the home folder: a shell leaves the sign for that alone behind other words."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(variable, "/somewhere/else")
    assert place() == Path("/somewhere/else")
    monkeypatch.setenv(variable, "~/mine")
    assert place() == tmp_path / "mine"


@each
@pytest.mark.parametrize("empty", ["", " ", None])
def test_an_empty_word_is_a_variable_that_is_not_set(
    variable: str, place: Callable[[], Path], empty: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It must not become the folder that one happens to be in."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.delenv(variable) if empty is None else monkeypatch.setenv(variable, empty)
    assert place() == tmp_path / {"FEDKD_RUNS": "fedkd-runs", "FEDKD_CACHE": ".cache/fedkd"}[variable]
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert variable == "FEDKD_RUNS" or place() == Path("/caches/fedkd")


@each
@pytest.mark.parametrize(("told", "why"), [("runs", "has to be absolute"), ("~nobody-of-this-name/x", "home")])
def test_a_folder_that_is_another_one_elsewhere_is_refused(
    variable: str, place: Callable[[], Path], told: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line names the variable and its value."""
    monkeypatch.setenv(variable, told)
    with pytest.raises(UserError, match=f"^{variable} = '{told}'.*{why}"):
        place()


@pytest.mark.parametrize(("name", "why"), [("file", "it is a file"), ("x" * 300, "File name too long")])
def test_results_do_not_go_into_a_file(name: str, why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither those of a run without a folder of its own nor the states on a device."""
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FEDKD_RUNS", str(tmp_path / name))
    node = {"clients": "0", "data": "/data"}
    for asked in (lambda: run_folder(tiny(), 1), lambda: Place.read(node)):
        with pytest.raises(UserError, match=f"{name}: {why}; set FEDKD_RUNS to another folder$"):
            asked()
    assert Place.read({**node, "state": "/state"}).state == Path("/state")


def test_the_command_line_says_so_before_anything_starts(
    fedkd: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One line, code 2, and no folder of that name."""
    monkeypatch.setenv("FEDKD_CACHE", "cache")
    assert fedkd("run", "fedavg", "--out", "out") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fedkd: FEDKD_CACHE = 'cache' has to be absolute, since nodes work elsewhere: {tmp_path}")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
