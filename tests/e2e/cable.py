"""The link between two sites, ours to spoil: a TCP proxy in the test's process.

What it does to bytes it does by `seed`, which is printed; when it does it is the test's choice.
A cable can

- carry slowly, late and unevenly: `bytes_per_s`, `delay_s`, `jitter_s`;
- hang (`hang`): a direction stops and nothing is closed. The bytes wait in the cable until
  `repair`, as in a router that is stuck, or with `swallow` they are taken and lost, as behind a
  firewall that forgot the connection (which can then only end);
- cut (`cut`): both ends are closed in order, are reset, or only one direction is shut;
- flip one bit of what comes next in a direction (`corrupt`).

Times are seconds. Threads: one that accepts, two for each direction of a connection.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections import deque
from typing import Final, Literal

CHUNK: Final = 1 << 16
KEPT_BYTES: Final = 4 << 20
"""on its way in one direction: more is not taken from its sender"""
RESET: Final = struct.pack("ii", 1, 0)

Cut = Literal["end", "reset", "half"]


class Cable:
    """Carries connections to `target`, which is set before the first one."""

    def __init__(self, seed: int = 0) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.target = ("127.0.0.1", 0)
        self.seed = seed
        self.rng = random.Random(seed)
        self.up = True
        """false: new connections are closed at once"""
        self.recorded: list[bytes] = []
        self.recording = False
        self.bytes_per_s = 0
        self.delay_s = 0.0
        self.jitter_s = 0.0
        self.connections = 0
        self.ended_s = 0.0
        """when an end of a connection was last seen to close it"""
        self.corrupted = 0
        self.hung: set[bool] = set()
        """directions (true: from the source) that do not move"""
        self.swallowing = False
        self._corrupt: set[bool] = set()
        self._open: dict[socket.socket, _Direction] = {}
        self.lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def open(self) -> int:
        """Connections that both ends hold."""
        with self.lock:
            return len(self._open) // 2

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return  # closed
            if not self.up:
                near.close()
                continue
            try:
                far = socket.create_connection(self.target, 5)
            except OSError:
                near.close()  # nobody listens there now
                continue
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self.lock:
                if not self.up:  # it was cut meanwhile
                    near.close()
                    far.close()
                    continue
                self.connections += 1
                self._open[near] = _Direction(self, near, far, forward=True)
                self._open[far] = _Direction(self, far, near, forward=False)
                begun = [self._open[near], self._open[far]]
            for direction in begun:
                direction.start()

    def spoil(self, data: bytes, forward: bool) -> bytes:
        """What becomes of bytes on their way."""
        with self.lock:
            if self.recording:
                self.recorded.append(data)
            if forward not in self._corrupt or len(data) <= 64:
                return data
            self._corrupt.discard(forward)
            self.corrupted += 1
            at, bit = self.rng.randrange(40, len(data)), 1 << self.rng.randrange(8)
        return data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]

    def drop(self, *ends: socket.socket) -> None:
        """Close both ends, whichever closed first."""
        with self.lock:
            for end in ends:
                self._open.pop(end, None)
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    # ---- what a test does to it ----------------------------------------------------

    def cut(self, *, down: bool = False, how: Cut = "end") -> None:
        """End every connection; with `down` no new one comes about until `repair`. "half" shuts
        one direction, of which the seed decides, and leaves the rest to the two ends."""
        self.up = not down
        with self.lock:
            ends = list(self._open)
            chosen = [end for end, d in self._open.items() if d.forward]
        if how == "half":
            for end in chosen:
                direction = self._open.get(end)
                if direction is not None:
                    victim = self.rng.choice((end, direction.sink))
                    with contextlib.suppress(OSError):
                        victim.shutdown(socket.SHUT_WR)
            return
        if how == "reset":
            for end in ends:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.drop(*ends)

    def hang(self, *directions: bool, swallow: bool = False) -> None:
        """Let directions (true: what the source sends) stand still, and close nothing."""
        self.swallowing = swallow
        self.hung = set(directions)

    def corrupt(self, *directions: bool) -> None:
        """Flip one bit of what is sent next; by default by the source."""
        with self.lock:
            self._corrupt = set(directions or (True,))

    def repair(self) -> None:
        """Carry again, as fast as before. What was swallowed is lost: its connections end."""
        lost = self.swallowing and bool(self.hung)
        self.up, self.hung, self.swallowing = True, set(), False
        if lost:
            self.cut()

    def close(self) -> None:
        self.cut(down=True)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


class _Direction:
    """What one end of a connection sends: read by one thread, delivered by another when due."""

    def __init__(
        self, cable: Cable, source: socket.socket, sink: socket.socket, *, forward: bool
    ) -> None:
        self.cable, self.source, self.sink, self.forward = cable, source, sink, forward
        self._kept: deque[tuple[float, bytes]] = deque()
        self._bytes = 0
        self._change = threading.Condition()
        self._ended = False
        self._free_s = 0.0

    def start(self) -> None:
        for work in (self._read, self._deliver):
            threading.Thread(target=work, daemon=True).start()

    def _read(self) -> None:
        try:
            while data := self.source.recv(CHUNK):
                self._keep(self.cable.spoil(data, self.forward))
        except OSError:
            pass  # one end is gone: the other follows
        self.cable.ended_s = time.monotonic()
        with self._change:
            self._ended = True
            self._change.notify_all()

    def _keep(self, data: bytes) -> None:
        cable = self.cable
        late = cable.delay_s
        if cable.jitter_s:
            with cable.lock:
                late += cable.rng.uniform(0, cable.jitter_s)
        due = time.monotonic() + late
        with self._change:
            if self._kept:
                due = max(due, self._kept[-1][0])  # a stream keeps its order
            self._kept.append((due, data))
            self._bytes += len(data)
            self._change.notify_all()
            self._change.wait_for(lambda: self._bytes < KEPT_BYTES or self._ended)

    def _deliver(self) -> None:
        try:
            while (data := self._next()) is not None:
                if self.forward in self.cable.hung and self.cable.swallowing:
                    continue
                self.sink.sendall(data)
                if rate := self.cable.bytes_per_s:  # read once: the test may set it to 0
                    time.sleep(len(data) / rate)
        except OSError:
            pass  # as above
        with self._change:
            self._ended = True
            self._bytes = 0
            self._change.notify_all()
        self.cable.drop(self.source, self.sink)

    def _next(self) -> bytes | None:
        """What is due, once it is and the direction moves; None at the end."""
        while True:
            with self._change:
                self._change.wait_for(lambda: bool(self._kept) or self._ended, 0.05)
                if not self._kept:
                    if self._ended:
                        return None
                    continue
                due, data = self._kept[0]
                still = self.forward in self.cable.hung and not self.cable.swallowing
                if self._ended and still:
                    return None  # who hangs up does not wait for what is stuck
                left_s = due - time.monotonic()
                if not still and left_s <= 0:
                    self._kept.popleft()
                    self._bytes -= len(data)
                    self._change.notify_all()
                    return data
                self._change.wait(0.02 if still else min(left_s, 0.05))


__all__ = ["CHUNK", "Cable", "Cut"]
