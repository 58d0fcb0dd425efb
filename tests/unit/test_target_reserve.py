"""A filesystem that several stores share: a noisy group stops alone, and a part stays free."""

from __future__ import annotations

import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
import store_records as records

from vrep.errors import StoreFullError, TimeLimitError
from vrep.target.files import Buffer, Files
from vrep.target.manifest import DiskEntry, EpochEntry, EpochState
from vrep.target.reserve import Reserve
from vrep.target.store import GroupStore, StoreOptions, StoreSpec

EMERGENCY, SHARE = 1 << 20, 256 << 10
NOISY, QUIET = b"n" * 16, b"q" * 16


class SmallDisk(Files):
    """A filesystem of which `free` bytes are left, for all who write through it."""

    def __init__(self, free: int) -> None:
        super().__init__()
        self.free = free

    def append(self, fd: int, buffers: list[Buffer], offset: int) -> None:
        super().append(fd, buffers, offset)
        self.free -= sum(len(memoryview(buffer)) for buffer in buffers)

    def free_bytes(self, path: Path) -> int:
        return self.free


def open_store(directory: Path, group: bytes, disk: SmallDisk, reserve: Reserve) -> GroupStore:
    epoch = EpochEntry(1, EpochState.ACCEPTED, bytes([1]) * 16, bytes(16))
    options = StoreOptions(commit_s=0.0005, merge=False, reserve=reserve)
    spec = StoreSpec(group.hex()[:4], [DiskEntry("root", 1 << 30, 0)], epoch)
    return GroupStore.open(directory, group, create=spec, options=options, files=disk)


def write_until_full(store: GroupStore, feed: Any, most: int = 4000) -> int:
    """Bytes that it took."""
    taken = 0
    for _ in range(most):
        batch = feed.writes(1, 16384)
        store.append(batch)
        deadline = time.monotonic() + 60
        while True:
            try:
                store.commit(timeout_s=0.2)
                break
            except StoreFullError:
                return taken
            except TimeLimitError:  # a slow disk is not a full one
                assert time.monotonic() < deadline
        taken += len(batch)
    raise AssertionError("it never became full")


def test_a_noisy_group_does_not_stop_a_quiet_one(tmp_path: Path) -> None:
    disk, reserve = SmallDisk(4 << 20), Reserve(EMERGENCY, SHARE)
    noisy, quiet = (open_store(tmp_path, group, disk, reserve) for group in (NOISY, QUIET))
    feeds = []
    for store in (noisy, quiet):
        feed = records.Feed()
        feeds.append(feed)
        store.append(feed.stream())
        store.commit()
    with noisy, quiet:
        assert write_until_full(noisy, feeds[0]) > 2 << 20
        assert noisy.full
        assert disk.free >= EMERGENCY + SHARE
        # The other one has its share, whatever the first did.
        assert write_until_full(quiet, feeds[1]) >= SHARE - 2 * 16640
        assert EMERGENCY <= disk.free < EMERGENCY + 2 * 16640
        # A failover, which needs a manifest, works in what is left; and all goes on with room.
        disk.free += 8 << 20
        noisy.commit(timeout_s=60)
        quiet.commit(timeout_s=60)
        assert not noisy.full
        assert not quiet.full


def test_a_group_that_goes_leaves_its_share() -> None:
    reserve = Reserve(100, 50)
    for group in (b"a", b"b"):
        reserve.enter(group)
    assert not reserve.admit(b"a", 160, 20)
    reserve.leave(b"b")
    assert reserve.admit(b"a", 160, 20)
    assert reserve.kept(b"a") == 100


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_no_order_of_writes_takes_what_is_anothers(rng: Random, groups: int) -> None:
    """Against the rule itself: whoever has not spent its share can always append up to it, and the
    emergency part stays."""
    reserve, names = Reserve(1000, 100), [bytes([n]) for n in range(groups)]
    for name in names:
        reserve.enter(name)
    free, spent = 1000 + 150 * groups, dict.fromkeys(names, 0)
    for _ in range(2000):
        name, need = rng.choice(names), rng.randrange(1, 30)
        if free - need >= 1000 + 100 * groups:
            spent = dict.fromkeys(names, 0)
        if reserve.admit(name, free, need):
            free -= need
            spent[name] += need
        else:
            assert spent[name] + need > 100 or free - need < 1000
        assert free >= 1000
        for other in names:
            assert free >= 1000 + sum(max(0, 100 - spent[o]) for o in [other])
        if rng.random() < 0.01:
            free += 150 * groups
