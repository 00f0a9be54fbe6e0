"""Hostile clients and differential privacy: the rules, their bounds, what they refuse, and what they cost nobody."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny
from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedMedian, FedTrimmedAvg, Krum, MultiKrum
from flwr.supercore.task_identity import TaskIdentity
from safetensors.torch import load_file

from fedkd.clipping import change, clipped
from fedkd.config import AggregationSection, Config, Scalar
from fedkd.data import federate
from fedkd.errors import UserError
from fedkd.ignored import ignored
from fedkd.method import load, names
from fedkd.methods.fedavg import Broadcast, Update
from fedkd.results import Run
from fedkd.setup import Setup
from strategies import build, privacy, robust
from strategies.averaging import average, shares
from strategies.fedavg import State

RunInline = Callable[..., Run]
PRIVATE: dict[str, Scalar] = {"fedavg.weighting": "uniform", "privacy.clip-norm": 0.5, "privacy.noise-multiplier": 1.0}


def start(size: int = 5, statistics: int = 0) -> Broadcast:
    """Return a global model."""
    rng = torch.Generator().manual_seed(0)
    return Broadcast(torch.randn(size, generator=rng), torch.rand(statistics, generator=rng))


def near(model: Broadcast, count: int, seed: int = 1, step: float = 0.1) -> list[Update]:
    """Return the updates of clients that moved a little, with unequal numbers of examples."""
    rng = torch.Generator().manual_seed(seed)
    return [
        Update(
            model.parameters + step * torch.randn(model.parameters.shape, generator=rng),
            model.statistics + step * torch.rand(model.statistics.shape, generator=rng),
            torch.tensor(10 + 7 * k),
        )
        for k in range(count)
    ]


def merged(model: Broadcast, updates: Sequence[Update], **aggregation: Scalar) -> torch.Tensor:
    """Return the parameters that fedavg's server makes of some updates under settings of ``[aggregation]``."""
    keys: dict[str, Scalar] = {f"aggregation.{name.replace('_', '-')}": value for name, value in aggregation.items()}
    config = tiny(**{"run.clients": 20, "run.clients-per-round": 0, **keys})
    taken = robust.screened(config, model, dict(enumerate(updates)))
    weights = shares([int(u.examples) for u in taken.values()], "examples")
    return average([u.parameters for u in taken.values()], weights, config.aggregation)


# The rules are Flower's.


def by_flower(strategy: FedAvg, updates: Sequence[Update], monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Return what one of Flower's own strategies makes of the updates' parameters."""
    for name in ("_run_id", "_node_id", "_task_id"):  # without which Flower makes no message
        monkeypatch.setattr(TaskIdentity, name, 1)
    replies = []
    for update in updates:
        order = Message(RecordDict(), dst_node_id=1, message_type=MessageType.TRAIN)
        content = RecordDict(
            {
                "arrays": ArrayRecord({"parameters": Array(update.parameters.numpy())}),
                "metrics": MetricRecord({"num-examples": int(update.examples)}),
            }
        )
        replies.append(Message(content, reply_to=order))
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    return torch.from_numpy(np.array(arrays["parameters"].numpy()))


@pytest.mark.parametrize("clients", [7, 10])
@pytest.mark.parametrize(
    ("rule", "theirs"),
    [
        ({"rule": "mean"}, lambda n: FedAvg()),
        ({"rule": "median"}, lambda n: FedMedian()),
        ({"rule": "trimmed-mean", "trim": 0.2}, lambda n: FedTrimmedAvg(beta=0.2)),
        ({"rule": "trimmed-mean", "trim": 0.3}, lambda n: FedTrimmedAvg(beta=0.3)),
        ({"rule": "krum", "byzantine": 2}, lambda n: Krum(num_malicious_nodes=2)),
        ({"rule": "multi-krum", "byzantine": 2}, lambda n: MultiKrum(num_malicious_nodes=2, num_nodes_to_select=n - 2)),
    ],
    ids=lambda case: "-".join(map(str, case.values())) if isinstance(case, dict) else "",
)
def test_agrees_with_flowers_strategy(
    rule: dict[str, Any], theirs: Callable[[int], FedAvg], clients: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On clients of which two are far off; the means apart, all rules give the very bits."""
    model = start(50)
    updates = near(model, clients - 2) + near(model, 2, seed=2, step=3.0)
    ours, flowers = merged(model, updates, **rule), by_flower(theirs(clients), updates, monkeypatch)
    if rule["rule"] in ("mean", "multi-krum"):  # Flower sums in double precision
        torch.testing.assert_close(ours, flowers)
    else:
        assert torch.equal(ours, flowers)
    assert not torch.equal(ours, merged(model, updates)) or rule["rule"] == "mean"


def test_medians_and_trimmed_means_by_hand() -> None:
    """Numbers that anyone can check, with an even and an odd number of clients."""
    vectors = [torch.tensor([float(v), 10.0 * v]) for v in (5, 1, 2, 100, 3)]
    weights = [0.2] * 5
    assert average(vectors, weights, AggregationSection(rule="median")).tolist() == [3.0, 30.0]
    assert average(vectors[:4], weights[:4], AggregationSection(rule="median")).tolist() == [3.5, 35.0]
    trimmed = average(vectors, weights, AggregationSection(rule="trimmed-mean", trim=0.2))
    assert trimmed.tolist() == pytest.approx([10 / 3, 100 / 3])


def test_krum_tells_clients_apart_that_hardly_moved() -> None:
    """Changes a millionth of the model drown in single precision, where distances of models would all look alike."""
    model = Broadcast(torch.full((1000,), 30.0, dtype=torch.float32), torch.zeros(0))
    updates = [
        Update(model.parameters + torch.tensor(step), model.statistics, torch.tensor(1))
        for step in (2e-5, 2.1e-5, 2.2e-5, 2.3e-5, 9e-4)
    ]
    assert robust.krum(model, updates, byzantine=1, number=4) == {0, 1, 2, 3}


# What a client can do to the result is bounded.

HUGE = 1e37
"""About as large as a float32 gets without ending as infinity in a sum of a few."""


@pytest.mark.parametrize("hostile", [HUGE, -HUGE, 1e3])
@pytest.mark.parametrize(
    "rule",
    [
        {"rule": "median"},
        {"rule": "trimmed-mean", "trim": 0.1},
        {"rule": "krum", "byzantine": 1},
        {"rule": "multi-krum", "byzantine": 1},
    ],
    ids=lambda case: case["rule"],
)
def test_one_huge_update_stays_without_consequence(rule: dict[str, Any], hostile: float) -> None:
    """The result stays among the honest updates in every coordinate, where the mean leaves by far."""
    model = start(30)
    honest = near(model, 9)
    bad = Update(torch.full((30,), hostile), model.statistics, torch.tensor(10**6))
    result = merged(model, [*honest[:4], bad, *honest[4:]], **rule)
    models = torch.stack([u.parameters for u in honest])
    assert bool((result >= models.min(dim=0).values).all())
    assert bool((result <= models.max(dim=0).values).all())
    assert float((merged(model, [*honest, bad]) - model.parameters).abs().min()) > 100


@pytest.mark.parametrize("size", [0.0, 1e-3, 0.1, 2.0, 1e4, HUGE])
def test_clipping_bounds_a_clients_change(size: float) -> None:
    """The direction stays; a change within the bound is not touched, and the statistics belong to the model."""
    model = start(40, statistics=8)
    update = Update(model.parameters + size, model.statistics + size, torch.tensor(3))
    found = clipped(update, model, 0.5)
    norm = float(change(update, model).norm())
    if norm <= 0.5:
        assert found is update
    else:
        assert float(change(found, model).norm()) == pytest.approx(0.5, rel=1e-5)
        torch.testing.assert_close(change(found, model) / 0.5, change(update, model) / norm, rtol=1e-3, atol=1e-5)
    assert found.examples is update.examples


@pytest.mark.parametrize("rule", ["mean", "median", "krum"])
def test_clipping_bounds_the_influence_on_the_result(rule: str) -> None:
    """Whatever one client sends and claims, the global model moves by no more than the bound."""
    model = start(40)
    for hostile in (HUGE, -HUGE, 5.0):
        bad = Update(torch.full((40,), hostile), model.statistics, torch.tensor(10**9))
        moved = merged(model, [*near(model, 6), bad], rule=rule, clip_norm=0.3) - model.parameters
        assert float(moved.norm()) <= 0.3 * (1 + 1e-5)


# What is asked for and cannot be had is refused before anything starts.


def refusal(method: str, **keys: Scalar) -> str:
    """Return what is said against a configuration; nothing, if it is taken."""
    try:
        config = tiny(method, **keys)
        build(config, federate(config))
    except UserError as error:
        return str(error)
    return ""


def takes(method: str, **keys: Scalar) -> bool:
    """Say whether a method takes some settings."""
    return not refusal(method, **keys)


@pytest.mark.parametrize(
    "key",
    [{"aggregation.rule": "median"}, {"aggregation.clip-norm": 1.0}, {"aggregation.refuse-norm": 1.0}],
    ids=str,
)
def test_methods_that_do_not_average_models_alone_refuse(key: dict[str, Scalar]) -> None:
    """The types say so; the list here is what they ought to say."""
    refusing = {"fedd2s", "feddistill", "fedensemble", "fedfomo", "fedproto", "local", "pgfed", "scaffold"}
    assert {name for name in names() if not takes(name, **key)} == refusing
    assert refusal("local", **key) == (
        f"{' = '.join(map(repr, *key.items())).replace(chr(39), '', 2)} is for methods whose server averages models, "
        "and local averages none; leave it out"
    )
    assert "also takes its clients' 'control_change'" in refusal("scaffold", **key)
    assert "also takes its clients' 'control_change'" in refusal("fedftg", **{"fedftg.base": "scaffold", **key})
    assert "also takes its clients' 'outputs'" in refusal("feddistill", **{"feddistill.share-model": True, **key})
    assert "one by one" in refusal("fedensemble", **key)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"rule": "krum", "byzantine": 1}, "byzantine = 1 needs 5 clients in every round, and run.clients-per-round"),
        ({"rule": "multi-krum", "byzantine": 2}, "byzantine = 2 needs 7 clients in every round"),
        ({"rule": "median"}, "'median' needs 3 clients in every round, and run.clients-per-round leaves 2"),
        ({"rule": "trimmed-mean", "trim": 0.3}, "aggregation.trim = 0.3 cuts off nobody of the 3 clients of a round"),
        ({"rule": "trimmed-mean", "trim": 0.0}, "aggregation.trim = 0.0 cuts off nobody"),
        ({"rule": "trimmed-mean", "trim": 0.5}, "aggregation.trim = 0.5: input should be less than 0.5"),
        ({"rule": "mode"}, "aggregation.rule = 'mode'"),
        ({"byzantine": -1}, "aggregation.byzantine = -1"),
        ({"clip-norm": -0.5}, "aggregation.clip-norm = -0.5"),
        ({"refuse-norm": -0.5}, "aggregation.refuse-norm = -0.5"),
    ],
    ids=str,
)
def test_too_few_clients_for_a_rule(keys: dict[str, Scalar], said: str) -> None:
    """Named with the number that is needed."""
    cohort = 2 if keys.get("rule") == "median" else 3
    given = {f"aggregation.{name}": value for name, value in keys.items()}
    assert said in refusal("fedavg", **{"run.clients-per-round": cohort, **given})


def test_rounds_that_may_lose_clients_count_those_that_have_to_answer() -> None:
    """Where clients can be dropped, ``run.min-clients`` is what the rule can rely on."""
    krum: dict[str, Scalar] = {"run.clients-per-round": 6, "run.on-failure": "drop", "aggregation.rule": "krum"}
    assert "run.min-clients leaves 4; raise it" in refusal("fedavg", **krum, **{"run.min-clients": 4})
    assert takes("fedavg", **krum, **{"run.min-clients": 5})


def test_settings_that_a_rule_does_not_read_are_named() -> None:
    """A warning for each."""
    median = tiny(**{"aggregation.rule": "median"})
    given = ["aggregation.trim", "aggregation.byzantine", "fedavg.weighting", "privacy.delta"]
    assert [line.split(" has no effect beside ") for line in ignored(median, given)] == [
        ["aggregation.trim", "aggregation.rule = 'median'"],
        ["aggregation.byzantine", "aggregation.rule = 'median'"],
        ["fedavg.weighting", "aggregation.rule = 'median'"],
        ["privacy.delta", "privacy.noise-multiplier = 0.0"],
    ]
    assert ignored(tiny(**{"aggregation.rule": "multi-krum"}), ["aggregation.byzantine", "fedavg.weighting"]) == []
    for refused, read in ((0.0, True), (3.0, True), (2.0, False), (1.0, False)):
        config = tiny(**{"aggregation.clip-norm": 2.0, "aggregation.refuse-norm": refused})
        assert (ignored(config, ["aggregation.clip-norm"]) == []) == read


# Whole runs.


def states(run: Run) -> list[str]:
    """Return the hash of the server's state after each round."""
    return [row["state"] for row in run.rows("rounds")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {"aggregation.clip-norm": 1e6},
        {"aggregation.refuse-norm": 1e6},
        {"aggregation.rule": "multi-krum", "aggregation.byzantine": 0},
    ],
    ids=str,
)
def test_rules_that_leave_everybody_be_are_the_mean(run_inline: RunInline, keys: dict[str, Scalar]) -> None:
    """Bit for bit."""
    assert run_inline("fedavg", **keys).digest() == run_inline("fedavg").digest()


CASES: list[tuple[str, dict[str, Scalar]]] = [
    ("fedavg", {"aggregation.rule": "median"}),
    ("fedper", {"aggregation.rule": "trimmed-mean", "aggregation.trim": 0.34}),
    ("fedavg", {"model.name": "fedgen_cnn", "model.norm-statistics": "averaged", "aggregation.clip-norm": 0.05}),
    ("feddyn", {"aggregation.rule": "median"}),
    ("pfedme", {"aggregation.rule": "median"}),
    ("fedgen", {"aggregation.rule": "median"}),
    ("fedgen", {"aggregation.rule": "multi-krum", "run.clients-per-round": 5}),
    ("fedavg", PRIVATE),
    ("fedrep", {"fedrep.weighting": "uniform", "privacy.clip-norm": 0.5, "privacy.noise-multiplier": 1.0}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "keys"), CASES, ids=str)
def test_one_digest_on_any_number_of_nodes_and_another_than_the_means(
    run_inline: RunInline, method: str, keys: dict[str, Scalar]
) -> None:
    """The settings act, and how the clients are spread does not matter."""
    run = run_inline(method, **keys)
    assert run.digest() == run_inline(method, nodes=2, **keys).digest()
    plain = {k: v for k, v in keys.items() if k.split(".")[0] not in ("aggregation", "privacy")}
    assert states(run) != states(run_inline(method, **plain))


@pytest.mark.slow
@pytest.mark.parametrize("method", names())
def test_a_method_that_takes_a_rule_obeys_it(run_inline: RunInline, method: str) -> None:
    """A server half that forgot to hand the rule on to its average would quietly take the mean."""
    median: dict[str, Scalar] = {"run.rounds": 1, "aggregation.rule": "median"}
    if takes(method, **median):
        assert states(run_inline(method, **median)) != states(run_inline(method, **{"run.rounds": 1}))


@pytest.mark.slow
def test_results_say_whom_krum_selected(run_inline: RunInline) -> None:
    """One client a round by Krum, all but f by Multi-Krum, and none left out goes unnoticed."""
    keys: dict[str, Scalar] = {"run.clients-per-round": 5, "aggregation.byzantine": 1}
    for rule, number in (("krum", 1), ("multi-krum", 4)):
        for row in run_inline("fedavg", **keys, **{"aggregation.rule": rule}).rows("rounds"):
            assert len(row["clients"]) == 5
            assert len(row["selected"]) == number
            assert set(row["selected"]) < set(row["clients"])
    assert all("selected" not in row for row in run_inline("fedavg").rows("rounds"))


# Differential privacy.


@pytest.mark.slow
def test_without_noise_and_with_a_wide_bound_it_is_uniform_fedavg(run_inline: RunInline) -> None:
    """Bit for bit; and nothing is said of an epsilon that would be infinite."""
    wide = run_inline("fedavg", **{"fedavg.weighting": "uniform", "privacy.clip-norm": 1e6})
    assert wide.digest() == run_inline("fedavg", **{"fedavg.weighting": "uniform"}).digest()
    assert "epsilon" not in wide.summary()


@pytest.mark.slow
def test_clients_send_what_is_clipped_already(worker: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound holds on the client's side of the wire, before the server looks."""
    from sims import inline

    seen: list[float] = []
    screened = robust.screened

    def spy(config: Config, broadcast: Any, updates: dict[int, Any]) -> dict[int, Any]:
        seen.extend(float(change(update, broadcast).norm()) for update in updates.values())
        return screened(config, broadcast, updates)

    monkeypatch.setattr(robust, "screened", spy)
    folder = worker().store.folder.parent
    inline.run(tiny(**{"fedavg.weighting": "uniform", "privacy.clip-norm": 0.1, "run.dir": str(folder / "run")}), 1)
    assert len(seen) == 9
    assert max(seen) == pytest.approx(0.1, rel=1e-5)


def test_the_server_clips_what_a_client_did_not() -> None:
    """A client that ignores the bound does not get past it."""
    model, config = start(10), tiny(**PRIVATE)
    bad = Update(model.parameters + 100, model.statistics, torch.tensor(5))
    (taken,) = robust.screened(config, model, {3: bad}).values()
    assert float(change(taken, model).norm()) == pytest.approx(0.5, rel=1e-5)


def noise(config: Config, size: int = 200_000, round: int = 1) -> torch.Tensor:
    """Return what the server adds to a model of zeros."""
    setup = Setup.build(config, (1, 8, 8), 10, torch.device("cpu"))
    state = privacy.noised(setup, State(torch.zeros(size), torch.zeros(0)), round)
    return state.tensors()["parameters"]


@pytest.mark.parametrize(("multiplier", "clip", "cohort"), [(1.0, 0.5, 3), (4.0, 2.0, 6)])
def test_noise_has_the_deviation_that_is_stated(multiplier: float, clip: float, cohort: int) -> None:
    """z C / m on every parameter of the mean: no more, no less, no drift, and Gaussian tails."""
    keys = {**PRIVATE, "privacy.noise-multiplier": multiplier, "privacy.clip-norm": clip}
    drawn = noise(tiny(**keys, **{"run.clients-per-round": cohort}))
    deviation = multiplier * clip / cohort
    within = 5 / math.sqrt(len(drawn))  # five deviations of the estimate of either
    assert float(drawn.std()) == pytest.approx(deviation, rel=within)
    assert abs(float(drawn.mean())) < deviation * within
    beyond = float((drawn.abs() > 2 * deviation).double().mean())
    assert beyond == pytest.approx(math.erfc(math.sqrt(2)), abs=within)


def test_noise_is_another_in_every_round_and_for_every_seed() -> None:
    """The noise of two rounds that were alike would cancel."""
    one, config = noise(tiny(**PRIVATE)), tiny(**PRIVATE)
    assert torch.equal(one, noise(config))
    for other in (noise(config, round=2), noise(tiny(**PRIVATE, **{"run.seed": 2}))):
        together = float(torch.nn.functional.cosine_similarity(one, other, dim=0))
        assert abs(together) < 5 / math.sqrt(len(one))


@pytest.mark.slow
def test_a_run_differs_from_the_one_without_noise_by_the_noise(run_inline: RunInline) -> None:
    """The first round trains from the same model, so there the noise is all the difference."""
    keys = {**PRIVATE, "run.rounds": 1}
    with_noise, without = (
        load_file(run_inline("fedavg", **k).folder / "final.safetensors")["parameters"]
        for k in (keys, {**keys, "privacy.noise-multiplier": 0.0})
    )
    expected = noise(tiny(**keys), size=len(without))
    torch.testing.assert_close(with_noise - without, expected, atol=1e-6, rtol=1e-3)


def gaussian_delta(epsilon: float, multiplier: float) -> float:
    """Return the exact delta of a Gaussian mechanism (Balle, Wang, ICML 2018, Theorem 8), noise over sensitivity."""
    half, shift = 1 / (2 * multiplier), epsilon * multiplier

    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    return phi(half - shift) - math.exp(epsilon) * phi(-half - shift)


@pytest.mark.parametrize(("multiplier", "rounds"), [(4.0, 1), (8.0, 20), (20.0, 50)])
def test_epsilon_of_full_participation_is_the_gaussian_mechanisms(multiplier: float, rounds: int) -> None:
    """Many rounds are one with the noise over the root of their number; replacing a client moves the sum by 2 C.

    Renyi accounting is an upper bound, and here a close one; a multiplier that forgot the 2 would be far below.
    """
    found = privacy.epsilon(multiplier, 20, 20, rounds, 1e-5)
    exact = multiplier / 2 / math.sqrt(rounds)
    assert gaussian_delta(found, exact) <= 1e-5
    assert gaussian_delta(found * 0.85, exact) > 1e-5


def test_epsilon_of_sampled_cohorts() -> None:
    """The library's own value, recorded with all its default orders, within the coarser ones' loss, and never below.

    ``SampledWithoutReplacementDpEvent(1000, 50, GaussianDpEvent(4))``, 20 times, delta 1e-5, dp-accounting 0.6.0.
    """
    assert privacy.epsilon(8.0, 1000, 50, 20, 1e-5) == pytest.approx(RECORDED, rel=0.01)
    assert privacy.epsilon(8.0, 1000, 50, 20, 1e-5) >= RECORDED
    assert privacy.epsilon(8.0, 1000, 50, 20, 1e-5) < privacy.epsilon(8.0, 50, 50, 20, 1e-5)
    assert privacy.epsilon(8.0, 20, 19, 20, 1e-5) == privacy.epsilon(8.0, 19, 19, 20, 1e-5)


RECORDED = 0.45187325122632416


@pytest.mark.slow
def test_results_state_epsilon(run_inline: RunInline) -> None:
    """After every round, and of the whole run."""
    run = run_inline("fedavg", **PRIVATE)
    spent = [row["epsilon"] for row in run.rows("rounds")]
    assert spent == [privacy.epsilon(1.0, 6, 3, rounds, 1e-5) for rounds in (1, 2, 3)]
    assert spent == sorted(spent)
    assert run.summary()["privacy"] == {"epsilon": spent[-1], "delta": 1e-5, "noise": "seeded"}


def test_what_a_client_weighs_does_not_matter() -> None:
    """Numbers of examples are private and reach the server; the released model does not depend on them."""
    config = tiny(**PRIVATE)
    server = build(config, federate(config))
    model = start(int(server.setup.sizes["parameters"]))
    updates = near(model, 3)
    claimed = [dataclasses.replace(u, examples=torch.tensor(10**6 if k else 1)) for k, u in enumerate(updates)]
    one, other = (server.half.update(server.setup, server.state, some, 1)[0] for some in (updates, claimed))
    assert torch.equal(one.parameters, other.parameters)


@pytest.mark.parametrize(
    ("method", "keys", "said"),
    [
        ("fedavg", {"fedavg.weighting": "examples"}, "it needs equal weights; set fedavg.weighting=uniform"),
        ("feddf", {"feddf.weighting": "uniform"}, "feddf's server does more than average models"),
        ("fedgen", {}, "fedgen's server does more than average models"),
        ("feddyn", {}, "feddyn's server does more than average models"),
        ("pgfed", {}, "pgfed's server does more than average models"),
        ("local", {}, "local's server does more than average models"),
        ("fedavg", {"aggregation.rule": "median"}, "leave out aggregation.rule = 'median'"),
        ("fedavg", {"aggregation.clip-norm": 1.0}, "leave out aggregation.clip-norm = 1.0"),
        ("fedavg", {"aggregation.refuse-norm": 1.0}, "leave out aggregation.refuse-norm = 1.0"),
        ("fedavg", {"model.name": "fedgen_cnn", "model.norm-statistics": "averaged"}, "averaged BatchNorm statistics"),
        ("fedavg", {"data.scaling": "standard"}, "data.scaling = 'standard' is computed from all clients' images"),
        ("fedavg", {"run.on-failure": "drop"}, "privacy needs an update from every client of a round"),
        ("fedavg", {"privacy.clip-norm": 0.0}, "privacy.noise-multiplier = 1.0 needs privacy.clip-norm"),
        ("fedavg", {"privacy.delta": 0.0}, "privacy.delta = 0.0"),
    ],
    ids=str,
)
def test_a_guarantee_that_would_be_false_is_refused(method: str, keys: dict[str, Scalar], said: str) -> None:
    """Whatever else reaches the released model is named."""
    assert said in refusal(method, **{**PRIVATE, **keys})


def test_methods_whose_server_only_averages_are_private() -> None:
    """FedAvg's server half, of all of a model or of a part."""
    private = {name for name in names() if takes(name, **{**PRIVATE, **_uniform(name)})}
    assert private == {
        *("apfl", "ditto", "fedavg", "fedavg_ft", "fedbabu", "fedbn", "fedper", "fedprox", "fedrep", "fedrod"),
        *("lg_fedavg", "moon", "per_fedavg"),
    }


def _uniform(method: str) -> dict[str, Scalar]:
    return {f"{method}.weighting": "uniform"} if "weighting" in load(method).hyper.model_fields else {}


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only noise needs it."""
    monkeypatch.setattr(privacy.importlib.util, "find_spec", lambda name: None)
    assert refusal("fedavg", **PRIVATE).endswith(
        "epsilon needs the package dp-accounting; pip install 'fedkd[privacy]'"
    )
    assert takes("fedavg", **{**PRIVATE, "privacy.noise-multiplier": 0.0})


def test_devices_would_know_the_noise(tmp_path: Path) -> None:
    """They get the seed with every order."""
    config = tiny(**PRIVATE, **{"data.partition": "devices"})
    setup = Setup.build(config, (1, 8, 8), 10, torch.device("cpu"))
    from strategies import fedavg

    with pytest.raises(UserError, match=r"every device knows run\.seed"):
        privacy.check(setup, load("fedavg"), fedavg)
