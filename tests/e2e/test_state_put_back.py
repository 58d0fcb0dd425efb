"""A clean state of the filter that is older than the target: what the error says to do is done."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sites import GROUP, MIB, Pair, wait_until

from vrep._core import layout
from vrep.checksum import CHECKSUM_BYTES, checksum32

pytestmark = pytest.mark.e2e

SLOT = layout.STATE.itemsize


def slots(file: Path) -> list[np.ndarray]:
    data = file.read_bytes()
    return [np.frombuffer(data, layout.STATE, 1, at).copy() for at in range(0, len(data), SLOT)]


def put_back(file: Path, seq: int) -> None:
    """The state says of each disk what it said, and of the order that it ends at a seq."""
    found = slots(file)
    for slot in found:
        if slot["magic"][0] == layout.STATE_MAGIC:
            slot["seq_limit"] = slot["durable_seq"] = seq
            slot["checksum"] = checksum32(slot.tobytes()[:-CHECKSUM_BYTES])
    file.write_bytes(b"".join(slot.tobytes() for slot in found))


@pytest.mark.parametrize("ended", ["stopped", "killed", "rebooted"])
def test_a_state_that_is_older_than_the_target_is_emptied(
    make_pair: Callable[..., Pair], rng: random.Random, ended: str
) -> None:
    """Also while the shared memory of the run that found it is there still, whose order ends below
    what the target holds."""
    pair = make_pair(disks={"root": 16 * MIB}).up()

    def load() -> None:
        with pair.client() as client:
            for _ in range(40):
                client.write(rng.randrange(255) * 65536, rng.randbytes(65536))
            client.flush()

    load()
    old = int(pair.settle()["targets"][0]["durable_seq"])
    load()
    held = int(pair.settle()["targets"][0]["durable_seq"])
    pair.stop("source", "filter")
    state = pair.a.groups.path(GROUP) / "state"
    put_back(state, old)
    pair.start("filter", "source")
    told = wait_until(
        "it is noticed",
        lambda: "never wrote past" in (error := pair.status()["error"]) and error,
    )
    assert f"the target holds seq {held} but this site" in told
    (pair.stop if ended == "stopped" else pair.kill)("source", "filter")
    assert str(state) in told
    state.write_bytes(b"")
    if ended == "rebooted":
        shutil.rmtree(pair.a.paths.shm(), ignore_errors=True)
    pair.start("filter", "source")
    pair.served()
    load()
    pair.settle()
    wait_until("all is compared", lambda: not pair.status()["unverified"])
    target = pair.status()["targets"][0]
    assert target["durable_seq"] > held
    assert target["equal_bytes"] > 0
    pair.same_as_source()
