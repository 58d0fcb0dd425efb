"""A source's hold on the filter: the ring, the control values, and the filter's calls.

The filter hands out the ring's path and three descriptors over its control socket. When the
filter restarts, the hold is lost and is taken anew.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vrep._core import layout
from vrep._core.ring import RingReader
from vrep.control import ControlClient
from vrep.errors import RangeError


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
        header = self.reader.header
        self._incarnation = int(header["incarnation"])
        self._inode = self.path.stat().st_ino

    def alive(self) -> bool:
        """False once another filter process took the ring over, or made a new one."""
        try:
            same = self.path.stat().st_ino == self._inode
        except FileNotFoundError:
            return False
        return same and int(self.reader.header["incarnation"]) == self._incarnation

    def status(self) -> Mapping[str, Any]:
        result = self._control.call("status", group=self.group)
        assert isinstance(result, dict)
        return result

    def resync(self, allowed: bool, bytes_per_s: int) -> None:
        """Let the filter copy unshipped blocks, or not."""
        self._control.call(
            "resync", group=self.group, allowed=allowed, bytes_per_s=bytes_per_s, all=False
        )

    def resync_all(self) -> None:
        """Everything becomes unshipped: nothing that the target holds counts any more."""
        self._control.call("resync", group=self.group, allowed=False, bytes_per_s=0, all=True)

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
