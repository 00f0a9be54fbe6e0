"""Which clients which node may host: what ``fedkd deploy init`` wrote of each device's key, by Flower's node numbers.

Flower knows the key of each node, but shows it to no app; its command line asks for it as is done here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

import tomli_w
from cryptography.hazmat.primitives import serialization

from fedkd.data.devices import parse_clients
from fedkd.errors import UserError

FILE = "hosts.toml"
"""In the ``server`` folder."""
ASK_SECONDS = 60.0


class UnknownNodesError(RuntimeError):
    """The SuperLink does not say which nodes it knows; the message is the end of what Flower says."""


def text(clients: Mapping[str, str]) -> str:
    """Return the file that says which clients the device with each key in ``nodes`` may host."""
    return "# Which clients the device with the key nodes/NAME.pub may host: no other key, and it no others.\n" + (
        tomli_w.dumps(clients)
    )


def of_nodes(server: Path, name: str, environment: Mapping[str, str]) -> dict[int, str] | None:
    """Return which clients each registered node may host; None: the folder does not say, and any may host any.

    Args:
        server: the ``server`` folder of a deployment.
        name: the SuperLink's name in Flower's configuration.
        environment: in which Flower finds that.

    Raises:
        UserError: the file, or a key that it names, cannot be read.
        UnknownNodesError: the SuperLink does not answer.
    """
    if not (server / FILE).exists():
        return None
    clients = _read(server)
    return {node: clients[key] for node, key in _nodes(name, environment).items() if key in clients}


def _read(server: Path) -> dict[str, str]:
    """Return the clients by the keys, in Flower's form."""
    clients, owners = dict[str, str](), dict[int, str]()
    try:
        for name, numbers in tomllib.loads((server / FILE).read_text(encoding="utf-8")).items():
            for client in parse_clients(str(numbers)):
                if (other := owners.setdefault(client, name)) != name:
                    raise UserError(f"client {client} is given to both {other} and {name}; give it to one key")
            key = serialization.load_ssh_public_key((server / "nodes" / f"{name}.pub").read_bytes())
            pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
            if pem.decode() in clients:
                raise UserError(f"{name} has the key of another name; give all its clients to one of them")
            clients[pem.decode()] = str(numbers)
    except (OSError, ValueError, UserError) as error:
        raise UserError(f"{server / FILE}: {error}") from None
    return clients


_NODES = """
import json, sys
from flwr.cli import flower_config, utils
from flwr.proto.control_pb2 import ListNodesRequest
client = utils.init_http_client_from_connection(flower_config.read_superlink_connection(sys.argv[1]))
with utils.flwr_cli_exc_handler():
    nodes = client.ListNodes(ListNodesRequest()).nodes_info
print(json.dumps({node.node_id: node.public_key.decode() for node in nodes}))
"""


def _nodes(name: str, environment: Mapping[str, str]) -> dict[int, str]:
    """Return the key of each node that was ever registered."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _NODES, name],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=ASK_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise UnknownNodesError(f"the SuperLink does not say within {ASK_SECONDS:.0f} s which nodes it knows") from None
    if done.returncode or not done.stdout.strip():
        said = done.stderr.strip().rpartition("\n")[2]
        raise UnknownNodesError(said or f"the question which nodes there are ended with code {done.returncode}")
    last = done.stdout.strip().splitlines()[-1]  # after what Flower says by itself
    return {int(node): key for node, key in json.loads(last).items()}
