"""Image data sets as arrays: found, decoded once, cached, and memory-mapped ever after.

Sources, in this order: scikit-learn (``digits``); the folder ``data.root`` (Parquet in the schema that the Hugging
Face hub serves, or the four idx files of MNIST and Fashion-MNIST, packed or not); Debian's ``dataset-fashion-mnist``;
the hub.  The hub is asked only for a data set that the user named and that is found nowhere else.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import logging
import re
import shutil
import tempfile
import textwrap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedkd.errors import UserError, nearest
from fedkd.places import cache_root

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]

MOST_CLASSES = 100_000
_DECODER_VERSION = 2
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Source:
    """Where a data set comes from and what its columns are called.

    ``mean`` and ``deviation`` are per channel of the training set, pixels in [0, 1]; empty: computed when needed.
    """

    hub: str
    image: str
    label: str
    writer: str = ""
    config: str = ""
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()


SOURCES: dict[str, Source] = {
    "digits": Source("", "image", "label", mean=(0.3053,), deviation=(0.3761,)),
    "mnist": Source("ylecun/mnist", "image", "label", mean=(0.1307,), deviation=(0.3081,)),
    "fashion_mnist": Source("zalando-datasets/fashion_mnist", "image", "label", mean=(0.2860,), deviation=(0.3530,)),
    "cifar10": Source(
        "uoft-cs/cifar10", "img", "label", mean=(0.4914, 0.4822, 0.4465), deviation=(0.2470, 0.2435, 0.2616)
    ),
    "cifar100": Source(
        "uoft-cs/cifar100", "img", "fine_label", mean=(0.5071, 0.4865, 0.4409), deviation=(0.2673, 0.2564, 0.2762)
    ),
    "femnist": Source("flwrlabs/femnist", "image", "character", writer="writer_id"),
}


@dataclass(frozen=True)
class Images:
    """A decoded data set.

    Args:
        name: its name.
        train_x: ``[n, channels, height, width]`` bytes.
        train_y: ``[n]`` class indices.
        test_x: official test images; of length zero when there is no official test set.
        test_y: their classes.
        train_writer: ``[n]`` index of each image's writer, or of length zero.
        test_writer: likewise.
        classes: class names.
        levels: largest possible byte: 255, and 16 for ``digits``.
        mean: per channel, pixels in [0, 1].
        deviation: per channel, pixels in [0, 1].
    """

    name: str
    train_x: Bytes
    train_y: Integers
    test_x: Bytes
    test_y: Integers
    train_writer: Integers
    test_writer: Integers
    classes: tuple[str, ...]
    levels: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """``(channels, height, width)``."""
        return tuple(self.train_x.shape[1:])


def load_images(name: str, root: str = "", label: str = "", config: str = "") -> Images:
    """Return a data set, decoding it first if this machine has not seen it yet.

    Args:
        name: a name of :data:`SOURCES`, or a hub name ``owner/data``.
        root: a local folder that holds it; empty: look in the usual places, then ask the hub.
        label: the label column; empty: that of :data:`SOURCES`, or the only one there is.
        config: the hub's configuration; empty: the only one there is.

    Raises:
        UserError: unknown name, a folder that cannot be read, a hub that cannot be reached, a column or configuration
            that has to be chosen or is not there, or a cache that cannot be written.
    """
    if name not in SOURCES and not _HUB_NAME.fullmatch(name):
        raise UserError(
            f"unknown data set '{name}'{nearest(name, SOURCES)} (known: {', '.join(SOURCES)}, or a hub name owner/data)"
        )
    source = SOURCES.get(name, Source(name, "", ""))
    folder = local_folder(name, root)
    if label and (name == "digits" or (folder and _is_idx(folder))):
        raise UserError(f"data.label = '{label}': data set '{name}' has one label for each image and no columns")
    if config and (name == "digits" or folder):
        raise UserError(f"data.config = '{config}' is for the hub, and data set '{name}' is read from this machine")
    source = replace(source, label=label or source.label, config=config)
    if name == "digits":
        key, place = [], "scikit-learn"
    elif folder is not None:
        key = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(folder.iterdir()) if f.is_file()]
        place = str(folder.resolve())
    else:
        key, place = [], "hub"
    identity = json.dumps([_DECODER_VERSION, place, key, label, config])
    cache = cache_root() / f"{name.replace('/', '--')}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    try:
        return _open(name, source, cache)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, KeyError):
        shutil.rmtree(cache, ignore_errors=True)  # damaged is as good as none
    with _filled(cache) as part:
        _decode(name, source, folder, part)
    return _open(name, source, cache)


@contextlib.contextmanager
def writing_cache() -> Iterator[None]:
    """Say whose fault it is when the block cannot write to the cache.

    Raises:
        UserError: in place of an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the cache of decoded data, {cache_root()}, cannot be written: {error.strerror}; "
            "set FEDKD_CACHE to a folder that can"
        ) from error


@contextlib.contextmanager
def _filled(cache: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes ``cache`` when all went well; another process may win the race."""
    with writing_cache():
        cache.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f"{cache.name}.", dir=cache.parent))
    try:
        yield part
        if not cache.exists():
            with contextlib.suppress(OSError):
                part.rename(cache)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def local_folder(name: str, root: str) -> Path | None:
    """Return the local folder of a data set, or None when only the hub has it.

    Raises:
        UserError: ``root`` is given and does not hold the data set.
    """
    if name == "digits":
        return None
    if root:
        base = Path(root).expanduser()
        try:
            if not base.is_dir():
                raise UserError(f"data.root = '{root}' is not a folder that can be read")
            for folder in (base / name, base):
                if folder.is_dir() and (list(folder.glob("train-*.parquet")) or _is_idx(folder)):
                    return folder
        except OSError as error:
            raise UserError(f"data.root = '{root}' cannot be read: {error.strerror}") from error
        raise UserError(
            f"data.root = '{root}' holds neither train-*.parquet nor idx files, and no folder '{name}' that does"
        )
    if name == "fashion_mnist":
        return _DEBIAN_FASHION_MNIST if _DEBIAN_FASHION_MNIST.is_dir() else None
    return None


def _is_idx(folder: Path) -> bool:
    return any(folder.glob("train-images*"))


def _decode(name: str, source: Source, folder: Path | None, part: Path) -> None:
    """Decode every split into ``part``: ``{train,test}_{x,y,writer}.npy`` and ``meta.json``."""
    levels = 255
    if name == "digits":
        splits, classes, levels = _read_digits(), list("0123456789"), 16
    elif folder is not None and _is_idx(folder):
        splits, classes = _read_idx(folder)
    else:
        splits, classes = _read_parquet(name, source, folder)
    splits = {split: columns for split, columns in splits.items() if len(columns["y"])}
    if "train" not in splits:
        raise UserError(f"data set '{name}' holds no training images")
    most = max(int(columns["y"].max()) for columns in splits.values())
    if most >= len(classes):
        raise UserError(f"data set '{name}' names {len(classes)} classes, and a label is {most}")
    shapes = {split: columns["x"].shape[1:] for split, columns in splits.items()}
    if len(set(shapes.values())) > 1:
        raise UserError(
            f"data set '{name}': images are "
            + " and ".join(f"{'x'.join(map(str, shape))} in {split}" for split, shape in shapes.items())
            + " (channels x height x width); all have to be alike"
        )
    with writing_cache():
        for split, columns in splits.items():
            for column, values in columns.items():
                np.save(part / f"{split}_{column}.npy", values, allow_pickle=False)
        (part / "meta.json").write_text(json.dumps({"classes": classes, "levels": levels}))


Columns = dict[str, npt.NDArray[Any]]


def _read_digits() -> dict[str, Columns]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return {"train": {"x": bunch.images.astype(np.uint8)[:, None], "y": bunch.target.astype(np.int64)}}


def _read_parquet(name: str, source: Source, folder: Path | None) -> tuple[dict[str, Columns], list[str]]:
    import datasets

    datasets.disable_progress_bars()
    try:
        with _silenced("datasets", "huggingface_hub"):
            if folder is not None:
                files = {s: sorted(map(str, folder.glob(f"{s}-*.parquet"))) for s in ("train", "test")}
                with tempfile.TemporaryDirectory() as scratch:
                    loaded = {
                        split: datasets.Dataset.from_parquet(paths, cache_dir=scratch, keep_in_memory=True)
                        for split, paths in files.items()
                        if paths
                    }
            else:
                loaded = dict(datasets.load_dataset(source.hub, source.config or None))
    except Exception as error:
        where = f"the folder {folder}" if folder else f"the hub's {source.hub}"
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        said = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
        advice = "choose one with data.config" if "onfig" in said else "with the files at hand set data.root=FOLDER"
        raise UserError(
            f"data set '{name}' cannot be read from {where}: {textwrap.shorten(said, 300, placeholder=' ...')}"
            + ("" if folder else f"; {advice}")
        ) from error
    loaded = {split: rows for split, rows in loaded.items() if len(rows)}
    if "train" not in loaded:
        raise UserError(f"data set '{name}' has no images in a split 'train' (it has {', '.join(loaded) or 'none'})")
    features = loaded["train"].features
    image = source.image or _only(features, datasets.Image, name, "image")
    label = source.label or _only(features, datasets.ClassLabel, name, "class label", "; name one with data.label")
    for column in filter(None, (image, label, source.writer)):
        if column not in features:
            raise UserError(f"data set '{name}' has no column '{column}' (it has {', '.join(features)})")
    writers: dict[Any, int] = {}
    splits: dict[str, Columns] = {}
    for split in ("train", "test"):
        if split not in loaded:
            continue
        rows = loaded[split]
        pixels = _decoded(rows, image, f"data set '{name}', split {split}")
        columns: Columns = {"x": pixels, "y": _labels(rows[label], f"data set '{name}', split {split}")}
        if source.writer:
            for writer in sorted(set(rows[source.writer])):
                writers.setdefault(writer, len(writers))
            columns["writer"] = np.asarray([writers[w] for w in rows[source.writer]], dtype=np.int64)
        splits[split] = columns
    kind = features[label]
    count = int(max(c["y"].max() for c in splits.values())) + 1
    return splits, list(getattr(kind, "names", None) or map(str, range(count)))


def _decoded(rows: Any, column: str, whose: str) -> Bytes:
    """Return all images of a split ``[n, channels, height, width]``.

    Raises:
        UserError: an image that cannot be decoded, or one of another size or kind than the first.
    """
    rows, images = rows.select_columns([column]), list[Bytes]()
    for number in range(len(rows)):
        try:
            images.append(_pixels(rows[number][column]))
        except Exception as error:
            raise UserError(f"{whose}: image {number} cannot be decoded: {type(error).__name__}: {error}") from error
        if images[-1].shape != images[0].shape:
            raise UserError(
                f"{whose}: image {number} is {'x'.join(map(str, images[-1].shape))}, the first one "
                f"{'x'.join(map(str, images[0].shape))} (channels x height x width); all have to be alike"
            )
    return np.stack(images)


def _labels(values: Any, whose: str) -> Integers:
    """Return class indices ``[n]``.

    Raises:
        UserError: a label that is no class index.
    """
    for number, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MOST_CLASSES:
            raise UserError(
                f"{whose}: label {number} is {value!r}; labels have to be class numbers from 0 to {MOST_CLASSES - 1}"
            )
    return np.asarray(values, dtype=np.int64)


def _only(features: Any, kind: type, name: str, what: str, advice: str = "") -> str:
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        columns = f"{len(found)} {what} columns: {', '.join(found)}" if found else f"no {what} column"
        raise UserError(f"data set '{name}' has {columns} (of {', '.join(features)}); one is needed{advice}")
    return str(found[0])


@contextlib.contextmanager
def _silenced(*libraries: str) -> Iterator[None]:
    """Keep libraries' log lines off the terminal: what went wrong is said in one line of ours."""
    loggers = [logging.getLogger(name) for name in libraries]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _pixels(picture: Any) -> Bytes:
    """Return a PIL image as ``[channels, height, width]`` bytes; grey stays one channel, all else becomes RGB."""
    if picture.mode[0] in "IF":  # integers or floats of more than a byte
        deep = np.asarray(picture)
        if picture.mode == "F" or deep.min() < 0 or deep.max() > 255:
            raise ValueError(f"pixels of mode {picture.mode} from {deep.min()} to {deep.max()} do not fit into bytes")
        return deep.astype(np.uint8)[None]
    grey = picture.mode in ("L", "1")
    array = np.asarray(picture.convert("L" if grey else "RGB"), dtype=np.uint8)
    return array[None] if grey else array.transpose(2, 0, 1)


def _read_idx(folder: Path) -> tuple[dict[str, Columns], list[str]]:
    splits: dict[str, Columns] = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        x, y = _idx(folder, f"{prefix}-images", 3), _idx(folder, f"{prefix}-labels", 1)
        if len(x) != len(y):
            raise UserError(f"the folder {folder} has {len(x)} {split} images and {len(y)} labels")
        splits[split] = {"x": x[:, None], "y": y.astype(np.int64)}
    most = max(int(columns["y"].max(initial=9)) for columns in splits.values())
    return splits, [str(c) for c in range(most + 1)]


def _idx(folder: Path, prefix: str, dimensions: int) -> Bytes:
    """Read an idx file of bytes: two zero bytes, 0x08, the number of dimensions, the dimensions, the values."""
    path = next(iter(sorted(folder.glob(f"{prefix}*"))), None)
    if path is None:
        raise UserError(f"the folder {folder} has no idx file {prefix}*")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            raw = file.read()
        if raw[:4] != bytes([0, 0, 8, dimensions]):
            raise ValueError("not an idx file of bytes with these dimensions")
        shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", raw[3], 4))
        return np.frombuffer(raw, np.uint8, int(np.prod(shape)), 4 + 4 * raw[3]).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        if isinstance(error, OSError) and error.strerror:  # the system's word; that of damaged gzip has none
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        raise UserError(f"{path} is not an idx file of bytes in {dimensions}-D, or it is cut short") from error


def _open(name: str, source: Source, cache: Path) -> Images:
    meta = json.loads((cache / "meta.json").read_text())

    def column(file: str, default: npt.NDArray[Any]) -> npt.NDArray[Any]:
        path = cache / f"{file}.npy"
        return np.load(path, mmap_mode="r", allow_pickle=False) if path.exists() else default

    none = np.zeros(0, dtype=np.int64)
    train_x = column("train_x", none)
    mean, deviation = source.mean, source.deviation
    if not mean:
        sample = np.asarray(train_x[:: max(1, len(train_x) // 10_000)], dtype=np.float64) / 255
        mean = tuple(round(float(v), 4) for v in sample.mean(axis=(0, 2, 3)))
        deviation = tuple(max(round(float(v), 4), 1e-4) for v in sample.std(axis=(0, 2, 3)))
    return Images(
        name=name,
        train_x=train_x,
        train_y=np.array(column("train_y", none)),
        test_x=column("test_x", np.zeros((0, *train_x.shape[1:]), dtype=np.uint8)),
        test_y=np.array(column("test_y", none)),
        train_writer=np.array(column("train_writer", none)),
        test_writer=np.array(column("test_writer", none)),
        classes=tuple(meta["classes"]),
        levels=meta["levels"],
        mean=mean,
        deviation=deviation,
    )
