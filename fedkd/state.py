"""Where a client's state lives: on the disk of the node that hosts it, one file per participation.

Versions are named by the round they are from, and the server says which one counts: the last whose update it took.  So
a round that is replayed sees the state before it, what was trained for a round that went on without the client is never
seen again, and a state that was lost is an error, not a fresh start.  Files are safetensors (data only, never code),
each with the versions that count before it, and appear whole or not at all.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fedkd.checkpoints import needed
from fedkd.errors import UserError
from fedkd.payload import PayloadError, Record, Sizes

R = TypeVar("R", bound=Record)

ENDING = ".safetensors"
PART = ".part"
"""What the name of a file ends with while a process, whose number follows, writes it."""


@dataclass(frozen=True)
class ClientStore:
    """The states of the clients that a node hosts.

    Args:
        folder: where the files lie; made when first needed.
        checkpoint_every: rounds between the server's checkpoints, to which it may go back.
    """

    folder: Path
    checkpoint_every: int = 1

    def load(self, kind: type[R], client: int, version: int, sizes: Sizes) -> R | None:
        """Return the state from a round; None for round 0, of a client of which nothing counts yet.

        Raises:
            UserError: the state is not there.
            PayloadError: it is one of another model, or of another version of the method.
        """
        if not version:
            return None
        shapes = {name: spec.resolve(sizes) for name, spec in kind.specs().items()}
        if not any(map(math.prod, shapes.values())):
            return kind(**{name: torch.zeros(shape, dtype=kind.specs()[name].dtype) for name, shape in shapes.items()})
        try:
            with safe_open(self._path(client, version), "pt") as file:
                names = file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
        except FileNotFoundError:
            where = f"{client:06d}/{_name(version)}"
            raise UserError(
                f"the state of client {client} from round {version} is lost ({where} of the run's states), and a fresh "
                "one would change the results: put it back, or begin another run"
            ) from None
        whose = f"client {client} (stored state of round {version})"
        if tensors.keys() != shapes.keys():
            raise PayloadError(f"{kind.__name__} of {whose} has {', '.join(sorted(tensors))}: it is another version's")
        return kind(**tensors).check(sizes, whose)

    def save(self, state: Record, client: int, round: int, version: int) -> None:
        """Write the state after a round, whole or not at all, and drop older ones that no longer count.

        One without any number in it takes no file.

        Args:
            state: what the client keeps.
            client: its number.
            round: the round it is from.
            version: the round of the state that it was trained from, 0: none.  It stays, since the server may go on
                without this update; what is between the two is from rounds that did.
        """
        if not any(tensor.numel() for tensor in state.tensors().values()):
            return
        path = Path(self._path(client, round))
        there = _listed(path.parent)
        history = self._history(client, version, there)
        kept = needed(history, round, self.checkpoint_every) | {version, round}
        part = path.with_suffix(f"{PART}{os.getpid()}")
        tensors = {name: tensor.contiguous().cpu() for name, tensor in state.tensors().items()}
        save_file(tensors, part, {"history": json.dumps(sorted(kept - {round}))})
        part.replace(path)
        for name in there:
            stem, _, ending = name.partition(".")
            number = int(stem)
            if f".{ending}" != ENDING:
                over = not _runs(int(name.rpartition(PART)[2]))
            else:  # others are of rounds to come, or of another attempt, which this late end of an old order must spare
                over = number not in kept and (number in history or version < number < round)
            if over:
                (path.parent / name).unlink(missing_ok=True)

    def _history(self, client: int, version: int, there: Collection[str]) -> list[int]:
        """Return a version that counts and, as far as they are there, those before it that were kept for rollbacks."""
        if not version:
            return []
        with safe_open(self._path(client, version), "pt") as file:
            history = [*json.loads((file.metadata() or {}).get("history", "[]")), version]
        return [r for r in history if _name(r) in there]

    def _path(self, client: int, round: int) -> str:
        return f"{self.folder}/{client:06d}/{_name(round)}"


def _name(round: int) -> str:
    """Return the name of the file with the state after a round."""
    return f"{round:06d}{ENDING}"


def _listed(folder: Path) -> set[str]:
    """Return the names in a folder, which is made if it is not there."""
    try:
        return set(os.listdir(folder))
    except FileNotFoundError:
        folder.mkdir(parents=True, exist_ok=True)
        return set()


def _runs(process: int) -> bool:
    """Return whether there is a process of a number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
