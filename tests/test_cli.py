"""The command line as its user meets it: one clear line and exit code 2 for mistakes, files and tables otherwise."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
from conftest import tiny

from fedkd.config import Scalar
from sims import cli, launch

SMALL = ["--clients", "6", "--rounds", "2", "--set", "data.alpha=0.5", "--set", "train.local-steps=3"]


def fedkd(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run the command line in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["fedkd", *words])
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "fedgn"], "unknown method 'fedgn'; did you mean 'fedgen'?"),
        (["run", "fedavg", "--data", "mnsit"], "unknown data set 'mnsit'; did you mean 'mnist'?"),
        (["run", "fedavg", "--set", "train.lrr=1"], "unknown key 'train.lrr'; did you mean 'train.lr'?"),
        (["run", "fedavg", "--set", "train.lr=fast"], "train.lr = 'fast'"),
        (["run", "fedavg", "--set", "train.lr=-1"], "train.lr = -1: input should be greater than 0"),
        (["run", "fedavg", "--clients", "5000"], "run.clients = 5000 is more than the 1797 examples"),
        (["run", "fedavg", "--data", "mnist", "--root", "nowhere"], "is not a folder that can be read"),
        (["run", "fedgen", "--set", "fedgen.layer=hed"], "fedgen.layer = 'hed': the model has no such stage"),
        (["run", "fedavg", "--clients", "9", "--clients-per-round", "10"], "run.clients-per-round = 10 is more than"),
        (["run", "fedavg", "--set", "lr"], "'lr' is not an assignment"),
        (["run", "fedavg", "--set", "train.lr=true"], "train.lr = True: input should be a valid number"),
        (["run", "fedavg", "--set", 'train.lr="0.1"'], "train.lr = '0.1': input should be a valid number"),
        (["run", "fedavg", "--seed", "5000000000"], "run.seed = 5000000000: input should be less than 4294967296"),
        (["run", "fedgen", "--set", "fedprox.mu=1"], "--set fedprox.mu: 'fedprox' is not what runs (fedgen)"),
        (["run", "fedavg", "--set", "run.method=local"], "--set run.method: that is what the command's argument says"),
        (["compare", "fedavg", "--set", "run.seed=3"], "--set run.seed: that is what --seed or --seeds says"),
        (["run", "fedavg", "--clients", "9999", "--set", "data.partition=fedgen"], "run.clients = 9999 is more than"),
        (["compare", "fedavg", "--seeds", "1,1"], "must be different numbers"),
        (["compare", "fedavg", "fedavg"], "named twice"),
        (["digest", "."], "holds no run"),
        (["show", "nothing"], "unknown method 'nothing'"),
        (["reproduce", "fedgan"], "did you mean 'fedgen'?"),
    ],
)
def test_mistakes_get_one_line_and_code_2(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Nothing has started by then: no folder is made."""
    monkeypatch.chdir(tmp_path)
    assert fedkd(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_run_digest_export(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A run says where its results are; its digest and tables come from there; a second one does not overwrite it."""
    out = str(tmp_path / "run")
    assert fedkd(monkeypatch, "run", "fedavg", *SMALL, "--out", out) == 0
    assert f"results in {out}" in capsys.readouterr().out
    assert fedkd(monkeypatch, "digest", out) == 0
    digest = capsys.readouterr().out.strip()
    assert len(digest) == 64
    for kind, read in (("csv", pd.read_csv), ("parquet", pd.read_parquet)):
        assert fedkd(monkeypatch, "export", out, "--format", kind) == 0
        frame = read(tmp_path / "run" / "export" / f"evaluations.{kind}")
        assert len(frame) == 2 * 6
    assert fedkd(monkeypatch, "run", "fedavg", *SMALL, "--out", out) == 2
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.slow
def test_compare_goes_on_where_it_was_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Finished runs are used again; other settings in the same folder are refused; one table, one figure of a kind."""
    out = str(tmp_path / "both")
    words = ["compare", "local", "fedavg", *SMALL, "--jobs", "1", "--out", out]
    assert fedkd(monkeypatch, *words, "--seeds", "1") == 0
    before = (tmp_path / "both" / "fedavg-s1" / "rounds.jsonl").stat().st_mtime_ns
    assert fedkd(monkeypatch, *words, "--seeds", "1,2") == 0
    assert "fedavg seed 1: already finished" in capsys.readouterr().err
    assert (tmp_path / "both" / "fedavg-s1" / "rounds.jsonl").stat().st_mtime_ns == before
    table = pd.read_csv(tmp_path / "both" / "table.csv")
    assert list(table["method"]) == ["local", "fedavg"]
    assert list(table["seeds"]) == [2, 2]
    for stem in ("convergence", "fairness"):
        assert (tmp_path / "both" / f"{stem}.png").stat().st_size > 1000
    assert fedkd(monkeypatch, *words, "--seeds", "1", "--set", "train.lr=0.2") == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.slow
def test_two_at_once_in_one_folder_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Client state is addressed by folder, so a second writer would mix two runs."""
    from fedkd.results import lock

    words = ["compare", "local", *SMALL, "--seeds", "1", "--jobs", "1", "--out", str(tmp_path)]
    assert fedkd(monkeypatch, *words) == 0
    (tmp_path / "local-s1" / "summary.json").unlink()
    with lock(tmp_path / "local-s1"):
        assert fedkd(monkeypatch, *words) == 2
    assert "is being written by another process" in capsys.readouterr().err
    assert fedkd(monkeypatch, *words) == 0
    assert (tmp_path / "local-s1" / "summary.json").exists()


@pytest.mark.slow
def test_other_data_of_the_same_name_is_not_taken_for_the_same_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Settings alone do not say what a run was made from."""
    words = ["compare", "local", *SMALL, "--seeds", "1", "--jobs", "1", "--out", str(tmp_path)]
    assert fedkd(monkeypatch, *words) == 0
    monkeypatch.setattr("fedkd.data.FederatedData.fingerprint", lambda self: "other")
    assert fedkd(monkeypatch, *words) == 2
    assert "holds a run of other data" in capsys.readouterr().err


def test_partition_methods_show_doctor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The commands that only show something."""
    assert fedkd(monkeypatch, "partition", "--clients", "5", "--out", str(tmp_path)) == 0
    assert (tmp_path / "partition.png").exists()
    assert len(pd.read_csv(tmp_path / "partition.csv")) == 10
    assert fedkd(monkeypatch, "methods") == 0
    assert "fedgen" in capsys.readouterr().out
    assert fedkd(monkeypatch, "show", "fedgen") == 0
    shown = capsys.readouterr().out
    for part in ("fedkd/methods/fedgen.py", "clients/fedgen.py", "strategies/fedgen.py"):
        assert part in shown
    assert fedkd(monkeypatch, "show", "fedprox", "--keys") == 0
    assert "fedprox.mu" in capsys.readouterr().out
    assert fedkd(monkeypatch, "doctor") == 0
    assert "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION" in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    """`fedkd --help` answers at once because torch, flwr and pandas are imported by the commands that need them."""
    code = "import sys, sims.cli; print(sorted({'torch', 'flwr', 'pandas', 'ray', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there are no terminals to close")
@pytest.mark.parametrize("kept_away", [True, False])
def test_a_closed_terminal_ends_a_run_unless_nohup_keeps_it_away(
    fedkd: Callable[..., int], monkeypatch: pytest.MonkeyPatch, kept_away: bool
) -> None:
    """``nohup`` ignores SIGHUP before the command starts."""
    heard: list[int] = []
    monkeypatch.setattr(signal, "signal", lambda number, _: heard.append(number))
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_IGN if kept_away else signal.SIG_DFL)
    assert fedkd("--help") == 0
    assert (signal.SIGHUP in heard) != kept_away


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals cannot be blocked")
def test_an_interrupt_that_another_thread_takes_waits_for_the_workers_too() -> None:
    """Python would raise it in this thread all the same, between a process and what it is told."""
    started, over = [], threading.Event()
    other = threading.Thread(target=over.wait)

    def start_workers() -> None:
        with launch._unheard():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            started.append("whole")

    other.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            start_workers()
    finally:
        over.set(), other.join()
    assert started == ["whole"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads what runs from /proc")
def test_an_interrupt_while_workers_start_is_one_line(tmp_path: Path) -> None:
    """A terminal sends Ctrl-C to every process in front, and those of the pool would each print where they were."""
    command = [sys.executable, "-m", "sims.cli", "compare", "local", "fedavg", *SMALL, "--jobs", "2", "--out", "out"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True) as started:
        while started.poll() is None and not any("spawn_main" in line for line in running(started.pid)):
            time.sleep(0.005)
        os.killpg(started.pid, signal.SIGINT)
        _, error = started.communicate(timeout=60)
    assert started.returncode == 130
    assert error.splitlines() == [line for line in error.splitlines() if line.startswith("fedkd: stopped; ")]
    while running(started.pid):  # those that were told to end
        time.sleep(0.05)


def check_deaf(flat: dict[str, Scalar], nodes: int) -> None:
    """Fail in a process that Ctrl-C reaches; stands for a run."""
    assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals cannot be kept away")
def test_processes_of_a_comparison_leave_interrupts_to_the_one_that_started_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From before their first line on, which no handler of their own could be; and that one hears them again."""
    monkeypatch.setattr(launch, "_inline", check_deaf)
    launch.launch_all([tiny(**{"run.dir": str(tmp_path / name)}) for name in "ab"], "inline", 1, jobs=2)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def running(session: int) -> list[str]:
    """Return the command lines of the processes of a session that have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, _, its, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(its) == session and state not in "ZX":
                found.append((folder / "cmdline").read_text().replace("\0", " "))
    return found
