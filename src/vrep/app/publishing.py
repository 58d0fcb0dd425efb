"""Publishing a group's objects: what is due goes into the order of the writes, until a target
holds it. On the filter's control threads, never on a guest's path."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from vrep.errors import BusyError, FullError, VrepError
from vrep.objects import ObjectDirectory

if TYPE_CHECKING:
    from vrep._core.filter import Group

__all__ = ["Publisher"]

log = structlog.get_logger("vrep.filter")


@dataclass
class Publisher:
    """Of one group, for as long as it is open: what an earlier run published and no target
    acknowledged is published again."""

    name: str
    path: Path
    published: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    """token and seq of what is on its way, by id"""
    unnoted: bool = False
    """all are due, and not all have their marks"""

    def begin(self, group: Group) -> None:
        """A group was opened: when nobody knows what its target holds, all are due, and when an
        earlier run could not write that down."""
        unknown = group.status()["opened_as"] in ("new", "unexplained")
        if unknown or not ObjectDirectory(self.path).noted:
            self.lost()

    def lost(self) -> None:
        """Records of the past may be lost, on their way or at the target."""
        self.published.clear()  # a durable position above them proves nothing any more
        self._note()

    def _note(self) -> None:
        """All are due, durably."""
        try:
            ObjectDirectory(self.path).all_due()
            self.unnoted = False
        except VrepError as error:  # a full disk: the group's blocks go first
            self.unnoted = True
            log.warning("objects are not noted as due", group=self.name, error=str(error))

    def step(self, group: Group) -> None:
        """Publish what is due, settle what is durable."""
        objects = ObjectDirectory(self.path)
        if self.unnoted:
            self._note()
        try:
            due = objects.due()
            if not due:
                self.published.clear()
                return
            durable = group.status()["durable"]
            for one, token in due.items():
                mine, seq = self.published.get(one, (b"", 0))
                if mine != token:
                    seq = group.put_object(objects.load(one), objects.tag(one))
                    self.published[one] = (token, seq)
                elif durable >= seq:
                    objects.settle(one, token)
        except (FullError, BusyError):
            return  # the ring has no room for it now
        except VrepError as error:
            log.warning("objects are not published", group=self.name, error=str(error))
