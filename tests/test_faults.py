"""Nodes that misbehave: whoever they are for is named and dropped, or ends the run, and the average never moves."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny
from flwr.app import Array, ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.app.message import make_message
from flwr.clientapp import ClientApp

import clients.app
from fedkd import protocol
from fedkd.config import Scalar
from fedkd.method import load
from fedkd.methods.fedavg import Broadcast, Update
from fedkd.payload import PayloadError
from fedkd.results import Run
from sims import inline
from strategies import robust
from strategies.app import app as server_app
from strategies.base import RoundError

pytestmark = pytest.mark.slow

KEYS: dict[str, Scalar] = {"run.clients": 4, "run.clients-per-round": 0, "run.on-failure": "drop"}
"""Four clients on two nodes, of which the second misbehaves in round 2."""
METHODS = ("fedavg", "fedgen", "scaffold", "apfl")
BAD_NODE, BAD_ROUND = 3, 2
FLOAT_MAX = np.finfo(np.float32).max

Break = Callable[[RecordDict], None]


class Misbehaving(inline.LoopbackGrid):
    """A grid whose replies pass through :attr:`pulled` on their way to the server."""

    pulled: Callable[[list[Message]], list[Message]] = staticmethod(list)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return what has arrived."""
        return type(self).pulled(list(super().pull_messages(message_ids)))


def run_with(
    folder: Path, method: str = "fedavg", breaks: Break | None = None, exchange: str = MessageType.TRAIN, **flat: Scalar
) -> Run:
    """Run on two nodes; what the second answers in round 2 is changed by ``breaks``; ``fails``: before it works."""
    app = ClientApp()

    def passed(real: Callable[[Message, Context], Message], kind: str, message: Message, context: Context) -> Message:
        there = context.node_id == BAD_NODE and protocol.read_order(message).round == BAD_ROUND
        breaks_here = breaks if there and kind == exchange else None
        reply = Message(RecordDict(), reply_to=message) if breaks_here is fails else real(message, context)
        if breaks_here:
            breaks_here(reply.content)
        return reply

    app.train()(partial(passed, clients.app.train, MessageType.TRAIN))
    app.evaluate()(partial(passed, clients.app.evaluate, MessageType.EVALUATE))
    inline.run_apps(server_app, app, tiny(method, **{**KEYS, "run.dir": str(folder), **flat}), nodes=2)
    return Run.open(folder)


def states(run: Run) -> list[str]:
    """Return the hash of the server's state after each round."""
    return [row["state"] for row in run.rows("rounds")]


# ---- what a reply may be broken in -----------------------------------------------------------------------------------


def fails(content: RecordDict) -> None:
    """Answer nothing at all: what every other fault is compared with."""
    raise RuntimeError("out of battery")


def array(change: Callable[[np.ndarray[Any, Any]], Any], name: str = "parameters") -> Break:
    """Return what changes the values of an update's field."""

    def broken(content: RecordDict) -> None:
        updates = content.array_records["updates"]
        key = name if name in updates else next(key for key in updates if updates[key].shape[-1] > 1)
        updates[key] = Array(np.ascontiguousarray(change(np.array(updates[key].numpy()))))

    return broken


def one(value: float) -> Callable[[np.ndarray[Any, Any]], Any]:
    """Return what sets a single value in the last client's row."""

    def change(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        values.reshape(len(values), -1)[-1, 0] = value
        return values

    return change


def updates(change: Callable[[dict[str, Array]], None]) -> Break:
    """Return what changes which fields there are."""

    def broken(content: RecordDict) -> None:
        fields = dict(content.array_records["updates"])
        change(fields)
        content["updates"] = ArrayRecord(fields)

    return broken


def rows(change: Callable[[list[dict[str, Any]]], Any]) -> Break:
    """Return what changes the rows."""

    def broken(content: RecordDict) -> None:
        read = json.loads(str(content.config_records["reply"]["rows"]))
        content.config_records["reply"]["rows"] = json.dumps(change(read) or read)

    return broken


def failures(said: str) -> Break:
    """Return what puts something in the place of why clients failed."""

    def broken(content: RecordDict) -> None:
        content.config_records["reply"]["failed"] = said

    return broken


def without(name: str) -> Break:
    """Return what leaves a record out."""

    def broken(content: RecordDict) -> None:
        del content[name]

    return broken


def _cut(fields: dict[str, Array]) -> None:
    whole = fields["parameters"]
    fields["parameters"] = Array(whole.dtype, whole.shape, whole.stype, whole.data[:-4])


def _renamed(fields: dict[str, Array]) -> None:
    fields["weights"] = fields.pop("parameters")


BROKEN: dict[str, tuple[Break, str]] = {
    "NaN": (array(one(np.nan)), "of client {last} has a value that is not finite"),
    "infinite": (array(one(-np.inf)), "of client {last} has a value that is not finite"),
    "longer vectors": (array(lambda v: np.concatenate([v, v], axis=1)), "the contract says"),
    "a row too many": (array(lambda v: np.concatenate([v, v[:1]])), "is not one row each"),
    "a row too few": (array(lambda v: v[:1]), "is not one row each"),
    "half the precision": (array(lambda v: v.astype(np.float16)), "torch.float16"),
    "text": (array(lambda v: v.astype("U8")), "is no array"),
    "cut short": (updates(_cut), "is no array"),
    "a field missing": (updates(lambda f: f.pop("parameters") and None), "missing fields ['parameters']"),
    "a field more": (updates(lambda f: f.update(more=Array(np.zeros(3)))), "unknown fields ['more']"),
    "a field renamed": (updates(_renamed), "missing fields ['parameters'], unknown fields ['weights']"),
    "no updates": (without("updates"), "the message has no 'updates'"),
    "no rows": (without("reply"), "the rows of a reply cannot be read"),
    "rows of others": (rows(lambda r: [{**row, "client": 9} for row in r]), "it is for other clients"),
    "rows in another order": (rows(lambda r: r[::-1]), "it is for other clients"),
    "failures of nobody": (failures('{"99": "out of battery"}'), "it is for other clients"),
    "failures that are no texts": (failures('{"0": 1}'), "the failures of a reply cannot be read"),
    "failures that are not JSON": (failures("no"), "the failures of a reply cannot be read"),
    "failures of no number": (failures('{"' + "9" * 5000 + '": ""}'), "the failures of a reply cannot be read"),
    "rows of nothing": (rows(lambda r: [{}] * len(r)), "the rows of a reply cannot be read"),
    "a loss that is text": (rows(lambda r: r[0].update(loss_sum="0")), "the rows of a reply cannot be read"),
    "the largest float": (array(lambda v: np.full_like(v, FLOAT_MAX)), "has a value beyond 1.09951e+12"),
    "one value too large": (array(one(-(2.0**41))), "of client {last} has a value beyond 1.09951e+12"),
    "an example more": (array(lambda v: v + 1, "examples"), "examples, and from its data it is"),
    "an example more in a row": (rows(lambda r: r[-1].update(examples=10**6)), "client {last} says examples = 1000000"),
    "a loss that is NaN": (rows(lambda r: r[-1].update(loss_sum=np.nan)), "loss_sum of client {last} = nan"),
    "another round": (rows(lambda r: r[0].update(round=7)), "round is the server's to say"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_reply_is_named_and_leaves_no_trace(fault: str, method: str, tmp_path: Path) -> None:
    """The server's states are those of a run in which that node failed, bit for bit; next round it is asked again."""
    breaks, said = BROKEN[fault]
    silent = run_with(tmp_path / "silent", method, fails)
    run = run_with(tmp_path / "run", method, breaks)
    assert states(run) == states(silent)
    (dropped,) = run.rows("rounds")[BAD_ROUND - 1]["dropped"]
    assert dropped["exchange"] == "train"
    assert dropped["clients"] == silent.rows("rounds")[BAD_ROUND - 1]["dropped"][0]["clients"]
    assert said.format(last=dropped["clients"][-1]) in dropped["why"]
    assert "the reply for clients" in dropped["why"]
    assert not any("dropped" in row for row in run.rows("rounds")[BAD_ROUND:])


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_reply_ends_the_run_where_that_is_wanted(fault: str, tmp_path: Path) -> None:
    """The default of a simulation; ``error.txt`` names whom the reply was for, and nothing of the round is kept."""
    breaks, said = BROKEN[fault]
    with pytest.raises(PayloadError, match="the reply for clients "):
        run_with(tmp_path / "run", breaks=breaks, **{"run.on-failure": "fail"})
    error = (tmp_path / "run" / "error.txt").read_text()
    assert error.count("\n") == 1
    assert said.partition("{")[0] in error
    assert len(Run.open(tmp_path / "run").rows("rounds")) == BAD_ROUND - 1


@pytest.mark.parametrize("policy", ["drop", "fail"])
def test_a_client_that_lost_its_state_is_named_and_not_begun_anew(policy: str, tmp_path: Path) -> None:
    """The history would be another one, and nobody would know; the others of its node are trained and scored."""
    lost = []

    def loses(content: RecordDict) -> None:
        (client, *_) = [row["client"] for row in json.loads(str(content.config_records["reply"]["rows"]))]
        [file] = tmp_path.glob(f"run/state/{client:06d}/{BAD_ROUND:06d}.safetensors")
        file.unlink()
        lost.append(client)

    keys: dict[str, Scalar] = {"run.on-failure": policy, "run.eval-every": 1, "run.rounds": BAD_ROUND + 1}
    if policy == "fail":
        with pytest.raises(RoundError, match="the state of client"):
            run_with(tmp_path / "run", "scaffold", loses, **keys)
        said = (tmp_path / "run" / "error.txt").read_text()
    else:
        dropped = run_with(tmp_path / "run", "scaffold", loses, **keys).rows("rounds")[BAD_ROUND]["dropped"]
        assert [(each["exchange"], each["clients"]) for each in dropped] == [("train", lost), ("evaluate", lost)]
        said = dropped[0]["why"]
    assert f"client {lost[0]} failed: the state of client {lost[0]} from round {BAD_ROUND} is lost" in said


@pytest.mark.parametrize("policy", ["drop", "fail"])
def test_reasons_are_a_line_whatever_they_hold(policy: str, tmp_path: Path) -> None:
    """They are written to files and shown on terminals."""
    lost: list[int] = []

    def says(content: RecordDict) -> None:
        said = content.config_records["reply"]
        (first, *others) = json.loads(str(said["rows"]))
        lost.append(first["client"])
        said["rows"], said["failed"] = json.dumps(others), json.dumps({lost[0]: "\ud800 \x1b[2J\nout" + "!" * 1000})
        content["updates"] = ArrayRecord(
            {name: Array(np.array(one.numpy())[1:]) for name, one in content.array_records["updates"].items()}
        )

    why = "[2J out" + "!" * 493
    if policy == "fail":
        with pytest.raises(RoundError, match="out!!!"):
            run_with(tmp_path / "run", breaks=says, **{"run.on-failure": "fail"})
        assert (tmp_path / "run" / "error.txt").read_text() == f"client {lost[0]} failed: {why}\n"
    else:
        dropped = run_with(tmp_path / "run", breaks=says).rows("rounds")[BAD_ROUND - 1]["dropped"]
        assert dropped == [{"exchange": "train", "clients": lost, "why": f"client {lost[0]} failed: {why}"}]


SCORES: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "none": lambda rows: [{"client": row["client"], "total": row["total"]} for row in rows],
    "of a model that there is not": lambda rows: [
        row | {"personal_correct": row["total"], "personal_loss_sum": 0.0} for row in rows
    ],
    "without the loss": lambda rows: [{k: v for k, v in row.items() if k != "global_loss_sum"} for row in rows],
    "of something else": lambda rows: [row | {"luck": 1} for row in rows],
}


@pytest.mark.parametrize("scores", SCORES)
def test_scores_of_other_models_than_the_others(scores: str, tmp_path: Path) -> None:
    """A client that had a personal model where nobody has one would be scored by it; one without any, by nothing."""
    run = run_with(tmp_path / "run", "fedavg", rows(SCORES[scores]), exchange=MessageType.EVALUATE)
    straight = run_with(tmp_path / "straight", "fedavg")
    assert states(run) == states(straight)
    dropped = run.rows("rounds")[BAD_ROUND - 1]["dropped"]
    clients = sorted(client for each in dropped for client in each["clients"])
    assert {each["exchange"] for each in dropped} == {"evaluate"}
    assert clients == [1, 3]  # the second node's, of two
    whole = [row for row in straight.rows("evaluations") if row["round"] == BAD_ROUND]
    assert [row for row in run.rows("evaluations") if row["round"] == BAD_ROUND] == [
        row for row in whole if row["client"] not in clients
    ]
    assert 0 < len(clients) < len(whole)


@pytest.mark.parametrize("number", [0, -3, 2**40])
def test_numbers_of_examples_that_cannot_be(number: int, tmp_path: Path) -> None:
    """They are the weights of an average."""
    breaks = array(lambda v: np.full_like(v, number), "examples")
    run = run_with(tmp_path / "run", breaks=breaks)
    assert states(run) == states(run_with(tmp_path / "silent", breaks=fails))
    assert "examples of client" in run.rows("rounds")[1]["dropped"][0]["why"]


def _rolled(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the counts of other classes."""
    return np.roll(values, 1, axis=1)


@pytest.mark.parametrize(
    ("method", "field", "change"),
    [
        ("fedgen", "label_counts", _rolled),
        ("fedgen", "label_counts", lambda v: v * 2),
        ("fedgen", "label_counts", lambda v: v * 0),
        ("fedftg", "class_counts", _rolled),
        ("fedftg", "class_counts", lambda v: v * 10**6),
        ("fedd2s", "label_counts", _rolled),
        ("fedproto", "counts", lambda v: v * 0 + 10**6),
        ("fedproto", "counts", _rolled),
        ("feddistill", "held", lambda v: v * 0 + 2),
        ("fedper", "examples", lambda v: v * 0),
    ],
)
def test_counts_that_are_not_those_of_the_data(method: str, field: str, change: Any, tmp_path: Path) -> None:
    """They say which classes are asked for, and whom a class is learnt from: no client may make them up."""
    silent = run_with(tmp_path / "silent", method, fails)
    run = run_with(tmp_path / "run", method, array(change, field))
    assert states(run) == states(silent)
    (dropped,) = run.rows("rounds")[BAD_ROUND - 1]["dropped"]
    assert f"Update.{field} of client " in dropped["why"]


@pytest.mark.parametrize(
    ("field", "change", "said"),
    [
        ("parameters", lambda v: v * 0 + 1e300, "has a value beyond 9.0072e+15"),
        ("parameters", lambda v: v * np.inf, "has a value that is not finite"),
        ("examples", lambda v: v + 1, "examples, and from its data it is"),
        ("clients", lambda v: v + 1, "is of 3"),
    ],
)
def test_sums_that_cannot_be(field: str, change: Any, said: str, tmp_path: Path) -> None:
    """Of the clients of a node together, where that is what nodes send."""
    sums: dict[str, Scalar] = {"run.exchange": "sums"}
    with np.errstate(invalid="ignore"):
        run = run_with(tmp_path / "run", breaks=array(change, field), **sums)
    assert states(run) == states(run_with(tmp_path / "silent", breaks=fails, **sums))
    assert said in run.rows("rounds")[1]["dropped"][0]["why"]


@pytest.mark.parametrize("method", ["pgfed", "fedfomo"])
def test_an_update_in_another_clients_name(method: str, tmp_path: Path) -> None:
    """Methods that keep a row per client need everybody, so the run ends; it names who said so."""
    with pytest.raises(PayloadError, match=r"the update of client \d is for client 0"):
        run_with(tmp_path, method, array(lambda v: v * 0, "client"), **{"run.on-failure": "auto"})


@pytest.mark.parametrize(
    "fault",
    [
        {"total": -1},
        {"total": 0, "personal_correct": 0, "global_correct": 0},
        {"total": 10**6},
        {"personal_correct": 10**6},
        {"global_correct": 10**6},
        {"total": "3"},
        {"client": 9},
    ],
    ids=str,
)
def test_a_broken_score_is_left_out(fault: dict[str, Any], tmp_path: Path) -> None:
    """The others' scores stand, and the model is not touched."""
    straight = run_with(tmp_path / "straight", "apfl")
    run = run_with(tmp_path / "run", "apfl", rows(lambda r: r[-1].update(fault)), MessageType.EVALUATE)
    assert states(run) == states(straight)
    (dropped,) = run.rows("rounds")[BAD_ROUND - 1]["dropped"]
    assert dropped["exchange"] == "evaluate"
    kept = [row for row in straight.rows("evaluations") if row["round"] != 2 or row["client"] not in dropped["clients"]]
    assert run.rows("evaluations") == kept


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_a_score_without_a_loss_is_a_score(loss: float, tmp_path: Path) -> None:
    """A model that others have ruined has none, and whoever says so is honest."""
    breaks = rows(lambda r: r[-1].update(global_loss_sum=loss))
    run = run_with(tmp_path, "fedavg", breaks, MessageType.EVALUATE)
    assert not any("dropped" in row for row in run.rows("rounds"))
    assert len(run.rows("evaluations")) == 12


# ---- answers that nobody asked for -----------------------------------------------------------------------------------


@pytest.fixture
def pulled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[list[Message]], list[Message]]], None]]:
    """Return how to say what becomes of the replies of an exchange."""
    monkeypatch.setattr(inline, "LoopbackGrid", Misbehaving)

    def says(change: Callable[[list[Message]], list[Message]]) -> None:
        monkeypatch.setattr(Misbehaving, "pulled", staticmethod(change))

    return says


def other(reply: Message) -> Message:
    """Return another answer to the same order, with other numbers in it."""
    content = RecordDict({key: reply.content[key] for key in reply.content})
    if "updates" in content:
        fields = {key: Array(np.array(a.numpy()) * 7) for key, a in content.array_records["updates"].items()}
        content["updates"] = ArrayRecord(fields)
    return make_message(reply.metadata, content)


@pytest.mark.parametrize("method", METHODS)
def test_a_node_that_answers_twice(method: str, pulled: Any, tmp_path: Path) -> None:
    """The first answer counts, whatever the second says and whether it comes at once or a round later."""
    straight = run_with(tmp_path / "straight", method)
    pulled(lambda replies: [*replies, *map(other, replies)])
    assert run_with(tmp_path / "at-once", method).digest() == straight.digest()
    kept: list[Message] = []

    def later(replies: list[Message]) -> list[Message]:
        found = [*kept, *replies]
        kept.extend(map(other, replies))
        return found

    pulled(later)
    run = run_with(tmp_path / "later", method)
    assert run.digest() == straight.digest()
    assert not any("dropped" in row for row in run.rows("rounds"))


def test_a_broken_answer_is_not_mended_by_a_second(pulled: Any, tmp_path: Path) -> None:
    """Who answers wrongly has answered; trying again is for the next round."""
    silent = run_with(tmp_path / "silent", breaks=fails)
    pulled(lambda replies: [*replies, *map(other, replies)])
    run = run_with(tmp_path / "run", breaks=array(one(np.nan)))
    assert states(run) == states(silent)


def test_an_answer_to_an_older_round(pulled: Any, tmp_path: Path) -> None:
    """In round 2 the node sends once more what it had for round 1: that is no answer, and moves nothing."""
    first: dict[int, Message] = {}

    def stale(replies: list[Message]) -> list[Message]:
        trained = [reply for reply in replies if "updates" in reply.content.array_records]
        for reply in trained:
            node, round = reply.metadata.src_node_id, reply.metadata.group_id.partition("-")[0]
            if round == "1":
                first[node] = reply
            elif node == BAD_NODE and round == str(BAD_ROUND):
                return [other(first[node]) if one is reply else one for one in replies]
        return replies

    silent = run_with(tmp_path / "silent", breaks=fails)
    pulled(stale)
    # the engine waits for the answer until the timeout
    run = run_with(tmp_path / "run", **{"run.timeout": 0.5})
    assert states(run) == states(silent)
    (dropped,) = run.rows("rounds")[1]["dropped"]
    assert "did not answer in time" in dropped["why"]


# ---- what is finite --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "change", [lambda v: v * np.float32(1e6), lambda v: np.full_like(v, 1e4)], ids=["times", "full"]
)
def test_a_model_that_is_too_long_beside_the_others_is_refused(change: Any, method: str, tmp_path: Path) -> None:
    """Finite, and enough to end a run of a deep model: the average is the one without it, bit for bit."""
    run = run_with(tmp_path / "run", method, array(change), **CONVOLUTIONS)
    silent = run_with(tmp_path / "silent", method, fails, **CONVOLUTIONS)
    assert states(run) == states(silent)
    for dropped in run.rows("rounds")[BAD_ROUND - 1]["dropped"]:
        (client,) = dropped["clients"]
        assert dropped["why"].startswith(f"the update of client {client} has parameters of length ")
        assert "it diverged, or is hostile" in dropped["why"]


@pytest.mark.parametrize(
    ("method", "field"),
    [
        ("scaffold", "control_change"),
        ("fedproto", "prototypes"),
        ("feddistill", "outputs"),
        ("fedavg", "statistics"),
        ("fedd2s", "soft_labels"),
    ],
)
def test_so_is_whatever_else_a_method_sends(method: str, field: str, tmp_path: Path) -> None:
    """What is no model can ruin one as well: the clients' next steps go along it."""
    shares_models = "parameters" in load(method).Update.specs()
    keys = CONVOLUTIONS | ({} if shares_models else {"model.norm-statistics": "personal"})
    run = run_with(tmp_path / "run", method, array(lambda v: np.full_like(v, 1e9), field), **keys)
    silent = run_with(tmp_path / "silent", method, fails, **keys)
    assert states(run) == states(silent)
    dropped = run.rows("rounds")[BAD_ROUND - 1]["dropped"]
    assert dropped
    for each in dropped:
        assert each["why"].startswith(f"the update of client {each['clients'][0]} has {field} of length ")


@pytest.mark.parametrize(
    ("method", "exchange"),
    [("fedavg", "updates"), ("fedavg", "sums"), ("feddf", "updates"), ("fedper", "updates"), ("fedper", "sums")],
)
def test_variances_below_zero(method: str, exchange: str, tmp_path: Path) -> None:
    """BatchNorm takes their root, so a model with them gives no number for any image."""
    keys: dict[str, Scalar] = {**CONVOLUTIONS, "run.exchange": exchange}
    keys |= {"data.public-fraction": 0.1} if method == "feddf" else {}
    keys |= {"fedper.head": "conv2"} if method == "fedper" else {}  # whose statistics do not travel
    silent = run_with(tmp_path / "silent", method, fails, **keys)
    run = run_with(tmp_path / "run", method, array(np.negative, "statistics"), **keys)
    assert states(run) == states(silent)
    (dropped,) = run.rows("rounds")[BAD_ROUND - 1]["dropped"]
    assert re.search(r"statistics of clients? \d.* has a running variance of -", dropped["why"])


def test_methods_that_need_everybody_end_and_name_the_client(tmp_path: Path) -> None:
    """PGFed sends everybody's gradients on, so one that is too long ends the run before anybody gets it."""
    breaks = array(lambda v: np.full_like(v, 1e9), "gradient")
    with pytest.raises(PayloadError, match=r"the update of client \d has gradient of length"):
        run_with(tmp_path / "run", "pgfed", breaks, **{"run.on-failure": "fail"})


def test_small_gradients_are_no_measure() -> None:
    """Most clients may have converged, and one has not: it is compared with the model, not with their nothing."""
    kind = load("scaffold").Update

    def update(change: float) -> Any:
        fields = {"parameters": torch.ones(4), "statistics": torch.zeros(0), "control_change": torch.full((4,), change)}
        return kind(**fields, examples=torch.tensor(1))

    sent = Broadcast(torch.ones(4), torch.zeros(0))
    assert not robust.refused(tiny("scaffold"), sent, {0: update(1e-9), 1: update(1e-9), 2: update(1.0)})
    assert list(robust.refused(tiny("scaffold"), sent, {0: update(1e-9), 1: update(1e-9), 2: update(1e4)})) == [2]


def test_small_representations_are_no_measure() -> None:
    """FedD2S sends no model: where most clients' first stage gives nothing any more, the one whose does is no fault."""
    kind = load("fedd2s").Update

    def update(length: float) -> Any:
        fields = {"soft_labels": torch.eye(4), "representations": torch.full((4, 9), length / 6)}
        return kind(**fields, labels=torch.arange(4), label_counts=torch.ones(4, dtype=torch.int64))

    sent = load("fedd2s").Broadcast(torch.zeros(4, 4), torch.zeros(4, dtype=torch.int64))
    assert not robust.refused(tiny("fedd2s"), sent, {0: update(1e-3), 1: update(1e-3), 2: update(20.0)})
    assert list(robust.refused(tiny("fedd2s"), sent, {0: update(1e-3), 1: update(1e-3), 2: update(1e4)})) == [2]


def test_long_statistics_are_no_measure_of_models() -> None:
    """Where a model travels it is the measure, however large the running variances are."""
    kind = load("fedavg").Update

    def update(length: float) -> Any:
        vectors = {"parameters": torch.full((4,), length / 2), "statistics": torch.full((4,), 1e3)}
        return kind(**vectors, examples=torch.tensor(1))

    sent = load("fedavg").Broadcast(torch.ones(4), torch.full((4,), 1e3))
    assert list(robust.refused(tiny("fedavg"), sent, {0: update(2), 1: update(2), 2: update(1e6)})) == [2]


def test_rules_get_long_updates_as_they_are(tmp_path: Path) -> None:
    """Who takes a rule or a clip wants the round with them; the run does not end."""
    for key, value in {"aggregation.rule": "median", "aggregation.clip-norm": 1.0}.items():
        keys: dict[str, Scalar] = {key: value, "run.on-failure": "fail", "run.min-clients": 3}
        run = run_with(tmp_path / key, breaks=array(lambda v: v * np.float32(1e6)), **keys)
        assert [row["clients"] for row in run.rows("rounds")] == [[0, 1, 2, 3]] * 3


def test_two_clients_have_the_sent_model_to_be_compared_with() -> None:
    """There is no majority of two, and no length that a model of zeros could be compared with."""
    sent = Broadcast(torch.ones(4), torch.zeros(0))
    update = partial(Update, statistics=torch.zeros(0), examples=torch.tensor(1))
    long, usual = update(parameters=torch.full((4,), 1e4)), update(parameters=torch.ones(4))
    assert list(robust.refused(tiny(), sent, {0: long, 1: usual})) == [0]
    nothing = Broadcast(torch.zeros(4), torch.zeros(0))
    assert not robust.refused(tiny(), nothing, {0: long, 1: usual})
    assert list(robust.refused(tiny(), nothing, {0: long, 1: usual, 2: usual})) == [0]
    assert not robust.refused(tiny(), sent, {0: update(parameters=torch.full((4,), 900.0)), 1: usual})


CONVOLUTIONS: dict[str, Scalar] = {"model.name": "fedgen_cnn", "model.norm-statistics": "averaged"}
"""A model that large numbers take out of what a float can hold."""


def test_an_update_that_moves_too_far_is_refused(tmp_path: Path) -> None:
    """With a bound on it the run goes on, and of the node's two clients only the one that exceeds it is left out."""
    norm: dict[str, Scalar] = {"aggregation.refuse-norm": 100.0, **CONVOLUTIONS}
    run = run_with(tmp_path / "run", breaks=array(one(1e6)), **norm)
    first, second, third = run.rows("rounds")
    (dropped,) = second["dropped"]
    (client,) = dropped["clients"]
    assert dropped["exchange"] == "train"
    said = f"the update of client {client} changes the model by 1e+06, and aggregation.refuse-norm = 100"
    assert dropped["why"] == said
    assert second["clients"] == [other for other in range(4) if other != client]
    assert [row["client"] for row in run.rows("clients") if row["round"] == 2] == second["clients"]
    assert "dropped" not in first
    assert "dropped" not in third
    straight = run_with(tmp_path / "straight", **norm)
    assert states(straight)[0] == states(run)[0]
    assert straight.digest() == run_with(tmp_path / "off", **{**norm, "aggregation.refuse-norm": 0.0}).digest()
    with pytest.raises(RoundError, match=r"3 of 4 clients answered, and run\.min-clients = 4: the update of client \d"):
        run_with(tmp_path / "few", breaks=array(one(1e6)), **norm, **{"run.min-clients": 4})
    with pytest.raises(PayloadError, match=re.escape(said)):
        run_with(tmp_path / "fail", breaks=array(one(1e6)), **{**norm, "run.on-failure": "fail"})


def test_too_few_are_left(tmp_path: Path) -> None:
    """Dropping ends where ``run.min-clients`` says, with everybody named."""
    with pytest.raises(RoundError, match=r"2 of 4 clients answered, and run\.min-clients = 3: the reply for clients"):
        run_with(tmp_path, breaks=array(one(np.nan)), **{"run.min-clients": 3})
