"""PGFed: its limit cases, its algebra by hand, and numbers that the authors' code gave (ljaiverson/pgfed @ b1d70f7)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny
from safetensors.torch import load_file

import clients.pgfed as client_half
import strategies.pgfed as server_half
from clients.training import Job
from fedkd.config import Config, Scalar
from fedkd.data import Shard, federate
from fedkd.losses import cross_entropy
from fedkd.methods.pgfed import Broadcast, Personal, State, Update
from fedkd.models import FlatModel
from fedkd.payload import Record
from fedkd.results import Run
from fedkd.setup import Setup

RunInline = Callable[..., Run]
Keys = dict[str, Scalar]
AUTHORS: dict[str, Any] = json.loads(
    (Path(__file__).parent / "fixtures" / "pgfed_authors.json").read_text(encoding="utf-8")
)
"""What the authors' code gave, and how it was asked: see its ``source``."""
STRONG: Keys = {"pgfed.mu": 0.5, "pgfed.lam": 0.05}
"""Settings under which alpha moves within a few steps."""


def final(run: Run) -> dict[str, torch.Tensor]:
    """Return the server's last state."""
    return load_file(run.folder / "final.safetensors")


def pattern(seed: int, *shape: int) -> torch.Tensor:
    """Return the values in [0, 1) that the fixture names by a seed; integer arithmetic, so equal everywhere."""
    i = torch.arange(1, math.prod(shape) + 1) + 1000 * seed
    return (((31 * i * i + 17 * i) % 10007).double() / 10007).float().reshape(shape)


def close(actual: Any, expected: Any, rtol: float = 1e-4, atol: float = 2e-6) -> None:
    """Compare with a number, or nested list of numbers, computed in another order."""
    actual, expected = (torch.as_tensor(value).double() for value in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


class Federation:
    """Rounds with chosen cohorts, without the apps in between; it keeps what was sent."""

    def __init__(self, setup: Setup, shards: Sequence[Shard]) -> None:
        self.setup, self.shards = setup, shards
        self.state = server_half.init(setup)
        self.kept: dict[int, State] = {}
        self.last: dict[int, int] = {}
        self.number = 0
        self.initial = setup.model.parameters.clone()
        self.metrics: dict[int, dict[str, tuple[float, float]]] = {}

    def job(self, client: int, personal: Record | None) -> Job:
        """Return a client's job in the current round."""
        setup = self.setup
        workspace = (setup.config, setup.model, setup.streams)
        return Job(*workspace, self.number, client, self.initial, setup.extras, personal, self.last.get(client, 0))

    def round(self, cohort: list[int]) -> tuple[Broadcast, list[Personal], list[Update]]:
        """Let a cohort take part and return what crossed the network."""
        self.number += 1
        setup = self.setup
        broadcast = server_half.broadcast(setup, self.state, self.number).check(setup.sizes, "the server")
        personals = server_half.personals(setup, self.state, self.number, cohort)
        updates: list[Update] = []
        for client, personal in zip(cohort, personals, strict=True):
            personal.check(setup.sizes, "the server")
            job = self.job(client, personal)
            outcome = client_half.update(job, broadcast, self.kept.get(client), self.shards[client])
            assert isinstance(outcome.update, Update)
            assert isinstance(outcome.state, State)
            self.last[client] = self.number
            self.kept[client], self.metrics[client] = outcome.state.check(setup.sizes, "the client"), outcome.metrics
            updates.append(outcome.update.check(setup.sizes, "the client"))
        self.state = server_half.update(setup, self.state, updates, self.number)[0].check(setup.sizes, "the server")
        return broadcast, personals, updates


def federation(**flat: Scalar) -> Federation:
    """Return a federation on the tiny configuration: six clients, three per round."""
    config = tiny("pgfed", **{**STRONG, **flat})
    data = federate(config)
    setup = Setup.build(config, data.images.shape, data.classes, torch.device("cpu"))
    return Federation(setup, [data.shard(client, "train") for client in range(data.clients)])


# Limit cases.


@pytest.mark.slow
@pytest.mark.parametrize(
    "flat",
    [
        {},
        {"train.momentum": 0.9},
        {"model.name": "fedgen_cnn"},
        {"run.clients-per-round": 0, "train.weight-decay": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("inner", ["mean", "exact"])
def test_without_the_others_risks_it_is_the_control(run_inline: RunInline, flat: Keys, inner: str) -> None:
    """mu = 0 is FedAvg scored after the same local steps: parameters, statistics and every score, bit for bit."""
    pgfed = run_inline("pgfed", **{**flat, "pgfed.mu": 0.0, "pgfed.inner": inner})
    control = run_inline("fedavg_ft", **flat)
    for name, value in final(control).items():
        assert torch.equal(final(pgfed)[name], value), name
    assert pgfed.rows("evaluations") == control.rows("evaluations")
    trained = [[(row["client"], row["loss_sum"]) for row in run.rows("clients")] for run in (pgfed, control)]
    assert trained[0] == trained[1]


def test_the_first_round_has_no_auxiliary_term(run_inline: RunInline) -> None:
    """Nobody has sent a gradient yet; in the second round somebody has."""
    pgfed, control = run_inline("pgfed", **STRONG), run_inline("fedavg_ft")
    by_round = [
        {n: [r for r in run.rows("evaluations") if r["round"] == n] for n in (1, 2)} for run in (pgfed, control)
    ]
    assert by_round[0][1] == by_round[1][1]
    assert by_round[0][2] != by_round[1][2]
    rows = pgfed.rows("clients")
    assert all(("alpha_mean_sum" in row) == (row["round"] > 1) for row in rows)


def test_without_learning_all_clients_get_the_same_gradient() -> None:
    """lam = 0 keeps alpha at 1/M everywhere, the diagonal too, so a_i is mu times the mean for all clients."""
    run = federation(**{"pgfed.lam": 0.0})
    _, _, previous = run.round([0, 1, 2])
    for cohort in ([1, 3, 5], [0, 2, 4]):
        _, personals, updates = run.round(cohort)
        mean = torch.stack([u.gradient for u in previous]).mean(dim=0)
        for personal in personals:
            close(personal.auxiliary, 0.5 * mean, atol=1e-7)
        previous = updates
    assert torch.equal(run.state.alpha, torch.full((6, 6), 1 / 3))


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, {"pgfed.momentum-buffer": "kept", "train.momentum": 0.9}], ids=str)
def test_no_share_of_the_old_gradient_is_pgfed(run_inline: RunInline, keys: Keys) -> None:
    """beta = 0 keeps nothing, and a small beta tends to it."""
    base = {**STRONG, **keys, "run.rounds": 4}
    plain, small, large = (final(run_inline("pgfed", **base, **{"pgfed.beta": b})) for b in (0.0, 1e-6, 0.5))
    close(small["parameters"], plain["parameters"], atol=1e-5)
    assert float((large["parameters"] - plain["parameters"]).abs().max()) > 1e-4


def test_a_kept_buffer_is_nothing_without_momentum(run_inline: RunInline) -> None:
    """The two settings of the buffer are one without momentum, and the first participation is always fresh."""
    plain = run_inline("pgfed", **STRONG)
    assert run_inline("pgfed", **STRONG, **{"pgfed.momentum-buffer": "kept"}).digest() == plain.digest()


# The expansion.


def linear_job(shard: Shard, **flat: Scalar) -> Job:
    """Return a job whose model is linear in its parameters."""
    config = tiny("pgfed", **flat)
    torch.manual_seed(0)
    model = FlatModel(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)))
    federated = federate(config)
    setup = Setup.build(config, federated.images.shape, federated.classes, torch.device("cpu"))
    return Job(config, model, setup.streams, 1, 0, model.parameters.clone(), {})


def test_the_expansion_touches_the_risk() -> None:
    """c_j + <g_j, theta_j> = f_j(theta_j), g_j the gradient of the mean loss over all local data."""
    run = federation()
    for update in run.round([0, 1, 2])[2]:
        shard, model = run.shards[int(update.client)], run.setup.model
        model.load(update.parameters)
        x, y = shard.batch(slice(None))
        risk = cross_entropy(model(x), y).mean()
        close(update.gradient, model.backward(risk))
        close(float(update.offset) + float(update.gradient.double() @ update.parameters.double()), risk.item())


def test_the_expansion_of_a_linear_loss_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a loss that is linear in the parameters, f_j(theta) = c_j + <g_j, theta> at every theta."""
    data = federate(tiny("pgfed"))
    shard = data.shard(0, "train")
    job = linear_job(shard)

    def linear(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return -logits[torch.arange(len(labels)), labels]

    monkeypatch.setattr(client_half, "cross_entropy", linear)
    gradient, offset = client_half.expansion(job, shard)
    x, y = shard.batch(slice(None))
    for seed in range(3):
        theta = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(seed))
        job.model.load(theta)
        close(float(offset) + float(gradient @ theta), linear(job.model(x), y).mean().item(), atol=1e-4)


def test_the_expansion_is_first_order() -> None:
    """The error of f_j's expansion falls with the square of the step, in double precision: g_j is its gradient."""
    shard = federate(tiny("pgfed")).shard(0, "train")
    job = linear_job(shard)
    gradient, offset = client_half.expansion(job, shard)
    theta = job.model.parameters.double()
    x, y = shard.batch(slice(None))
    direction = torch.randn(theta.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def risk(at: torch.Tensor) -> float:
        weight, bias = at[:640].reshape(10, 64), at[640:]
        return cross_entropy(x.double().flatten(1) @ weight.T + bias, y).mean().item()

    errors = []
    for step in (0.1, 0.05):
        at = theta + step * direction
        errors.append(abs(risk(at) - float(offset) - float(gradient.double() @ at)))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15)


def test_the_gradient_of_alpha_is_that_of_the_expanded_objective() -> None:
    """With each g_j it is the finite difference in alpha; with their mean it is so only if all g_j are equal."""
    rng = torch.Generator().manual_seed(0)
    mu, step = 0.3, 1e-6
    gradients = torch.randn(3, 5, generator=rng, dtype=torch.float64)
    offsets, theta = (torch.randn(n, generator=rng, dtype=torch.float64) for n in (3, 5))
    alpha = torch.rand(3, generator=rng, dtype=torch.float64)

    def objective(alpha: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        return mu * (alpha * (offsets + gradients @ theta)).sum()

    for each, mean_is_right in ((gradients, False), (gradients[:1].expand(3, 5), True)):
        differences = [
            (objective(alpha + step * e, each) - objective(alpha - step * e, each)).item() / (2 * step)
            for e in torch.eye(3, dtype=torch.float64)
        ]
        exact = client_half.alpha_gradient(mu * offsets, mu * each, theta)
        mean = client_half.alpha_gradient(mu * offsets, mu * each.mean(dim=0, keepdim=True), theta)
        close(exact, differences, rtol=1e-7, atol=1e-8)
        assert torch.allclose(mean, exact) == mean_is_right


@pytest.mark.parametrize("inner", ["mean", "exact"])
def test_what_is_sent_is_what_the_gradient_of_alpha_takes(inner: str) -> None:
    """The broadcast holds mu c_j and mu times the mean, or every, gradient of the previous round, in its order."""
    run = federation(**{"pgfed.inner": inner})
    _, _, updates = run.round([1, 3, 5])
    broadcast, _, _ = run.round([0, 1, 2])
    gradients = torch.stack([u.gradient for u in updates])
    close(broadcast.offsets, 0.5 * torch.stack([u.offset for u in updates]))
    assert broadcast.participants.tolist() == [1, 3, 5]
    sent = client_half._gradients(broadcast)
    close(sent, 0.5 * (gradients.mean(dim=0, keepdim=True) if inner == "mean" else gradients), atol=1e-7)


# A participation by hand.


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"pgfed.inner": "exact"},
        {"pgfed.beta": 0.5},
        {"pgfed.momentum-buffer": "kept", "train.momentum": 0.5},
        {"train.momentum": 0.5, "pgfed.beta": 0.25},
    ],
    ids=str,
)
def test_participations_by_hand(keys: Keys) -> None:
    """Four rounds of one client, replayed from the equations: signs, weights, what is kept, theta before the step."""
    flat: dict[str, Any] = {"pgfed.lam": 0.4, **keys}
    run = federation(**flat)
    mu, lam, lr = 0.5, 0.4, 0.05
    beta, momentum = float(flat.get("pgfed.beta", 0)), float(flat.get("train.momentum", 0))
    old: torch.Tensor | None = None
    buffer = torch.zeros_like(run.initial)
    previous: list[Update] = []
    clipped = False
    for cohort in ([0, 1, 2], [0, 3, 4], [0, 1, 5], [0, 2, 3]):
        before = run.state
        _, personals, updates = run.round(cohort)
        theta, model = before.parameters.clone(), run.setup.model
        if flat.get("pgfed.momentum-buffer") != "kept":
            buffer.zero_()
        auxiliary, alpha = torch.zeros_like(theta), torch.zeros(0)
        if previous:
            alpha = before.alpha[0][before.participants]
            auxiliary = mu * sum(a * u.gradient for a, u in zip(alpha, previous, strict=True))
            close(personals[0].auxiliary, auxiliary)
            auxiliary = auxiliary if old is None else (1 - beta) * auxiliary + beta * old
            old = auxiliary
        mean = torch.stack([u.gradient for u in previous]).mean(dim=0) if previous else theta
        for x, y in run.job(0, None).batches(run.shards[0]):
            model.load(theta)
            gradient = model.backward(cross_entropy(model(x), y).mean()).clone() + auxiliary
            if previous:
                slopes = torch.stack(
                    [(u.gradient if flat.get("pgfed.inner") == "exact" else mean) @ theta for u in previous]
                )
                moved = alpha - lam * mu * (torch.stack([u.offset for u in previous]) + slopes)
                clipped = clipped or bool((moved < 0).any())
                alpha = moved.clamp(min=0)
            buffer = momentum * buffer + gradient
            theta = theta - lr * buffer
        close(updates[0].parameters, theta)
        assert torch.equal(run.kept[0].parameters, updates[0].parameters)
        if previous:
            close(updates[0].alpha, alpha)
            close(run.state.alpha[0][before.participants], alpha)
        previous = updates
    assert clipped


# Bookkeeping.


def test_alpha_changes_only_between_who_trains_and_who_trained() -> None:
    """alpha_ij is not negative, and moves only when i takes part and j took part in the round before."""
    run = federation(**{"pgfed.lam": 0.3})
    previous: list[int] = []
    reached_zero = False
    for cohort in ([0, 1, 2], [2, 3, 4], [0, 4, 5], [1, 2, 3]):
        before = run.state.alpha.clone()
        run.round(cohort)
        changed = (run.state.alpha != before).nonzero().tolist()
        assert bool((run.state.alpha >= 0).all())
        reached_zero = reached_zero or bool((run.state.alpha == 0).any())
        assert {i for i, _ in changed} <= set(cohort)
        assert {j for _, j in changed} <= set(previous)
        assert bool(changed) == bool(previous)
        assert run.state.participants.tolist() == cohort
        previous = cohort
    assert reached_zero


def test_the_server_keeps_the_previous_round_only() -> None:
    """Gradients and offsets are those of the last participants, so memory grows with them and not with all clients."""
    run = federation()
    run.round([0, 1, 2])
    _, _, updates = run.round([3, 4, 5])
    assert torch.equal(run.state.gradients, torch.stack([u.gradient for u in updates]))
    assert torch.equal(run.state.offsets, torch.stack([u.offset for u in updates]))
    assert run.state.gradients.shape == (3, run.setup.sizes["parameters"])


def test_one_product_gives_every_clients_gradient() -> None:
    """All at once or one by one, ``a_i = mu sum_j alpha_ij g_j``; clients with different alpha get different ones."""
    run = federation(**{"pgfed.lam": 0.05})
    run.round([0, 1, 2])
    run.round([0, 1, 3])
    together = server_half.personals(run.setup, run.state, 3, [0, 3, 5])
    for client, personal in zip((0, 3, 5), together, strict=True):
        alpha = run.state.alpha[client][[0, 1, 3]]
        close(personal.auxiliary, 0.5 * (alpha[:, None] * run.state.gradients).sum(dim=0), atol=1e-7)
        alone = server_half.personal(run.setup, run.state, 3, client)
        close(alone.auxiliary, personal.auxiliary, atol=1e-7)
        assert torch.equal(alone.alpha, alpha)
    assert not torch.allclose(together[0].auxiliary, together[2].auxiliary)


def test_what_crosses_the_network(run_inline: RunInline) -> None:
    """Two vectors up and three down, beside one number and one row; ``exact`` sends one more per participant."""
    for inner, down in (("mean", 3), ("exact", 2 + 3)):
        run = federation(**{"pgfed.inner": inner, "pgfed.beta": 0.5})
        size = run.setup.sizes["parameters"]
        broadcast, personals, updates = run.round([0, 1, 2])
        for count, records in ((down, (broadcast, personals[0])), (2, (updates[0],))):
            elements = [value.numel() for record in records for value in record.tensors().values()]
            assert sum(n // size for n in elements) == count
            assert sum(n % size for n in elements) <= 3 * 3 + 3
    control, pgfed = (run_inline(m, **{"run.rounds": 1}).rows("clients")[0] for m in ("fedavg_ft", "pgfed"))
    model = 4 * federation().setup.sizes["parameters"]
    assert 0 <= pgfed["bytes_up"] - control["bytes_up"] - model < 1000
    assert 0 <= pgfed["bytes_down"] - control["bytes_down"] - 2 * model < 1000


def test_what_is_kept_depends_on_the_settings() -> None:
    """A client keeps the old gradient for beta and the buffer for momentum only when they are asked for."""
    for keys, auxiliary, buffer in (
        ({}, 0, 0),
        ({"pgfed.beta": 0.5}, 1, 0),
        ({"pgfed.momentum-buffer": "kept", "train.momentum": 0.9}, 0, 1),
    ):
        run = federation(**keys)
        run.round([0, 1, 2])
        size = run.setup.sizes["parameters"]
        assert (len(run.kept[0].auxiliary), len(run.kept[0].buffer)) == (auxiliary * size, buffer * size)
        assert len(run.kept[0].parameters) == size


def test_alphas_summary_and_matrix_are_in_the_results(run_inline: RunInline) -> None:
    """A client's row has the summary of its alpha over the previous participants; the final state has the matrix."""
    run = run_inline("pgfed", **STRONG)
    assert final(run)["alpha"].shape == (6, 6)
    previous = run.rows("rounds")[1]["clients"]
    for row in (r for r in run.rows("clients") if r["round"] == 3):
        mine = final(run)["alpha"][row["client"]]
        assert row["alpha_mean_sum"] == pytest.approx(float(mine[previous].mean()))
        assert row["alpha_min_sum"] == pytest.approx(float(mine[previous].min()))
        assert row["alpha_max_sum"] == pytest.approx(float(mine[previous].max()))
        assert ("alpha_self_sum" in row) == (row["client"] in previous)
        if row["client"] in previous:
            assert row["alpha_self_sum"] == pytest.approx(float(mine[row["client"]]))


@pytest.mark.parametrize("last_batch", ["keep", "drop"])
def test_one_example_is_enough(last_batch: str) -> None:
    """A client with one example expands its risk as well; batches of the pass never count an example twice."""
    run = federation(**{"train.last-batch": last_batch})
    whole = run.shards[1]
    run.shards = [
        Shard(whole.x[:n], whole.y[:n], whole.shift, whole.scale) for n in (1, 17, 33, *map(len, run.shards[3:]))
    ]
    for _ in range(2):
        for update in run.round([0, 1, 2])[2]:
            shard = run.shards[int(update.client)]
            run.setup.model.load(update.parameters)
            x, y = shard.batch(slice(None))
            close(update.gradient, run.setup.model.backward(cross_entropy(run.setup.model(x), y).mean()))


# The authors' numbers.


def authors_setup(case: dict[str, Any]) -> Setup:
    """Return the workspaces of a recorded case: four clients, two per round."""
    flat: Keys = {"run.method": "pgfed", "run.clients": 4, "run.clients-per-round": 2, "model.name": "mlp"}
    flat |= {"model.hidden": 5, "train.lr": case["lr"], "train.momentum": case["momentum"], "train.local-steps": 0}
    flat |= {"train.local-epochs": case["epochs"], "train.batch-size": case["batch"], "train.last-batch": "drop"}
    flat |= {"pgfed.mu": case["mu"], "pgfed.lam": case["lam"], "pgfed.beta": case["beta"]}
    flat |= {"pgfed.momentum-buffer": "kept"}
    return Setup.build(Config.from_flat(flat), (1, 2, 2), 3, torch.device("cpu"))


def fixed_batches(job: Job, shard: Shard) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the batches in the recorded order, which is that of the examples in every pass."""
    for _ in range(job.train.local_epochs):
        for rows in torch.arange(len(shard)).split(job.train.batch_size):
            yield shard.batch(rows)


class FloatShard(Shard):
    """Images that are no bytes."""

    def batch(self, rows: torch.Tensor | slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images as they are."""
        return self.x[rows], self.y[rows]


@pytest.mark.parametrize("case", AUTHORS["cases"], ids=lambda case: str(case["name"]))
def test_four_rounds_are_the_authors(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Auxiliary gradients, alpha, offsets, gradients and models of every round, the momentum buffers kept."""
    setup, unit = authors_setup(case), torch.ones(1, 1, 1)
    shards = [
        FloatShard(2 * pattern(10 + i, len(y), 1, 2, 2) - 1, torch.tensor(y), unit, unit)
        for i, y in enumerate(AUTHORS["labels"])
    ]
    monkeypatch.setattr(Job, "batches", fixed_batches)
    run = Federation(setup, shards)
    assert setup.sizes["parameters"] == case["parameters"]
    run.state = server_half.State(
        **run.state.tensors() | {"parameters": 4 * pattern(1, case["parameters"]) - 2},
    )
    for recorded in case["rounds"]:
        broadcast, personals, updates = run.round(recorded["cohort"])
        if recorded["mean_gradient"]:
            close(broadcast.mean_gradient[0], recorded["mean_gradient"])
        for n, (client, update) in enumerate(zip(recorded["cohort"], updates, strict=True)):
            if recorded["auxiliary"][n]:
                mine = run.kept[client].auxiliary if case["beta"] else personals[n].auxiliary
                close(mine, recorded["auxiliary"][n])
            close(update.parameters, recorded["models"][n])
            close(update.gradient, recorded["gradients"][n])
            close(update.offset, recorded["offsets"][n], atol=1e-5)
        close(run.state.alpha, recorded["alpha"])
        close(run.state.parameters, recorded["averaged"])
