"""Invented images of the shape of a real data set, written as the files in which that comes."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from fedkd.data.images import load_images

SHAPES: dict[str, tuple[int, ...]] = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
"""Channels, height and width."""


def invented(scratch: Path, name: str, train: int, test: int) -> Path:
    """Return a folder with noise of a data set's shape, ten classes equally often; written when it is not there.

    Args:
        scratch: where.
        name: of :data:`SHAPES`.
        train: number of training images.
        test: of test images.
    """
    root = scratch / f"data-{train}-{test}"
    folder = root / name
    if folder.exists():
        return root
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        pixels = rng.integers(0, 256, (count, *SHAPES[name]), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        if name == "mnist":
            prefix = {"train": "train", "test": "t10k"}[split]
            _write_idx(folder / f"{prefix}-images-idx3-ubyte", pixels[:, 0])
            _write_idx(folder / f"{prefix}-labels-idx1-ubyte", labels)
        else:
            _write_parquet(folder / f"{split}-00000-of-00001.parquet", pixels, labels)
    return root


@cache
def count(name: str, root: Path) -> int:
    """Return how many training images a folder holds."""
    return len(load_images(name, str(root)).train_y)


def _write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    path.write_bytes(header + values.tobytes())


def _write_parquet(path: Path, pixels: np.ndarray, labels: np.ndarray) -> None:
    """Write the hub's schema of CIFAR-10, the images as bitmaps, which are the quickest to pack and to unpack."""
    import datasets

    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    packed = []
    for image in pixels.transpose(0, 2, 3, 1):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "bmp")
        packed.append({"bytes": buffer.getvalue(), "path": None})
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"img": packed, "label": labels}, features=features).to_parquet(path)
