"""The state of a protected group: how its replication is, out of what its processes say.

`status` shows it, and the source's process makes an event of each change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from vrep.groups import GroupDefinition

__all__ = ["STATES", "state_of"]

STATES: Final = (
    "initial-sync",
    "replicating",
    "spilling",
    "gap",
    "resync",
    "unverified",
    "paused",
    "offline",
    "failed-over",
    "error",
)


def state_of(
    definition: GroupDefinition,
    filtered: Mapping[str, Any] | None,
    session: Mapping[str, Any] | None,
) -> str:
    """`filtered`: what the filter says of the group, None when it does not serve it; `session`:
    what the source does, None when it does not run."""
    if definition.fenced or (session is not None and session["fenced"]):
        return "failed-over"
    if definition.detached:
        return "offline"
    if filtered is None:
        return "error"
    if definition.paused:
        return "paused"
    if session is None or not session["connected"]:
        return "offline"
    if filtered["unverified"] or session.get("rolled_back"):
        return "unverified"
    if filtered["gap"]:
        if int(filtered["gap_seq"]) <= 1:
            return "initial-sync"
        return "resync" if int(filtered["unshipped_bytes"]) else "gap"
    if not int(filtered["durable"]):  # all is sent, and nothing of it is held
        return "initial-sync"
    if session.get("spill") and session["spill"]["bytes"]:
        return "spilling"
    return "replicating"
