"""Membership inference: what memorised is found out, what saw nobody is not, and skew of labels is no membership."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import by_case
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score, roc_curve

from fedkd.config import Scalar
from fedkd.data import federate
from fedkd.errors import UserError
from fedkd.results import Row, Run
from plots.audit import GRID, roc, table
from sims.audit import Curve, attack, audit, matched, plan, scores, write
from sims.audit import _free as free
from sims.audit import _spare as spare

RunInline = Callable[..., Run]
Keys = dict[str, Scalar]
slow = pytest.mark.slow


def invented(shift: float, seed: int = 0, members: int = 600, others: int = 300) -> dict[str, Any]:
    """Return the arguments of an attack on scores that members have higher by ``shift``, in ten strata."""
    rng = np.random.default_rng(seed)
    member = np.arange(members + others) < members
    values = rng.normal(size=len(member)) + shift * member
    stratum = rng.integers(0, 10, len(member))
    return {"values": {"loss": values, "entropy": values}, "correct": values > 0, "member": member, "stratum": stratum}


def rng() -> np.random.Generator:
    """Return a fresh generator."""
    return np.random.default_rng(1)


# ---- figures of scores -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
def test_curves_are_those_of_scikit_learn(ties: bool) -> None:
    """With weights, with zero weights and with ties."""
    given = invented(0.7)
    values, member = given["values"]["loss"], given["member"]
    values = np.round(values, 1) if ties else values
    weights = rng().integers(0, 4, len(member)).astype(float)
    curve, there = Curve(values, member), weights > 0
    fpr, tpr, _ = roc_curve(member[there], values[there], sample_weight=weights[there], drop_intermediate=False)
    figures = curve.figures(weights)
    auc = roc_auc_score(member[there], values[there], sample_weight=weights[there])
    assert figures["auc"] == pytest.approx(auc, abs=1e-12)
    assert figures["advantage"] == pytest.approx((tpr - fpr).max(), abs=1e-12)
    for percent in (1, 10):
        assert figures[f"tpr_at_{percent}"] == pytest.approx(tpr[fpr <= percent / 100].max(), abs=1e-12)


def test_a_score_that_tells_all_and_one_that_tells_nothing() -> None:
    """AUC 1 and 0.5, with intervals that say so, and at a rate of 1 % all or about 1 %."""
    sure = attack(**invented(50.0), rng=rng(), resamples=100)["loss"]
    assert sure["auc"] == {"value": 1.0, "interval": [1.0, 1.0]}
    assert sure["tpr_at_1"]["value"] == sure["advantage"]["value"] == 1.0
    nothing = attack(**invented(0.0), rng=rng(), resamples=100)
    low, high = nothing["loss"]["auc"]["interval"]
    assert low < 0.5 < high
    assert nothing["roc"][-1] == 1.0
    assert nothing["loss"]["tpr_at_1"]["value"] < 0.05


@pytest.mark.slow
def test_intervals_cover() -> None:
    """Of 60 attacks on scores that tell nothing, 95 % intervals hold 0.5 in nearly all (binomial, 99.9 % range)."""
    inside = 0
    for seed in range(60):
        low, high = attack(**invented(0.0, seed, 120, 60), rng=rng(), resamples=100)["loss"]["auc"]["interval"]
        inside += low <= 0.5 <= high
    assert 50 <= inside <= 60


def test_skew_of_labels_is_no_membership() -> None:
    """Scores that depend on the class alone tell nothing, though members have other classes than non-members."""
    member = np.arange(1000) < 600
    stratum = np.where(
        member, rng().choice(4, 1000, p=[0.7, 0.2, 0.1, 0]), rng().choice(4, 1000, p=[0.1, 0.1, 0.1, 0.7])
    )
    values = stratum.astype(float)
    weights = matched(np.ones(1000), member, stratum)
    assert not weights[stratum == 3].any()
    assert Curve(values, member).figures(weights)["auc"] == pytest.approx(0.5, abs=1e-12)
    assert abs(Curve(values, member).figures(np.ones(1000))["auc"] - 0.5) > 0.2
    for label in range(3):
        here = stratum == label
        assert weights[here & member].sum() == pytest.approx(weights[here & ~member].sum())


def test_scores_are_their_formulas() -> None:
    """Worked out from the probabilities; a model that is sure beyond float32 has no infinite score."""
    logits = torch.tensor([[2.0, 0.5, -1.0], [0.0, 3.0, 0.1], [1.0, 1.0, 1.0]])
    labels = torch.tensor([0, 2, 1])
    found = scores(logits, labels)
    for row, (p, y) in enumerate(zip(logits.double().softmax(1).numpy(), labels.tolist(), strict=True)):
        others = [k for k in range(3) if k != y]
        expected = (1 - p[y]) * np.log(p[y]) + sum(p[k] * np.log(1 - p[k]) for k in others)
        assert float(found["entropy"][row]) == pytest.approx(expected, rel=1e-9)
        assert float(found["loss"][row]) == pytest.approx(np.log(p[y]), rel=1e-9)
    sure = scores(torch.tensor([[500.0, 0.0, 0.0]] * 2), torch.tensor([0, 1]))
    assert all(bool(torch.isfinite(score).all()) for score in sure.values())
    assert sure["entropy"][0] > -1e-9 > -100 > sure["entropy"][1]


def test_nothing_to_match_is_said() -> None:
    """Members of one class and non-members of another prove nothing."""
    given = invented(0.0)
    given["stratum"] = given["member"].astype(int)
    with pytest.raises(UserError, match="no client that took part has test images of a class"):
        attack(**given, rng=rng())


# ---- runs ------------------------------------------------------------------------------------------------------------


def audited(run: Run, resamples: int = 20) -> Row:
    """Return the audit of a run."""
    return audit(plan([run])[0], resamples)


@slow
@by_case
def test_every_method_is_audited(run_inline: RunInline, method: str, variant: Keys) -> None:
    """Global and personal models as far as the method has them; the scores are those that the run ended with."""
    run = run_inline(method, **variant)
    found = audited(run, 0)
    last = [row for row in run.rows("evaluations") if row["round"] == run.config.run.rounds]
    kinds = [kind for kind in ("global", "personal") if f"{kind}_correct" in last[0]]
    assert [*found["models"]] == [*kinds, "initial"]
    for figures in found["models"].values():
        assert 0 <= figures["loss"]["auc"]["value"] <= 1
        assert len(figures["roc"]) == len(GRID)
    taken = {client for row in run.rows("rounds") for client in row["clients"]}
    assert found["models"]["initial"]["members"] <= sum(federate(run.config).sizes()[list(taken)])


@slow
def test_a_model_that_memorised_is_found_out(run_inline: RunInline) -> None:
    """Every client alone with a dozen images, to the end; where it started from is not found out."""
    keys: Keys = {"run.rounds": 4, "run.clients-per-round": 0, "train.local-steps": 150, "train.lr": 0.2}
    few: Keys = {"data.fraction": 0.06, "data.partition": "iid", "model.hidden": 256}
    found = audited(run_inline("local", **keys, **few), 200)["models"]
    assert found["personal"]["loss"]["auc"]["value"] > 0.75
    assert found["personal"]["train_accuracy"] == 1.0
    assert found["personal"]["loss"]["auc"]["interval"][0] > 0.6
    low, high = found["initial"]["loss"]["auc"]["interval"]
    assert low < 0.5 < high


@slow
def test_equal_seeds_give_equal_files_on_any_number_of_nodes(run_inline: RunInline, tmp_path: Path) -> None:
    """Twice the same run, and on two nodes; and once more after the folder has moved."""
    runs = [run_inline("apfl"), run_inline("apfl", again=True), run_inline("apfl", nodes=2)]
    files = []
    for number, run in enumerate(runs):
        moved = Run.open(shutil.copytree(run.folder, tmp_path / str(number)))
        tasks = plan([moved])
        write([audit(task, 20) for task in tasks], tasks, tmp_path / "out")
        files.append((moved.folder / "audit.json").read_bytes())
    assert files[0] == files[1] == files[2]
    other = audited(run_inline("apfl", **{"run.seed": 2}))
    assert json.loads(files[0]) != other


@slow
def test_clients_that_never_took_part_are_left_out(run_inline: RunInline) -> None:
    """Their images are in no model, and so are no members."""
    run = run_inline("fedavg", **{"run.rounds": 1, "run.clients-per-round": 2})
    sizes = federate(run.config).sizes()[run.rows("rounds")[0]["clients"]]
    assert 0 < audited(run, 0)["models"]["global"]["members"] <= sizes.sum()


@pytest.mark.parametrize("keys", [{"data.fraction": 0.3}, {"data.newcomers": 3}, {}], ids=str)
def test_spare_images_are_nobodys(keys: Keys, run_inline: RunInline) -> None:
    """Of the client's classes, no more than it has for training, and each goes to one client at most."""
    from conftest import tiny

    config = tiny(**keys)
    data, shares = federate(config), spare(config)
    counts, everything = data.class_counts(), np.concatenate(shares)
    assert len(np.unique(everything)) == len(everything)
    assert set(everything) <= set(free(config, data))
    assert not set(everything) & set(np.concatenate([*data.train, *data.test]))
    for share, mine in zip(shares, counts, strict=True):
        assert (np.bincount(data.labels[share], minlength=data.classes) <= mine).all()
    assert bool(len(everything)) == bool(keys)


# ---- what is refused, and what is shown ------------------------------------------------------------------------------


@slow
def test_what_cannot_be_audited_is_said(run_inline: RunInline, tmp_path: Path) -> None:
    """One line each: not finished, no final state, a state of another model, clients' states gone."""
    run = run_inline("apfl")

    def damaged(name: str, change: Callable[[Path], None]) -> Run:
        folder = Path(shutil.copytree(run.folder, tmp_path / name))
        change(folder)
        return Run.open(folder)

    def other_state(folder: Path) -> None:
        state = load_file(folder / "final.safetensors")
        save_file({name: tensor * 2 for name, tensor in state.items()}, folder / "final.safetensors")

    with pytest.raises(UserError, match="is not finished"):
        plan([damaged("a", lambda folder: (folder / "summary.json").unlink())])
    with pytest.raises(UserError, match="does not hold the final state"):
        plan([damaged("b", lambda folder: (folder / "final.safetensors").write_bytes(b"no"))])
    for name, change, said in (
        ("c", other_state, "is not what the run ended with"),
        ("d", lambda folder: shutil.rmtree(folder / "state"), "the state of client 0 from round 2 is lost"),
    ):
        with pytest.raises(UserError, match=said) as raised:
            audited(damaged(name, change))
        assert "\n" not in str(raised.value)

    def on_devices(folder: Path) -> None:
        text = (folder / "config.toml").read_text()
        (folder / "config.toml").write_text(text.replace('partition = "dirichlet"', 'partition = "devices"'))

    with pytest.raises(UserError, match="was made on devices"):
        plan([damaged("e", on_devices)])


def rows_of(*labels: str, seeds: int = 2, global_model: bool = True) -> list[Row]:
    """Return invented audits."""
    found = []
    for label in labels:
        for seed in range(seeds):
            given = invented(0.5, seed)
            models = {"personal": attack(**given, rng=rng(), resamples=20)}
            if global_model:
                models = {"global": models["personal"], **models}
            models["initial"] = attack(**invented(0.0, seed), rng=rng(), resamples=20)
            found.append({"label": label, "method": label.split()[0], "seed": seed, "models": models})
    return found


def test_the_table_has_the_control_once() -> None:
    """A line per label and model, ± over seeds; one seed shows its interval; equal controls are one."""
    found = table(rows_of("fedavg", "fedgen (x)"))
    assert list(found["model"]) == [
        "fedavg, global",
        "fedavg, personal",
        "fedgen (x), global",
        "fedgen (x), personal",
        "initial model (control)",
    ]
    assert found["AUC"].str.match(r"0\.\d{3} ± 0\.\d{3}$").all()
    assert table(rows_of("fedavg", seeds=1))["AUC"].str.match(r"0\.\d{3} \[0\.\d{3}, 0\.\d{3}\]$").all()


def test_the_figure_draws_the_curves() -> None:
    """On logarithmic axes, with the numbers that were kept; a panel per kind of model that there is."""
    rows = rows_of("fedavg", "local")
    figure = roc(rows)
    assert [axes.get_xscale() for axes in figure.axes] == ["log", "log"]
    drawn: pd.DataFrame = figure.numbers
    mine = drawn[(drawn["panel"] == "global") & (drawn["series"] == "fedavg")]
    expected = np.mean([row["models"]["global"]["roc"] for row in rows[:2]], axis=0)
    assert np.allclose(mine["y"], expected)
    assert len(roc(rows_of("local", global_model=False)).axes) == 1
