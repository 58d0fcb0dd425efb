"""The wheel and the Debian package, on a clean Debian with systemd: what `make package` made is
installed, runs a site in its sandbox, survives what hosts do, and is removed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from machine import Machine, debootstrap

REPOSITORY = Path(__file__).resolve().parents[2]
PYTHON = "/usr/lib/vrep/bin/python"
MIB = 1 << 20
WAIT_S = 120.0
WRITE = """
import sys
from vrep.app.demo.nbd_client import NbdClient
uri, fill, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with NbdClient(uri, 60.0) as client:
    for at in range(count):
        client.write((at * 37 % 255) * 32768, bytes([fill + at % 16]) * 20000)
    print("written", flush=True)
    if len(sys.argv) > 4:
        sys.stdin.read()
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.e2e,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and packages need root"),
    pytest.mark.skipif(shutil.which("mmdebstrap") is None, reason="mmdebstrap is not installed"),
]


@pytest.fixture(scope="module")
def built() -> Path:
    """dist/, freshly made."""
    subprocess.run([sys.executable, "packaging/build.py"], cwd=REPOSITORY, check=True, timeout=900)
    return REPOSITORY / "dist"


@pytest.fixture(scope="module")
def deb(built: Path) -> Path:
    (found,) = built.glob("*.deb")
    return found


@pytest.fixture(scope="module")
def machine(deb: Path) -> Iterator[Machine]:
    needed = subprocess.run(
        ["dpkg-deb", "-f", str(deb), "Depends"], capture_output=True, text=True, check=True
    ).stdout
    names = sorted({part.split()[0] for part in needed.split(",")})
    root = Path(tempfile.mkdtemp(prefix="vrep-machine-"))
    root.chmod(0o755)
    debootstrap(root, ["procps", *names])
    shutil.copy(deb, root / "vrep.deb")
    machine = Machine(root)
    try:
        yield machine
    finally:
        machine.close()


def test_the_wheel_installs_into_an_empty_environment(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "--quiet", "install", str(wheel)], check=True)
    demo = subprocess.run(
        [str(python.with_name("vrep")), "demo", "--guest", "none", "--out", "demo.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert demo.returncode == 3, demo.stdout + demo.stderr  # recovered, without a guest
    assert (tmp_path / "demo.json").exists()


class Site:
    """A site of the machine, through its command line."""

    def __init__(self, machine: Machine, directory: str = "/var/lib/vrep") -> None:
        self.machine = machine
        self.directory = directory

    def vrep(self, *arguments: str) -> Any:
        """The answer of a command."""
        text = self.machine.run("vrep", *arguments, "--dir", self.directory, "--json", user="vrep")
        return json.loads(text)

    def group(self) -> dict[str, Any]:
        found: dict[str, Any] = self.vrep("status")["groups"]["web"]
        return found

    def wait(self, what: str, state: str = "replicating") -> dict[str, Any]:
        deadline = time.monotonic() + WAIT_S
        while True:
            group = self.group()
            done = state in (group["state"], *group["conditions"])
            if done and (state != "replicating" or not group["targets"][0]["dirty_bytes"]):
                return group
            assert time.monotonic() < deadline, f"{what}: {group}"
            time.sleep(0.3)


def write(machine: Machine, uri: str, fill: int) -> None:
    """As QEMU would: a user who is a member of the sockets' group."""
    machine.run(PYTHON, "-c", WRITE, uri, str(fill), "200", user="qemu")


def main_pid(machine: Machine, unit: str) -> str:
    return machine.run("systemctl", "show", "-P", "MainPID", unit).strip()


def test_a_site_lives_in_the_package(machine: Machine) -> None:
    machine.run("groupadd", "--system", "kvm")
    machine.run("useradd", "--system", "--groups", "kvm", "qemu")
    for _ in range(2):  # each script can be run again
        machine.run("dpkg", "-i", "/vrep.deb")
    assert machine.run("dpkg", "--audit") == ""
    assert machine.run("vrep", "--version").startswith("vrep ")
    assert machine.run("stat", "-c", "%U %a", "/var/lib/vrep").strip() == "vrep 711"

    west, east = Site(machine), Site(machine, "/srv/east")
    machine.run("install", "-d", "-o", "vrep", "/srv/east")
    assert machine.status("vrep", "site", "init", "--name", "root") != 0
    west.vrep("site", "init", "--name", "west", "--listen", "127.0.0.1:7001")
    east.vrep("site", "init", "--name", "east", "--listen", "127.0.0.1:7002")
    machine.run("vrep", "service", "install")
    machine.run("vrep", "service", "install")
    units = [f"vrep-{role}.service" for role in ("filter", "source", "target")]
    machine.run("systemd-analyze", "verify", *units, "vrep.target")
    machine.run("systemctl", "is-active", *units)
    machine.run("systemctl", "is-enabled", *units, "vrep.target")
    assert "libvirtd.service" in machine.run("systemctl", "show", "-P", "Before", units[0])

    with subprocess.Popen(
        machine.command("vrep", "run", "--dir", east.directory, user="vrep"),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as run:
        try:
            replicates(machine, west, east)
        finally:
            run.terminate()
    is_removed(machine, west)


def replicates(machine: Machine, west: Site, east: Site) -> None:
    deadline = time.monotonic() + WAIT_S
    while not east.vrep("status")["roles"]["target"]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    west.vrep("site", "join", east.vrep("site", "invite")["token"])
    west.vrep("key", "create", "acme")
    machine.run("install", "-d", "-o", "vrep", "-m", "0700", "/srv/keys")
    west.vrep("key", "export", "acme", "--out", "/srv/keys/acme.key")
    west.vrep("key", "verify", "acme", "/srv/keys/acme.key")
    east.vrep("key", "import", "/srv/keys/acme.key")
    machine.run("truncate", "-s", "8M", "/srv/web.raw")
    machine.run("chown", "vrep", "/srv/web.raw")
    west.vrep("protect", "web", "--disk", "root=file:/srv/web.raw", "--to", "east", "--key", "acme")
    uri = "nbd+unix:///root?socket=/run/vrep/nbd-web.sock"
    west.wait("the first sync")
    write(machine, uri, 10)
    assert machine.status(PYTHON, "-c", WRITE, uri, "1", "1", user="nobody") != 0
    west.wait("what was written")
    same_at_the_target(machine, east, "first")

    # Supervisors and roles are killed; what runs is taken over, what does not is started.
    for unit in ("vrep-source", "vrep-filter"):
        before = main_pid(machine, unit)
        machine.run("systemctl", "kill", "--kill-whom=main", "-s", "KILL", unit)
        deadline = time.monotonic() + WAIT_S
        while main_pid(machine, unit) in ("0", before):
            assert time.monotonic() < deadline
            time.sleep(0.2)
    machine.run("pkill", "-KILL", "-f", "vrep.app.daemon filter /var/lib/vrep")
    west.wait("the filter is back")
    write(machine, uri, 40)
    west.wait("what was written after kills")

    # A filter that cannot start: its unit is up, and the disk is there.
    good = (machine.root / "var/lib/vrep/config.toml").read_text()
    machine.run("sh", "-c", "echo '[nonsense' >> /var/lib/vrep/config.toml")
    machine.run("systemctl", "restart", "vrep-filter")
    # With settings that cannot be read no command runs either: asked is the socket.
    write(machine, uri, 70)
    (machine.root / "var/lib/vrep/config.toml").write_text(good)
    west.wait("passed through", "bypass")
    machine.run("systemctl", "restart", "vrep-filter")
    west.wait("all was copied again")
    same_at_the_target(machine, east, "second")


def same_at_the_target(machine: Machine, east: Site, name: str) -> None:
    east.vrep("export", "web", "--out", f"/srv/east/{name}")
    found = (machine.root / "srv/east" / name / "root.raw").read_bytes()
    assert found == (machine.root / "srv/web.raw").read_bytes()
    assert any(found)


def is_removed(machine: Machine, west: Site) -> None:
    uri = "nbd+unix:///root?socket=/run/vrep/nbd-web.sock"
    with subprocess.Popen(
        machine.command(PYTHON, "-c", WRITE, uri, "90", "1", "stay", user="qemu"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"written\n"
        assert machine.status("dpkg", "--remove", "vrep") != 0
        machine.run("systemctl", "is-active", "vrep-filter")
        assert west.group()["clients"] == 1
        client.communicate()
    machine.run("dpkg", "--remove", "vrep")
    assert machine.status("systemctl", "is-active", "vrep-filter") != 0
    assert machine.status("pgrep", "-f", "vrep.app.daemon [a-z]+ /var/lib/vrep") != 0
    machine.run("dpkg", "--purge", "vrep")
    assert (machine.root / "var/lib/vrep/identity/site.json").exists()
    machine.run("dpkg", "-i", "/vrep.deb")  # and it goes on where it was
    machine.run("vrep", "service", "install")
    assert west.group()["disks"]
    assert machine.run("dpkg", "--audit") == ""
