"""open-iscsi in a Linux guest, on the target of a protected group: a file system, fio's
verification, killed filters, a killed and a rebooted guest; and the replica is the same."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from sites import GROUP, MIB, Pair, free_port

from vrep.app.demo.guest import Guest
from vrep.app.demo.guest_image import WANTED_MODULES, GuestImage, GuestRecipe

pytestmark = pytest.mark.e2e
Make = Callable[..., Pair]

PROGRAMS = ("/usr/sbin/iscsid", "/usr/sbin/iscsiadm", "/usr/sbin/mke2fs", "/usr/bin/fio")
SLIRP = "10.0.2.2"
"""this host, as a guest on QEMU's user network sees it"""
AUTH = "user initiator-secret\ntarget target-secret-2\n"
BOOT_S = 300.0


def programs() -> dict[str, bytes]:
    """Programs of this host and the libraries that they load, by their paths."""
    found = {}
    for program in PROGRAMS:
        listed = subprocess.run(["ldd", program], check=True, capture_output=True, text=True)
        for word in [program, *listed.stdout.split()]:
            if word.startswith("/"):
                found[word[1:]] = Path(word).read_bytes()
    return found


@pytest.fixture(scope="module")
def image() -> GuestImage:
    here = Path(__file__)
    recipe = GuestRecipe(
        init=here.with_name("iscsi_guest.sh").read_bytes(),
        modules=(*WANTED_MODULES, "virtio_net", "iscsi_tcp"),
        files=programs(),
    )
    return GuestImage.build(here.parents[2] / "build" / "guest", recipe=recipe)


class IscsiGuest(Guest):
    """A guest without a disk of its own, on a network of its own."""

    def __init__(self, image: GuestImage, uri: str, mode: str) -> None:
        where, _, target = uri.removeprefix("iscsi://").partition("/")
        words = {
            "do": mode,
            "target": target.rpartition("/")[0],
            "portal": f"{SLIRP}:{where.rpartition(':')[2]}",
        }
        self.words = " ".join(f"vrep.{name}={value}" for name, value in words.items())
        network = ("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net")
        super().__init__(image, [], memory_mib=512, more_words=network)

    def command(self) -> list[str]:
        command = super().command()
        at = command.index("-append") + 1
        return [*command[:at], f"{command[at]} {self.words}", *command[at + 1 :]]

    def rounds(self) -> int:
        return sum(line.text.startswith("FIO ") for line in self.console)

    def goes_on(self, more: int = 2) -> None:
        least = self.rounds() + more
        self.wait_for(f"^FIO {least}$", BOOT_S)


def test_open_iscsi_rides_out_killed_filters(
    make_pair: Make, image: GuestImage, tmp_path: Path
) -> None:
    pair = make_pair(disks={"root": 64 * MIB})
    auth = tmp_path / "chap"
    auth.write_text(AUTH)
    auth.chmod(0o600)
    pair.up()
    pair.a.set_fronts(
        GROUP,
        {"root": "iscsi"},
        iscsi_listen=f"127.0.0.1:{free_port()}",
        iscsi_auth=str(auth),
        iscsi_admit=("iqn.2026-01.invalid.test:guest@127.0.0.0/8",),
    )
    uri = pair.a.disk_uri(GROUP)
    with IscsiGuest(image, uri, "first") as guest:
        guest.wait_for("^MOUNTED$", BOOT_S)
        guest.goes_on(1)
        for _ in range(2):
            pair.kill("filter")
            pair.start("filter")
            guest.goes_on()
    # The guest was killed. Another one logs in by the same name, and finds what was durable.
    pair.kill("filter")
    pair.start("filter")
    pair.served()
    with IscsiGuest(image, uri, "again") as guest:
        guest.wait_for("^SAME [1-9]", BOOT_S)
        guest.wait_for("^DONE$", BOOT_S)
        assert guest.wait_exit(BOOT_S) == 0
    pair.settle()
    pair.same_as_source()
    result = pair.b.export(GROUP, tmp_path / "recovered")
    disk = result.disks[0].path
    checked = subprocess.run(
        ["e2fsck", "-fn", str(disk)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout
    sums = read_file(disk, "sums").decode().splitlines()
    assert sums
    for line in sums:
        digest, name = line.split()
        assert hashlib.sha256(read_file(disk, name)).hexdigest() == digest, name


def read_file(disk: str | Path, name: str) -> bytes:
    return subprocess.run(
        ["debugfs", "-R", f"cat /{name}", str(disk)], check=True, capture_output=True
    ).stdout
