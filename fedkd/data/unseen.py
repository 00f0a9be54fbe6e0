"""Writers whom no run has seen: a further split of a data set's folder, each writer a client of its own."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedkd.config import Config
from fedkd.data.federated import FederatedData, split
from fedkd.data.images import SOURCES, Bytes, Images, Integers, _decoded, _labels, _silenced, local_folder
from fedkd.errors import UserError


def unseen_writers(config: Config, images: Images, name: str) -> FederatedData:
    """Return the writers of the split ``name``, in order, the images of each cut into training and test ones.

    Args:
        config: the run's configuration; ``data.root`` says where the split lies, ``NAME-*.parquet``.
        images: the run's data set: classes, shape and pixel scaling are its, not the split's.
        name: name of the split.

    Raises:
        UserError: no such split, a data set without writers, images or classes that are not the run's, or a writer who
            is in the run's own splits.
    """
    data, source = config.data, SOURCES.get(config.data.name)
    whose = f"split '{name}' of '{data.name}'"
    if source is None or not source.writer:
        raise UserError(f"{whose}: the data set has no writers; hold clients out of the run with data.newcomers")
    folder = local_folder(data.name, data.root)
    if folder is None:
        raise UserError(f"{whose} is read from a local folder, and the run's data is not; name one with --root")
    if name in ("train", "test"):
        raise UserError(f"{whose} is what the run was made of; its writers are no newcomers")
    found = {_split_of(path) for path in folder.glob("*.parquet")}
    if name not in found:
        raise UserError(f"{whose} is not in {folder} (there are: {', '.join(sorted(found))})")
    x, y, writers, names = _load(folder, name, (source.image, data.label or source.label, source.writer), whose)
    if (names and names != images.classes) or y.max() >= len(images.classes):
        raise UserError(f"{whose} has other classes than the run's data")
    if x.shape[1:] != images.train_x.shape[1:]:
        shapes = " and ".join("x".join(map(str, shape)) for shape in (x.shape[1:], images.shape))
        raise UserError(f"{whose} has other images than the run's data: {shapes} (channels x height x width)")
    known = set(_read(folder, ["train", "test"], whose, [source.writer])[source.writer])
    unseen = sorted(set(writers.tolist()))
    if seen := known.intersection(unseen):
        raise UserError(f"{whose}: {len(seen)} of its writers are in the run's own splits, {min(seen)} among them")
    first = config.run.clients + data.newcomers
    cuts = [
        split(np.flatnonzero(writers == writer), data.test_fraction, config.data_seed, first + number)
        for number, writer in enumerate(unseen)
    ]
    own = dataclasses.replace(
        images, train_x=x, train_y=y, test_x=images.test_x[:0], test_y=y[:0], train_writer=y[:0], test_writer=y[:0]
    )
    return FederatedData(own, [train for train, _ in cuts], [test for _, test in cuts], data.scaling)


def _split_of(path: Path) -> str:
    """Return the name of the split that a file ``SPLIT-00000-of-00001.parquet`` is of."""
    return re.sub(r"-\d+-of-\d+$", "", path.stem)


@lru_cache(maxsize=1)  # runs that are compared have the same one
def _load(
    folder: Path, name: str, columns: tuple[str, str, str], whose: str
) -> tuple[Bytes, Integers, npt.NDArray[Any], tuple[str, ...]]:
    """Return images ``[n, channels, height, width]``, labels and writers ``[n]`` of a split, and its classes' names.

    Args:
        columns: names of the three.
    """
    rows = _read(folder, [name], whose)
    for column in columns:
        if column not in rows.features:
            raise UserError(f"{whose} has no column '{column}' (it has {', '.join(rows.features)})")
    if not len(rows):
        raise UserError(f"{whose} is empty")
    image, label, writer = columns
    names = tuple(getattr(rows.features[label], "names", None) or ())
    return _decoded(rows, image, whose), _labels(rows[label], whose), np.asarray(rows[writer]), names


def _read(folder: Path, names: list[str], whose: str, columns: list[str] | None = None) -> Any:
    """Return the rows of some splits as one Hugging Face data set."""
    import datasets

    datasets.disable_progress_bars()
    files = sorted(str(path) for path in folder.glob("*.parquet") if _split_of(path) in names)
    try:
        with _silenced("datasets"), tempfile.TemporaryDirectory() as scratch:
            return datasets.Dataset.from_parquet(files, cache_dir=scratch, keep_in_memory=True, columns=columns)
    except Exception as error:
        raise UserError(f"{whose} cannot be read from {folder}: {type(error).__name__}: {error}") from error
