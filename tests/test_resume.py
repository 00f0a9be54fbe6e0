"""An interrupted run goes on and ends with the bytes of one that was not, whatever stopped it and whenever."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
from conftest import TINY, by_case, case_id, cases, tiny
from test_cli import fedkd

from fedkd.config import Config, Scalar
from fedkd.results import LOGS, Recorder, Run, lock
from sims import inline
from sims.progress import Watched
from sims.watchdog import HOME, processes_of

pytestmark = pytest.mark.slow

RunInline = Callable[..., Run]
Keys = dict[str, Scalar]
SHORT: Keys = {"run.rounds": 4, "run.checkpoint-every": 2, "run.clients-per-round": 5}
EVERY_2: Keys = {**SHORT, "run.rounds": 6}
"""Most clients train in every round, so their states from before the last checkpoint are old ones."""
BASE = Path(__file__).resolve().parent.parent


class Killed(BaseException):
    """The end of a process, for which nothing in it is prepared."""


def interrupt(config: Config, round: int, log: str = "clients") -> Path:
    """Run until a round's rows are due in a log, then die; return the run's folder."""
    write = Recorder.write

    def dying(self: Recorder, name: str, rows: list[dict[str, int]]) -> None:
        if name == log and rows and rows[0]["round"] == round:
            raise Killed
        write(self, name, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "write", dying)
        with pytest.raises(Killed):
            inline.run(config)
    return Path(config.run.dir)


def after_rounds(run: Run) -> list[int]:
    """Return after which rounds a run went on."""
    return [again["after_round"] for again in run.environment.get("resumed", [])]


# 1. Every method: neither a server half nor a client half keeps anything where a checkpoint does not find it.


ELSEWHERE = """
import json, sys
from fedkd.config import Config
from sims.inline import run
for flat in json.loads(sys.argv[1]):
    run(Config.from_flat(flat))
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Every case, interrupted here when the clients have trained in round 4, and gone on with in another process."""
    base, configs = tmp_path_factory.mktemp("elsewhere"), {}
    for method, variant in cases():
        label = f"{method}-{case_id(variant)}"
        configs[label] = tiny(method, **SHORT, **variant, **{"run.dir": str(base / label)})
        interrupt(configs[label], 4)
    argument = json.dumps([config.flat() for config in configs.values()])
    environment = {**os.environ, "PYTHONHASHSEED": "4242"}
    subprocess.run([sys.executable, "-c", ELSEWHERE, argument], env=environment, cwd=BASE, check=True)
    return {label: Run.open(base / label) for label in configs}


@by_case
def test_goes_on_in_another_process_to_the_same_digest(
    run_inline: RunInline, elsewhere: dict[str, Run], method: str, variant: Keys
) -> None:
    """Rounds 3 and 4 are trained again, from the states that clients had after round 2."""
    run = elsewhere[f"{method}-{case_id(variant)}"]
    assert run.finished
    assert after_rounds(run) == [2]
    assert run.digest() == run_inline(method, **SHORT, **variant).digest()


STOPS = [(round, log, 1) for round in range(1, 7) for log in LOGS] + [(round, "clients", 4) for round in (3, 5, 6)]


@pytest.mark.parametrize(("round", "log", "eval_every"), STOPS)
def test_goes_on_from_wherever_it_was_stopped(
    run_inline: RunInline, tmp_path: Path, round: int, log: str, eval_every: int
) -> None:
    """The last checkpoint is that of the last even round before, and none of the last round is needed."""
    keys: Keys = {**EVERY_2, "run.eval-every": eval_every}
    config = tiny("scaffold", **keys, **{"run.dir": str(tmp_path)})
    interrupt(config, round, log)
    inline.run(config, nodes=2)
    run = Run.open(tmp_path)
    assert after_rounds(run) == ([] if (round, log) == (1, "clients") else [(round - 1) // 2 * 2])
    assert run.digest() == run_inline("scaffold", **keys).digest()


def test_goes_on_again_and_again(run_inline: RunInline, tmp_path: Path) -> None:
    """A run that is interrupted in every round still ends, and as if nothing had been."""
    keys: Keys = {"run.rounds": 6, "run.checkpoint-every": 1}
    config = tiny("pgfed", **keys, **{"run.dir": str(tmp_path)})
    for round in range(1, 7):
        interrupt(config, round, "rounds")
    inline.run(config)
    assert after_rounds(Run.open(tmp_path)) == list(range(6))
    assert Run.open(tmp_path).digest() == run_inline("pgfed", **keys).digest()


def test_what_is_kept_is_bounded(tmp_path: Path) -> None:
    """Two checkpoints and four states of a client while the run goes, and no checkpoint when it has ended."""
    keys: Keys = {"run.rounds": 20, "run.checkpoint-every": 2, "run.clients-per-round": 0}
    config = tiny("local", **keys, **{"run.dir": str(tmp_path)})
    interrupt(config, 20)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "000016.safetensors",
        "000018.safetensors",
    ]
    assert [len(list(folder.iterdir())) for folder in (tmp_path / "state").iterdir()] == [4] * 6
    inline.run(config)
    assert not (tmp_path / "checkpoints").exists()


# 2. What is damaged does not count.


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


def _older(path: Path) -> None:
    shutil.copy(path.with_name("000002.safetensors"), path)


def _shorter_logs(path: Path) -> None:
    log = path.parent.parent / "rounds.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:3]))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_cut, "it cannot be read"),
        (_empty, "it cannot be read"),
        (_flip, "its content is not what rounds.jsonl says"),
        (_older, "its content is not what rounds.jsonl says"),
        (_shorter_logs, "rounds.jsonl ends before it"),
        (Path.unlink, ""),
    ],
)
def test_a_damaged_checkpoint_leaves_the_one_before_it(
    run_inline: RunInline,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    damage: Callable[[Path], None],
    said: str,
) -> None:
    """The user is told which one does not count and why, and what the run goes on from instead."""
    interrupt(tiny("scaffold", **EVERY_2, **{"run.dir": str(tmp_path)}), 6)
    damage(tmp_path / "checkpoints" / "000004.safetensors")
    assert fedkd(monkeypatch, "resume", str(tmp_path)) == 0
    error = capsys.readouterr().err
    assert "going on after round 2 of 6" in error
    assert said in error
    assert ("the checkpoint of round 4 does not count" in error) == bool(said)
    assert Run.open(tmp_path).digest() == run_inline("scaffold", **EVERY_2).digest()


def test_without_any_checkpoint_the_run_begins_again(
    run_inline: RunInline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """What clients kept of the first attempt is not seen by the second one."""
    interrupt(tiny("scaffold", **EVERY_2, **{"run.dir": str(tmp_path)}), 6)
    for path in (tmp_path / "checkpoints").iterdir():
        _flip(path)
    assert fedkd(monkeypatch, "resume", str(tmp_path)) == 0
    error = capsys.readouterr().err
    assert error.count("does not count") == 2
    assert "beginning again" in error
    assert Run.open(tmp_path).digest() == run_inline("scaffold", **EVERY_2).digest()


def test_torn_lines_and_parts_of_files_are_left_out(run_inline: RunInline, tmp_path: Path) -> None:
    """What a process was writing when it died."""
    config = tiny("scaffold", **EVERY_2, **{"run.dir": str(tmp_path)})
    interrupt(config, 4)
    for name in ("rounds", "clients", "evaluations"):
        with (tmp_path / f"{name}.jsonl").open("ab") as file:
            file.write(b'{"round": 4, "cl')
    whole = (tmp_path / "checkpoints" / "000002.safetensors").read_bytes()
    (tmp_path / "checkpoints" / "000004.safetensors.part").write_bytes(whole[:100])
    for folder in (tmp_path / "state").iterdir():
        (folder / f"000004.part{2**22 + 1}").write_bytes(whole[:100])  # a number that no process has
    inline.run(config)
    assert Run.open(tmp_path).digest() == run_inline("scaffold", **EVERY_2).digest()
    trained = {row["client"] for row in Run.open(tmp_path).rows("clients") if row["round"] > 2}
    assert not [part for client in trained for part in (tmp_path / "state" / f"{client:06d}").glob("*.part*")]


# 3. What the user meets.


@pytest.fixture
def half_done(tmp_path: Path) -> Path:
    """Return the folder of a run that was interrupted in its fourth round of six."""
    return interrupt(tiny("fedavg", **EVERY_2, **{"run.dir": str(tmp_path / "run")}), 4)


def resume_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    """Return the one line that says why a run does not go on, after checking that nothing in its folder changed."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert fedkd(monkeypatch, "resume", str(folder)) == 2
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_no_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """An empty folder, or none."""
    for folder in (tmp_path, tmp_path / "none"):
        assert "holds no run to go on with" in resume_fails(monkeypatch, capsys, folder)
    assert list(tmp_path.iterdir()) == []


def test_finished(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], half_done: Path, run_inline: RunInline
) -> None:
    """Going on with what is finished is no mistake: a script may do so until all is done.  Its results are shown."""
    assert fedkd(monkeypatch, "resume", str(half_done)) == 0
    capsys.readouterr()
    before = (half_done / "rounds.jsonl").stat().st_mtime_ns
    assert fedkd(monkeypatch, "resume", str(half_done)) == 0
    said = capsys.readouterr()
    assert "is finished already" in said.err
    assert run_inline("fedavg", **EVERY_2).digest() in said.out
    assert (half_done / "rounds.jsonl").stat().st_mtime_ns == before


def test_being_written(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], half_done: Path) -> None:
    """The process that writes has the lock, and its death gives it back."""
    with lock(half_done):
        assert "is being written by another process" in resume_fails(monkeypatch, capsys, half_done)


def test_other_data(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], half_done: Path) -> None:
    """The second half of a run is of the same data as the first."""
    monkeypatch.setattr("fedkd.data.FederatedData.fingerprint", lambda self: "other")
    assert "holds a run of other data" in resume_fails(monkeypatch, capsys, half_done)


def test_another_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], half_done: Path) -> None:
    """Another version may compute something else, so a run is of one."""
    path = half_done / "environment.json"
    text = path.read_text()
    fields = json.loads(text)
    fields["packages"]["fedkd"] = "0.0.1"
    path.write_text(json.dumps(fields))
    assert "an interrupted run of fedkd 0.0.1, and this is fedkd" in resume_fails(monkeypatch, capsys, half_done)
    fields = json.loads(text)
    fields["packages"]["torch"] = "1.0"
    path.write_text(json.dumps(fields))
    assert fedkd(monkeypatch, "resume", str(half_done)) == 0
    assert "torch was 1.0 and is" in capsys.readouterr().err


def test_damaged_settings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], half_done: Path) -> None:
    """A configuration that cannot be read is named."""
    (half_done / "config.toml").write_text("[run\n")
    assert f"{half_done / 'config.toml'} cannot be read" in resume_fails(monkeypatch, capsys, half_done)


def test_a_run_is_not_begun_where_one_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], half_done: Path
) -> None:
    """`fedkd run` never takes a run for its own, and says how to go on with it."""
    assert fedkd(monkeypatch, "run", "fedavg", "--out", str(half_done)) == 2
    assert f"already holds a run; take another folder, or `fedkd resume {half_done}`" in capsys.readouterr().err


def test_other_settings_do_not_go_on(half_done: Path) -> None:
    """A ServerApp that is told to write where another run is refuses."""
    from fedkd.errors import UserError

    other = tiny("fedavg", **EVERY_2, **{"run.dir": str(half_done), "train.lr": 0.1})
    with pytest.raises(UserError, match="already holds a run, with other settings"):
        inline.run(other)


def test_a_failure_is_forgotten_when_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, run_inline: RunInline, tmp_path: Path
) -> None:
    """``error.txt`` says why a run ended early, so it goes when the run does not."""
    config = tiny("fedavg", **EVERY_2, **{"run.dir": str(tmp_path)})
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "checkpoint", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            inline.run(config)
    assert "division" in (tmp_path / "error.txt").read_text()
    inline.run(config)
    assert not (tmp_path / "error.txt").exists()
    assert Run.open(tmp_path).digest() == run_inline("fedavg", **EVERY_2).digest()


def test_run_and_data_may_have_moved(
    monkeypatch: pytest.MonkeyPatch, idx_root: str, run_inline: RunInline, tmp_path: Path
) -> None:
    """The clients find their state in the folder that is named now, and the data where ``--root`` says."""
    first, second = tmp_path / "data", tmp_path / "elsewhere"
    shutil.copytree(idx_root, first)
    keys: Keys = {**EVERY_2, "data.name": "mnist", "data.test": "own-labels"}
    interrupt(tiny("scaffold", **keys, **{"data.root": str(first), "run.dir": str(tmp_path / "run")}), 4)
    first.rename(second)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert fedkd(monkeypatch, "resume", str(moved)) == 2
    assert fedkd(monkeypatch, "resume", str(moved), "--root", str(second)) == 0
    assert not (tmp_path / "run").exists()
    assert Run.open(moved).digest() == run_inline("scaffold", **keys, **{"data.root": idx_root}).digest()


def test_a_comparison_goes_on_with_its_interrupted_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Neither is the run made again nor is it moved aside."""
    words = ["compare", "scaffold", "--clients", "6", "--rounds", "6", "--seeds", "1", "--jobs", "1"]
    words += ["--set", "data.alpha=0.5", "--set", "train.local-steps=2", "--set", "run.checkpoint-every=2"]
    assert fedkd(monkeypatch, *words, "--out", str(tmp_path / "straight")) == 0
    straight, folder = Run.open(tmp_path / "straight" / "scaffold-s1"), tmp_path / "stopped" / "scaffold-s1"
    interrupt(Config.from_flat({**straight.config.flat(), "run.dir": str(folder)}), 5)
    assert fedkd(monkeypatch, *words, "--out", str(tmp_path / "stopped")) == 0
    assert after_rounds(Run.open(folder)) == [4]
    assert Run.open(folder).digest() == straight.digest()
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["scaffold-s1"]


def test_the_progress_follows_a_log_that_was_cut_back(tmp_path: Path) -> None:
    """The display has read further than the run goes on from."""
    log, watched = tmp_path / "rounds.jsonl", Watched(tmp_path, "run", 9)
    log.write_text("".join(f'{{"round": {n}, "seconds": 0.123456789}}\n' for n in range(1, 6)))
    watched.update()
    assert watched.done == 5
    log.write_text("".join(f'{{"round": {n}, "seconds": 0.5}}\n' for n in range(1, 4)))
    watched.update()
    assert watched.done == 3
    with log.open("a") as file:
        file.write('{"round": 4}\n')
    watched.update()
    assert watched.done == 4


# 4. SIGKILL.


@contextmanager
def command(*words: str) -> Iterator[psutil.Popen]:
    """Start `fedkd`, and see to it that it has ended."""
    process = psutil.Popen([sys.executable, "-m", "sims.cli", *words], start_new_session=True, cwd=BASE)
    try:
        yield process
    finally:
        with suppress(psutil.NoSuchProcess):
            process.kill()
        process.wait()


def wait_until(condition: Callable[[], bool], process: psutil.Popen | None = None) -> None:
    """Wait for a condition, which a process that ended would not bring about any more."""
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None
        time.sleep(0.05)


def ended(folder: Path) -> int:
    """Return how many rounds of a run have ended; Flower's log, which says when they begin, comes seconds late."""
    rounds = folder / "rounds.jsonl"
    return rounds.read_bytes().count(b"\n") if rounds.exists() else 0


def is_gone(home: Path, processes: list[psutil.Process]) -> bool:
    """Return whether nothing is left of a SuperLink with this folder and these processes."""
    return not (home.exists() or processes_of(home) or any(map(is_alive, processes)))


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process runs; one that has ended may be there until its parent, by now init, notices."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


@pytest.mark.outage
def test_the_workers_of_a_comparison_die_with_it(tmp_path: Path) -> None:
    """They would hold the locks of their runs, and wait for work that never comes."""
    words = ["compare", "fedavg", "--rounds", "100000", "--seeds", "1,2", "--jobs", "2", "--out", str(tmp_path)]
    with command(*words) as process:
        wait_until(lambda: all((tmp_path / f"fedavg-s{seed}" / "lock").exists() for seed in (1, 2)), process)
        children = process.children(recursive=True)
        process.kill()
        wait_until(lambda: not any(map(is_alive, children)))
    for seed in (1, 2):
        lock(tmp_path / f"fedavg-s{seed}").close()


@pytest.fixture(scope="module")
def seed() -> int:
    """What moments, steps and methods are drawn from: another one each time, or the one that ``FEDKD_KILLS`` says."""
    number = int(os.environ.get("FEDKD_KILLS") or random.SystemRandom().randrange(10**6))
    print(f"FEDKD_KILLS={number} kills in the same way")
    return number


@pytest.mark.field
def test_killed_at_random_moments_and_in_the_middle_of_writing(seed: int, tmp_path: Path) -> None:
    """`fedkd run` and `fedkd resume`, 27 times, of methods, at moments and at steps that are drawn from a seed."""
    command = [sys.executable, str(BASE / "tests" / "kill_runs.py"), str(tmp_path), str(seed), "27"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert sum(len(run["kills"]) for run in runs) == 27
    assert [run for run in runs if run["digest"] != run["expected"]] == []


VICTIMS = {"the command": "", "the ServerApp": "flwr-simulation", "a Ray worker": "ray::ClientAppActor"}
"""Whom to kill, and a word of its command line."""


@pytest.mark.field
def test_killed_in_simulation(seed: int, run_inline: RunInline, tmp_path: Path) -> None:
    """One process after the other; each time nothing of Flower and Ray remains, and the run goes on."""
    keys: Keys = {"run.rounds": 60, "run.checkpoint-every": 3}
    folder, rng = tmp_path / "run", random.Random(seed)
    words = ["run", "apfl", "--out", str(folder)]
    settings = {**TINY, **keys}
    words += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    for victim in rng.sample(list(VICTIMS), 3):
        enough = ended(folder) + rng.randint(2, 7)
        with command(*words, "--engine", "simulation", "--nodes", "2") as process:
            wait_until(lambda: ended(folder) >= enough, process)  # noqa: B023 - called before the next victim's turn
            children = process.children(recursive=True)
            [superlink] = [p for p in children if "flower-superlink" in " ".join(p.cmdline())]
            home = Path(superlink.environ()[HOME])
            time.sleep(rng.uniform(0, 0.3))
            chosen = process
            if VICTIMS[victim]:
                chosen = next(p for p in children if VICTIMS[victim] in " ".join(p.cmdline()))
            chosen.kill()
            assert process.wait(60) == (-signal.SIGKILL if chosen is process else 1)
        wait_until(partial(is_gone, home, children))
        words = ["resume", str(folder)]
    inline.run(Run(folder).config)  # another engine may go on
    run = Run.open(folder)
    assert len(after_rounds(run)) == 3
    assert after_rounds(run) == sorted(after_rounds(run))
    assert run.digest() == run_inline("apfl", **keys).digest()
