"""Newcomers: who they are, what they start from, what their epochs are, and that a run knows nothing of them."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import by_case, tiny, tiny_images, write_idx_folder
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from clients.app import Worker
from fedkd.config import Scalar
from fedkd.data import federate
from fedkd.data.federated import held_out
from fedkd.data.unseen import unseen_writers
from fedkd.errors import UserError
from fedkd.results import Row, Run
from fedkd.rng import Streams
from plots.adapt import adaptation, by_epoch, summary
from sims import cli
from sims.adapt import AdaptationError, Newcomers, Task, adapt, plan

pytestmark = pytest.mark.slow

RunInline = Callable[..., Run]
Keys = dict[str, Scalar]

HELD_OUT: Keys = {"data.newcomers": 2}
"""Beside the six clients of a tiny run: newcomers 6 and 7."""


def rows_of(runs: list[Run], epochs: int = 2, **options: str) -> list[Row]:
    """Return all rows of an adaptation."""
    return [row for task in plan(runs, **options) for rows in adapt(task, epochs) for row in rows]


def losses(rows: list[Row], label: str, client: int) -> list[float]:
    """Return the summed losses of a newcomer, by epoch."""
    return [row["loss_sum"] for row in rows if (row["label"], row["client"]) == (label, client)]


def contents(folder: Path) -> dict[str, str]:
    """Return a hash of every file in a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# Every method.


@by_case
def test_newcomers_adapt_what_a_run_ended_with(run_inline: RunInline, method: str, variant: Keys) -> None:
    """Every epoch counts, the same again, whoever else adapts, and the run's folder stays as it was."""
    run = run_inline(method, **variant, **HELD_OUT)
    before = contents(run.folder)
    rows = rows_of([run])
    assert contents(run.folder) == before
    tests = [len(part) for part in held_out(run.config).test]
    for label in {method, "local"}:
        mine = [row for row in rows if row["label"] == label]
        assert [(row["client"], row["epoch"]) for row in mine] == [(c, e) for c in (6, 7) for e in range(3)]
        assert [row["total"] for row in mine] == [n for n in tests for _ in range(3)]
        assert all(0 <= row["correct"] <= row["total"] for row in mine)
        for client in (6, 7):
            assert len(set(losses(rows, label, client))) == 3
    assert rows_of([run], clients="7") == [row for row in rows if row["client"] == 7]


@by_case
def test_epoch_0_is_what_a_client_is_given(run_inline: RunInline, method: str, variant: Keys) -> None:
    """A client of the run that was never sampled has no state either, and the run scored it."""
    run = run_inline(method, **variant, **{"run.rounds": 1, "run.clients-per-round": 1})
    data = Newcomers(0, federate(run.config))
    scored = {row["client"]: row for row in run.rows("evaluations")}
    never = sorted(set(scored) - set(run.rows("rounds")[0]["clients"]))
    for (row, _), client in zip(adapt(Task("", run.config, run.folder, data, tuple(never)), 1), never, strict=True):
        kind = "global" if "global_correct" in scored[client] else "personal"
        assert row["correct"] == scored[client][f"{kind}_correct"]
        assert row["loss_sum"] == scored[client][f"{kind}_loss_sum"]


# What an epoch is.


def fine_tuned(run: Run, epochs: int, moves: Callable[[str], bool] = lambda name: True) -> list[float]:
    """Return newcomer 6's summed test losses under PyTorch's own SGD on what ``moves``, from the final model."""
    worker = Worker(run.config, 0)
    model, (train, test) = worker.setup.model, (held_out(run.config).shard(0, part) for part in ("train", "test"))
    final = load_file(run.folder / "final.safetensors")["parameters"]
    parameters = worker.initial.clone()
    shared = worker.config.hyper.shared(model) if hasattr(worker.config.hyper, "shared") else slice(None)
    parameters[shared] = final
    model.load(parameters)
    settings, found = run.config.train, []
    named = [(name, p) for name, p in model.module.named_parameters() if moves(name)]
    optimiser = torch.optim.SGD([p for _, p in named], settings.lr)
    rng = Streams(run.config.run.seed).torch("batches", run.config.run.rounds, 6)
    for epoch in range(epochs + 1):
        for rows in torch.split(torch.randperm(len(train), generator=rng), settings.batch_size) if epoch else ():
            x, y = train.batch(rows)
            optimiser.zero_grad()
            cross_entropy(model.module(x), y).backward()
            optimiser.step()
        x, y = test.batch(slice(None))
        found.append(cross_entropy(model.module(x), y, reduction="sum").item())
    return found


@pytest.mark.parametrize("method", ["fedavg", "fedavg_ft", "per_fedavg", "fedensemble", "pgfed", "fedper"])
def test_many_methods_fine_tune_the_global_model(run_inline: RunInline, method: str) -> None:
    """SGD over fresh permutations, from what the server has; PGFed's newcomer has no auxiliary gradient."""
    keys: Keys = {"fedavg_ft.score": "now"} if method == "fedavg_ft" else {}
    run = run_inline(method, **HELD_OUT, **keys)
    expected = fine_tuned(run, 3)
    first = 1 if method == "fedensemble" else 0  # whose global prediction is that of several models
    assert losses(rows_of([run], 3), method, 6)[first:] == pytest.approx(expected[first:], rel=1e-4)


@pytest.mark.parametrize("method", ["fedavg", "fedavg_ft", "fedper", "local"])
def test_scoring_between_epochs_changes_nothing(
    run_inline: RunInline, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a newcomer does what any client does, one training that is scored k times is k trainings, bit for bit."""
    run = run_inline(method, **HELD_OUT, **{"train.momentum": 0.5, "train.last-batch": "drop"})
    at_once = rows_of([run], 3)
    monkeypatch.delattr(f"clients.{method}.adapt")
    assert rows_of([run], 3) == at_once


@pytest.mark.parametrize(
    ("method", "keys", "moves"),
    [
        ("fedrep", {}, "head"),
        ("fedbabu", {"fedbabu.fine-tune": "head"}, "head"),
        ("fedbabu", {"fedbabu.fine-tune": "body"}, "hidden"),
        ("fedrep", {"fedrep.head": "none"}, ""),
    ],
)
def test_some_methods_fine_tune_a_part(run_inline: RunInline, method: str, keys: Keys, moves: str) -> None:
    """FedRep's newcomer fits a head to the representation; FedBABU's does with its epochs what its scoring does."""
    run = run_inline(method, **HELD_OUT, **keys)
    expected = fine_tuned(run, 2, lambda name: moves in name)
    assert losses(rows_of([run]), method, 6) == pytest.approx(expected, rel=1e-4)


def test_a_newcomer_of_fedfomo_gets_models_of_the_last_round(run_inline: RunInline) -> None:
    """It has helped nobody and nobody has helped it, so they are drawn at random; without downloads it is alone."""
    keys: Keys = {**HELD_OUT, "run.clients-per-round": 0, "fedfomo.validation": 0.0}
    given = rows_of([run_inline("fedfomo", **keys, **{"fedfomo.downloads": 3})])
    alone = rows_of([run_inline("fedfomo", **keys, **{"fedfomo.downloads": 0})])
    assert losses(alone, "fedfomo", 6) == losses(alone, "local", 6) == losses(given, "local", 6)
    assert losses(given, "fedfomo", 6)[1:] != losses(alone, "fedfomo", 6)[1:]


def test_the_control_is_a_run_of_local(run_inline: RunInline) -> None:
    """What stands beside every method is what newcomers of ``local`` do; it is computed once."""
    run, alone = run_inline("fedavg", **HELD_OUT), run_inline("local", **HELD_OUT)
    control = [row for row in rows_of([run]) if row["label"] == "local"]
    assert control == rows_of([alone])
    assert [task.label for task in plan([run, alone])] == ["fedavg", "local"]
    rarely = run_inline("fedprox", **HELD_OUT, **{"run.eval-every": 2})
    assert [task.label for task in plan([run, rarely])] == ["fedavg", "local", "fedprox"]


def test_runs_that_train_differently_have_controls_of_their_own(run_inline: RunInline) -> None:
    """A control with another learning rate would be none."""
    runs = [run_inline("fedavg", **HELD_OUT), run_inline("fedprox", **HELD_OUT, **{"train.lr": 0.1})]
    assert [task.label for task in plan(runs)] == ["fedavg", "local, as fedavg", "fedprox", "local, as fedprox"]
    assert {task.config.train.lr for task in plan(runs) if task.label.endswith("fedprox")} == {0.1}


def test_a_newcomer_that_diverges_is_named(run_inline: RunInline, tmp_path: Path) -> None:
    """No figure is drawn from numbers that are none."""
    run = copied(run_inline("fedavg", **HELD_OUT), tmp_path)
    settings = run.folder / "config.toml"
    text, changed = re.subn("(?m)^lr = .*$", "lr = 1e37", settings.read_text())
    assert changed == 1
    settings.write_text(text)
    with pytest.raises(AdaptationError, match="fedavg: newcomer 6 diverged within 1 epoch"):
        rows_of([run])


# Who newcomers are.


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological", "fedgen"])
def test_newcomers_are_further_clients_of_the_partition(kind: str) -> None:
    """Six clients and two newcomers hold what eight clients hold, and a run sees the six."""
    keys: Keys = {"data.partition": kind}
    run, newcomers = federate(tiny(**keys, **HELD_OUT)), held_out(tiny(**keys, **HELD_OUT))
    eight = federate(tiny(**keys, **{"run.clients": 8}))
    assert (run.clients, newcomers.clients) == (6, 2)
    for mine, all_of_them in ((run.train + newcomers.train, eight.train), (run.test + newcomers.test, eight.test)):
        assert [rows.tolist() for rows in mine] == [rows.tolist() for rows in all_of_them]
    assert held_out(tiny(**keys)).clients == 0


def test_a_run_knows_nothing_of_newcomers(run_inline: RunInline) -> None:
    """They are in no round, no evaluation and not in the partition that is written down."""
    run = run_inline("fedavg", **HELD_OUT)
    for log in ("clients", "evaluations"):
        assert set(run.frame(log)["client"]) <= set(range(6))
    assert set(run.partition["client"]) == set(range(6))


def write_writers(folder: Path, split: str, writers: list[str], channels: int = 1, classes: int = 10) -> None:
    """Write a split in FEMNIST's schema: ten images of each writer."""
    x, y = tiny_images(10 * len(writers), len(split), channels)
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "writer_id": datasets.Value("string"),
            "character": datasets.ClassLabel(names=[f"kind {c}" for c in range(classes)]),
        }
    )
    columns = {
        "image": [Image.fromarray(p) for p in x],
        "writer_id": [writer for writer in writers for _ in range(10)],
        "character": y.tolist(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")


@pytest.fixture
def writers_root(tmp_path: Path) -> Path:
    """Return a folder with twelve writers, and three more in a split of their own."""
    folder = tmp_path / "femnist"
    write_writers(folder, "train", [f"f{n:02d}" for n in range(12)])
    write_writers(folder, "test", [f"f{n:02d}" for n in range(12)])
    write_writers(folder, "unseen", ["g2", "g0", "g1"])
    return folder


def of_writers(root: Path, **keys: Scalar) -> Keys:
    """Return the keys of a run whose clients are writers."""
    return {"data.name": "femnist", "data.root": str(root), "data.partition": "natural", **keys}


def test_which_writers_are_held_out_is_random(writers_root: Path) -> None:
    """Writers are numbered in an order that may mean something, so newcomers are not those of the last numbers."""
    config = tiny(**of_writers(writers_root, **{"data.newcomers": 6}))
    writers = np.concatenate([federate(config).images.train_writer, federate(config).images.test_writer])
    owners = [[set(writers[rows].tolist()) for rows in data.train] for data in (federate(config), held_out(config))]
    assert all(len(owner) == 1 for part in owners for owner in part)
    run, newcomers = ([next(iter(owner)) for owner in part] for part in owners)
    assert sorted(run + newcomers) == list(range(12))
    assert run == sorted(run)
    assert newcomers == sorted(newcomers)
    assert newcomers != list(range(6, 12))


def test_unseen_writers_are_newcomers(run_inline: RunInline, writers_root: Path) -> None:
    """Numbered behind the run's clients and its newcomers, with the run's classes, scaling and share of test images."""
    run = run_inline("fedavg", **of_writers(writers_root, **HELD_OUT))
    images = federate(run.config).images
    data = unseen_writers(run.config, images, "unseen")
    assert data.images.mean == images.mean
    assert [len(part) for part in data.train + data.test] == [8, 8, 8, 2, 2, 2]
    pixels, _ = tiny_images(30, len("unseen"))
    mine = np.sort(np.concatenate([data.train[0], data.test[0]]))
    assert np.array_equal(data.images.train_x[mine][:, 0], pixels[10:20])  # g0, written after g2
    rows = rows_of([run], 1, split="unseen")
    assert sorted({row["client"] for row in rows}) == [8, 9, 10]
    assert rows_of([run], 1, split="unseen", clients="9") == [row for row in rows if row["client"] == 9]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("test", r"split 'test' of 'femnist' is what the run was made of"),
        ("unsen", r"split 'unsen' of 'femnist' is not in .*there are: .*unseen"),
        ("known", r"1 of its writers are in the run's own splits, f03 among them"),
        ("coloured", r"other images than the run's data: 3x8x8 and 1x8x8"),
        ("many", r"other classes"),
    ],
)
def test_a_split_that_holds_no_newcomers_is_refused(writers_root: Path, name: str, said: str) -> None:
    """Accuracy on writers who were trained on would look like adaptation."""
    write_writers(writers_root, "known", ["g7", "f03"])
    write_writers(writers_root, "coloured", ["g7"], channels=3)
    write_writers(writers_root, "many", ["g7"], classes=11)
    config = tiny(**of_writers(writers_root))
    with pytest.raises(UserError, match=said):
        unseen_writers(config, federate(config).images, name)


@pytest.mark.slow
def test_the_unseen_writers_of_femnist(run_inline: RunInline) -> None:
    """240 real writers of whom the run has seen nothing."""
    root = Path(os.environ.get("FEDKD_DATA", "")) / "femnist"
    if "FEDKD_DATA" not in os.environ or not list(root.glob("unseen_writers_test-*.parquet")):
        pytest.skip("no FEMNIST with unseen writers in $FEDKD_DATA")
    keys: Keys = {"data.newcomers": 2, "run.clients": 30, "run.clients-per-round": 10, "run.rounds": 6}
    run = run_inline("fedavg", **of_writers(root, **keys, **{"train.local-steps": 20, "train.lr": 0.1}))
    (task, _) = plan([run], split="unseen_writers_test")
    assert task.clients == tuple(range(32, 272))
    assert sum(len(part) for part in task.newcomers.data.train + task.newcomers.data.test) == 7087
    rows = pd.DataFrame(rows_of([run], 1, split="unseen_writers_test", clients="32-61"))
    means = summary(rows).set_index(["label", "epoch"])["mean"]
    assert means["fedavg", 1] > means["local", 1] + 5
    assert len(rows_of([run], 1)) == 2 * 2 * 2


# Mistakes.


def copied(run: Run, folder: Path) -> Run:
    """Return a run's copy, to be changed."""
    return Run.open(shutil.copytree(run.folder, folder / "copy"))


def test_an_unfinished_run_has_nothing_to_give(run_inline: RunInline, tmp_path: Path) -> None:
    """Its last state is not what it would have ended with."""
    run = copied(run_inline("fedavg", **HELD_OUT), tmp_path)
    (run.folder / "summary.json").unlink()
    with pytest.raises(UserError, match="is not finished"):
        plan([run])


@pytest.mark.parametrize("content", [None, b"", b"none"])
def test_a_final_state_that_cannot_be_read_is_named(run_inline: RunInline, tmp_path: Path, content: bytes) -> None:
    """Before anything starts."""
    run = copied(run_inline("fedavg", **HELD_OUT), tmp_path)
    file = run.folder / "final.safetensors"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(UserError, match=r"final\.safetensors does not hold the final state"):
        plan([run])


def test_a_run_without_newcomers_says_how_to_have_some(run_inline: RunInline) -> None:
    """Neither held out nor named."""
    with pytest.raises(UserError, match=r"data\.newcomers = 0.*--set data\.newcomers=N.*--split"):
        plan([run_inline("fedavg")])
    with pytest.raises(UserError, match=r"'digits': the data set has no writers"):
        plan([run_inline("fedavg")], split="unseen")


@pytest.mark.parametrize(
    ("clients", "said"),
    [
        ("5", "the newcomers of .* are 6 to 7"),
        ("6-8", "the newcomers of .* are 6 to 7"),
        ("7-6", "'7-6' is no number and no range"),
        ("6,", "'' is no number"),
        ("-6", "'-6' is no number"),
    ],
)
def test_numbers_that_are_no_newcomers_are_refused(run_inline: RunInline, clients: str, said: str) -> None:
    """The message has the numbers that are."""
    with pytest.raises(UserError, match=said):
        plan([run_inline("fedavg", **HELD_OUT)], clients=clients)


def test_numbers_and_ranges(run_inline: RunInline) -> None:
    """In any order, each once."""
    run = run_inline("fedavg", **HELD_OUT)
    assert [plan([run], clients=text)[0].clients for text in ("7,6", "6-7,7", "7", "")] == [
        (6, 7),
        (6, 7),
        (7,),
        (6, 7),
    ]


def test_data_has_to_be_the_runs(run_inline: RunInline, tmp_path: Path) -> None:
    """Gone, moved, or another under the same name."""
    places = [tmp_path / name for name in ("here", "there", "other")]
    for place, train in zip(places, (200, 200, 210), strict=True):
        write_idx_folder(place, train=train)
    run = run_inline("fedavg", **HELD_OUT, **{"data.name": "mnist", "data.root": str(places[0])})
    expected = rows_of([run], 1)
    shutil.rmtree(places[0])
    with pytest.raises(UserError, match=r"data\.root = .* is not a folder"):
        plan([run])
    with pytest.raises(UserError, match=r"was made with other data than the mnist at hand"):
        plan([run], root=str(places[2]))
    assert rows_of([run], 1, root=str(places[1])) == expected


def test_different_newcomers_are_not_compared(run_inline: RunInline) -> None:
    """A table of different clients would show their difference, not the methods'."""
    runs = [run_inline("fedavg", **HELD_OUT), run_inline("fedprox", **{"data.newcomers": 3})]
    with pytest.raises(UserError, match=r"have other newcomers at run\.seed = 1"):
        plan(runs)


# The command, its table and its figure.


def test_the_command_writes_rows_table_and_figure(run_inline: RunInline, tmp_path: Path) -> None:
    """Two methods and two seeds in one table, and the rows in a file that pandas reads."""
    runs = [run_inline(m, **HELD_OUT, **{"run.seed": seed}) for m in ("fedavg", "apfl") for seed in (1, 2)]
    words = ["adapt", *(str(run.folder) for run in runs), "--epochs", "2", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    rows = pd.read_json(tmp_path / "out" / "adapt.jsonl", lines=True)
    assert rows.to_dict("records") == rows_of(runs)
    assert list(pd.read_csv(tmp_path / "out" / "table.csv")["label"].unique()) == ["fedavg", "local", "apfl"]
    for name in ("table.md", "adapt.png", "adapt.pdf", "adapt.txt"):
        assert (tmp_path / "out" / name).stat().st_size
    for shown in ("epoch", "fedavg", "local", "apfl", "best"):
        assert shown in done.output


def test_one_run_keeps_its_newcomers_beside_it(run_inline: RunInline, tmp_path: Path) -> None:
    """By default in the run's own folder, whose digest stays what it was."""
    run = copied(run_inline("fedavg", **HELD_OUT), tmp_path)
    digest = run.digest()
    assert CliRunner().invoke(cli.app, ["adapt", str(run.folder), "--epochs", "1"]).exit_code == 0
    assert (run.folder / "adapt" / "adapt.jsonl").is_file()
    assert run.digest() == digest


def test_no_epochs_are_no_adaptation(run_inline: RunInline) -> None:
    """Nothing is written."""
    run = run_inline("fedavg", **HELD_OUT)
    done = CliRunner().invoke(cli.app, ["adapt", str(run.folder), "--epochs", "0"])
    assert isinstance(done.exception, UserError)
    assert "--epochs 0" in str(done.exception)
    assert not (run.folder / "adapt").exists()


def invented() -> pd.DataFrame:
    """Return rows of two methods, two seeds and three newcomers, one of them without test images."""
    table: list[dict[str, Any]] = []
    for label, method, gain in (("a", "fedavg", 1), ("b", "fedavg", 0)):
        for seed in (1, 2):
            for client, total in ((6, 10), (7, 5), (8, 0)):
                for epoch in (0, 1):
                    correct = 0 if not total else min(total, 2 * seed + 2 * gain * epoch)
                    table.append(
                        {
                            "label": label,
                            "method": method,
                            "seed": seed,
                            "partition_seed": seed,
                            "client": client,
                            "epoch": epoch,
                            "correct": correct,
                            "total": total,
                            "loss_sum": float(total * (2 - epoch)),
                        }
                    )
    return pd.DataFrame(table)


def test_the_table_counts_clients_equally_and_seeds_after_them() -> None:
    """Label a: 20 and 40 % at first for seed 1, 40 and 80 % for seed 2; after an epoch 40 and 80, 60 and 100 %."""
    summed = summary(invented()).set_index(["label", "epoch"])
    assert summed["mean"].tolist() == pytest.approx([45, 70, 45, 45])
    assert summed.loc[("a", 0), "mean_std"] == pytest.approx(np.std([30, 60], ddof=1))
    assert summed.loc[("a", 0), "deviation"] == pytest.approx((10 + 20) / 2)
    assert summed.loc[("a", 1), "worst_decile"] == pytest.approx((40 + 60) / 2)
    assert summed["loss"].tolist() == pytest.approx([2, 1, 2, 1])
    assert summed["clients"].unique().tolist() == [2]
    table = by_epoch(summary(invented()))
    assert table["epoch"].tolist() == ["0", "1", "best"]
    assert table["a"].tolist() == ["45.0 ± 15.0 / 30.0", "70.0 ± 20.0 / 50.0", "70.0 (epoch 1)"]
    assert table["b"].tolist()[-1] == "45.0 (epoch 0)"


def test_the_figure_has_a_line_per_label_and_says_what_it_shows() -> None:
    """Two settings of one method look different; clients without test images are not counted."""
    figure = adaptation(invented())
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["a", "b"]
    assert lines[0].get_ydata() == pytest.approx([45, 70])
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == 2
    assert figure.caption.startswith("Accuracy of 2 clients that were held out of training")
    assert "2 seeds each" in figure.caption


def test_without_test_images_there_is_nothing_to_show() -> None:
    """Said in words, not by a division by zero."""
    with pytest.raises(UserError, match="none of the newcomers has test images"):
        summary(invented().assign(total=0))
