"""A source's hold on the filter: the ring, the control values, and the filter's calls.

The filter hands out the ring's path and three descriptors over its control socket. When the
filter restarts, the hold is lost and is taken anew.
"""

from __future__ import annotations

import base64
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from vrep._core import layout
from vrep._core.filter import Window
from vrep._core.ring import RingReader
from vrep.control import ControlClient
from vrep.errors import RangeError, StorageError

COMPARE_RANGES: Final = 10_000
"""in one call: well within a control line"""
STORED_WAIT_S: Final = 10.0


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


class RingHold:
    """An attached consumer of one group's ring. Close it when done."""

    def __init__(self, filter_control: ControlClient, group: str, target_id: str) -> None:
        self._control = filter_control
        self.group = group
        result, fds = filter_control.call_fds(
            "consumer_attach", group=group, role="target", target_id=target_id
        )
        try:
            self.path = Path(result["ring_path"])
            self.reader = RingReader(self.path, *fds)
        finally:
            for fd in fds:
                os.close(fd)
        self._incarnation = self.reader.incarnation
        self._inode = self.path.stat().st_ino

    def alive(self) -> bool:
        """False once another filter process took the ring over, or made a new one."""
        try:
            same = self.path.stat().st_ino == self._inode
        except FileNotFoundError:
            return False
        return same and self.reader.incarnation == self._incarnation

    def status(self) -> Mapping[str, Any]:
        result = self._control.call("status", group=self.group)
        assert isinstance(result, dict)
        return result

    def await_marks(self, stopping: threading.Event) -> None:
        """Return when what became unshipped without a write would outlast a power loss. Before, the
        target must not hear of the gap that stands for it: behind that it holds no less than it
        acknowledged, and nobody would find the loss again. StorageError: not in time."""
        deadline = time.monotonic() + STORED_WAIT_S
        while self.status().get("marks_unstored"):
            if time.monotonic() > deadline or stopping.wait(0.005):
                raise StorageError("the change map is not stored yet: nothing is sent before it is")

    def resync(self, allowed: bool, bytes_per_s: int) -> None:
        """Let the filter copy unshipped blocks, or not."""
        self._control.call(
            "resync", group=self.group, allowed=allowed, bytes_per_s=bytes_per_s, all=False
        )

    def resync_all(self) -> None:
        """Everything becomes unshipped: nothing that the target holds counts any more."""
        self._control.call("resync", group=self.group, allowed=False, bytes_per_s=0, all=True)

    # ---- comparing with what the target holds ------------------------------------------

    def compare(self, disk: int, ranges: Sequence[tuple[int, int]]) -> None:
        """These ranges (offset, length) of a disk may differ from what the target holds, whatever
        it acknowledged: they become unshipped, and a gap begins that ends when all of it is equal
        or sent. While a session compares (`source.delta`), only what differs is sent. RangeError:
        a range is not of the disk."""
        for at in range(0, len(ranges), COMPARE_RANGES):
            part = [[offset, length] for offset, length in ranges[at : at + COMPARE_RANGES]]
            self._control.call("compare", group=self.group, disk=disk, ranges=part)

    def delta_begin(self, secrets: Sequence[bytes]) -> None:
        """Compare unshipped blocks from now on."""
        plain = [_text(secret) for secret in secrets]
        self._control.call("delta_begin", group=self.group, secrets=plain)

    def delta_take(self, most: int) -> tuple[list[Window], int]:
        """Windows to ask the target for, and the seq up to which it must be durable first."""
        found = self._control.call("delta_take", group=self.group, most=most)
        return [Window(*row) for row in found["windows"]], int(found["at_least"])

    def delta_answer(self, answers: Sequence[tuple[int, bytes, bytes]]) -> None:
        """What the target holds of windows, as (id, keys, hashes)."""
        plain = [[number, _text(keys), _text(hashes)] for number, keys, hashes in answers]
        self._control.call("delta_answer", group=self.group, answers=plain)

    def delta_end(self) -> None:
        """Send whole blocks again."""
        self._control.call("delta_end", group=self.group)

    def jumps(self, after: int) -> bool:
        """Whether the record of the ring that follows `after` is a gap-begin that may follow any
        position: the ring is new after a power loss, or was lost before."""
        try:
            first = self.reader.descriptors(after + 1, after + 1)[0]
        except RangeError:
            return False
        jump = int(first["flags"]) & layout.RECORD_JUMP
        return int(first["kind"]) == layout.KIND_GAP_BEGIN and bool(jump)

    def lose_ring(self) -> None:
        """The target lost what it had acknowledged: everything in the ring becomes unshipped
        and a gap begins. AgainError while copies are in flight."""
        self._control.call("lose_ring", group=self.group)

    def close(self) -> None:
        self.reader.close()


__all__ = ["RingHold"]
