"""FedDistill, FedEnsemble, FedDF and FedProto: limit cases, derivations, the authors' numbers, and public data."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny
from safetensors.torch import load_file

import clients.feddistill as feddistill_client
import clients.fedproto as fedproto_client
import strategies
import strategies.fedavg as fedavg_server
import strategies.feddf as feddf_server
import strategies.feddistill as feddistill_server
import strategies.fedensemble as fedensemble_server
import strategies.fedproto as fedproto_server
from clients.training import Job
from fedkd.config import LEFT_TO_METHODS, Config, Scalar, defaults
from fedkd.data import Shard, federate
from fedkd.ensemble import ensemble
from fedkd.errors import UserError
from fedkd.method import load, names
from fedkd.methods import fedavg, feddistill, fedproto
from fedkd.methods.fedensemble import Scoring
from fedkd.payload import pack, unpack, wire_bytes
from fedkd.results import Run
from fedkd.setup import Setup

RunInline = Callable[..., Run]
Keys = dict[str, Scalar]
Case = dict[str, Any]

AUTHORS: Case = json.loads((Path(__file__).parent / "fixtures" / "exchange_authors.json").read_text(encoding="utf-8"))
"""What the authors' code gave, and how it was asked: see its ``source``."""
NORMED: Keys = {"model.name": "fedgen_cnn"}
AVERAGED: Keys = {**NORMED, "model.norm-statistics": "averaged"}
DISTILL_VARIANTS = pytest.mark.parametrize("variant", load("feddistill").variants)
PROTO_VARIANTS = pytest.mark.parametrize("variant", load("fedproto").variants)


def parameters(run: Run) -> torch.Tensor:
    """Return the final global model."""
    return load_file(run.folder / "final.safetensors")["parameters"]


def close(actual: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Compare with a number, or nested list of numbers."""
    actual = torch.as_tensor(actual).double()
    torch.testing.assert_close(actual, torch.as_tensor(expected).double(), rtol=rtol, atol=atol)


# The network of the recorded cases: 4 pixels, 5 ReLU units, 3 classes.


def pattern(seed: int) -> torch.Tensor:
    """Return the parameters ``[43]`` that the fixture names by a seed."""
    i = torch.arange(1, 44) + 1000 * seed
    return 4 * (((31 * i * i + 17 * i) % 10007).double() / 10007).float() - 2


def shard_of(images: int, labels: list[int], shift: float = 3.0, scale: float = 1 / 3) -> Shard:
    """Return the images that the fixture names by a seed, with some labels."""
    i = torch.arange(1, 4 * len(labels) + 1)
    x = ((31 * i**2 + 17 * i + images) % 7).to(torch.uint8).reshape(-1, 1, 2, 2)
    column = torch.ones(1, 1, 1)
    return Shard(x, torch.tensor(labels), shift * column, scale * column)


def small(method: str, public: Shard | None = None, **flat: Any) -> Setup:
    """Return the workspaces of the small network, for two clients that train on all they have in each step."""
    keys: Keys = {"run.method": method, "run.clients": 2, "run.clients-per-round": 0, "model.name": "mlp"}
    keys |= {"model.hidden": 5, "train.lr": AUTHORS["lr"], "train.batch-size": 64, "train.local-steps": 1}
    return Setup.build(Config.from_flat({**keys, **flat}), (1, 2, 2), 3, torch.device("cpu"), public)


def job_of(setup: Setup, round: int, client: int, initial: torch.Tensor, last_round: int = 0) -> Job:
    """Return a client's job in a round (from 1)."""
    return Job(setup.config, setup.model, setup.streams, round, client, initial, setup.extras, last_round=last_round)


SHARDS = [shard_of(client, labels) for client, labels in enumerate(AUTHORS["labels"])]


def forward(parameters: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features and logits of the small network, written out."""
    hidden, head = parameters[:25], parameters[25:]
    z = torch.relu(x.flatten(1) @ hidden[:20].reshape(5, 4).T + hidden[20:])
    return z, z @ head[:15].reshape(3, 5).T + head[15:]


# Public data.


@pytest.mark.parametrize("test", ["pooled", "own-labels"])
@pytest.mark.parametrize("kind", ["dirichlet", "iid", "fedgen"])
def test_public_images_are_nobodys(idx_root: str, test: str, kind: str) -> None:
    """They are set aside first, so no client trains or is scored on one, and what is left is dealt out."""
    keys: Keys = {"data.name": "mnist", "data.root": idx_root, "data.test": test, "data.partition": kind}
    keys |= {"data.fraction": 0.5} if kind == "fedgen" else {}
    data = federate(tiny(**keys, **{"data.public-fraction": 0.2}))
    pool = 300 if test == "pooled" else 200
    assert len(data.set_aside) == len(set(data.set_aside.tolist())) == pool // 5
    assert data.set_aside.max() < pool
    held = np.concatenate([*data.train, *data.test])
    assert not set(held.tolist()) & set(data.set_aside.tolist())
    if test == "pooled" and kind != "fedgen":
        assert len(held) + len(data.set_aside) == pool
    again = federate(tiny(**keys, **{"data.public-fraction": 0.2}))  # from the cache
    assert np.array_equal(again.set_aside, data.set_aside)
    assert all(np.array_equal(a, b) for a, b in zip(again.train, data.train, strict=True))
    other = federate(tiny(**keys, **{"data.public-fraction": 0.2, "data.seed": 2}))
    assert not np.array_equal(other.set_aside, data.set_aside)


def test_public_images_leave_fedgens_split_as_it_is(idx_root: str) -> None:
    """They are of what it leaves over; where that is too little, the message says so."""
    keys: Keys = {"data.name": "mnist", "data.root": idx_root, "data.test": "own-labels", "data.partition": "fedgen"}
    alone, beside = (federate(tiny(**keys, **{"data.fraction": 0.5, "data.public-fraction": p})) for p in (0.0, 0.2))
    for split in ("train", "test"):
        assert all(map(np.array_equal, getattr(alone, split), getattr(beside, split)))
    assert len(beside.set_aside) == 40
    with pytest.raises(UserError, match=r"leaves 0 examples over, and data\.public-fraction = 0\.2 needs 40"):
        federate(tiny(**keys, **{"data.public-fraction": 0.2}))


def test_public_images_have_no_labels() -> None:
    """The server cannot use what it does not get; the images are those of the pool, scaled as everybody's."""
    data = federate(tiny(**{"data.public-fraction": 0.1}))
    public = data.public()
    assert public is not None
    assert len(public) == round(0.1 * 1797)
    assert (public.y == -1).all()
    x, _ = public.batch(slice(0, 4))
    assert torch.equal(x, torch.from_numpy(data.images.train_x[data.set_aside[:4]]).float() / 8 - 1)


def test_without_a_share_nothing_is_set_aside() -> None:
    """The partition of a run that has no public data is the one it always was."""
    data = federate(tiny())
    assert data.public() is None
    assert sum(len(rows) for rows in [*data.train, *data.test]) == 1797
    config = tiny(**{"data.public-fraction": 0.0})
    assert config == tiny()
    assert strategies.build(config, data).setup.public is None


def test_methods_may_have_their_own_share() -> None:
    """``flwr run`` passes every key with its default, so the default itself says that the user said nothing."""
    for flat in ({}, defaults(), {"data.public-fraction": -1}):
        assert Config.from_flat({**flat, "run.method": "feddf"}).data.public_fraction == 0.1
        assert Config.from_flat({**flat, "run.method": "fedavg"}).data.public_fraction == 0.0
    for method in ("feddf", "fedavg"):
        given = Config.from_flat({"run.method": method, "data.public-fraction": 0.3})
        assert given.data.public_fraction == 0.3
        assert Config.from_flat(given.flat()) == given
    with pytest.raises(UserError, match=r"data\.public-fraction = -0\.5"):
        tiny(**{"data.public-fraction": -0.5})


@pytest.mark.parametrize("method", names())
def test_a_methods_own_defaults_are_of_keys_that_are_left_to_it(method: str) -> None:
    """A key with a default of its own could not be told from one that the user gave."""
    assert set(load(method).defaults) <= set(LEFT_TO_METHODS)
    assert all(defaults()[key] == -1 for key in LEFT_TO_METHODS)


# FedDF.


def test_feddf_without_public_data_is_refused() -> None:
    """The message names the key and the fix, before anything starts."""
    config = tiny("feddf", **{"data.public-fraction": 0.0})
    with pytest.raises(UserError, match=r"data\.public-fraction = 0 .*data\.public-fraction=0\.1"):
        strategies.build(config, federate(config))


@pytest.mark.slow
def test_feddf_with_personal_batchnorm_is_refused(run_inline: RunInline) -> None:
    """The teachers run on the server, which has no statistics for them; both cures work."""
    config = tiny("feddf", **NORMED)
    with pytest.raises(UserError, match=r"model\.norm=group.*model\.norm-statistics=averaged"):
        strategies.build(config, federate(config))
    for cure in (AVERAGED, {**NORMED, "model.norm": "group"}):
        assert torch.isfinite(parameters(run_inline("feddf", **{**cure, "feddf.steps": 3}))).all()


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_feddf_without_steps_is_fedavg(run_inline: RunInline, share: float) -> None:
    """With the same images set aside, or none."""
    df = run_inline("feddf", **{"feddf.steps": 0, "data.public-fraction": share})
    avg = run_inline("fedavg", **{"data.public-fraction": share})
    assert [row["state"] for row in df.rows("rounds")] == [row["state"] for row in avg.rows("rounds")]
    assert df.rows("evaluations") == avg.rows("evaluations")


def feddf_round(**flat: Any) -> tuple[Setup, feddf_server.State, list[fedavg.Update]]:
    """Return a server of the small network with nine public images, its state, and the recorded three updates."""
    case = AUTHORS["feddf"]
    public = shard_of(2, [-1] * 9, shift=0.0, scale=2.0)
    settings: Keys = {"feddf.lr": case["lr"], "feddf.steps": case["steps"]}
    setup = small("feddf", public, **{**settings, **flat})
    updates = [
        fedavg.Update(pattern(seed), torch.zeros(0), torch.tensor(n))
        for seed, n in zip(case["model_seeds"], case["examples"], strict=True)
    ]
    return setup, feddf_server.init(setup), updates


@pytest.mark.parametrize("case", AUTHORS["feddf"]["cases"], ids=lambda case: case["name"])
def test_distillation_is_the_authors(case: Case) -> None:
    """Four steps: average, ensemble, KL, clipping, Adam and its schedule; every step sees all images."""
    assert max(AUTHORS["feddf"]["cases"][0]["norms"]) > feddf_server.LARGEST_NORM  # clipping is in it
    average = {"avg_logits": "logits", "avg_probs": "probabilities"}[case["name"]]
    setup, state, updates = feddf_round(**{"feddf.average": average})
    state, metrics = feddf_server.update(setup, state, updates, 1)
    close(metrics["distillation_loss"], (sum(case["losses"]), 4.0))
    close(state.parameters, case["student"], atol=1e-5)


def test_the_ensembles_prediction_becomes_the_models(run_inline: RunInline) -> None:
    """More steps bring the student closer to its teachers, which the average is not."""
    gaps = []
    for steps in (1, 400):
        setup, state, updates = feddf_round(**{"feddf.steps": steps})
        after, _ = feddf_server.update(setup, state, updates, 1)
        x = setup.public.batch(slice(None))[0]  # type: ignore[union-attr]
        teacher = torch.stack([forward(u.parameters, x)[1] for u in updates]).mean(dim=0)
        student = forward(after.parameters, x)[1]
        gaps.append(float((teacher.softmax(1) - student.softmax(1)).abs().sum(1).mean()))
    assert gaps[1] < 0.5 * gaps[0]


def test_a_single_teacher_that_the_student_equals_teaches_nothing() -> None:
    """With one client the student is its teacher: the KL is zero and so is its gradient."""
    setup, state, updates = feddf_round(**{"feddf.steps": 1})
    _, metrics = feddf_server.update(setup, state, updates[:1], 1)
    assert metrics["distillation_loss"][0] == pytest.approx(0, abs=1e-6)
    assert float(setup.model.gradient.abs().max()) < 1e-5


def test_only_drawn_images_are_put_to_the_teachers_and_all_in_turn() -> None:
    """A pass shows each image once; the last incomplete batch of a pass is left for another one."""
    rng = torch.Generator().manual_seed(0)
    drawn = feddf_server._batches(10, 3, 7, rng)
    assert [len(rows) for rows in drawn] == [3] * 7
    for one in (drawn[:3], drawn[3:6]):
        assert len(set(torch.cat(one).tolist())) == 9
    assert [len(rows) for rows in feddf_server._batches(2, 128, 3, rng)] == [2] * 3
    setup, _, updates = feddf_round()
    target = feddf_server._teacher(setup, updates, setup.public, [torch.tensor([4, 1]), torch.tensor([4])])  # type: ignore[arg-type]
    x = setup.public.batch(torch.tensor([1, 4]))[0]  # type: ignore[union-attr]
    close(target[[1, 4]], torch.stack([forward(u.parameters, x)[1] for u in updates]).mean(dim=0), atol=1e-4)
    assert not target[[0, 2, 3, 5, 6, 7, 8]].any()


def test_teachers_are_as_they_are_scored() -> None:
    """In evaluation mode, each with its own averaged statistics, which putting questions to it does not move."""
    config = tiny("feddf", **AVERAGED)
    strategy = strategies.build(config, federate(config))
    setup, state = strategy.setup, strategy.state
    assert isinstance(state, fedavg_server.State)
    assert setup.public is not None
    updates = [
        fedavg.Update(n * state.parameters, state.statistics + n * torch.rand(44), torch.tensor(10)) for n in (0.5, 1.5)
    ]
    rows = torch.arange(len(setup.public))
    target = feddf_server._teacher(setup, updates, setup.public, [rows[:7], rows[7:]])
    outputs = []
    for one in updates:
        setup.model.load(one.parameters, one.statistics)
        setup.staged.eval()
        with torch.no_grad():
            outputs.append(torch.cat([setup.model(setup.public.batch(row)[0]) for row in torch.split(rows, 1)]))
    close(target, (outputs[0] + outputs[1]) / 2, rtol=1e-4, atol=1e-5)


def test_the_student_gets_its_batchnorm_statistics_from_the_public_data() -> None:
    """With averaged statistics the student trains on from the average, as in the released code."""
    config = tiny("feddf", **{**AVERAGED, "feddf.steps": 5, "feddf.batch": 32})
    strategy = strategies.build(config, federate(config))
    state: Any = strategy.state
    updates = [fedavg.Update(state.parameters, state.statistics + n, torch.tensor(10)) for n in (0.0, 0.2)]
    after, _ = feddf_server.update(strategy.setup, state, updates, 1)
    average = state.statistics + 0.1
    assert not torch.allclose(after.statistics, average, atol=1e-3)
    assert torch.isfinite(after.statistics).all()


# FedEnsemble.


def test_the_ensembles_two_averages() -> None:
    """Logits are averaged as they are, probabilities in log space; one member with weight 1 is itself."""
    rng = torch.Generator().manual_seed(0)
    logits = [3 * torch.randn(4, 5, generator=rng) for _ in range(3)]
    weights = [0.5, 0.3, 0.2]
    mean = sum(w * f for w, f in zip(weights, logits, strict=True))
    close(ensemble(logits, weights, "logits"), mean)
    mixed = sum(w * f.softmax(1) for w, f in zip(weights, logits, strict=True))
    close(ensemble(logits, weights, "probabilities").softmax(1), mixed)
    assert torch.equal(ensemble(logits[:1], [1.0], "logits"), logits[0])
    close(ensemble(logits[:1], [1.0], "probabilities"), logits[0].log_softmax(1))


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, NORMED, AVERAGED], ids=str)
def test_an_ensemble_of_one_is_that_client(run_inline: RunInline, keys: Keys) -> None:
    """With one client per round the average is its model, so FedAvg and the ensemble predict alike, bit for bit."""
    one: Keys = {**keys, "run.clients-per-round": 1}
    together, avg = run_inline("fedensemble", **one), run_inline("fedavg", **one)
    assert together.rows("evaluations") == avg.rows("evaluations")


@pytest.mark.parametrize("members", ["cohort", "all"])
def test_the_ensemble_trains_as_fedavg(run_inline: RunInline, members: str) -> None:
    """Only the prediction differs; training needs the average alone, and gets no more."""
    together, avg = run_inline("fedensemble", **{"fedensemble.members": members}), run_inline("fedavg")
    assert torch.equal(parameters(together), parameters(avg))
    assert together.rows("evaluations") != avg.rows("evaluations")
    bytes_down = [set(run.frame("clients")["bytes_down"]) for run in (together, avg)]
    assert bytes_down[0] == bytes_down[1]


@pytest.mark.slow
def test_with_full_participation_all_members_are_the_cohort(run_inline: RunInline) -> None:
    """The two readings differ only in the clients that were not sampled."""
    runs = [
        run_inline("fedensemble", **{"fedensemble.members": m, "run.clients-per-round": 0}) for m in ("cohort", "all")
    ]
    assert runs[0].rows("evaluations") == runs[1].rows("evaluations")


@pytest.mark.parametrize("average", ["logits", "probabilities"])
@pytest.mark.parametrize(("members", "start"), [("cohort", 0), ("all", 4)])
def test_the_ensembles_prediction_is_that_of_the_rounds_models(
    worker: Callable[..., Any], members: str, start: int, average: str
) -> None:
    """Two of six clients: the other four hold what the round started from, or are left out."""
    keys: Keys = {"fedensemble.members": members, "fedensemble.average": average, "run.clients-per-round": 2}
    node = worker("fedensemble", **keys)
    setup = node.setup
    state = fedensemble_server.init(setup)
    trained = [
        node.half.update(node.job(1, c), fedensemble_server.broadcast(setup, state, 1), None, node.shard(c, "train"))
        for c in (0, 4)
    ]
    after, _ = fedensemble_server.update(setup, state, [outcome.update for outcome in trained], 1)
    sent = fedensemble_server.scoring(setup, after, 1)
    arrived = unpack(Scoring, pack([sent]), setup.sizes, ["the server"])[0]
    x, _ = node.shard(1, "test").batch(slice(None))
    logits = node.half.models(node.job(1, 1), arrived, None, node.shard(1, "train")).shared()(x)
    models = [outcome.update.parameters for outcome in trained] + [state.parameters] * start
    outputs = []
    for one in models:
        setup.model.load(one)
        with torch.no_grad():
            outputs.append(setup.model(x) if average == "logits" else setup.model(x).softmax(1))
    expected = torch.stack(outputs).mean(dim=0)
    close(logits if average == "logits" else logits.exp(), expected, atol=1e-5)
    assert len(arrived.start) == (len(state.parameters) if start else 0)
    assert wire_bytes(sent) > 3 * wire_bytes(fedensemble_server.broadcast(setup, after, 1)) * 0.99


def test_each_member_runs_with_its_own_averaged_statistics(worker: Callable[..., Any]) -> None:
    """A member is a client's parameters and, where these travel, its statistics."""
    node = worker("fedensemble", **{**AVERAGED, "run.clients-per-round": 2})
    setup = node.setup
    first = fedensemble_server.init(setup)
    updates = [fedavg.Update(node.initial, first.statistics + n + 0.1, torch.tensor(9)) for n in range(2)]
    sent = fedensemble_server.scoring(setup, fedensemble_server.update(setup, first, updates, 1)[0], 1)
    x, _ = node.shard(1, "test").batch(slice(None))
    logits = node.half.models(node.job(1, 1), sent, None, node.shard(1, "train")).shared()(x)
    outputs = []
    for update in updates:
        setup.model.load(update.parameters, update.statistics)
        with torch.no_grad():
            outputs.append(setup.staged.eval()(x))
    close(logits, sum(outputs) / 2, atol=1e-5)
    assert not torch.allclose(*outputs, atol=1e-2)


# FedDistill.


@DISTILL_VARIANTS
def test_feddistill_without_its_term_is_local(run_inline: RunInline, variant: str) -> None:
    """Outputs are exchanged and never heard."""
    silent = run_inline("feddistill", **{"feddistill.variant": variant, "feddistill.weight": 0.0})
    assert silent.rows("evaluations") == run_inline("local").rows("evaluations")


@pytest.mark.slow
@DISTILL_VARIANTS
@pytest.mark.parametrize("keys", [{}, NORMED, AVERAGED], ids=str)
@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_feddistill_plus_without_its_term_is_fedavg(
    run_inline: RunInline, variant: str, keys: Keys, weighting: str
) -> None:
    """FedDistill+ averages the models as FedAvg does."""
    own: Keys = {"feddistill.variant": variant, "feddistill.weight": 0.0, "feddistill.share-model": True}
    plus = run_inline("feddistill", **keys, **own, **{"feddistill.weighting": weighting})
    avg = run_inline("fedavg", **keys, **{"fedavg.weighting": weighting})
    assert torch.equal(parameters(plus), parameters(avg))
    assert plus.rows("evaluations") == avg.rows("evaluations")


@DISTILL_VARIANTS
def test_the_first_round_has_no_teacher(run_inline: RunInline, variant: str) -> None:
    """Nobody has sent anything yet, so the first round is local training; the second is not."""
    runs = [run_inline("feddistill", **{"feddistill.variant": variant}), run_inline("local")]
    first, later = (
        [[r for r in run.rows("evaluations") if (r["round"] == 1) == one] for run in runs] for one in (True, False)
    )
    assert first[0] == first[1]
    assert later[0] != later[1]


def test_nobody_is_taught_by_itself(run_inline: RunInline) -> None:
    """In the paper the teacher is the mean over the others, so a federation of one is local training."""
    single: Keys = {"run.clients": 1, "run.clients-per-round": 1}
    alone = run_inline("feddistill", **single, **{"feddistill.variant": "paper"})
    assert alone.rows("evaluations") == run_inline("local", **single).rows("evaluations")
    released = run_inline("feddistill", **single, **{"feddistill.variant": "authors"})
    assert released.rows("evaluations") != alone.rows("evaluations")


def test_the_model_is_in_the_payload_only_when_it_is_shared() -> None:
    """What a method keeps private is not in its types."""
    method = load("feddistill")
    for share, expected in ((False, False), (True, True)):
        under = method.under(feddistill.Hyper(share_model=share))
        assert ("parameters" in under.Broadcast.specs()) is expected
        assert ("parameters" in under.Update.specs()) is expected
        assert ("statistics" in under.Update.specs()) is expected
        assert ("parameters" in under.State.specs()) is not expected


def test_clients_may_have_different_models(run_inline: RunInline) -> None:
    """Outputs have the same shape for every model; FedDistill+ needs one model for all."""
    keys: Keys = {"model.client-models": "mlp,fedgen_cnn"}
    assert run_inline("feddistill", **keys).finished
    with pytest.raises(UserError, match="exchanges parameters"):
        run_inline("feddistill", **keys, **{"feddistill.share-model": True})


def test_federated_distillation_is_the_authors() -> None:
    """Three rounds of two clients: tracker, mean over clients, and the steps that the teacher takes part in."""
    case = AUTHORS["feddistill"]
    setup = small("feddistill", **{"train.local-steps": case["steps"]})
    server = feddistill_server.init(setup)
    states: list[Any] = [None, None]
    for number, recorded in enumerate(case["rounds"], start=1):
        sent = feddistill_server.broadcast(setup, server, number)
        updates = []
        for client, seed in enumerate(case["model_seeds"]):
            job = job_of(setup, number, client, pattern(seed))
            outcome = feddistill_client.update(job, sent, states[client], SHARDS[client])
            states[client] = outcome.state
            close(states[client].parameters, recorded["parameters"][client], atol=1e-5)
            close(outcome.update.outputs, recorded["means"][client], atol=1e-5)  # type: ignore[attr-defined]
            updates.append(outcome.update)
        server, _ = feddistill_server.update(setup, server, updates, number)  # type: ignore[arg-type]
        close(server.outputs / server.contributors[:, None], recorded["global"], atol=1e-5)


def test_federated_distillation_of_the_paper_by_hand() -> None:
    """Algorithm 1 of Jeong et al. for two clients: each is taught by the other, where the other has the class.

    Client 0 holds classes 0 and 1, client 1 holds 1 and 2, so only class 1 has a teacher.  The step's gradient is that
    of CE(f, y) + gamma CE(f, teacher), written in probabilities.
    """
    gamma, lr = 0.7, AUTHORS["lr"]
    setup = small("feddistill", **{"feddistill.variant": "paper", "feddistill.weight": gamma})
    server = feddistill_server.init(setup)
    thetas, states, means = [pattern(3), pattern(4)], [], []
    updates: list[Any] = []
    for client in range(2):
        x, y = SHARDS[client].batch(slice(None))
        probabilities = forward(thetas[client], x)[1].softmax(1)
        means.append(torch.stack([probabilities[y == c].mean(dim=0) for c in range(3)]))
        job = job_of(setup, 1, client, thetas[client])
        outcome = feddistill_client.update(job, feddistill_server.broadcast(setup, server, 1), None, SHARDS[client])
        updates.append(outcome.update)
        states.append(outcome.state)
        assert updates[-1].held.tolist() == [[1, 1, 0], [0, 1, 1]][client]
        close(updates[-1].outputs, means[-1].nan_to_num(0.0))
    server, _ = feddistill_server.update(setup, server, updates, 1)
    assert server.contributors.tolist() == [1, 2, 1]
    for client in range(2):
        state: Any = states[client]
        theta = state.parameters.clone().requires_grad_()
        x, y = SHARDS[client].batch(slice(None))
        logp = forward(theta, x)[1].log_softmax(1)
        losses = -logp[torch.arange(len(y)), y]
        losses = losses + gamma * (y == 1) * -(means[1 - client][1] * logp).sum(dim=1)
        losses.mean().backward()
        job = job_of(setup, 2, client, thetas[client], last_round=1)
        outcome = feddistill_client.update(job, feddistill_server.broadcast(setup, server, 2), state, SHARDS[client])
        assert theta.grad is not None
        close(outcome.state.parameters, theta.detach() - lr * theta.grad, atol=1e-6)  # type: ignore[union-attr]


def test_a_client_that_was_not_in_the_last_round_takes_nothing_out() -> None:
    """Leaving oneself out needs having been in: else somebody else's outputs would be taken off."""
    setup = small("feddistill", **{"feddistill.variant": "paper"})
    sums, counts = torch.full((3, 3), 0.2), torch.tensor([1, 2, 3])
    state = feddistill.State(pattern(3), torch.zeros(0), sums, torch.tensor([1, 1, 1]))
    sent = feddistill.Broadcast(torch.full((3, 3), 0.6), counts)
    for round, contributors in ((2, [0, 1, 2]), (3, [1, 2, 3])):
        teacher, known = feddistill_client._teacher(job_of(setup, round, 0, pattern(3), last_round=1), sent, state)
        assert known.tolist() == [c > 0 for c in contributors]
        rest = 0.4 if round == 2 else 0.6
        close(teacher[known].exp(), [[rest / c] * 3 for c in contributors if c])
        assert torch.isfinite(teacher).all()


# FedProto.


@pytest.mark.slow
@PROTO_VARIANTS
@pytest.mark.parametrize("keys", [{}, NORMED], ids=str)
def test_fedproto_without_its_term_is_local(run_inline: RunInline, variant: str, keys: Keys) -> None:
    """Prototypes are exchanged and never heard; the head predicts."""
    own: Keys = {"fedproto.variant": variant, "fedproto.weight": 0.0, "fedproto.predict": "head"}
    assert run_inline("fedproto", **keys, **own).rows("evaluations") == run_inline("local", **keys).rows("evaluations")


def test_no_model_crosses_the_network() -> None:
    """Prototypes and counts are all there is, and the server has no model either."""
    method = load("fedproto")
    assert set(method.Broadcast.specs()) == {"prototypes", "known"}
    assert set(method.Update.specs()) == {"prototypes", "counts", "examples"}
    assert set(fedproto_server.State.specs()) == {"prototypes", "known"}


def test_fedproto_takes_clients_with_different_models(run_inline: RunInline) -> None:
    """Models need only agree on the width of the features."""
    run = run_inline("fedproto", **{"model.hidden": 32, "model.client-models": "mlp,fedgen_cnn"})
    assert run.finished
    assert load_file(run.folder / "final.safetensors")["prototypes"].shape == (10, 32)
    with pytest.raises(UserError, match="features"):
        run_inline("fedproto", **{"model.hidden": 31, "model.client-models": "mlp,fedgen_cnn"})


@pytest.mark.slow
@pytest.mark.parametrize("keys", [NORMED, AVERAGED], ids=str)
@PROTO_VARIANTS
def test_fedproto_keeps_batchnorm_at_home(run_inline: RunInline, variant: str, keys: Keys) -> None:
    """Nothing of the model is averaged, so the setting that would average statistics has nothing to do."""
    runs = [run_inline("fedproto", **k, **{"fedproto.variant": variant}) for k in (keys, NORMED)]
    assert runs[0].rows("evaluations") == runs[1].rows("evaluations")


def test_prototypes_are_the_authors() -> None:
    """Three rounds of two clients: both losses, the step, the local and the global prototypes.

    In the third round class 2 has no global prototype: its examples are in the mean with a distance of zero.
    """
    case = AUTHORS["fedproto"]
    setup = small("fedproto", **{"fedproto.weight": case["weight"]})
    server = fedproto_server.init(setup)
    states: list[Any] = [None, None]
    for number, recorded in enumerate(case["rounds"], start=1):
        server = dataclasses.replace(server, known=torch.tensor(recorded["known"]))
        sent = fedproto_server.broadcast(setup, server, number)
        updates = []
        for client, seed in enumerate(case["model_seeds"]):
            outcome = fedproto_client.update(
                job_of(setup, number, client, pattern(seed)), sent, states[client], SHARDS[client]
            )
            states[client], update = outcome.state, outcome.update
            close(states[client].parameters, recorded["parameters"][client], atol=1e-5)
            means = {name: total / weight for name, (total, weight) in outcome.metrics.items()}
            close([means["loss"], means.get("prototype_loss", 0.0)], recorded["losses"][client])
            assert isinstance(update, fedproto.Update)
            for c in range(3):
                expected = recorded["prototypes"][client].get(str(c))
                assert int(update.counts[c]) == (expected is not None)
                close(update.prototypes[c], expected or [0.0] * 5)
            updates.append(update)
        server, _ = fedproto_server.update(setup, server, updates, number)
        close(server.prototypes, [recorded["global"][str(c)] for c in range(3)])


def test_the_distance_of_eq_8_by_hand() -> None:
    """Means over the batch's members of a class, Euclidean, summed over classes that have a global prototype."""
    features = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 0.0], [5.0, 5.0]])
    labels = torch.tensor([0, 0, 2, 3])
    prototypes = torch.tensor([[2.0, 0.0], [9.0, 9.0], [3.0, 4.0], [0.0, 0.0]])
    known = torch.tensor([True, True, True, False])
    # class 0: |(2, 3) - (2, 0)| = 3; class 1 is not in the batch; class 2: 5; class 3 has no prototype.
    close(fedproto_client.prototype_distance(features, labels, prototypes, known), [3.0, 5.0])
    close(fedproto_client.squared_error(features, labels, prototypes, known), [2.5, 8.5, 12.5, 0.0])


@PROTO_VARIANTS
def test_the_regulariser_agrees_with_finite_differences(variant: str) -> None:
    """The pull goes to the prototype, through every feature, and never into the prototype."""
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(6, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    prototypes = torch.randn(3, 4, generator=rng, dtype=torch.float64)
    labels, known = torch.tensor([0, 0, 1, 2, 1, 0]), torch.tensor([True, True, False])

    def loss(z: torch.Tensor) -> torch.Tensor:
        if variant == "paper":
            return fedproto_client.prototype_distance(z, labels, prototypes, known).sum()
        return fedproto_client.squared_error(z, labels, prototypes, known).mean()

    assert torch.autograd.gradcheck(loss, (features,))
    loss(features).backward()
    assert features.grad is not None
    with torch.no_grad():
        assert loss(features - 1e-3 * features.grad) < loss(features)
    assert not features.grad[3].any()


def test_a_distance_of_zero_has_no_gradient() -> None:
    """A norm's derivative at zero would be 0 / 0, and one NaN spoils the model."""
    features = torch.ones(2, 3, requires_grad=True)
    fedproto_client.prototype_distance(
        features, torch.tensor([0, 0]), torch.ones(1, 3), torch.tensor([True])
    ).sum().backward()
    assert features.grad is not None
    assert not features.grad.any()


def test_the_step_of_the_paper_by_hand() -> None:
    """Eq. 7: the gradient of CE plus lambda times Eq. 8; what is sent is Eq. 3 with the trained model."""
    weight, lr = 0.7, AUTHORS["lr"]
    setup = small("fedproto", **{"fedproto.variant": "paper", "fedproto.weight": weight})
    prototypes = torch.arange(15.0).reshape(3, 5) / 5
    sent = fedproto.Broadcast(prototypes, torch.tensor([1, 1, 0]))
    theta = pattern(6).requires_grad_()
    x, y = SHARDS[1].batch(slice(None))
    z, logits = forward(theta, x)
    loss = torch.nn.functional.cross_entropy(logits, y)
    (loss + weight * (z[y == 1].mean(dim=0) - prototypes[1]).norm()).backward()
    outcome = fedproto_client.update(job_of(setup, 2, 1, pattern(6)), sent, None, SHARDS[1])
    assert theta.grad is not None
    trained = theta.detach() - lr * theta.grad
    close(outcome.state.parameters, trained)  # type: ignore[union-attr]
    update = outcome.update
    assert isinstance(update, fedproto.Update)
    assert update.counts.tolist() == [0, 2, 6]
    after = forward(trained, x)[0]
    close(update.prototypes[1:], torch.stack([after[y == c].mean(dim=0) for c in (1, 2)]))
    assert not update.prototypes[0].any()


def test_prototypes_of_the_paper_are_those_of_the_model_that_is_scored(worker: Callable[..., Any]) -> None:
    """With BatchNorm: Eq. 3 in evaluation mode, with the client's own statistics, an image at a time."""
    node = worker("fedproto", **AVERAGED, **{"fedproto.variant": "paper"})
    first = fedproto_server.broadcast(node.setup, fedproto_server.init(node.setup), 1)
    shard = node.shard(0, "train")
    outcome = node.half.update(node.job(1, 0), first, None, shard)
    node.setup.model.load(outcome.state.parameters, outcome.state.statistics)
    node.setup.staged.eval()
    x, y = shard.batch(slice(None))
    with torch.no_grad():
        features = torch.cat([node.setup.model(one, stop="head") for one in torch.split(x, 1)])
    held = y.unique()
    close(outcome.update.prototypes[held], torch.stack([features[y == c].mean(dim=0) for c in held]), 1e-4, 1e-5)
    assert outcome.update.counts.tolist() == torch.bincount(y, minlength=10).tolist()


@pytest.mark.parametrize(
    ("keys", "shares"),
    [
        ({"fedproto.variant": "authors"}, (0.5, 0.5)),
        ({"fedproto.variant": "paper"}, (0.25, 0.75)),
        ({"fedproto.variant": "paper", "fedproto.eq6": "printed"}, (0.125, 0.375)),
    ],
    ids=str,
)
def test_prototypes_are_averaged_over_the_clients_that_have_the_class(keys: Keys, shares: tuple[float, float]) -> None:
    """Class 0 is held by both, class 1 by one, class 2 by none: its old prototype stays."""
    setup = small("fedproto", **keys)
    printed = keys.get("fedproto.eq6") == "printed"
    counts = [[1, 0, 0], [1, 1, 0]] if keys["fedproto.variant"] == "authors" else [[2, 0, 0], [6, 9, 0]]
    updates = [
        fedproto.Update(torch.full((3, 5), value), torch.tensor(n), torch.tensor(9))
        for value, n in zip((1.0, 10.0), counts, strict=True)
    ]
    state = fedproto_server.State(torch.full((3, 5), -4.0), torch.tensor([0, 0, 1]))
    after, _ = fedproto_server.update(setup, state, updates, 1)
    assert sum(shares) == (0.5 if printed else 1.0)
    close(after.prototypes[:, 0], [shares[0] + 10 * shares[1], 10.0, -4.0])
    assert after.known.tolist() == [1, 1, 1]


def test_the_nearest_prototype_predicts() -> None:
    """Eq. 4, with every other class behind the candidates and the loss finite."""
    features = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    prototypes = torch.tensor([[3.0, 4.0], [9.0, 0.0], [0.0, 0.0]])
    close(
        fedproto_client.nearest(features, prototypes, torch.tensor([True, True, True])),
        [[-5.0, -9.0, 0.0], [-math.sqrt(65), -1.0, -10.0]],
    )
    close(
        fedproto_client.nearest(features, prototypes, torch.tensor([True, True, False])),
        [[-5.0, -9.0, -10.0], [-math.sqrt(65), -1.0, -math.sqrt(65) - 1]],
    )


@PROTO_VARIANTS
def test_who_may_be_the_nearest(variant: str) -> None:
    """The released code looks among the classes that the client holds, the paper's Eq. 4 among all."""
    setup = small("fedproto", **{"fedproto.variant": variant})
    job, x = job_of(setup, 1, 0, pattern(5)), SHARDS[0].batch(slice(None))[0]
    z, logits = forward(pattern(5), x)
    prototypes = torch.stack([z[0] + 9, z[0] + 5, z[0]])  # client 0 holds classes 0 and 1
    for known, expected in (([1, 1, 1], 2 if variant == "paper" else 1), ([0, 0, 0], int(logits[0].argmax()))):
        sent = fedproto.Broadcast(prototypes, torch.tensor(known))
        models = fedproto_client.models(job, sent, None, SHARDS[0])
        assert models.shared is None
        assert models.personal is not None
        assert int(models.personal()(x)[0].argmax()) == expected


@pytest.mark.parametrize("method", ["feddistill", "fedensemble", "feddf", "fedproto"])
def test_survives_a_client_with_one_example(worker: Callable[..., Any], method: str) -> None:
    """The smallest client there is trains on its one example in every step."""
    node = worker(method)
    server = importlib.import_module(f"strategies.{method}")
    shard = node.shard(0, "train")
    one = dataclasses.replace(shard, x=shard.x[:1], y=shard.y[:1])
    config = node.config
    state = strategies.build(config, federate(config)).state
    sent = server.broadcast(node.setup, state, 2)
    outcome = node.half.update(node.job(2, 0), sent, None, one)
    outcome.update.check(node.setup.sizes, "the client")
    assert outcome.metrics["loss"][1] == 4
