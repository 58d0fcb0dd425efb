"""What a site knows of its groups, in one shape for people, scripts and metrics.

A group is `protected` here (this site is its source) or `stored` here (its target), and has one
`state` of `STATES` and any number of `conditions`. Times are milliseconds, sizes bytes. What is
wrong with one group, or with one process, is said of that one: the others are reported. A figure
that nobody knows, since the process that would know does not answer, is None, never 0.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from vrep import errors
from vrep.control import ControlClient
from vrep.groups import GroupDefinition
from vrep.lanes import group_of
from vrep.settings import StatusConfig
from vrep.states import STATES, state_of

if TYPE_CHECKING:
    from vrep.site.base import SiteBase

CRITICAL_STATES: Final = frozenset({"offline", "unverified", "failed-over", "error"})
CRITICAL_CONDITIONS: Final = frozenset({"target-full", "two-vms", "verify-failed"})
HARMLESS: Final = frozenset({"testing", "unprotected"})
"""conditions that are no reason for a warning"""
WELL: Final = 0
WARNING: Final = 1
CRITICAL: Final = 2


def _ask(site: SiteBase, role: str, method: str = "status") -> dict[str, Any] | None:
    """A process's answer; None when it does not run, or hangs: the others are asked all the
    same."""
    try:
        answer = ControlClient(site.paths.socket(role), timeout=5.0).call(method)
    except (errors.UnreachableError, errors.TimeLimitError):
        return None
    assert isinstance(answer, dict)
    return answer


def collect(site: SiteBase, group: str | None = None) -> dict[str, Any]:
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
    written: dict[str, tuple[str, GroupDefinition]] = {}
    for name in site.groups.names():
        if group not in (None, name, group_of(name)):
            continue
        filtered = None if filters is None else filters.get(name, {"error": "not served yet"})
        try:
            definition = site.groups.load(name)
        except errors.NotFoundError:
            continue  # unprotected since the listing
        except errors.VrepError as error:
            answer["groups"][name] = _unreadable(error, filtered)
            continue
        written[definition.group_id] = (name, definition)
        answer["groups"][name] = _protected(
            definition,
            names.get(definition.to_site, definition.to_site),
            filtered,
            None if sources is None else sources.get(name),
            now_ns,
        )
    views = _views(site)
    for key, store in (_held(site) if targets is None else targets["groups"]).items():
        name = str(store.get("name", key))
        if group in (None, name, key, group_of(name)):
            own, mine = written.get(key, (name, None))
            if mine is not None and not mine.yielded and store["state"] != "error":
                # Sites took turns: what this one kept while the other wrote the group.
                answer["groups"][own]["history"] = {**_points(store), "bytes": store.get("bytes")}
                continue
            shown = name if name not in answer["groups"] else key
            also: set[str] = set()
            old: dict[str, Any] = {}
            if mine is not None and mine.yielded:
                shown = own
                old = {"untaken": _noted(site, own)}
                also |= {"untaken-writes"} if old["untaken"]["bytes"] else set()
            if _two_run(site, key, store):
                also.add("two-vms")
            verified = _verified(site, key, store)
            failed = verified is not None and verified["state"] in ("bad", "damaged")
            also |= {"verify-failed"} if failed else set()
            answer["groups"][shown] = {
                "role": "target",
                **store,
                **_points(store),
                "conditions": sorted({*store["conditions"], *views.get(key, ()), *also}),
                "verdict": verified,
                **old,
            }
    if group is not None and not answer["groups"]:
        raise errors.NotFoundError(f"no group {group!r} is protected or stored here")
    return answer


def _held(site: SiteBase) -> dict[str, dict[str, Any]]:
    """Groups whose history is held here while no target process runs, by their ids."""
    if not site.paths.store.is_dir():
        return {}
    from vrep.recovery.held import held_groups

    found: dict[str, dict[str, Any]] = {}
    for group_id, held in held_groups(site.paths):
        common = {"group_id": group_id.hex(), "conditions": ["target-down"]}
        if isinstance(held, errors.VrepError):
            found[group_id.hex()] = {**common, "state": "error", "error": str(held)}
            continue
        disks = [{"name": d.name, "size": d.bytes, "index": d.index} for d in held.manifest.disks]
        found[group_id.hex()] = {
            **common,
            "name": held.name,
            "state": "offline",
            "error": "",
            "disks": disks,
        }
    return found


def _noted(site: SiteBase, group: str) -> dict[str, Any]:
    """What was not taken of a group that this site gave up; nothing once it was exported."""
    from vrep.recovery.untaken import read_untaken

    try:
        found = read_untaken(site.paths, group)
    except errors.VrepError as error:
        return {"after": None, "to": None, "bytes": None, "exported": None, "error": str(error)}
    size = 0 if found.exported else found.bytes
    return {"after": found.after, "to": None, "bytes": size, "exported": found.exported or None}


def _two_run(site: SiteBase, group_id: str, store: Mapping[str, Any]) -> bool:
    """Whether the old source says that clients use its disks, and some use those here."""
    source = store.get("source") or {}
    if "old-source-alive" not in store["conditions"] or not source.get("guest_clients"):
        return False
    from vrep.recovery.view import clients_here

    return clients_here(site.paths, group_id) > 0


def _verified(site: SiteBase, group_id: str, store: Mapping[str, Any]) -> dict[str, Any] | None:
    """The newest verdict on a point of a group that is held here; None when there is none, or
    when nothing can be said: what is wrong then stands in the group's error."""
    if not (site.paths.verdicts / group_id).is_dir():
        return None
    from vrep.recovery.verdict import newest
    from vrep.target.manifest import Position, load_newest

    try:
        manifest = load_newest(site.paths.store / group_id, bytes.fromhex(group_id))
        words = str(store["durable"]).split("/") if "durable" in store else []
        durable = Position(*(int(word) for word in words)) if words else None
        return newest(site.paths, manifest, durable)
    except errors.VrepError:
        return None


def _views(site: SiteBase) -> dict[str, set[str]]:
    """What recovered disks mean for their groups, by the groups' ids: `testing` while a test is
    served, `view-down` while one that should be served is not."""
    if not site.paths.views.is_dir():
        return {}
    from vrep.recovery.view import view_directories

    found: dict[str, set[str]] = {}
    for view in view_directories(site.paths):
        try:
            record = view.load()
        except errors.VrepError:
            continue  # it ended since the listing, or cannot be read: `test list` says so
        if record.state not in ("serving", "committed") or record.kind == "verify":
            continue
        # Asked, not judged by its lock: to try that could keep a view from starting.
        if not ControlClient(view.control).alive():
            found.setdefault(record.group_id, set()).add("view-down")
        elif record.kind == "test":
            found.setdefault(record.group_id, set()).add("testing")
    return found


def _unreadable(error: errors.VrepError, filtered: Mapping[str, Any] | None) -> dict[str, Any]:
    """A group of which nothing is known but what is wrong with its definition. Its disks may be
    served all the same, as they were."""
    return {
        "role": "source",
        "state": "error",
        "conditions": ["unreadable"],
        "error": str(error),
        "group_id": "",
        "clients": _count(filtered, "clients"),
        "unverified": "",
        "targets": [],
        "disks": [],
        "filter": None,
        "transitions": None,
    }


def _protected(
    definition: GroupDefinition,
    target: str,
    filtered: Mapping[str, Any] | None,
    session: Mapping[str, Any] | None,
    now_ns: int,
) -> dict[str, Any]:
    conditions: list[str] = []
    error, clients = "", _count(filtered, "clients")
    if filtered is None:
        conditions.append("filter-down")
    elif "error" in filtered:
        bypass = bool(filtered.get("bypass"))
        if bypass or not definition.detached:
            conditions.append("bypass" if bypass else "not-served")
            error = str(filtered["error"])
        if bypass and filtered["flush_failed"]:
            conditions.append("flush-failed")
        filtered = None
    if definition.detached:
        conditions.append("detached")
    if session is None:
        conditions.append("source-down")
    else:
        conditions.extend(str(c) for c in session["conditions"])
        if session.get("history_lost"):
            conditions.append("history-lost")
        if session.get("cuts"):
            conditions += ["lane-absent"] if session["cuts"]["absent"] else []
            conditions += ["no-cuts"] if session["cuts"]["stale"] else []
        if session.get("spill") and session["spill"]["full"]:
            conditions.append("spill-full")
        if not (definition.paused or definition.detached):  # a wish ended the session then
            error = error or str(session["error"])
    if definition.fenced or (session is not None and session["fenced"]):
        conditions.append("fenced")
    if clients and session is not None and session.get("rival_clients"):
        conditions.append("two-vms")
    untaken = _untaken(definition, filtered)
    if untaken["bytes"]:
        conditions.append("untaken-writes")
    if definition.halted and not definition.fenced:
        conditions.append("moving")
    if filtered is not None and filtered["guest_paused"]:
        conditions.append("guest-paused")
    if "tenant key" in error:
        conditions.append("key-missing")
    if definition.keys_at_target not in ("", definition.keys_digest):
        conditions.append("keys-unsent")
    if filtered is not None and filtered["handover"]:
        conditions.append("mirror-lost" if filtered["mirror"] else "handing-over")
    if filtered is not None and filtered["flush_failed"]:
        conditions.append("flush-failed")
    return {
        "role": "source",
        "state": state_of(definition, filtered, session),
        "conditions": sorted(set(conditions)),
        "error": error,
        "group_id": definition.group_id,
        "epoch": definition.epoch,
        "clients": clients,
        "cuts": session.get("cuts") if session else None,
        "unverified": _unverified(filtered, session),
        "targets": [_target(target, filtered, session, now_ns)],
        "disks": [
            {"name": disk.name, "size": disk.bytes, "uri": disk.uri} for disk in definition.disks
        ],
        "filter": dict(filtered) if filtered else None,
        "created": definition.created,
        "untaken": untaken,
        "transitions": _transitions(session),
    }


def _unverified(filtered: Mapping[str, Any] | None, session: Mapping[str, Any] | None) -> str:
    """Why nothing is believed: a reason of the filter's, or `rolled-back`."""
    if filtered is None:
        return ""
    back = "rolled-back" if session is not None and session.get("rolled_back") else ""
    return str(filtered["unverified"] or back)


def _transitions(session: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Since when the group is as it is, and how often it came into each state since the source's
    process began; None when that is not known."""
    found = (session or {}).get("transitions")
    return {key: found[key] for key in ("since_ns", "counts")} if found else None


def _untaken(definition: GroupDefinition, filtered: Mapping[str, Any] | None) -> dict[str, Any]:
    """How much of what this site wrote the site that took the group over does not have, behind
    which position, and the last one here; `vrep.Site.untaken` lists the extents."""
    left = definition.left if definition.fenced else None
    return {
        "after": f"pos:{left.epoch}/{left.lane}/{left.seq}" if left is not None else None,
        "to": f"pos:{definition.epoch}/0/{int(filtered['head'])}"
        if definition.fenced and filtered
        else None,
        "bytes": _count(filtered, "dirty_bytes") if definition.fenced else 0,
    }


def _target(
    name: str,
    filtered: Mapping[str, Any] | None,
    session: Mapping[str, Any] | None,
    now_ns: int,
) -> dict[str, Any]:
    oldest = _count(filtered, "oldest_ns")
    spill = dict(session["spill"]) if session and session.get("spill") else {}
    if spill.get("oldest_ns"):
        # The filter knows only when the spill began. Its gap, if there is one, is younger.
        oldest = int(spill["oldest_ns"])
    spilled = None if session is None else int(spill.get("bytes", 0))
    used = int(filtered["ring_bytes"]) - int(filtered["ring_free_bytes"]) if filtered else None
    changes = (session or {}).get("transitions") or {}
    return {
        "site": name,
        "connected": bool(session and session["connected"]),
        "seq": _count(filtered, "head"),
        "received_seq": _count(session, "received_seq"),
        "durable_seq": _count(filtered, "durable"),
        **_points(session),
        "rpo_ms": max(0, now_ns - oldest) // 1_000_000 if oldest else oldest,
        "lag_bytes": None if used is None or spilled is None else used + spilled,
        "spill_bytes": spilled,
        "spill_quota_bytes": None if session is None else int(spill.get("quota_bytes", 0)),
        "whole_in_s": changes.get("whole_in_s"),
        "missing_bytes": changes.get("missing_bytes"),
        "dirty_bytes": _count(filtered, "dirty_bytes"),
        "unshipped_bytes": _count(filtered, "unshipped_bytes"),
        "total_bytes": _count(filtered, "total_bytes"),
        "bytes_sent": _count(session, "bytes_sent"),
        "records_sent": _count(session, "records_sent"),
        "resync_bytes": _count(filtered, "resync_bytes"),
        "compared_bytes": _count(filtered, "compared_bytes"),
        "equal_bytes": _count(filtered, "equal_bytes"),
        "lost_bytes": _lost_bytes(session),
        "hash_bytes": _hash_bytes(session),
        "comparing": bool(((session or {}).get("delta") or {}).get("on")),
        "compression": session.get("compression") if session else None,
        "round_trip_ms": round(session["round_trip_s"] * 1000, 3)
        if session and session["round_trip_s"] is not None
        else None,
    }


def _count(answer: Mapping[str, Any] | None, key: str) -> int | None:
    """A figure in a process's answer; None when there is no answer."""
    return None if answer is None else int(answer.get(key, 0))


def _lost_bytes(session: Mapping[str, Any] | None) -> int | None:
    """Of how much of the disks the target lost records; None when that is not known."""
    if session is None:
        return None
    return session.get("lost_bytes") if session.get("history_lost") else 0


def _hash_bytes(session: Mapping[str, Any] | None) -> int | None:
    """What comparing cost on the wire, both ways."""
    if session is None:
        return None
    count = session.get("delta") or {}
    return int(count.get("hash_bytes", 0)) + int(count.get("question_bytes", 0))


def _points(known: Mapping[str, Any] | None) -> dict[str, Any]:
    """From where to where a group can be recovered, as a process tells it."""
    return {key: _point((known or {}).get(key)) for key in ("oldest_point", "newest_point")}


def _point(known: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if known is None:
        return None
    from vrep.recovery.history import format_time

    time_ns = int(known["wall_ns"])
    return {"point": known["point"], "time": format_time(time_ns) if time_ns else None}


def verdict(status: Mapping[str, Any], limits: StatusConfig | None = None) -> tuple[int, list[str]]:
    """For `vrep status --check`: 0 well, 1 warning, 2 critical, and why."""
    limits = limits or StatusConfig()
    worst, reasons = WELL, []
    for role, runs in status["roles"].items():
        needed = role == "target" or any(g["role"] == "source" for g in status["groups"].values())
        if needed and not runs:
            worst = CRITICAL
            reasons.append(f"the {role} process does not run")
    for name, group in status["groups"].items():
        level = _level(group)
        also = f" ({', '.join(group['conditions'])})" if group["conditions"] else ""
        words = [f"{group['state']}{also}"] if level != WELL else []
        for target in group.get("targets", ()):
            late = _late(group, target, limits)
            if late != WELL:
                age = f"{target['rpo_ms'] / 1000:.1f} s"
                words.append(
                    f"the oldest write that is not durable at {target['site']} is {age} old"
                )
            level = max(level, late)
        if words:
            reasons.append(f"{name}: {'; '.join(words)}")
        worst = max(worst, level)
    return worst, reasons


def _level(group: Mapping[str, Any]) -> int:
    """How bad a group's state and conditions are."""
    quiet = HARMLESS.issuperset(group["conditions"])
    if quiet and group["state"] == "offline" and "unprotected" in group["conditions"]:
        return WELL  # its source gave it up: that nothing comes was asked for
    if group["state"] in CRITICAL_STATES or CRITICAL_CONDITIONS & set(group["conditions"]):
        return CRITICAL
    if group["state"] != "replicating" or not quiet:
        return WARNING
    return WELL


def _late(group: Mapping[str, Any], target: Mapping[str, Any], limits: StatusConfig) -> int:
    """How bad a target's RPO is, whatever the state: a session that stands proves nothing about
    what is durable. A first sync has nothing to lose yet."""
    if group["state"] == "initial-sync" or target["rpo_ms"] is None:
        return WELL  # who would know does not answer: that is what is wrong
    if target["rpo_ms"] >= limits.rpo_critical_s * 1000:
        return CRITICAL
    return WARNING if target["rpo_ms"] >= limits.rpo_warning_s * 1000 else WELL


__all__ = ["CRITICAL", "STATES", "WARNING", "WELL", "collect", "verdict"]
