"""The mark of what was sent: never below it, drawn back to it, and what a target above it means."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from group_definition import definition

from vrep.groups import ParentPosition
from vrep.source import shipped as module
from vrep.source.shipped import Shipped


class Clock:
    now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s

    def time_ns(self) -> int:
        return int(self.now_s * 1e9)


def opened(where: Path, clock: Clock | None = None, **changes: Any) -> Shipped:
    return Shipped(where, definition(**changes), clock or Clock())


def stored(where: Path) -> int:
    return int(json.loads((where / "shipped.json").read_text())["seq"])


def test_the_mark_is_never_below_what_was_sent(tmp_path: Path, rng: random.Random) -> None:
    """Under any load; and it is stored about once a second."""
    clock = Clock()
    mark = opened(tmp_path, clock)
    mark.begin(7)
    seq, begun_s, stores, last = 7, clock.now_s, 0, 0
    for _ in range(5000):
        pause_s = rng.choice((0.0005, 0.004, 0.02, 0.5, 3.0)) * rng.random()
        clock.now_s += pause_s
        if pause_s > 1:
            mark.settle()
            assert stored(tmp_path) == seq
        seq += rng.choice((1, 1, 5, 300))
        mark.allow(seq)
        assert stored(tmp_path) >= seq
        stores += stored(tmp_path) != last
        last = stored(tmp_path)
    assert stores <= 4 * (clock.now_s - begun_s) + 10
    clock.now_s += 1
    mark.settle()
    assert stored(tmp_path) == seq
    assert not opened(tmp_path).went_back(seq)
    assert opened(tmp_path).went_back(seq + 1)


def test_a_steady_load_stores_once_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, seconds = Clock(), []
    real = module.write_atomic
    monkeypatch.setattr(
        module, "write_atomic", lambda *a, **o: (seconds.append(clock.now_s), real(*a, **o))
    )
    mark = opened(tmp_path, clock)
    mark.begin(0)
    for number in range(1, 10_001):
        clock.now_s += 0.001
        mark.allow(10 * number)
    assert 8 <= len(seconds) <= 16  # of ten seconds
    assert stored(tmp_path) <= 100_000 + 11_000


def test_a_session_that_ends_in_a_burst_leaves_no_mark_ahead(tmp_path: Path) -> None:
    clock = Clock()
    mark = opened(tmp_path, clock)
    mark.begin(7)
    clock.now_s += 0.002
    mark.allow(307)
    assert stored(tmp_path) > 307
    mark.end()
    assert stored(tmp_path) == 307
    assert opened(tmp_path).went_back(308)


def test_nothing_is_known_before_the_first_session(tmp_path: Path) -> None:
    mark = opened(tmp_path)
    assert not mark.went_back(1 << 60)
    mark.begin(41)
    assert stored(tmp_path) == 41
    again = opened(tmp_path)
    assert not again.went_back(41)
    assert again.went_back(42)
    # It stays so until that outlasts a power loss.
    assert opened(tmp_path).went_back(42)
    again.begin(42)
    assert not opened(tmp_path).went_back(42)


def test_the_mark_of_another_history_says_nothing(tmp_path: Path) -> None:
    """It has another id, or is of a later epoch."""
    opened(tmp_path, epoch=2, epoch_id="44" * 16).begin(10)
    for epoch in (1, 2):
        mark = opened(tmp_path, epoch=epoch)
        assert not mark.went_back(1000)
    mark.begin(1000)
    assert opened(tmp_path, epoch=2).went_back(1001)


def in_epoch(where: Path, epoch: int, parent: int, seq: int) -> Shipped:
    """In an epoch that begins behind a seq of another one."""
    at = ParentPosition(parent, 0, seq)
    return opened(where, epoch=epoch, epoch_id=f"{epoch:02x}" * 16, parent=at)


def test_nothing_was_sent_in_an_epoch_that_has_no_mark(tmp_path: Path) -> None:
    """A failover that was rolled back gave the group back in epoch 3: it begins behind what was
    sent in epoch 1, and the target holds nothing of it."""
    in_epoch(tmp_path, 1, 0, 0).begin(40)
    mark = in_epoch(tmp_path, 3, 1, 38)
    assert not mark.went_back(38)
    assert mark.went_back(39)  # of the new epoch, and nobody here knows of it
    assert in_epoch(tmp_path, 3, 1, 41).went_back(41)  # the old one went on for longer
    mark.begin(38)
    assert in_epoch(tmp_path, 3, 1, 38).went_back(39)  # nothing was sent yet
    mark.allow(39)
    assert not in_epoch(tmp_path, 3, 1, 38).went_back(39)


def test_what_another_site_wrote_in_between_is_believed(tmp_path: Path) -> None:
    in_epoch(tmp_path, 1, 0, 0).begin(40)
    mark = in_epoch(tmp_path, 3, 2, 1000)
    assert not mark.went_back(1000)
    assert mark.went_back(1001)


OLDER = b'{"version":1,"epoch":1,"epoch_id":"22222222222222222222222222222222","seq":5}'


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"}", b'{"version":1}', b'{"version":2,"checksum":1}', OLDER,
        module.encode(module.Mark(3, 1, "22" * 16, 9)),
        module.encode(module.Mark(2, 1, "22" * 16, -1)),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_may_be_of_any_moment(tmp_path: Path, content: bytes) -> None:
    """All is compared once, though a target that holds nothing holds no future."""
    (tmp_path / "shipped.json").write_bytes(content)
    mark = opened(tmp_path)
    assert mark.went_back(1)
    assert not mark.went_back(0)
    mark.begin(5)
    assert not mark.went_back(5)
    assert stored(tmp_path) == 5
    again = opened(tmp_path)
    assert not again.went_back(5)
    assert again.went_back(6)


def test_a_flipped_bit_hides_nothing(tmp_path: Path) -> None:
    """Neither what went back, nor that a mark was of another epoch."""
    opened(tmp_path).begin(123456)
    file = tmp_path / "shipped.json"
    whole = file.read_bytes()
    assert not opened(tmp_path).went_back(123456)
    for bit in range(8 * len(whole)):
        bad = bytearray(whole)
        bad[bit // 8] ^= 1 << (bit % 8)
        file.write_bytes(bad)
        assert opened(tmp_path).went_back(123457), bytes(bad)
    for end in range(len(whole)):
        file.write_bytes(whole[:end])
        assert opened(tmp_path).went_back(123457), end


def test_a_full_disk_leaves_no_wrong_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records go on; an old mark would make the next session compare everything."""
    clock = Clock()
    mark = opened(tmp_path, clock)
    mark.begin(5)

    def full(*_a: Any, **_o: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_atomic", full)
        mark.allow(6)
        mark.allow(60)
    assert not (tmp_path / "shipped.json").exists()
    assert not opened(tmp_path).went_back(60)
    opened(tmp_path).begin(60)  # of the next session
    assert opened(tmp_path).went_back(61)
