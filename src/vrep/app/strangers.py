"""Who has the disks of a group that the filter wants to open.

An older filter that is about to end, for a moment; or a VM that was started without the filter, and
writes what nobody records. Then the group's durable state says at once that the next open may
believe nothing: the VM, this process and the host may all have ended until then.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

import structlog

from vrep._core.filter import note_past
from vrep.errors import VrepError
from vrep.groups import GroupDefinition

__all__ = ["note_stranger"]

STRANGER_S: Final = 3.0
"""who has the disks for so long is not a filter that is about to end"""

log = structlog.get_logger("vrep.filter")


def note_stranger(
    definition: GroupDefinition, since: float, state: Path, shm: Path | None
) -> float:
    """A group cannot be opened, for somebody else has its disks: since when (monotonic), `since`
    being what this said the last time."""
    since = min(since, time.monotonic())
    if time.monotonic() - since >= STRANGER_S:
        try:
            note_past(bytes.fromhex(definition.group_id), shm, state)
        except VrepError as problem:
            name = definition.name
            log.error("a VM without the filter is not noted", group=name, error=str(problem))
    return since
