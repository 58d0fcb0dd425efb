"""Objects at their source: what is due stays due until a target holds that very version."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrep.app.publishing import Publisher
from vrep.errors import CorruptError, FullError, StorageError
from vrep.objects import ObjectDirectory, parse, plaintext

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True)


class Order:
    """What a publisher needs of a group."""

    def __init__(self) -> None:
        self.records: list[bytes] = []
        self.durable = 0
        self.full = False

    def put_object(self, data: bytes, tag: int) -> int:
        assert 0 < tag < 1 << 63
        if self.full:
            raise FullError
        self.records.append(data)
        return len(self.records)

    def status(self) -> dict[str, Any]:
        return {"durable": self.durable, "opened_as": "killed"}


@given(NAMES, st.binary(max_size=200), st.integers(0, (1 << 64) - 1))
def test_what_is_made_is_read(name: str, data: bytes, wall_ns: int) -> None:
    assert parse(plaintext(name, data, wall_ns)) == (name, wall_ns, data)


@given(st.binary(max_size=80))
def test_garbage_is_damage(data: bytes) -> None:
    try:
        plain = parse(data)
    except CorruptError:
        return
    assert plaintext(plain.name, plain.data, plain.wall_ns) == data


@pytest.mark.parametrize("name", [b"../up", b"a/b", b"\xff", b"", b"."])
def test_a_name_that_leaves_its_directory_is_damage(name: bytes) -> None:
    with pytest.raises(CorruptError):
        parse(plaintext("a", b"", 1)[:8] + b"\1\0" + bytes([len(name), 0, 0, 0, 0, 0]) + name)


def test_what_is_put_again_meanwhile_stays_due(tmp_path: Path) -> None:
    objects, order = ObjectDirectory(tmp_path), Order()
    publisher = Publisher("web", tmp_path)
    one = objects.put("a", b"1", 1)
    publisher.step(order)
    publisher.step(order)
    assert len(order.records) == 1  # it is on its way
    assert one in objects.due()
    objects.put("a", b"2", 2)
    order.durable = 1
    publisher.step(order)
    assert [parse(record).data for record in order.records] == [b"1", b"2"]
    assert one in objects.due()
    order.durable = 2
    publisher.step(order)
    assert objects.due() == {}


def test_what_may_be_lost_is_put_again(tmp_path: Path) -> None:
    objects, order = ObjectDirectory(tmp_path), Order()
    publisher = Publisher("web", tmp_path)
    for name in ("a", "b"):
        objects.put(name, b"1", 1)
    order.full = True
    publisher.step(order)
    order.full = False
    publisher.step(order)
    assert len(order.records) == 2
    publisher.lost()  # of the ring, or at the target; seqs go on above
    order.durable = 2
    publisher.step(order)
    assert len(order.records) == 4
    again = Publisher("web", tmp_path)  # a filter that was killed before any was durable
    again.step(order)
    assert len(order.records) == 6
    order.durable = 6
    again.step(order)
    assert objects.due() == {}
    again.lost()
    assert len(objects.due()) == 2


def test_what_was_lost_on_a_full_disk_is_put_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That all are due cannot be written down; what was on its way is due still, and its record
    is gone, however far the target is durable."""
    objects, order = ObjectDirectory(tmp_path), Order()
    publisher = Publisher("web", tmp_path)
    one = objects.put("a", b"1", 1)
    publisher.step(order)

    def full(_self: ObjectDirectory) -> None:
        raise StorageError("there is no space left")

    with monkeypatch.context() as patch:
        patch.setattr(ObjectDirectory, "all_due", full)
        publisher.lost()
        order.durable = 1
        publisher.step(order)
        publisher.step(order)
        assert one in objects.due()
        assert len(order.records) == 2  # and not again and again
    publisher.step(order)
    order.durable = len(order.records)
    publisher.step(order)
    assert objects.due() == {}


def test_what_was_lost_on_a_full_disk_is_put_again_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be written any more, though files can go; then the filter is killed."""
    objects, order = ObjectDirectory(tmp_path), Order()
    publisher = Publisher("web", tmp_path)
    for name in ("a", "b"):
        objects.put(name, b"1", 1)
    publisher.begin(order)
    publisher.step(order)
    order.durable = len(order.records)
    publisher.step(order)
    assert objects.due() == {}

    def full(_path: Path, _data: bytes) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("vrep.objects.write_atomic", full)
        publisher.lost()
        publisher.step(order)
        assert objects.due() == {}  # the marks could not be made
        again = Publisher("web", tmp_path)
        again.begin(order)
        again.step(order)
    assert not objects.noted
    third = Publisher("web", tmp_path)
    third.begin(order)
    assert len(objects.due()) == 2
    assert objects.noted
    third.step(order)
    assert len(order.records) == 4
    order.durable = 4
    third.step(order)
    assert objects.due() == {}
    fourth = Publisher("web", tmp_path)  # nothing is said twice
    fourth.begin(order)
    fourth.step(order)
    assert len(order.records) == 4
