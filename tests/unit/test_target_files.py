"""Appending past the page cache: the same bytes as any other write."""

from __future__ import annotations

import errno
import mmap
import os
import random
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import pytest

from vrep.target import files as target_files
from vrep.target.files import Buffer, Files

MIB = 1 << 20


class Watched(Files):
    """Notes which writes would go past the page cache."""

    def __init__(self) -> None:
        self.direct: list[tuple[int, int]] = []

    def write_direct(self, fd: int, buffers: Sequence[memoryview], offset: int) -> None:
        self.direct.append((offset, sum(len(buffer) for buffer in buffers)))
        super().write_direct(fd, buffers, offset)


def pieces(choose: random.Random, total: int) -> list[Buffer]:
    found: list[Buffer] = []
    while total:
        size = min(total, choose.choice((1, 63, 64, 4095, 4096, 8192, 100_000, 700_000)))
        data = choose.randbytes(size)
        found.append(choose.choice((bytes, bytearray, memoryview))(data))
        total -= size
    return found


@pytest.mark.parametrize("seed", range(12))
def test_appends_are_what_was_given(tmp_path: Path, seed: int) -> None:
    choose, files = random.Random(seed), Watched()
    fd = files.create(tmp_path / "file")
    expected = bytearray(choose.randbytes(choose.randrange(300)))
    files.write(fd, [bytes(expected)], 0)
    try:
        for _ in range(12):
            total = choose.choice((0, 1, 4096, 256 << 10, (256 << 10) + 4095, MIB, 3 * MIB + 17))
            buffers = pieces(choose, total)
            files.append(fd, buffers, len(expected))
            expected += b"".join(bytes(buffer) for buffer in buffers)
            if choose.random() < 0.5:
                files.sync(fd)
            # Through the page cache, whose pages beside must not be stale.
            assert os.pread(fd, len(expected) + 1, 0) == expected
    finally:
        os.close(fd)
    assert bytes(files.read_stored(tmp_path / "file")) == expected
    assert files.direct
    for offset, length in files.direct:
        assert offset % 4096 == length % 4096 == 0
        assert length >= 256 << 10


def test_the_descriptor_is_as_it_was(tmp_path: Path) -> None:
    files = Files()
    fd = files.create(tmp_path / "file")
    try:
        files.append(fd, [bytes(2 * MIB)], 0)
        files.write(fd, [b"odd"], 2 * MIB)  # would fail with O_DIRECT
    finally:
        os.close(fd)


@pytest.mark.parametrize("refused_by", ["fcntl", "write"])
def test_a_filesystem_that_knows_no_direct_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused_by: str
) -> None:
    import fcntl

    set_flags, write = fcntl.fcntl, target_files.write_staged
    state = {"direct": False, "refused": 0}

    def refuse(what: str) -> None:
        if refused_by == what:
            state["refused"] += 1
            raise OSError(errno.EINVAL, "Invalid argument")

    def fcntl_(fd: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL:
            if argument & os.O_DIRECT:
                refuse("fcntl")
            state["direct"] = bool(argument & os.O_DIRECT)
            return 0
        return set_flags(fd, command, argument)

    def write_staged(
        fd: int, buffers: Sequence[memoryview], offset: int, room: mmap.mmap
    ) -> tuple[int, int]:
        """As a device does whose blocks are larger than what is left at the end."""
        if refused_by == "write":
            state["refused"] += 1
            whole = memoryview(b"".join(buffers))[: 4096 * 3]
            return write(fd, [whole], offset, room)[0], errno.EINVAL
        return write(fd, buffers, offset, room)

    monkeypatch.setattr(fcntl, "fcntl", fcntl_)
    monkeypatch.setattr(target_files, "write_staged", write_staged)
    files, data = Files(), os.urandom(2 * MIB + 5)
    fd = files.create(tmp_path / "file")
    try:
        files.append(fd, [data], 0)
    finally:
        os.close(fd)
    assert state["refused"]
    assert (tmp_path / "file").read_bytes() == data


def test_another_thread_takes_the_last_staging_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Taken(deque[mmap.mmap]):
        """Empty, though a moment ago it was not."""

        def __len__(self) -> int:
            return 1

    monkeypatch.setattr(target_files, "_staging", Taken(maxlen=4))
    files, data = Files(), os.urandom(2 * MIB)
    fd = files.create(tmp_path / "file")
    try:
        files.append(fd, [data], 0)
    finally:
        os.close(fd)
    assert (tmp_path / "file").read_bytes() == data


def test_an_error_of_the_storage_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files()
    fd = files.create(tmp_path / "file")
    monkeypatch.setattr(target_files, "write_staged", lambda *_: (4096, errno.EIO))
    try:
        with pytest.raises(OSError, match="Input/output"):
            files.append(fd, [bytes(2 * MIB)], 0)
    finally:
        os.close(fd)
