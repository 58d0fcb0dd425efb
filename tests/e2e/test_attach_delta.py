"""What a VM's life costs: reboot, stop, start, a killed QEMU, detach and attach, an upgrade of the
filter. Each sends what differs, and nothing else, in-line and in mirror mode; and so does the disk
of a VM that is off, or that ran without the filter."""

from __future__ import annotations

import contextlib
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from sites import GROUP, MIB, WAIT_S, Pair, bytes_sent, compare, counted, wait_until
from test_attach import blockdev, raw_over_file
from test_mirror import kept
from vm import Vm

from vrep import errors
from vrep._core import layout

pytestmark = pytest.mark.e2e
Made = Callable[..., Pair]

BLOCK = 4096
SIZE = 24 * MIB
UNITS = 60
FEW = 16384
"""bytes that do not grow with what is written: streams, gaps, marks"""
DEVICE = "/machine/peripheral/a/virtio-backend"
VIRTIO = "-device virtio-blk-pci,drive=araw,id=a"


class Life:
    """One disk of a VM, and what was sent for it. Every unit that is written is written whole, with
    bytes that no compression makes smaller."""

    def __init__(self, pair: Pair, rng: random.Random, form: str) -> None:
        self.pair = pair
        self.rng = rng
        self.form = form
        self.image = pair.images["root"]
        self.image.write_bytes(rng.randbytes(SIZE))
        if form == "qcow2":
            pair.scheme = form
            plain = self.image.rename(pair.root / "plain")
            convert(plain, "raw", self.image, form)
        self.where = pair.root / "vm.sock"
        """the monitor of whichever VM runs"""
        self._noise = pair.root / "noise"

    @contextlib.contextmanager
    def vm(self, *arguments: str, found: bool = True) -> Iterator[Vm]:
        with Vm(*arguments) as vm:
            if found:
                self.find(vm)
            try:
                yield vm
            finally:
                self.where.unlink(missing_ok=True)

    def find(self, vm: Vm) -> None:
        """Who looks for the VM finds it from now on."""
        self.where.symlink_to(vm.qmp)

    @property
    def address(self) -> str:
        return f"qmp:{self.where}"

    def on_image(self) -> list[str]:
        if self.form == "raw":
            return raw_over_file(self.image, VIRTIO)
        file = {"driver": "file", "filename": str(self.image), "node-name": "image-file"}
        return [*blockdev(driver="qcow2", **{"node-name": "araw"}, file=file), *VIRTIO.split()]

    def content(self) -> bytes:
        """What the guest has on its disk; its last flush has ended."""
        if self.form == "raw":
            return self.image.read_bytes()
        plain = self.pair.root / "plain"
        convert(self.image, self.form, plain, "raw")
        return plain.read_bytes()

    def on_filter(self) -> list[str]:
        server = {"type": "unix", "path": str(self.pair.a.paths.nbd_socket(GROUP))}
        below = {"driver": "nbd", "server": server, "export": "root", "reconnect-delay": 60}
        return [*blockdev(driver="raw", **{"node-name": "araw"}, file=below), *VIRTIO.split()]

    def write(self, vm: Vm, units: int = UNITS) -> int:
        """Through the device; how many bytes."""
        chosen = self.rng.sample(range(SIZE // BLOCK), units)
        for unit in chosen:
            self._noise.write_bytes(self.rng.randbytes(BLOCK))
            assert vm.qemu_io(DEVICE, f"write -q -s {self._noise} {unit * BLOCK} {BLOCK}") == ""
        assert vm.qemu_io(DEVICE, "flush") == ""
        return units * BLOCK

    @contextlib.contextmanager
    def sends(self, written: list[int]) -> Iterator[None]:
        """When it is over and all is durable, no more was sent than what was written in it. What is
        written while a disk is compared may travel twice, as its record and as a block."""
        before = counted(self.pair)
        yield
        self.pair.settle()
        sent, wanted = bytes_sent(self.pair) - before, sum(written)
        print(f"written {wanted}, sent {sent}")
        assert sent <= wanted * 1.05 + FEW
        assert self.pair.status()["unverified"] == ""
        compare("root", self.pair.read_view()["root"], self.content())

    def on_its_way(self) -> int:
        """What the target has not said yet that it holds, at most; it is sent again when the
        session ends now. Each unit is a record."""
        target = self.pair.status()["targets"][0]
        return int(target["seq"] - target["durable_seq"]) * BLOCK

    def replicates(self) -> None:
        """All that was written so far is durable."""
        self.pair.settle()

    def upgrade(self) -> None:
        """Another filter takes the place of the one that runs."""
        self.pair.stop("filter")
        self.pair.start("filter")
        wait_until("the filter runs", lambda: self.pair.a.running("filter"))


def convert(image: Path, form: str, other: Path, into: str) -> None:
    """By QEMU, also of an image that a VM has open."""
    words = ["qemu-img", "convert", "-U", "-f", form, "-O", into, str(image), str(other)]
    subprocess.run(words, check=True)


@pytest.fixture
def life(make_pair: Made, rng: random.Random, request: pytest.FixtureRequest) -> Life:
    form = getattr(request, "param", "raw")
    return Life(make_pair(disks={"root": SIZE}, compression=0), rng, form)


def end(vm: Vm, way: str) -> None:
    """The VM ends, in order or by kill -9."""
    if way == "quit":
        vm.monitor.execute("quit")
        vm.process.wait(WAIT_S)


def test_in_line_every_event_of_a_vm_is_a_delta(life: Life) -> None:
    pair = life.pair
    with life.vm(*life.on_image()) as vm:
        pair.up_beside()
        pair.a.attach(GROUP, life.address)
        pair.settle()
        with life.sends(written := []):  # a reboot
            written.append(life.write(vm))
            vm.monitor.execute("system_reset")
            written.append(life.write(vm))
        with life.sends(written := []):  # a filter is upgraded in place
            written.append(life.write(vm))
            written.append(life.on_its_way())
            life.upgrade()
            written.append(life.write(vm))
        assert pair.status()["filter"]["opened_as"] == "clean"
        assert pair.status()["filter"]["resync_bytes"] == 0
        with life.sends(written := []):  # detach, and attach again
            written.append(life.write(vm))
            pair.a.detach(GROUP)
            written.append(life.write(vm))
            pair.a.attach(GROUP, life.address)
            life.replicates()
            written.append(life.write(vm))
        assert pair.status()["filter"]["opened_as"] == "unexplained"
        gaps = pair.status()["filter"]["gaps"]
    for way in ("quit", "kill"):  # it ends, and starts on the filter's socket
        with life.sends(written := []), life.vm(*life.on_filter()) as vm:
            written.append(life.write(vm))
            end(vm, way)
    status = pair.status()["filter"]
    assert (status["gaps"], status["opened_as"]) == (gaps, "unexplained")


@pytest.mark.parametrize("life", ["raw", "qcow2"], indirect=True)
def test_in_mirror_mode_every_event_of_a_vm_is_a_delta(life: Life) -> None:
    pair = life.pair
    with kept(pair):
        with life.vm(*life.on_image()) as vm:
            pair.up_beside()
            pair.a.attach(GROUP, life.address, mode="mirror")
            life.replicates()
            with life.sends(written := []):  # a reboot
                written.append(life.write(vm))
                vm.monitor.execute("system_reset")
                written.append(life.write(vm))
            assert pair.status()["filter"]["gaps"] == 0
            with life.sends(written := []):  # a filter is upgraded in place
                written.append(life.write(vm))
                written.append(life.on_its_way())
                pair.stop("filter")
                written.append(life.write(vm))
                pair.start("filter")
                life.replicates()
                written.append(life.write(vm))
            assert pair.status()["filter"]["resync_bytes"] < SIZE // 2
            with life.sends(written := []):  # detach, and attach again
                pair.a.detach(GROUP)
                written.append(life.write(vm))
                pair.a.attach(GROUP, life.address, mode="mirror")
                life.replicates()
                written.append(life.write(vm))
        for way in ("quit", "kill"):  # it ends, and starts on its image
            with life.vm(*life.on_image(), found=False) as vm:
                # Not before it runs: one that is off is missed for a moment only, until its image
                # rests and is compared.
                wait_until("it is missed", lambda: "mirror-lost" in pair.status()["conditions"])
                with life.sends(written := []):
                    written.append(life.write(vm))
                    life.find(vm)
                    life.replicates()
                    written.append(life.write(vm))
                end(vm, way)


def past(pair: Pair) -> bool:
    """Whether the durable state says that a VM may write without the filter."""
    state = (pair.a.groups.path(GROUP) / "state").read_bytes()
    slots = np.frombuffer(state, layout.STATE)
    return bool(slots[np.argmax(slots["counter"])]["flags"] & layout.STATE_PAST)


def test_the_disk_of_a_vm_that_is_off_is_synced_and_then_its_vm_starts(life: Life) -> None:
    """On the filter's socket; then without the filter, which is `unverified`; then mirrored."""
    pair = life.pair
    pair.up()  # nobody has the image open: it is synced at once
    pair.same_as_source()
    with life.sends(written := []), life.vm(*life.on_filter()) as vm:
        written.append(life.write(vm))
    assert pair.status()["filter"]["resync_bytes"] == SIZE  # the first sync, nothing since

    words = ["qemu-io", "-f", "raw", "-c", "write 0 512", str(life.image)]
    refused = subprocess.run(words, capture_output=True, text=True, check=False)
    assert 'Failed to get "write" lock' in refused.stderr  # as a VM would be
    pair.stop("filter")
    with life.sends(written := []):
        with life.vm(*life.on_image()) as vm:
            written.append(life.write(vm))
            pair.start("filter")  # and waits for the image
            wait_until("it runs", lambda: pair.a.running("filter"))
            with pytest.raises(errors.LockedError):
                pair.a.wait_served(GROUP, 0.1)
            written.append(life.write(vm))
            pair.cable.cut(down=True)  # or all may be compared before anybody looks
        wait_until("it is noticed", lambda: pair.status()["unverified"])
        pair.cable.repair()
    assert pair.status()["filter"]["opened_as"] == "unexplained"

    pair.kill("filter")  # its memory is whole, and knows nothing of what a VM writes now
    with life.sends(written := []):
        with life.vm(*life.on_image()) as vm:
            pair.start("filter")
            written.append(life.write(vm))
            wait_until("it is stored", lambda: past(pair))
            pair.kill("filter")
        pair.cable.cut(down=True)  # as above
        pair.start("filter")
        wait_until("it is noticed", lambda: pair.status()["unverified"] == "past")
        pair.cable.repair()

    pair.a.detach(GROUP)
    with kept(pair), life.vm(*life.on_image()) as vm, life.sends(written := []):
        written.append(life.write(vm))
        pair.a.attach(GROUP, life.address, mode="mirror")
        life.replicates()
        written.append(life.write(vm))
