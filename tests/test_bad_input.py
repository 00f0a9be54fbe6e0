"""What a user gets wrong, and what a disk does to files: one clear line and exit code 2, before anything starts."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from conftest import TINY, tiny, tiny_images, write_idx, write_idx_folder
from PIL import Image
from test_cli import SMALL, fedkd
from test_data import parquet_rows, write_parquet

from fedkd.config import Scalar
from fedkd.data import images, load_images
from fedkd.errors import UserError
from fedkd.ignored import ignored
from fedkd.results import Run
from sims import cli, launch

pytestmark = pytest.mark.slow

RunInline = Callable[..., Run]

MISTAKES: list[tuple[list[str], str]] = [
    # Where the results go.
    (["run", "fedavg", "--out", "file"], "the results cannot be written to file: it is a file; take another folder"),
    (["run", "fedavg", "--out", "file/inside"], "cannot be written to file/inside: Not a directory"),
    (["run", "fedavg", "--out", "x" * 300], "File name too long"),
    (["run", "fedavg", "--out", ""], "the name of the folder is empty"),
    (["run", "fedavg", "--root", " "], "the name of the folder is empty"),
    (["run", "fedavg", "--out", "~nobody-of-this-name/x"], "home directory"),
    (["run", "fedavg", "--data", "mnist", "--root", "x" * 300], "cannot be read: File name too long"),
    (["plot", "x" * 300], "cannot be read: File name too long"),
    (["report", "x" * 300], "cannot be read: File name too long"),
    (["resume", "x" * 300], "File name too long"),
    (["compare", "fedavg", "--out", "file"], "it is a file"),
    (["reproduce", "pgfed/cifar10", "--out", "file"], "it is a file"),
    (["partition", "--out", "file"], "it is a file"),
    # What is read.
    (["digest", "file"], "file holds no run"),
    (["digest", "y" * 300], "File name too long"),
    (["plot", "file"], "file holds no run"),
    (["export", "."], "holds no run"),
    (["run", "fedavg", "--root", "."], "'digits' is embedded and comes from no folder"),
    (["partition", "--root", "."], "'digits' is embedded and comes from no folder"),
    (["run", "fedavg", "--data", "./file"], "unknown data set './file'"),
    (["run", "fedavg", "--data", "/"], "unknown data set '/'"),
    (["run", "fedavg", "--data", ""], "unknown data set ''"),
    (["run", "fedavg", "--set", "data.label=kind"], "data.label = 'kind': data set 'digits' has one label"),
    (["run", "fedavg", "--set", "data.config=full"], "data.config = 'full' is for the hub"),
    # What the machine has.
    (["run", "fedavg", "--cpus-per-node", "1"], "need --engine simulation"),
    (["compare", "fedavg", "--gpus-per-node", "0.5"], "need --engine simulation"),
    (["run", "fedavg", "--engine", "simulation", "--cpus-per-node", "99999"], "--cpus-per-node 99999 is more than"),
    (["run", "fedavg", "--engine", "simulation", "--gpus-per-node", "99"], "--gpus-per-node 99: PyTorch finds"),
    (["run", "fedavg", "--engine", "simulation", "--gpus-per-node", "1.5"], "a share of one GPU, or a whole number"),
    (["run", "fedavg", "--engine", "warp"], "'warp' is not one of"),
    (["run", "fedavg", "--nodes", "0"], "'--nodes': 0 is not in the range"),
    (["run", "fedavg", "--nodes", "21"], "--nodes 21 is more than run.clients = 20"),
    # Words that are no option, no number, no setting.
    (["run"], "Missing argument 'METHOD'. (`fedkd run --help` says what there is)"),
    (["run", ""], "unknown method ''"),
    (["run", "fedavg", "fedgen"], "unexpected extra argument (fedgen)"),
    (["run", "fedavg", "--clints", "5"], "No such option"),
    (["run", "fedavg", "--clients", "many"], "'many' is not a valid integer"),
    (["run", "fedavg", "--clients", "ü"], "'ü' is not a valid integer"),
    (["fun", "fedavg"], "No such command 'fun'"),
    (["run", "fedavg", "--set", "train.lr=0.1\ndata.alpha=2"], "train.lr = '0.1"),
    (["run", "fedavg", "--set", "train.lr="], "train.lr = ''"),
    (["run", "fedavg", "--set", "train.lr=1e400"], "train.lr = inf"),
    (["run", "fedavg", "--set", f"model.hidden={10**30}"], "a whole number has to fit into 64 bits"),
    (["run", "fedavg", "--set", f"train.batch-size={10**30}"], "a whole number has to fit into 64 bits"),
    (["run", "fedavg", "--set", f"model.hidden={10**15}"], f"model.hidden = {10**15} needs "),
    (["run", "fedavg", "--clients", "5", "--clients", "6"], "--clients is given twice"),
    (["run", "fedavg", "--seed=1", "--seed", "2"], "--seed is given twice"),
    (["run", "fedavg", "--clients", "5", "--set", "run.clients=6"], "run.clients is given twice: 5 and 6"),
    (["run", "fedavg", "--set", "train.lr=1", "--set", "train.lr=2"], "train.lr is given twice: 1 and 2"),
    (["compare", "fedavg", "--seeds", "1,,2"], "'1,,2' is not a list of whole numbers"),
    (["compare", "fedavg", "--seeds", ""], "'' is not a list of whole numbers"),
    (["plot", "file", "--target", "80"], "80.0 is not in the range 0<=x<=1"),
    (["plot", "file", "--by", "parsecs"], "'parsecs' is not one of 'round', 'bytes', 'time'"),
    # What cannot be scored.
    (
        ["run", "fedavg", "--clients", "36", "--set", "data.fraction=0.02", "--set", "data.partition=iid"],
        "none of the 36 clients has a test example",
    ),
]


@pytest.mark.parametrize(("words", "said"), MISTAKES, ids=[" ".join(words)[:60] for words, _ in MISTAKES])
def test_mistakes_get_one_line_and_code_2(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Whatever is wrong, nothing has been made by then."""
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.chdir(tmp_path)
    assert fedkd(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_cache_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With the variable that sets it; `fedkd doctor` says the same."""
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "file"))
    for words in (["run", "fedavg", "--out", str(tmp_path / "run")], ["partition", "--out", str(tmp_path / "picture")]):
        assert fedkd(monkeypatch, *words) == 2
        error = capsys.readouterr().err
        assert f"{tmp_path / 'file'}, cannot be written" in error
        assert "FEDKD_CACHE" in error
        assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert fedkd(monkeypatch, "doctor") == 0
    assert f"no  cache: {tmp_path / 'file'}" in capsys.readouterr().out


def test_trying_to_write_leaves_what_was_there(tmp_path: Path) -> None:
    """A folder is tried by writing to it, so a read-only disk is noticed, and nothing stays behind."""
    (tmp_path / "old" / "within").mkdir(parents=True)
    for folder in (tmp_path / "a" / "b" / "c", tmp_path / "old", tmp_path / "old" / "new"):
        assert launch.writable(folder) == folder
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["old", "within"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that even root cannot write to")
def test_a_read_only_place_is_refused() -> None:
    """Permissions say nothing to root."""
    with pytest.raises(UserError, match="cannot be written to /proc/results"):
        launch.writable(Path("/proc/results"))


def test_a_comparison_does_not_go_into_a_run(
    run_inline: RunInline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its runs and the run's own files would be one heap."""
    assert fedkd(monkeypatch, "compare", "fedavg", *SMALL, "--out", str(run_inline("fedavg").folder)) == 2
    assert "holds a run itself" in capsys.readouterr().err


# Data on the disk.


@pytest.mark.parametrize("keep", [None, 0.5, 0.02], ids=["garbage", "half", "head"])
def test_a_damaged_parquet_file_is_one_line(tmp_path: Path, keep: float | None) -> None:
    """The libraries underneath have log lines of their own, which only a process of its own shows."""
    rows, _ = parquet_rows(20, 0, "image", "label")
    write_parquet(tmp_path, "train", rows)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(b"no Parquet" if keep is None else whole[: int(keep * len(whole))])
    command = [sys.executable, "-m", "sims.cli", "partition", "--data", "mnist", "--root", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"'mnist' cannot be read from the folder {tmp_path}: Arrow" in done.stderr
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("kind", "value"), [(np.uint16, 256), (np.int32, -1), (np.float32, 0.5)], ids=["16 bits", "negative", "float"]
)
def test_pixels_that_are_no_bytes_are_refused(tmp_path: Path, kind: type[Any], value: float) -> None:
    """They would be cut to bytes without a word; the same kinds of image with bytes in them are read."""
    rows, _ = parquet_rows(20, 0, "image", "label")
    for number, pixels in enumerate([np.full((8, 8), 200, np.uint16), np.full((8, 8), value, kind)]):
        encoded = BytesIO()
        Image.fromarray(pixels).save(encoded, "TIFF")
        rows["image"][1][number] = {"bytes": encoded.getvalue(), "path": None}
        write_parquet(tmp_path / str(number), "train", rows)
    assert (load_images("mnist", str(tmp_path / "0")).train_x[0] == 200).all()
    with pytest.raises(UserError, match=r"image 1 cannot be decoded: ValueError: pixels of mode .* do not fit"):
        load_images("mnist", str(tmp_path / "1"))


def test_a_damaged_decoded_data_set_is_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache may have been cut by a full disk."""
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "cache"))
    folder = str(write_idx_folder(tmp_path / "data"))
    whole = np.array(load_images("mnist", folder).train_x)
    (cached,) = (tmp_path / "cache").iterdir()
    for name in ("train_x.npy", "meta.json"):
        (cached / name).write_bytes((cached / name).read_bytes()[:20])
        assert np.array_equal(load_images("mnist", folder).train_x, whole)


def test_labels_that_no_class_has_are_refused(tmp_path: Path) -> None:
    """A schema that names fewer classes than there are labels."""
    rows, _ = parquet_rows(20, 0, "image", "label")
    rows["label"] = (datasets.Value("int64"), [number % 10 for number in range(20)])
    write_parquet(tmp_path, "train", rows)
    file = tmp_path / "train-00000-of-00001.parquet"
    table = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "scratch"), keep_in_memory=True)
    named = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    table.info.features = named
    table.data.table.replace_schema_metadata(named.arrow_schema.metadata)
    import pyarrow.parquet

    pyarrow.parquet.write_table(table.data.table.replace_schema_metadata(named.arrow_schema.metadata), file)
    with pytest.raises(UserError, match="'mnist' names 3 classes, and a label is 9"):
        load_images("mnist", str(tmp_path))


def test_idx_files_of_other_dimensions_are_refused(tmp_path: Path) -> None:
    """Labels in the place of images."""
    folder = write_idx_folder(tmp_path)
    write_idx(folder / "train-images-idx3-ubyte", tiny_images(200, 0)[1])
    with pytest.raises(UserError, match="train-images-idx3-ubyte is not an idx file of bytes in 3-D"):
        load_images("mnist", str(folder))


def test_idx_files_may_have_more_than_ten_classes(tmp_path: Path) -> None:
    """As the letters of EMNIST do."""
    folder = write_idx_folder(tmp_path)
    write_idx(folder / "train-labels-idx1-ubyte", (np.arange(200) % 26).astype(np.uint8))
    assert len(load_images("mnist", str(folder)).classes) == 26


def test_a_data_set_without_images_is_refused(tmp_path: Path) -> None:
    """A download that made empty files."""
    with pytest.raises(UserError, match="'mnist' holds no training images"):
        load_images("mnist", str(write_idx_folder(tmp_path, train=0)))


# Runs on the disk.


def _cut(file: str, line: int) -> Callable[[Path], Any]:
    def damage(run: Path) -> None:
        lines = (run / file).read_text().splitlines(keepends=True)
        lines[line] = lines[line][: len(lines[line]) // 2].rstrip("\n") + "\n"
        (run / file).write_text("".join(lines))

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], Any], str, tuple[str, ...]]] = {
    "line in the middle": (_cut("evaluations.jsonl", 2), "evaluations.jsonl is damaged: line 3 of 18", ()),
    "number for a line": (
        lambda run: (run / "rounds.jsonl").write_text("3\n"),
        "rounds.jsonl is damaged: line 1 of 1",
        (),
    ),
    "bytes for a line": (
        lambda run: (run / "rounds.jsonl").write_bytes(b"\xff\xfe\n"),
        "rounds.jsonl is damaged: line 1 of 1",
        (),
    ),
    "row without a column": (
        lambda run: (run / "clients.jsonl").write_text('{"round": 1, "client": 0, "bytes_up": 3}\n'),
        "clients.jsonl is damaged: line 1 of 1: no whole number bytes_down",
        (),
    ),
    "text for a number": (
        lambda run: (run / "evaluations.jsonl").write_text('{"round": 1, "client": 0, "total": "x"}\n'),
        "evaluations.jsonl is damaged: line 1 of 1: no whole number total",
        (),
    ),
    "no log": (lambda run: (run / "evaluations.jsonl").unlink(), "evaluations.jsonl cannot be read: No such file", ()),
    "settings that are no TOML": (
        lambda run: (run / "config.toml").write_text("rubbish ["),
        "config.toml cannot be read as settings",
        ("digest", "export"),
    ),
    "settings that are no text": (
        lambda run: (run / "config.toml").write_bytes(b"\xff\xfe"),
        "config.toml cannot be read as settings",
        ("digest", "export"),
    ),
    "settings without sections": (
        lambda run: (run / "config.toml").write_text("seed = 3"),
        "config.toml cannot be read as settings",
        ("digest", "export"),
    ),
    "a method that is gone": (
        lambda run: (run / "config.toml").write_text('[run]\nmethod = "fedold"'),
        "config.toml: unknown method 'fedold'",
        ("digest", "export"),
    ),
    "no partition": (lambda run: (run / "partition.csv").unlink(), "partition.csv cannot be read", ("digest",)),
    "another partition": (
        lambda run: (run / "partition.csv").write_text("rubbish\n1\n"),
        "partition.csv is damaged: no columns client, examples, split",
        ("digest",),
    ),
    "empty partition": (
        lambda run: (run / "partition.csv").write_text(""),
        "partition.csv is damaged: No columns",
        ("digest",),
    ),
}
"""What happened to a run, what is said about it, and the commands that need not know."""


@pytest.mark.parametrize("command", ["digest", "plot", "export"])
@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_run_is_one_line(
    case: str,
    command: str,
    run_inline: RunInline,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """The file is named, and nothing is written; a command that does not need the file does its work."""
    damage, said, unharmed = DAMAGES[case]
    run = Path(shutil.copytree(run_inline("fedavg").folder, tmp_path / "run"))
    damage(run)
    words = [command, str(run)] + ([] if command == "digest" else ["--out", str(tmp_path / "out")])
    code = fedkd(monkeypatch, *words)
    error = capsys.readouterr().err
    if command in unharmed:
        assert (code, error) == (0, "")
        return
    assert code == 2
    assert f"{run}/{said}" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_last_line_that_was_cut_is_left_out(run_inline: RunInline, tmp_path: Path) -> None:
    """A run that was killed while it wrote is readable up to its last whole line."""
    whole = run_inline("fedavg")
    run = Run.open(shutil.copytree(whole.folder, tmp_path / "run"))
    for log in ("rounds", "clients", "evaluations"):
        with (run.folder / f"{log}.jsonl").open("ab") as file:
            file.write(b'{"round": 4, "client": 0, "to\xff')
    assert run.digest() == whole.digest()
    assert len(run.evaluations) == len(whole.evaluations)


def test_a_run_of_another_version_is_readable(
    run_inline: RunInline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Keys that no longer exist are left out with one line, those that are new have their defaults."""
    whole = run_inline("fedavg")
    run = Run.open(shutil.copytree(whole.folder, tmp_path / "run"))
    text = (run.folder / "config.toml").read_text()
    kept = [line for line in text.splitlines() if not line.startswith(("momentum", "scaling", "newcomers"))]
    old = "\n".join(kept).replace("[run]", "[run]\ngone = 3").replace("[fedavg]", '[fedavg]\nolder = "x"')
    (run.folder / "config.toml").write_text(f"{old}\n\n[gone-method]\nalpha = 1\n")
    with caplog.at_level(logging.WARNING):
        assert run.config.settings_hash() == Run(whole.folder).config.settings_hash()
    (record,) = caplog.records
    assert record.getMessage().endswith("left out: run.gone, fedavg.older, gone-method.alpha")
    assert run.digest() == whole.digest()
    for words in (["plot", "--out", str(tmp_path / "figures")], ["export"]):
        assert fedkd(monkeypatch, words[0], str(run.folder), *words[1:]) == 0


# Settings without effect.


IDLE: list[tuple[str, str, dict[str, Scalar], Scalar, str]] = [
    ("fedavg", "data.alpha", {"data.partition": "iid"}, 3.0, "data.partition"),
    ("fedavg", "data.min-size", {"data.partition": "pathological"}, 5, "data.partition"),
    ("fedavg", "data.classes-per-client", {}, 3, "data.partition"),
    ("fedavg", "data.test-fraction", {"data.test": "own-labels", "data.name": "mnist"}, 0.5, "data.test"),
    ("fedavg", "model.hidden", {"model.name": "fedgen_cnn"}, 3, "model.name"),
    ("fedavg", "train.local-epochs", {}, 4, "train.local-steps"),
    ("fedavg", "train.lr-decay-from", {}, "last-participation", "train.lr-decay"),
    ("fedgen", "fedgen.eq5-weight", {}, 0.5, "fedgen.variant"),
    ("fedgen", "fedgen.alpha", {"fedgen.variant": "paper"}, 3.0, "fedgen.variant"),
    ("apfl", "apfl.alpha-steps", {}, "every", "apfl.adaptive"),
    ("pgfed", "pgfed.momentum-buffer", {}, "kept", "train.momentum"),
    ("fedftg", "fedftg.fedprox-mu", {}, 0.7, "fedftg.base"),
]


@pytest.mark.parametrize(("method", "key", "base", "value", "why"), IDLE, ids=[case[1] for case in IDLE])
def test_what_is_called_without_effect_has_none(
    method: str, key: str, base: dict[str, Scalar], value: Scalar, why: str, idx_root: str, run_inline: RunInline
) -> None:
    """The warning is true: the same bytes come out."""
    keys = {**base, "run.rounds": 2, **({"data.root": idx_root} if "data.name" in base else {})}
    config = tiny(method, **{**keys, key: value})
    assert ignored(config, [key]) == [f"{key} has no effect beside {why} = {config.flat()[why]!r}"]
    changed = run_inline(method, **{**keys, key: value})
    assert changed.digest() == run_inline(method, **keys).digest()


READ: list[tuple[str, str, dict[str, Scalar]]] = [
    ("fedavg", "data.alpha", {}),
    ("fedavg", "data.classes-per-client", {"data.partition": "pathological"}),
    ("fedavg", "train.local-epochs", {"train.local-steps": 0}),
    ("fedavg", "train.lr-decay-from", {"train.lr-decay": 0.9}),
    ("fedgen", "fedgen.alpha", {}),
    ("fedgen", "model.hidden", {}),
    ("fedftg", "fedftg.diversity", {}),  # its condition is about a setting that this variant does not read
    ("fedfomo", "fedfomo.epsilon", {}),  # its numbers in `only` are examples
    ("fedd2s", "fedd2s.head-lr", {}),
]


@pytest.mark.parametrize(("method", "key", "base"), READ, ids=[case[1] for case in READ])
def test_what_is_read_is_not_called_without_effect(method: str, key: str, base: dict[str, Scalar]) -> None:
    """A false warning is worse than none."""
    assert ignored(tiny(method, **base), [key]) == []


def test_a_setting_without_effect_is_said_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One line on stderr; a comparison says it only if none of its methods reads the setting, and once."""
    small = ["--clients", "6", "--rounds", "1", "--set", "data.partition=iid", "--set", "train.local-steps=1"]
    words = ["run", "fedavg", *small, "--set", "data.alpha=0.5", "--out", str(tmp_path / "run")]
    assert fedkd(monkeypatch, *words) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fedkd: ")]
    assert said == ["fedkd: data.alpha has no effect beside data.partition = 'iid'"]

    words = ["compare", "fedavg", "fedgen", "--seeds", "1,2", *small, "--jobs", "1", "--out", str(tmp_path / "both")]
    words += ["--set", "data.alpha=0.5", "--set", "fedgen.alpha=1", "--set", "fedgen.generator-steps=1"]
    assert fedkd(monkeypatch, *words) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fedkd: ")]
    assert said == ["fedkd: data.alpha has no effect beside data.partition = 'iid'"]

    words = ["partition", "--clients", "6", "--set", "train.lr=1", "--out", str(tmp_path / "picture")]
    assert fedkd(monkeypatch, *words) == 0
    assert capsys.readouterr().err == "fedkd: train.lr has no effect on who holds what\n"


def test_clients_without_test_data_are_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Means over clients are then over fewer of them."""
    words = ["run", "fedavg", "--clients", "35", "--rounds", "1", "--set", "data.fraction=0.02"]
    assert fedkd(monkeypatch, *words, "--set", "data.partition=iid", "--out", str(tmp_path / "run")) == 0
    assert "34 of 35 clients have no test data at seed 1 and are left out of all means" in capsys.readouterr().err


# What each node gets.


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (2, 1, None)),
        (["--cpus-per-node", "2"], (1, 2, None)),
        (["--nodes", "5", "--cpus-per-node", "2", "--gpus-per-node", "0"], (5, 2, 0.0)),
    ],
)
@pytest.mark.parametrize("command", [["run", "fedavg"], ["compare", "fedavg", "--seeds", "1"]])
def test_what_a_node_gets_reaches_the_simulation(
    command: list[str],
    words: list[str],
    expected: tuple[int, int, float | None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Nodes by default: as many as the cores have room for."""
    from sims import inline, simulation

    given = []

    class Link:
        def __enter__(self) -> Link:
            return self

        def __exit__(self, *_: object) -> None: ...

        def run(self, configs: Sequence[Any], nodes: int, cpus: int, gpus: float | None) -> None:
            given.append((nodes, cpus, gpus))
            for config in configs:
                inline.run(config)

    monkeypatch.setattr(simulation, "PrivateSuperLink", Link)
    monkeypatch.setattr(simulation, "default_nodes", lambda: 2)
    out = ["--engine", "simulation", "--out", str(tmp_path / "run")]
    assert fedkd(monkeypatch, *command, *SMALL, *out, *words) == 0
    assert given == [expected]


def test_a_cluster_elsewhere_has_its_own_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on this machine does not limit it."""
    from sims.simulation import require_room

    monkeypatch.setenv("RAY_ADDRESS", "auto")
    require_room(10**6, 8)
    with pytest.raises(UserError, match="a share of one GPU"):
        require_room(1, 2.5)


# Tables.


@pytest.mark.parametrize("classes", [10, 62, 100])
def test_the_partition_table_fits_the_terminal(
    classes: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Few classes have a column each; of many, their number and the largest are named."""
    x = np.random.default_rng(0).integers(0, 255, (1000, 4, 4), dtype=np.uint8)
    for prefix, rows in (("train", slice(0, 900)), ("t10k", slice(900, 1000))):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte", x[rows])
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte", (np.arange(1000) % classes).astype(np.uint8)[rows])
    words = ["partition", "--data", "mnist", "--root", str(tmp_path), "--clients", "5", "--set", "data.alpha=10"]
    assert fedkd(monkeypatch, *words, "--out", str(tmp_path / "out")) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(str(tmp_path))]
    assert max(map(len, shown)) <= cli.out_console.width
    assert ("largest" in "".join(shown)) == (classes > 10)
    assert len([line for line in shown if line.startswith("│") and line[1:4].strip().isdecimal()]) == 5
    assert "…" not in "".join(shown)


def test_tables_say_what_they_are_about(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Data set, partition and clients; labels that differ by long settings are not cut."""
    about = "digits, dirichlet (alpha 0.5), 6 clients, 6 per round"
    out, other = str(tmp_path / "a"), str(tmp_path / "b")
    assert fedkd(monkeypatch, "run", "fedavg", *SMALL, "--out", out) == 0
    assert about in " ".join(capsys.readouterr().out.split())
    assert fedkd(monkeypatch, "run", "fedavg", *SMALL, "--set", "data.test-fraction=0.3", "--out", other) == 0
    capsys.readouterr()
    assert fedkd(monkeypatch, "plot", out, other, "--out", str(tmp_path / "plot")) == 0
    shown = capsys.readouterr().out
    assert about in " ".join(shown.split())
    assert "(data.test-fraction=0.25)" in shown
    assert "…" not in shown
    assert (tmp_path / "plot" / "table.md").read_text().startswith(f"{about}\n\n| method |")


def test_a_terminal_without_the_signs_shows_others() -> None:
    """Names with umlauts and the lines of tables are no reason for a traceback."""
    command = [sys.executable, "-m", "sims.cli", "methods"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, encoding="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Ag?era y Arcas" in done.stdout


def test_targets_and_axes_reach_the_figure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Who reaches an accuracy, when, at what cost, and who is hurt: in words, and in the summaries as numbers."""
    base = str(tmp_path / "both")
    words = ["compare", "local", "fedavg", *SMALL, "--seeds", "1", "--jobs", "1", "--out", base]
    assert fedkd(monkeypatch, *words) == 0
    capsys.readouterr()
    for by, axis in (("bytes", "against bytes sent"), ("time", "against wall-clock time")):
        words = ["plot", base, "--by", by, "--target", "0.01", "--target", "1", "--out", str(tmp_path / by)]
        assert fedkd(monkeypatch, *words) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert axis in shown
        assert "first reaches 1 % in: fedavg round 1 (" in shown
        assert "first reaches 100 % in: fedavg never, local never." in shown
    fedavg, local = json.loads((tmp_path / "bytes" / "summaries.json").read_text())
    assert (fedavg["method"], local["method"]) == ("fedavg", "local")
    clients = Run.open(tmp_path / "both" / "fedavg-s1").frame("clients")
    first = clients[clients["round"] == 1]
    assert fedavg["reached"]["0.01"] == {"round": 1, "bytes": int((first["bytes_down"] + first["bytes_up"]).sum())}
    assert fedavg["reached"]["1"] is None
    assert fedavg["control"] == str(tmp_path / "both" / "local-s1")
    assert local["hurt"] == 0
    assert 0 <= fedavg["hurt"] <= TINY["run.clients"]
    stored = json.loads((tmp_path / "both" / "fedavg-s1" / "summary.json").read_text())
    assert "0.01" not in stored["reached"]
    assert stored["reached"]["0.5"] == fedavg["reached"]["0.5"]


# The columns and configurations of data sets.


@pytest.fixture
def two_labels(tmp_path: Path) -> Path:
    """A data set with a fine and a coarse label, as CIFAR-100 has them."""
    for split in ("train", "test"):
        rows, _ = parquet_rows(40, len(split), "img", "fine_label", channels=3)
        rows["coarse_label"] = (datasets.ClassLabel(names=["low", "high"]), [n % 10 // 5 for n in range(40)])
        write_parquet(tmp_path / "data", split, rows)
    return tmp_path / "data"


def test_two_label_columns_have_to_be_told_apart(two_labels: Path) -> None:
    """The candidates are listed; the chosen one gives classes and labels, and is cached for itself."""
    root = str(two_labels)
    with pytest.raises(UserError, match=r"2 class label columns: fine_label, coarse_label .* data\.label"):
        load_images("owner/data", root)
    coarse, fine = load_images("owner/data", root, "coarse_label"), load_images("owner/data", root, "fine_label")
    assert coarse.classes == ("low", "high")
    assert coarse.train_y.tolist() == [n % 10 // 5 for n in range(40)]
    assert fine.train_y.tolist() == [n % 10 for n in range(40)]
    with pytest.raises(UserError, match=r"no column 'label' \(it has img, fine_label, coarse_label\)"):
        load_images("owner/data", root, "label")


def test_cifar100_has_fine_labels_unless_told_otherwise(two_labels: Path) -> None:
    """The usual hundred classes."""
    assert len(load_images("cifar100", str(two_labels)).classes) == 10
    assert load_images("cifar100", str(two_labels), "coarse_label").classes == ("low", "high")


def test_a_configuration_of_the_hub_is_chosen_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one the library's list is passed on, with the key that chooses."""
    parts = []
    for name, count in (("few", 20), ("many", 40)):
        rows, _ = parquet_rows(count, 0, "image", "label")
        write_parquet(tmp_path / "hub" / name, "train", rows)
        parts.append(f"- config_name: {name}\n  data_files: {name}/*.parquet")
    (tmp_path / "hub" / "README.md").write_text("---\nconfigs:\n{}\n---\n".format("\n".join(parts)))
    monkeypatch.setitem(images.SOURCES, "mnist", images.Source(str(tmp_path / "hub"), "image", "label"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "scratch")
    assert len(load_images("mnist", config="many").train_y) == 40
    assert len(load_images("mnist", config="few").train_y) == 20
    with pytest.raises(UserError, match=r"\['few', 'many'\].*; choose one with data\.config") as error:
        load_images("mnist")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"'none' not found.*; choose one with data\.config"):
        load_images("mnist", config="none")
    with pytest.raises(UserError, match=r"data\.config = 'few' is for the hub"):
        load_images("mnist", str(tmp_path / "hub" / "few"), config="few")
