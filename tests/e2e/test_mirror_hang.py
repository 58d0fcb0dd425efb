"""A filter that hangs while it reads a qcow2 image through its VM: the guest goes on."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from sites import GROUP, MIB, Pair, compare, wait_until
from test_attach import blockdev
from test_mirror import A, hang, kept, mirror, replicates
from vm import DeviceLoad, Vm

pytestmark = pytest.mark.e2e
Made = Callable[..., Pair]

SIZE = 32 * MIB
WAIT_MAX_S = 25.0
"""two looks of the keeper and its attempt to ask the VM are 12 s at most; what a busy machine needs
besides. A keeper that waits as long as a monitor may take needs more than 30."""


def qcow2_vm(pair: Pair, rng: random.Random) -> list[str]:
    pair.scheme = "qcow2"
    raw, image = pair.images["root"].with_suffix(".data"), pair.images["root"]
    raw.write_bytes(rng.randbytes(SIZE))
    image.unlink()
    words = ["convert", "-f", "raw", "-O", "qcow2", str(raw), str(image)]
    subprocess.run(["qemu-img", *words], check=True)
    file = {"driver": "file", "filename": str(image), "node-name": "image-file"}
    return [
        *blockdev(driver="qcow2", **{"node-name": "araw"}, file=file),
        *("-device", "virtio-blk-pci,drive=araw,id=a"),
    ]


def plain(pair: Pair, image: Path) -> bytes:
    out = pair.root / "plain.raw"
    words = ["convert", "-f", "qcow2", "-O", "raw", str(image), str(out)]
    subprocess.run(["qemu-img", *words], check=True)
    return out.read_bytes()


@pytest.mark.parametrize(
    "copying",
    [pytest.param(False, marks=pytest.mark.slow, id="steady"), pytest.param(True, id="copying")],
)
def test_a_filter_that_hangs_over_a_qcow2_image_is_let_go_of(
    make_pair: Made, rng: random.Random, copying: bool
) -> None:
    """`copying`: it hangs in the midst of what it reads through the VM. QEMU may answer nobody
    while it waits; then the filter is ended, which frees it, and its successor goes on."""
    pair = make_pair(disks={"root": SIZE})
    rate = 2 * MIB if copying else 0
    pair.options = msgspec.structs.replace(pair.options, rate_bytes_per_s=rate)
    with Vm(*qcow2_vm(pair, rng)) as vm, kept(pair):
        pair.up_beside()
        load = DeviceLoad(vm, A)
        mirror(pair, vm)
        if copying:
            wait_until("it copies", lambda: pair.status()["filter"]["resync_bytes"] > 4 * MIB)
            assert pair.status()["state"] != "replicating"
        else:
            replicates(pair)
        load.goes_on()
        hung = pair.processes["filter"]
        hang(pair)
        begun, rounds = time.monotonic(), load.rounds
        load.goes_on(2)  # one may have been answered before
        took_s = time.monotonic() - begun
        print(f"{load.rounds - rounds} rounds after {took_s:.1f} s")
        assert took_s < WAIT_MAX_S
        assert vm.alive()
        load.goes_on()
        hung.send_signal(signal.SIGCONT)  # in vain, when it was ended
        if hung.poll() is not None or _dies(hung):
            assert hung.returncode == -signal.SIGKILL
            pair.processes.pop("filter")
            pair.start("filter")
        if copying:
            pair.a.groups.update(
                GROUP,
                options=msgspec.structs.replace(
                    pair.a.groups.load(GROUP).options, rate_bytes_per_s=0
                ),
            )
            pair.kill("filter")
            pair.start("filter")
        load.goes_on()
        replicates(pair)
        load.goes_on()
        load.stop()
        pair.settle()
        recovered = pair.read_view()["root"]
        load.check(recovered)
        pair.a.detach(GROUP)
        vm.monitor.execute("quit")
        vm.process.wait(120)
    compare("root", recovered, plain(pair, pair.images["root"]))


def _dies(process: subprocess.Popen[bytes]) -> bool:
    """Whether it is ended: the VM may have answered that it was cut loose, and too late."""
    try:
        process.wait(4.0)
    except subprocess.TimeoutExpired:
        return False
    return True
