"""A protected disk gets another size: in the order of its writes, under a VM, through kills."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from sites import GROUP, MIB, WAIT_S, Pair, wait_until
from vm import BLOCK, Vm, Writer

from vrep import errors

pytestmark = pytest.mark.e2e
Made = Callable[..., Pair]


def exported(pair: Pair, at: str) -> bytes:
    result = pair.b.export(GROUP, pair.root / f"out-{at}", at=at)
    assert result.verdict.whole
    return Path(result.disks[0].path).read_bytes()


def test_points_keep_their_size_and_new_space_reads_zero(make_pair: Made) -> None:
    pair = make_pair(disks={"root": 8 * MIB}).up()
    image = pair.images["root"]
    wanted = {}

    def mark(label: str) -> None:
        pair.a.checkpoint(GROUP, label, wait_s=WAIT_S)
        wanted[label] = image.read_bytes()

    with pair.client() as client:
        client.write(0, os.urandom(8 * MIB))
    mark("full")
    assert pair.a.resize(GROUP, "root", 8 * MIB) == {"bytes": 8 * MIB, "changed": False}
    with pytest.raises(errors.InvalidError, match="--shrink"):
        pair.a.resize(GROUP, "root", 4 * MIB)
    for wrong in (3 * MIB + 100, 1 << 60):
        with pytest.raises(errors.InvalidError):
            pair.a.resize(GROUP, "root", wrong)
    with pytest.raises(errors.NotFoundError, match="root"):
        pair.a.resize(GROUP, "data", 4 * MIB)
    assert image.stat().st_size == 8 * MIB

    pair.a.resize(GROUP, "root", 3 * MIB + 512, shrink=True)
    mark("small")
    with pair.client() as client:
        assert client.bytes == 3 * MIB + 512
        with pytest.raises(errors.StorageError, match="at offset"):
            client.write(4 * MIB, b"x" * 512)
    pair.a.resize(GROUP, "root", 12 * MIB)
    mark("large")
    with pair.client() as client:
        assert client.bytes == 12 * MIB
        client.write(10 * MIB, b"y" * 4096)
    mark("written")
    assert wanted["large"][3 * MIB + 512 :] == bytes(9 * MIB - 512)

    pair.kill("filter")  # what is in the ring is shipped by the next one
    pair.start("filter")
    pair.served()
    pair.settle()
    assert pair.status()["filter"]["gaps"] == 0  # no point was lost on the way
    assert pair.status()["disks"][0]["size"] == 12 * MIB
    assert pair.stored()["disks"][0]["size"] == 12 * MIB
    for label, content in wanted.items():
        assert exported(pair, label) == content, label
        assert pair.read_view(label)["root"] == content, label
    assert [len(gap) for gap in [pair.b.points(GROUP).gaps]] == [1]  # the first sync
    report = pair.b.verify(GROUP, "full")
    assert report.result == "good"
    changes = pair.b.changes(GROUP, "small", "large").disks[0]
    assert changes.bytes == 12 * MIB
    assert changes.extents[-1].offset + changes.extents[-1].length == 12 * MIB

    with image.open("ab") as file:  # its operator made it larger
        file.truncate(16 * MIB)
    assert pair.a.resize(GROUP, "root")["bytes"] == 16 * MIB
    pair.settle()
    pair.same_as_source()


def test_a_resize_that_no_target_heard_of_is_made_good(make_pair: Made) -> None:
    """Longhorn's "replica of the wrong size after a failed resize": the record is lost with the
    ring, and the resync tells the size again."""
    pair = make_pair(disks={"root": 8 * MIB}).up()
    with pair.client() as client:
        client.write(0, os.urandom(8 * MIB))
    pair.settle()
    pair.cable.cut(down=True)
    pair.a.resize(GROUP, "root", 2 * MIB, shrink=True)
    pair.a.resize(GROUP, "root", 10 * MIB)
    pair.kill("filter", "source")
    for path in pair.a.paths.shm().glob("*/*"):
        path.unlink()  # as after a power loss
    pair.cable.repair()
    pair.start("filter", "source")
    pair.served()
    pair.settle()
    assert pair.stored()["disks"][0]["size"] == 10 * MIB
    pair.same_as_source()
    assert exported(pair, "latest") == pair.images["root"].read_bytes()


def test_a_filter_that_is_killed_within_a_resize_goes_on(
    make_pair: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair(disks={"root": 8 * MIB}).up()
    with pair.client() as client:
        client.write(0, os.urandom(8 * MIB))
    mark = pair.images["root"].read_bytes()
    pair.a.checkpoint(GROUP, "before", wait_s=WAIT_S)
    for number, point in enumerate(("resize.after_backing", "resize.after_record")):
        pair.stop("filter")
        monkeypatch.setenv("VREP_FAULT", f"{point}:1:kill")
        pair.start("filter")
        monkeypatch.delenv("VREP_FAULT")
        pair.served()
        with pytest.raises(errors.VrepError):
            pair.a.resize(GROUP, "root", (10 + number) * MIB)
        assert pair.processes.pop("filter").wait(60) < 0
        pair.start("filter")
        pair.served()
        assert pair.a.groups.load(GROUP).disks[0].bytes == (10 + number) * MIB
        assert pair.a.groups.load(GROUP).resizing == {}
        assert pair.status()["filter"]["gap"] is False
        pair.settle()
        pair.same_as_source()
    assert exported(pair, "before") == mark


def test_a_running_vm_learns_the_size_by_block_resize(make_pair: Made) -> None:
    """Under load: a pause for the guest, no error, and its device has the size."""
    # The writer does not wait: a ring that outlasts a source or target that stalls for seconds.
    pair = make_pair(disks={"root": 16 * MIB}, ring_bytes=256 * MIB)
    node = json.dumps({"driver": "file", "node-name": "f", "filename": str(pair.images["root"])})
    with Vm(
        "-blockdev", node, "-blockdev", '{"driver":"raw","node-name":"araw","file":"f"}',
        "-device", "virtio-blk-pci,drive=araw,id=a,share-rw=on",
    ) as vm:  # fmt: skip
        pair.up_beside()
        assert pair.a.attach(GROUP, vm.vm) is not None
        wait_until("the sync ends", lambda: pair.status()["state"] == "replicating")
        writer = Writer(vm.export("araw", "load"), 0, 16 * MIB // BLOCK, 1)
        writer.goes_on(timeout_s=WAIT_S)
        pair.a.checkpoint(GROUP, "before", wait_s=WAIT_S)
        writer.latest_ms = 0.0
        pair.a.resize(GROUP, "root", 24 * MIB)
        writer.goes_on(timeout_s=WAIT_S)
        print(f"resize: slowest write {writer.latest_ms:.1f} ms")
        writer.stop()
        # QEMU resizes no node that it exports; a device does not mind.
        vm.monitor.execute("block-export-del", {"id": "load", "mode": "hard"})
        wait_until("no export", lambda: not vm.monitor.execute("query-block-exports"))
        vm.monitor.execute("block_resize", {"node-name": "araw", "size": 24 * MIB})
        sizes = {n["node-name"]: n["image"]["virtual-size"]
                 for n in vm.monitor.execute("query-named-block-nodes")}  # fmt: skip
        assert sizes["araw"] == 24 * MIB
        tail = vm.export("araw", "tail")
        done = subprocess.run(
            ["qemu-io", "-f", "raw", "-c", "read -P 0 16M 8M", "-c", "write -P 9 23M 1M", tail],
            capture_output=True, text=True, timeout=WAIT_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert "verification failed" not in done.stdout
        pair.settle()
        assert pair.status()["filter"]["gaps"] == 0
        held = pair.images["root"].read_bytes()
        writer.check(held)
        assert len(held) == 24 * MIB
        assert pair.read_view()["root"] == held
        assert len(pair.read_view("before")["root"]) == 16 * MIB
        pair.a.resize(GROUP, "root", 16 * MIB, shrink=True)
        vm.monitor.execute("block-export-del", {"id": "tail", "mode": "hard"})
        wait_until("no export", lambda: not vm.monitor.execute("query-block-exports"))
        # A VM that is idle connects again by its next request, and only then knows the size.
        vm.qemu_io("araw", "read 0 512")
        vm.monitor.execute("block_resize", {"node-name": "araw", "size": 16 * MIB})
        pair.a.detach(GROUP)
        assert vm.alive()
