"""Data that devices hold: what a node reads from its own disk, and what the server gets to know of it.

A node's ``--node-config`` names the clients it hosts and the folder of their data.  A client's folder has its number
as its name and holds, for each of the two splits, either Parquet files in the schema of the hub or a folder of images
per class::

    DATA/3/train-00000-of-00001.parquet     or     DATA/3/train/cat/17.png
    DATA/3/test-00000-of-00001.parquet             DATA/3/test/dog/4.png

The classes are those that the Parquet files name, else the lines of ``DATA/classes.txt``, else the folders' names; an
empty folder counts.  They have to be the same on all nodes.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from fedkd.config import Config
from fedkd.data.federated import FederatedData, Shard, federate, partition_csv
from fedkd.data.images import (
    SOURCES,
    Bytes,
    Images,
    Integers,
    Source,
    _decoded,
    _filled,
    _labels,
    _only,
    _pixels,
    _silenced,
    writing_cache,
)
from fedkd.errors import UserError
from fedkd.payload import MOST, PayloadError
from fedkd.places import cache_root, results_root
from fedkd.protocol import line, read_json

PUBLIC = "public"
"""Folder, beside those of the clients, of the images that ``data.public-fraction`` sets aside for the server."""
_CLASSES = "classes.txt"
_SPLITS = ("train", "test")
_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
_READER_VERSION = 1


MOST_CLASSES, MOST_LETTERS, MOST_PIXELS = 100_000, 1000, 2**28
"""How many classes a node may describe, how long their names may be, and how many numbers an image may have."""

NodeKeys = tuple[tuple[str, Any], ...]
"""The keys and values of a node's configuration, sorted."""


def own_keys(node_config: Mapping[str, Any]) -> NodeKeys | None:
    """Return what a node's configuration says; None for a simulated one, which Flower gives a ``partition-id``."""
    return None if "partition-id" in node_config else tuple(sorted(node_config.items()))


@dataclass(frozen=True)
class Place:
    """What a node's ``--node-config`` says.

    Args:
        clients: numbers of the clients that it hosts.
        data: the folder with a folder for each of them.
        state: where their states are kept.
    """

    clients: tuple[int, ...]
    data: Path
    state: Path

    @classmethod
    def of(cls, config: Config, node: NodeKeys | None) -> Self | None:
        """Return the place of a node in a run; None in simulation, where every node can train every client.

        Raises:
            UserError: the run and the node do not fit: one of them is a simulation, the other is not.
        """
        if config.data.partition != "devices":
            if node is not None:
                raise UserError("this node is a device and trains on its own data alone: data.partition = 'devices'")
            return None
        if node is None:
            raise UserError("data.partition = 'devices' needs SuperNodes with data of their own, not simulated ones")
        return cls.read(dict(node))

    @classmethod
    def read(cls, node_config: Mapping[str, Any]) -> Self:
        """Read the keys ``clients``, ``data`` and (optional) ``state``.

        Raises:
            UserError: one is missing or cannot be read.
        """
        usage = '--node-config \'clients="0,1" data="/path/on/device"\''
        if missing := [key for key in ("clients", "data") if not str(node_config.get(key, "")).strip()]:
            raise UserError(f"this node's configuration names no {' and no '.join(missing)}: {usage}")
        if unknown := sorted(set(node_config) - {"clients", "data", "state"}):
            raise UserError(
                f"this node's configuration has an unknown key '{unknown[0]}'; it takes clients, data, state"
            )
        clients = parse_clients(str(node_config["clients"]))
        state = node_config["state"] if "state" in node_config else results_root() / "state"
        folders = {"data": Path(str(node_config["data"])), "state": Path(str(state))}
        for key, folder in folders.items():
            if not folder.expanduser().is_absolute():
                raise UserError(f"{key} = '{folder}' of this node's configuration has to be an absolute path: {usage}")
        return cls(clients, folders["data"].expanduser(), folders["state"].expanduser())

    def folder(self, run: str) -> Path:
        """Return where the clients' states of a run are kept.

        Raises:
            UserError: the name, which comes from the server, is not one that the server gives.
        """
        if not re.fullmatch("[0-9a-f]{16}", run):
            raise UserError("the order does not name its run as it has to")
        return self.state / run


def parse_clients(text: str) -> tuple[int, ...]:
    """Read numbers and ranges such as ``0,1,5-9``.

    Raises:
        UserError: something else, or a number that is named twice.
    """
    numbers: list[int] = []
    for word in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,7})\s*(?:-\s*(\d{1,7})\s*)?", word)
        if not found:
            raise UserError(f"clients = '{text}': '{word}' is no number of a client and no range such as 5-9")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise UserError(f"clients = '{text}': the range '{word.strip()}' is empty")
        numbers += range(first, last + 1)
    if len(set(numbers)) < len(numbers):
        raise UserError(f"clients = '{text}' names a client twice")
    return tuple(sorted(numbers))


def hosted(config: Config, place: Place) -> FederatedData:
    """Return the data of the clients that a node hosts; every other client of the run has none.

    The examples of a client are in the order of its Parquet files, or of classes and file names.

    Raises:
        UserError: data that is not there, cannot be read or does not agree between the clients.
    """
    if beyond := [client for client in place.clients if client >= config.run.clients]:
        raise UserError(
            f"this node hosts client {beyond[0]}, and the run has run.clients = {config.run.clients}, "
            "which are numbered from 0"
        )
    read = {client: _client(config, place.data, client) for client in place.clients}
    first = read[place.clients[0]]
    for client, images in read.items():
        for what, mine, other in (
            ("classes", images.classes, first.classes),
            ("images", images.shape, first.shape),
        ):
            if mine != other:
                raise UserError(f"client {client} has other {what} than client {place.clients[0]}: {mine} and {other}")
    none = np.zeros(0, dtype=np.int64)
    rows: dict[str, list[Integers]] = {split: [none] * config.run.clients for split in _SPLITS}
    end = 0
    for split in _SPLITS:
        for client, images in read.items():
            count = len(images.train_y if split == "train" else images.test_y)
            rows[split][client] = np.arange(end, end + count)
            end += count
    pool = replace(
        first,
        train_x=np.concatenate([images.train_x for images in read.values()]),
        train_y=np.concatenate([images.train_y for images in read.values()]),
        test_x=np.concatenate([images.test_x for images in read.values()]),
        test_y=np.concatenate([images.test_y for images in read.values()]),
    )
    return FederatedData(pool, rows["train"], rows["test"], config.data.scaling)


@dataclass(frozen=True)
class Description:
    """What a node tells the server of its data; no image and no label of one is in it.

    Args:
        classes: names of the classes.
        shape: ``(channels, height, width)`` of an image.
        train: for each client that the node hosts, its number of training examples of each class.
        test: likewise of its test examples.
        fingerprints: for each client, a hash of its data, so that a run does not go on with other data.
    """

    classes: tuple[str, ...]
    shape: tuple[int, ...]
    train: dict[int, list[int]]
    test: dict[int, list[int]]
    fingerprints: dict[int, str]

    @classmethod
    def of(cls, data: FederatedData, clients: Sequence[int]) -> Self:
        """Describe the data of some clients."""
        counts = {split: data.class_counts(split) for split in _SPLITS}
        train, test = ({client: counts[split][client].tolist() for client in clients} for split in _SPLITS)
        hashes = {client: _hash(data, client) for client in clients}
        return cls(data.images.classes, data.shape, train, test, hashes)

    def json(self) -> str:
        """Return it as JSON."""
        return json.dumps(vars(self))

    @classmethod
    def parse(cls, text: str, clients: int) -> Self:
        """Read what :meth:`json` wrote; nothing in it may hold any other node up.

        Args:
            text: what a node sent.
            clients: of the run, so that no node speaks for one that there is not.

        Raises:
            PayloadError: it is something else, or a number or a name is beyond what a device can have.
        """
        read = read_json(text, "the description")
        if not isinstance(read, dict) or set(read) != {field.name for field in fields(cls)}:
            raise PayloadError(f"the description takes {', '.join(field.name for field in fields(cls))}")
        classes, shape, hashes = read["classes"], read["shape"], read["fingerprints"]
        if not isinstance(classes, list) or not 1 <= len(classes) <= MOST_CLASSES:
            raise PayloadError(f"its classes are no list of 1 to {MOST_CLASSES} names")
        for name in classes:
            if type(name) is not str or len(name) > MOST_LETTERS or not name.isprintable():
                raise PayloadError(f"a class is named {str(name)[:40]!r}, which is no text of {MOST_LETTERS} letters")
        if not _numbers(shape, 3, MOST_PIXELS) or not 1 <= math.prod(shape) <= MOST_PIXELS:
            raise PayloadError(f"its images are {str(shape)[:80]}, which is no channels, height and width")
        if not isinstance(hashes, dict) or not hashes:
            raise PayloadError("it has no fingerprints of clients")
        hosted = {str(client): client for client in range(clients)}
        for client, value in hashes.items():
            if client not in hosted:
                raise PayloadError(
                    f"it describes client {line(client)[:40]}, and the run has clients 0 to {clients - 1}"
                )
            if type(value) is not str or not re.fullmatch("[0-9a-f]{16}", value):
                raise PayloadError(f"the fingerprint of client {client} is none")
        for split in _SPLITS:
            table = read[split]
            if not isinstance(table, dict) or set(table) != set(hashes):
                raise PayloadError(f"its {split} examples are not of the clients that it has fingerprints of")
            for client, row in table.items():
                if not _numbers(row, len(classes), MOST) or sum(row) > MOST:
                    raise PayloadError(
                        f"client {client} has {str(row)[:80]} {split} examples of the {len(classes)} classes; a number "
                        f"for each, from 0, and no more than {MOST} together are possible"
                    )
                if split == "train" and not sum(row):
                    raise PayloadError(f"client {client} has no training examples")
        train, test = ({hosted[client]: row for client, row in read[split].items()} for split in _SPLITS)
        return cls(tuple(classes), tuple(shape), train, test, {hosted[c]: value for c, value in hashes.items()})


def _numbers(values: Any, count: int, most: int) -> bool:
    """Return whether something that was read is a list of so many whole numbers from 0 to the largest."""
    return isinstance(values, list) and len(values) == count and all(type(n) is int and 0 <= n <= most for n in values)


@dataclass(frozen=True)
class Federation:
    """The federated data set as the server of a deployed run knows it: who hosts whom, and how much of what.

    Args:
        config: the run's configuration.
        nodes: the node of each client.
        names: names of the classes.
        shape: ``(channels, height, width)`` of an image.
        train: ``[clients, classes]`` numbers of training examples.
        test: ``[clients, classes]`` numbers of test examples.
        fingerprints: of each client's data.
    """

    config: Config
    nodes: tuple[int, ...]
    names: tuple[str, ...]
    shape: tuple[int, ...]
    train: Integers
    test: Integers
    fingerprints: tuple[str, ...]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.names)

    def sizes(self) -> Integers:
        """Number of training examples of each client."""
        sizes: Integers = self.train.sum(axis=1)
        return sizes

    def class_counts(self, split: str = "train") -> Integers:
        """Return ``[clients, classes]``: how many examples of a class a client holds in ``train`` or ``test``."""
        return self.train if split == "train" else self.test

    def csv(self) -> str:
        """Return who holds what as CSV."""
        return partition_csv(self.names, self.train, self.test)

    def fingerprint(self) -> str:
        """Return a short hash of all clients' data."""
        return hashlib.blake2b("".join(self.fingerprints).encode(), digest_size=8).hexdigest()

    def public(self, device: torch.device | str = "cpu") -> Shard | None:
        """Return the server's own public images, every class -1; None for methods that need none.

        Raises:
            UserError: they are not there, or are other images than the clients'.
        """
        data = self.config.data
        if data.public_fraction <= 0:
            return None
        if not data.root:
            raise UserError(
                f"{self.config.run.method} needs public images on the server: data.root = FOLDER with train-*.parquet "
                "(or data.public-fraction = 0, where the method can do without)"
            )
        images = _read(self.config, Path(data.root), "the public images")
        if images.shape != self.shape:
            raise UserError(f"the public images in {data.root} are {images.shape}, the clients' are {self.shape}")
        everything = np.arange(len(images.train_y))
        return FederatedData(images, [], [], data.scaling, everything).public(device)


def write_split(config: Config, out: Path) -> list[Path]:
    """Write each client's own examples of the configured partition as a device would hold them.

    ``out/CLIENT`` for every client of the run, and ``out/public`` when ``data.public-fraction`` sets images aside; the
    labels of those are all 0.  A run from these folders has the numbers of a run of the partition.

    Raises:
        UserError: as :func:`fedkd.data.federate`.
    """
    data = federate(config)
    cut, written = len(data.images.train_x), []
    jobs = [(str(c), split, getattr(data, split)[c]) for c in range(data.clients) for split in _SPLITS]
    if len(data.set_aside):
        jobs.append((PUBLIC, "train", data.set_aside))
    for name, split, rows in jobs:
        x = np.concatenate([data.images.train_x[rows[rows < cut]], data.images.test_x[rows[rows >= cut] - cut]])
        labels = np.zeros(len(rows), dtype=np.int64) if name == PUBLIC else data.labels[rows]
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        written.append(folder / f"{split}-00000-of-00001.parquet")
        _write_parquet(written[-1], x, labels, data.images.classes, _source(config))
    return written


def _write_parquet(path: Path, x: Bytes, y: Integers, classes: Sequence[str], source: Source) -> None:
    import datasets
    from PIL import Image

    datasets.disable_progress_bars()
    pictures = []
    for pixels in x:
        file = io.BytesIO()
        Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(file, "PNG")
        pictures.append({"bytes": file.getvalue(), "path": None})
    image, label = source.image or "image", source.label or "label"
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=list(classes))})
    datasets.Dataset.from_dict({image: pictures, label: y.tolist()}, features=features).to_parquet(str(path))


def _source(config: Config) -> Source:
    """Return what the data's columns are called, and their statistics.

    Raises:
        UserError: statistics that nobody knows.
    """
    source = SOURCES.get(config.data.name, Source("", "", ""))
    if config.data.partition == "devices" and config.data.scaling == "standard" and not source.mean:
        raise UserError(
            "data.scaling = 'standard' needs the mean and deviation of all images, which nobody has on devices for "
            f"'{config.data.name}'; take symmetric or unit"
        )
    return replace(source, label=config.data.label or source.label, writer="")


def _client(config: Config, data: Path, client: int) -> Images:
    folder = data / str(client)
    if not folder.is_dir():
        raise UserError(f"the data of client {client} is not there: no folder {folder}")
    images = _read(config, folder, f"the data of client {client}")
    if not len(images.train_y):
        raise UserError(f"the data of client {client} in {folder} holds no training images")
    return images


def _read(config: Config, folder: Path, whose: str) -> Images:
    """Return the images of a folder, decoding them first if they are not in the cache."""
    if not folder.is_dir():
        raise UserError(f"{whose} are not there: no folder {folder}")
    source, named = _source(config), folder.parent / _CLASSES
    files = sorted(path for path in (*folder.rglob("*"), named) if path.is_file())
    key = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    folders = sorted(str(path) for path in folder.glob("*/*") if path.is_dir())
    identity = json.dumps([_READER_VERSION, key, folders, source.image, source.label])
    cache = cache_root() / "devices" / hashlib.sha256(identity.encode()).hexdigest()[:20]
    if not (cache / "meta.json").exists():
        with _filled(cache) as part:
            _decode(folder, source, named, whose, part)
    meta = json.loads((cache / "meta.json").read_text(encoding="utf-8"))
    x, y = (
        {split: np.load(cache / f"{split}_{column}.npy", allow_pickle=False) for split in _SPLITS} for column in "xy"
    )
    channels, none = x["train"].shape[1], np.zeros(0, dtype=np.int64)
    return Images(
        name=config.data.name,
        train_x=x["train"],
        train_y=y["train"],
        test_x=x["test"],
        test_y=y["test"],
        train_writer=none,
        test_writer=none,
        classes=tuple(meta["classes"]),
        levels=16 if config.data.name == "digits" else 255,
        mean=source.mean or (0.0,) * channels,
        deviation=source.deviation or (1.0,) * channels,
    )


def _decode(folder: Path, source: Source, named: Path, whose: str, part: Path) -> None:
    """Decode both splits of a folder into ``part``: ``{train,test}_{x,y}.npy`` and ``meta.json``."""
    listed = tuple(named.read_text(encoding="utf-8").split("\n")) if named.is_file() else ()
    names = tuple(name.strip() for name in listed if name.strip())
    found: dict[str, tuple[Bytes, Integers]] = {}
    if any(folder.glob("train*.parquet")):
        for split in _SPLITS:
            if files := sorted(map(str, folder.glob(f"{split}*.parquet"))):
                x, y, own = _parquet(files, source, f"{whose} in {folder}, split {split}")
                if own and names and own != names:
                    raise UserError(f"{whose} in {folder} names other classes than {named}")
                names, found[split] = own or names, (x, y)
    elif (folder / "train").is_dir():
        names = names or tuple(sorted(path.name for path in (folder / "train").iterdir() if path.is_dir()))
        found = {split: _pictures(folder / split, names, whose) for split in _SPLITS if (folder / split).is_dir()}
    else:
        raise UserError(f"{whose}: {folder} has neither train*.parquet nor a folder train with a folder per class")
    found = {split: (x, y) for split, (x, y) in found.items() if len(y)}
    if "train" not in found:
        raise UserError(f"{whose} in {folder} holds no training images")
    if not names:
        raise UserError(f"{whose} in {folder} has numbers for labels; name the classes, one a line, in {named}")
    shape = found["train"][0].shape[1:]
    found.setdefault("test", (np.zeros((0, *shape), dtype=np.uint8), np.zeros(0, dtype=np.int64)))
    for split, (x, y) in found.items():
        if x.shape[1:] != shape:
            raise UserError(f"{whose} in {folder}: the images of train and test differ: {shape} and {x.shape[1:]}")
        if len(y) and y.max() >= len(names):
            raise UserError(
                f"{whose} in {folder}, split {split}: {len(names)} classes are named, and a label is {y.max()}"
            )
    with writing_cache():
        for split, (x, y) in found.items():
            np.save(part / f"{split}_x.npy", x, allow_pickle=False)
            np.save(part / f"{split}_y.npy", y, allow_pickle=False)
        (part / "meta.json").write_text(json.dumps({"classes": names}), encoding="utf-8")


def _parquet(files: list[str], source: Source, whose: str) -> tuple[Bytes, Integers, tuple[str, ...]]:
    """Return images ``[n, channels, height, width]``, labels ``[n]`` and the names of the classes, () if unknown."""
    import datasets

    datasets.disable_progress_bars()
    try:
        with _silenced("datasets"), tempfile.TemporaryDirectory() as scratch:
            rows = datasets.Dataset.from_parquet(files, cache_dir=scratch, keep_in_memory=True)
    except Exception as error:
        raise UserError(f"{whose} cannot be read: {type(error).__name__}: {error}") from error
    image = source.image or _only(rows.features, datasets.Image, whose, "image")
    label = source.label or _only(rows.features, datasets.ClassLabel, whose, "class label", "; set data.label")
    for column in (image, label):
        if column not in rows.features:
            raise UserError(f"{whose} has no column '{column}' (it has {', '.join(rows.features)})")
    names = tuple(getattr(rows.features[label], "names", None) or ())
    if not len(rows):
        return np.zeros((0, 1, 1, 1), dtype=np.uint8), np.zeros(0, dtype=np.int64), names
    return _decoded(rows, image, whose), _labels(rows[label], whose), names


def _pictures(folder: Path, names: Sequence[str], whose: str) -> tuple[Bytes, Integers]:
    """Return images and labels of a folder with a folder per class, in the order of classes and file names."""
    from PIL import Image

    if strange := sorted({path.name for path in folder.iterdir() if path.is_dir()} - set(names)):
        raise UserError(f"{whose}: {folder / strange[0]} is none of the classes {', '.join(names[:20])}")
    images: list[Bytes] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        inside = sorted((folder / name).iterdir()) if (folder / name).is_dir() else []
        for path in (path for path in inside if path.suffix.lower() in _IMAGES):
            try:
                with Image.open(path) as picture:
                    images.append(_pixels(picture))
            except Exception as error:
                raise UserError(f"{whose}: {path} cannot be decoded: {type(error).__name__}: {error}") from error
            if images[-1].shape != images[0].shape:
                raise UserError(
                    f"{whose}: {path} is {images[-1].shape} (channels, height, width), others are {images[0].shape}"
                )
            labels.append(label)
    stacked: npt.NDArray[np.uint8] = np.stack(images) if images else np.zeros((0, 1, 1, 1), dtype=np.uint8)
    return stacked, np.asarray(labels, dtype=np.int64)


def _hash(data: FederatedData, client: int) -> str:
    """Return a hash of all images and labels of a client, in order."""
    digest = hashlib.blake2b(digest_size=8)
    for x, y, rows, offset in (
        (data.images.train_x, data.images.train_y, data.train[client], 0),
        (data.images.test_x, data.images.test_y, data.test[client], len(data.images.train_y)),
    ):
        digest.update(np.ascontiguousarray(x[rows - offset]).tobytes())
        digest.update(np.ascontiguousarray(y[rows - offset]).tobytes())
    return digest.hexdigest()
