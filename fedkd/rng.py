"""Named random streams: every draw of a run is a function of (seed, purpose, round, client) and nothing else.

So a history does not depend on the engine, on the number of nodes or on the order in which clients are trained,
and a replayed round draws what it drew before.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Streams:
    """The random streams of one run.

    Args:
        seed: the run's seed, any integer.
    """

    seed: int

    def number(self, purpose: str, round: int = 0, client: int = -1) -> int:
        """Return the 63-bit integer that seeds the named stream."""
        name = f"{self.seed}/{purpose}/{round}/{client}".encode()
        return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1

    def torch(self, purpose: str, round: int = 0, client: int = -1) -> torch.Generator:
        """Return a fresh CPU generator for the named stream (draws are made on the CPU on every device)."""
        return torch.Generator().manual_seed(self.number(purpose, round, client))

    def numpy(self, purpose: str, round: int = 0, client: int = -1) -> np.random.Generator:
        """Return a fresh NumPy generator for the named stream."""
        return np.random.Generator(np.random.PCG64(self.number(purpose, round, client)))
