"""The ring against a plain model: a list of published changes and a count of chunks."""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vrep import errors
from vrep._core import layout, ring

GROUP = bytes(range(16))
CHUNK = 4096
SHM = Path("/dev/shm")


@pytest.fixture
def path() -> Iterator[Path]:
    path = SHM / f"vrep-test-{uuid.uuid4().hex}"
    yield path
    path.unlink(missing_ok=True)


def chunks_of(size: int) -> int:
    return -(-size // CHUNK)


class RingModel(RuleBasedStateMachine):
    """Everything that a producer can do, in any order, with restarts in between."""

    DESCRIPTORS, SLOTS, CHUNKS = 8, 6, 12

    def __init__(self) -> None:
        super().__init__()
        self.path = SHM / f"vrep-test-{uuid.uuid4().hex}"
        self.producer = ring.RingProducer.create(
            self.path,
            group_id=GROUP,
            descriptors=self.DESCRIPTORS,
            slots=self.SLOTS,
            payload_bytes=self.CHUNKS * CHUNK,
            first_seq=40,
        )
        self.reader = ring.RingReader(self.path)
        self.head = self.released = 40
        self.published: dict[int, tuple[bytes, int]] = {}
        self.open: list[tuple[ring.RingSlot, bytes]] = []

    def teardown(self) -> None:
        self.open.clear()
        self.reader.close()
        self.producer.close()
        self.path.unlink()

    def used_chunks(self) -> int:
        live = [data for data, _ in self.published.values()] + [data for _, data in self.open]
        return sum(chunks_of(len(data)) for data in live)

    @rule(size=st.integers(0, 5 * CHUNK), fill=st.binary(min_size=1, max_size=3))
    def reserve(self, size: int, fill: bytes) -> None:
        room = (
            len(self.open) < self.SLOTS
            and self.head - self.released + len(self.open) < self.DESCRIPTORS
            and self.used_chunks() + chunks_of(size) <= self.CHUNKS
        )
        if not room:
            with pytest.raises(errors.FullError):
                self.producer.reserve(size)
            return
        data = (fill * size)[:size]
        slot = self.producer.reserve(size)
        if size % 2:
            slot.write(data)
        else:
            at = 0
            for view in slot.buffers():
                view[:] = data[at : at + len(view)]
                at += len(view)
            assert at == size
        self.open.append((slot, data))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 100), offset=st.integers(0, 2**60))
    def publish(self, which: int, offset: int) -> None:
        slot, data = self.open.pop(which % len(self.open))
        self.head += 1
        assert slot.publish(layout.KIND_WRITE, offset=offset) == self.head
        self.published[self.head] = (data, offset)
        with pytest.raises(errors.InvalidError):
            slot.cancel()

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 100))
    def cancel(self, which: int) -> None:
        self.open.pop(which % len(self.open))[0].cancel()

    @rule(upto=st.integers(38, 90))
    def release(self, upto: int) -> None:
        if not self.released <= upto <= self.head:
            with pytest.raises(errors.InvalidError):
                self.producer.release(upto)
            return
        self.producer.release(upto)
        self.released = upto
        self.published = {s: v for s, v in self.published.items() if s > upto}

    @rule()
    def restart(self) -> None:
        """A clean process end: reserved slots were never granted, and go."""
        was_busy = bool(self.open)
        self.open.clear()
        self.producer.close(clean=True)
        self.producer = ring.RingProducer.attach(self.path, group_id=GROUP)
        assert self.producer.was_clean is not was_busy
        assert self.producer.judge() == 0

    @invariant()
    def the_counts_are_exact(self) -> None:
        assert self.producer.head == self.reader.head == self.head
        assert self.producer.released == self.reader.released == self.released
        assert self.producer.free_bytes == (self.CHUNKS - self.used_chunks()) * CHUNK
        used = self.head - self.released + len(self.open)
        assert self.producer.free_descriptors == self.DESCRIPTORS - used

    @invariant()
    def every_record_reads_back(self) -> None:
        found = self.reader.descriptors(self.released + 1, self.head)
        assert found["seq"].tolist() == list(self.published)
        for desc in found:
            data, offset = self.published[int(desc["seq"])]
            assert (desc["offset"], desc["length"]) == (offset, len(data))
            views = self.reader.payload(desc)
            assert b"".join(views) == data
            assert all(view.readonly for view in views)
            del views
        del found


TestRingModel = RingModel.TestCase
TestRingModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_descriptors_are_a_view_and_a_copy_at_the_wrap(path: Path) -> None:
    with (
        ring.RingProducer.create(path, group_id=GROUP, descriptors=4) as producer,
        ring.RingReader(path) as reader,
    ):
        for _ in range(3):
            producer.publish(layout.KIND_WRITE, b"x")
        view = reader.descriptors(1, 3)
        assert not view.flags.owndata
        assert not view.flags.writeable
        with pytest.raises(errors.BusyError):
            reader.close()
        del view
        producer.release(3)
        producer.publish(layout.KIND_WRITE, b"y")
        producer.release(4)
        for _ in range(4):
            producer.publish(layout.KIND_WRITE, b"y")
        wrapped = reader.descriptors(5, 8)
        assert wrapped.flags.owndata
        assert wrapped["seq"].tolist() == [5, 6, 7, 8]
        assert len(reader.descriptors(9, 8)) == 0
        for wrong in ((4, 5), (8, 9), (0, 5), (8, 6)):
            with pytest.raises(errors.RangeError):
                reader.descriptors(*wrong)
        with pytest.raises(errors.RangeError):
            reader.payload(3)


def test_views_keep_the_reader_open(path: Path) -> None:
    with ring.RingProducer.create(path, group_id=GROUP) as producer:
        producer.publish(layout.KIND_WRITE, b"payload")
        reader = ring.RingReader(path)
        views = reader.payload(1)
        with pytest.raises(errors.BusyError):
            reader.close()
        del reader
        assert bytes(views[0]) == b"payload"
        with pytest.raises(TypeError):
            views[0][0] = 1


def test_wait_wakes_when_the_head_moves(path: Path) -> None:
    with ring.RingProducer.create(path, group_id=GROUP) as producer:
        consumer = producer.consumer(role=ring.TARGET)
        with ring.RingReader(path, *consumer.fds) as reader:
            assert not reader.wait(0, timeout=0.01)
            woken = threading.Event()

            def wait() -> None:
                if reader.wait(0, timeout=60):
                    woken.set()

            thread = threading.Thread(target=wait)
            thread.start()
            producer.publish(layout.KIND_WRITE, b"x")
            consumer.notify()
            thread.join()
            assert woken.is_set()
            reader.set(read=1, received=1, durable=1)
            consumer.poll()
            assert (consumer.read, consumer.received, consumer.durable) == (1, 1, 1)


@pytest.mark.parametrize("field", ["read", "received", "durable"])
@pytest.mark.parametrize("value", [6, 2**64 - 1, 0, 2])
def test_a_forged_control_value_is_refused(path: Path, field: str, value: int) -> None:
    """Above head or backwards: refused, and nothing that came with it is taken."""
    with ring.RingProducer.create(path, group_id=GROUP) as producer:
        consumer = producer.consumer(role=ring.TARGET)
        with ring.RingReader(path, *consumer.fds) as reader:
            for _ in range(5):
                producer.publish(layout.KIND_WRITE, b"x")
            reader.set(read=3, received=3, durable=3)
            consumer.poll()
            reader.set(read=4, received=4, durable=4)
            _, at = layout.RING_CONTROL.fields[field][:2]
            os.pwrite(consumer.fds[0], struct.pack("<Q", value), at)
            with pytest.raises(errors.InvalidError):
                consumer.poll()
            assert (consumer.read, consumer.received, consumer.durable) == (3, 3, 3)


@pytest.mark.parametrize("size", [0, 100, 8192])
def test_the_control_file_keeps_its_size(path: Path, size: int) -> None:
    with ring.RingProducer.create(path, group_id=GROUP) as producer:
        consumer = producer.consumer()
        with pytest.raises(PermissionError):
            os.ftruncate(consumer.fds[0], size)


def test_an_observer_notices_what_was_reused(path: Path) -> None:
    with (
        ring.RingProducer.create(path, group_id=GROUP, descriptors=2, payload_bytes=CHUNK) as p,
        ring.RingReader(path) as reader,
    ):
        p.publish(layout.KIND_WRITE, b"old")
        views = reader.payload(1)
        assert reader.still(1)
        p.release(1)
        p.publish(layout.KIND_WRITE, b"new")
        assert bytes(views[0]) == b"new"
        assert not reader.still(1)
        del views


@pytest.mark.parametrize("keep", [0, 1, 511, 4095, 4096, 10000])
def test_a_truncated_ring_is_refused(path: Path, keep: int) -> None:
    ring.RingProducer.create(path, group_id=GROUP).close()
    os.truncate(path, keep)
    for attempt in (
        lambda: ring.RingReader(path),
        lambda: ring.RingProducer.attach(path, group_id=GROUP),
    ):
        with pytest.raises(errors.CorruptError):
            attempt()


def test_garbage_is_refused(path: Path, rng: random.Random) -> None:
    for _ in range(20):
        path.write_bytes(rng.randbytes(rng.randrange(1, 20000)))
        path.chmod(0o600)
        with pytest.raises(errors.IntegrityError):
            ring.RingReader(path)
        with pytest.raises(errors.IntegrityError):
            ring.RingProducer.attach(path, group_id=GROUP)


def test_a_file_that_others_may_write_is_refused(path: Path) -> None:
    ring.RingProducer.create(path, group_id=GROUP).close()
    path.chmod(0o666)
    with pytest.raises(errors.AccessError):
        ring.RingProducer.attach(path, group_id=GROUP)


CHURN = """
import random, sys
from vrep import errors
from vrep._core import layout, ring
path, seed = sys.argv[1], int(sys.argv[2])
rng = random.Random(seed)
producer = ring.RingProducer.attach(path, group_id=bytes(range(16)))
producer.judge()
print("ready", flush=True)
while True:
    size = rng.randrange(1, 60000)
    fill = rng.randrange(256)
    try:
        slot = producer.reserve(size)
    except errors.FullError:
        producer.release((producer.released + producer.head + 1) // 2)
        continue
    slot.write(bytes([fill]) * size)
    slot.publish(layout.KIND_WRITE, offset=fill, mono_ns=size)
"""


def test_a_killed_producer_leaves_whole_records(path: Path, rng: random.Random) -> None:
    ring.RingProducer.create(
        path, group_id=GROUP, descriptors=64, slots=8, payload_bytes=100 * CHUNK
    ).close()
    before = 0
    for _ in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", CHURN, str(path), str(rng.randrange(2**32))],
            stdout=subprocess.PIPE,
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        with pytest.raises(errors.BusyError):
            ring.RingProducer.attach(path, group_id=GROUP)
        with ring.RingReader(path) as reader:  # however late a busy machine lets it go on
            deadline = time.monotonic() + 60
            while reader.head < before + 4:
                assert time.monotonic() < deadline
                time.sleep(0.0005)
        time.sleep(rng.random() * 0.05)
        child.kill()
        assert child.wait() == -signal.SIGKILL
        child.stdout.close()
        with (
            ring.RingProducer.attach(path, group_id=GROUP) as producer,
            ring.RingReader(path) as reader,
        ):
            assert not producer.was_clean
            # At most the one change that it was publishing; it never grants without publishing.
            assert producer.judge() <= 1
            assert producer.head >= before
            before = producer.head
            found = reader.descriptors(producer.released + 1, producer.head)
            assert found["seq"].tolist() == list(range(producer.released + 1, producer.head + 1))
            for desc in found:
                payload = np.frombuffer(b"".join(reader.payload(desc)), np.uint8)
                assert len(payload) == desc["mono_ns"]
                assert (payload == desc["offset"]).all()
            slots = producer.slots()
            held = int(found["chunks"].sum()) + int(slots["chunks"][slots["state"] != 0].sum())
            assert producer.free_bytes == (100 - held) * CHUNK
            del found, desc
    assert before > 10
