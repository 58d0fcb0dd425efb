"""A VM keeps its disks and sends a copy of each write: whatever the filter does, it goes on."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sites import GROUP, MIB, Pair, wait_until
from test_attach import blockdev, libvirt_storage, plain_drive, proxmox, raw_over_file
from vm import BLOCK, DeviceLoad, Vm, Writer

from vrep import errors
from vrep.hypervisor import keeper as keepers
from vrep.hypervisor.keeper import Keeper
from vrep.hypervisor.mirrored import Mirrored
from vrep.hypervisor.monitor import SocketMonitor
from vrep.hypervisor.record import AttachmentFile

pytestmark = pytest.mark.e2e
Made = Callable[..., Pair]

SIZE = 16 * MIB
BLOCKS = SIZE // BLOCK
A = "/machine/peripheral/a/virtio-backend"
SHARED = "-device virtio-blk-pci,drive=araw,id=a,share-rw=on"
B = "/machine/peripheral/b/virtio-backend"


@contextlib.contextmanager
def kept(pair: Pair) -> Iterator[Keeper]:
    """As `vrep run` does beside the filter."""
    keeper, stopping = Keeper(pair.a.paths), threading.Event()
    thread = threading.Thread(target=keeper.run, args=(stopping,))
    thread.start()
    try:
        yield keeper
    finally:
        stopping.set()
        thread.join(60)
        assert not thread.is_alive()


def mirror(pair: Pair, vm: Vm) -> Any:
    return mirrored(pair, vm.vm)


def mirrored(pair: Pair, where: str) -> Any:
    """Attached in mirror mode."""
    result = pair.a.attach(GROUP, where, mode="mirror")
    assert result is not None
    return result


def replicates(pair: Pair) -> dict[str, Any]:
    """The status that says so."""

    def ended() -> dict[str, Any] | None:
        status = pair.status()
        return status if status["state"] == "replicating" else None

    found: dict[str, Any] = wait_until("the gap ends", ended)
    return found


def hang(pair: Pair) -> None:
    """Stop the filter while the keeper does not ask the VM: an answer that a QEMU owes it which
    waits for the filter would hold the keeper up for as long as a monitor may take."""
    filter_process = pair.processes["filter"]
    with AttachmentFile(pair.a.groups, GROUP).held():
        filter_process.send_signal(signal.SIGSTOP)
        stat = Path(f"/proc/{filter_process.pid}/stat")
        wait_until("it is stopped", lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")


def format_disk(pair: Pair, *, alone: bool = True) -> list[str]:
    share = "" if alone else ",share-rw=on"
    device = f"-device virtio-blk-pci,drive=araw,id=a{share}"
    return raw_over_file(pair.images["root"], device)


def whole(pair: Pair, load: DeviceLoad) -> None:
    load.stop()
    pair.settle()
    held = pair.images["root"].read_bytes()
    load.check(held)
    assert pair.read_view()["root"] == held


@pytest.mark.parametrize(
    ("build", "node", "size"),
    [
        (lambda i: raw_over_file(i, SHARED), "araw", 4),
        (proxmox, "drive-scsi0", 1),
    ],
    ids=["format", "proxmox"],
)
def test_no_write_is_missed_under_load(
    make_pair: Made, build: Callable[[Path], list[str]], node: str, size: int
) -> None:
    """From the begin of an attach to the end of a detach, twice; and the graph is as it was."""
    pair = make_pair(disks={"root": SIZE})
    with Vm(*build(pair.images["root"])) as vm, kept(pair):
        pair.up_beside()
        uri = vm.export(node, "load")
        writers = [Writer(uri, i * BLOCKS // size, BLOCKS // size, i + 1) for i in range(size)]
        before = vm.graph()
        for _round in range(2):
            for writer in writers:
                writer.goes_on()
                writer.latest_ms = 0.0
            result = mirror(pair, vm)
            for writer in writers:
                writer.goes_on()
            slowest = max(writer.latest_ms for writer in writers)
            print(f"begun in {result.switch_ms} ms, slowest write {slowest:.1f} ms")
            status = replicates(pair)
            assert status["conditions"] == []
            assert status["filter"]["writes"] > 0
            for writer in writers:
                writer.goes_on()
            if _round == 0:
                pair.a.detach(GROUP)
                assert vm.graph() == before
                assert pair.status()["conditions"].count("detached") == 1
        for writer in writers:
            writer.stop()
        pair.settle()
        held = pair.images["root"].read_bytes()
        recovered = pair.read_view()["root"]
        for writer in writers:
            writer.check(held)
            writer.check(recovered)
        assert recovered == held
        pair.a.detach(GROUP)
        assert vm.graph() == before
        assert vm.alive()


LARGE = 32 * MIB
LOADED = 8 * MIB
"""of which `DeviceLoad` writes no more than this"""


@pytest.mark.parametrize("way", ["kill", pytest.param("stop", marks=pytest.mark.slow)])
def test_a_filter_that_ends_costs_the_vm_nothing_and_the_copy_a_delta(
    make_pair: Made, way: str
) -> None:
    """Killed, or upgraded in place: the VM sees no error and does not wait; the keeper begins the
    mirror again; what was written meanwhile is copied, and nothing else."""
    pair = make_pair(disks={"root": LARGE})
    with Vm(*format_disk(pair)) as vm, kept(pair):
        pair.up_beside()
        load = DeviceLoad(vm, A)
        mirror(pair, vm)
        replicates(pair)
        load.goes_on()
        (pair.kill if way == "kill" else pair.stop)("filter")
        load.goes_on()  # without a filter
        assert "filter-down" in pair.status()["conditions"]
        pair.start("filter")
        status = replicates(pair)
        assert status["filter"]["opened_as"] == "killed"
        assert 0 < status["filter"]["resync_bytes"] <= LOADED
        load.goes_on()
        whole(pair, load)


def test_a_filter_that_hangs_is_let_go_of(make_pair: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """The VM's writes wait until the keeper cuts the connection; then it goes on, and when the
    filter answers again, so does the mirror."""
    # This VM can be asked, however busy the machine is: its filter need not be killed.
    monkeypatch.setattr(keepers, "ASK_S", 10.0)
    pair = make_pair(disks={"root": SIZE})
    with Vm(*format_disk(pair, alone=False)) as vm, kept(pair):
        pair.up_beside()
        writer = Writer(vm.export("araw", "load"), 0, BLOCKS, 1)
        mirror(pair, vm)
        replicates(pair)
        writer.latest_ms = 0.0
        hang(pair)
        time.sleep(1)
        writer.goes_on(20)
        print(f"the slowest write took {writer.latest_ms / 1000:.1f} s")
        assert writer.latest_ms < 20_000
        pair.processes["filter"].send_signal(signal.SIGCONT)
        wait_until("it is noticed", lambda: (pair.status()["filter"] or {}).get("mirror_losses"))
        replicates(pair)
        writer.goes_on()
        writer.stop()
        pair.settle()
        writer.check(pair.read_view()["root"])
        pair.same_as_source()


@pytest.mark.slow
def test_a_filter_that_hangs_is_killed_when_the_vm_cannot_be_asked(make_pair: Made) -> None:
    """A QEMU whose main loop waits for a disk answers nobody new; the filter's end frees it."""
    pair = make_pair(disks={"root": SIZE})
    with Vm(*format_disk(pair)) as vm, kept(pair):
        pair.up_beside()
        load = DeviceLoad(vm, A)  # QEMU's main loop waits for what it writes
        mirror(pair, vm)
        replicates(pair)
        hang(pair)
        hung = pair.processes.pop("filter")
        load.goes_on()
        assert hung.wait(30) == -signal.SIGKILL
        pair.start("filter")
        replicates(pair)
        whole(pair, load)


@pytest.mark.slow
def test_a_filter_that_hangs_while_the_vm_is_asked_is_killed_as_soon(
    make_pair: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that QEMU owes the keeper does not hold it up for as long as a monitor may take."""
    pair = make_pair(disks={"root": SIZE})
    asked, hung = Mirrored.failures, threading.Event()

    def asking(self: Mirrored) -> int:
        if hung.is_set():
            process.send_signal(signal.SIGSTOP)
            time.sleep(3)  # a write of the load waits
        return asked(self)

    with Vm(*format_disk(pair)) as vm, kept(pair):
        pair.up_beside()
        load = DeviceLoad(vm, A)  # QEMU's main loop waits for what it writes
        mirror(pair, vm)
        replicates(pair)
        monkeypatch.setattr(Mirrored, "failures", asking)
        process = pair.processes.pop("filter")
        begun = time.monotonic()
        hung.set()
        assert process.wait(30) == -signal.SIGKILL
        print(f"killed after {time.monotonic() - begun:.1f} s")
        monkeypatch.setattr(Mirrored, "failures", asked)
        pair.start("filter")
        load.goes_on()
        replicates(pair)
        whole(pair, load)


def test_a_filter_that_hangs_in_a_drain_is_let_go_of(
    make_pair: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then all of QEMU waits, and only what is sent out of band helps."""
    pair = make_pair(disks={"root": SIZE})
    with Vm(*format_disk(pair)) as vm:
        pair.up_beside()
        load = DeviceLoad(vm, A)
        mirror(pair, vm)
        load.goes_on()
        guarded = SocketMonitor.guarded
        answers = []

        def hanging(self: SocketMonitor, *arguments: Any) -> bool:
            pair.processes["filter"].send_signal(signal.SIGSTOP)
            time.sleep(3)  # a write of the load waits, though it may not get the processor soon
            answers.append(guarded(self, *arguments))
            pair.processes["filter"].send_signal(signal.SIGCONT)
            return answers[-1]

        monkeypatch.setattr(SocketMonitor, "guarded", hanging)
        keeper = Keeper(pair.a.paths)
        wait_until("a barrier is tried", lambda: (keeper.tick(), answers)[1])
        assert answers == [False]
        monkeypatch.setattr(SocketMonitor, "guarded", guarded)
        load.goes_on()
        with kept(pair):
            replicates(pair)
            load.goes_on()
            whole(pair, load)


def two_disks(pair: Pair) -> list[str]:
    return [
        *format_disk(pair),
        *blockdev(driver="raw", **{"node-name": "braw"}, file={
            "driver": "file", "filename": str(pair.images["data"]), "node-name": "bfile",
        }),
        "-device", "virtio-blk-pci,drive=braw,id=b",
    ]  # fmt: skip


def test_one_disk_that_is_not_sent_is_a_gap_for_all(make_pair: Made) -> None:
    """A write of the other disk that was given after one that was not sent lies in the gap."""
    pair = make_pair(disks={"root": SIZE, "data": SIZE})
    with Vm(*two_disks(pair)) as vm:
        pair.up_beside()
        with kept(pair):
            mirror(pair, vm)
            replicates(pair)
        for number in range(1, 20):
            assert vm.qemu_io(A, f"write -q -P {number} 0 4k") == ""
            assert vm.qemu_io(B, f"write -q -P {number} 0 4k") == ""
        seq = pair.status()["filter"]["head"]
        assert not pair.status()["filter"]["gap"]
        nbd = [i for i in vm.monitor.execute("query-yank") if "copy" in i.get("node-name", "")]
        vm.monitor.execute("yank", {"instances": nbd[:1]})
        for disk in (A, B):  # not sent; then sent
            assert vm.qemu_io(disk, "write -q -P 99 0 4k") == ""
        status = pair.status()
        assert status["filter"]["gap_seq"] == seq + 1
        assert "mirror-lost" in status["conditions"]
        with pytest.raises(errors.GapError):
            pair.a.checkpoint(GROUP, "in-between")
        with kept(pair):
            replicates(pair)
            pair.settle()
            recovered = pair.read_view()
            for name, image in pair.images.items():
                assert recovered[name] == image.read_bytes()
                assert recovered[name][0] == 99
            pair.a.detach(GROUP)


def is_missed(pair: Pair) -> bool:
    """That its VM is gone was noticed; a while later its disks rest."""
    status = pair.status()
    rests = bool(status["filter"] and status["filter"]["mirror_rests"])
    return rests or "mirror-lost" in status["conditions"]


def is_mirrored(pair: Pair) -> bool:
    """By a VM that runs."""
    status = pair.status()["filter"]
    return bool(status and not status["handover"] and not status["mirror_rests"])


def test_a_vm_that_was_started_anew_is_copied_whole(make_pair: Made) -> None:
    """Nobody knows what it wrote before its mirror was begun."""
    pair = make_pair(disks={"root": SIZE})
    address = pair.root / "vm.sock"
    with kept(pair):
        with Vm(*format_disk(pair)) as vm:
            pair.up_beside()
            address.symlink_to(vm.qmp)
            mirrored(pair, f"qmp:{address}")
            replicates(pair)
            assert vm.qemu_io(A, "write -q -P 5 1M 64k") == ""
            pair.settle()
        wait_until("it is missed", lambda: is_missed(pair))
        address.unlink()
        with Vm(*format_disk(pair)) as vm:
            assert vm.qemu_io(A, "write -q -P 6 2M 64k") == ""
            before = vm.graph()
            address.symlink_to(vm.qmp)  # the keeper may begin at once
            wait_until("it is found", lambda: is_mirrored(pair))
            status = replicates(pair)
            assert status["filter"]["resync_bytes"] >= SIZE
            pair.settle()
            held = pair.images["root"].read_bytes()
            assert held[1 * MIB] == 5
            assert held[2 * MIB] == 6
            assert pair.read_view()["root"] == held
            pair.a.detach(GROUP)
            assert vm.graph() == before


@pytest.mark.parametrize(
    ("build", "device"), [(libvirt_storage, "virtio-disk0"), (plain_drive, "d")]
)
def test_devices_on_other_nodes_are_mirrored_too(
    make_pair: Made, build: Callable[[Path], list[str]], device: str
) -> None:
    pair = make_pair(disks={"root": SIZE})
    with Vm(*build(pair.images["root"])) as vm, kept(pair):
        pair.up_beside()
        before = vm.graph()
        planned = pair.a.attach(GROUP, vm.vm, mode="mirror", dry_run=True)
        assert planned is not None
        assert vm.graph() == before
        done = mirror(pair, vm)
        assert done.commands == planned.commands
        name = f"/machine/peripheral/{device}/virtio-backend"
        assert vm.qemu_io(name, "write -q -P 7 64k 64k") == ""
        assert vm.qemu_io(name, "discard 1M 1M") == ""
        with (  # its monitor has one client at a time, and the keeper is another
            AttachmentFile(pair.a.groups, GROUP).held(),
            pytest.raises(errors.StateError, match="mirrored by"),
        ):
            pair.a.attach(GROUP, vm.vm)
        replicates(pair)
        pair.settle()
        assert pair.read_view()["root"] == pair.images["root"].read_bytes()
        pair.a.detach(GROUP)
        assert vm.graph() == before


class Cut(Exception):
    """The process that attaches ends here."""


@pytest.mark.parametrize("way", ["attach", "detach"])
def test_what_is_cut_off_at_any_command_is_put_right(
    make_pair: Made, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """By the same command, by `detach`, or by the keeper; nothing is lost."""
    pair = make_pair(disks={"root": SIZE})
    do = Mirrored._do
    with Vm(*format_disk(pair)) as vm:
        pair.up_beside()
        load = DeviceLoad(vm, A)
        before = vm.graph()
        cuts = 0
        while True:
            left = cuts

            def do_or_cut(self: Mirrored, command: Any) -> None:
                nonlocal left
                if left == 0:
                    raise Cut
                left -= 1
                do(self, command)

            if way == "detach":
                mirror(pair, vm)
            monkeypatch.setattr(Mirrored, "_do", do_or_cut)
            try:
                if way == "attach":
                    mirror(pair, vm)
                else:
                    pair.a.detach(GROUP)
                cut = False
            except Cut:
                cut = True
            monkeypatch.setattr(Mirrored, "_do", do)
            load.goes_on(3)
            if cut and cuts % 2:
                with kept(pair):
                    replicates(pair)
                load.goes_on(3)
            if cut or way == "attach":
                pair.a.detach(GROUP)
            load.goes_on(3)
            assert vm.graph() == before, cuts
            assert pair.status()["state"] == "offline"
            if not cut:
                break
            cuts += 1
        assert cuts >= 2
        mirror(pair, vm)
        with kept(pair):
            replicates(pair)
            whole(pair, load)
