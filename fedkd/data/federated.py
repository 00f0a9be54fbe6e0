"""A federated data set: each client's training and test images, as tensors that are scaled batch by batch."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fedkd.config import Config, DataSection
from fedkd.data.images import Images, load_images, writing_cache
from fedkd.data.partition import partition
from fedkd.errors import UserError
from fedkd.places import cache_root
from fedkd.rng import Streams

Integers = npt.NDArray[np.int64]

Parts = tuple[list[Integers], list[Integers], list[Integers]]
"""Training and test positions of each client, and the public ones as a list of one."""

SCALED_BYTES = 256 * 2**20
"""Data sets of up to this size as float32 are scaled once; larger ones stay bytes and are scaled batch by batch."""


@dataclass(frozen=True)
class Shard:
    """Images of one client on the device: scaled already, or as bytes that are scaled when a batch is taken.

    Args:
        x: ``[n, channels, height, width]``, float32 (scaled) or bytes.
        y: ``[n]`` class indices.
        shift: ``[channels, 1, 1]``, in bytes; taken off first.
        scale: ``[channels, 1, 1]``; multiplied after.
    """

    x: torch.Tensor
    y: torch.Tensor
    shift: torch.Tensor
    scale: torch.Tensor

    def __len__(self) -> int:
        return len(self.y)

    @property
    def examples(self) -> torch.Tensor:
        """The number of images, as records hold it."""
        return torch.tensor(len(self))

    def batch(self, rows: torch.Tensor | slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scaled images ``[batch, channels, height, width]`` float32 and classes ``[batch]``."""
        x = self.x[rows]
        return x if x.is_floating_point() else _scaled(x, self.shift, self.scale), self.y[rows]

    def scaled(self) -> Shard:
        """Return the same images scaled once and for all: the same numbers, four times the memory."""
        return dataclasses.replace(self, x=_scaled(self.x, self.shift, self.scale))

    def class_counts(self, classes: int) -> torch.Tensor:
        """Return the number of examples of each class ``[classes]``."""
        return torch.bincount(self.y, minlength=classes).cpu()


def _scaled(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float32).sub_(shift).mul_(scale)


@dataclass(frozen=True)
class FederatedData:
    """Who holds what.

    Args:
        images: the decoded data set.
        train: for each client, positions in the pool of its training examples.
        test: for each client, positions in the pool of its test examples.
        scaling: pixel scaling, a name of ``data.scaling``.
        set_aside: positions in the pool of the public examples (``data.public-fraction``), which no client holds.

    The *pool* is the training set followed by the official test set.
    """

    images: Images
    train: list[Integers]
    test: list[Integers]
    scaling: str
    set_aside: Integers = dataclasses.field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @property
    def clients(self) -> int:
        """Number of clients."""
        return len(self.train)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.images.classes)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(channels, height, width)`` of an image."""
        return self.images.shape

    @cached_property
    def labels(self) -> Integers:
        """Class of every example of the pool."""
        return np.concatenate([self.images.train_y, self.images.test_y])

    def sizes(self) -> Integers:
        """Number of training examples of each client."""
        return np.array([len(rows) for rows in self.train], dtype=np.int64)

    def class_counts(self, split: str = "train") -> Integers:
        """Return ``[clients, classes]``: how many examples of a class a client holds in ``train`` or ``test``."""
        rows = self.train if split == "train" else self.test
        return np.stack([np.bincount(self.labels[r], minlength=self.classes) for r in rows]).astype(np.int64)

    def shard(self, client: int, split: str, device: torch.device | str = "cpu") -> Shard:
        """Return a client's ``train`` or ``test`` images on a device."""
        return self._shard((self.train if split == "train" else self.test)[client], device)

    def public(self, device: torch.device | str = "cpu") -> Shard | None:
        """Return the images that were set aside, on a device, every class -1 in place of the label; None without."""
        if not len(self.set_aside):
            return None
        shard = self._shard(self.set_aside, device)
        return dataclasses.replace(shard, y=torch.full_like(shard.y, -1))

    def _shard(self, rows: Integers, device: torch.device | str) -> Shard:
        cut = len(self.images.train_x)
        x = np.concatenate([self.images.train_x[rows[rows < cut]], self.images.test_x[rows[rows >= cut] - cut]])
        y = np.concatenate([self.images.train_y[rows[rows < cut]], self.images.test_y[rows[rows >= cut] - cut]])
        channels, levels = self.images.shape[0], self.images.levels
        mean, deviation = {
            "symmetric": ((0.5,) * channels, (0.5,) * channels),
            "standard": (self.images.mean, self.images.deviation),
            "unit": ((0.0,) * channels, (1.0,) * channels),
        }[self.scaling]
        column = [-1, 1, 1]
        shard = Shard(
            x=torch.from_numpy(x).to(device),
            y=torch.from_numpy(y).to(device),
            shift=(torch.tensor(mean, dtype=torch.float32) * levels).reshape(column).to(device),
            scale=(1 / (torch.tensor(deviation, dtype=torch.float32) * levels)).reshape(column).to(device),
        )
        small = len(self.labels) * int(np.prod(self.images.shape)) * 4 <= SCALED_BYTES
        return shard.scaled() if small else shard

    def fingerprint(self) -> str:
        """Return a short hash of the labels and of a sample of the images: other data under the same name differ."""
        digest = hashlib.blake2b(self.labels.tobytes(), digest_size=8)
        for images in (self.images.train_x, self.images.test_x):
            if isinstance(images, np.memmap):  # a mapping that goes again, with the memory that looking at it takes
                whole = np.load(str(images.filename), mmap_mode="r", allow_pickle=False)
                images = whole if whole.shape == images.shape else images
            digest.update(np.ascontiguousarray(images[:: max(1, len(images) // 100)]).tobytes())
        return digest.hexdigest()

    def csv(self) -> str:
        """Return the partition as CSV: client, split, examples, and one column of counts per class."""
        return partition_csv(self.images.classes, self.class_counts("train"), self.class_counts("test"))


def partition_csv(classes: Sequence[str], train: Integers, test: Integers) -> str:
    """Return a partition as CSV, from the names of the classes and the counts ``[clients, classes]`` of both splits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["client", "split", "examples", *(f"class_{name}" for name in classes)])
    for split, per_client in (("train", train), ("test", test)):
        for client, counts in enumerate(per_client):
            writer.writerow([client, split, int(counts.sum()), *map(int, counts)])
    return text.getvalue()


def federate(config: Config) -> FederatedData:
    """Return the configured federated data set; the partition is computed once per machine and then read.

    Raises:
        UserError: data that cannot be read, or a partition that it does not allow.
    """
    images, (train, test, (set_aside,)) = _dealt(config)
    clients = config.run.clients
    return FederatedData(images, train[:clients], test[:clients], config.data.scaling, set_aside)


def held_out(config: Config) -> FederatedData:
    """Return the newcomers' data: of the same partition, the ``data.newcomers`` clients after those of the run.

    Raises:
        UserError: as :func:`federate`.
    """
    images, (train, test, _) = _dealt(config)
    clients = config.run.clients
    return FederatedData(images, train[clients:], test[clients:], config.data.scaling)


def _dealt(config: Config) -> tuple[Images, Parts]:
    """Return the images and who holds which: the partition over the run's clients and the newcomers."""
    data = config.data
    if data.partition == "devices":
        raise UserError("data.partition = 'devices': the images are on the devices alone, so this cannot be done here")
    images = load_images(data.name, data.root, data.label, data.config)
    key = json.dumps(
        [
            _PARTITION_VERSION,
            data.model_dump(exclude={"scaling", "root"}),
            config.data_seed,
            config.run.clients,
            *(
                _short_hash(a.tobytes())
                for a in (images.train_y, images.test_y, images.train_writer, images.test_writer)
            ),
        ],
        sort_keys=True,
    )
    cached = cache_root() / "partitions" / f"{_short_hash(key.encode())}.npz"
    parts = _read(cached) if cached.exists() else None
    if parts is None:
        parts = _deal(config, images)
        _write(cached, *parts)
    return images, parts


_PARTITION_VERSION = 2


def _short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20]


def _deal(config: Config, images: Images) -> Parts:
    data, clients, seed = config.data, config.run.clients + config.data.newcomers, config.data_seed
    if data.test != "pooled":
        if len(images.test_y) == 0:
            raise UserError(
                f"data.test = '{data.test}' needs an official test set, and '{data.name}' has none; "
                "take data.test=pooled"
            )
        train, public = _partition(data, images.train_y, images.train_writer, clients, seed)
        if data.test == "own-labels":
            return train, _own_label_test(images, train), [public]
        return train, [np.arange(len(images.test_y)) + len(images.train_y)] * clients, [public]
    labels = np.concatenate([images.train_y, images.test_y])
    writers = np.concatenate([images.train_writer, images.test_writer])
    held, public = _partition(data, labels, writers, clients, seed)
    train, test = [], []
    for client, rows in enumerate(held):
        mine, tests = split(rows, data.test_fraction, seed, client)
        train.append(mine)
        test.append(tests)
    return train, test, [public]


def split(rows: Integers, test_fraction: float, seed: int, client: int) -> tuple[Integers, Integers]:
    """Return a client's training and test positions: the draw is a function of the seed and its number alone."""
    shuffled = np.random.default_rng([seed, client]).permutation(rows)
    cut = min(max(1, round(len(rows) * test_fraction)), len(rows) - 1)
    return np.sort(shuffled[cut:]), np.sort(shuffled[:cut])


def _partition(
    data: DataSection, labels: Integers, writers: Integers, clients: int, seed: int
) -> tuple[list[Integers], Integers]:
    """Set the public examples aside and deal out the others; return the positions of both.

    FedGen's split stays as it is published, for it depends on every example: the public ones are of those left over.
    """
    if data.public_fraction <= 0:
        return partition(data, labels, writers, clients, seed), np.zeros(0, dtype=np.int64)
    rng = Streams(seed).numpy("public")
    cut = max(1, round(data.public_fraction * len(labels)))
    if data.partition == "fedgen":
        held = partition(data, labels, writers, clients, seed)
        over = np.setdiff1d(np.arange(len(labels)), np.concatenate(held))
        if len(over) < cut:
            raise UserError(
                f"data.partition = 'fedgen' leaves {len(over)} examples over, and data.public-fraction = "
                f"{data.public_fraction:g} needs {cut}; take a smaller data.fraction or a smaller data.public-fraction"
            )
        return held, np.sort(rng.permutation(over)[:cut])
    shuffled = rng.permutation(len(labels))
    kept = np.sort(shuffled[cut:])
    held = partition(data, labels[kept], writers[kept] if len(writers) else writers, clients, seed)
    return [kept[rows] for rows in held], np.sort(shuffled[:cut])


def _own_label_test(images: Images, train: list[Integers]) -> list[Integers]:
    """Cut the official test set: of each class a client owns, ``floor(n_class / clients)`` images, no image twice."""
    clients, offset = len(train), len(images.train_y)
    by_class = [np.flatnonzero(images.test_y == c) for c in range(len(images.classes))]
    given = [0] * len(by_class)
    test = []
    for rows in train:
        mine = []
        for label in np.unique(images.train_y[rows]):
            share = len(by_class[label]) // clients
            mine.append(by_class[label][given[label] : given[label] + share] + offset)
            given[label] += share
        test.append(np.sort(np.concatenate(mine)))
    return test


def _write(path: Path, train: list[Integers], test: list[Integers], public: list[Integers]) -> None:
    part = path.with_suffix(f".part{os.getpid()}.npz")
    with writing_cache():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            part,
            train=np.concatenate(train),
            test=np.concatenate(test),
            public=np.concatenate(public),
            train_sizes=np.array([len(r) for r in train]),
            test_sizes=np.array([len(r) for r in test]),
            public_sizes=np.array([len(r) for r in public]),
        )
        part.replace(path)


def _read(path: Path) -> Parts | None:
    """Read a cached partition; an unreadable file is as good as none."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
            return tuple(  # type: ignore[return-value]
                np.split(saved[name], np.cumsum(saved[f"{name}_sizes"])[:-1]) for name in ("train", "test", "public")
            )
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None
