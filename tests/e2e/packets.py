"""A link of packets: two network namespaces, and between them a wire of ours.

Each namespace has one TUN device, and a thread here carries packets from one to the other: late
(`delay_s`, `jitter_s`), at a rate with a queue that overflows (`bytes_per_s`, `queue_bytes`), some
never (`loss`), or none at all (`up`). Beneath is the kernel's own TCP, so what is lost here is sent
again by it, and what stays away runs into its timers and ours. A kernel needs no module for that:
tc's netem does the same where it is built in, which is not everywhere. What is lost is chosen by
`seed`.

`why_not()` says what is missing: namespaces and /dev/net/tun may both be forbidden, in a
container mostly.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import random
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Final

ADDRESSES: Final = ("10.77.0.1", "10.77.0.2")
MTU: Final = 1500
HOLDER: Final = """
import fcntl, os, socket, struct, subprocess, sys
fd = os.open("/dev/net/tun", os.O_RDWR)
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"wire", IFF_TUN | IFF_NO_PI))
for line in sys.argv[2:]:
    subprocess.run(["ip", *line.split()], check=True, capture_output=True)
with socket.socket(fileno=int(sys.argv[1])) as sock:
    socket.send_fds(sock, [b"x"], [fd])
sys.stdin.read()  # until the other end is closed
"""
START_S: Final = 30.0


def why_not() -> str:
    """Why there can be no such link here; empty: there can."""
    if os.geteuid() != 0:
        return "only root makes network namespaces: try `unshare -r`"
    for tool in ("unshare", "nsenter", "ip"):
        if shutil.which(tool) is None:
            return f"there is no {tool} here"
    try:
        with contextlib.closing(_Side(0)):
            return ""
    except (OSError, subprocess.SubprocessError, AssertionError) as error:
        return f"no network namespace with a TUN device: {error}"


class _Side:
    """A namespace, held by a process that ends with this one."""

    def __init__(self, index: int) -> None:
        here, there = socket.socketpair()
        self._holder = subprocess.Popen(
            [
                *("unshare", "--net"),
                *(sys.executable, "-c", HOLDER, str(there.fileno())),
                "link set lo up",
                f"address add {ADDRESSES[index]}/24 dev wire",
                f"link set wire mtu {MTU} up",
            ],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[there.fileno()],
        )
        there.close()
        here.settimeout(START_S)
        try:
            _word, fds, _flags, _address = socket.recv_fds(here, 1, 1)
            assert fds, self._said()
        except BaseException:
            self._holder.kill()
            self._holder.wait()
            raise
        finally:
            here.close()
        self.fd = fds[0]
        os.set_blocking(self.fd, False)

    def _said(self) -> str:
        self._holder.wait(START_S)
        assert self._holder.stderr is not None
        lines = self._holder.stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {self._holder.returncode}"

    @property
    def enter(self) -> list[str]:
        """What a command line begins with that is to run in it."""
        return ["nsenter", f"--target={self._holder.pid}", "--net", "--"]

    def link(self, state: str) -> None:
        """Take its device "up" or "down"."""
        subprocess.run([*self.enter, "ip", "link", "set", "wire", state], check=True)

    def close(self) -> None:
        with contextlib.suppress(AttributeError):
            os.close(self.fd)
        self._holder.kill()
        self._holder.communicate()


@dataclass(order=True)
class _Packet:
    due_s: float
    number: int
    data: bytes = field(compare=False)


class PacketLink:
    """The two namespaces and the wire; `close` ends all of it."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.up = True
        self.delay_s = 0.0
        self.jitter_s = 0.0
        self.loss = 0.0
        self.bytes_per_s = 0
        self.queue_bytes = 256 << 10
        self.carried = self.lost = 0
        self.sides: list[_Side] = []
        try:
            self.sides = [_Side(0), _Side(1)]
        except BaseException:
            self._close_sides()
            raise
        self._wake, self._woken = socket.socketpair()
        self._closing = False
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def _carry(self) -> None:
        fds = [side.fd for side in self.sides]
        queues: list[list[_Packet]] = [[], []]
        free_s, number = [0.0, 0.0], 0
        while not self._closing:
            now = time.monotonic()
            dues = [queue[0].due_s for queue in queues if queue]
            wait_s = max(0.0, min(dues) - now) if dues else 0.5
            ready, _, _ = select.select([*fds, self._woken], [], [], wait_s)
            now = time.monotonic()
            for index, fd in enumerate(fds):
                while fd in ready and (data := self._read(fd)):
                    number += 1
                    due_s = self._due(free_s, index, now, len(data))
                    if due_s is not None:
                        heapq.heappush(queues[index], _Packet(due_s, number, data))
            for index, queue in enumerate(queues):
                while queue and queue[0].due_s <= now:
                    packet = heapq.heappop(queue)
                    # A device that is down takes none.
                    with contextlib.suppress(OSError):
                        if self.up:
                            os.write(fds[1 - index], packet.data)
                            self.carried += 1

    @staticmethod
    def _read(fd: int) -> bytes:
        try:
            return os.read(fd, 65536)
        except OSError:
            return b""  # nothing, or the device is down

    def _due(self, free_s: list[float], index: int, now: float, size: int) -> float | None:
        """When a packet arrives; None when it never does."""
        if not self.up or self.rng.random() < self.loss:
            self.lost += 1
            return None
        begin = max(now, free_s[index])
        if self.bytes_per_s:
            if (begin - now) * self.bytes_per_s > self.queue_bytes:
                self.lost += 1
                return None
            begin = free_s[index] = begin + size / self.bytes_per_s
        return begin + self.delay_s + self.rng.uniform(0, self.jitter_s)

    def clear(self) -> None:
        """A good link again."""
        self.up, self.loss, self.bytes_per_s = True, 0.0, 0
        self.delay_s = self.jitter_s = 0.0

    def _close_sides(self) -> None:
        for side in self.sides:
            side.close()

    def close(self) -> None:
        self._closing = True
        self._wake.send(b"x")
        self._thread.join(10)
        self._close_sides()
        self._wake.close()
        self._woken.close()


__all__ = ["ADDRESSES", "PacketLink", "why_not"]
