"""A small virtual machine monitor with a driver of virtio-blk, over vhost-user.

As QEMU with `reconnect=1`: the guest's memory and the in-flight region outlive a connection.
When the filter is gone, the monitor comes back as soon as somebody listens, and the requests that
wait are answered then; a client sees no error, only a stall. All clients of a disk in this process
are queues of one monitor, each with one request at a time.

Source: QEMU docs/interop/vhost-user.rst; virtio 1.2, 2.7 (split virtqueues) and 5.2 (block
device). The server's own tests use a monitor in C (tests/native/vhost_monitor.h).
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
import threading
import time
from typing import ClassVar

import numpy as np
from fronts import BlockClient

from vrep.errors import ProtocolError, StorageError, UnreachableError

MIB = 1 << 20
(GET_FEATURES, SET_FEATURES, SET_OWNER, SET_MEM_TABLE) = 1, 2, 3, 5
(SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE) = 8, 9, 10, 11
(SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ENABLE) = 12, 13, 18
(GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES) = 15, 16
(GET_CONFIG, GET_INFLIGHT_FD, SET_INFLIGHT_FD) = 24, 31, 32
VERSION, REPLY, NEED_REPLY = 1, 4, 8
# VERSION_1, PROTOCOL_FEATURES, WRITE_ZEROES, DISCARD, MQ, FLUSH
FEATURES = 1 << 32 | 1 << 30 | 1 << 14 | 1 << 13 | 1 << 12 | 1 << 9
# MQ, REPLY_ACK, CONFIG, INFLIGHT_SHMFD
PROTOCOL = 1 << 0 | 1 << 3 | 1 << 9 | 1 << 12
IN, OUT, FLUSH, DISCARD, ZEROES = 0, 1, 4, 11, 13
NEXT, WRITABLE = 1, 2
UNMAP = 1
HEADER = struct.Struct("<III")

QUEUES, QUEUE_SIZE = 4, 16
WRITE_MAX = 32 * MIB
GUEST_AT, USER_AT = 1 << 32, 0x7F00_0000_0000
RINGS_AT, AVAILABLE_AT, USED_AT, ROOM = 0, 1024, 2048, 1 * MIB
"""of a queue: its rings, then header and status of its request, and from ROOM on the data"""
HEADER_AT, STATUS_AT = 4096, 4224
QUEUE_BYTES = ROOM + WRITE_MAX


class Monitor:
    """One virtual machine: its memory, its queues, and a connection that comes back."""

    _all: ClassVar[dict[str, Monitor]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def of(cls, path: str, timeout_s: float) -> Monitor:
        """The monitor of a socket; a new one when there is none. Give it back with `leave`."""
        with cls._lock:
            monitor = cls._all.get(path)
            if monitor is None:
                monitor = cls._all[path] = cls(path, timeout_s)
            monitor.users += 1
            return monitor

    def __init__(self, path: str, timeout_s: float) -> None:
        self.path, self.users = path, 0
        self.free = list(range(QUEUES))
        self._fd = os.memfd_create("guest")
        os.ftruncate(self._fd, QUEUES * QUEUE_BYTES)
        self.memory = mmap.mmap(self._fd, QUEUES * QUEUE_BYTES)
        self.kick = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(QUEUES)]
        self.call = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(QUEUES)]
        self._inflight: tuple[int, bytes] | None = None
        self._ending = threading.Event()
        self.bytes = self.block = 0
        self._timeout_s = timeout_s
        try:
            self._socket = self._connect()
        except BaseException:
            self._release()
            raise
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()

    def leave(self) -> None:
        with self._lock:  # a successor comes once this one is gone
            self.users -= 1
            if self.users:
                return
            del self._all[self.path]
            self._ending.set()
            self._keeper.join()
            self._release()

    def _release(self) -> None:
        self.memory.close()
        inflight = [self._inflight[0]] if self._inflight else []
        for fd in (self._fd, *self.kick, *self.call, *inflight):
            os.close(fd)

    # ---- the connection ---------------------------------------------------------------

    def _keep(self) -> None:
        """Comes back whenever the connection ends, until the machine is switched off."""
        while not self._ending.is_set():
            if select.select([self._socket], [], [], 0.02)[0]:
                self._socket.close()  # nothing comes unasked but the end
                while not self._ending.is_set():
                    try:
                        self._socket = self._connect()
                        break
                    except (UnreachableError, ProtocolError):
                        time.sleep(0.02)
        try:
            for number in range(QUEUES):
                self._ask(self._socket, GET_VRING_BASE, struct.pack("<II", number, 0), size=8)
        except (OSError, UnreachableError, ProtocolError):
            return  # the filter is away: nothing is in flight in its memory either
        finally:
            self._socket.close()

    def _connect(self) -> socket.socket:
        one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        one.settimeout(self._timeout_s)
        try:
            one.connect(self.path)
            self._negotiate(one)
            for number in range(QUEUES):
                self._start(one, number)
        except OSError as error:
            one.close()
            raise UnreachableError(f"{self.path}: {error}") from None
        except BaseException:
            one.close()
            raise
        return one

    def _negotiate(self, one: socket.socket) -> None:
        (offered,) = struct.unpack("<Q", self._ask(one, GET_FEATURES, size=8))
        (spoken,) = struct.unpack("<Q", self._ask(one, GET_PROTOCOL_FEATURES, size=8))
        if FEATURES & ~offered or PROTOCOL & ~spoken:
            raise ProtocolError(f"vhost-user features {offered:#x}, {spoken:#x}")
        self._send(one, SET_PROTOCOL_FEATURES, struct.pack("<Q", PROTOCOL))
        self._do(one, SET_OWNER)
        self._do(one, SET_FEATURES, struct.pack("<Q", FEATURES))
        config = self._ask(one, GET_CONFIG, struct.pack("<III", 0, 60, 0) + bytes(60), size=72)
        sectors, self.block = struct.unpack_from("<Q12xI", config, 12)
        self.bytes = sectors * 512
        if self._inflight is None:
            shape = struct.pack("<QQHH", 0, 0, QUEUES, QUEUE_SIZE)
            self._send(one, GET_INFLIGHT_FD, shape)
            answer, fds = self._receive(one, GET_INFLIGHT_FD, 20)
            self._inflight = fds[0], answer
        else:
            self._do(one, SET_INFLIGHT_FD, self._inflight[1], (self._inflight[0],))
        region = struct.pack("<IIQQQQ", 1, 0, GUEST_AT, QUEUES * QUEUE_BYTES, USER_AT, 0)
        self._do(one, SET_MEM_TABLE, region, (self._fd,))

    def _start(self, one: socket.socket, number: int) -> None:
        at = USER_AT + number * QUEUE_BYTES
        used = int(np.frombuffer(self.memory, "<u2", 1, number * QUEUE_BYTES + USED_AT + 2)[0])
        self._do(one, SET_VRING_NUM, struct.pack("<II", number, QUEUE_SIZE))
        self._do(one, SET_VRING_BASE, struct.pack("<II", number, used))
        rings = (at + RINGS_AT, at + USED_AT, at + AVAILABLE_AT, 0)
        self._do(one, SET_VRING_ADDR, struct.pack("<IIQQQQ", number, 0, *rings))
        self._do(one, SET_VRING_CALL, struct.pack("<Q", number), (self.call[number],))
        self._do(one, SET_VRING_KICK, struct.pack("<Q", number), (self.kick[number],))
        self._do(one, SET_VRING_ENABLE, struct.pack("<II", number, 1))

    @staticmethod
    def _send(
        one: socket.socket,
        request: int,
        body: bytes = b"",
        fds: tuple[int, ...] = (),
        flags: int = 0,
    ) -> None:
        message = HEADER.pack(request, VERSION | flags, len(body)) + body
        socket.send_fds(one, [message], list(fds))

    @staticmethod
    def _receive(one: socket.socket, request: int, size: int) -> tuple[bytes, list[int]]:
        data, fds, _flags, _from = socket.recv_fds(one, HEADER.size + size, 1)
        while data and len(data) < HEADER.size + size:
            more = one.recv(HEADER.size + size - len(data))
            if not more:
                break
            data += more
        if len(data) < HEADER.size + size:
            raise UnreachableError("the vhost-user server closed the connection")
        if HEADER.unpack_from(data)[0] != request:
            raise ProtocolError(f"an answer to another message: {data[:12].hex()}")
        return data[HEADER.size :], fds

    def _ask(self, one: socket.socket, request: int, body: bytes = b"", *, size: int) -> bytes:
        self._send(one, request, body)
        return self._receive(one, request, size)[0]

    def _do(
        self, one: socket.socket, request: int, body: bytes = b"", fds: tuple[int, ...] = ()
    ) -> None:
        self._send(one, request, body, fds, NEED_REPLY)
        answer = self._receive(one, request, 8)[0]
        if any(answer):
            raise ProtocolError(f"the vhost-user server refuses message {request}")


class VhostClient(BlockClient):
    """One queue of the monitor of ``vhost-user-blk:PATH``."""

    most = WRITE_MAX

    def __init__(self, uri: str, timeout_s: float = 60.0) -> None:
        self._timeout_s = timeout_s
        self._monitor = Monitor.of(uri.partition(":")[2], timeout_s)
        with Monitor._lock:
            self._queue = self._monitor.free.pop()
        self.bytes, self.block = self._monitor.bytes, self._monitor.block
        self._at = self._queue * QUEUE_BYTES
        memory = self._monitor.memory
        # Indexes are read and written at once, not byte by byte.
        self._available = np.frombuffer(memory, "<u2", 2 + QUEUE_SIZE, self._at + AVAILABLE_AT)
        self._used = np.frombuffer(memory, "<u2", 2, self._at + USED_AT)
        self._seen = int(self._used[1])
        self._waits = False

    def close(self) -> None:
        del self._available, self._used  # they hold the memory
        if not self._waits:  # else the server may still use its memory
            with Monitor._lock:
                self._monitor.free.append(self._queue)
        self._monitor.leave()

    def _describe(self, number: int, at: int, length: int, flags: int) -> None:
        place = self._at + RINGS_AT + 16 * number
        struct.pack_into(
            "<QIHH",
            self._monitor.memory,
            place,
            GUEST_AT + self._at + at,
            length,
            flags,
            number + 1,
        )

    def _request(self, kind: int, sector: int, length: int, *, written: bool = False) -> None:
        """A request whose data, if any, stand at ROOM; until it is answered, however long the
        server is away meanwhile, within the time limit."""
        memory, status = self._monitor.memory, self._at + STATUS_AT
        struct.pack_into("<IIQ", memory, self._at + HEADER_AT, kind, 0, sector)
        memory[status] = 0xFF
        self._describe(0, HEADER_AT, 16, NEXT)
        if length:
            self._describe(1, ROOM, length, NEXT | (WRITABLE if written else 0))
        self._describe(2 if length else 1, STATUS_AT, 1, WRITABLE)
        offered = int(self._available[1])
        self._available[2 + offered % QUEUE_SIZE] = 0
        self._available[1] = (offered + 1) & 0xFFFF
        os.eventfd_write(self._monitor.kick[self._queue], 1)
        self._waits = True
        deadline = time.monotonic() + self._timeout_s
        while int(self._used[1]) == self._seen:
            if time.monotonic() > deadline:
                raise UnreachableError(f"{self._monitor.path}: no answer in {self._timeout_s:g} s")
            call = self._monitor.call[self._queue]
            if select.select([call], [], [], 0.1)[0]:
                os.eventfd_read(call)
        self._waits = False
        self._seen = (self._seen + 1) & 0xFFFF
        if memory[status] != 0:
            raise StorageError(f"virtio status {memory[status]} of request {kind} at {sector}")

    def read_blocks(self, offset: int, length: int) -> bytes:
        self._request(IN, offset // 512, length, written=True)
        at = self._at + ROOM
        return self._monitor.memory[at : at + length]

    def write_blocks(self, offset: int, data: bytes, fua: bool) -> None:
        at = self._at + ROOM
        self._monitor.memory[at : at + len(data)] = data
        self._request(OUT, offset // 512, len(data))
        if fua:
            self.flush()

    def _range(self, kind: int, offset: int, length: int, flags: int) -> None:
        struct.pack_into(
            "<QII", self._monitor.memory, self._at + ROOM, offset // 512, length // 512, flags
        )
        self._request(kind, 0, 16)

    def zero_blocks(self, offset: int, length: int, *, hole: bool) -> None:
        self._range(ZEROES, offset, length, UNMAP if hole else 0)

    def trim_blocks(self, offset: int, length: int) -> None:
        self._range(DISCARD, offset, length, 0)

    def flush(self) -> None:
        self._request(FLUSH, 0, 0)
