"""What ``fedkd deploy init`` writes beside the keys: systemd units, what Docker Compose needs, and every command.

All machines of a deployment have the same places and a user of their own, so that a SuperNode finds the same keys,
data and states however it is started.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import textwrap
from typing import TYPE_CHECKING

from fedkd import __version__

if TYPE_CHECKING:
    from sims.deploy import Deployment

USER = "fedkd"
PROGRAMS, KEYS, DATA, STATE = "/opt/fedkd", "/etc/fedkd", "/srv/fedkd/data", "/var/lib/fedkd"
"""A virtual environment; a device's keys; its data; and the user's home, which is all that it writes to."""
CONNECTION = "deployed"
"""Name of the SuperLink in Flower's configuration."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}
_PATH = f"{PROGRAMS}/bin:/usr/bin:/bin"
_WHEEL = f"fedkd-{__version__}-py3-none-any.whl"


def files(deployment: Deployment) -> dict[str, str]:
    """Return the texts of the files in the deployment's own folder, by name."""
    return {
        "README.md": readme(deployment),
        "compose.yaml": compose(deployment),
        "Dockerfile": _DOCKERFILE,
        ".dockerignore": "*\n!*.whl\n",  # no key goes into an image
        ".env": f"FEDKD_USER={os.getuid()}:{os.getgid()}\n" if os.name == "posix" else "FEDKD_USER=1000:1000\n",
    }


def unit(what: str, where: str, command: list[str]) -> str:
    """Return a systemd unit that runs a command as the deployment's own user, which writes to its home alone."""
    environment = {"PATH": _PATH, **ENVIRONMENT}
    return textwrap.dedent(
        f"""\
        [Unit]
        Description=fedkd: Flower {what} ({where})
        Wants=network-online.target
        After=network-online.target

        [Service]
        User={USER}
        Group={USER}
        StateDirectory={USER}
        StateDirectoryMode=0700
        WorkingDirectory={STATE}
        UMask=0077
        NoNewPrivileges=yes
        PrivateTmp=yes
        ProtectSystem=strict
        ProtectHome=read-only
        ProtectKernelTunables=yes
        ProtectControlGroups=yes
        RestrictSUIDSGID=yes
        LockPersonality=yes
        Environment={" ".join(f"{key}={value}" for key, value in environment.items())}
        ExecStart={_systemd([f"{PROGRAMS}/bin/{command[0]}", *command[1:]])}
        Restart=always
        RestartSec=5

        [Install]
        WantedBy=multi-user.target
        """
    )


_DOCKERFILE = f"""\
FROM python:3.11-slim
COPY {_WHEEL} /tmp/
RUN pip install --no-cache-dir /tmp/{_WHEEL}
USER 1000
"""


def compose(deployment: Deployment) -> str:
    """Return a Compose file that starts everything on one machine: a rehearsal, as the user who wrote the folder."""
    common = {
        "image": f"fedkd:{__version__}",
        "build": ".",
        "user": "${FEDKD_USER}",
        "environment": {**ENVIRONMENT, "HOME": STATE, "USER": USER},
        "restart": "unless-stopped",
    }
    server = str(deployment.server)
    services: dict[str, object] = {
        "superlink": common
        | {
            "command": _composed(deployment.superlink_command()),
            "volumes": [_bind("./server", server.replace("$", "$$")), _bind("./state/superlink", STATE)],
            "ports": [f"{deployment.port}:{deployment.port}"],
            "networks": {"default": {"aliases": [deployment.address]}} if deployment.by_name else ["default"],
        }
    }
    for node in range(deployment.nodes):
        services[f"node-{node}"] = common | {
            "command": _composed(deployment.supernode_command(node, address="superlink")),
            "volumes": [
                _bind(f"./devices/node-{node}", KEYS, read_only=True),
                _bind("${FEDKD_DATA:-./data}", DATA, read_only=True),
                _bind(f"./state/node-{node}", STATE),
            ],
            "depends_on": ["superlink"],
        }
    return "# A rehearsal on one machine; README.md has the commands.  JSON is YAML.\n" + (
        json.dumps({"services": services}, indent=2) + "\n"
    )


def _bind(source: str, target: str, read_only: bool = False) -> dict[str, object]:
    return {"type": "bind", "source": source, "target": target, "read_only": read_only}


def _composed(command: list[str]) -> list[str]:
    """Return a command as Compose reads it, which replaces ``$``."""
    return [word.replace("$", "$$") for word in command]


def readme(deployment: Deployment) -> str:
    """Return the commands, in the order in which they are said, for people who do not know Flower."""
    at, here = deployment.at, shlex.quote(str(deployment.folder.resolve()))
    server, nodes = shlex.quote(str(deployment.server)), range(deployment.nodes)
    flower = f"FLWR_HOME={server}/flower flwr"
    register = f'for key in {server}/nodes/*.pub; do {flower} supernode register "$key" {CONNECTION}; done'
    run = f"fedkd run fedgen --engine deployment --superlink {server} --clients {deployment.clients}"
    run += f" \\\n    --out {STATE}/runs/fedgen"
    settings = """--stream --run-config 'run.method="fedgen" run.rounds=50'"""
    own = "{ca.pem,node.key,fedkd-supernode.service}"
    copies = "\n".join(f"scp {_WHEEL} devices/node-{node}/{own} device-{node}:" for node in nodes)
    devices = "\n".join(_device(deployment, node) for node in nodes)
    container = "docker compose exec superlink"
    title = f"{deployment.nodes} devices, {deployment.clients} clients, server {at}"
    return f"""# A deployment of fedkd {__version__}: {title}

Flower calls its process on the server SuperLink and that on a device SuperNode. Say the commands in this order, as a
user who may `sudo`. On every machine there will be a user `{USER}` who runs them, programs in `{PROGRAMS}`, and results
and states in `{STATE}`; on devices also keys in `{KEYS}` and data in `{DATA}`.

| folder | belongs |
|---|---|
| `ca/` | in a safe place without a network: its key makes certificates that the devices believe |
| `server/` | on the server, where it was written (not below `/tmp`): say `fedkd deploy init` there |
| `devices/node-K/` | on device K and nowhere else |

## 1. Install, on the server

All machines need the same version: `{_WHEEL}`, in this folder. In a clone of fedkd, this makes it:

```
python3 -m pip wheel --no-deps --wheel-dir {here} .
```

```
cd {here}
{_install()}
sudo chown -R {USER}: server
sudo -u {USER} test -r {server}/superlink.key || echo "move the deployment: {USER} may not look into a folder above it"
```

## 2. Start the server

```
sudo cp server/fedkd-superlink.service /etc/systemd/system/
sudo systemctl daemon-reload
sudo systemctl enable --now fedkd-superlink
```

or, to watch it, by hand, in a terminal of its own:

```
{_by_hand(_shell(deployment.superlink_command()))}
```

Once, while it runs, let the devices in:

```
{_by_hand(f"sh -c {shlex.quote(register)}")}
```

Each device's key hosts those clients that `server/hosts.toml` says, and no other key does. Whoever moves a client to
another device changes that file too. A run knows of what was changed, and which devices were let in, before it.

**Who reaches port {deployment.port} can start runs and register devices**: Flower answers devices and operators on one
port and asks only devices for a key. Keep it inside a private network, or let a reverse proxy pass devices no more than
`/v1/fleet/`.

## 3. Copy each device's files to it

Put the names by which `ssh` knows the devices in the place of `device-0` and so on.

```
cd {here}
{copies}
```

## 4. Install, on each device

```
{_install()}
sudo install -d -o {USER} -g {USER} -m 700 {KEYS}
sudo install -o {USER} -g {USER} -m 600 ca.pem node.key {KEYS}
rm node.key
sudo mkdir -p {DATA}
```

Then put the data of the device's clients into `{DATA}`, a folder for each with its number as its name
(fedkd's docs/deployment.md shows what is in it), where `{USER}` can read it.

## 5. Check and start each device

The check says in a line each what is there and what is missing, and what to do about it. When nothing is, the second
command starts the SuperNode by hand, in a terminal of its own; this starts it for good, and finds the same states:

```
sudo cp fedkd-supernode.service /etc/systemd/system/
sudo systemctl daemon-reload
sudo systemctl enable --now fedkd-supernode
```

{devices}
## 6. Run, on the server

```
{_by_hand(run)}
```

shows the progress and ends with a table. The results belong to `{USER}`, so `fedkd report` and the like are said in the
same way. Flower's own command does as well; what it runs is then in `{STATE}/fedkd-runs`:

```
{_by_hand(f"{flower} run {server}/app {CONNECTION} {settings}")}
```

## A rehearsal on one machine

In place of the steps above, and in a folder that `fedkd deploy init` has written for it alone, since Compose runs as
the user who wrote it: with Docker Compose, the wheel beside this file, and a folder `data` beside it with the data of
all clients:

```
cd {here}
fedkd deploy split --clients {deployment.clients} --out data
docker compose up --build --detach
{container} sh -c {shlex.quote(register)}
{container} {run}
docker compose down
```
"""


def _install() -> str:
    return textwrap.dedent(
        f"""\
        sudo useradd --system --user-group --create-home --home-dir {STATE} --shell /usr/sbin/nologin {USER}
        sudo python3 -m venv {PROGRAMS}
        sudo {PROGRAMS}/bin/pip install ./{_WHEEL}"""
    )


def _device(deployment: Deployment, node: int) -> str:
    clients = deployment.clients_of(node)
    check = f"fedkd deploy check {KEYS} --superlink {deployment.at} --clients {clients} --data-folder {DATA}"
    return f"""### Device {node}: clients {clients}

```
{_by_hand(check)}
```

```
{_by_hand(_shell(deployment.supernode_command(node)))}
```
"""


def _by_hand(command: str) -> str:
    """Return what says a command as the deployment's user, in that one's home."""
    variables = " ".join(f"{key}={value}" for key, value in {"PATH": _PATH, **ENVIRONMENT}.items())
    return f"sudo -u {USER} -H env --chdir={STATE} {variables} \\\n    {command}"


def _shell(command: list[str]) -> str:
    """Write a command over several lines, an option each."""
    lines = [command[0]]
    for word in command[1:]:
        if word.startswith("--"):
            lines.append(word)
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return " \\\n    ".join(lines)


def _systemd(command: list[str]) -> str:
    """Quote a command as systemd reads it."""
    return " ".join(_quoted(word).replace("$", "$$") for word in command)


def _quoted(word: str) -> str:
    """Quote a word for systemd, which replaces ``%x`` even in quotes."""
    escaped = word.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n").replace("%", "%%")
    return escaped if re.fullmatch(r"[\w@%+=:,./-]+", escaped) else f'"{escaped}"'
