"""Devices as processes over TLS: the same numbers as in one process, and what dies, hangs and comes back."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from lab import APPS, Lab, mine
from test_deploy_init import blocks

import clients.app
from fedkd import protocol
from fedkd.config import Config, Scalar
from fedkd.data.devices import parse_clients, write_split
from fedkd.errors import UserError
from fedkd.results import Run, lock
from sims import deployment, handout, hosts, inline
from sims.deploy import Deployment, check
from strategies.app import app as server_app

pytestmark = pytest.mark.slow

Keys = dict[str, Scalar]
DEPLOYED: Keys = {
    "run.clients": 8,
    "run.clients-per-round": 2,
    "run.rounds": 5,
    "run.eval-every": 5,
    "run.device": "cpu",
    "data.alpha": 0.5,
    "train.local-steps": 4,
}
"""Eight clients, two on each of four devices."""


def one_each(clients: int, rounds: int) -> Keys:
    """Return the settings of so many clients that take part in every round."""
    return DEPLOYED | {
        "run.clients": clients,
        "run.clients-per-round": 0,
        "run.rounds": rounds,
        "run.eval-every": rounds,
    }


def deal(config: Config, folder: Path, nodes: int) -> list[Path]:
    """Give each of the nodes a folder with the data of its own clients and of nobody else."""
    write_split(config, folder / "all")
    homes = []
    for node in range(nodes):
        homes.append(folder / f"device{node}")
        for client in parse_clients(Deployment(folder, nodes, config.run.clients, "localhost").clients_of(node)):
            shutil.move(folder / "all" / str(client), homes[-1] / str(client))
    return homes


def straight(method: str, folder: Path, keys: Keys) -> str:
    """Return the digest of the undivided data in one process."""
    inline.run(Config.from_flat({**keys, "run.method": method, "run.dir": str(folder)}))
    return Run.open(folder).digest()


def deployed(method: str, folder: Path, keys: Keys) -> Config:
    """Return the configuration of the same run on devices."""
    own = {"run.method": method, "run.dir": str(folder), "data.partition": "devices"}
    return Config.from_flat({**keys, **own})


def begin(lab: Lab, method: str, folder: Path, keys: Keys) -> subprocess.Popen[str]:
    """Start such a run by the command line."""
    sets = [f"--set={key}={value}" for key, value in keys.items()]
    return lab.fedkd("run", method, *on_devices(lab), "--out", str(folder), *sets)


def on_devices(lab: Lab) -> list[str]:
    """Return the words that name the lab's devices."""
    return ["--engine", "deployment", "--superlink", str(lab.folder)]


def rounds(folder: Path) -> list[dict[str, Any]]:
    """Return what a run has written so far."""
    return Run(folder).rows("rounds") if (folder / "rounds.jsonl").exists() else []


def wait_for(holds: Callable[[], bool], lab: Lab, command: subprocess.Popen[str], seconds: float = 200) -> None:
    """Wait until something holds, while the command runs."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, lab.log(-1)[-2000:]
        assert command.poll() is None, command.communicate()[0]
        time.sleep(0.1)


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Path]:
    """A folder for a lab, and proof that no process of it is left."""
    yield tmp_path
    assert not mine(tmp_path)


@pytest.mark.field
def test_four_devices_give_the_numbers_of_one_process(base: Path) -> None:
    """TLS, keys, a process for each device with the data of its own clients: the same digests.

    On the way, a device asks whether it is trusted, and one with another key hears that it is not.
    """
    data = deal(Config.from_flat(DEPLOYED), base, 4)
    methods = ("fedgen", "apfl", "pgfed")
    with Lab(base, 4, 8, data, forked=range(4)) as lab:
        deployment.run([deployed(method, base / method, DEPLOYED) for method in methods], str(lab.folder))
        keys = lab.folder / "devices" / "node-2"
        at = f"127.0.0.1:{lab.deployment.port}"
        trusted = {finding.what: finding for finding in check(keys, at, "4,5", data[2])}
        assert all(finding.fine for finding in trusted.values()), trusted
        nodes = hosts.of_nodes(lab.folder / "server", *deployment.connection(str(lab.folder)))
        assert nodes
        assert sorted(nodes.values()) == [lab.deployment.clients_of(node) for node in range(4)]
        Deployment(base / "foreign", 1, 1, "127.0.0.1").write()
        foreign = base / "foreign" / "devices" / "node-0"
        assert {f.what: f.fine for f in check(foreign, at, "4", data[2])}["TLS"] is False
        shutil.copy(keys / "ca.pem", foreign / "ca.pem")
        assert {f.what: f.fine for f in check(foreign, at, "4", data[2])}["key"] is False
        port = lab.deployment.port
        assert lab.end_apps() == 0, (lab.failed_apps(), lab.log(APPS)[-2000:])
    for method in methods:
        assert Run.open(base / method).digest() == straight(method, base / f"straight-{method}", DEPLOYED)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))


@pytest.mark.field
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="network namespaces need root")
@pytest.mark.skipif(shutil.which("ip") is None, reason="network namespaces need iproute2")
def test_the_readme_is_followed_in_networks_of_their_own(base: Path) -> None:
    """A server and two devices with addresses of their own and nothing shared but a cable, by the README's commands."""
    keys = one_each(2, 2)
    data = deal(Config.from_flat(keys), base, 2)
    with networks(2) as (names, address), ByReadme(base, 2, 2, data, address, lambda n: exec_in(names[n + 1])) as lab:
        sets = [f"--set={key}={value}" for key, value in keys.items() if key != "run.clients"]
        command = lab.start(*lab.said("fedkd run", -1, sets))
        said, _ = command.communicate(timeout=240)
        assert command.returncode == 0, said + lab.log(-1)[-2000:]
    run = Run.open(base / "server" / "runs" / "fedgen")
    assert run.digest() == straight("fedgen", base / "straight", keys)


class ByReadme(Lab):
    """Machines on which people say what stands in the README, and have their places elsewhere than it says."""

    def said(self, words: str, node: int, more: Iterable[str] = ()) -> list[str]:
        """Return the command with these words, for the server (-1) or a device, and with further words at its end."""
        text = (self.folder / "README.md").read_text()
        part = text if node < 0 else text.partition(f"### Device {node}:")[2]
        block = next(block for block in blocks(part) if words in block)
        own = self.base / ("server" if node < 0 else f"device{node}")
        places = {
            "sudo -u fedkd -H ": "",
            handout.PROGRAMS: sys.prefix,
            handout.DATA: str(self.data[node]),
            handout.KEYS: str(own / "keys"),
            handout.STATE: str(own / ("" if node < 0 else "state")),
        }
        for place, here in places.items():
            block = block.replace(place, here)
        return ["bash", "-c", f'{block} "$@"', "bash", *more]

    def superlink(self) -> list[str]:
        """As the README says."""
        (self.base / "server").mkdir()
        return self.said("flower-superlink", -1)

    def supernode(self, node: int) -> list[str]:
        """As the README says."""
        return self.said("flower-supernode", node)

    def register(self, nodes: Iterable[int]) -> None:
        """As the README says; then devices look whether they have everything."""
        commands = [self.start(*self.said("supernode register", -1))]
        assert commands[0].wait(60) == 0, commands[0].communicate()[0]
        for node in nodes:
            own = self.base / f"device{node}"
            shutil.copytree(self.folder / "devices" / f"node-{node}", own / "keys")
            (own / "state").mkdir()
            commands.append(self.start(*self.said("deploy check", node), node=node))
        for command in commands:
            said, _ = command.communicate(timeout=60)
            assert command.returncode == 0, said


def exec_in(name: str) -> list[str]:
    """Return what puts a command into a network namespace."""
    return ["ip", "netns", "exec", name]


@contextlib.contextmanager
def networks(nodes: int) -> Iterator[tuple[list[str], str]]:
    """Give a namespace for the server, with a bridge, and one for each node; and the server's address."""
    tag = f"fk{os.getpid()}"
    names = [f"{tag}-{k}" for k in range(nodes + 1)]

    def ip(*words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"network namespaces are not allowed here: {done.stderr.strip()}")

    with contextlib.ExitStack() as undo:
        for name in names:
            ip("netns", "add", name)
            undo.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", names[0], "link", "add", "bridge", "type", "bridge")
        ip("-n", names[0], "addr", "add", "10.213.57.1/24", "dev", "bridge")
        ip("-n", names[0], "link", "set", "bridge", "up")
        for node, name in enumerate(names[1:], start=2):
            ip("-n", names[0], "link", "add", f"v{node}", "type", "veth", "peer", "name", "cable", "netns", name)
            ip("-n", names[0], "link", "set", f"v{node}", "master", "bridge", "up")
            ip("-n", name, "addr", "add", f"10.213.57.{node}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
        yield names, "10.213.57.1"


@pytest.mark.outage
def test_devices_die_hang_and_come_back(base: Path) -> None:
    """One is killed and one is stopped in the middle of training: both are dropped, and later take part again.

    The one that was stopped then sends what it had begun; that it counts for no round is shown by a run in one process
    in which the same clients fail in the same rounds: the server's states are the same bits.  Then the SuperLink dies.
    """
    keys = one_each(3, 40) | {"run.timeout": 40.0}
    data = deal(Config.from_flat(keys), base, 3)
    with Lab(base, 3, 3, data, forked=[0, 2]) as lab:
        out = base / "run"
        command = begin(lab, "scaffold", out, keys)
        wait_for(lambda: len(rounds(out)) >= 1 and is_training(lab, 2), lab, command)
        lab.signal(2, signal.SIGSTOP)
        lab.kill(1)
        wait_for(lambda: any("dropped" in row for row in rounds(out)), lab, command)
        [missing] = [row for row in rounds(out) if "dropped" in row][:1]
        whys = {client: one["why"] for one in missing["dropped"] for client in one["clients"]}
        assert set(whys) == {1, 2}
        assert "no answer in time" in whys[2]
        sent = lab.log(2).count(SENDING)
        lab.signal(2, signal.SIGCONT)
        wait_for(lambda: lab.log(2).count(SENDING) > sent, lab, command)
        wait_for(lambda: 2 in rounds(out)[-1]["clients"], lab, command)

        began = 0.0

        def back() -> bool:
            nonlocal began
            gone = 1 not in lab.processes or lab.processes[1].poll() is not None
            if gone and time.monotonic() - began > RESTART_SECONDS:
                lab.start_node(1)  # again, as systemd does, until the SuperLink has noticed that it was gone
                began = time.monotonic()
            return rounds(out)[-1]["clients"] == [0, 1, 2]

        wait_for(back, lab, command)
        command.send_signal(signal.SIGINT)
        said, _ = command.communicate(timeout=60)
        assert command.returncode == 130, said
        assert "round 1/40" in said
        assert not [one for one in lab.failed_apps() if one.startswith("node-0 ")], lab.log(APPS)[-2000:]
        the_server_dies(lab, base)
    done = rounds(out)
    for row in done:
        assert set(row["clients"]) | {c for one in row.get("dropped", ()) for c in one["clients"]} == {0, 1, 2}
        assert 0 in row["clients"]
    assert [row["state"] for row in done] == [row["state"] for row in again(done, data, base / "again", keys)]


RECEIVING, SENDING = "Receiving: train message", "Sending: train message"
"""What a SuperNode says."""
RESTART_SECONDS = 5.0
"""As in the systemd units."""


def is_training(lab: Lab, node: int) -> bool:
    """Return whether a node has an order that it has not answered."""
    log = lab.log(node)
    return log.count(RECEIVING) > log.count(SENDING)


def again(done: list[dict[str, Any]], data: list[Path], folder: Path, keys: Keys) -> list[dict[str, Any]]:
    """Run in one process, with a device each for the clients, who fail in those rounds in which they did not count."""
    app = ClientApp()
    app.query()(clients.app.query)
    app.evaluate()(clients.app.evaluate)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        order = protocol.read_order(message)
        if order.clients[0] not in done[order.round - 1]["clients"]:
            raise RuntimeError("not this time")
        return clients.app.train(message, context)

    devices = [
        {"clients": str(k), "data": str(home), "state": str(folder / f"state{k}")} for k, home in enumerate(data)
    ]
    config = deployed("scaffold", folder / "run", {**keys, "run.rounds": len(done), "run.on-failure": "drop"})
    inline.run_apps(server_app, app, config, devices=devices)
    return Run.open(folder / "run").rows("rounds")


def is_free(folder: Path) -> bool:
    """Return whether nobody writes to a run's folder."""
    try:
        lock(folder).close()
    except UserError:
        return False
    return True


def the_server_dies(lab: Lab, base: Path) -> None:
    """The SuperLink is killed in mid-run and started again; the run ends with an error, and goes on when asked."""
    keys = one_each(3, 2) | {"run.clients-per-round": 2, "run.checkpoint-every": 1}
    out = base / "killed"
    command = begin(lab, "apfl", out, keys)
    wait_for(lambda: len(rounds(out)) >= 1, lab, command)
    lab.processes[-1].kill()  # alone: its children notice by themselves
    lab.processes.pop(-1).wait()
    said, _ = command.communicate(timeout=60)
    assert command.returncode == 1, said
    assert f"the SuperLink is gone; when it is back, `fedkd resume {out} " in said
    lab.start_superlink()
    deadline = time.monotonic() + 60
    while not is_free(out):  # the ServerApp, a process of its own, ends by itself too
        assert time.monotonic() < deadline, lab.log(-1)[-2000:]
        time.sleep(0.1)
    command = lab.fedkd("resume", str(out), *on_devices(lab))
    said, _ = command.communicate(timeout=200)
    assert command.returncode == 0, said + lab.log(-1)[-2000:]
    run = Run.open(out)
    assert [again["after_round"] for again in run.environment["resumed"]] == [1]
    assert not any("dropped" in row for row in run.rows("rounds"))
    assert run.digest() == straight("apfl", base / "straight", keys)
