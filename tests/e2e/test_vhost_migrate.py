"""A VM on vhost-user-blk moves from one QEMU to another one while it writes: its dirty log is
kept by the filter, its disk goes with it, and no write is lost or done twice."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sites import GROUP, Pair, wait_until

from vrep.app.demo.guest import Guest, GuestDisk, GuestTask, WitnessedLine
from vrep.app.demo.guest_check import check_disk, judge_lines
from vrep.app.demo.guest_disk import DiskContent, build_disk
from vrep.app.demo.guest_image import GuestError, GuestImage
from vrep.control import ControlClient
from vrep.errors import BusyError
from vrep.hypervisor.monitor import SocketMonitor

pytestmark = pytest.mark.e2e
Make = Callable[..., Pair]

SMALL = DiskContent(
    size=96 << 20,
    small_files=20,
    small_size_max=16 << 10,
    text_files=5,
    text_size_max=32 << 10,
    big_files=1,
    big_size=1 << 20,
)
BOOT_S = 300.0
SLOW, FAST = 2 << 20, 24 << 20
"""bytes a second of a move: one that does not end by itself, one that lasts for seconds"""


class Place:
    """A QEMU that runs the guest, or waits for it to come."""

    def __init__(self, image: GuestImage, uri: str, root: Path, number: int) -> None:
        self.address = f"unix:{root}/in{number}"
        more = ["-incoming", self.address] if number else []
        self.guest = Guest(
            image,
            [GuestDisk(uri)],
            GuestTask(pause_s=0.01, churn_pause_s=0.01, reread=True),
            qmp_socket=root / f"qmp{number}",
            more_words=more,
        )

    def start(self) -> None:
        self.guest.start()
        socket = self.guest.qmp_socket
        assert socket is not None
        # It greets when it has set up its devices, and that takes long on a busy machine.
        self.monitor = wait_until("QEMU answers", lambda: SocketMonitor(socket), BOOT_S)

    def state(self) -> str:
        return str(self.monitor.execute("query-migrate").get("status", "none"))

    def run_state(self) -> str:
        return str(self.monitor.execute("query-status")["status"])

    def go_to(self, other: Place, bytes_per_s: int = FAST) -> None:
        """Begin to move, slowly: much is read into its memory and written meanwhile."""
        limits = {"downtime-limit": 500, "max-bandwidth": bytes_per_s}
        self.monitor.execute("migrate-set-parameters", limits)
        self.monitor.execute("migrate", {"uri": other.address})

    def arrived(self) -> bool:
        state = self.state()
        assert state != "failed", self.monitor.execute("query-migrate")
        return state == "completed"

    def stop(self) -> None:
        """The guest's clean end. It listens for moments only, so it is told again."""

        def stopped() -> bool:
            with contextlib.suppress(GuestError):
                self.guest.request_stop()  # it may have ended meanwhile
            return any(line.text.startswith("STOPPED ") for line in self.guest.console)

        wait_until("it stops", stopped, BOOT_S, 1)
        assert self.guest.wait_exit(BOOT_S) == 0

    def close(self) -> None:
        self.monitor.close()
        self.guest.kill9()


def clients(pair: Pair) -> list[Any]:
    return list(ControlClient(pair.a.paths.socket("filter")).call("clients", group=GROUP))


def judge(pair: Pair, manifest: Any, tmp_path: Path, witness: list[WitnessedLine]) -> None:
    """Whatever the guest said was durable, wherever it ran, is at the other site."""
    killed_ms = time.time_ns() // 1_000_000
    pair.settle()
    pair.same_as_source()
    result = pair.b.export(GROUP, tmp_path / "recovered")
    verdict = check_disk(Path(result.disks[0].path), manifest)
    assert verdict.violations() == []
    numbers = [line.number for line in witness]
    assert numbers == sorted(set(numbers))
    # A line that was being printed when the guest left is one half on each console.
    assert numbers[-1] - len(numbers) <= 1
    lines = judge_lines(verdict.log, witness, point_ms=killed_ms)
    assert lines.violations() == []


@pytest.fixture
def make_place(tmp_path: Path) -> Iterator[Callable[[str, int], Place]]:
    """Makes places by their numbers; the guest boots in that of number 0."""
    image = GuestImage.build(Path(__file__).parents[2] / "build" / "guest")
    with contextlib.ExitStack() as stack:

        def make(uri: str, number: int) -> Place:
            place = Place(image, uri, tmp_path, number)
            place.start()
            stack.callback(place.close)
            return place

        yield make


def test_a_vm_moves_while_it_reads_and_writes(
    make_pair: Make, make_place: Callable[[str, int], Place], tmp_path: Path
) -> None:
    pair = make_pair(disks={"root": SMALL.size})
    manifest = build_disk(pair.images["root"], SMALL)
    pair.up()
    pair.a.set_fronts(GROUP, {"root": "vhost-user-blk"})
    here = make_place(pair.a.disk_uri(GROUP), 0)
    nowhere = make_place(pair.a.disk_uri(GROUP), 1)
    here.guest.wait_for_lines(20, BOOT_S)
    here.guest.wait_for("^READ 1$", BOOT_S)
    wait_until("both are connected", lambda: len(clients(pair)) == 2)
    assert [bool(client["written_bytes"]) for client in clients(pair)].count(True) == 1
    # A move that is given up, with a filter that is killed on the way: it goes on where it is.
    here.go_to(nowhere, SLOW)  # it must not arrive before it is given up
    wait_until("it is on its way", lambda: here.state() == "active", every_s=0.01)
    pair.kill("filter")
    pair.start("filter")
    here.monitor.execute("migrate_cancel")
    wait_until("it is not any more", lambda: here.state() == "cancelled")
    nowhere.close()
    here.guest.wait_for_lines(len(here.guest.witness) + 20, BOOT_S)
    wait_until("one is left", lambda: len(clients(pair)) == 1)

    there = make_place(pair.a.disk_uri(GROUP), 2)
    here.go_to(there)
    wait_until("it arrived", here.arrived, BOOT_S)
    wait_until("it runs there", lambda: there.run_state() == "running")
    there.guest.wait_for_lines(20, BOOT_S)
    # Where it was it cannot go on: its disk is elsewhere. It may say that a line is durable that
    # was so when it left.
    left = here.guest.witness
    here.monitor.execute("cont")
    more = len(there.guest.witness) + 20
    there.guest.wait_for_lines(more, BOOT_S)
    assert len(here.guest.witness) <= len(left) + 1
    with pytest.raises(BusyError):
        pair.a.set_fronts(GROUP, {"root": "nbd"})
    here.close()
    # A filter that is killed afterwards is a stall, as ever.
    pair.kill("filter")
    more = len(there.guest.witness) + 20
    pair.start("filter")
    there.guest.wait_for_lines(more, BOOT_S)
    there.guest.wait_for("^READ ", BOOT_S)
    there.stop()
    judge(pair, manifest, tmp_path, left + there.guest.witness)


def move(pair: Pair, make_place: Callable[[str, int], Place]) -> tuple[Place, Place]:
    """A guest that moved, and runs: where it was, where it is."""
    pair.up()
    pair.a.set_fronts(GROUP, {"root": "vhost-user-blk"})
    here = make_place(pair.a.disk_uri(GROUP), 0)
    there = make_place(pair.a.disk_uri(GROUP), 1)
    here.guest.wait_for_lines(20, BOOT_S)
    here.go_to(there)
    wait_until("it arrived", here.arrived, BOOT_S)
    wait_until("it runs there", lambda: there.run_state() == "running")
    there.guest.wait_for_lines(5, BOOT_S)
    return here, there


def test_who_was_left_writes_no_more_when_the_guest_has_ended(
    make_pair: Make, make_place: Callable[[str, int], Place], tmp_path: Path
) -> None:
    """The disk is nobody's then; but what stands in the queues and the memory of the place where
    the guest was is older than what the guest wrote since."""
    pair = make_pair(disks={"root": SMALL.size})
    manifest = build_disk(pair.images["root"], SMALL)
    here, there = move(pair, make_place)
    left = list(here.guest.witness)
    there.stop()
    there.close()
    wait_until("the old one is alone", lambda: len(clients(pair)) == 1)
    content = pair.images["root"].read_bytes()
    here.monitor.execute("cont")
    log = pair.root / "filter.log"

    def told() -> bool:
        refused = "the object is in use" in log.read_text(errors="replace")
        return refused or pair.images["root"].read_bytes() != content

    wait_until("it asks for the disk", told)
    assert here.run_state() == "running"
    judge(pair, manifest, tmp_path, left + there.guest.witness)
    assert pair.images["root"].read_bytes() == content
    assert len(here.guest.witness) <= len(left) + 1


def test_a_new_filter_serves_the_guest_where_it_is(
    make_pair: Make, make_place: Callable[[str, int], Place], tmp_path: Path
) -> None:
    """Where the guest was, a QEMU is connected still, and comes back to a new filter too: paused,
    or told to go on."""
    pair = make_pair(disks={"root": SMALL.size})
    manifest = build_disk(pair.images["root"], SMALL)
    here, there = move(pair, make_place)
    left = list(here.guest.witness)
    for turn in range(3):
        pair.kill("filter")
        pair.start("filter")
        there.guest.wait_for_lines(len(there.guest.witness) + 10, BOOT_S)
        if turn == 1:
            here.monitor.execute("cont")
    there.stop()
    content = pair.images["root"].read_bytes()
    pair.kill("filter")
    pair.start("filter")
    wait_until("the old one is back", lambda: len(clients(pair)) == 1)
    judge(pair, manifest, tmp_path, left + there.guest.witness)
    assert pair.images["root"].read_bytes() == content
    assert len(here.guest.witness) <= len(left) + 1
