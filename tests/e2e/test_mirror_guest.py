"""A real guest whose disk works in an I/O thread mirrors its writes: what it was told is fsynced is
recovered, whatever happens to the filter."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from sites import GROUP, WAIT_S, Pair, wait_until
from test_faults import small_disk
from test_guest import BOOT_LIMIT_S, CACHE, SMALL
from test_mirror import is_missed, kept, mirrored, replicates

from vrep.app.demo.guest import Guest, GuestDisk, GuestTask
from vrep.app.demo.guest_check import check_disk
from vrep.app.demo.guest_disk import Manifest, build_disk
from vrep.app.demo.guest_image import GuestImage
from vrep.control import ControlClient
from vrep.hypervisor.mirrored import Mirrored
from vrep.hypervisor.monitor import SocketMonitor
from vrep.hypervisor.record import AttachmentFile

pytestmark = pytest.mark.e2e
Made = Callable[..., Pair]


@pytest.fixture(scope="module")
def image() -> GuestImage:
    return GuestImage.build(CACHE)


class LocalGuest(Guest):
    """Its disk is a raw image of this host, its controller works in an I/O thread."""

    def __init__(self, image: GuestImage, disk: Path, qmp: Path, task: GuestTask) -> None:
        super().__init__(image, [GuestDisk(str(disk))], task, qmp_socket=qmp)
        self._disk = disk

    def command(self) -> list[str]:
        words = super().command()
        at = words.index("virtio-scsi-pci,id=scsi0")
        words[at] += ",iothread=io"
        words[at - 1 : at - 1] = ["-object", "iothread,id=io"]
        at = words.index("-blockdev")
        file = {"driver": "file", "filename": str(self._disk), "node-name": "image"}
        words[at + 1] = json.dumps({"driver": "raw", "node-name": "disk0", "file": file})
        at = next(i for i, word in enumerate(words) if word.startswith("scsi-hd,"))
        words[at] += ",werror=report"
        return [*words, "-no-shutdown"]


def test_a_guest_with_an_io_thread_loses_nothing(
    make_pair: Made, image: GuestImage, tmp_path: Path
) -> None:
    pair = make_pair(disks={"root": SMALL.size})
    manifest: Manifest = build_disk(pair.images["root"], SMALL)
    qmp = pair.root / "vm.sock"
    with (
        LocalGuest(image, pair.images["root"], qmp, GuestTask(churn_pause_s=0.05)) as guest,
        kept(pair),
    ):
        guest.wait_for("^LINE 5 ", BOOT_LIMIT_S)  # it has its disk open before the filter asks
        pair.up_beside()
        for _round in range(3):  # under load, each way
            mirrored(pair, f"qmp:{qmp}")
            more(guest)
            pair.a.detach(GROUP)
            more(guest)
        mirrored(pair, f"qmp:{qmp}")
        replicates(pair)
        more(guest)
        before = len(guest.witness)
        pair.a.checkpoint(GROUP, "running", wait_s=WAIT_S)
        more(guest, 2)  # its console is heard later than its disk is written
        after = len(guest.witness)
        pair.kill("filter")
        more(guest)
        pair.start("filter")
        status = replicates(pair)
        assert 0 < status["filter"]["resync_bytes"] < SMALL.size // 2
        more(guest)
        pair.kill("source")
        more(guest)
        pair.start("source")
        goes_through(pair)
        more(guest)
        replicates(pair)  # no write is left out now
        guest.kill9()
        told = len(guest.witness)
    wait_until("it is missed", lambda: is_missed(pair))
    wait_until("what was sent is durable", lambda: durable(pair))
    for point, least, most in (("running", before, after + 1), ("latest", told, told + 1)):
        recovered = tmp_path / f"{point}.raw"
        recovered.write_bytes(pair.read_view(point)["root"])
        found = check_disk(recovered, manifest)
        assert found.fsck_clean, found.fsck_output
        assert not found.files_wrong
        assert not found.files_missing
        assert not found.churn_wrong
        assert not found.log.damaged_slots
        assert not found.log.holes()
        last = found.log.last
        assert last is not None
        assert least <= last.number <= most


def test_a_write_that_fails_is_copied_from_the_image(
    make_pair: Made, image: GuestImage, tmp_path: Path
) -> None:
    """Nothing of it is sent, and a part of it may be on the image."""
    pair = make_pair(disks={"root": SMALL.size})
    build_disk(pair.images["root"], SMALL)
    qmp = pair.root / "vm.sock"
    with small_disk(tmp_path / "small", SMALL.size):
        inside = tmp_path / "small" / "root.raw"
        subprocess.run(["cp", "--sparse=always", pair.images["root"], inside], check=True)
        pair.images["root"].unlink()
        pair.images["root"].symlink_to(inside)
        task = GuestTask(churn_pause_s=0.01)
        with LocalGuest(image, inside, qmp, task) as guest, kept(pair):
            guest.wait_for("^LINE 5 ", BOOT_LIMIT_S)
            pair.up_beside()
            mirrored(pair, f"qmp:{qmp}")
            replicates(pair)
            gaps = pair.status()["filter"]["gaps"]
            filler = tmp_path / "small" / "filler"
            with contextlib.suppress(OSError):  # as much as there is room for
                filler.write_bytes(bytes(SMALL.size))
            wait_until("it is noticed", lambda: pair.status()["filter"]["gaps"] > gaps)
            wait_until("the guest gives up", lambda: gave_up(guest))
            # It stores what it can before it is off; what failed of that is noticed later.
            wait_until("the guest is off", lambda: is_off(guest))
            wait_until("all is noticed", lambda: all_noticed(pair, qmp))
            replicates(pair)
            pair.settle()
            assert pair.read_view()["root"] == inside.read_bytes()
        pair.close()


def gave_up(guest: Guest) -> bool:
    return any(line.text.startswith("FAILED ") for line in guest.console)


def is_off(guest: Guest) -> bool:
    return any("reboot: Power down" in line.text for line in guest.console)


def all_noticed(pair: Pair, qmp: Path) -> bool:
    """Whether the keeper dealt with each write that failed. A monitor has one client at a time."""
    file = AttachmentFile(pair.a.groups, GROUP)
    with file.held(), contextlib.closing(SocketMonitor(qmp)) as monitor:
        record = file.load()
        assert record is not None
        control = ControlClient(pair.a.paths.socket("filter"))
        socket = pair.a.paths.nbd_socket(GROUP)
        vm = Mirrored(monitor, control, GROUP, record.mirrors, socket)
        return vm.failures() == record.failures > 0


def goes_through(pair: Pair) -> None:
    """What was written up to now is durable, while the guest goes on."""
    head = replicates(pair)["filter"]["head"]

    def is_durable() -> bool:
        status = pair.status()
        return status["state"] == "replicating" and status["filter"]["durable"] >= head

    wait_until("what was written is durable", is_durable)


def durable(pair: Pair) -> bool:
    target = pair.status()["targets"][0]
    return target["seq"] is not None and target["seq"] == target["durable_seq"]


def more(guest: Guest, lines: int = 10) -> None:
    wanted = len(guest.witness) + lines
    wait_until("the guest writes", lambda: len(guest.witness) >= wanted)
