"""The simulation engine against the inline one: real Flower, real Ray, equal bytes, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import cases, normed_cases, tiny

from fedkd.config import Scalar
from fedkd.results import Run
from sims import inline
from sims.simulation import PrivateSuperLink, SimulationError

pytestmark = pytest.mark.slow

IMAGES_28: dict[str, Scalar] = {
    "data.name": "mnist",
    "data.test": "own-labels",
    "model.name": "fedgen_cnn",
    "data.partition": "dirichlet",
}
"""28-pixel images and the CNN with BatchNorm, whose statistics stay with the clients."""


@pytest.fixture(scope="module")
def superlink() -> Iterator[PrivateSuperLink]:
    """One SuperLink for all tests of this file, and proof that it leaves neither process nor folder."""
    with PrivateSuperLink() as running:
        home = running.environment["FLWR_HOME"]
        yield running
        children = psutil.Process().children(recursive=True)
        assert any("flower-superlink" in " ".join(p.cmdline()) for p in children)
    assert not Path(home).exists()
    assert not _processes_of(home)


@pytest.fixture(scope="module")
def mnist_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the schema of the hub's MNIST: the real one in $FEDKD_DATA, else 600 invented images."""
    if "FEDKD_DATA" in os.environ:
        return Path(os.environ["FEDKD_DATA"])
    import datasets
    from PIL import Image

    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("data")
    (root / "mnist").mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    for split, count in (("train", 500), ("test", 100)):
        labels = np.arange(count) % 10
        images = [Image.fromarray(rng.integers(0, 25 * (y + 1), (28, 28), dtype=np.uint8)) for y in labels]
        rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        rows.to_parquet(root / "mnist" / f"{split}-00000-of-00001.parquet")
    return root


ALL = [(f"{name}-{'-'.join(map(str, variant.values())) or 'only'}", name, variant) for name, variant in cases()]
BATCH_NORM = {name: keys | {"run.rounds": 2, "run.eval-every": 2} for name, keys in normed_cases()}
"""Of each method one variant, with averaged statistics where it sends any."""
OTHERS: list[tuple[str, str, dict[str, Scalar]]] = [
    *((f"{name}-{keys['model.norm-statistics']}", name, keys) for name, keys in BATCH_NORM.items()),
    *((f"{name}-28", name, IMAGES_28) for name in ("fedgen", "fedavg", "fedprox", "local")),
    ("fedavg-sums", "fedavg", {"run.exchange": "sums"}),
]


@pytest.fixture(scope="module")
def digests(
    superlink: PrivateSuperLink, mnist_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    """The digests of every case: inline, on one node and on two; each engine runs them as one series."""
    found: dict[str, list[str]] = {}
    for nodes in (0, 1, 2):
        base = tmp_path_factory.mktemp(f"nodes{nodes}")
        configs = {
            label: tiny(name, **(keys | {"run.dir": str(base / label), "data.root": str(mnist_root)}))
            for label, name, keys in (*ALL, *OTHERS)
        }
        if nodes:
            superlink.run(list(configs.values()), nodes)
        else:
            for config in configs.values():
                inline.run(config)
        for label in configs:
            found.setdefault(label, []).append(Run.open(base / label).digest())
    return found


@pytest.mark.parametrize("label", [label for label, _, _ in (*ALL, *OTHERS)])
def test_same_digest_inline_and_on_one_and_two_nodes(label: str, digests: dict[str, list[str]]) -> None:
    """A history is a function of (config, seed); client state is found by whichever actor trains the client next."""
    inline_digest, *simulated = digests[label]
    assert simulated == [inline_digest, inline_digest]


def test_digests_differ_between_cases(digests: dict[str, list[str]]) -> None:
    """Equal digests mean equal results, so different methods must not have them."""
    assert len({each[0] for each in digests.values()}) == len(digests)


def test_a_failed_run_names_its_client_and_does_not_stop_the_series(
    superlink: PrivateSuperLink, tmp_path: Path
) -> None:
    """A diverging client ends its run with one line that says whose value is not finite; the next run goes on."""
    bad = tiny("fedavg", **{"train.lr": 1e30, "run.clients-per-round": 0, "run.dir": str(tmp_path / "bad")})
    good = tiny("fedavg", **{"run.dir": str(tmp_path / "good")})
    with pytest.raises(SimulationError, match=r"client \d+ failed: .* not finite: the client diverged") as failed:
        superlink.run([bad, good], 1)
    assert "Traceback" not in str(failed.value)
    assert Run.open(tmp_path / "good").finished
    assert not Run.open(tmp_path / "bad").finished


def test_flwr_run_by_itself(superlink: PrivateSuperLink, tmp_path: Path) -> None:
    """`flwr run .` with two nodes simulates all clients and says where the results are."""
    environment = superlink.environment | {"FEDKD_RUNS": str(tmp_path)}
    home = Path(__file__).resolve().parent.parent
    command = ["flwr", "run", str(home), "own", "--stream", "--run-config"]
    command += ['run.method="fedavg" run.rounds=2']
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    [line] = [line for line in done.stdout.splitlines() if "fedkd: results in" in line]
    run = Run.open(line.split("fedkd: results in")[1].strip())
    assert run.finished
    assert sorted(set(run.evaluations["client"])) == list(range(20))


def test_interrupted_run_leaves_readable_results_and_no_process(tmp_path: Path) -> None:
    """Ctrl-C: exit code 130 soon, the finished rounds readable, no process, no folder."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "sims.cli", "run", "fedavg", "--engine", "simulation", "--rounds", "10000"]
    process = subprocess.Popen([*command, "--out", str(folder)], start_new_session=True)
    try:
        rounds = folder / "rounds.jsonl"
        deadline = time.monotonic() + 180
        while not rounds.exists() or rounds.stat().st_size == 0:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.2)
        children = psutil.Process(process.pid).children(recursive=True)
        home = next(p.environ()["FLWR_HOME"] for p in children if "flower-superlink" in " ".join(p.cmdline()))
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, [p.cmdline() for p in alive]
    assert len(gone) > 2
    run = Run.open(folder)
    assert not run.finished
    assert len(run.rows("rounds")) > 0
    assert len(run.digest()) == 64
    assert not Path(home).exists()
    assert not _processes_of(home)


def _processes_of(home: str) -> list[int]:
    """Return the processes that were started with our Flower home."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLWR_HOME") == home:
                found.append(process.pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
