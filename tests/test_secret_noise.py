"""Noise that nobody can compute again: where it comes from, what it makes possible on devices, and what it costs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import tiny

from clients.app import app as client_app
from fedkd.config import Scalar
from fedkd.data.devices import write_split
from fedkd.errors import UserError
from fedkd.ignored import ignored
from fedkd.results import Run
from fedkd.setup import Setup
from sims import inline
from strategies import privacy
from strategies.app import app as server_app
from strategies.fedavg import State

SECRET: dict[str, Scalar] = {
    "fedavg.weighting": "uniform",
    "privacy.clip-norm": 0.5,
    "privacy.noise-multiplier": 1.0,
    "privacy.noise": "secret",
}


def noise(size: int = 200_000, round: int = 1, **flat: Scalar) -> torch.Tensor:
    """Return what the server adds to a model of zeros."""
    setup = Setup.build(tiny(**SECRET, **flat), (1, 8, 8), 10, torch.device("cpu"))
    state = privacy.noised(setup, State(torch.zeros(size), torch.zeros(0)), round)
    return state.tensors()["parameters"]


def test_secret_noise_has_the_deviation_that_is_stated() -> None:
    """z C / m on every parameter, without drift and with Gaussian tails, as the seeded noise has."""
    drawn, deviation = noise(), 1.0 * 0.5 / 3
    within = 5 / math.sqrt(len(drawn))
    assert float(drawn.std()) == pytest.approx(deviation, rel=within)
    assert abs(float(drawn.mean())) < deviation * within
    for beyond in (1, 2, 3):
        share = float((drawn.abs() > beyond * deviation).double().mean())
        assert share == pytest.approx(math.erfc(beyond / math.sqrt(2)), abs=within)


def test_secret_noise_is_of_the_operating_system_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither seed nor round make it again, and neither changes it."""
    one = noise()
    for other in (noise(), noise(**{"run.seed": 2}), noise(round=2)):
        together = float(torch.nn.functional.cosine_similarity(one, other, dim=0))
        assert abs(together) < 5 / math.sqrt(len(one))
    fixed = os.urandom(8 * 100)
    monkeypatch.setattr(os, "urandom", lambda count: fixed[:count])
    assert torch.equal(noise(100), noise(100, 2, **{"run.seed": 2}))


def test_the_kind_of_no_noise_does_not_matter() -> None:
    """Said in a warning."""
    without = tiny(**{**SECRET, "privacy.noise-multiplier": 0.0})
    assert ignored(without, ["privacy.noise"]) == ["privacy.noise has no effect beside privacy.noise-multiplier = 0.0"]
    assert ignored(tiny(**SECRET), ["privacy.noise"]) == []


@pytest.mark.parametrize("byte", [b"\0", b"\xff"])
def test_the_extremes_are_finite(byte: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lowest and the highest number that can be drawn."""
    monkeypatch.setattr(os, "urandom", lambda count: byte * count)
    assert 8 < float(privacy.secret_normal(1).abs()) < 9


def test_epsilon_is_that_of_the_client_with_most_rounds() -> None:
    """Sampling hides nobody from the others of the cohort; a client pays for its own rounds alone."""
    config = tiny(**SECRET)
    cohorts = {1: [0, 1, 2], 2: [0, 4, 5], 3: [1, 2, 3], 4: [0, 3, 4]}
    said = [privacy.spent(config, rounds, cohorts.__getitem__)["epsilon"] for rounds in cohorts]
    assert said == [privacy.epsilon(1.0, 6, 6, times, 1e-5) for times in (1, 2, 2, 3)]
    everybody = tiny(**SECRET, **{"run.clients-per-round": 0})
    assert privacy.spent(everybody, 4, lambda _: list(range(6)))["epsilon"] == privacy.epsilon(1.0, 6, 6, 4, 1e-5)


@pytest.mark.slow
def test_devices_are_private_with_secret_noise_only(tmp_path: Path) -> None:
    """Seeded noise is refused there, since a device could take it off; two secret runs are two."""
    write_split(tiny(**SECRET), tmp_path / "data")
    devices = [
        {"clients": clients, "data": str(tmp_path / "data"), "state": str(tmp_path / f"state{clients[0]}")}
        for clients in ("0-2", "3-5")
    ]

    def run(name: str, **flat: Scalar) -> Run:
        keys = SECRET | {"data.partition": "devices", "run.dir": str(tmp_path / name)} | flat
        inline.run_apps(server_app, client_app, tiny(**keys), devices=devices)
        return Run.open(tmp_path / name)

    with pytest.raises(UserError, match=r"take noise that is drawn from it off; set privacy\.noise=secret"):
        run("seeded", **{"privacy.noise": "seeded"})
    runs = [run("one"), run("two")]
    assert runs[0].digest() != runs[1].digest()
    assert runs[0].rows("rounds")[0]["clients"] == runs[1].rows("rounds")[0]["clients"]
    took_part = [client for row in runs[0].rows("rounds") for client in row["clients"]]
    most = max(map(took_part.count, took_part))
    assert runs[0].summary()["privacy"]["epsilon"] == privacy.epsilon(1.0, 6, 6, most, 1e-5)


@pytest.mark.slow
def test_a_run_with_secret_noise_does_not_go_on(
    fedkd: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rounds after the checkpoint would be released twice, with two noises, for the epsilon of one."""
    config = tiny(**SECRET, **{"run.dir": str(tmp_path / "run"), "run.checkpoint-every": 1})
    with monkeypatch.context() as patch:
        patch.setattr("fedkd.results.Recorder.checkpoint", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            inline.run(config)
    assert fedkd("resume", str(tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "would be released again with other noise" in error
    with pytest.raises(UserError, match="released again"):
        inline.run(config)
