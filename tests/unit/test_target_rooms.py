"""Rooms: memory of received records goes round, and never to two at once."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from vrep.target.rooms import SMALL_BYTES, Rooms


def test_a_slab_comes_back_when_its_last_view_is_gone() -> None:
    rooms = Rooms()
    view = rooms.room(1, 300_000)
    assert len(view) == 300_000
    assert not view.readonly
    address = np.frombuffer(view, np.uint8).ctypes.data
    part = np.frombuffer(view[1000:2000], np.uint8)[::2]
    del view
    assert rooms.waiting_bytes == 0  # a part of it is still held
    del part
    assert rooms.waiting_bytes == 512 << 10
    assert np.frombuffer(rooms.room(1, 400_000), np.uint8).ctypes.data == address


def test_no_two_views_share_memory() -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance, rooms = random.Random(seed), Rooms()
    held: list[tuple[memoryview, int]] = []
    for number in range(600):
        if held and chance.random() < 0.45:
            view, mark = held.pop(chance.randrange(len(held)))
            found = np.frombuffer(view, np.uint8)
            assert (found == mark).all()
        else:
            length = chance.choice((1, 4096, SMALL_BYTES, SMALL_BYTES + 1, 1 << 20, 700_001))
            view = rooms.room(0, length)
            assert len(view) == length
            np.frombuffer(view, np.uint8)[:] = number % 251
            held.append((view, number % 251))
    for view, mark in held:
        assert (np.frombuffer(view, np.uint8) == mark).all()


def test_what_waits_is_bounded() -> None:
    rooms = Rooms(kept_bytes=2 << 20)
    views = [rooms.room(0, 1 << 20) for _ in range(5)]
    views.clear()
    assert rooms.waiting_bytes == 2 << 20


def test_what_is_held_counts_with_what_waits() -> None:
    rooms = Rooms(kept_bytes=4 << 20)
    held = [rooms.room(0, 1 << 20) for _ in range(6)]
    assert (rooms.held_bytes, rooms.waiting_bytes) == (6 << 20, 0)
    del held[5]
    assert (rooms.held_bytes, rooms.waiting_bytes) == (5 << 20, 0)  # the bound is passed as it is
    del held[3:]
    assert (rooms.held_bytes, rooms.waiting_bytes) == (3 << 20, 1 << 20)


def test_a_size_that_nobody_asks_for_gives_way() -> None:
    rooms = Rooms(kept_bytes=4 << 20)
    for length in (2 << 20, 1 << 20):
        views = [rooms.room(0, length) for _ in range((4 << 20) // length)]
        views.clear()
        assert rooms.waiting_bytes == 4 << 20
    address = np.frombuffer(rooms.room(0, 1 << 20), np.uint8).ctypes.data
    views = [rooms.room(0, 1 << 20) for _ in range(4)]
    assert address in [np.frombuffer(view, np.uint8).ctypes.data for view in views]
    assert rooms.held_bytes + rooms.waiting_bytes == 4 << 20


def test_memory_goes_back_to_the_host() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    rooms = Rooms(kept_bytes=1 << 20)
    before = resident()
    view = rooms.room(0, 64 << 20)
    np.frombuffer(view, np.uint8)[:] = 1
    assert resident() - before > 56 << 20
    del view
    assert resident() - before < 8 << 20
