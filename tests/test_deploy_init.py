"""`fedkd deploy init` with words that are no address: refused in one line, or the same in every file it writes."""

from __future__ import annotations

import ipaddress
import json
import re
import shlex
import shutil
import ssl
import subprocess
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedkd import __version__
from fedkd.data.devices import parse_clients
from fedkd.errors import UserError
from sims import handout
from sims.deploy import Deployment

HOSTILE = [
    "",
    " ",
    "a b",
    "a\nb",
    "host\n",
    'a"b',
    "a'b",
    "a;reboot",
    "$(reboot)",
    "`reboot`",
    "${HOME}",
    "%h",
    "a%%b",
    "a\\b",
    "a#b",
    "a&b",
    "a|b",
    "{a: b}",
    "[a]",
    "- a",
    "*a",
    "!a",
    "host:8000",
    "[::1]",
    "[::1]:8000",
    "127.0.0.1:8000",
    "https://host",
    "host/path",
    "user@host",
    "my_host",
    "-host",
    "host-",
    "a..b",
    ".a",
    "a.",
    "a" * 64,
    "x" * 300,
    ".".join(["a" * 60] * 5),
    "bücher.example",
    "١٢٧.0.0.1",
    "0.0.0.0",
    "::",
    "224.0.0.1",
    "ff02::1",
    "fe80::1%eth0",
    "fe80::1%$(reboot)",
    "127.1",
    "1.2.3",
    "256.1.1.1",
    "0x7f000001",
    "2130706433",
    "1:2:3",
]
FINE = ["localhost", "server.example.org", "SERVER", "a-b.c1", "1a.example", "a" * 63, "10.0.0.1", "::1", "2001:DB8::7"]


@pytest.mark.parametrize("address", HOSTILE, ids=ascii)
def test_what_is_no_address_is_refused(
    address: str, fedkd: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In one line, before anything is written."""
    assert fedkd("deploy", "init", "lab", "--nodes", "1", f"--address={address}") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--address" in error
    assert len(error) < 400
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lab", "--nodes=0"], "every node hosts one client"),
        (["lab", "--nodes=-1"], "every node hosts one client"),
        (["lab", "--nodes=2", "--clients=1"], "every node hosts one client"),
        (["lab", "--nodes=1e3"], "is not a valid integer"),
        (["lab", "--nodes=$(nproc)"], "is not a valid integer"),
        (["lab", "--nodes=1", "--clients=10000001"], "more than the 10000000"),
        (["lab", "--nodes=1", "--port=0"], "not between 1 and 65535"),
        (["x" * 300, "--nodes=1"], "cannot be made a folder"),
        (["", "--nodes=1"], "the name of the folder is empty"),
    ],
)
def test_other_words_that_make_no_sense(
    words: list[str], said: str, fedkd: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Numbers and folders."""
    assert fedkd("deploy", "init", *words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a b", "a\nb", "q\"'q", "$(x)", "%h", "a;b", "[x]"])
def test_a_folder_may_have_any_name(name: str, tmp_path: Path) -> None:
    """Flower finds the certificate of the authority in it."""
    Deployment(tmp_path / name, 1, 1, "localhost").write()
    written = tomllib.loads((tmp_path / name / "server" / "flower" / "config.toml").read_text())
    assert Path(written["superlink"]["deployed"]["root-certificates"]).is_file()


def test_many_clients_of_a_node_are_a_short_word() -> None:
    """A command line has an end."""
    deployment = Deployment(Path("lab"), 2, 200_001, "localhost")
    texts = [deployment.clients_of(node) for node in (0, 1)]
    assert max(map(len, texts)) < 20
    assert parse_clients(texts[0]) + parse_clients(texts[1]) == tuple(range(200_001))


LABELS = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9-]{0,20}[A-Za-z0-9])?", fullmatch=True)
HOSTS = st.lists(LABELS, min_size=1, max_size=4).map(".".join)
ADDRESSES = HOSTS | st.ip_addresses().map(str)
SPOILT = st.tuples(ADDRESSES, st.integers(0, 30), st.sampled_from(HOSTILE)).map(
    lambda p: p[0][: p[1]] + p[2] + p[0][p[1] :]
)


@pytest.mark.slow
@given(ADDRESSES | SPOILT | st.text(max_size=20))
@settings(max_examples=80, deadline=None)
@example("a" * 63)
@example("2001:DB8::7")
@example("::ffff:10.0.0.1")
def test_what_is_accepted_is_the_same_everywhere(address: str) -> None:
    """A device that connects to the address believes the certificate, and every file has that very address in it."""
    with tempfile.TemporaryDirectory() as folder:
        deployment = Deployment(Path(folder) / "lab", 2, 5, address)
        try:
            deployment.write()
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017
            assert not deployment.folder.exists()
            return
        server = deployment.folder / "server"
        believes(server, address)
        at = f"[{address}]:8000" if ":" in address else f"{address}:8000"
        flower = tomllib.loads((server / "flower" / "config.toml").read_text())
        assert flower["superlink"]["deployed"]["address"] == at
        assert exec_of(server / "fedkd-superlink.service")[1:] == deployment.superlink_command()[1:]
        services = json.loads((deployment.folder / "compose.yaml").read_text().partition("\n")[2])["services"]
        assert "$" not in json.dumps([services[name]["command"] for name in services])
        networks = services["superlink"]["networks"]
        assert networks == (["default"] if is_number(address) else {"default": {"aliases": [address]}})
        readme = (deployment.folder / "README.md").read_text()
        said = [shlex.split(block.replace("\\\n", "")) for block in blocks(readme)]
        for node in (0, 1):
            command = deployment.supernode_command(node)
            assert command[2] == at
            assert (
                exec_of(deployment.folder / "devices" / f"node-{node}" / "fedkd-supernode.service")[1:] == command[1:]
            )
            assert command in [words[-len(command) :] for words in said]


@pytest.mark.slow
@given(st.text(st.characters(exclude_characters='\n"', exclude_categories=["Cc", "Cs"]), min_size=1))
@settings(max_examples=100, deadline=None)
@example("a b%h${HOME}'\\")
def test_systemd_reads_what_was_meant(folder: str) -> None:
    """Spaces, quotes, backslashes, and what systemd would replace."""
    command = Deployment(Path("lab"), 1, 1, "localhost").supernode_command(0, folder, folder)
    unit = handout.unit("SuperNode", "node 0", command)
    [line] = [line for line in unit.splitlines() if line.startswith("ExecStart=")]
    assert read_systemd(line.partition("=")[2])[1:] == command[1:]


@pytest.fixture
def lab(tmp_path: Path) -> Deployment:
    """A deployment as `fedkd deploy init` writes it."""
    deployment = Deployment(tmp_path / "lab", 2, 5, "server.example.org")
    deployment.write()
    return deployment


def test_what_containers_mount_and_name_is_there(lab: Deployment) -> None:
    """Every folder that is mounted was written, or is the data, and every path in a command is in one of them."""
    services = json.loads((lab.folder / "compose.yaml").read_text().partition("\n")[2])["services"]
    assert set(services) == {"superlink", "node-0", "node-1"}
    for name, service in services.items():
        mounts = {Path(one["target"]): one["source"] for one in service["volumes"]}
        for source in mounts.values():
            assert source == "${FEDKD_DATA:-./data}" or (lab.folder / source).is_dir(), name
        for path in map(Path, re.findall(r'/[^\s"]+', " ".join(service["command"]))):
            [(target, source)] = [(t, s) for t, s in mounts.items() if path.is_relative_to(t)]
            here = lab.folder / source / path.relative_to(target)
            assert here.is_file() == (path.suffix in (".pem", ".key")), path
        assert Path(service["environment"]["HOME"]) in mounts
        assert service["user"] == "${FEDKD_USER}"
    assert re.fullmatch(r"FEDKD_USER=\d+:\d+\n", (lab.folder / ".env").read_text())
    assert "--out data" in (lab.folder / "README.md").read_text()


def test_an_image_has_the_wheel_and_no_key(lab: Deployment) -> None:
    """The wheel that the README makes; nothing else of the folder reaches Docker; and not as root."""
    image = (lab.folder / "Dockerfile").read_text()
    [wheel] = re.findall(r"^COPY (\S+) ", image, re.MULTILINE)
    assert f"./{wheel}" in (lab.folder / "README.md").read_text()
    assert wheel == f"fedkd-{__version__}-py3-none-any.whl"
    assert re.search(r"^USER [1-9]\d*$", image, re.MULTILINE)
    assert (lab.folder / ".dockerignore").read_text().split() == ["*", "!*.whl"]


def test_units_run_as_a_user_of_their_own_with_the_same_places_as_by_hand(lab: Deployment) -> None:
    """The user that the README makes, whose home is the only place that is written to."""
    readme = (lab.folder / "README.md").read_text()
    units = list(lab.folder.rglob("*.service"))
    assert len(units) == 3
    for path in units:
        unit = dict(line.split("=", 1) for line in path.read_text().splitlines() if "=" in line)
        home = f"/var/lib/{unit['StateDirectory']}"
        assert f"--home-dir {home} --shell /usr/sbin/nologin {unit['User']}\n" in readme
        assert unit["WorkingDirectory"] == home
        assert (unit["NoNewPrivileges"], unit["ProtectSystem"], unit["PrivateTmp"]) == ("yes", "strict", "yes")
        assert f"sudo -u {unit['User']} -H env --chdir={home} {unit['Environment']} \\\n" in readme
        command = exec_of(path)
        assert Path(command[0]).parent == Path(unit["Environment"].split()[0].removeprefix("PATH=").split(":")[0])
        written = [word for word in command if home in word]
        assert len(written) == 1


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
def test_systemd_finds_nothing_to_say(lab: Deployment) -> None:
    """But that what is installed elsewhere is not installed here."""
    units = map(str, lab.folder.rglob("*.service"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, check=False
    )
    said = (done.stdout + done.stderr).splitlines()
    assert [line for line in said if not re.search(r"Command /opt/fedkd/bin/\S+ is not executable", line)] == []


def test_files_that_are_copied_are_there(lab: Deployment) -> None:
    """By the names that the README has, and not a key too many."""
    [copies] = [block for block in blocks((lab.folder / "README.md").read_text()) if "scp" in block]
    for node in range(2):
        [line] = [line for line in copies.splitlines() if line.endswith(f" device-{node}:")]
        folder, names = re.findall(r"(devices/\S+)/\{(.*?)\}", line)[0]
        assert folder == f"devices/node-{node}"
        written = {path.name for path in (lab.folder / folder).iterdir()}
        assert set(names.split(",")) == written - {"node.pub"}


def is_number(address: str) -> bool:
    """Return whether an address is one of IPv4 or IPv6."""
    try:
        return bool(ipaddress.ip_address(address))
    except ValueError:
        return False


def believes(server: Path, address: str) -> None:
    """Let a device that connects to the address shake hands with the server, in memory, and look at its certificate."""
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(server / "superlink.pem", server / "superlink.key")
    ours = ssl.create_default_context(cafile=str(server / "ca.pem"))
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client, host = ours.wrap_bio(down, up, server_hostname=address), theirs.wrap_bio(up, down, server_side=True)
    for end in (client, host, client, host):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
    assert client.version() == "TLSv1.3"
    certificate = x509.load_der_x509_certificate(client.getpeercert(binary_form=True) or b"")
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    if is_number(address):
        assert ipaddress.ip_address(address) in names.get_values_for_type(x509.IPAddress)
    else:
        assert address in names.get_values_for_type(x509.DNSName)


def blocks(readme: str) -> list[str]:
    """Return the commands that a text in Markdown shows."""
    return re.findall(r"```\n(.*?)\n```", readme, re.DOTALL)


def exec_of(unit: Path) -> list[str]:
    """Return the command that a systemd unit starts."""
    [line] = re.findall(r"^ExecStart=(.*)$", unit.read_text(), re.MULTILINE)
    return read_systemd(line)


def read_systemd(text: str) -> list[str]:
    """Read a command as systemd does: quotes and backslashes like a shell's, and ``%%`` and ``$$``, never alone."""
    for both in re.findall(r"[%$].?", bare := text.replace("%%", "").replace("$$", "")):
        raise AssertionError(f"{both} would be replaced in {bare}")
    return [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(text)]
