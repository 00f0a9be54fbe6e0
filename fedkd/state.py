"""Where a client's state lives: on the disk of the node that hosts it, one file per participation.

Versions are named by the round they are from, and the server says which one counts: the last whose update it took.  So
a round that is replayed sees the state before it, what was trained for a round that went on without the client is never
seen again, and a state that was lost is an error, not a fresh start.  Files are safetensors (data only, never code) and
appear whole or not at all.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file

from fedkd.checkpoints import needed, state_bytes
from fedkd.errors import UserError
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

    def load(self, kind: type[R], client: int, version: int, sizes: Sizes) -> R | None:
        """Return the state from a round; None for round 0, of a client of which nothing counts yet.

        Raises:
            UserError: the state is not there.
            PayloadError: it is one of another model.
        """
        if not version:
            return None
        shapes = {name: spec.resolve(sizes) for name, spec in kind.specs().items()}
        if not any(map(math.prod, shapes.values())):
            return kind(**{name: torch.zeros(shape, dtype=kind.specs()[name].dtype) for name, shape in shapes.items()})
        try:
            tensors = load_file(path := self._path(client, version))
        except FileNotFoundError:
            where = path.relative_to(self.folder)
            raise UserError(
                f"the state of client {client} from round {version} is lost ({where} of the run's states), and a fresh "
                "one would change the results: put it back, or begin another run"
            ) from None
        return kind(**tensors).check(sizes, f"client {client} (stored state of round {version})")

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
        path = self._path(client, round)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".part{os.getpid()}")
        part.write_bytes(state_bytes(state))
        part.replace(path)
        versions = self._versions(client)
        kept = needed([r for r in versions if r <= version], round, self.checkpoint_every) | {version}
        later = {r for r in versions if r > round}  # this may be the late end of an old order
        files = {self._path(client, r) for r in kept | later}
        for other in set(path.parent.iterdir()) - files:  # the part of a file that a process left when it died too
            other.unlink(missing_ok=True)

    def _path(self, client: int, round: int) -> Path:
        return self.folder / f"{client:06d}" / f"{round:06d}.safetensors"

    def _versions(self, client: int) -> list[int]:
        folder = self.folder / f"{client:06d}"
        try:
            return sorted(int(name[:6]) for name in os.listdir(folder) if name.endswith(".safetensors"))
        except FileNotFoundError:
            return []
