"""What a site knows of its groups, in one shape for people, scripts and metrics.

A group is `protected` here (this site is its source) or `stored` here (its target), and has one
`state` of `STATES` and any number of `conditions`. Times are milliseconds, sizes bytes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from vrep import errors
from vrep.control import ControlClient
from vrep.groups import GroupDefinition

if TYPE_CHECKING:
    from vrep.site import Site

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
CRITICAL_STATES: Final = frozenset({"offline", "unverified", "failed-over", "error"})
WELL: Final = 0
WARNING: Final = 1
CRITICAL: Final = 2


def _ask(site: Site, role: str, method: str = "status") -> dict[str, Any] | None:
    """A process's answer; None when it does not run."""
    try:
        answer = ControlClient(site.paths.socket(role), timeout=5.0).call(method)
    except errors.UnreachableError:
        return None
    assert isinstance(answer, dict)
    return answer


def collect(site: Site, group: str | None = None) -> dict[str, Any]:
    """The status of a site, or of one group of it (`NotFoundError`)."""
    now_ns = time.time_ns()
    filters, sources, targets = (_ask(site, role) for role in ("filter", "source", "target"))
    identity = site.identity
    answer: dict[str, Any] = {
        "site": {"name": identity.name, "site_id": identity.site_id},
        "time_ns": now_ns,
        "roles": {
            "filter": filters is not None,
            "source": sources is not None,
            "target": targets is not None,
        },
        "groups": {},
    }
    names = {peer.site_id: peer.name for peer in site.peers.list()}
    for name in site.groups.names():
        if group in (None, name):
            definition = site.groups.load(name)
            answer["groups"][name] = _protected(
                definition,
                names.get(definition.to_site, definition.to_site),
                None if filters is None else filters.get(name, {"error": "not served yet"}),
                None if sources is None else sources.get(name),
                now_ns,
            )
    stored = (targets or {}).get("groups", {})
    for key, store in stored.items():
        name = str(store.get("name", key))
        if group in (None, name, key):
            shown = name if name not in answer["groups"] else key
            answer["groups"][shown] = {"role": "target", **store}
    if group is not None and not answer["groups"]:
        raise errors.NotFoundError(f"no group {group!r} is protected or stored here")
    return answer


def _protected(
    definition: GroupDefinition,
    target: str,
    filtered: Mapping[str, Any] | None,
    session: Mapping[str, Any] | None,
    now_ns: int,
) -> dict[str, Any]:
    conditions: list[str] = []
    error = ""
    if filtered is None:
        conditions.append("filter-down")
    elif "error" in filtered:
        conditions.append("not-served")
        error = str(filtered["error"])
        filtered = None
    if session is None:
        conditions.append("source-down")
    else:
        conditions.extend(str(c) for c in session["conditions"])
        error = error or str(session["error"])
    if definition.fenced:
        conditions.append("fenced")
    if "tenant key" in error:
        conditions.append("key-missing")
    if filtered is not None and filtered["flush_failed"]:
        conditions.append("flush-failed")
    return {
        "role": "source",
        "state": _state(definition, filtered, session),
        "conditions": sorted(set(conditions)),
        "error": error,
        "group_id": definition.group_id,
        "epoch": definition.epoch,
        "clients": int(filtered["clients"]) if filtered else 0,
        "unverified": filtered["unverified"] if filtered else "",
        "targets": [_target(target, filtered, session, now_ns)],
        "disks": [
            {"name": disk.name, "size": disk.bytes, "uri": disk.uri} for disk in definition.disks
        ],
        "filter": dict(filtered) if filtered else None,
        "created": definition.created,
    }


def _target(
    name: str,
    filtered: Mapping[str, Any] | None,
    session: Mapping[str, Any] | None,
    now_ns: int,
) -> dict[str, Any]:
    oldest = int(filtered["oldest_ns"]) if filtered else 0
    used = int(filtered["ring_bytes"]) - int(filtered["ring_free_bytes"]) if filtered else 0
    return {
        "site": name,
        "connected": bool(session and session["connected"]),
        "seq": int(filtered["head"]) if filtered else 0,
        "received_seq": int(session["received_seq"]) if session else 0,
        "durable_seq": int(filtered["durable"]) if filtered else 0,
        "rpo_ms": max(0, now_ns - oldest) // 1_000_000 if oldest else 0,
        "lag_bytes": used,
        "dirty_bytes": int(filtered["dirty_bytes"]) if filtered else 0,
        "unshipped_bytes": int(filtered["unshipped_bytes"]) if filtered else 0,
        "total_bytes": int(filtered["total_bytes"]) if filtered else 0,
        "bytes_sent": int(session["bytes_sent"]) if session else 0,
        "records_sent": int(session["records_sent"]) if session else 0,
        "round_trip_ms": round(session["round_trip_s"] * 1000, 3)
        if session and session["round_trip_s"] is not None
        else None,
    }


def _state(
    definition: GroupDefinition,
    filtered: Mapping[str, Any] | None,
    session: Mapping[str, Any] | None,
) -> str:
    if definition.fenced:
        return "failed-over"
    if filtered is None:
        return "error"
    if definition.paused:
        return "paused"
    if session is None or not session["connected"]:
        return "offline"
    if filtered["unverified"]:
        return "unverified"
    if filtered["gap"]:
        if int(filtered["gap_seq"]) <= 1:
            return "initial-sync"
        return "resync" if int(filtered["unshipped_bytes"]) else "gap"
    return "replicating"


def verdict(status: Mapping[str, Any]) -> tuple[int, list[str]]:
    """For `vrep status --check`: 0 well, 1 warning, 2 critical, and why."""
    worst, reasons = WELL, []
    for role, runs in status["roles"].items():
        needed = role == "target" or any(g["role"] == "source" for g in status["groups"].values())
        if needed and not runs:
            worst = CRITICAL
            reasons.append(f"the {role} process does not run")
    for name, group in status["groups"].items():
        state = str(group["state"])
        level = WELL if state == "replicating" else WARNING
        if state in CRITICAL_STATES or "target-full" in group["conditions"]:
            level = CRITICAL
        elif group["conditions"]:
            level = WARNING
        if level != WELL:
            also = f" ({', '.join(group['conditions'])})" if group["conditions"] else ""
            reasons.append(f"{name}: {state}{also}")
        worst = max(worst, level)
    return worst, reasons


__all__ = ["CRITICAL", "STATES", "WARNING", "WELL", "collect", "verdict"]
