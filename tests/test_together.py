"""Settings of a comparison that are not for all of its methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedkd.method import names
from fedkd.results import Run
from sims.together import sends_counts_alone

pytestmark = pytest.mark.slow

COMPARE = ["--clients=6", "--rounds=1", "--seeds=1", "--jobs=1", "--set=data.alpha=0.5", "--set=train.local-steps=1"]
MEDIAN = "--set=aggregation.rule=median"
PRIVATE = [f"--set=privacy.{key}" for key in ("clip-norm=0.5", "noise-multiplier=1.0")]

Fedkd = Callable[..., int]
Capture = pytest.CaptureFixture[str]


def test_only_one_method_sends_nothing() -> None:
    """The control without a federation; a new one like it would be no surprise, an averaging one would."""
    assert [method for method in names() if sends_counts_alone(method)] == ["local"]


@pytest.mark.parametrize(
    "settings", [[MEDIAN], [*PRIVATE, "--set=fedavg.weighting=uniform"]], ids=["median", "private"]
)
def test_the_control_stands_beside_a_rule_that_is_not_for_it(
    settings: list[str], fedkd: Fedkd, capsys: Capture, tmp_path: Path
) -> None:
    """It runs without, its numbers are those of any comparison, and a line says so."""
    assert fedkd("compare", "local", "fedavg", *COMPARE, *settings, "--out", "with") == 0
    said = capsys.readouterr().err
    assert "not for local, whose clients send no model" in said
    assert fedkd("compare", "local", *COMPARE, "--out", "without") == 0
    assert "not for local" not in capsys.readouterr().err
    local, fedavg = (Run.open(tmp_path / "with" / f"{method}-s1") for method in ("local", "fedavg"))
    assert local.digest() == Run.open(tmp_path / "without" / "local-s1").digest()
    assert (local.config.aggregation.rule, local.config.privacy.on) == ("mean", False)
    assert (fedavg.config.aggregation.rule == "median") != fedavg.config.privacy.on


def test_a_sweep_treats_the_control_likewise(fedkd: Fedkd, capsys: Capture, tmp_path: Path) -> None:
    """Once for all values of what it does not read, whether they are swept or given."""
    over = ["--over", "aggregation.rule=mean,median", "--over", "train.lr=0.05,0.1", "--set=aggregation.clip-norm=5.0"]
    assert fedkd("sweep", "local", "fedavg", *over, *COMPARE, "--out", "swept") == 0
    said = capsys.readouterr().err
    assert "aggregation.clip-norm, aggregation.rule: not for local, whose clients send no model" in said
    assert sorted(path.parent.name for path in (tmp_path / "swept").glob("*/summary.json")) == [
        *(f"fedavg-rule={rule}-lr={lr}-s1" for rule in ("mean", "median") for lr in (0.05, 0.1)),
        *(f"local-lr={lr}-s1" for lr in (0.05, 0.1)),
    ]
    local = Run.open(tmp_path / "swept" / "local-lr=0.1-s1")
    assert (local.config.aggregation.rule, local.config.aggregation.clip_norm) == ("mean", 0.0)


def test_a_sweep_names_all_who_cannot(fedkd: Fedkd, capsys: Capture, tmp_path: Path) -> None:
    """As a comparison does, and for the control alone too."""
    over = ["--over", "aggregation.rule=mean,median"]
    assert fedkd("sweep", "local", "pgfed", "fedavg", "scaffold", *over, *COMPARE, "--out", "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for said in ("pgfed also takes", "scaffold also takes", "Or sweep pgfed scaffold in an --out of their own"):
        assert said in error
    assert fedkd("sweep", "local", *over, *COMPARE, "--out", "out") == 2
    assert "local a" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_all_who_cannot_are_named_at_once(fedkd: Fedkd, capsys: Capture, tmp_path: Path) -> None:
    """Beside methods that can, they would look as if they had the rule too."""
    assert fedkd("compare", "local", "pgfed", "fedavg", "scaffold", *COMPARE, MEDIAN, "--out", "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for said in ("pgfed also takes", "scaffold also takes", "Or compare pgfed scaffold in an --out of their own"):
        assert said in error
    assert "local" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("methods", [["local"], ["local", "scaffold"], ["pgfed", "scaffold"]], ids=" ".join)
def test_where_nobody_can_there_is_nothing_to_split(methods: list[str], fedkd: Fedkd, capsys: Capture) -> None:
    """A rule for nobody is a mistake, also for the control on its own."""
    assert fedkd("compare", *methods, *COMPARE, MEDIAN, "--out", "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Or compare" not in error
    assert f"{methods[-1]} a" in error


def test_other_mistakes_are_said_as_ever(fedkd: Fedkd, capsys: Capture) -> None:
    """A value out of range is nobody's fault in particular."""
    assert fedkd("compare", "local", "fedavg", *COMPARE, "--set=train.lr=-1", MEDIAN, "--out", "out") == 2
    assert capsys.readouterr().err.startswith("fedkd: train.lr")
    assert fedkd("compare", "local", "fedavg", *COMPARE, "--set=aggregation.rule=modus", "--out", "out") == 2
    error = capsys.readouterr().err
    assert "aggregation.rule" in error
    assert "Or compare" not in error
