"""``python -m bench [QUESTION ...]``: see :mod:`bench`; without a question, all of them."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil

import bench
from bench.common import Bench, Table
from bench.flower import flower
from bench.groups import groups
from bench.methods import methods
from bench.overhead import overhead, pfl
from bench.scaling import scaling
from bench.server import server
from bench.startup import startup
from fedkd.results import environment

QUESTIONS: dict[str, Callable[[Bench], list[Table]]] = {
    "overhead": overhead,
    "flower": flower,
    "scaling": scaling,
    "groups": groups,
    "methods": methods,
    "server": server,
    "startup": startup,
    "pfl": pfl,
}


def main() -> None:
    """Answer questions with tables in Markdown; ``--out`` also writes the figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=bench.__doc__.splitlines()[0])
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=f"some of {', '.join(QUESTIONS)}; none: all")
    parser.add_argument("--root", type=Path, help="folder with MNIST and CIFAR-10; default: invented images")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    if strange := sorted(set(arguments.questions) - set(QUESTIONS)):
        parser.error(f"no question '{strange[0]}'; there are {', '.join(QUESTIONS)}")
    figures: dict[str, object] = {"environment": environment(), "repetitions": arguments.repetitions}
    for question in arguments.questions or QUESTIONS:
        print(f"\n## {question} ({load()})\n", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            os.environ["FEDKD_CACHE"] = f"{scratch}/cache"
            root = arguments.root.resolve() if arguments.root else None
            tables = QUESTIONS[question](Bench(Path(scratch), root, arguments.repetitions))
        print("\n".join(f"\n{table.markdown()}" for table in tables), f"\n\n({load()})", flush=True)
        figures[question] = {table.title: table.figures for table in tables}
        if arguments.out:
            arguments.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def load() -> str:
    """Say how busy the machine has been."""
    return "load average over 1, 5 and 15 minutes " + ", ".join(f"{value:.2f}" for value in psutil.getloadavg())


if __name__ == "__main__":
    main()
