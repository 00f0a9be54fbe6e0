"""What a run goes on from: the server's state every ``run.checkpoint-every`` rounds, and the logs up to there.

Nothing else is needed.  The server's state is one record, random streams are named by round, and clients keep their
own state by round (:mod:`fedkd.state`).  ``RUN/checkpoints/000020.safetensors`` is the state after round 20; it counts
only if it has the hash that ``rounds.jsonl`` holds for round 20 and the logs reach that far.  The two newest are kept,
so one of them may be damaged; without any, the run begins again, which gives the same history.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from fedkd.files import write_whole
from fedkd.payload import PayloadError, Record, Sizes

FOLDER = "checkpoints"
KEPT = 2
LOGS = ("rounds", "clients", "evaluations")


@dataclass(frozen=True)
class Checkpoint:
    """Where a run goes on.

    Args:
        round: the last round that counts; 0: none.
        state: the server's state after it.
        ends: how many bytes of each log are kept.
        versions: by client, the last of these rounds whose update counts.
        unusable: newer checkpoints that do not count, and why.
    """

    round: int
    state: Record
    ends: dict[str, int]
    versions: dict[int, int] = field(default_factory=dict)
    unusable: dict[int, str] = field(default_factory=dict)


def write(folder: Path, round: int, state: Record) -> None:
    """Write the server's state after a round, whole or not at all, and drop all but the newest ones.

    The logs have to be on the disk up to that round already.
    """
    target = _path(folder, round)
    target.parent.mkdir(exist_ok=True)
    write_whole(target, state_bytes(state))
    for other in _rounds(folder)[KEPT:]:
        _path(folder, other).unlink()


def newest(folder: Path, start: Record, sizes: Sizes, every: int) -> Checkpoint:
    """Return the newest usable checkpoint of a run's folder, or the start; changes nothing.

    Args:
        start: the server's state before the first round.
        sizes: the symbolic dimensions of its fields.
        every: rounds between evaluations.
    """
    unusable: dict[int, str] = {}
    for round in _rounds(folder):
        try:
            state, ends = _read(folder, round, start, sizes, every)
            return Checkpoint(round, state, ends, versions(folder, round), unusable)
        except _UnusableError as error:
            unusable[round] = str(error)
    return Checkpoint(0, start, dict.fromkeys(LOGS, 0), unusable=unusable)


def versions(folder: Path, round: int) -> dict[int, int]:
    """Return, by client, the last round up to ``round`` in which the server took its update."""
    return {client: row["round"] for _, row in _rows(folder / "rounds.jsonl", round) for client in row["clients"]}


def needed(versions: Iterable[int], round: int, every: int) -> set[int]:
    """Return which versions of a client's state have to stay once the one of ``round`` is written.

    Beside that one, the newest that is not newer than each checkpoint which the server may still go back to: the last
    before ``round`` and the one before it.  So there are at most three, however long the run.

    Args:
        versions: the earlier rounds that the client has a state of, all of which count.
        round: the round under way.
        every: rounds between checkpoints.
    """
    last = (round - 1) // every * every
    points = [round, *(last - back * every for back in range(KEPT))]
    known = {*versions, round}
    return {max(v for v in known if v <= point) for point in points if min(known) <= point}


def state_bytes(state: Record) -> bytes:
    """Return a record as safetensors: data only, never code."""
    return save({name: tensor.contiguous().cpu() for name, tensor in state.tensors().items()})


def state_hash(state: Record) -> str:
    """Return a hash of a record's names, dtypes, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in state.tensors().items():
        digest.update(f"{name}/{tensor.dtype}/{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


class _UnusableError(Exception):
    """A checkpoint that does not count; the message says why."""


def _read(folder: Path, round: int, start: Record, sizes: Sizes, every: int) -> tuple[Record, dict[str, int]]:
    """Return the state after a round and the ends of the logs.

    Raises:
        _UnusableError: the file is damaged, or the logs end earlier.
    """
    try:
        state = type(start)(**load_file(_path(folder, round))).check(sizes, "the checkpoint")
    except (OSError, SafetensorError, TypeError, PayloadError) as error:
        raise _UnusableError(f"it cannot be read ({error})") from error
    ends, last = {}, {}
    for name in LOGS:
        ends[name], last[name] = _end(folder / f"{name}.jsonl", round)
    reached = {"rounds": round, "clients": round, "evaluations": round // every * every}
    for name, wanted in reached.items():
        if last[name].get("round", 0) != wanted:
            raise _UnusableError(f"{name}.jsonl ends before it")
    if last["rounds"]["state"] != state_hash(state):
        raise _UnusableError("its content is not what rounds.jsonl says")
    return state, ends


def _end(log: Path, round: int) -> tuple[int, dict[str, Any]]:
    """Return where a log's rows up to a round end, in bytes, and the last of these rows ({}: there is none)."""
    end, last = 0, dict[str, Any]()
    for found in _rows(log, round):
        end, last = found
    return end, last


def _rows(log: Path, round: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield a log's rows up to a round, each with where it ends."""
    end = 0
    try:
        with log.open("rb") as lines:
            for line in lines:
                row = json.loads(line) if line.endswith(b"\n") else {"round": round + 1}
                if row["round"] > round:
                    break
                yield (end := end + len(line)), row
    except (OSError, ValueError, TypeError, KeyError):  # no log, or a line that is none: what is before it counts
        pass


def _path(folder: Path, round: int) -> Path:
    return folder / FOLDER / f"{round:06d}.safetensors"


def _rounds(folder: Path) -> list[int]:
    """Return the rounds there are checkpoints of, newest first."""
    found = (path.stem for path in (folder / FOLDER).glob("*.safetensors"))
    return sorted((int(name) for name in found if name.isdigit()), reverse=True)
