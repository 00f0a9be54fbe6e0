"""The one suite that every method passes; methods and their settings are discovered, never listed here."""

from __future__ import annotations

import functools
import gc
import itertools
import json
import os
import random
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import numpy as np
import pytest
import torch
from conftest import by_case, case_id, cases, normed_cases, tiny
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result, Strategy
from pydantic import ValidationError
from pydantic.fields import FieldInfo

import strategies
from clients.app import Worker, _said, _worker
from clients.app import app as client_app
from clients.training import initial_statistics
from fedkd.config import Config, HyperParameters, Scalar, TrainSection
from fedkd.data import federate
from fedkd.ignored import ignored
from fedkd.method import load, names
from fedkd.payload import Record, pack, unpack
from fedkd.results import Recorder, Run
from fedkd.setup import Setup
from sims.inline import run_apps

RunInline = Callable[..., Run]
Keys = dict[str, Scalar]

NORMED = [
    pytest.param(*case, marks=[] if case[0] == "fedavg" else pytest.mark.slow, id="-".join(map(case_id, case)))
    for case in normed_cases()
]
by_normed = pytest.mark.parametrize(("method", "variant"), NORMED, ids=case_id)
"""Run a test with BatchNorm, which the model of the tiny runs has not; one method does for the fast tests."""
with_and_without_batchnorm = pytest.mark.parametrize(("method", "variant"), [*cases(), *NORMED], ids=case_id)


# 1. A history is a function of (configuration, seed).


@pytest.mark.slow
@by_case
def test_the_same_run_twice_has_one_digest(run_inline: RunInline, method: str, variant: Keys) -> None:
    """The global generators of Python, NumPy and PyTorch must not matter, nor what ran before in the process."""
    first = run_inline(method, **variant)
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    assert run_inline(method, again=True, **variant).digest() == first.digest()


ELSEWHERE = """
import json, sys
from fedkd.config import Config
from fedkd.results import Run
from sims.inline import run
for flat in json.loads(sys.argv[1]):
    run(Config.from_flat(flat), nodes=2)
    print("digest", Run.open(flat["run.dir"]).digest())
"""


@pytest.mark.slow
def test_another_process_gives_the_same_digests(run_inline: RunInline, tmp_path: Path) -> None:
    """Neither the order of sets, which Python draws anew for each process, nor idle threads may matter."""
    configs = [tiny(m, **variant, **{"run.dir": str(tmp_path / f"{m}{n}")}) for n, (m, variant) in enumerate(cases())]
    argument = json.dumps([config.flat() for config in configs])
    environment = {**os.environ, "PYTHONHASHSEED": "4242", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, argument],
        env=environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    digests = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("digest ")]
    assert digests == [run_inline(method, **variant).digest() for method, variant in cases()]


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [2, 3])
@by_case
def test_the_number_of_nodes_does_not_matter(run_inline: RunInline, method: str, variant: Keys, nodes: int) -> None:
    """Nodes are workers: who trains where must not reach a result."""
    assert run_inline(method, nodes=nodes, **variant).digest() == run_inline(method, **variant).digest()


@pytest.mark.slow
@by_case
def test_another_seed_gives_another_run(run_inline: RunInline, method: str, variant: Keys) -> None:
    """A seed that is not read would make every repetition of an experiment the same."""
    other = run_inline(method, **variant, **{"run.seed": 2, "data.seed": 1})
    assert other.digest() != run_inline(method, **variant).digest()


@pytest.mark.slow
@by_normed
def test_the_number_of_nodes_does_not_matter_to_batchnorm(run_inline: RunInline, method: str, variant: Keys) -> None:
    """Statistics are the client's or the server's, never those that the last client left on a node."""
    keys: Keys = {**variant, **SHORT}
    assert run_inline(method, nodes=2, **keys).digest() == run_inline(method, **keys).digest()


@pytest.mark.slow
@by_case
def test_is_a_genuine_flower_strategy(run_inline: RunInline, tmp_path: Path, method: str, variant: Keys) -> None:
    """``strategies.build`` works in anybody's ServerApp: its ``start`` leaves what ``fedkd run`` does."""
    app = ServerApp()
    results: list[Result] = []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        config = Config.from_flat(context.run_config)
        data = federate(config)
        recorder = Recorder(tmp_path, config, data.csv(), data.fingerprint())
        strategy = strategies.build(config, data, recorder=recorder)
        assert isinstance(strategy, Strategy)
        results.append(strategy.start(grid, ArrayRecord(), num_rounds=config.run.rounds))
        recorder.finish(strategy.state)

    run_apps(app, client_app, tiny(method, **variant, **{"run.dir": str(tmp_path)}), nodes=2)
    expected = run_inline(method, **variant)
    assert Run.open(tmp_path).digest() == expected.digest()
    [result] = results
    assert result.train_metrics_clientapp.keys() == {1, 2, 3}
    rows = expected.frame("clients").groupby("round")[["loss_sum", "loss_weight"]].sum()
    for round, metrics in result.train_metrics_clientapp.items():
        assert metrics["loss"] == pytest.approx(rows["loss_sum"][round] / rows["loss_weight"][round])


# 2. Every hyper-parameter changes the result.


SHORT: Keys = {"run.rounds": 2, "run.eval-every": 2}
"""Two rounds: some settings act from the second one on."""
THREE: Keys = {"run.rounds": 3, "run.eval-every": 3}
"""And some on what the server keeps, which is heard a round later."""


def only(field: FieldInfo) -> dict[str, Scalar]:
    """Return the settings without which a field has no effect, as its declaration says."""
    extra = field.json_schema_extra
    found = extra.get("only", {}) if isinstance(extra, dict) else {}
    assert isinstance(found, dict)
    return found  # type: ignore[return-value]


def changed_values(kind: type[Any], name: str, value: Any, stages: Sequence[str]) -> list[Any]:
    """Return other values of a field that its declaration allows."""
    annotation = kind.model_fields[name].annotation
    if get_origin(annotation) is Literal:
        found: list[Any] = list(get_args(annotation))
    elif annotation is bool:
        found = [not value]
    elif annotation is int:
        found = [value + 1, value * 2, value - 1, 1]
    elif annotation is float:
        found = [value * 2, value / 2, 0.5]
    elif annotation is str and value in ("", *stages):
        found = list(stages)
    else:
        raise AssertionError(f"no rule how to change {kind.__name__}.{name}: {annotation}; add one here")
    return [other for other in found if other != value and _allowed(kind, name, other)]


def _allowed(kind: type[Any], name: str, value: Any) -> bool:
    try:
        kind.model_validate({name: value})
    except ValidationError:
        return False
    return True


def key(method: str, field: str) -> str:
    """Return a field's key as users write it; one with a dot is a key already."""
    return field if "." in field else f"{method}.{field.replace('_', '-')}"


def fields() -> list[tuple[str, Keys, str]]:
    """Return (method, keys that select the variant, field) wherever the field must have an effect."""
    return [
        (method, variant, name)
        for method, variant in cases()
        for name, field in load(method).hyper.model_fields.items()
        if all(variant.get(key(method, other), wanted) == wanted for other, wanted in only(field).items())
        and not (name == "variant" and variant != cases_of(method)[0])
    ]


def cases_of(method: str) -> list[Keys]:
    """Return the variants of one method."""
    return [variant for name, variant in cases() if name == method]


def learned(run: Run) -> list[dict[str, Any]]:
    """Return what training and scoring gave: no bytes, no times, and no hash of what the server keeps."""
    return [
        {name: value for name, value in row.items() if not name.startswith(("bytes_", "seconds"))}
        for log in ("clients", "evaluations")
        for row in run.rows(log)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "variant", "field"), fields(), ids=case_id)
def test_every_hyper_parameter_changes_the_result(
    run_inline: RunInline, method: str, variant: Keys, field: str
) -> None:
    """A setting that is parsed and never read misleads whoever tunes it; each of several choices is one of its own."""
    hyper = load(method).hyper
    needed = {key(method, other): value for other, value in only(hyper.model_fields[field]).items()}
    base: Keys = {**THREE, **needed, **variant}
    config = tiny(method, **base)
    stages = setup_of(config).staged.stage_names
    values = changed_values(hyper, field, getattr(config.hyper, field), stages)
    before = learned(run_inline(method, **base))
    changed = (learned(run_inline(method, **{**base, key(method, field): value})) for value in values)
    if get_origin(hyper.model_fields[field].annotation) is Literal:
        every = [before, *changed]
        assert all(one != other for one, other in itertools.combinations(every, 2)), f"{values}: some are the same"
    else:
        assert any(rows != before for rows in changed), f"{key(method, field)} changes nothing"


def foreign(method: str, variant: Keys) -> list[str]:
    """Return the fields that are another variant's."""
    return [
        name
        for name, field in load(method).hyper.model_fields.items()
        if any(variant.get(key(method, other), wanted) != wanted for other, wanted in only(field).items())
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "variant"), [case for case in cases() if foreign(*case)], ids=case_id)
def test_hyper_parameters_of_another_variant_change_nothing(run_inline: RunInline, method: str, variant: Keys) -> None:
    """What a contract marks as another variant's is not read by this one, so variants are never blended."""
    hyper, config = load(method).hyper, tiny(method, **variant)
    stages = setup_of(config).staged.stage_names
    changes = {
        key(method, n): changed_values(hyper, n, getattr(config.hyper, n), stages)[0] for n in foreign(method, variant)
    }
    assert tiny(method, **variant, **changes).hyper != config.hyper
    assert run_inline(method, **variant, **changes).digest() == run_inline(method, **variant).digest()


NEEDED_BY_TRAIN: dict[str, Keys] = {
    "local_epochs": {"train.batch-size": 48, "train.local-steps": 0},
    "last_batch": {"train.batch-size": 48, "train.local-steps": 0},
    "lr_decay_from": {"train.lr-decay": 0.5},
}
"""Settings of local training that act only beside others."""


@pytest.mark.slow
@pytest.mark.parametrize("field", TrainSection.model_fields)
@pytest.mark.parametrize("method", names())
def test_every_setting_of_local_training_changes_the_result(run_inline: RunInline, method: str, field: str) -> None:
    """The common settings are held to the same rule as a method's own, for every method that does not say otherwise."""
    base = {**NEEDED_BY_TRAIN.get(field, {}), **(THREE if field == "lr_decay_from" else SHORT)}
    config, name = tiny(method, **base), key("train", field)
    assert ignored(config, [name]) == []
    value = changed_values(TrainSection, field, getattr(config.train, field), ())[0]
    changed = learned(run_inline(method, **{**base, name: value}))
    assert changed != learned(run_inline(method, **base)), f"{name} changes nothing for {method}"


@pytest.mark.slow
@pytest.mark.parametrize("method", names())
def test_every_method_computes_in_bfloat16_where_it_is_asked_to(run_inline: RunInline, method: str) -> None:
    """What is learned differs, and scores are about the same."""
    exact = run_inline(method, **SHORT)
    rounded = run_inline(method, **SHORT, **{"model.precision": "bfloat16"})
    assert learned(rounded) != learned(exact)
    correct = [run.frame("evaluations").filter(like="_correct").sum().iloc[0] for run in (exact, rounded)]
    assert abs(correct[1] - correct[0]) <= 0.2 * exact.frame("evaluations")["total"].sum()


def test_a_hyper_parameter_that_changes_nothing_would_be_found() -> None:
    """The rules for changed values give another value for every kind of field there is."""

    class Every(HyperParameters):
        flag: bool = False
        count: int = 3
        share: float = 0.98
        choice: Literal["a", "b"] = "a"
        layer: str = "head"

    for name, field in Every.model_fields.items():
        assert changed_values(Every, name, field.default, ("hidden", "head"))


# 3. Payloads travel without loss.


def setup_of(config: Config) -> Setup:
    """Return what both halves start from."""
    data = federate(config)
    return Setup.build(config, data.images.shape, data.classes, torch.device("cpu"))


def same_bits(first: Record, second: Record) -> bool:
    """Compare two records bit for bit."""
    return all(
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()
        for a, b in zip(first.tensors().values(), second.tensors().values(), strict=True)
    )


COHORT = (0, 2, 4)


class Exchange(NamedTuple):
    """A round, by client where there is one record for each."""

    broadcast: Record
    personal: list[Record]
    before: list[Record | None]
    outcomes: list[Any]

    @property
    def updates(self) -> list[Record]:
        """What comes back."""
        return [outcome.update for outcome in self.outcomes]


def participate(worker: Worker, round: int, client: int, sent: Record, personal: Record | None, state: Any) -> Any:
    """Return what one participation of a client gives."""
    job = worker.job(round, client, personal, last_round=round - 1)
    return worker.half.update(job, sent, state, worker.shard(client, "train"))


Play = Callable[..., tuple[Any, list[Exchange]]]


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Play:
    """Return ``play(method, **flat)`` to a node and what crosses the network in two rounds of a tiny configuration."""

    @functools.cache
    def played(method: str, *flat: tuple[str, Scalar]) -> tuple[Any, list[Exchange]]:
        node = Worker(tiny(method, **dict(flat), **{"run.dir": str(tmp_path_factory.mktemp("node"))}), run_id=1)
        return node, exchanges(node, rounds=2)

    return lambda method, **flat: played(method, *flat.items())


def exchanges(worker: Worker, rounds: int) -> list[Exchange]:
    """Let three clients take part in some rounds, without the apps in between."""
    strategy = strategies.build(worker.config, federate(worker.config))
    server, setup, state = strategy.half, strategy.setup, strategy.state
    found: list[Exchange] = []
    for round in range(1, rounds + 1):
        if found:
            state, _ = server.update(setup, state, found[-1].updates, round - 1)
        sent, personal = server.broadcast(setup, state, round), personals(strategy, state, round)
        before = [outcome.state for outcome in found[-1].outcomes] if found else [None] * len(COHORT)
        each = zip(COHORT, personal or [None] * len(COHORT), before, strict=True)
        outcomes = [participate(worker, round, client, sent, mine, kept) for client, mine, kept in each]
        found.append(Exchange(sent, personal, before, outcomes))
    return found


def personals(strategy: Any, state: Record, round: int) -> list[Record]:
    """Return what each client gets for itself alone; empty for methods without."""
    if strategy.method.Personal is None:
        return []
    return [strategy.half.personal(strategy.setup, state, round, client) for client in COHORT]


@with_and_without_batchnorm
def test_payloads_survive_the_journey(play: Play, method: str, variant: Keys) -> None:
    """What a half returns and what the other side reads are the same bits, and so is what a client kept."""
    node, rounds = play(method, **variant)
    for round, sent in enumerate(rounds, start=1):
        for records in filter(None, ([sent.broadcast], sent.personal, sent.updates)):
            kind, owners = type(records[0]), [f"client {n}" for n in range(len(records))]
            arrived = unpack(kind, pack(records), node.setup.sizes, owners)
            assert all(same_bits(a, b) for a, b in zip(records, arrived, strict=True))
        for client, outcome in zip(COHORT, sent.outcomes, strict=True):
            node.store.save(outcome.state, client, round, round - 1)
            assert same_bits(node.state(client, round), outcome.state)


@by_normed
def test_statistics_are_where_the_setting_says(play: Play, method: str, variant: Keys) -> None:
    """Every client keeps some that its data has moved, and those of the next round's model moved where they travel."""
    node, (first, second) = play(method, **variant)
    found = [outcome.state.statistics for outcome in first.outcomes]
    if variant["model.norm-statistics"] == "averaged":
        sent = [record for record in (second.broadcast, *second.personal) if hasattr(record, "statistics")]
        found += [record.statistics for record in (*first.updates, *sent)]  # type: ignore[attr-defined]
    for statistics in found:
        start = initial_statistics(node.setup.model)
        assert len(statistics.flatten())
        assert not torch.isclose(statistics, start[: statistics.shape[-1]]).all(dim=-1).any()


@by_case
def test_halves_return_the_types_of_the_contract(play: Play, method: str, variant: Keys) -> None:
    """Nothing but the declared payload can cross the network, and state is what the contract says."""
    node, rounds = play(method, **variant)
    for sent in rounds:
        assert type(sent.broadcast) is node.method.Broadcast
        assert all(type(update) is node.method.Update for update in sent.updates)
        assert all(type(mine) is node.method.Personal for mine in sent.personal)
        assert all(outcome.state is None or type(outcome.state) is node.method.State for outcome in sent.outcomes)


@with_and_without_batchnorm
def test_a_half_is_a_function_of_its_arguments(play: Play, method: str, variant: Keys) -> None:
    """What another client left in the shared workspaces must not leak into the next one's participation."""
    node, rounds = play(method, **variant)
    for round, sent in enumerate(rounds, start=1):
        personal = sent.personal[0] if sent.personal else None
        again = participate(node, round, COHORT[0], sent.broadcast, personal, sent.before[0])
        assert same_bits(sent.updates[0], again.update)
        assert (again.state is None) == (sent.outcomes[0].state is None)
        assert again.state is None or same_bits(sent.outcomes[0].state, again.state)


# 4. Hard shards.


def check_complete(run: Run) -> None:
    """Compare the logs with the partition and with each other (what point 5 asks)."""
    settings, parts = run.config.run, run.partition
    tests = parts[parts["split"] == "test"].set_index("client")["examples"]
    trains = parts[parts["split"] == "train"].set_index("client")["examples"]
    evaluations, clients, rounds = run.frame("evaluations"), run.frame("clients"), run.frame("rounds")
    assert rounds["round"].tolist() == list(range(1, settings.rounds + 1))
    for _, group in evaluations.groupby("round"):
        assert group["client"].tolist() == list(range(settings.clients))
        assert group["total"].tolist() == tests.tolist()
        for kind in ("global", "personal"):
            if f"{kind}_correct" in group:
                assert group[f"{kind}_correct"].between(0, group["total"]).all()
                assert np.isfinite(group[f"{kind}_loss_sum"]).all()
    for number, cohort in zip(rounds["round"], rounds["clients"], strict=True):
        group = clients[clients["round"] == number]
        assert group["client"].tolist() == cohort
        assert len(cohort) == settings.cohort
        assert group["examples"].tolist() == trains[cohort].tolist()
    assert run.finished


@pytest.mark.slow
@by_case
def test_survives_clients_with_one_class(run_inline: RunInline, method: str, variant: Keys) -> None:
    """With one class per client every local gradient pulls to one label, and most class counts are zero."""
    run = run_inline(
        method, **variant, **{"data.partition": "pathological", "data.classes-per-client": 1, "run.clients": 10}
    )
    check_complete(run)
    held = run.partition.filter(like="class_") > 0
    assert (held.sum(axis=1) == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("last_batch", ["keep", "drop"])
@by_case
def test_survives_clients_smaller_than_a_batch(
    run_inline: RunInline, method: str, variant: Keys, last_batch: str
) -> None:
    """A client that has fewer examples than a batch uses all it has in every step."""
    large: Keys = {"train.batch-size": 256, "train.last-batch": last_batch, "train.local-steps": 2}
    run = run_inline(method, **variant, **SHORT, **large, **{"run.clients-per-round": 0})
    check_complete(run)
    clients = run.frame("clients")
    small = clients[clients["examples"] < 256]
    assert len(small)
    held_out = small.get("held_out_sum", 0)  # by methods that validate models
    assert (small["loss_weight"] == 2 * (small["examples"] - held_out)).all()


def test_batchnorm_that_cannot_be_trained_comes_with_advice() -> None:
    """ResNet-18's last channels are one value each for images of 8 pixels, and an epoch can end with one image."""
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as raised:
        torch.nn.BatchNorm2d(2)(torch.zeros(1, 2, 1, 1))
    said, foreseen = _said(raised.value)
    assert re.fullmatch(r"ValueError: .* take model\.norm=group or.*batch=drop.*", said)
    assert foreseen
    assert _said(ValueError("other")) == ("ValueError: other", False)


@pytest.mark.slow
@by_case
def test_survives_absent_classes(run_inline: RunInline, method: str, variant: Keys, idx_root: str) -> None:
    """Under the own-label protocol a client is scored on the labels it owns, and some it has never seen."""
    run = run_inline(
        method,
        **variant,
        **{"data.name": "mnist", "data.root": idx_root, "data.test": "own-labels", "data.partition": "pathological"},
    )
    check_complete(run)
    train, test = (run.partition[run.partition["split"] == s].filter(like="class_") > 0 for s in ("train", "test"))
    assert (train.sum(axis=1) == 2).all()
    assert (test.to_numpy() == train.to_numpy()).all()


@pytest.mark.slow
@by_case
def test_scores_clients_that_were_never_sampled(run_inline: RunInline, method: str, variant: Keys) -> None:
    """A newcomer has no state yet, and still gets a prediction."""
    run = run_inline(method, **variant, **{"run.rounds": 1, "run.clients-per-round": 1})
    check_complete(run)
    assert len(run.frame("clients")) == 1
    assert len(run.frame("evaluations")) == 6


@pytest.mark.slow
@by_case
def test_zero_per_round_means_all(run_inline: RunInline, method: str, variant: Keys) -> None:
    """Full participation crashed the released FedGen."""
    run = run_inline(method, **variant, **{"run.clients-per-round": 0})
    check_complete(run)
    assert run.rows("rounds")[0]["clients"] == list(range(6))


@pytest.mark.slow
@by_case
def test_survives_a_single_client(run_inline: RunInline, method: str, variant: Keys) -> None:
    """One client in all is the smallest federation there is."""
    check_complete(run_inline(method, **variant, **{"run.clients": 1, "run.clients-per-round": 1, "run.rounds": 1}))


@pytest.mark.slow
@by_case
def test_survives_clients_without_test_examples(run_inline: RunInline, method: str, variant: Keys) -> None:
    """A client with one example trains on it and is scored on none; it must not break a mean."""
    run = run_inline(
        method,
        **variant,
        **{"data.fraction": 0.005, "data.partition": "iid", "data.test-fraction": 0.5, "run.rounds": 1},
    )
    check_complete(run)
    assert (run.frame("evaluations")["total"] == 0).any()
    assert 0 <= run.summary()["last"] <= 1


# 5. Rows and bytes.


@by_case
def test_one_row_per_client_and_sums_that_add_up(run_inline: RunInline, method: str, variant: Keys) -> None:
    """An evaluation is a complete table, and its totals are the partition's."""
    run = run_inline(method, **variant)
    check_complete(run)
    assert len(run.frame("evaluations")) == 3 * 6
    assert (run.frame("clients")["loss_weight"] == 4 * 16).all()


@pytest.mark.slow
@by_case
def test_skipped_evaluations_leave_the_training_alone(run_inline: RunInline, method: str, variant: Keys) -> None:
    """Scoring reads and never writes: evaluating less often gives the same training and the same last scores."""
    often, rarely = run_inline(method, **variant), run_inline(method, **variant, **{"run.eval-every": 2})
    assert rarely.frame("evaluations")["round"].unique().tolist() == [2, 3]
    states = [[row["state"] for row in run.rows("rounds")] for run in (often, rarely)]
    assert states[0] == states[1]
    assert [r for r in often.rows("evaluations") if r["round"] > 1] == rarely.rows("evaluations")


@by_case
def test_bytes_are_those_of_the_real_serialization(
    run_inline: RunInline, play: Play, method: str, variant: Keys
) -> None:
    """Byte counts are measured on what Flower writes, not derived from a number of parameters."""
    _, (sent, _) = play(method, **variant)
    down, up = (
        sum(len(Array(tensor.numpy()).data) for record in records for tensor in record.tensors().values())
        for records in ([sent.broadcast, *sent.personal[:1]], sent.updates[:1])
    )
    clients = run_inline(method, **variant).frame("clients")
    assert set(clients["bytes_up"]) == {up}
    assert set(clients["bytes_down"]) == {down}


def test_every_registered_method_is_tested() -> None:
    """The suite finds methods by file name."""
    assert {method for method, _ in cases()} == set(names())


def test_a_worker_goes_when_the_next_comes(tmp_path: Path) -> None:
    """A process that does a hundred runs, as in a sweep, holds the data of the last one only."""
    workers = []
    for seed in range(3):
        config = tiny(**{"run.seed": seed, "run.dir": str(tmp_path / str(seed))})
        made = _worker(json.dumps(config.flat()), 1, None, "")
        made.shard(0, "train")
        workers.append(weakref.ref(made))
        del made
    gc.collect()
    assert [worker() is None for worker in workers] == [True, True, False]
