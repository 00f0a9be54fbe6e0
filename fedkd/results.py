"""What every run leaves behind, written as it happens and read back in a line of pandas.

``runs/<name>/`` holds

- ``config.toml``: every setting; ``environment.json``: versions and machine;
- ``partition.csv``: examples per client, split and class;
- ``rounds.jsonl``: a line per round: who trained, the server's metrics, a hash of the server's state, seconds;
- ``clients.jsonl``: a line per round and trained client: loss, examples, exact bytes down and up, seconds;
- ``evaluations.jsonl``: a line per evaluation and client: correct, total and loss of the global and personal model;
- ``checkpoints/``: what an interrupted run goes on from (:mod:`fedkd.checkpoints`), gone when it has finished;
- ``final.safetensors``: the server's state at the end; ``summary.json``: written last, so its presence means finished;
- ``error.txt``, only when the run failed: why.

The ``.jsonl`` files only grow, a line at a time, so a run that was stopped is readable up to its last line; one that
goes on cuts them back to its checkpoint first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fedkd import checkpoints
from fedkd.checkpoints import LOGS, Checkpoint
from fedkd.config import Config, defaults, read_toml
from fedkd.errors import UserError
from fedkd.files import write_whole
from fedkd.payload import Record, Sizes
from fedkd.places import results_root

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import pandas as pd

_log = logging.getLogger(__name__)

Row = dict[str, Any]
_COLUMNS = {
    "rounds": ("round",),
    "clients": ("round", "client", "bytes_down", "bytes_up"),
    "evaluations": ("round", "client", "total"),
}
"""What every row of a log has, as whole numbers."""
_TIMES = ("seconds", "seconds_train", "seconds_server", "seconds_evaluate")


class Recorder:
    """Writes a run's folder, a new one or that of an interrupted run, which then goes on.

    Args:
        folder: where.
        config: the run's configuration.
        partition: the partition as CSV.
        data: fingerprint of the data.

    Raises:
        UserError: the folder holds a run that cannot go on like this, or cannot be written.
    """

    def __init__(self, folder: Path, config: Config, partition: str, data: str = "") -> None:
        self.folder, self._every = folder, config.run.eval_every
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with ExitStack() as undo:
                self._lock = undo.enter_context(lock(folder))
                if started(folder):
                    check_goes_on(folder, config, data)
                else:
                    (folder / "partition.csv").write_text(partition, encoding="utf-8")
                    _write_json(folder / "environment.json", environment() | {"data": data})
                    # the last, and whole: now there is a run here
                    write_whole(folder / "config.toml", config.toml().encode(), flush=False)
                (folder / "error.txt").unlink(missing_ok=True)
                self._files = {name: (folder / f"{name}.jsonl").open("ab") for name in LOGS}
                undo.pop_all()
        except OSError as error:
            raise UserError(f"the results cannot be written to {folder}: {error.strerror}") from error

    def resume(self, start: Record, sizes: Sizes) -> Checkpoint:
        """Return where the run begins or goes on, after cutting the logs back to it.

        Args:
            start: the server's state before the first round.
            sizes: the symbolic dimensions of its fields.
        """
        found = checkpoints.newest(self.folder, start, sizes, self._every)
        if any(file.tell() for file in self._files.values()):
            path = self.folder / "environment.json"
            known = json.loads(path.read_text(encoding="utf-8"))
            again = {"after_round": found.round, **environment()}
            _write_json(path, known | {"resumed": [*known.get("resumed", []), again]})
        for name, end in found.ends.items():
            os.truncate(self.folder / f"{name}.jsonl", end)
        return found

    def write(self, log: str, rows: Iterable[Row]) -> None:
        """Append rows to one of the logs; they are on their way to the disk when this returns."""
        file = self._files[log]
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        file.flush()

    def checkpoint(self, round: int, state: Record) -> None:
        """Make sure that the run can go on after this round, whatever happens; ``state`` is the server's."""
        self._flush()
        checkpoints.write(self.folder, round, state)

    def finish(self, state: Record) -> None:
        """Write the final state and the summary, which take the place of the checkpoints, and close."""
        kept = (self.folder / checkpoints.FOLDER).exists()  # a run without any is not worth the wait for the disk
        if kept:
            self._flush()
        write_whole(self.folder / "final.safetensors", checkpoints.state_bytes(state), flush=kept)
        _write_json(self.folder / "summary.json", Run(self.folder).summary(), flush=kept)
        shutil.rmtree(self.folder / checkpoints.FOLDER, ignore_errors=True)
        self.close()

    def fail(self, error: Exception) -> None:
        """Say in ``error.txt`` why the run ended early."""
        (self.folder / "error.txt").write_text(f"{error}\n", encoding="utf-8")

    def _flush(self) -> None:
        """Wait until the logs are on the disk."""
        for file in self._files.values():
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close the files; what has been written stays readable."""
        for file in self._files.values():
            file.close()
        self._lock.close()


def started(folder: Path) -> bool:
    """Return whether a run has begun in a folder; before that, there is nothing to lose in it."""
    return (folder / "config.toml").exists()


def check_same(folder: Path, config: Config, data: str) -> None:
    """Check that the run in a folder is this one.

    Args:
        data: fingerprint of the data.

    Raises:
        UserError: it has other settings or other data.
    """
    run = Run(folder)
    if run.config.settings_hash() != config.settings_hash():
        raise UserError(f"{folder} already holds a run, with other settings; take another folder with --out")
    if run.data != data:
        raise UserError(f"{folder} holds a run of other data (data.root differs?); take another folder with --out")


def check_goes_on(folder: Path, config: Config, data: str) -> None:
    """Check that the run in a folder is this one, interrupted, and made with this version of fedkd.

    Raises:
        UserError: it is not.
    """
    run = Run(folder)
    if run.finished:
        raise UserError(f"{folder} already holds a run, and it is finished; take another folder with --out")
    ours, theirs = environment()["packages"]["fedkd"], run.environment.get("packages", {}).get("fedkd")
    if ours != theirs:
        raise UserError(
            f"{folder} holds an interrupted run of fedkd {theirs}, and this is fedkd {ours}, which may give other "
            f"numbers; go on with fedkd {theirs}, or begin anew in another folder"
        )
    if config.privacy.noise_multiplier and config.privacy.noise == "secret":
        raise UserError(
            f"{folder} holds an interrupted run with privacy.noise = 'secret': its last rounds would be released again "
            "with other noise, which epsilon does not count; begin anew in another folder"
        )
    check_same(folder, config, data)


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
    return results_root() / f"{config.run.method}-{config.data.name.replace('/', '-')}-{run_id}"


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


def _write_json(path: Path, value: Row, flush: bool = False) -> None:
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode(), flush)


@dataclass(frozen=True)
class Run:
    """A run's folder, read.

    Every reader raises :class:`UserError` for a file that is missing or damaged, and names it.

    Args:
        folder: the folder that :class:`Recorder` wrote.
        label: what tables and figures call it and its repetitions; empty: its method and the settings that matter.
    """

    folder: Path
    label: str = ""

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Return the run in a folder.

        Raises:
            UserError: no run there.
        """
        run = cls(Path(folder))
        with _readable(run.folder):
            if not (run.folder / "config.toml").is_file() or not (run.folder / "rounds.jsonl").is_file():
                raise UserError(f"{folder} holds no run (no config.toml and rounds.jsonl)")
        return run

    @cached_property
    def config(self) -> Config:
        """The run's configuration; settings that only another version knows are left out, with a warning."""
        path, known = self.folder / "config.toml", defaults()
        stored = read_toml(path)
        if unknown := [key for key in stored if key not in known]:
            _log.warning("fedkd: %s: settings of another version are left out: %s", path, ", ".join(unknown))
        try:
            return Config.from_flat({key: value for key, value in stored.items() if key in known})
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        with _readable(self.folder):
            return (self.folder / "summary.json").exists()

    @property
    def environment(self) -> Row:
        """Versions and machine that the run was begun with, and, under ``resumed``, those that it went on with."""
        path = self.folder / "environment.json"
        with _readable(path):
            environment: Row = dict(json.loads(path.read_bytes()))
        return environment

    @property
    def data(self) -> str:
        """Fingerprint of the data that the run was made with."""
        return str(self.environment.get("data", ""))

    def rows(self, log: str) -> list[Row]:
        """Return the complete lines of a log; a last one that was cut short when the run stopped is left out."""
        path, rows = self.folder / f"{log}.jsonl", list[Row]()
        with _readable(path):
            lines = path.read_bytes().split(b"\n")[:-1]
        for number, line in enumerate(lines, start=1):
            with _readable(path, f"line {number} of {len(lines)}: "):
                row: Row = dict(json.loads(line))
                if wrong := [name for name in _COLUMNS[log] if not isinstance(row.get(name), int)]:
                    raise ValueError(f"no whole number {', '.join(wrong)}")
            rows.append(row)
        return rows

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
            with _readable(self.folder / "evaluations.jsonl"):
                frame[kind] = correct / frame["total"]
        frame["personal"] = frame["personal"].fillna(frame["global"])
        frame["accuracy"] = frame["personal"]
        return frame

    @cached_property
    def partition(self) -> pd.DataFrame:
        """The partition: client, split, examples, ``class_*``."""
        import pandas as pd

        path = self.folder / "partition.csv"
        with _readable(path):
            frame = pd.read_csv(path)
            if missing := sorted({"client", "split", "examples"} - set(frame.columns)):
                raise ValueError(f"no columns {', '.join(missing)}")
        return frame

    def digest(self) -> str:
        """Return the sha256 of the run's history without its times; equal digests mean equal results."""
        digest = hashlib.sha256()
        for log in LOGS:
            for row in self.rows(log):
                kept = {k: v for k, v in row.items() if k not in _TIMES}
                digest.update(json.dumps(kept, sort_keys=True).encode() + b"\n")
        return digest.hexdigest()

    def summary(self, targets: Sequence[float] = ()) -> Row:
        """Return the run's figures: last round beside best round, fairness, bytes, seconds, and cost of each target.

        Args:
            targets: accuracies in [0, 1] beside :data:`fedkd.metrics.TARGETS`.
        """
        from fedkd.metrics import summarize

        return summarize(self, targets)


@contextmanager
def _readable(path: Path, where: str = "") -> Iterator[None]:
    """Name the file when the block that reads it fails."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {where}{' '.join(str(error).split())}") from error


def spread(mean: float, deviation: float, digits: int = 2) -> str:
    """Write a mean and its deviation, ``91.30 ± 0.42``; a single seed has none."""
    return f"{mean:.{digits}f}" if deviation != deviation else f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def merge_rows(rows: Sequence[Row], common: Mapping[str, Any]) -> list[Row]:
    """Return the rows sorted by client, each with the common columns before its own."""
    return [{**common, **row} for row in sorted(rows, key=lambda row: int(row["client"]))]
