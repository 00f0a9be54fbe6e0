"""What every run leaves behind, written as it happens and read back in a line of pandas.

``runs/<name>/`` holds

- ``config.toml``: every setting; ``environment.json``: versions and machine;
- ``partition.csv``: examples per client, split and class;
- ``rounds.jsonl``: a line per round: who trained, the server's metrics, a hash of the server's state, seconds;
- ``clients.jsonl``: a line per round and trained client: loss, examples, exact bytes down and up, seconds;
- ``evaluations.jsonl``: a line per evaluation and client: correct, total and loss of the global and personal model;
- ``final.safetensors``: the server's state at the end; ``summary.json``: written last, so its presence means finished;
- ``error.txt``, only when the run failed: why.

The ``.jsonl`` files only grow, a line at a time, so a run that was stopped is readable up to its last line.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from safetensors.torch import save

from fedkd.config import Config, read_toml
from fedkd.errors import UserError
from fedkd.payload import Record

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]
LOGS = ("rounds", "clients", "evaluations")
_TIMES = ("seconds", "seconds_train", "seconds_server", "seconds_evaluate")


class Recorder:
    """Writes a run's folder.

    Args:
        folder: where; it must not hold a run already.
        config: the run's configuration.
        partition: the partition as CSV.
        data: fingerprint of the data.

    Raises:
        UserError: the folder holds another run, or cannot be written.
    """

    def __init__(self, folder: Path, config: Config, partition: str, data: str = "") -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock(folder)
            if (folder / "rounds.jsonl").exists():
                raise UserError(f"{folder} already holds a run; take another folder with --out")
            (folder / "config.toml").write_text(config.toml(), encoding="utf-8")
            (folder / "environment.json").write_text(
                json.dumps(environment() | {"data": data}, indent=2) + "\n", encoding="utf-8"
            )
            (folder / "partition.csv").write_text(partition, encoding="utf-8")
            self._files = {name: (folder / f"{name}.jsonl").open("a", encoding="utf-8") for name in LOGS}
        except OSError as error:
            raise UserError(f"the results cannot be written to {folder}: {error.strerror}") from error

    def write(self, log: str, rows: Iterable[Row]) -> None:
        """Append rows to one of the logs; they are on their way to the disk when this returns."""
        file = self._files[log]
        file.write("".join(json.dumps(row) + "\n" for row in rows))
        file.flush()

    def finish(self, state: Record) -> None:
        """Write the final state and the summary, and close."""
        tensors = {name: tensor.contiguous() for name, tensor in state.tensors().items()}
        (self.folder / "final.safetensors").write_bytes(save(tensors))
        self.close()
        part = self.folder / "summary.json.part"
        part.write_text(json.dumps(Run(self.folder).summary(), indent=2) + "\n", encoding="utf-8")
        part.replace(self.folder / "summary.json")

    def fail(self, error: Exception) -> None:
        """Say in ``error.txt`` why the run ended early."""
        (self.folder / "error.txt").write_text(f"{error}\n", encoding="utf-8")

    def close(self) -> None:
        """Close the files; what has been written stays readable."""
        for file in self._files.values():
            file.close()
        self._lock.close()


def lock(folder: Path) -> IO[bytes]:
    """Return a file whose being open says that a run is written to ``folder``; closing it, or dying, says it no more.

    Raises:
        UserError: another process has it.
    """
    file = (folder / "lock").open("wb")
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(f"{folder} is being written by another process; wait for it, or take another folder") from None
    return file


def run_folder(config: Config, run_id: int) -> Path:
    """Return the folder of a run: ``run.dir``, or one that both sides derive from Flower's run number."""
    if config.run.dir:
        return Path(config.run.dir)
    base = Path(os.environ.get("FEDKD_RUNS", Path.home() / "fedkd-runs"))
    return base / f"{config.run.method}-{config.data.name.replace('/', '-')}-{run_id}"


def environment() -> Row:
    """Return versions and machine, for the record; nothing in it is part of a run's digest."""
    packages = {}
    for name in ("fedkd", "flwr", "flwr-datasets", "torch", "ray", "numpy", "scipy", "datasets", "pandas"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": _processor(),
        "packages": packages,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def state_hash(state: Record) -> str:
    """Return a hash of a record's names, dtypes, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in state.tensors().items():
        digest.update(f"{name}/{tensor.dtype}/{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Run:
    """A run's folder, read.

    Args:
        folder: the folder that :class:`Recorder` wrote.
    """

    folder: Path

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Return the run in a folder.

        Raises:
            UserError: no run there.
        """
        run = cls(Path(folder))
        if not (run.folder / "config.toml").is_file() or not (run.folder / "rounds.jsonl").is_file():
            raise UserError(f"{folder} holds no run (no config.toml and rounds.jsonl)")
        return run

    @cached_property
    def config(self) -> Config:
        """The run's configuration."""
        return Config.from_flat(read_toml(self.folder / "config.toml"))

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.folder / "summary.json").exists()

    @property
    def data(self) -> str:
        """Fingerprint of the data that the run was made with."""
        return str(json.loads((self.folder / "environment.json").read_text(encoding="utf-8")).get("data", ""))

    def rows(self, log: str) -> list[Row]:
        """Return the complete lines of a log."""
        text = (self.folder / f"{log}.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def frame(self, log: str) -> pd.DataFrame:
        """Return a log as a data frame: ``rounds``, ``clients`` or ``evaluations``."""
        import pandas as pd

        return pd.DataFrame(self.rows(log))

    @cached_property
    def evaluations(self) -> pd.DataFrame:
        """The evaluations with accuracies: columns ``global``, ``personal`` and ``accuracy``, in [0, 1].

        ``personal`` is the model that the client would use (the global one where there is no other), ``global`` is
        NaN where there is no global model, and ``accuracy`` is ``personal``.  Clients without test data are left out.
        """
        frame = self.frame("evaluations")
        if frame.empty:
            return frame
        frame = frame[frame["total"] > 0].copy()
        for kind in ("global", "personal"):
            correct = frame[f"{kind}_correct"] if f"{kind}_correct" in frame else float("nan")
            frame[kind] = correct / frame["total"]
        frame["personal"] = frame["personal"].fillna(frame["global"])
        frame["accuracy"] = frame["personal"]
        return frame

    @cached_property
    def partition(self) -> pd.DataFrame:
        """The partition: client, split, examples, ``class_*``."""
        import pandas as pd

        return pd.read_csv(self.folder / "partition.csv")

    def digest(self) -> str:
        """Return the sha256 of the run's history without its times; equal digests mean equal results."""
        digest = hashlib.sha256()
        for log in LOGS:
            for row in self.rows(log):
                kept = {k: v for k, v in row.items() if k not in _TIMES}
                digest.update(json.dumps(kept, sort_keys=True).encode() + b"\n")
        return digest.hexdigest()

    def summary(self) -> Row:
        """Return the run's figures: last round beside best round, fairness, bytes and seconds."""
        from fedkd.metrics import summarize

        return summarize(self)


def spread(mean: float, deviation: float, digits: int = 2) -> str:
    """Write a mean and its deviation, ``91.30 ± 0.42``; a single seed has none."""
    return f"{mean:.{digits}f}" if deviation != deviation else f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def merge_rows(rows: Sequence[Row], common: Mapping[str, Any]) -> list[Row]:
    """Return the rows sorted by client, each with the common columns before its own."""
    return [{**common, **row} for row in sorted(rows, key=lambda row: int(row["client"]))]
