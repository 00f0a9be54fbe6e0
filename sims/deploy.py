"""``fedkd deploy``: what a deployment needs on the server and on each device, and whether a device has it.

``init`` writes one folder: a private certificate authority, the server's certificate, a key for each node, Flower's
configuration, and what :mod:`sims.handout` has: systemd units, what Docker needs, and the exact commands.  Nothing is
sent anywhere.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedkd.config import Config, defaults
from fedkd.data.devices import Description, Place, hosted, parse_clients
from fedkd.errors import UserError
from sims import handout, hosts
from sims.doctor import Finding
from sims.handout import CONNECTION

PORT = 8000
"""Flower's own default."""
YEARS = 5
MOST_CLIENTS = 10**7
"""Numbers of up to seven digits."""
CA, FLOWER = "ca.pem", "flower"


@dataclass(frozen=True)
class Deployment:
    """What ``init`` writes.

    Args:
        folder: where.
        nodes: number of devices.
        clients: number of clients; they are dealt to the devices in order.
        address: host name or address under which the devices reach the server.
        port: the server's port.
    """

    folder: Path
    nodes: int
    clients: int
    address: str
    port: int = PORT

    def write(self) -> None:
        """Write everything.

        Raises:
            UserError: the folder holds something, or the numbers or the address make no sense.
        """
        server, devices = self.folder / "server", self.folder / "devices"
        try:
            self._check()
            server.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"{_shown(str(self.folder))} cannot be made a folder: {error.strerror}") from None
        ca, key = _authority()
        (self.folder / "ca").mkdir(mode=0o700)
        _private(self.folder / "ca" / "ca.key", _pem(key))
        (self.folder / "ca" / CA).write_bytes(ca)
        _server_certificate(server, ca, key, self.address)
        (server / CA).write_bytes(ca)
        (server / "nodes").mkdir()
        _write(server / hosts.FILE, hosts.text({f"node-{node}": self.clients_of(node) for node in range(self.nodes)}))
        _write(server / FLOWER / "config.toml", self._flower())
        _write(server / "app" / "pyproject.toml", self._app())
        _write(server / "fedkd-superlink.service", handout.unit("SuperLink", "server", self.superlink_command()))
        for node in range(self.nodes):
            folder = devices / f"node-{node}"
            folder.mkdir(parents=True)
            own = ec.generate_private_key(ec.SECP384R1())
            _private(folder / "node.key", _openssh(own))
            public = own.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
            for place in (folder / "node.pub", server / "nodes" / f"node-{node}.pub"):
                place.write_bytes(public + b"\n")
            (folder / CA).write_bytes(ca)
            unit = handout.unit("SuperNode", f"node {node}", self.supernode_command(node))
            _write(folder / "fedkd-supernode.service", unit)
        for name in ("superlink", *(f"node-{node}" for node in range(self.nodes))):
            (self.folder / "state" / name).mkdir(parents=True, mode=0o700)  # else Docker makes them, as root
        for name, text in handout.files(self).items():
            _write(self.folder / name, text)

    def clients_of(self, node: int) -> str:
        """Return the clients of a node as its configuration names them: blocks of nearly equal length."""
        first, end = (round(self.clients * k / self.nodes) for k in (node, node + 1))
        return ",".join(map(str, range(first, end))) if end - first < 3 else f"{first}-{end - 1}"

    @property
    def at(self) -> str:
        """The server's address and port, as Flower takes them."""
        return _joined(self.address, self.port)

    @property
    def by_name(self) -> bool:
        """Whether the server's address is a name."""
        return not _is_ip(self.address)

    @property
    def server(self) -> Path:
        """The server's folder, which stays where it was written: Flower wants absolute paths."""
        return self.folder.resolve() / "server"

    def superlink_command(self, state: str | Path = handout.STATE, host: str = "0.0.0.0") -> list[str]:
        """Return the command that starts the SuperLink.

        Args:
            state: folder where it keeps which nodes and runs it knows.
            host: the address that it listens at.
        """
        return [
            *("flower-superlink", "--host", host, "--port", str(self.port)),
            *("--ssl-ca-certfile", str(self.server / CA)),
            *("--ssl-certfile", str(self.server / "superlink.pem")),
            *("--ssl-keyfile", str(self.server / "superlink.key")),
            *("--enable-supernode-auth", "--database", f"{state}/state.db"),
            "--disable-runtime-dependency-installation",
        ]

    def supernode_command(
        self,
        node: int,
        keys: str | Path = handout.KEYS,
        data: str | Path = handout.DATA,
        state: str | Path = handout.STATE,
        address: str = "",
    ) -> list[str]:
        """Return the command that starts a device's SuperNode.

        Args:
            node: its number.
            keys: folder with the authority's certificate and the node's key.
            data: folder of the data of its clients.
            state: folder for what they keep.
            address: how it reaches the server; empty: by the server's own address.
        """
        config = f'clients="{self.clients_of(node)}" data="{data}" state="{state}/clients"'
        return [
            *("flower-supernode", "--superlink", _joined(address or self.address, self.port)),
            *("--root-certificates", f"{keys}/{CA}", "--auth-supernode-private-key", f"{keys}/node.key"),
            *("--node-config", config),
        ]

    def _check(self) -> None:
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(
                f"{_shown(str(self.folder))} is not an empty folder; keys are never overwritten, so take another one"
            )
        if self.nodes < 1 or self.clients < self.nodes:
            raise UserError(f"{self.nodes} nodes and {self.clients} clients: every node hosts one client at least")
        if self.clients > MOST_CLIENTS:
            raise UserError(f"{self.clients} clients are more than the {MOST_CLIENTS} that a node can name")
        if not _is_ip(self.address) and not _is_host(self.address):
            raise UserError(
                f"--address {_shown(self.address)} is neither a host name (letters, digits, hyphens, dots) nor an IP "
                "address of the server; give it alone, without port, brackets or scheme"
            )
        if not 0 < self.port < 2**16:
            raise UserError(f"--port {self.port} is not between 1 and 65535")

    def _flower(self) -> str:
        own = {
            "address": self.at,
            "root-certificates": str(self.server / CA),
        }
        return tomli_w.dumps({"superlink": {"default": CONNECTION, CONNECTION: own}})

    def _app(self) -> str:
        """Return an app for ``flwr run``: the code that is installed, every setting, and this deployment's."""
        from sims.simulation import app_of

        own = {"data.partition": "devices", "run.clients": self.clients, "run.clients-per-round": 0}
        config: dict[str, dict[str, object]] = {}
        for key, value in (defaults() | own).items():
            section, name = key.split(".", 1)
            config.setdefault(section, {})[name] = value
        return app_of(config)


def check(keys: Path, superlink: str, clients: str, data: Path, config: Config | None = None) -> Iterator[Finding]:
    """Yield what a device can tell of itself: one line each, with what to do.

    Args:
        keys: folder with ``ca.pem`` and ``node.key``.
        superlink: ``host:port`` of the server.
        clients: numbers of the clients that the device hosts.
        data: folder of their data.
        config: settings of the runs to come, for ``data.name`` and the like; None: the defaults, as many clients as
            are named.
    """
    from sims.doctor import packages

    yield from packages()
    host, port = _split_address(superlink)
    yield from _reach(keys, host, port)
    yield from _own_data(clients, data, config)


def _reach(keys: Path, host: str, port: int) -> Iterator[Finding]:
    """Can the SuperLink be reached, is it the right one, and does it know this device's key?"""
    at = _joined(host, port)
    try:
        socket.create_connection((host, port), timeout=5).close()
    except (OSError, UnicodeError) as error:  # the latter for a name that is none
        yield Finding(False, "SuperLink", f"{at}: {error}", "is it started, is the address right, is the port open?")
        return
    yield Finding(True, "SuperLink", f"{at} can be reached")
    ca = keys / CA
    try:
        context = ssl.create_default_context(cafile=str(ca))
        with (
            socket.create_connection((host, port), timeout=5) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            ends = ssl.cert_time_to_seconds(str((secure.getpeercert() or {})["notAfter"]))
    except (OSError, KeyError) as error:
        advice = f"{ca} has to be the authority that signed the server's certificate, for this very address"
        yield Finding(False, "TLS", f"{type(error).__name__}: {error}", advice)
        return
    until = datetime.datetime.fromtimestamp(ends, datetime.UTC)
    yield Finding(True, "TLS", f"the server's certificate is signed by {ca}, until {until:%Y-%m-%d}")
    yield _trusted(keys, at)


def _trusted(keys: Path, at: str) -> Finding:
    """Ask the SuperLink whether it knows this node's key; nothing is changed there.

    A node is activated by its key and an interval.  An interval of zero is refused, but only after the key was found.
    """
    import httpx
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    from flwr.proto.fleet_pb2 import ActivateNodeRequest
    from flwr.supercore.error import ApiErrorCode, FlowerError
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    path = keys / "node.key"
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError("it is of another kind")
    except (OSError, ValueError) as error:
        return Finding(False, "key", f"{path} cannot be read: {error}", "take the one that `fedkd deploy init` wrote")
    if os.name == "posix" and path.stat().st_mode & 0o077:
        return Finding(False, "key", f"{path} can be read by others", f"chmod 600 {path}")
    signed = NodeAuthHttpInterceptor(key, key.public_key())
    question = ActivateNodeRequest(public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=0)
    said = "it answered in an unknown way"
    try:
        with FleetHttpClient.from_server_address(at, False, (keys / CA).read_bytes(), interceptors=[signed]) as client:
            client.ActivateNode(question)
    except httpx.HTTPStatusError as error:
        why = FlowerError.from_json(error.response.text)
        if why and why.code == ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL:
            return Finding(True, "key", "the SuperLink knows it")
        if why and why.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
            return Finding(
                False, "key", f"the SuperLink does not know {path}", "on the server: flwr supernode register node.pub"
            )
        if error.response.status_code == httpx.codes.UNAUTHORIZED:
            advice = "compare the clocks: they may differ by five seconds only"
            return Finding(False, "key", "the SuperLink does not accept the signature", advice)
        said = str(error).partition("\n")[0]
    except (httpx.HTTPError, FlowerError) as error:
        said = str(error)
    return Finding(None, "key", f"cannot tell whether it is known: {said}", "start the SuperNode and look at its log")


def _own_data(clients: str, data: Path, config: Config | None) -> Iterator[Finding]:
    try:
        numbers = parse_clients(clients)
        flat = config.flat() if config else {}
        whole = max(int(flat.get("run.clients", 0)), max(numbers) + 1)
        asked = Config.from_flat(
            {**flat, "data.partition": "devices", "run.clients": whole, "run.clients-per-round": 0}
        )
        place = Place(numbers, data.expanduser().resolve(), Path())
        found = Description.of(hosted(asked, place), numbers)
    except UserError as error:
        yield Finding(False, "data", str(error), "see docs/deployment.md for the folders that are expected")
        return
    shape = "x".join(map(str, found.shape))
    yield Finding(True, "data", f"images {shape}, {len(found.classes)} classes: {', '.join(found.classes[:12])}")
    for client in numbers:
        train, test = sum(found.train[client]), sum(found.test[client])
        advice = "" if test else "without test data it is left out of all means"
        yield Finding(True if test else None, f"client {client}", f"{train} training and {test} test images", advice)


def _authority() -> tuple[bytes, ec.EllipticCurvePrivateKey]:
    """Return the certificate of a new authority, as PEM, and its key."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedkd private CA")])
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    built = (
        _certificate(name, name, key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return built.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM), key


def _server_certificate(folder: Path, ca: bytes, ca_key: ec.EllipticCurvePrivateKey, address: str) -> None:
    """Write the server's key and certificate, for its address, this machine itself and the Compose file's name."""
    key = ec.generate_private_key(ec.SECP384R1())
    issuer = x509.load_pem_x509_certificate(ca)
    names: list[x509.GeneralName] = [x509.DNSName(name) for name in dict.fromkeys(("localhost", "superlink"))]
    names += [x509.IPAddress(ipaddress.ip_address(ip)) for ip in ("127.0.0.1", "::1")]
    own = x509.IPAddress(ipaddress.ip_address(address)) if _is_ip(address) else x509.DNSName(address)
    if own not in names:
        names.append(own)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedkd SuperLink")])
    built = (
        _certificate(subject, issuer.subject, key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
    )
    _private(folder / "superlink.key", _pem(key))
    (folder / "superlink.pem").write_bytes(built.sign(ca_key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM))


def _certificate(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # devices' clocks differ
        .not_valid_after(now + datetime.timedelta(days=365 * YEARS))
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _openssh(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )


def _private(path: Path, content: bytes) -> None:
    """Write a file that nobody else can read, not even while it is written."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _shown(text: str) -> str:
    """Quote a word that may be anything, for an error of one line."""
    return repr(text if len(text) <= 80 else f"{text[:80]}...")


def _is_ip(text: str) -> bool:
    """Return whether this is the address of one machine, on any other machine: no wildcard, no scope such as %eth0."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_unspecified or address.is_multicast or "%" in text)


def _is_host(text: str) -> bool:
    """Return whether this is a host name (RFC 1123), which no resolver takes for an address: 127.1, 0x7f000001."""
    labels = text.split(".")
    fine = all(re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?", label) for label in labels)
    return fine and len(text) <= 253 and not re.fullmatch(r"\d+|0[xX][0-9A-Fa-f]*", labels[-1])


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _split_address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"--superlink '{text}' is not HOST:PORT")
    return host.strip("[]"), int(port)
