"""The iSCSI target with initiators that others wrote: libiscsi and QEMU."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from sites import wait_until

from vrep import iscsi
from vrep._core.filter import Disk, Group
from vrep._core.serve import Iscsi, Server
from vrep.errors import BusyError, InvalidError

MIB = 1 << 20
SIZE = 64 * MIB
GROUP_ID = bytes(range(16))
NAME = "iqn.2026-01.invalid.vrep:test"
CHAP, MUTUAL = ("user", "initiator-secret"), ("target", "target-secret-2")


def run(*command: str | Path, ok: bool = True) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120,
        check=False,
    )
    assert (done.returncode == 0) is ok, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


class Site:
    """Two disks of a recorded group, the second one over NBD unless iSCSI has it too."""

    def __init__(self, folder: Path, **changes: object) -> None:
        self.folder = folder
        self.shm = Path("/dev/shm") / f"vrep-iscsi-{folder.name}-{random.randrange(1 << 32)}"
        self.state = folder / "state"
        self.images = [folder / "a.raw", folder / "b.raw"]
        self.shm.mkdir()
        self.state.mkdir(exist_ok=True)
        for image in self.images:
            with image.open("ab") as file:
                file.truncate(SIZE)
        self.group = Group(
            [Disk("a", f"file:{self.images[0]}"), Disk("b", f"file:{self.images[1]}")],
            group_id=GROUP_ID,
            shm_dir=self.shm,
            state_dir=self.state,
            ring_bytes=64 * MIB,
        )
        made = Iscsi(GROUP_ID, ("a",), "127.0.0.1", 0, NAME, reservations=str(self.state))
        made = made._replace(**changes)  # type: ignore[arg-type]
        nbd = folder / "nbd.sock" if len(made.disks) < 2 else None
        try:
            self.server = Server(self.group, nbd, iscsi=made)
        except BaseException:
            self.group.close()
            shutil.rmtree(self.shm)
            raise
        self.server.start()

    def url(self, lun: int = 0, login: str = "", host: str = "127.0.0.1") -> str:
        return f"iscsi://{login}{host}:{self.server.iscsi_port}/{NAME}/{lun}"

    def close(self) -> None:
        self.server.stop()
        self.group.close()
        shutil.rmtree(self.shm)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    try:
        yield made
    finally:
        made.close()


def test_qemu_copies_both_ways(site: Site, tmp_path: Path, rng: random.Random) -> None:
    source, back = tmp_path / "source.raw", tmp_path / "back.raw"
    with source.open("wb") as file:
        file.truncate(SIZE)
        for at in range(0, SIZE, 4 * MIB):
            file.seek(at + 4096 * rng.randrange(256))
            file.write(rng.randbytes(rng.randrange(MIB)))
    run("qemu-img", "convert", "-n", "-W", "-f", "raw", "-O", "raw", source, site.url())
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, site.url())
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", site.url(), back)
    assert back.read_bytes() == source.read_bytes()
    assert site.images[0].read_bytes() == source.read_bytes()
    assert site.group.status()["head"] > 0
    run(
        "qemu-io", "-f", "raw", "-c", "write -P 7 0 1M", "-c", "discard 64k 64k", "-c", "flush",
        "-c", "read -P 7 0 64k", "-c", "read -P 0 64k 64k", "-c", "write -z 256k 64k",
        "-c", "read -P 0 256k 64k", site.url(),
    )  # fmt: skip
    holes = json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", site.url()))
    assert any(
        not part["data"]
        for part in holes
        if part["start"] <= 65536 < part["start"] + part["length"]
    )


def test_both_front_ends_serve_their_disks_only(site: Site) -> None:
    listed = run("iscsi-ls", "-s", f"iscsi://127.0.0.1:{site.server.iscsi_port}/")
    assert f"Target:{NAME} Portal:127.0.0.1:{site.server.iscsi_port},1" in listed
    assert re.findall(r"^Lun:(\d+)", listed, re.MULTILINE) == ["0"]
    nbd = f"nbd+unix:///?socket={site.folder / 'nbd.sock'}"
    exports = json.loads(run("nbdinfo", "--json", "--list", nbd))["exports"]
    assert [one["export-name"] for one in exports] == ["b"]
    wait_until("who asked is gone", lambda: not site.server.clients())


def test_two_units_of_4096_bytes_and_their_names(tmp_path: Path) -> None:
    site = Site(tmp_path, disks=("b", "a"), block_bytes=4096)
    try:
        for lun, image in ((0, site.images[1]), (1, site.images[0])):
            size = run("iscsi-readcapacity16", site.url(lun))
            assert "LOGICAL BLOCK LENGTH IN BYTES:4096" in size
            run("qemu-io", "-f", "raw", "-c", f"write -P {lun + 1} 1M 4k", site.url(lun))
            assert image.read_bytes()[MIB : MIB + 4096] == bytes([lun + 1]) * 4096
        names = [run("iscsi-inq", "-e", "1", "-c", "131", site.url(lun)) for lun in (0, 1)]
        assert names[0] != names[1]
    finally:
        site.close()


def test_chap_admits_who_proves_itself(tmp_path: Path) -> None:
    site = Site(tmp_path, chap=CHAP, mutual=MUTUAL)
    try:
        right = f"{CHAP[0]}%{CHAP[1]}@"
        assert "VREP" in run("iscsi-inq", site.url(login=right))
        run("iscsi-inq", site.url(login=f"{CHAP[0]}%another-secret@"), ok=False)
        run("iscsi-inq", site.url(), ok=False)
        both = f"?target_user={MUTUAL[0]}&target_password={MUTUAL[1]}"
        assert "VREP" in run("iscsi-inq", site.url(login=right) + both)
        assert site.server.iscsi_stats()["refused"] == 2
    finally:
        site.close()


def test_rules_admit_by_name(tmp_path: Path) -> None:
    site = Site(tmp_path, rules=(("iqn.2026-01.test:one", "127.0.0.0/8"),))
    try:
        run("iscsi-inq", "-i", "iqn.2026-01.test:two", site.url(), ok=False)
        assert "VREP" in run("iscsi-inq", "-i", "iqn.2026-01.test:one", site.url())
    finally:
        site.close()


def test_ipv6(tmp_path: Path) -> None:
    site = Site(tmp_path, host="::1")
    try:
        assert "VREP" in run("iscsi-inq", site.url(host="[::1]"))
    finally:
        site.close()


def test_load_of_many_commands(site: Site) -> None:
    out = run("iscsi-perf", "-b", "8", "-m", "64", "-r", "-t", "3", site.url())
    assert "finished" in out
    assert site.server.iscsi_stats()["requests"] > 100
    assert site.server.iscsi_stats()["errors"] <= 4  # attentions that a new session is told


@pytest.mark.parametrize(
    "suite",
    ["CompareAndWrite", "ProutReserve", "Unmap", "MultipathIO", "iSCSIResiduals", "iSCSITMF"],
)
def test_suites_of_libiscsi(site: Site, suite: str) -> None:
    more = [site.url()] if suite == "MultipathIO" else []
    out = run("iscsi-test-cu", "-d", "-n", "-t", f"ALL.{suite}", site.url(), *more)
    summary = re.search(r"tests\s+\d+\s+(\d+)\s+(\d+)\s+(\d+)", out)
    assert summary is not None
    assert int(summary[1]) == int(summary[2]) > 0
    assert int(summary[3]) == 0


def test_reservations_outlive_the_filter(tmp_path: Path) -> None:
    site = Site(tmp_path)
    reserve = "iscsi-test-cu", "-d", "-n", "-t", "ALL.ProutRegister"
    run(*reserve, site.url())
    assert (site.state / "reservations.0").stat().st_size == 2 * 24576
    site.close()
    again = Site(tmp_path)
    try:
        assert "VREP" in run("iscsi-inq", again.url())
    finally:
        again.close()


def test_what_is_unsafe_is_refused(tmp_path: Path) -> None:
    for changes in (
        {"host": "0.0.0.0"},
        {"target": "not a name"},
        {"chap": ("user", "short")},
        {"chap": CHAP, "mutual": ("target", CHAP[1])},
        {"rules": ((None, "10.0.0.0/99"),)},
        {"disks": ("nobody",)},
        {"removable": ("b",)},
        {"block_bytes": 1024},
    ):
        with pytest.raises(InvalidError):
            Site(tmp_path, **changes)
    auth = tmp_path / "auth"
    auth.write_text("user initiator-secret\ntarget target-secret-2\n")
    with pytest.raises(InvalidError, match="0600"):
        iscsi.read_auth(str(auth))
    auth.chmod(0o600)
    assert iscsi.read_auth(str(auth)) == (CHAP, MUTUAL)
    for text in (
        "",
        "user\n",
        "a b c\n",
        "user short\n",
        "a initiator-secret\nb initiator-secret\n",
    ):
        auth.write_text(text)
        with pytest.raises(InvalidError):
            iscsi.read_auth(str(auth))
    assert iscsi.parse_rule("iqn.a:b@10.0.0.0/8") == ("iqn.a:b", "10.0.0.0/8")
    assert iscsi.parse_rule("@::1") == (None, "::1")
    with pytest.raises(InvalidError):
        iscsi.parse_rule("")
    assert (
        iscsi.target_name("My_Web", "0123456789abcdef")
        == "iqn.2026-01.invalid.vrep:my-web.01234567"
    )


def test_a_port_that_is_taken_is_said(site: Site, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(BusyError):
        Site(other, port=site.server.iscsi_port)
