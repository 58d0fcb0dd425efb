"""A block device that is written while its filter is down: it has no times, the kernel counts."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from loop_device import loop_device
from sites import GROUP, MIB, Pair, wait_until

from vrep._core import layout
from vrep.checksum import CHECKSUM_BYTES, checksum32

pytestmark = pytest.mark.e2e

SIZE = 16 * MIB


@contextmanager
def protected(pair: Pair, rng: random.Random) -> Iterator[Path]:
    """The pair's disk is a block device, with something written through the filter."""
    pair.images["root"].write_bytes(rng.randbytes(SIZE))
    with loop_device(pair.images["root"]) as device:
        pair.scheme, pair.images["root"] = "block", device
        try:
            pair.up()
            with pair.client() as client:
                client.write(5 * MIB, rng.randbytes(MIB))
                client.flush()
            pair.settle()
            yield device
        finally:
            pair.kill(*pair.processes)


def becomes_whole(pair: Pair, reason: str) -> None:
    """The filter is started: it says why it believes nothing, and all is compared."""
    pair.cable.cut(down=True)
    pair.start("filter")
    pair.served()
    wait_until("it is noticed", lambda: pair.status()["unverified"] == reason)
    pair.cable.repair()
    pair.settle()
    assert pair.status()["unverified"] == ""
    pair.same_as_source()


def another_boot(pair: Pair) -> None:
    """The state is of an earlier boot of the host than this."""
    path = pair.a.groups.path(GROUP) / "state"
    slots = np.frombuffer(bytearray(path.read_bytes()), layout.STATE)
    for slot in range(len(slots)):
        slots[slot]["boot_id"] = 7
        slots[slot]["checksum"] = checksum32(slots[slot].tobytes()[:-CHECKSUM_BYTES])
    path.write_bytes(slots.tobytes())


def test_what_was_written_after_a_clean_stop_is_noticed(
    make_pair: Callable[..., Pair], rng: random.Random
) -> None:
    """And a stop after which nothing was, costs nothing."""
    pair = make_pair(disks={"root": SIZE})
    with protected(pair, rng) as device:
        for _ in range(2):
            pair.stop("filter")
            device.read_bytes()
            pair.start("filter")
            pair.served()
            status = pair.settle()
            assert (status["unverified"], status["filter"]["opened_as"]) == ("", "clean")
            assert status["filter"]["resync_bytes"] == 0
        pair.stop("filter")
        with device.open("r+b", buffering=0) as file:
            file.seek(3 * MIB)
            file.write(rng.randbytes(65536))
            os.fsync(file.fileno())  # who else has it open may keep it from the device
        becomes_whole(pair, "stamps")


@pytest.mark.parametrize("clean", [True, False], ids=["stopped", "power loss"])
def test_what_was_written_since_the_host_was_booted_is_noticed(
    make_pair: Callable[..., Pair], rng: random.Random, clean: bool
) -> None:
    """Before any filter was there."""
    pair = make_pair(disks={"root": SIZE})
    with protected(pair, rng) as device:
        if clean:
            pair.stop("filter")
        else:
            pair.kill("filter")
            shutil.rmtree(pair.a.paths.shm())
        another_boot(pair)
        with device.open("r+b", buffering=0) as file:
            file.write(rng.randbytes(4096))
            os.fsync(file.fileno())  # as above
        becomes_whole(pair, "stamps" if clean else "past")
