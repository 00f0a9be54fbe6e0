"""What the generators make at the end of a run: FedGen's latent features, FedFTG's images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedkd.metrics import Floats
from fedkd.results import Run
from fedkd.samples import images, latent_features
from plots import style
from plots.mechanisms import finished_run
from plots.tables import describe

_SHAPES = ((10, 1, 8), (30, 3, 5), (100, 6, 3), (np.inf, 10, 2))
"""Most classes, strips of them beside each other, images per class."""


@style.styled()
def fedgen_latent(runs: Sequence[Run]) -> style.CaptionedFigure:
    """Draw the features that FedGen's generator makes at the end of a run, projected to two dimensions.

    Points are generated features, numbers stand at the means of their classes.

    Args:
        runs: among others, finished runs of ``fedgen``; the first is drawn.

    Returns:
        a figure as wide as one column.

    Raises:
        UserError: no such run.
    """
    run = finished_run(runs, "fedgen", "fedgen-latent")
    classes = class_names(run)
    per_class = max(10, 400 // len(classes))
    features, labels = (tensor.numpy() for tensor in latent_features(run, per_class))
    places, shares = _principal(features.astype(float))
    means = np.array([places[labels == number].mean(axis=0) for number in range(len(classes))])
    figure = style.new_figure(style.SINGLE, 2.6)
    axes = figure.add_subplot()
    size = 7.0 if len(classes) <= 20 else 5.0
    for number, name in enumerate(classes):
        mine = places[labels == number]
        axes.plot(*mine.T, ".", color=style.class_colour(number), markersize=2.5, alpha=0.45, markeredgewidth=0)
        figure.note("features", name, x=mine[:, 0], y=mine[:, 1])
    figure.note("means", "mean", label=classes, x=means[:, 0], y=means[:, 1])
    axes.set_xlabel(f"first component ({shares[0]:.0%} of the variance)")
    axes.set_ylabel(f"second component ({shares[1]:.0%})")
    style.direct_labels(figure, axes, means, classes, [style.class_colour(n) for n in range(len(classes))], size)
    figure.caption = (
        f"Latent features that FedGen's generator makes at the end of the run, fedgen seed {run.config.run.seed}; "
        f"{describe([run])}: {per_class} of each of the {len(classes)} classes, from new noise, projected to their "
        "first two principal components. Names stand at the means of the classes, or beside them with a line. "
        "Samples are drawn as they are, so there are no error bands."
    )
    return figure


@style.styled()
def fedftg_images(runs: Sequence[Run]) -> style.CaptionedFigure:
    """Draw the images that FedFTG's generator makes at the end of a run, a strip per class.

    Args:
        runs: among others, finished runs of ``fedftg``; the first is drawn.

    Returns:
        a figure as wide as one column for up to ten classes, else two.

    Raises:
        UserError: no such run.
    """
    run = finished_run(runs, "fedftg", "fedftg-images")
    classes = class_names(run)
    blocks, each = next((wide, deep) for most, wide, deep in _SHAPES if len(classes) <= most)
    made, _ = images(run, each)
    pixels = made.numpy().reshape(len(classes), each, *made.shape[1:]).transpose(0, 1, 3, 4, 2)
    low, high = np.percentile(pixels, [1, 99])
    pixels = np.clip((pixels - low) / max(high - low, 1e-6), 0, 1)
    rows = -(-len(classes) // blocks)
    width = style.SINGLE if blocks == 1 else style.DOUBLE
    side = (width / blocks - 0.3) / each
    figure = style.new_figure(width, rows * side + 0.1)
    grid = np.atleast_1d(figure.subplots(1, blocks, squeeze=True))
    for block, axes in enumerate(grid):
        mine = pixels[block * rows : (block + 1) * rows]
        axes.imshow(
            _montage(mine, rows), cmap="gray", vmin=0, vmax=1, interpolation="nearest", extent=(0, each, rows, 0)
        )
        names = classes[block * rows : (block + 1) * rows]
        axes.set_yticks(np.arange(len(names)) + 0.5, names)
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
    figure.caption = (
        f"Images that FedFTG's generator makes at the end of the run, fedftg seed {run.config.run.seed}; "
        f"{describe([run])}: {each} of each of the {len(classes)} classes, from new noise. They are made to be hard "
        "for the model, not to look like the data. Brightness: 1st to 99th percentile of all pixels shown. "
        "Samples are drawn as they are, so there are no error bands."
    )
    return figure


def class_names(run: Run) -> list[str]:
    """Return the names of the classes."""
    return [name.removeprefix("class_") for name in run.partition.columns if name.startswith("class_")]


def _principal(features: Floats) -> tuple[Floats, Floats]:
    """Return the first two principal components ``[samples, 2]`` and their shares of the variance ``[2]``.

    A component points to where its largest coefficient is positive, so that the picture is the same on every machine.

    Args:
        features: ``[samples, features]``.
    """
    centred = features - features.mean(axis=0)
    _, lengths, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])[:, None]
    places, shares = np.zeros((len(features), 2)), np.zeros(2)
    kept = min(2, len(axes))
    places[:, :kept] = centred @ axes[:kept].T
    shares[:kept] = lengths[:kept] ** 2 / max(float((lengths**2).sum()), 1e-12)
    return places, shares


def _montage(pixels: Floats, rows: int) -> Floats:
    """Return one picture of strips ``[classes, samples, height, width, channels]``, a white pixel between images."""
    count, each, height, width, channels = pixels.shape
    framed = np.ones((rows, each, height + 1, width + 1, channels))
    framed[:count, :, :-1, :-1] = pixels
    picture = framed.transpose(0, 2, 1, 3, 4).reshape(rows * (height + 1), each * (width + 1), channels)
    return np.asarray(picture[..., 0] if channels == 1 else picture[..., :3], dtype=float)
