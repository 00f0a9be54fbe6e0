"""Settings that are allowed and likely a mistake: a warning is given exactly where local steps run away."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import tiny

from fedkd.config import Config
from fedkd.methods.fedavg import Broadcast
from sims import cli

PULLS = {
    "fedavg": "train.weight-decay",
    "fedprox": "fedprox.mu",
    "feddyn": "feddyn.alpha",
    "ditto": "ditto.lam",
}
"""Weights of a quadratic term, by the method whose client half takes the steps."""


@pytest.mark.parametrize("share", [0.9, 1.1])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("method", PULLS)
def test_a_pull_is_doubted_where_its_steps_leave_its_centre(
    method: str, momentum: float, share: float, worker: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a linear loss of gradient g the steps should come to ``theta - centre = -g / mu``."""
    weight, key = 5.0, PULLS[method]
    lr = share * 2 * (1 + momentum) / weight
    node = worker(method, **{key: weight, "train.lr": lr, "train.momentum": momentum, "train.local-steps": 60})

    def linear(*_: object) -> torch.Tensor:
        return torch.stack([tensor.sum() for tensor in node.setup.model.tensors]).sum().reshape(1)

    monkeypatch.setattr(importlib.import_module(f"clients.{method}"), "cross_entropy", linear)
    outcome = node.half.update(node.job(1, 0), Broadcast(node.initial, torch.zeros(0)), None, node.shard(0, "train"))
    ended = outcome.state.parameters if method == "ditto" else outcome.update.parameters
    centre = node.initial if method != "fedavg" else torch.zeros_like(node.initial)
    left = (ended - centre + 1 / weight).norm()
    settles = bool(left < 0.5 * torch.full_like(node.initial, 1 / weight).norm())
    said = doubts(node.config)
    assert settles == (share < 1)
    assert (said == []) == settles
    assert all(
        line.startswith(f"train.lr = {lr} times {key} = 5.0 is not below {2 * (1 + momentum):.3g}") for line in said
    )


def doubts(config: Config) -> list[str]:
    """Return what is doubted in training, and by a method without BatchNorm."""
    return config.train.doubts() + config.hyper.doubts(config.train, config.model, 0)


@pytest.mark.parametrize(("base", "own"), [("fedprox", "fedprox-mu"), ("feddyn", "feddyn-alpha")])
def test_a_plug_in_doubts_what_its_base_does(base: str, own: str) -> None:
    """In its own words, and not what another base would doubt."""
    keys = {f"fedftg.{own}": 40.0, "train.lr": 0.05}
    [line] = doubts(tiny("fedftg", **keys, **{"fedftg.base": base}))
    assert line.startswith(
        f"train.lr = 0.05 times fedftg.{own} = 40.0 is not below 2, so clients' models may diverge; "
    )
    assert line.endswith(f"take train.lr below 0.05, or a smaller fedftg.{own}")
    assert doubts(tiny("fedftg", **keys)) == []


def test_the_command_line_says_what_is_doubted_in_training(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a method without doubts of its own too, and of one with them."""
    for method in ("local", "fedprox"):
        cli._warn_of_ignored([tiny(method, **{"train.lr": 0.5, "train.weight-decay": 4.0})], [])
        assert capsys.readouterr().err.splitlines() == [
            "fedkd: train.lr = 0.5 times train.weight-decay = 4.0 is not below 2, so models may diverge; "
            "take train.lr below 0.5, or a smaller train.weight-decay"
        ]


def test_no_method_doubts_its_defaults() -> None:
    """A warning at every run would be read by nobody."""
    for method in (*PULLS, "fedftg", "pfedme"):
        assert doubts(Config.from_flat({"run.method": method})) == []
