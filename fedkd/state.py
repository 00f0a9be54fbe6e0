"""Where a client's state lives: on the disk of the node that hosts it, one file per participation.

Versions are named by round, so a round that is replayed sees the state before it.  Files are safetensors (data only,
never code) and appear whole or not at all.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from safetensors.torch import load_file

from fedkd.checkpoints import needed, state_bytes
from fedkd.payload import Record, Sizes

R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class ClientStore:
    """The states of the clients that a node hosts.

    Args:
        folder: where the files lie; made when first needed.
        checkpoint_every: rounds between the server's checkpoints, to which it may go back.
    """

    folder: Path
    checkpoint_every: int = 1

    def load(self, kind: type[R], client: int, before_round: int, sizes: Sizes) -> R | None:
        """Return the newest state older than ``before_round``, or None for a client that has not taken part."""
        versions = [r for r in self._versions(client) if r < before_round]
        if not versions:
            return None
        tensors = load_file(self._path(client, versions[-1]))
        return kind(**tensors).check(sizes, f"client {client} (stored state of round {versions[-1]})")

    def save(self, state: Record, client: int, round: int) -> None:
        """Write the state after a round, whole or not at all, and drop what is later or no longer needed."""
        path = self._path(client, round)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".part{os.getpid()}")
        part.write_bytes(state_bytes(state))
        part.replace(path)
        versions = self._versions(client)
        kept = {self._path(client, r) for r in needed(versions, round, self.checkpoint_every)}
        for other in set(path.parent.iterdir()) - kept:  # the part of a file that a process left when it died too
            other.unlink(missing_ok=True)

    def _path(self, client: int, round: int) -> Path:
        return self.folder / f"{client:06d}" / f"{round:06d}.safetensors"

    def _versions(self, client: int) -> list[int]:
        folder = self.folder / f"{client:06d}"
        try:
            return sorted(int(name[:6]) for name in os.listdir(folder) if name.endswith(".safetensors"))
        except FileNotFoundError:
            return []
