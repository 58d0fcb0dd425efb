"""The room of a filesystem that several groups' stores share, and what each may count on.

Two parts of it are kept back. The *emergency* part is for recovery, views and folds: no store
appends into it. A *share* is each group's own: when all that is free are the shares and the
emergency part, a group appends into its own share alone, so one that writes without end stops by
itself, and the others go on. What a group appended since the room became short counts as spent,
until there is room again for all.

Sizes are bytes. Threads: any.
"""

from __future__ import annotations

import threading
from typing import Final

__all__ = ["Reserve"]


class Reserve:
    """Of one filesystem, for the stores that one process has open on it."""

    def __init__(self, emergency: int, share: int = 0) -> None:
        self.emergency: Final = emergency
        self.share: Final = share
        self._spent: dict[bytes, int] = {}
        """by group"""
        self._lock = threading.Lock()

    def enter(self, group: bytes) -> None:
        """A group has a share from now on."""
        with self._lock:
            self._spent.setdefault(group, 0)

    def leave(self, group: bytes) -> None:
        """Its store was closed."""
        with self._lock:
            self._spent.pop(group, None)

    def kept(self, group: bytes) -> int:
        """What a group must leave free: the emergency part, and what the others have not spent of
        their shares."""
        with self._lock:
            return self._kept(group)

    def _kept(self, group: bytes) -> int:
        others = (self.share - spent for one, spent in self._spent.items() if one != group)
        return self.emergency + sum(others)

    def admit(self, group: bytes, free: int, need: int) -> bool:
        """Whether a group may append so much where so much is free; then it counts as spent if
        the room is short."""
        with self._lock:
            short = free - need < self.emergency + self.share * len(self._spent)
            if not short:
                self._spent = dict.fromkeys(self._spent, 0)
                return True
            if free - need < self._kept(group):
                return False
            if group in self._spent:
                self._spent[group] = min(self.share, self._spent[group] + need)
            return True
