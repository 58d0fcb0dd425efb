"""A VM that mirrors is shut down: its disks are compared as they are, replicated, and can be moved;
and nothing keeps it from starting again."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from sites import GROUP, MIB, WAIT_S, Client, Pair, compare, wait_until
from test_mirror import A, format_disk, is_mirrored, is_missed, kept, mirrored, replicates
from vm import DeviceLoad, Vm

from vrep import errors
from vrep.wire.transport import PeerRefusedError

pytestmark = pytest.mark.e2e
Made = Callable[..., Pair]

SIZE = 16 * MIB


def rests(pair: Pair) -> bool:
    status = pair.status()
    return bool(status["filter"] and status["filter"]["mirror_rests"])


def losses(pair: Pair) -> int:
    """How often a mirror or a rest was interrupted since the filter began."""
    status = wait_until("the filter serves it", lambda: pair.status()["filter"])
    return int(status["mirror_losses"])


def compares(pair: Pair) -> bool:
    return bool(pair.status()["targets"][0]["comparing"])


def off(pair: Pair) -> dict[str, Any]:
    """Until the disks of a VM that is off are at the target, as they are."""
    wait_until("its disks are compared", lambda: rests(pair))
    status = replicates(pair)
    assert "mirror-lost" not in status["conditions"]
    pair.settle()
    return status


def same(pair: Pair) -> None:
    held = pair.images["root"].read_bytes()
    compare("root", pair.read_view()["root"], held)


def test_the_disks_of_a_vm_that_is_off_are_replicated(make_pair: Made, rng: random.Random) -> None:
    """Also when it was killed while it wrote; when a tool writes the disk meanwhile; and when it
    starts again, which no lock hinders."""
    pair = make_pair(disks={"root": SIZE})
    pair.images["root"].write_bytes(rng.randbytes(SIZE))
    address = pair.root / "vm.sock"
    with kept(pair):
        with Vm(*format_disk(pair)) as vm:
            pair.up_beside()
            load = DeviceLoad(vm, A)
            address.symlink_to(vm.qmp)
            mirrored(pair, f"qmp:{address}")
            replicates(pair)
            load.goes_on()
            wait_until("the target can compare", lambda: compares(pair))
            vm.process.kill()
            vm.process.wait(120)
        wait_until("it is missed", lambda: is_missed(pair))
        status = off(pair)
        assert status["filter"]["equal_bytes"] > SIZE // 2  # compared, and not sent
        pair.a.checkpoint(GROUP, "off", wait_s=WAIT_S)
        same(pair)
        before = losses(pair)
        subprocess.run(
            ["qemu-io", "-f", "raw", "-c", "write -q -P 9 3M 64k", str(pair.images["root"])],
            check=True,
        )
        wait_until("it is noticed", lambda: losses(pair) > before)
        off(pair)
        same(pair)
        pair.kill("filter")
        pair.start("filter")
        off(pair)
        address.unlink()
        with Vm(*format_disk(pair)) as vm:
            assert vm.qemu_io(A, "write -q -P 6 2M 64k") == ""
            address.symlink_to(vm.qmp)
            wait_until("it is found", lambda: is_mirrored(pair))
            load = DeviceLoad(vm, A)
            replicates(pair)
            assert not rests(pair)
            load.goes_on()
            load.stop()
            pair.settle()
            same(pair)
            load.check(pair.images["root"].read_bytes())


def test_a_group_that_is_mirrored_is_moved_once_its_vm_is_off(make_pair: Made) -> None:
    pair = make_pair(disks={"root": SIZE})
    with Vm(*format_disk(pair)) as vm:
        pair.up_beside()
        with kept(pair):
            mirrored(pair, vm.vm)
            replicates(pair)
        pair.settle()
        for pause in (False, True):
            with pytest.raises(
                (errors.VrepError, PeerRefusedError), match="writes its disks itself"
            ):
                pair.b.move(GROUP, pause=pause)
        assert vm.qemu_io(A, "write -q -P 6 2M 64k") == ""
        assert pair.status()["conditions"] == []
    held = pair.images["root"].read_bytes()
    assert held[2 * MIB] == 6
    wait_until("it is missed", lambda: is_missed(pair))
    with pytest.raises(errors.VrepError):
        pair.b.move(GROUP)  # before the keeper looks: what it wrote last may be missing
    with kept(pair):
        off(pair)
        view = pair.b.move(GROUP)
        with Client(view.disks[0].uri, 60.0) as client:
            compare("root", client.read_all(), held)
        wait_until("it is replaced", lambda: "fenced" in pair.status()["conditions"])
        assert pair.images["root"].read_bytes() == held
