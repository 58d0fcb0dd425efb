"""The disks of a VM that mirrors and is off are compared whatever they are: a block device, a qcow2
image with one below it; and storage that hangs stops nobody."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from loop_device import loop_device
from sites import GROUP, MIB, Pair, compare, wait_until
from test_attach import blockdev
from test_mirror import A, is_mirrored, is_missed, kept, mirror, mirrored, replicates
from test_mirror_off import compares, losses, off, rests
from test_mirror_qcow2 import content, pair, qcow2, tool  # noqa: F401 - a fixture
from vm import Vm

from vrep import errors
from vrep.control import ControlClient

pytestmark = pytest.mark.e2e
Made = Callable[..., Pair]

SIZE = 16 * MIB
NOTICED_S = 20.0
"""a second, and what a busy machine needs; the kernel writes a page by itself after 30 s"""


def missed(pair: Pair) -> None:  # noqa: F811
    wait_until("it is missed", lambda: is_missed(pair))


def noticed(pair: Pair, before: int) -> None:  # noqa: F811
    """That its disks are in use; its losses count on, and that they do not rest soon passes."""
    wait_until("it is noticed", lambda: losses(pair) > before, NOTICED_S)


def view(pair: Pair) -> bytes:  # noqa: F811
    return pair.read_view()["root"]


# ---- a block device ------------------------------------------------------------------


def host_device(path: Path) -> list[str]:
    file = {"driver": "host_device", "filename": str(path)}
    return [
        *blockdev(driver="raw", **{"node-name": "araw"}, file=file),
        *("-device", "virtio-blk-pci,drive=araw,id=a"),
    ]


def test_a_block_device_is_compared_while_its_vm_is_off(
    make_pair: Made, rng: random.Random
) -> None:
    """And what is written to it then, through whatever name, is noticed by the kernel's counts."""
    made = make_pair(disks={"root": SIZE})
    made.images["root"].write_bytes(rng.randbytes(SIZE))
    with loop_device(made.images["root"]) as device:
        made.scheme, made.images["root"] = "block", device
        address = made.root / "vm.sock"
        with kept(made):
            with Vm(*host_device(device)) as vm:
                made.up_beside()
                address.symlink_to(vm.qmp)
                mirrored(made, f"qmp:{address}")
                replicates(made)
                wait_until("the target can compare", lambda: compares(made))
                assert vm.qemu_io(A, "write -q -P 6 2M 64k") == ""
                vm.process.kill()
                vm.process.wait(120)
            missed(made)
            status = off(made)
            assert status["filter"]["equal_bytes"] > SIZE // 2
            held = device.read_bytes()
            assert held[2 * MIB] == 6
            compare("root", view(made), held)

            before = losses(made)
            with device.open("r+b", buffering=0) as file:  # no lock: a tool, in the page cache
                file.seek(3 * MIB)
                file.write(b"\x09" * 4096)
                noticed(made, before)
            off(made)
            compare("root", view(made), device.read_bytes())

            address.unlink()  # its monitor is somewhere else, and it writes nothing: its locks tell
            before = losses(made)
            with Vm(*host_device(device)) as vm:
                noticed(made, before)
                time.sleep(6)
                assert not rests(made)
                assert "mirror-lost" in made.status()["conditions"]
            off(made)


# ---- qcow2 ---------------------------------------------------------------------------


def readers(where: Path) -> list[int]:
    """Processes that read images of this test."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if words.startswith(b"qemu-storage-daemon\0") and str(where).encode() in words:
                found.append(int(entry.name))
    return found


def test_a_qcow2_image_is_compared_while_its_vm_is_off(pair: Pair) -> None:  # noqa: F811
    """As a guest would see it; nothing is in the VM's way when it starts; and its reader ends."""
    address = pair.root / "vm.sock"
    with kept(pair):
        with Vm(*qcow2(pair)) as vm:
            pair.up_beside()
            address.symlink_to(vm.qmp)
            mirrored(pair, f"qmp:{address}")
            replicates(pair)
            assert vm.qemu_io(A, "write -q -P 6 2M 64k") == ""
            vm.monitor.execute("quit")
            vm.process.wait(120)
        missed(pair)
        off(pair)
        assert "mirror-lost" not in pair.status()["conditions"]
        (reader,) = readers(pair.root)
        held = content(pair)
        assert held[2 * MIB] == 6
        compare("root", view(pair), held)
        image = pair.images["root"]
        magic = image.read_bytes()[:4]

        os.kill(reader, signal.SIGKILL)  # another takes its place, and nothing is compared again
        wait_until("it is read again", lambda: readers(pair.root) not in ([], [reader]))
        assert rests(pair)

        for path, kind in ((image, "qcow2"), (pair.root / "base.raw", "raw")):
            before = losses(pair)
            words = ["qemu-io", "-f", kind, "-c", "write -q -P 9 9M 64k", str(path)]
            subprocess.run(words, check=True)
            noticed(pair, before)
            off(pair)
            compare("root", view(pair), content(pair))
        assert image.read_bytes()[:4] == magic

        address.unlink()
        before = losses(pair)
        with Vm(*qcow2(pair)) as vm:
            assert vm.qemu_io(A, "write -q -P 8 4M 64k") == ""
            noticed(pair, before)
            time.sleep(6)
            assert not rests(pair)  # by its locks, though it writes nothing
            address.symlink_to(vm.qmp)
            wait_until("it is found", lambda: is_mirrored(pair))
            replicates(pair)
            assert not rests(pair)
            wait_until("its reader has ended", lambda: readers(pair.root) == [], NOTICED_S)
            assert vm.qemu_io(A, "write -q -P 5 6M 64k") == ""
            pair.settle()
            found = view(pair)
            assert (found[4 * MIB], found[6 * MIB]) == (8, 5)
            vm.monitor.execute("quit")
            vm.process.wait(120)
        missed(pair)
        off(pair)
        compare("root", view(pair), content(pair))
        assert len(readers(pair.root)) == 1
    wait_until("it ends with who began it", lambda: readers(pair.root) == [], 60)


def test_an_image_of_another_size_is_told(pair: Pair) -> None:  # noqa: F811
    from vrep.hypervisor.rest import consists_of

    pair.start("target")
    pair.join()
    pair.make_key()
    pair.protect()
    (disk,) = pair.a.groups.load(GROUP).disks
    parts = consists_of(disk)
    assert parts == [(0, str(pair.images["root"])), (0, str(pair.root / "base.raw"))]
    tool("resize", "-q", "-f", "qcow2", pair.images["root"], "+1M")
    with pytest.raises(errors.StateError, match="in the group"):
        consists_of(disk)
    pair.images["root"].write_bytes(b"nonsense" * 512)
    with pytest.raises(errors.HypervisorError, match="qcow2"):
        consists_of(disk)


# ---- storage that hangs ---------------------------------------------------------------


@contextmanager
def slow_storage(image: Path, where: Path) -> Iterator[tuple[Path, int]]:
    """The image as a file of a filesystem that a process serves, which can be stopped."""
    if shutil.which("nbdfuse") is None or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("no nbdfuse, or no FUSE here")
    where.touch()
    command = ["nbdfuse", str(where), "--command", "nbdkit", "-s", "--exit-with-parent", "file"]
    process = subprocess.Popen([*command, str(image)], stderr=subprocess.PIPE)
    try:
        wait_until("it is mounted", lambda: where.stat().st_size == SIZE or process.poll(), 60)
        if process.poll() is not None:
            assert process.stderr is not None
            pytest.skip(f"no FUSE here: {process.stderr.read().decode().strip()}")
        yield where, process.pid
    finally:
        process.send_signal(signal.SIGCONT)
        subprocess.run(["fusermount3", "-u", str(where)], check=False, capture_output=True)
        process.terminate()
        process.wait(30)
        assert process.stderr is not None
        process.stderr.close()


def test_storage_that_hangs_stops_no_loop(make_pair: Made) -> None:
    """The filter answers within its usual time, says that the disks are not replicated any more,
    and goes on when they answer again."""
    made = make_pair(disks={"root": SIZE})
    with slow_storage(made.images["root"], made.root / "slow.raw") as (image, server):
        plain, made.images["root"] = made.images["root"], image
        with kept(made):
            with Vm(*raw(image)) as vm:
                made.up_beside()
                mirror(made, vm)
                replicates(made)
            off(made)
            control = ControlClient(made.a.paths.socket("filter"), timeout=10.0)
            pid = control.call("ping")["pid"]
            os.kill(server, signal.SIGSTOP)
            slowest, ends = 0.0, time.monotonic() + 60
            while control.call("status", group=GROUP)["mirror_rests"]:
                begun = time.monotonic()
                control.call("status", group=GROUP)
                slowest = max(slowest, time.monotonic() - begun)
                assert time.monotonic() < ends
                time.sleep(0.05)
            for _again in range(60):  # also while the keeper tries
                begun = time.monotonic()
                control.call("status", group=GROUP)
                slowest = max(slowest, time.monotonic() - begun)
                time.sleep(0.05)
            print(f"the slowest answer took {slowest * 1000:.0f} ms")
            assert slowest < 0.8
            assert "mirror-lost" in made.status()["conditions"]
            os.kill(server, signal.SIGCONT)
            off(made)
            assert control.call("ping")["pid"] == pid  # the keeper did not end it
            compare("root", view(made), plain.read_bytes())
        made.stop("filter")


def raw(path: Path) -> list[Any]:
    file = {"driver": "file", "filename": str(path)}
    return [
        *blockdev(driver="raw", **{"node-name": "araw"}, file=file),
        *("-device", "virtio-blk-pci,drive=araw,id=a"),
    ]
