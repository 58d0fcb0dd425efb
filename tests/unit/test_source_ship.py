"""How much a shipper seals at once: little at first, more while the target takes it."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from vrep.errors import FullError
from vrep.source import ship
from vrep.source.ship import BATCH_BYTES, BATCH_FIRST_BYTES, BUFFER_BYTES, Shipper

MIB = 1 << 20


class Rig:
    """Feed, sealer, and connection: records of given sizes, and how much went in each batch."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes
        self.seq = 0
        self.batches: list[int] = []
        self.rooms: list[int] = []
        self.connection = self
        self.ring = self
        self.bytes = 0
        self.level = 1
        self.clock: Clock | None = None
        self.seal_s = self.send_s = 0.0

    def seal(self, _sealer: Any, last: int, room: memoryview) -> tuple[int, int]:
        self.rooms.append(len(room))
        written = done = 0
        for size in self.sizes[self.seq : last]:
            if written + size > len(room):
                break
            written, done = written + size, done + 1
        if not done:
            raise FullError
        self.seq += done
        self.batches.append(written)
        if self.clock:
            self.clock.now_s += self.seal_s * (1 if self.level else 0.1)
        return written, done

    def stats(self) -> dict[str, int]:
        return {"bytes_plain": sum(self.batches)}

    def tally(self, _room: memoryview, *, wall_ns: int) -> int:
        return 0

    def credit(self, _channel: int) -> int:
        return 1 << 30

    def send_data(self, _channel: int, buffers: list[memoryview], *, more: bool = False) -> None:
        self.bytes += sum(len(each) for each in buffers)
        if self.clock:
            self.clock.now_s += self.send_s


class Clock:
    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def time_ns(self) -> int:
        return 0


def shipper(rig: Any) -> Shipper:
    return Shipper(rig, rig, rig, 1, Clock())


def end(one: Shipper) -> None:
    """Once all that was sealed has left."""
    one._sender.settle()
    one.stop()
    one.join()


def test_batches_grow_with_what_the_target_holds() -> None:
    rig = Rig([4096] * 6000)
    one = shipper(rig)
    for _ in range(3):
        one._ship(len(rig.sizes))
    assert max(rig.batches) <= BATCH_FIRST_BYTES
    one.acknowledged(progress=False)  # more credit, and nothing more that is durable
    one._ship(len(rig.sizes))
    assert rig.batches[-1] <= BATCH_FIRST_BYTES
    for turn in range(1, 8):
        one.acknowledged(progress=True)
        one._ship(len(rig.sizes))
        most = min(BATCH_FIRST_BYTES << turn, BATCH_BYTES)
        assert most - 8192 < rig.batches[-1] <= most
    end(one)
    assert rig.bytes == sum(rig.batches)


def test_a_large_record_takes_few_others_along() -> None:
    rig = Rig([3 * MIB, *[4096] * 4000])
    one = shipper(rig)
    one._ship(len(rig.sizes))
    end(one)
    assert 3 * MIB <= rig.batches[0] <= 4 * MIB
    assert rig.rooms == sorted(rig.rooms)


def test_the_largest_record_fits_and_a_larger_one_is_an_error() -> None:
    rig = Rig([BUFFER_BYTES - ship.TALLY_BYTES])
    shipper(rig)._ship(1)
    assert rig.seq == 1
    with pytest.raises(FullError):
        shipper(Rig([BUFFER_BYTES]))._ship(1)


def test_compression_yields_where_sealing_holds_shipping_up() -> None:
    """And comes back when the link is what it waits for."""
    rig = Rig([MIB] * 2000)
    rig.clock, rig.seal_s, rig.send_s = Clock(), 0.5, 0.01
    one = Shipper(rig, rig, rig, 1, rig.clock)  # type: ignore[arg-type]
    for _ in range(10):
        one._ship(2000)
        one._sender.settle()  # one clock for both threads
    assert rig.level == 0
    rig.send_s = 5.0
    for _ in range(10):
        one._ship(2000)
        one._sender.settle()
    end(one)
    assert rig.level == 1


def test_who_waits_for_credit_goes_on_when_there_is_some() -> None:
    rig = Rig([4096])
    one, granted = shipper(rig), threading.Event()
    rig.credit = lambda _channel: 4096 if granted.is_set() else 0  # type: ignore[method-assign]
    thread = threading.Thread(target=one._ship, args=(1,), daemon=True)
    thread.start()
    granted.set()
    one.acknowledged(progress=False)
    thread.join(20)
    assert not thread.is_alive()
    assert rig.bytes == 4096
