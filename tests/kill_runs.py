"""Kill `fedkd run` and `fedkd resume` with SIGKILL, at random moments and in the middle of a write, and go on.

By hand: ``python tests/kill_runs.py FOLDER SEED KILLS`` prints a line of JSON per run: method, kills, and the digest
beside that of the same run without a kill.  The commands run in forks of this process, which has everything loaded.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import TINY, TINY_METHOD

from fedkd.config import defaults

SETTINGS = TINY | {"run.rounds": 12, "run.checkpoint-every": 3, "run.eval-every": 2, "train.local-steps": 2}
MOST_KILLS = 4
"""Kills of one run before it may end."""


def kill_runs(base: Path, seed: int, kills: int) -> None:
    """Kill runs of methods that are drawn from the seed, until there have been so many kills; print a line per run."""
    from fedkd.method import names
    from fedkd.results import Run, started

    rng, number = random.Random(seed), 0
    while kills:
        number += 1
        method, straight, folder = rng.choice(names()), base / f"straight{number}", base / f"killed{number}"
        began = time.monotonic()
        assert _command(method, straight) == 0
        seconds, steps = time.monotonic() - began, Counter((base / "steps").read_text().splitlines())
        said: list[str] = []
        while kills and len(said) < MOST_KILLS:
            if rng.random() < 0.5:
                after = rng.uniform(0, 0.7 * seconds)
                code, moment = _command(method, folder, seconds=after), f"after {after:.2f} s"
            else:
                kinds = sorted(steps)
                [moment] = rng.choices(kinds, [min(steps[kind], 8) for kind in kinds])  # the usual ones more often
                code = _command(method, folder, step=moment, nth=rng.randint(1, max(1, steps[moment] // 2)))
            if code != -signal.SIGKILL:
                assert code == 0, (method, moment, code)
                break
            kills -= 1
            said.append(f"{moment}, in round {_rounds(folder) + 1}")
        while not started(folder) or not Run(folder).finished:
            assert _command(method, folder) == 0
        digests = [Run.open(path).digest() for path in (folder, straight)]
        print(json.dumps({"method": method, "kills": said, "digest": digests[0], "expected": digests[1]}), flush=True)


def _rounds(folder: Path) -> int:
    """Return how many rounds of a run are in its log."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / "rounds.jsonl").read_bytes().count(b"\n")
    return 0


def _command(method: str, folder: Path, seconds: float = 0, step: str = "", nth: int = 0) -> int:
    """Begin a run, or go on with it where it has begun, and return its exit code, or minus the signal that killed it.

    Args:
        seconds: kill it after so long; 0: do not.
        step: kill it at the ``nth`` step of writing of this kind; empty: do not, and list the steps in ``steps``.
    """
    from fedkd.results import started

    words = ["resume", str(folder)]
    if not started(folder):
        words = ["run", method, "--out", str(folder)]
        keys = {**SETTINGS, **TINY_METHOD.get(method, {})}
        words += [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    child = os.fork()
    if not child:
        _be_the_command(words, folder, step, nth)
    if seconds:
        timer = threading.Timer(seconds, os.kill, (child, signal.SIGKILL))
        timer.start()
    _, status = os.waitpid(child, 0)
    if seconds:
        timer.cancel()
        timer.join()
    return os.waitstatus_to_exitcode(status)


def _be_the_command(words: list[str], folder: Path, fatal: str, nth: int) -> None:
    """Be `fedkd`."""
    from sims import cli

    steps: list[str] = []

    def at_step(what: str, torn: Callable[[], object] = lambda: None) -> None:
        steps.append(what)
        if what == fatal and steps.count(what) == nth:
            torn()
            os.kill(os.getpid(), signal.SIGKILL)

    _watch_writing(folder, at_step)
    sys.argv = ["fedkd", *words]
    out = os.open(folder.parent / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    code = 70
    try:
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        if not fatal:
            (folder.parent / "steps").write_text("\n".join(steps))
        os._exit(code)


def _watch_writing(folder: Path, at_step: Callable[..., None]) -> None:
    """Call ``at_step`` before a file in a folder is opened for writing, renamed, cut or removed, or a log grows.

    What is renamed was written just before, and rows are written at once: ``torn`` leaves half of them.
    """
    from fedkd.results import Recorder

    def hook(event: str, found: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.truncate") or not str(found[0]).startswith(f"{folder}/"):
            return
        path = Path(found[0])
        kind = re.sub(r"\d+", "N", str(path.relative_to(folder)))
        if event == "os.rename":
            at_step(f"half of {kind} written", lambda: os.truncate(path, path.stat().st_size // 2))
            at_step(f"{kind} written, not renamed")
        elif event != "open":
            at_step(f"{kind} to be {'cut back' if event == 'os.truncate' else 'removed'}")
        elif set(str(found[1])) & set("wa+"):
            at_step(f"{kind} to be written")

    def write(self: Recorder, log: str, rows: Any) -> None:
        rows = list(rows)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        at_step(f"half of the rows of {log} written", lambda: append(folder / f"{log}.jsonl", text[: len(text) // 2]))
        at_step(f"rows of {log} to be written")
        original(self, log, rows)

    def append(path: Path, text: str) -> None:
        with path.open("a") as file:
            file.write(text)

    original, Recorder.write = Recorder.write, write  # type: ignore[method-assign]
    sys.addaudithook(hook)


def main() -> None:
    """Load what the command loads, and kill."""
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in (
        "torch._dynamo",
        "clients.app",
        "strategies.app",
        "fedkd.data",
        "fedkd.metrics",
        "plots.tables",
        "sims.inline",
        "sims.resume",
        "sims.cli",
    ):
        importlib.import_module(name)
    defaults()  # of every method
    gc.freeze()  # no command looks through what is here already
    base, seed, kills = Path(sys.argv[1]).resolve(), int(sys.argv[2]), int(sys.argv[3])
    base.mkdir(parents=True, exist_ok=True)
    kill_runs(base, seed, kills)


if __name__ == "__main__":
    main()
