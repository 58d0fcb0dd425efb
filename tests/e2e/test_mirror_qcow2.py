"""A qcow2 image is replicated as its guest sees it, read through the VM that has it open."""

from __future__ import annotations

import random
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sites import GROUP, KEY, MIB, Pair, compare, wait_until
from test_attach import blockdev
from test_mirror import A, kept, mirror, replicates
from vm import DeviceLoad, Vm

from vrep import errors

pytestmark = pytest.mark.e2e
Made = Callable[..., Pair]

SIZE = 32 * MIB
LOADED = 8 * MIB
"""of which `DeviceLoad` writes no more than this"""


@pytest.fixture
def pair(make_pair: Made, rng: random.Random) -> Pair:
    """Its image keeps some blocks, and finds others in a raw image below."""
    pair = make_pair(disks={"root": SIZE})
    pair.scheme = "qcow2"
    base = pair.root / "base.raw"
    base.write_bytes(rng.randbytes(SIZE // 2) + bytes(SIZE // 2))
    image = pair.images["root"]
    image.unlink()
    tool("create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, image)
    words = ["qemu-io", "-f", "qcow2", "-c", "write -q -P 7 5M 3M", str(image)]
    subprocess.run(words, check=True)
    return pair


def tool(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, words)], check=True)


def qcow2(pair: Pair, *more: str) -> list[str]:
    file = {"driver": "file", "filename": str(pair.images["root"]), "node-name": "image-file"}
    return [
        *blockdev(driver="qcow2", **{"node-name": "araw"}, file=file),
        *("-device", "virtio-blk-pci,drive=araw,id=a"),
        *more,
    ]


def content(pair: Pair) -> bytes:
    """What a guest sees of the image, which nobody has open."""
    plain = pair.root / "plain.raw"
    tool("convert", "-f", "qcow2", "-O", "raw", pair.images["root"], plain)
    return plain.read_bytes()


def drain(vm: Vm, ending: threading.Event, took: list[float]) -> None:
    """What waits for every write that is under way, and lets QEMU answer nobody meanwhile."""
    while not ending.wait(0.002):
        begun = time.monotonic()
        vm.monitor.execute("transaction", {"actions": []})
        took.append(time.monotonic() - begun)


def test_what_the_guest_sees_is_replicated_under_load(pair: Pair) -> None:
    """While QEMU drains its disks all the time; through a kill of the filter; and detach leaves
    the VM as it was."""
    pair.options = msgspec.structs.replace(pair.options, rate_bytes_per_s=8 * MIB)
    with Vm(*qcow2(pair)) as vm, kept(pair):
        pair.up_beside()
        before = shape(vm.graph())
        load = DeviceLoad(vm, A)
        load.goes_on()
        planned = pair.a.attach(GROUP, vm.vm, mode="mirror", dry_run=True)
        assert planned is not None
        assert shape(vm.graph()) == before
        done = mirror(pair, vm)
        assert done.commands == planned.commands
        ending, took = threading.Event(), []
        draining = threading.Thread(target=drain, args=(vm, ending, took))
        draining.start()
        replicates(pair)
        load.goes_on()
        wait_until("it is drained often", lambda: len(took) > 20 or not draining.is_alive())
        ending.set()
        draining.join(60)
        print(f"{len(took)} drains, the slowest {max(took) * 1000:.0f} ms")
        assert len(took) > 20
        assert max(took) < 2  # nothing waited for anything that only QEMU could answer
        assert pair.status()["conditions"] == []
        pair.kill("filter")
        load.goes_on()
        pair.start("filter")
        status = replicates(pair)
        assert status["filter"]["opened_as"] == "killed"
        assert 0 < status["filter"]["resync_bytes"] <= LOADED
        load.goes_on()
        load.stop()
        pair.settle()
        recovered = pair.read_view()["root"]
        load.check(recovered)
        pair.a.detach(GROUP)
        assert shape(vm.graph()) == before
        assert not vm.monitor.execute("query-block-exports")
        vm.monitor.execute("quit")
        vm.process.wait(120)
    compare("root", recovered, content(pair))


def shape(graph: dict[str, Any]) -> dict[str, Any]:
    """Without the size of the file, which grows."""
    for node in graph["nodes"]:
        if node["drv"] == "file":
            del node["image"]["virtual-size"]
    return graph


def refused(pair: Pair, vm: Vm, match: str, **options: Any) -> None:
    before = vm.graph()
    with pytest.raises(errors.UnsupportedError, match=match):
        pair.a.attach(GROUP, vm.vm, **options)
    assert shape(vm.graph()) == shape(before)
    assert vm.alive()
    assert not (pair.a.groups.path(GROUP) / "attached.json").exists()


def test_what_cannot_be_read_through_a_vm_is_refused(pair: Pair) -> None:
    """And left as it was; then, when nothing is in the way, it is attached."""
    pair.start("target")
    pair.join()
    pair.make_key()
    disks, fronts = {"root": f"qcow2:{pair.images['root']}"}, {"root": "vhost-user-blk"}
    with pytest.raises(errors.UnsupportedError, match="no other front-end"):
        pair.a.protect("other", disks, to="beta", key=KEY, fronts=fronts)
    with Vm(*qcow2(pair)) as vm:
        pair.protect()
        pair.start("filter", "source")
        wait_until("the filter runs", lambda: pair.a.running("filter"))
        with pytest.raises(errors.DetachedError, match="--mode mirror"):
            pair.a.wait_served(GROUP, 0.5)
        refused(pair, vm, "only mirror mode")
        where = {"type": "unix", "data": {"path": str(vm.root / "nbd")}}
        vm.monitor.execute("nbd-server-start", {"addr": where})
        refused(pair, vm, "NBD server, which is used", mode="mirror")
        assert not vm.monitor.execute("query-block-exports")
        vm.monitor.execute("nbd-server-stop")
        with kept(pair):
            mirror(pair, vm)
            replicates(pair)
            pair.a.detach(GROUP)
        with pytest.raises(errors.UnsupportedError, match="qemu-img convert"):
            pair.a.export_untaken(GROUP, pair.root / "out")
    io = ["-object", "iothread,id=io", "-device", "virtio-blk-pci,drive=araw,id=a,iothread=io"]
    with Vm(*qcow2(pair)[:2], *io) as vm:
        refused(pair, vm, "I/O threads", mode="mirror")
