"""What all tests share: an isolated place for caches and results, tiny runs, and tiny data sets on disk."""

from __future__ import annotations

import functools
import gzip
import importlib
import itertools
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt
import pytest
import torch
from leftovers import leaving_nothing

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
with warnings.catch_warnings():  # Flower's Typer imports names that Click deprecates
    warnings.simplefilter("ignore", DeprecationWarning)
    from flwr.app import Array

from fedkd import payload
from fedkd.config import Config, Scalar
from fedkd.errors import UserError
from fedkd.method import load, names
from fedkd.setup import Setup

TINY: dict[str, Scalar] = {
    "run.clients": 6,
    "run.clients-per-round": 3,
    "run.rounds": 3,
    "run.device": "cpu",
    "data.name": "digits",
    "data.min-size": 2,
    "data.alpha": 0.5,
    "train.lr": 0.05,
    "train.local-steps": 4,
    "train.batch-size": 16,
}
"""A run of a tenth of a second."""
TINY_METHOD: dict[str, dict[str, Scalar]] = {
    "fedbn": {"model.name": "fedgen_cnn"},
    "feddf": {"feddf.steps": 5},
    "fedftg": {"fedftg.iterations": 2},
    "fedgen": {"fedgen.generator-steps": 4},
}
"""What makes a method's run a short one, or a run at all."""


@pytest.fixture(scope="session", autouse=True)
def heard() -> None:
    """Let the processes of the tests be interrupted also where a shell started the tests in the background."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def nothing_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Look, after the last test of this process, for what the tests left behind."""
    tmp_path_factory.getbasetemp()  # pytest keeps some of its own folders, elsewhere
    with leaving_nothing():
        yield


@pytest.fixture(scope="session", autouse=True)
def isolated(nothing_left: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep caches and results away from the user's, and sums in one order."""
    from fedkd import results

    base = tmp_path_factory.mktemp("isolated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDKD_CACHE", str(base / "cache"))
        patch.setenv("FEDKD_RUNS", str(base / "runs"))
        patch.setenv("RAY_worker_niceness", "0")  # by default, workers wait for whatever else this machine does
        patch.setattr(results, "environment", functools.cache(results.environment))  # a quarter of a tiny run
        torch.set_num_threads(1)
        yield


def tiny(method: str = "fedavg", /, **flat: Any) -> Config:
    """Return a tiny configuration of a method with some keys changed."""
    return Config.from_flat({**TINY, **TINY_METHOD.get(method, {}), "run.method": method, **flat})


def cases() -> list[tuple[str, dict[str, Scalar]]]:
    """Return every method in each of its variants, as (name, keys that select the variant)."""
    return [
        (name, {f"{name}.variant": variant} if variant else {})
        for name in names()
        for variant in (load(name).variants or ("",))
    ]


def normed_cases() -> list[tuple[str, dict[str, Scalar]]]:
    """Return the cases with BatchNorm, whose statistics stay and, where the method sends any, travel."""
    return [
        (method, {**variant, "model.name": "fedgen_cnn", "model.norm-statistics": statistics})
        for method, variant in cases()
        for statistics in ("personal", "averaged")
        if _takes(method, statistics)
    ]


@functools.cache
def _takes(method: str, statistics: str) -> bool:
    """Say whether a method takes a kind of statistics, and whether that is another run than with personal ones."""
    config = tiny(method, **{"model.name": "fedgen_cnn", "model.norm-statistics": statistics})
    setup = Setup.build(config, (1, 8, 8), 10, torch.device("cpu"))
    try:
        importlib.import_module(f"strategies.{method}").init(setup)
    except UserError:
        return False
    contract = load(method).under(config.hyper)
    shapes = [
        spec.resolve(setup.sizes) for spec in contract.Update.specs().values() if "shared_statistics" in spec.shape
    ]
    return config.model.norm_statistics == "personal" or any(map(all, shapes))


def case_id(case: object) -> str:
    """Name a case after its method and variant."""
    return "-".join(map(str, case.values())) or "only" if isinstance(case, dict) else str(case)


def by_case(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test for every method in each of its variants."""
    decorated: Callable[..., None] = pytest.mark.parametrize(("method", "variant"), cases(), ids=case_id)(test)
    return decorated


@contextmanager
def unwritten() -> Iterator[None]:
    """Compare what arrived, whose memory tensors share, with what it was when it arrived."""
    arrived: list[tuple[Array, int]] = []

    def noted(array: Array) -> Any:
        arrived.append((array, crc32(array.data)))
        return decoded(array)

    decoded = payload._decoded
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(payload, "_decoded", noted)
        yield
    assert arrived
    assert all(crc32(array.data) == before for array, before in arrived)


@pytest.fixture(scope="session")
def run_inline(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., object]:
    """Return ``run_inline(method, nodes=1, again=False, **flat)`` to the finished run of a tiny configuration.

    Equal calls share one run, unless ``again`` asks for another one.  In each, nobody may write into what arrived.
    """
    from fedkd.results import Run
    from sims.inline import run

    done: dict[object, Run] = {}
    number = itertools.count()

    def run_inline(method: str, nodes: int = 1, again: bool = False, **flat: Scalar) -> Run:
        config = tiny(method, **flat)
        key = (nodes, *config.flat().items())
        if again or key not in done:
            folder = tmp_path_factory.mktemp(f"run-{next(number)}")
            with unwritten():
                run(tiny(method, **{**flat, "run.dir": str(folder)}), nodes)
            finished = Run.open(folder)
            if again:
                return finished
            done[key] = finished
        return done[key]

    return run_inline


@pytest.fixture
def double_precision() -> Iterator[None]:
    """Compute in double precision: a bias before BatchNorm has gradient zero but for rounding, which Adam magnifies."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def worker(tmp_path: Path) -> Callable[..., object]:
    """Return ``worker(method, **flat)``: what a node's process holds, to call a client half directly."""
    from clients.app import Worker

    return lambda method="fedavg", **flat: Worker(tiny(method, **{"run.dir": str(tmp_path), **flat}), run_id=1)


@pytest.fixture
def fedkd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """The command line in this process and an empty folder; returns the exit code."""
    from sims import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)

    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["fedkd", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    return call


def write_idx(path: Path, values: npt.NDArray[np.uint8], keep: int | None = None) -> None:
    """Write an idx file of bytes, packed when its name ends in .gz, cut after ``keep`` bytes."""
    raw = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()
    path.write_bytes((gzip.compress(raw) if path.suffix == ".gz" else raw)[:keep])


def tiny_images(count: int, seed: int, channels: int = 1) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Return learnable images ``[count, 8, 8]`` (or ``[count, 8, 8, 3]``) of ten classes in turn, and their classes."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(count) % 10).astype(np.uint8)
    shape = (count, 8, 8) if channels == 1 else (count, 8, 8, channels)
    x = rng.integers(0, 60, shape)
    x[np.arange(count), labels % 8] += 120
    x[np.arange(count), :, labels // 2] += 60
    return x.astype(np.uint8), labels


def write_idx_folder(folder: Path, suffix: str = "", train: int = 200, test: int = 100) -> Path:
    """Write a tiny data set as the four idx files."""
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count, seed in (("train", train, 0), ("t10k", test, 1)):
        x, y = tiny_images(count, seed)
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", x)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", y)
    return folder


@pytest.fixture(scope="session")
def idx_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder with a tiny idx data set: 200 training and 100 test images of ten classes."""
    return str(write_idx_folder(tmp_path_factory.mktemp("idx")))
