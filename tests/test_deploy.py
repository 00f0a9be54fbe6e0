"""Devices: data of their own, who hosts whom, refusals, keys, and the same numbers as in one process."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import ssl
import stat
import sys
import tomllib
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import tiny
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.task_identity import TaskIdentity
from lab import free_port
from PIL import Image
from test_resume import is_alive, wait_until

import clients.app
import strategies.app
import strategies.devices
from fedkd import protocol
from fedkd.config import Scalar
from fedkd.data import FederatedData, federate
from fedkd.data.devices import Description, Federation, Place, hosted, parse_clients, write_split
from fedkd.errors import UserError
from fedkd.payload import PayloadError
from fedkd.results import Run
from sims import hosts, inline
from sims.deploy import Deployment, check
from sims.launch import on_devices
from strategies.app import app as server_app
from strategies.base import RoundError
from strategies.devices import Devices, RefusalError, judge
from strategies.grid import PromptGrid

pytestmark = pytest.mark.slow

TWO = {"run.clients": 4, "run.clients-per-round": 2, "data.alpha": 0.5}
"""Four clients, for two nodes."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of the four clients of ``TWO``."""
    folder = tmp_path_factory.mktemp("shards")
    write_split(tiny(**TWO), folder)
    return folder


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for no further node."""
    monkeypatch.setattr(strategies.devices, "WAIT_SECONDS", 0.0)


def device(numbers: str, data: Path, state: Path) -> UserConfig:
    """Return the configuration of a node."""
    return {"clients": numbers, "data": str(data), "state": str(state)}


def two(shards: Path, state: Path) -> list[UserConfig]:
    """Return the configurations of two nodes that host two clients each."""
    return [device("0,1", shards, state / "first"), device("2-3", shards, state / "second")]


def run_devices(
    folder: Path,
    devices: Sequence[UserConfig],
    method: str = "fedavg",
    client_app: ClientApp = clients.app.app,
    **flat: Scalar,
) -> Run:
    """Run on devices that are calls in this process."""
    config = tiny(method, **{**TWO, "data.partition": "devices", "run.dir": str(folder), **flat})
    inline.run_apps(server_app, client_app, config, devices=devices)
    return Run.open(folder)


# ---- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fedavg", "fedgen", "apfl", "pgfed", "scaffold", "feddf"])
def test_devices_give_the_numbers_of_the_undivided_data(
    method: str, run_inline: Callable[..., Run], tmp_path: Path
) -> None:
    """Same examples, same order, same bytes, same scaling, and the public images stay with the server."""
    straight = run_inline(method, **TWO)
    write_split(tiny(method, **TWO), tmp_path / "data")
    public: dict[str, Scalar] = {"data.root": str(tmp_path / "data" / "public")} if method == "feddf" else {}
    run = run_devices(tmp_path / "run", two(tmp_path / "data", tmp_path), method, **public)
    assert run.digest() == straight.digest()
    assert (run.folder / "partition.csv").read_text() == (straight.folder / "partition.csv").read_text()
    assert len(list(tmp_path.glob("*/*/*/*.safetensors"))) == len(list(straight.folder.glob("state/*/*")))
    assert not (run.folder / "state").exists()


def test_an_official_test_set_stays_with_its_owner(idx_root: str, tmp_path: Path) -> None:
    """28-pixel-like data in two official splits, under the protocol that keeps them apart."""
    keys: dict[str, Scalar] = {**TWO, "data.name": "mnist", "data.test": "own-labels"}
    config = tiny(**keys, **{"data.root": idx_root, "run.dir": str(tmp_path / "straight")})
    inline.run(config)
    write_split(config, tmp_path / "data")
    run = run_devices(tmp_path / "run", two(tmp_path / "data", tmp_path), **keys)
    assert run.digest() == Run.open(tmp_path / "straight").digest()


def test_a_run_goes_on_with_the_states_that_devices_kept(shards: Path, tmp_path: Path) -> None:
    """What a device calls a run is the same when the run goes on, from another folder too."""
    keys: dict[str, Scalar] = {"run.checkpoint-every": 1}
    devices = two(shards, tmp_path)
    whole = run_devices(tmp_path / "whole", two(shards, tmp_path / "other"), "apfl", **keys)
    failing = ClientApp()
    failing.query()(clients.app.query)
    failing.evaluate()(clients.app.evaluate)

    @failing.train()
    def train(message: Message, context: Context) -> Message:
        if protocol.read_order(message).round == 3:
            raise RuntimeError("no")
        return clients.app.train(message, context)

    with pytest.raises(RoundError, match="no"):
        run_devices(tmp_path / "run", devices, "apfl", failing, **keys)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert run_devices(tmp_path / "moved", devices, "apfl", **keys).digest() == whole.digest()


def test_other_data_does_not_go_on(shards: Path, tmp_path: Path) -> None:
    """The fingerprints that the devices tell are compared with those that the run began with."""
    failing = ClientApp()
    failing.query()(clients.app.query)
    with pytest.raises(RoundError):
        run_devices(tmp_path / "run", two(shards, tmp_path), client_app=failing)
    shutil.copytree(shards, tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "3")
    shutil.copytree(shards / "2", tmp_path / "other" / "3")
    with pytest.raises(UserError, match="other data"):
        run_devices(tmp_path / "run", two(tmp_path / "other", tmp_path))


# ---- data on a device ------------------------------------------------------------------------------------------------


def read(folder: Path, numbers: str = "0", **flat: Scalar) -> FederatedData:
    """Return what a device reads."""
    config = tiny(**{**TWO, "data.partition": "devices", **flat})
    return hosted(config, Place(parse_clients(numbers), folder, folder))


def write_pictures(folder: Path, counts: dict[str, int], size: int = 8, mode: str = "L") -> None:
    """Write invented pictures, so many of each class."""
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            shape = (size, size) if mode == "L" else (size, size, 3)
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / name / f"{number}.png")


def test_pictures_in_a_folder_per_class(tmp_path: Path) -> None:
    """In the order of classes and file names; an empty folder counts as a class."""
    write_pictures(tmp_path / "0" / "train", {"cat": 3, "dog": 0, "emu": 2}, mode="RGB")
    write_pictures(tmp_path / "0" / "test", {"emu": 1}, mode="RGB")
    data = read(tmp_path, **{"data.name": "my/animals"})
    assert data.images.classes == ("cat", "dog", "emu")
    assert data.shape == (3, 8, 8)
    assert data.class_counts("train")[0].tolist() == [3, 0, 2]
    assert data.class_counts("test")[0].tolist() == [0, 0, 1]
    with Image.open(tmp_path / "0" / "train" / "cat" / "1.png") as picture:
        expected = np.asarray(picture).transpose(2, 0, 1)
    x, y = data.shard(0, "train").batch(slice(1, 2))
    assert np.allclose((x[0].numpy() * 0.5 + 0.5) * 255, expected, atol=1e-3)
    assert y.tolist() == [0]


def test_a_list_of_classes_beside_the_clients(tmp_path: Path) -> None:
    """A client that lacks a class need not have its folder, if ``classes.txt`` names it."""
    write_pictures(tmp_path / "0" / "train", {"emu": 2})
    (tmp_path / "classes.txt").write_text("dog\nemu\n\n")
    assert read(tmp_path, **{"data.name": "my/animals"}).class_counts()[0].tolist() == [0, 2]


def test_a_changed_folder_is_read_again(tmp_path: Path) -> None:
    """What is cached is what the files were."""
    write_pictures(tmp_path / "0" / "train", {"cat": 3})
    assert read(tmp_path, **{"data.name": "my/animals"}).sizes()[0] == 3
    write_pictures(tmp_path / "0" / "train", {"dog": 1})
    assert read(tmp_path, **{"data.name": "my/animals"}).sizes()[0] == 4


def _nothing(folder: Path) -> None:
    (folder / "0").mkdir()


def _no_train(folder: Path) -> None:
    write_pictures(folder / "0" / "train", {"cat": 0})


def _strange_class(folder: Path) -> None:
    write_pictures(folder / "0" / "train", {"cat": 1})
    write_pictures(folder / "0" / "test", {"dog": 1})


def _two_sizes(folder: Path) -> None:
    write_pictures(folder / "0" / "train", {"cat": 1})
    write_pictures(folder / "0" / "train" / "more", {"x": 1})
    write_pictures(folder / "0" / "train", {"dog": 1}, size=9)


def _no_picture(folder: Path) -> None:
    write_pictures(folder / "0" / "train", {"cat": 1})
    (folder / "0" / "train" / "cat" / "9.png").write_text("no")


def _no_parquet(folder: Path) -> None:
    (folder / "0").mkdir()
    (folder / "0" / "train.parquet").write_text("no")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: None, "the data of client 0 is not there: no folder"),
        (_nothing, "neither train.*parquet nor a folder train"),
        (_no_train, "holds no training images"),
        (_strange_class, "dog is none of the classes cat"),
        (_two_sizes, "others are"),
        (_no_picture, "9.png cannot be decoded"),
        (_no_parquet, "cannot be read"),
    ],
)
def test_data_that_cannot_be_read_is_named(make: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    """One line that says whose data it is and what is wrong."""
    make(tmp_path)
    with pytest.raises(UserError, match=said) as raised:
        read(tmp_path, **{"data.name": "my/animals"})
    assert "\n" not in str(raised.value)


def test_statistics_that_nobody_has(shards: Path) -> None:
    """``standard`` scaling works for data whose statistics are known, and for no other."""
    assert read(shards, **{"data.scaling": "standard"}).sizes()[0]
    with pytest.raises(UserError, match="needs the mean and deviation"):
        read(shards, **{"data.scaling": "standard", "data.name": "my/digits"})


@pytest.mark.parametrize(("text", "numbers"), [("0", (0,)), (" 3, 1 ", (1, 3)), ("0-2,7", (0, 1, 2, 7)), ("5-5", (5,))])
def test_numbers_of_clients(text: str, numbers: tuple[int, ...]) -> None:
    """Numbers and ranges, sorted."""
    assert parse_clients(text) == numbers


@pytest.mark.parametrize("text", ["", "a", "-1", "1,", "3-1", "1,1", "0-2,2", "1.5", "12345678"])
def test_what_is_no_number_of_a_client(text: str) -> None:
    """Refused, with the text."""
    with pytest.raises(UserError, match="clients = "):
        parse_clients(text)


# ---- who takes part --------------------------------------------------------------------------------------------------


def _other_shape(shards: Path, folder: Path) -> list[UserConfig]:
    for client in (2, 3):
        write_pictures(folder / "data" / str(client) / "train", dict.fromkeys("0123456789", 1), size=9)
    return [device("0,1", shards, folder), device("2,3", folder / "data", folder)]


def _other_classes(shards: Path, folder: Path) -> list[UserConfig]:
    for client in (2, 3):
        write_pictures(folder / "data" / str(client) / "train", dict.fromkeys("012345678", 1))
    return [device("0,1", shards, folder), device("2,3", folder / "data", folder)]


def _not_all(shards: Path, folder: Path) -> list[UserConfig]:
    return [device("0,1", shards, folder), device("3", shards, folder)]


def _twice(shards: Path, folder: Path) -> list[UserConfig]:
    return [device("0,1", shards, folder), device("1-3", shards, folder)]


def _beyond(shards: Path, folder: Path) -> list[UserConfig]:
    return [device("0,1", shards, folder), device("2-4", shards, folder)]


def _no_data(shards: Path, folder: Path) -> list[UserConfig]:
    return [device("0,1", shards, folder), device("2,3", folder / "nothing", folder)]


def _nothing_said(shards: Path, folder: Path) -> list[UserConfig]:
    return [device("0,1", shards, folder), {}]


def _misspelt(shards: Path, folder: Path) -> list[UserConfig]:
    return [device("0,1", shards, folder), {**device("2,3", shards, folder), "sate": "x"}]


def _relative(shards: Path, folder: Path) -> list[UserConfig]:
    return [device("0,1", shards, folder), {"clients": "2,3", "data": "shards"}]


def _simulated(shards: Path, folder: Path) -> list[UserConfig]:
    return [device("0,1", shards, folder), {"partition-id": 0, "num-partitions": 2}]


@pytest.mark.parametrize(
    ("make", "said", "on_the_device"),
    [
        (_other_shape, "its images differ from those of client 0: 1x9x9 and 1x8x8", True),
        (_other_classes, "its classes differ from those of client 0: 9 and 10", True),
        (_not_all, "no node hosts client 2; 2 nodes are there", False),
        (_twice, "client 1 is hosted twice", True),
        (_beyond, "this node hosts client 4, and the run has run.clients = 4", True),
        (_no_data, "the data of client 2 is not there: no folder", True),
        (_nothing_said, "this node's configuration names no clients and no data", True),
        (_misspelt, "has an unknown key 'sate'", True),
        (_relative, "has to be an absolute path", True),
        (_simulated, "not simulated ones", True),
    ],
)
def test_who_does_not_fit_is_refused(
    make: Callable[[Path, Path], list[UserConfig]],
    said: str,
    on_the_device: bool,
    shards: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A clear line in the run's folder and on the device's log, before anything is trained."""
    with caplog.at_level(logging.ERROR, "flwr"), pytest.raises(RefusalError, match=said):
        run_devices(tmp_path / "run", make(shards, tmp_path))
    assert said in (tmp_path / "run" / "error.txt").read_text()
    lines = [record.message for record in caplog.records if "this node does not take part" in record.message]
    assert any(said in line for line in lines) == on_the_device
    assert not (tmp_path / "run" / "config.toml").exists()


def test_a_refused_node_does_not_stop_those_that_have_all_clients(shards: Path, tmp_path: Path) -> None:
    """A device without data beside a complete federation is left out."""
    assert run_devices(tmp_path / "run", [*two(shards, tmp_path), {}]).finished


class Field(inline.LoopbackGrid):
    """Nodes that appear at a certain look; some never answer, and none does when it is told that it is refused.

    Args:
        devices: the nodes' configurations.
        appear: at which look each of them is there.
        hung: those that never answer.
        lost: those that lose the first question.
        late: whether Flower says that the lost ones are over.
    """

    def __init__(
        self,
        devices: Sequence[UserConfig],
        appear: Sequence[int],
        hung: Container[int] = (),
        lost: Iterable[int] = (),
        late: bool = False,
    ) -> None:
        contexts = {node: Context(1, node, own, RecordDict(), {}) for node, own in enumerate(devices)}
        super().__init__(clients.app.app, contexts)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self.appear, self.hung, self.looks = appear, hung, 0
        self.told: list[int] = []
        self.lost, self.late = set(lost), late

    def get_node_ids(self) -> list[int]:
        """Return the nodes that have appeared by now."""
        self.looks += 1
        return [node for node in self._contexts if self.appear[node] <= self.looks]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Deliver messages; what is never answered loses its reply."""
        messages = list(messages)
        names = list(super().push_messages(messages))
        for name, message in zip(names, messages, strict=True):
            node = message.metadata.dst_node_id
            refused = bool(protocol.Question.read(message).refused)
            if refused:
                self.told.append(node)
            if refused or node in self.hung or node in self.lost:
                self._replies.pop(name)
            if node in self.lost:
                self.lost.discard(node)
                if self.late:
                    error = Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "expired")
                    self._replies[name] = Message(error, reply_to=message)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return what has arrived; whoever looks for ever waits for ever."""
        self.looks += 1
        assert self.looks < 100, "still waiting"
        return super().pull_messages(message_ids)


@pytest.fixture
def patient(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait as long as it takes, and look at once again."""
    monkeypatch.setattr(strategies.devices, "WAIT_SECONDS", 600.0)
    monkeypatch.setattr(strategies.devices, "LOOK_SECONDS", 0.0)


def ask(grid: Field) -> Federation:
    """Return who hosts whom, as a run finds out before its first round."""
    return Devices(PromptGrid(grid), ["fedavg"]).federation(tiny(**{**TWO, "data.partition": "devices"}))


@pytest.mark.usefixtures("patient")
def test_a_refused_spare_node_does_not_end_the_start(shards: Path, tmp_path: Path) -> None:
    """It is there before those that are needed."""
    grid = Field([{}, *two(shards, tmp_path)], appear=[1, 3, 6])
    assert ask(grid).nodes == (1, 1, 2, 2)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("first", [True, False])
def test_a_hung_spare_node_does_not_stall_the_start(
    first: bool, shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody waits for its answer, whether it appeared before the others or after some of them; the log says so."""
    grid = Field([device("0-3", shards, tmp_path), *two(shards, tmp_path)], [1 if first else 4, 1, 5], hung={0})
    with caplog.at_level(logging.WARNING, "flwr"):
        assert ask(grid).nodes == (1, 1, 2, 2)
    assert "not waited for, since nobody needs them: node 0" in caplog.text


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("late", [False, True])
def test_a_silent_node_is_asked_again(
    late: bool, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question can be lost with what a node was doing for a run that has just been stopped; that is no refusal."""
    monkeypatch.setattr(strategies.devices, "AGAIN_SECONDS", 0.0)
    assert ask(Field(two(shards, tmp_path), appear=[1, 1], lost={0, 1}, late=late)).nodes == (0, 0, 1, 1)


@pytest.mark.usefixtures("patient")
def test_what_a_node_says_of_its_data_outweighs_what_went_wrong_before(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two questions to a node that is slow: one fails, the other is answered, in either order."""
    grid = Field(two(shards, tmp_path), appear=[1, 1])
    devices, good = Devices(PromptGrid(grid), ["fedavg"]), Devices._answers
    config = tiny(**{**TWO, "data.partition": "devices"})

    def both(self: Devices, questions: dict[str, int], clients: int) -> dict[int, Any]:
        bad = dict.fromkeys(questions.values(), "it failed and gave no reason")
        return bad if not looks.pop(0) else good(self, questions, clients)

    monkeypatch.setattr(Devices, "_answers", both)
    looks = [False, True]
    assert devices.federation(config).nodes == (0, 0, 1, 1)


@pytest.mark.usefixtures("patient")
def test_telling_a_node_that_it_is_refused_does_not_wait(shards: Path, tmp_path: Path) -> None:
    """A spare one with other images hears of it, never says so, and the run goes on."""
    write_pictures(tmp_path / "data" / "3" / "train", dict.fromkeys("0123456789", 1), size=9)
    grid = Field([device("3", tmp_path / "data", tmp_path), *two(shards, tmp_path)], appear=[1, 1, 4])
    assert ask(grid).nodes == (1, 1, 2, 2)
    assert grid.told == [0]


def test_who_is_missing_in_the_end_is_said_with_those_who_are_refused(shards: Path, tmp_path: Path) -> None:
    """All of them, with why: no configuration, no answer."""
    with pytest.raises(RefusalError) as raised:
        ask(Field([{}, *two(shards, tmp_path)], appear=[1, 1, 1], hung={1}))
    first, second, third = str(raised.value).split("; ")
    assert first == "no node hosts client 0, 1"
    assert second.startswith("node 0 is refused: this node's configuration names no clients and no data: ")
    assert third.startswith("node 1 is refused: no answer within 0 s ")


def test_another_version_is_refused(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of two versions do not mix."""
    monkeypatch.setattr(clients.app, "__version__", "0.0.9")
    with pytest.raises(RefusalError, match=r"this node has fedkd 0\.0\.9, and the server has "):
        run_devices(tmp_path / "run", two(shards, tmp_path))


def test_a_missing_dependency_is_refused(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client half is loaded when the node is asked, not in the first round."""
    monkeypatch.setitem(sys.modules, "clients.apfl", None)
    with pytest.raises(RefusalError, match=r"import of clients\.apfl halted"):
        run_devices(tmp_path / "run", two(shards, tmp_path), "apfl")


def test_a_device_does_what_is_its_own_only(shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No run of another kind, no client of another node, no folder that the server thinks of."""
    config = tiny(**TWO, **{"run.dir": str(tmp_path / "here")})
    with pytest.raises(RoundError, match="this node is a device and trains on its own data alone"):
        inline.run_apps(server_app, clients.app.app, config, devices=two(shards, tmp_path))
    assert not (tmp_path / "here" / "state").exists()
    place = Place((0,), shards, tmp_path)
    for name in ("", "../up", "/abs", "0" * 15, "0" * 15 + "/", "A" * 16):
        with pytest.raises(UserError, match="does not name its run"):
            place.folder(name)
    assert place.folder("0123456789abcdef") == tmp_path / "0123456789abcdef"
    order = protocol.Order(json.dumps(tiny(**TWO, **{"data.partition": "devices"}).flat()), 1, [2], [0], "0" * 16)
    context = Context(1, 2, device("0,1", shards, tmp_path), None, {})  # type: ignore[arg-type]
    with pytest.raises(clients.app.ClientError, match="client 2 is not hosted here"):
        clients.app._worker_of(order, context)


def test_simulated_nodes_are_not_asked(tmp_path: Path) -> None:
    """One exchange less, and no query in a simulation."""
    silent = ClientApp()
    silent.train()(clients.app.train)
    silent.evaluate()(clients.app.evaluate)
    inline.run_apps(server_app, silent, tiny(**{"run.dir": str(tmp_path), "run.rounds": 1}))
    assert Run.open(tmp_path).finished


def test_methods_with_public_data_say_what_they_need(shards: Path, tmp_path: Path) -> None:
    """The server's own images: they have to be there, and be like the clients'."""
    with pytest.raises(UserError, match=r"feddf needs public images on the server: data\.root"):
        run_devices(tmp_path / "run", two(shards, tmp_path), "feddf")
    write_pictures(tmp_path / "public" / "train", {"x": 2}, size=9)
    with pytest.raises(UserError, match=r"the public images in .* the clients' are"):
        run_devices(tmp_path / "run", two(shards, tmp_path), "feddf", **{"data.root": str(tmp_path / "public")})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"classes": ["a"], "shape": [1, 8], "train": {"0": [1]}, "test": {"0": [1]}, "fingerprints": {"0": ""}}',
        '{"classes": ["a"], "shape": [1, 8, 8], "train": {"0": [1, 2]}, "test": {"0": [1]}, "fingerprints": {"0": ""}}',
        '{"classes": ["a"], "shape": [1, 8, 8], "train": {"0": [-1]}, "test": {"0": [1]}, "fingerprints": {"0": ""}}',
        '{"classes": ["a"], "shape": [1, 8, 8], "train": {"0": [0]}, "test": {"0": [1]}, "fingerprints": {"0": ""}}',
        '{"classes": ["a"], "shape": [1, 8, 8], "train": {"1": [1]}, "test": {"0": [1]}, "fingerprints": {"0": ""}}',
        '{"classes": [], "shape": [1, 8, 8], "train": {"0": []}, "test": {"0": []}, "fingerprints": {"0": ""}}',
    ],
)
def test_a_description_that_makes_no_sense(text: str) -> None:
    """Whatever a node answers, the server says that it cannot be read."""
    with pytest.raises(PayloadError):
        Description.parse(text, 2)


def test_a_description_survives_the_way(shards: Path) -> None:
    """And holds no image and no label of one."""
    data = read(shards, "0,1")
    described = Description.of(data, (0, 1))
    assert Description.parse(described.json(), 2) == described
    assert len(described.json()) < 600
    assert not judge({5: described})


def described(clients: list[int], **changes: Any) -> Description:
    """Return what a node says that hosts clients with two 8 x 8 images each."""
    each = {client: [1, 1] for client in clients}
    marks = dict.fromkeys(clients, "")
    return replace(Description(("a", "b"), (1, 8, 8), each, each, marks), **changes)


def test_one_node_does_not_say_what_data_is_like() -> None:
    """Whoever claims the lowest client is refused, if the others agree on something else."""
    found = {7: described([0], shape=(3, 8, 8)), 8: described([1]), 9: described([2, 3])}
    assert judge(found) == {7: "its images differ from those of client 1: 3x8x8 and 1x8x8"}
    found[7] = described([0], classes=("a", "c"))
    assert judge(found) == {7: "its classes differ from those of client 1: 'c' and 'b'"}
    del found[8]
    assert judge(found) == {9: "its classes differ from those of client 0: 'b' and 'c'"}


def test_a_node_that_claims_another_ones_client_has_no_say() -> None:
    """It is refused by name, whoever was first, and so is one whose key nobody has named."""
    found = {7: described([0, 2], classes=("a", "c")), 8: described([1]), 9: described([2])}
    allowed = {7: (0,), 8: (1,)}
    unknown = "its key is not in hosts.toml on the server, or was let in after the run began"
    assert judge(found, allowed) == {7: "hosts.toml on the server does not give its key client 2", 9: unknown}
    assert judge({7: found[7]}, {}) == {7: unknown}


@pytest.mark.usefixtures("patient")
def test_nobody_takes_the_client_of_another_key(shards: Path, tmp_path: Path) -> None:
    """The first to say that it hosts a client does not host it; it hears why, and the run starts."""
    grid = Field([device("2-3", shards, tmp_path), *two(shards, tmp_path)], appear=[1, 1, 4])
    devices = Devices(PromptGrid(grid), ["fedavg"], {0: (), 1: (0, 1), 2: (2, 3)})
    assert devices.federation(tiny(**{**TWO, "data.partition": "devices"})).nodes == (1, 1, 2, 2)
    assert grid.told == [0]


def test_no_device_can_guess_the_message_of_another(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower takes an answer from whoever knows a message's number, a hash of its content: that has 128 random bits."""
    pushed: list[str] = []
    push = inline.LoopbackGrid.push_messages

    def watched(self: Any, messages: Any) -> Any:
        messages = list(messages)
        pushed.extend(message.metadata.group_id.rpartition("-")[2] for message in messages)
        return push(self, messages)

    monkeypatch.setattr(inline.LoopbackGrid, "push_messages", watched)
    run_devices(tmp_path / "run", two(shards, tmp_path))
    assert len(pushed) > 4
    assert len({bytes.fromhex(token) for token in pushed}) == len(pushed)
    assert {len(bytes.fromhex(token)) for token in pushed} == {16}


@pytest.mark.parametrize(
    ("first", "said"), [("0,1", ""), ("0", "is refused: hosts.toml on the server does not give its key client 1")]
)
def test_the_command_tells_the_app_who_may_host_whom(first: str, said: str, shards: Path, tmp_path: Path) -> None:
    """By Flower's numbers of the nodes; the digest is that without it."""
    app, folder = ServerApp(), tmp_path / "run"

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        context.run_config["hosts"] = json.dumps({2: first, 3: "2-3"})
        strategies.app.main(grid, context)

    config = tiny(**{**TWO, "data.partition": "devices", "run.dir": str(folder)})
    with pytest.raises(RefusalError, match=said) if said else contextlib.nullcontext():
        inline.run_apps(app, clients.app.app, config, devices=two(shards, tmp_path))
    if not said:
        assert Run(folder).digest() == run_devices(tmp_path / "any", two(shards, tmp_path / "other")).digest()


# ---- who is dropped --------------------------------------------------------------------------------------------------


def app_that(breaks: Callable[[protocol.Order, Message], Message], **nodes: Any) -> ClientApp:
    """Return our client app, whose answer to training orders goes through ``breaks``."""
    app = ClientApp()
    app.query()(clients.app.query)
    app.evaluate()(clients.app.evaluate)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return breaks(protocol.read_order(message), clients.app.train(message, context))

    return app


def _raises(order: protocol.Order, reply: Message) -> Message:
    if order.round == 2 and 3 in order.clients:
        raise RuntimeError("out of battery")
    return reply


def _not_finite(order: protocol.Order, reply: Message) -> Message:
    if order.round == 2 and 3 in order.clients:
        arrays = reply.content.array_records["updates"]
        for name, array in arrays.items():
            values = np.array(array.numpy())
            if values.dtype.kind == "f" and values.size:
                values[:] = np.nan
            arrays[name] = type(array)(values)
    return reply


def _of_others(order: protocol.Order, reply: Message) -> Message:
    if order.round == 2 and 3 in order.clients:
        rows = [{**row, "client": row["client"] - 2} for row in protocol.read_rows(reply)]
        reply.content.config_records["reply"]["rows"] = json.dumps(rows)
    return reply


def _too_heavy(order: protocol.Order, reply: Message) -> Message:
    if order.round == 2 and 3 in order.clients:
        arrays = reply.content.array_records["updates"]
        arrays["examples"] = type(arrays["examples"])(np.array(arrays["examples"].numpy()) + 1)
    return reply


ALL_CLIENTS: dict[str, Scalar] = {"run.clients-per-round": 0}


@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        (_raises, "out of battery"),
        (_not_finite, "not finite"),
        (_of_others, "for other clients"),
        (_too_heavy, "and from its data it is"),
    ],
)
def test_a_client_that_fails_is_dropped_on_devices(
    breaks: Callable[..., Message], said: str, shards: Path, tmp_path: Path
) -> None:
    """The round goes on with the others; the results say who is missing and why, and the next round asks again."""
    run = run_devices(tmp_path / "run", two(shards, tmp_path), client_app=app_that(breaks), **ALL_CLIENTS)
    first, second, third = run.rows("rounds")
    assert "dropped" not in first
    assert "dropped" not in third
    assert second["clients"] == [0, 1]
    (dropped,) = second["dropped"]
    assert dropped["exchange"] == "train"
    assert dropped["clients"] == [2, 3]
    assert said in dropped["why"]
    assert [row["client"] for row in run.rows("clients") if row["round"] == 2] == [0, 1]
    assert [row["client"] for row in run.rows("evaluations") if row["round"] == 2] == [0, 1, 2, 3]
    assert run.summary()["dropped"] == {"rounds": 1, "clients": [2, 3]}
    run.frame("rounds").to_parquet(tmp_path / "rounds.parquet")


def test_the_average_is_that_of_those_who_answered(shards: Path, tmp_path: Path) -> None:
    """A dropped update leaves no trace: the round is the same whatever it was."""
    runs = [
        run_devices(tmp_path / breaks.__name__, two(shards, tmp_path / breaks.__name__), "fedavg", app_that(breaks))
        for breaks in (_raises, _not_finite, _of_others)
    ]
    states = [[row["state"] for row in run.rows("rounds")] for run in runs]
    assert states[0] == states[1] == states[2]


@pytest.mark.parametrize("keys", [{"run.on-failure": "fail"}, {"run.min-clients": 3}], ids=str)
def test_a_failure_ends_the_run_where_that_is_wanted(keys: dict[str, Scalar], shards: Path, tmp_path: Path) -> None:
    """By policy, or because too few are left; the message names the clients."""
    with pytest.raises(RoundError, match="clients 2, 3 failed"):
        run_devices(tmp_path / "run", two(shards, tmp_path), client_app=app_that(_raises), **ALL_CLIENTS, **keys)
    assert "clients 2, 3 failed" in (tmp_path / "run" / "error.txt").read_text()


def test_simulation_drops_only_when_asked(tmp_path: Path) -> None:
    """The default of a simulation is to fail."""
    keys = {**TWO, **ALL_CLIENTS}
    with pytest.raises(RoundError, match="out of battery"):
        inline.run_apps(server_app, app_that(_raises), tiny(**keys, **{"run.dir": str(tmp_path / "a")}), nodes=2)
    drop = tiny(**keys, **{"run.dir": str(tmp_path / "b"), "run.on-failure": "drop"})
    inline.run_apps(server_app, app_that(_raises), drop, nodes=2)
    assert Run.open(tmp_path / "b").rows("rounds")[1]["dropped"]


@pytest.mark.parametrize("method", ["pgfed", "fedfomo", "fedensemble"])
def test_methods_that_need_everybody_say_so(method: str, shards: Path, tmp_path: Path) -> None:
    """Their server's state has a row per client of a round: drop is refused, and the default is to fail."""
    with pytest.raises(UserError, match=f"{method} needs an update from every client"):
        run_devices(tmp_path / "a", two(shards, tmp_path), method, **{"run.on-failure": "drop"})
    with pytest.raises(RoundError, match="out of battery"):
        run_devices(tmp_path / "b", two(shards, tmp_path), method, app_that(_raises), **ALL_CLIENTS)


def test_too_many_clients_are_demanded() -> None:
    """A run that could never be satisfied is refused before it starts."""
    with pytest.raises(UserError, match=r"run\.min-clients = 3 is more than the 2 clients of a round"):
        tiny(**TWO, **{"run.min-clients": 3})


# ---- fedkd deploy ----------------------------------------------------------------------------------------------------


def test_init_writes_keys_that_nobody_else_reads(tmp_path: Path) -> None:
    """Modes, a certificate that its authority and the address vouch for, and every client on one node."""
    deployment = Deployment(tmp_path / "lab", 3, 8, "server.example.org")
    deployment.write()
    keys = [path for path in (tmp_path / "lab").rglob("*") if path.suffix == ".key"]
    assert len(keys) == 5
    for path in keys:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    hosts = [parse_clients(deployment.clients_of(node)) for node in range(3)]
    assert sorted(sum(hosts, ())) == list(range(8))
    assert max(map(len, hosts)) - min(map(len, hosts)) <= 1
    from cryptography import x509

    server = tmp_path / "lab" / "server"
    certificate = x509.load_pem_x509_certificate((server / "superlink.pem").read_bytes())
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate((server / "ca.pem").read_bytes()))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {"localhost", "superlink", "server.example.org"}
    ssl.create_default_context(cafile=str(server / "ca.pem"))
    app = tomllib.loads((server / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    assert app["data"]["partition"] == "devices"
    assert app["run"]["clients"] == 8
    flower = tomllib.loads((server / "flower" / "config.toml").read_text())["superlink"]
    assert flower["deployed"]["address"] == "server.example.org:8000"
    services = json.loads((tmp_path / "lab" / "compose.yaml").read_text().split("\n", 1)[1])["services"]
    assert set(services) == {"superlink", "node-0", "node-1", "node-2"}
    readme = (tmp_path / "lab" / "README.md").read_text()
    for node in range(3):
        assert f'clients="{deployment.clients_of(node)}"' in readme


def test_clients_belong_to_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``init`` wrote of each key, by the numbers of the nodes with these keys; a key that has none may nothing."""
    Deployment(tmp_path / "lab", 2, 8, "localhost").write()
    server = tmp_path / "lab" / "server"
    first, second = (load_ssh_public_key((server / "nodes" / f"node-{k}.pub").read_bytes()) for k in (0, 1))
    nodes = {11: second, 12: first, 13: ec.generate_private_key(ec.SECP384R1()).public_key(), 14: first}
    known = {node: key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo) for node, key in nodes.items()}
    monkeypatch.setattr(hosts, "_nodes", lambda *_: {node: key.decode() for node, key in known.items()})
    assert hosts.of_nodes(server, "deployed", {}) == {11: "4-7", 12: "0-3", 14: "0-3"}
    shutil.copy(server / "nodes" / "node-0.pub", server / "nodes" / "copy.pub")
    twice = ("node-0 = '0-3'\nnode-1 = '3-7'", "node-0 = '0'\ncopy = '1'")
    for wrong in ("node-0 = ", "node-0 = 'x'", "node-7 = '1'", *twice):
        (server / hosts.FILE).write_text(wrong)
        with pytest.raises(UserError, match=hosts.FILE):
            hosts.of_nodes(server, "deployed", {})
    (server / hosts.FILE).unlink()
    assert hosts.of_nodes(server, "deployed", {}) is None


def test_init_overwrites_nothing(tmp_path: Path) -> None:
    """A second call, a wrong number and a wrong address leave everything as it was."""
    Deployment(tmp_path / "lab", 1, 1, "::1").write()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for wrong in (
        Deployment(tmp_path / "lab", 1, 1, "localhost"),
        Deployment(tmp_path / "a", 3, 2, "localhost"),
        Deployment(tmp_path / "b", 0, 2, "localhost"),
        Deployment(tmp_path / "c", 1, 2, "host:80"),
        Deployment(tmp_path / "d", 1, 2, "host", 70000),
    ):
        with pytest.raises(UserError):
            wrong.write()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_check_says_what_to_do(shards: Path, tmp_path: Path) -> None:
    """A server that is not there, and data that is or is not."""
    Deployment(tmp_path / "lab", 1, 2, "127.0.0.1").write()
    keys = tmp_path / "lab" / "devices" / "node-0"
    nowhere = f"127.0.0.1:{free_port()}"
    found = {finding.what: finding for finding in check(keys, nowhere, "0,1", shards)}
    assert found["SuperLink"].fine is False
    assert found["SuperLink"].advice
    assert found["fedkd"].fine
    assert found["data"].fine
    assert found["client 1"].fine
    found = {finding.what: finding for finding in check(keys, nowhere, "0,9", shards)}
    assert found["data"].fine is False
    assert "client 9" in found["data"].found


@pytest.mark.parametrize(
    ("flat", "engine", "nodes", "superlink"),
    [
        ({"data.partition": "iid"}, "deployment", None, "x"),
        ({"data.partition": "devices"}, "inline", None, ""),
        ({}, "deployment", None, ""),
        ({}, "inline", None, "x"),
        ({}, "deployment", 2, "x"),
    ],
)
def test_engine_and_partition_have_to_fit(flat: dict[str, Scalar], engine: Any, nodes: Any, superlink: str) -> None:
    """Said before anything starts."""
    with pytest.raises(UserError):
        on_devices(flat, engine, nodes, superlink)


def test_a_deployment_trains_on_what_devices_have() -> None:
    """Without being told so."""
    assert on_devices({}, "deployment", None, "x") == {"data.partition": "devices"}
    assert on_devices({}, "inline", None, "") == {}


def test_devices_hold_what_nobody_else_has() -> None:
    """Commands that need the images say that they are not here."""
    with pytest.raises(UserError, match="on the devices alone"):
        federate(tiny(**{"data.partition": "devices"}))


KILLED = """
import os, sys
from fedkd.config import Config
from sims import deployment

deployment.connection = lambda superlink: (superlink, dict(os.environ))
deployment.run([Config.from_flat({"run.dir": sys.argv[1], "data.partition": "devices"})], "deployed")
"""
FLWR = """#!/bin/sh
echo "$2/pyproject.toml" > "$STARTED.part"
mv "$STARTED.part" "$STARTED"
exec sleep 600
"""


def test_a_killed_command_leaves_nothing(tmp_path: Path) -> None:
    """Neither the app that it gave to Flower nor Flower's command, here one that takes its time."""
    started, scratch, program = tmp_path / "started", tmp_path / "tmp", tmp_path / "bin" / "flwr"
    scratch.mkdir()
    program.parent.mkdir()
    program.write_text(FLWR)
    program.chmod(0o700)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "STARTED": str(started), "TMPDIR": str(scratch)}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "run")]
    children: list[psutil.Process] = []
    with psutil.Popen(command, env=environment, cwd=Path(__file__).parent.parent) as process:
        try:
            wait_until(started.exists, process)
            assert Path(started.read_text().strip()).is_relative_to(scratch)
            children = process.children(recursive=True)
            assert "sleep" in {child.name() for child in children}
            process.kill()
            wait_until(lambda: not (list(scratch.iterdir()) or any(map(is_alive, children))))
        finally:
            for one in (process, *children):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
