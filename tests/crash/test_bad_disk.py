"""Disks that fail, are read-only, full, or take little at once: nothing is claimed that is not
there, and it goes on when they are well."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import store_records as records

from vrep._core import layout
from vrep.errors import StorageError, StoreFullError, VrepError
from vrep.keys.datakey import DataKey
from vrep.source import spill as spill_module
from vrep.source.spill import Spill, SpillKeys
from vrep.target.files import Files
from vrep.target.reader import StoreReader
from vrep.target.store import GroupStore, StoreOptions

GROUP = records.GROUP
SMALL = StoreOptions(commit_s=0.0, segment_bytes=1 << 20, reserve_bytes=0)
BAD = (errno.EIO, errno.EROFS, errno.ENOMEM, errno.EMFILE)


class BadFiles(Files):
    """Fails when told to, at any of its calls."""

    error: int = 0

    def _maybe(self) -> None:
        if self.error:
            raise OSError(self.error, os.strerror(self.error))

    def create(self, path: Path) -> int:
        self._maybe()
        return super().create(path)

    def open(self, path: Path) -> int:
        self._maybe()
        return super().open(path)

    def write(self, fd: int, buffers: Sequence[Any], offset: int) -> None:
        self._maybe()
        super().write(fd, buffers, offset)


def refused(store: GroupStore, batch: bytes) -> None:
    """Which of the two calls says so is the store's business."""

    def both() -> None:
        store.append(batch)
        store.commit()

    with pytest.raises(VrepError):
        both()


@pytest.mark.parametrize("code", BAD)
@pytest.mark.parametrize("after", range(4))
def test_a_store_claims_nothing_that_its_disk_refused(
    tmp_path: Path, rng: random.Random, code: int, after: int
) -> None:
    files, feed = BadFiles(), records.Feed()
    store = GroupStore.open(tmp_path, GROUP, create=records.spec(), options=SMALL, files=files)
    store.append(feed.stream() + feed.writes(2))
    good = store.commit()
    for _ in range(after):
        store.append(feed.writes(rng.randrange(1, 5)))
        good = store.commit()
    files.error = code
    refused(store, feed.writes(3))
    assert store.durable == good
    refused(store, feed.writes(1))
    assert store.durable == good
    files.error = 0
    store.close()
    with GroupStore.open(tmp_path, GROUP) as again:
        assert again.durable.seq >= good.seq
    with StoreReader(tmp_path, GROUP) as reader:
        reader.verify()
        assert reader.durable.seq >= good.seq


def little(real: Callable[..., int], rng: random.Random) -> Callable[..., int]:
    """A system call that writes only some of what it was given."""

    def call(fd: int, buffers: Any, offset: int) -> int:
        if isinstance(buffers, list):
            first = memoryview(buffers[0])
            return int(real(fd, [first[: rng.randrange(1, len(first) + 1)]], offset))
        view = memoryview(buffers)
        return int(real(fd, view[: rng.randrange(1, len(view) + 1)], offset))

    return call


def test_short_writes_go_on(
    tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwritev", little(os.pwritev, rng))
    feed = records.Feed()
    store = GroupStore.open(tmp_path, GROUP, create=records.spec(), options=SMALL)
    store.append(feed.stream() + feed.writes(2))
    for _ in range(10):
        store.append(feed.writes(rng.randrange(1, 20)))
        durable = store.commit()
    store.close()
    with GroupStore.open(tmp_path, GROUP) as again:
        assert again.durable == durable
    with StoreReader(tmp_path, GROUP) as reader:
        reader.verify()


# ---- the source's spill ------------------------------------------------------------------------

KEY = DataKey(GROUP, 1, bytes([1] * 32))
KEYS = SpillKeys(KEY, {1: KEY}.__getitem__)
ROOM = memoryview(bytearray(4 << 20))


class SpillLab:
    """A spill that is filled in order; what it should hold."""

    def __init__(self, directory: Path, rng: random.Random) -> None:
        self.rng = rng
        self.spill = Spill(
            directory, GROUP, quota_bytes=1 << 30, reserve_bytes=0, segment_bytes=64 << 10
        )
        self.data: list[bytes] = []

    def add(self) -> None:
        """One record; StorageError or OSError when the disk refuses it."""
        stream = np.zeros(1, layout.STREAM)
        stream["epoch_id"] = np.frombuffer(bytes([1] * 16), np.uint8)
        after = len(self.data)
        sealer = self.spill.sealer(KEYS, stream, 1, after, 0)
        data = self.rng.randbytes(self.rng.randrange(1, 20_000))
        header = np.zeros(1, layout.RECORD)
        header["kind"], header["seq"], header["length"] = layout.KIND_WRITE, after + 1, len(data)
        count, _done = sealer.seal(header, [data], ROOM)
        self.spill.append(ROOM[:count])
        self.data.append(data)

    def check(self, spill: Spill) -> None:
        """Everything that was taken comes out, in order, and nothing else does."""
        found: list[bytes] = []
        room = memoryview(bytearray(1 << 20))
        while len(found) < len(self.data):
            batch = spill.batch(len(found), KEYS, room)
            assert len(batch.headers), f"only {len(found)} of {len(self.data)}"
            for header, start in zip(batch.headers, batch.starts, strict=True):
                end = int(start) + int(header["length"])
                found.append(bytes(batch.payload[int(start) : end]))
        assert found == self.data
        assert spill.last == len(self.data)


def test_a_spill_takes_what_a_disk_takes_little_by_little(
    tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", little(os.pwrite, rng))
    lab = SpillLab(tmp_path / "spill", rng)
    for _ in range(40):
        lab.add()
    assert len(list((tmp_path / "spill").iterdir())) > 2
    lab.check(lab.spill)
    lab.spill.close()
    lab.check(Spill(tmp_path / "spill", GROUP, quota_bytes=1 << 30, reserve_bytes=0))


@pytest.mark.parametrize("code", [*BAD, errno.ENOSPC])
@pytest.mark.parametrize("name", ["open", "pwrite", "fdatasync"])
def test_a_spill_on_a_bad_disk_holds_what_it_said(
    tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    """At whichever call, a few times in a row, and then it is well again."""
    lab = SpillLab(tmp_path / "spill", rng)
    real, bad = getattr(os, name), [False]

    def call(*arguments: Any, **options: Any) -> Any:
        if bad[0] and rng.random() < 0.7:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    monkeypatch.setattr(spill_module.os, name, call)
    refused = 0
    for turn in range(60):
        bad[0] = turn % 15 > 7
        try:
            lab.add()
        except (StorageError, StoreFullError, OSError):
            refused += 1
            lab.spill.abandon()
    bad[0] = False
    assert name != "fdatasync" or refused
    lab.add()
    lab.check(lab.spill)
    lab.spill.close()
    lab.check(Spill(tmp_path / "spill", GROUP, quota_bytes=1 << 30, reserve_bytes=0))
