"""What the command line prints of runs and partitions; no table is wider than the terminal."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

if TYPE_CHECKING:
    import pandas as pd

    from fedkd.data import FederatedData
    from fedkd.results import Run

out_console = Console()
error_console = Console(stderr=True)

LARGEST = 5
"""Classes of a client that are named where a table has no room for all."""


def show_comparison(frame: pd.DataFrame, about: str) -> None:
    """Print the table of a comparison, as many columns of it as the terminal has room for.

    Args:
        frame: that of :func:`plots.tables.comparison`.
        about: what the runs are about.
    """
    from plots.tables import cells, describe_seeds

    seeds = describe_seeds(dict(zip(frame["method"], frame["seeds"], strict=True)))
    left_out = ("seeds", "global_last", "deviation", "rounds", "seconds", "megabytes", "best")
    for count in range(4, len(left_out) + 1):  # the last three only where long labels need the room
        heading, *rows = cells(frame.drop(columns=[*left_out[:count]]))
        table = Table(
            *(Column(name, overflow="fold", no_wrap=name == "method") for name in heading),
            title="Accuracy on the clients' own test data, mean over clients, ± over seeds",
            caption=f"{about}; {seeds}",
            box=box.SIMPLE_HEAD,
        )
        for label, *numbers in rows:
            table.add_row(escape(label.replace(" (", "\n(").replace(", ", ",\n")), *numbers)
        if _fits(table):
            break
    out_console.print(table)


def show_adaptation(table: pd.DataFrame) -> None:
    """Print newcomers' accuracies by epoch; methods that do not fit beside the others go below them.

    Args:
        table: that of :func:`plots.adapt.by_epoch`.
    """
    longest = {name: int(table[name].str.len().max()) for name in table.columns}
    left = list(table.columns[1:])
    while left:
        for count in range(len(left), 0, -1):
            shown = Table(
                *(Column(escape(name), min_width=longest[name]) for name in ("epoch", *left[:count])),
                title="Newcomers' accuracy (%): mean ± deviation over clients / worst tenth",
                box=box.SIMPLE_HEAD,
            )
            for cells in table[["epoch", *left[:count]]].to_numpy():
                shown.add_row(*cells)
            if _fits(shown):
                break
        out_console.print(shown)
        left = left[count:]


def show_audit(table: pd.DataFrame) -> None:
    """Print how well members are told from non-members, as many columns as the terminal has room for.

    Args:
        table: that of :func:`plots.audit.table`.
    """
    left_out = ("members", "nonmembers", "TPR at 10 % FPR", "AUC, modified entropy", "train (%)", "test (%)")

    def broken(text: str) -> str:
        return escape(re.sub(r" (?=[±([]|at |FPR)|(?<=,) |(?<=modified) ", "\n", text))

    for count in range(len(left_out) + 1):
        kept = table.drop(columns=[*left_out[:count]])
        shown = Table(
            *(Column(broken(name), no_wrap=True) for name in kept.columns),
            title="Membership inference by the loss: training images against\nothers of the same client and class",
            box=box.SIMPLE_HEAD,
        )
        for cells in kept.to_numpy():
            shown.add_row(*map(broken, cells))
        if out_console.measure(shown, options=out_console.options.update(width=100_000)).maximum <= out_console.width:
            break
    out_console.print(shown)


def show_partition(data: FederatedData) -> None:
    """Print who holds what: a column per class if they fit, else how many classes a client has, and the largest."""
    counts, tests = data.class_counts(), data.class_counts("test")
    title = f"Training examples per class of {data.images.name}"
    wide = Table("client", "train", "test", *map(escape, data.images.classes), title=title, padding=0)
    short = Table("client", "train", "test", "classes", f"the {LARGEST} largest classes", title=title)
    for client, (row, test) in enumerate(zip(counts, tests, strict=True)):
        sizes = [str(client), str(row.sum()), str(test.sum())]
        wide.add_row(*sizes, *(str(n) if n else "·" for n in row))
        largest = [c for c in (-row).argsort(kind="stable")[:LARGEST] if row[c]]
        text = ", ".join(f"{data.images.classes[c]}: {row[c]}" for c in largest)
        short.add_row(*sizes, str((row > 0).sum()), escape(text))
    out_console.print(wide if _fits(wide) else short)


def show_summary(finished: Run) -> None:
    """Print the figures of one run, its digest and its folder."""
    from plots.tables import describe

    summary = finished.summary()
    table = Table(show_header=False, title=f"{summary['method']}, seed {summary['seed']}")
    table.caption = describe([finished])
    if "last" in summary:
        table.add_row("accuracy, last round", f"{summary['last']:.2%} (weighted {summary['last_weighted']:.2%})")
        table.add_row("accuracy, best round", f"{summary['best']:.2%} (round {summary['best_round']})")
        if summary["last_global"] == summary["last_global"]:
            table.add_row("global model, last round", f"{summary['last_global']:.2%}")
        fair = summary["fairness"]
        table.add_row("worst and best tenth", f"{fair['worst_decile']:.2%} and {fair['best_decile']:.2%}")
        table.add_row("spread over clients", f"{fair['deviation']:.2%}")
    if dropped := summary.get("dropped"):
        table.add_row("dropped", f"clients {', '.join(map(str, dropped['clients']))}, in {dropped['rounds']} rounds")
    if private := summary.get("privacy"):
        table.add_row("epsilon", f"{private['epsilon']:.2f} at delta {private['delta']:g}, {private['noise']} noise")
    table.add_row("bytes down and up", f"{summary['bytes_down']:,} and {summary['bytes_up']:,}")
    table.add_row("seconds", f"{summary['seconds']:.1f}")
    out_console.print(table)
    alone = " (with secret noise, no other run has it)" if private and private["noise"] == "secret" else ""
    out_console.print(f"digest {summary['digest']}{alone}", soft_wrap=True, highlight=False)
    out_console.print(f"results in {finished.folder}", soft_wrap=True, highlight=False, markup=False)


def _fits(table: Table) -> bool:
    """Say whether the terminal is wide enough for a table without breaking a word."""
    unlimited = out_console.options.update(width=100_000)
    return out_console.measure(table, options=unlimited).minimum <= out_console.width
