"""Every figure by name, for the command line; importing this module imports no figure."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedkd.errors import UserError, nearest

if TYPE_CHECKING:
    from fedkd.results import Run
    from plots.style import CaptionedFigure


@dataclass(frozen=True)
class Kind:
    """A kind of figure.

    Args:
        module: where its function is, below ``plots``.
        function: the name of the function, which takes runs.
        summary: what is drawn.
        options: fixed arguments of the function.
        takes: arguments of the function that are the user's to choose.
    """

    module: str
    function: str
    summary: str
    options: Mapping[str, Any] = field(default_factory=dict)
    takes: tuple[str, ...] = ()


FIGURES = {
    "convergence": Kind("convergence", "convergence", "accuracy by round (or --by)", takes=("by", "targets")),
    "convergence-bytes": Kind("convergence", "convergence", "accuracy by bytes sent", {"by": "bytes"}, ("targets",)),
    "convergence-seconds": Kind("convergence", "convergence", "accuracy by time", {"by": "seconds"}, ("targets",)),
    "convergence-weighted": Kind(
        "convergence", "convergence", "weighted by test images", {"column": "weighted"}, ("by", "targets")
    ),
    "convergence-global": Kind(
        "convergence", "convergence", "the global model's", {"column": "global"}, ("by", "targets")
    ),
    "worst-decile": Kind(
        "convergence", "convergence", "worst tenth by round", {"column": "worst_decile"}, ("by", "targets")
    ),
    "fairness": Kind("fairness", "fairness", "sorted accuracies, and gains over local models"),
    "distribution": Kind("fairness", "distribution", "cumulative distribution over clients"),
    "histogram": Kind("fairness", "histogram", "histogram over clients"),
    "violin": Kind("fairness", "violin", "density over clients, mean, median, worst tenth"),
    "gain": Kind("heterogeneity", "gain", "each client against its local model"),
    "heterogeneity": Kind("heterogeneity", "heterogeneity", "accuracy by shard size and label entropy"),
    "pareto": Kind("communication", "pareto", "accuracy against bytes"),
    "partition": Kind("partition", "partition_of", "who holds what"),
    "differences": Kind("significance", "differences", "paired differences from a control, with tests"),
    "ranks": Kind("significance", "ranks", "mean ranks, critical difference"),
    "heatmap": Kind("sweep", "heatmap", "accuracy over two settings"),
    "setting": Kind("sweep", "setting", "accuracy over one setting"),
    "apfl-alpha": Kind("mechanisms", "apfl_alpha", "APFL's weight per client"),
    "pgfed-alpha": Kind("mechanisms", "pgfed_alpha", "PGFed's matrix of weights"),
    "fedd2s-drops": Kind("mechanisms", "fedd2s_drops", "FedD2S's drop schedule"),
    "fedgen-latent": Kind("samples", "fedgen_latent", "FedGen's generated features"),
    "fedftg-images": Kind("samples", "fedftg_images", "FedFTG's generated images"),
}
DEFAULT = ("convergence", "fairness")


def chosen(text: str) -> tuple[str, ...]:
    """Return the names in a comma-separated list; ``all`` stands for every one, an empty text for the usual two.

    Raises:
        UserError: an unknown name.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip())) or DEFAULT
    if "all" in names:
        return tuple(FIGURES)
    for name in names:
        if name not in FIGURES:
            raise UserError(f"unknown figure '{name}'{nearest(name, FIGURES)} (known: all, {', '.join(FIGURES)})")
    return names


def listing() -> str:
    """Return every name with what is drawn, for the help of the command line."""
    return "; ".join(f"{name}: {kind.summary}" for name, kind in FIGURES.items())


def draw(name: str, runs: Sequence[Run], **chosen: Any) -> CaptionedFigure:
    """Draw one figure of some runs.

    Args:
        name: one of :data:`FIGURES`.
        runs: loaded runs.
        chosen: ``by`` and ``targets`` of :func:`plots.convergence.convergence`; figures without them pass them over.

    Raises:
        UserError: the figure does not apply to the runs; the message says why.
    """
    kind = FIGURES[name]
    function = getattr(importlib.import_module(f"plots.{kind.module}"), kind.function)
    figure: CaptionedFigure = function(
        runs, **kind.options, **{key: chosen[key] for key in kind.takes if key in chosen}
    )
    return figure


def draw_all(names: Sequence[str], runs: Sequence[Run], **chosen: Any) -> tuple[dict[str, CaptionedFigure], list[str]]:
    """Draw figures; of all that there are, those that apply.

    Returns:
        the figures by name, and why each of the others was left out.

    Raises:
        UserError: a figure that was asked for by name does not apply.
    """
    drawn, left_out = {}, []
    for name in names:
        try:
            drawn[name] = draw(name, runs, **chosen)
        except UserError as error:
            if tuple(names) != tuple(FIGURES) or name in DEFAULT:
                raise
            left_out.append(str(error))
    return drawn, left_out
