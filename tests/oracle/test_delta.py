"""Random histories of a group whose resync compares: only what differs is sent, and never too
little.

The same target and the same rules as in `test_filter`. Here the target also answers what it
holds durably, with hashes, when it is asked and is as far as the question wants it; the answer is
given to the filter any time later, or not at all. The guest writes few different blocks, so that
blocks become equal again by chance, and the disks are rolled back behind the filter.
"""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.oracle.test_filter import (
    BLOCK,
    DISKS,
    SIZE,
    STEPS,
    History,
    root,
)
from vrep._core.filter import Window
from vrep._core.hash import hash_blocks
from vrep.errors import AgainError, GoneError, NotFoundError

__all__ = ["root"]

SECRETS = [bytes(range(192)), bytes(range(64, 256))]


def answer_of(image: bytes, window: Window, secret: int = 0) -> tuple[bytes, bytes]:
    """What a target that holds an image says of a window: keys and hashes."""
    blocks = -(-window.length // BLOCK)
    whole = window.length // BLOCK
    part = bytes(image[window.offset : window.offset + whole * BLOCK])
    hashes = hash_blocks(part, BLOCK, secret=SECRETS[secret]).hashes.tobytes()
    keys = bytes([secret + 1]) * whole + bytes(blocks - whole)
    return keys, hashes + bytes(16 * (blocks - whole))


def ranges(*rows: tuple[int, int]) -> bytes:
    return np.array(rows, "<u8").tobytes()


class Compared(History):
    ring_bytes = 4 << 20

    def __init__(self, rng: random.Random, root: Path) -> None:
        self.questions: list[tuple[Window, int]] = []
        self.answers: list[tuple[Window, bytes, bytes]] = []
        self.images: list[tuple[int, list[bytes]]] = []
        self.wrong = True
        """whether answers are so, now and then"""
        super().__init__(rng, root)
        self.old = [bytes(image) for image in self.model]

    def submit(self) -> None:
        """As before, and often one of few blocks over some of them."""
        rng = self.rng
        if rng.random() < 0.4:
            super().submit()
            return
        disk = rng.randrange(DISKS)
        count = rng.randrange(1, 6)
        offset = rng.randrange(SIZE // BLOCK - count) * BLOCK
        data = bytes([rng.randrange(3)]) * (BLOCK * count)
        try:
            pending = self.group.submit("write", disk, offset, data=data)
        except AgainError:
            self.finish(1)
            return
        self.flights.append((pending, "write", disk, offset, len(data), data))
        if rng.random() < 0.5:
            self.finish(rng.randrange(3))

    # ---- the delta ------------------------------------------------------------------

    def begin(self) -> None:
        if self.follower is None:
            return
        self.answers.clear()
        self.questions.clear()
        self.group.delta_begin(SECRETS)

    def ask(self) -> None:
        """Take windows, and let the target answer those for which it is far enough."""
        try:
            windows, at_least = self.group.delta_take(self.rng.randrange(1, 40))
        except GoneError:
            return
        self.questions += [(window, at_least) for window in windows]
        for window, wanted in self.questions:
            if self.target.durable_seq < wanted:
                continue
            image = self.oldest(wanted)[window.disk]
            keys, hashes = answer_of(image, window, self.rng.randrange(2))
            if self.wrong and self.rng.random() < 0.1:  # it knows only some
                keys = bytes(key * self.rng.randrange(2) for key in keys)
            if self.wrong and self.rng.random() < 0.05:  # or says what is wrong
                hashes = self.rng.randbytes(len(hashes))
            self.answers.append((window, keys, hashes))
        self.questions = [q for q in self.questions if self.target.durable_seq < q[1]]

    def answer(self) -> None:
        self.rng.shuffle(self.answers)
        for _ in range(self.rng.randrange(len(self.answers) + 1)):
            window, keys, hashes = self.answers.pop()
            try:
                self.group.delta_answer(window.id, keys, hashes)
            except NotFoundError:
                continue  # forgotten meanwhile
        self.pump(self.rng.randrange(10))

    def delta(self) -> None:
        self.ask()
        self.answer()

    def oldest(self, wanted: int) -> list[bytes]:
        """The target may answer from any position that is not below what was wanted."""
        del self.images[:-20]
        return next(images for seq, images in self.images if seq >= wanted)

    def sync_target(self) -> None:
        super().sync_target()
        self.note()

    def note(self) -> None:
        if not self.images or self.images[-1][0] < self.target.durable_seq:
            images = [bytes(image) for image in self.target.durable]
            self.images.append((self.target.durable_seq, images))

    def roll_back(self) -> None:
        """Blocks of a disk become what they were, past the filter, which is told. What the
        target holds durably is the worst that they can become."""
        self.finish()
        rng = self.rng
        disk = rng.randrange(DISKS)
        rows = []
        for _ in range(rng.randrange(1, 8)):
            length = rng.randrange(1, 60000)
            offset = rng.randrange(SIZE - length)
            rows.append((offset, length))
            image = rng.choice([self.old, self.target.durable, self.target.durable])[disk]
            self.change(disk, offset, bytes(image[offset : offset + length]))
        # The model's dirty rule holds again once it is told.
        self.group.compare(disk, ranges(*rows))
        if rng.random() < 0.3:
            self.old = [bytes(image) for image in self.model]

    def lose(self) -> None:
        """The ring is lost; what the target received of it may become durable later."""
        self.finish()
        if self.follower is None or self.rng.random() < 0.5:
            return
        asked = threading.Thread(target=self.group.lose_ring)
        asked.start()
        while asked.is_alive():  # copies in flight end first
            self.group.poll()
        asked.join()
        self.next = max(self.next, self.follower.released + 1)

    def change(self, disk: int, offset: int, data: bytes) -> None:
        os.pwrite(self.files[disk], data, offset)
        self.model[disk][offset : offset + len(data)] = data
        self.stable[disk][offset : offset + len(data)] = data

    def crash_target(self) -> None:
        super().crash_target()
        self.answers.clear()
        self.questions.clear()

    def restart(self) -> None:
        self.answers.clear()
        self.questions.clear()
        super().restart()

    def settle(self) -> None:
        self.finish()
        self.attach()
        assert self.follower is not None
        self.group.resync(True)
        until = time.monotonic() + 60
        while self.group.status()["gap"] and time.monotonic() < until:
            self.ask()
            while self.answers:
                window, keys, hashes = self.answers.pop()
                try:
                    self.group.delta_answer(window.id, keys, hashes)
                except NotFoundError:
                    continue
            self.pump(3)
            self.take_all()
        status = self.group.status()
        assert not status["gap"], f"the gap does not end: {status}, {self.questions}"
        self.group.delta_end()
        super().settle()

    def take_all(self) -> None:
        assert self.follower is not None
        while self.next <= self.follower.head:
            self.target.receive(self.follower.record(self.next))
            self.next += 1
        self.target.sync(len(self.target.waiting))
        self.note()
        self.follower.report(max(self.target.durable_seq, self.follower.released))
        self.group.poll()


COMPARED = {
    **{getattr(Compared, step.__name__): weight for step, weight in STEPS.items()},
    Compared.begin: 3,
    Compared.delta: 25,
    Compared.roll_back: 12,
    Compared.lose: 1,
}


@pytest.mark.parametrize("number", range(10))
def test_a_history_with_deltas(number: int, rng: random.Random, root: Path) -> None:
    history = Compared(rng, root)
    try:
        history.settle()
        for _ in range(300):
            step = rng.choices(list(COMPARED), list(COMPARED.values()))[0]
            step(history)
            history.check_dirty()
        history.attach()
        history.begin()
        history.wrong = False
        history.roll_back()
        history.settle()
        # Both sides are equal now, and all is compared: what is rolled back is less than half.
        history.begin()
        before = history.group.status()["equal_bytes"]
        for disk in range(DISKS):
            history.group.compare(disk, ranges((0, SIZE)))
        history.roll_back()
        history.settle()
        assert history.group.status()["equal_bytes"] - before > SIZE
        history.close()
    finally:
        history.release()
