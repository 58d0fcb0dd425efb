"""Status: every group is reported, whatever is wrong with another, and the verdict is honest."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vrep.app.cli_status import text_of
from vrep.app.metrics import SiteCollector, samples
from vrep.control import ControlServer
from vrep.errors import BusyError, NotFoundError, StateError
from vrep.groups import DiskDefinition, GroupDefinition
from vrep.recovery.view import RecordedDisk, ViewDirectory, ViewRecord
from vrep.settings import StatusConfig
from vrep.site import Site
from vrep.status import CRITICAL, WARNING, WELL, verdict
from vrep.target.manifest import DiskEntry, EpochEntry, EpochState, Position
from vrep.target.store import GroupStore, StoreOptions, StoreSpec

EAST = "11" * 16
STORED = bytes.fromhex("33" * 16)
FILTERED: dict[str, Any] = {
    "head": 9, "durable": 9, "oldest_ns": 0, "ring_bytes": 100, "ring_free_bytes": 100,
    "dirty_bytes": 0, "unshipped_bytes": 0, "total_bytes": 4096, "gap": False, "gap_seq": 0,
    "unverified": "", "flush_failed": False, "clients": 1, "guest_paused": False, "handover": "",
    "compared_bytes": 4, "equal_bytes": 3,
}  # fmt: skip
SESSION: dict[str, Any] = {
    "connected": True, "fenced": False, "conditions": [], "error": "", "received_seq": 9,
    "bytes_sent": 1, "records_sent": 1, "round_trip_s": None,
    "delta": {"hash_bytes": 20, "question_bytes": 3, "on": True},
}  # fmt: skip


class Rig:
    """A site, and processes of it that say what the test wants."""

    def __init__(self, root: Path, stack: contextlib.ExitStack) -> None:
        self.site = Site.init(root, name="west")
        self._stack = stack

    def add(self, name: str, **changes: Any) -> Path:
        """Protect a group; its definition's file."""
        self.site.groups.store(
            GroupDefinition(
                version=1,
                group_id=name.encode().ljust(16, b".").hex(),
                name=name,
                disks=(DiskDefinition("root", f"file:/{name}.raw", 4096, 0),),
                to_site=EAST,
                key="acme",
                tenant_key_id="",
                epoch=1,
                epoch_id="22" * 16,
                wrapped_keys=(),
                created=0.0,
                **changes,
            )
        )
        return self.site.groups.path(name) / "group.json"

    def serve(self, role: str, answer: Callable[[], Mapping[str, Any]]) -> ControlServer:
        run = self.site.paths.make_run()
        server = ControlServer(run / f"{role}.sock", {"status": lambda _params: answer()})
        return self._stack.enter_context(server)

    def run(self, groups: Mapping[str, Any], sessions: Mapping[str, Any]) -> None:
        """All three roles."""
        self.serve("filter", lambda: groups)
        self.serve("source", lambda: sessions)
        self.serve("target", lambda: {"groups": {}})

    def store(self, name: str, writer: bytes = b"w" * 16) -> None:
        """Hold the history of a group."""
        epoch = EpochEntry(1, EpochState.ACCEPTED, b"e" * 16, writer, Position(), 1)
        spec = StoreSpec(name, [DiskEntry("root", 4096, 0)], epoch)
        options = StoreOptions(reserve_bytes=0)
        GroupStore.open(self.site.paths.store, STORED, create=spec, options=options).close()

    def view(self, view_id: str, *, kind: str, serve: bool, state: str = "serving") -> None:
        """A recovered disk of the group that is held."""
        view = ViewDirectory(self.site.paths, view_id)
        view.create(
            ViewRecord(
                version=1,
                id=view_id,
                kind=kind,
                group_id=STORED.hex(),
                group="mail",
                asked="latest",
                point=(1, 0, 1),
                wall_ns=0,
                ancestry=[],
                disks=[RecordedDisk("root", 4096, 0)],
                created_ns=0,
                state=state,
            )
        )
        if serve:
            self.serve(f"view-{view_id}", dict)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with contextlib.ExitStack() as stack:
        yield Rig(tmp_path / "site", stack)


@pytest.mark.parametrize("kind", ["test", "failover"])
def test_a_history_that_a_view_reads_is_kept(rig: Rig, kind: str) -> None:
    """Also while the view does not run: what it has not fetched stands there alone."""
    rig.store("mail")
    told: list[Mapping[str, Any]] = []
    rig.site.paths.make_run()
    rig.view("v1", kind=kind, serve=False)
    with ControlServer(rig.site.paths.socket("target"), {"delete_unprotected": told.append}):
        with pytest.raises(BusyError, match="v1"):
            rig.site.unprotect("mail", delete_history=True)
        ViewDirectory(rig.site.paths, "v1").remove()
        assert told == []
        rig.site.unprotect("mail", delete_history=True)
    assert told == [{"group_id": STORED.hex()}]


def test_a_site_does_not_delete_what_it_writes(rig: Rig) -> None:
    rig.store("mail", writer=bytes.fromhex(rig.site.identity.site_id))
    with pytest.raises(StateError, match="took 'mail' over"):
        rig.site.unprotect("mail", delete_history=True)


def spoil(definition: Path) -> None:
    raw = json.loads(definition.read_bytes())
    raw["epoch"] = "one"
    definition.write_text(json.dumps(raw))


# ---- what can be recovered --------------------------------------------------------------------


def test_the_points_of_a_target_are_shown(rig: Rig) -> None:
    rig.add("web")
    rig.add("quiet")
    oldest = {"point": "pos:1/0/2", "wall_ns": 1_800_000_000_000_000_000}
    newest = {"point": "pos:1/0/9", "wall_ns": 0}
    rig.run(
        {"web": FILTERED, "quiet": FILTERED},
        {"web": {**SESSION, "oldest_point": oldest, "newest_point": newest}, "quiet": SESSION},
    )
    groups = rig.site.status()["groups"]
    shown = groups["web"]["targets"][0]
    assert shown["oldest_point"] == {"point": "pos:1/0/2", "time": "2027-01-15T08:00:00.000000Z"}
    assert shown["newest_point"] == {"point": "pos:1/0/9", "time": None}
    told_nothing = groups["quiet"]["targets"][0]
    assert told_nothing["oldest_point"] is told_nothing["newest_point"] is None


# ---- what is wrong with one group ----------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"version": 1}', None], ids=ascii)
def test_a_group_that_cannot_be_read_hides_no_other(rig: Rig, content: bytes | None) -> None:
    rig.add("good")
    bad = rig.add("bad")
    if content is None:
        spoil(bad)
    else:
        bad.write_bytes(content)
    # The filter goes on serving what it had opened.
    rig.run({"good": FILTERED, "bad": FILTERED}, {"good": SESSION, "bad": SESSION})
    status = rig.site.status()
    assert status["groups"]["good"]["state"] == "replicating"
    assert status["groups"]["bad"]["state"] == "error"
    assert status["groups"]["bad"]["conditions"] == ["unreadable"]
    assert str(bad) in status["groups"]["bad"]["error"]
    assert list(rig.site.status("good")["groups"]) == ["good"]
    code, reasons = rig.site.verdict(status)
    assert (code, reasons) == (CRITICAL, ["bad: error (unreadable)"])
    assert f"bad: Stored or received bytes are damaged: {bad}" in text_of(status)
    states = {key[0] for key in values(rig.site, "vrep_group_state")}
    assert states == {"good", "bad"}


def values(site: Site, metric: str) -> dict[tuple[str, ...], float]:
    found = samples("west", site.status())
    assert list(SiteCollector(site).collect())
    return {labels: value for name, labels, value in found if name == metric}


def test_a_group_that_cannot_be_read_stops_nothing(rig: Rig, tmp_path: Path) -> None:
    site = rig.site
    site.key_create("acme")
    east = Site.init(tmp_path / "east", name="east").identity
    peer = site.peers.check(
        name="east",
        site_id=east.site_id,
        certificate=east.certificate_pem,
        address="",
        joined=site.keys.list()[0].created,
    )
    site.peers.add(peer)
    rig.add("bad").write_text("{")
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(4096))
    uris = {"root": f"file:{disk}"}
    site.protect("web", uris, to="east", key="acme", accept_key_loss=True)
    site.unprotect("web")
    site.remove_peer("east")
    # It can be got rid of; only what needs its definition cannot be done.
    with pytest.raises(Exception, match=r"group\.json"):
        site.unprotect("bad", delete_history=True)
    site.unprotect("bad")
    assert site.status()["groups"] == {}
    with pytest.raises(NotFoundError, match="'bad'"):
        site.unprotect("bad")


def test_the_error_with_which_a_session_paused_is_none(rig: Rig) -> None:
    ended = {**SESSION, "connected": False, "error": "The connection was lost: closed here"}
    rig.add("web", paused=True)
    rig.add("mail")
    rig.run({"web": FILTERED, "mail": FILTERED}, {"web": ended, "mail": ended})
    groups = rig.site.status()["groups"]
    assert (groups["web"]["state"], groups["web"]["error"]) == ("paused", "")
    assert groups["mail"]["error"] == ended["error"]


# ---- a process that does not answer ----------------------------------------------------------

FILTER_KNOWS = {
    "rpo_ms", "seq", "durable_seq", "lag_bytes", "dirty_bytes", "unshipped_bytes", "total_bytes",
    "resync_bytes", "compared_bytes", "equal_bytes",
}  # fmt: skip
SOURCE_KNOWS = {
    "received_seq", "lag_bytes", "spill_bytes", "spill_quota_bytes", "bytes_sent", "records_sent",
    "hash_bytes", "lost_bytes",
}  # fmt: skip
SPILL = {"bytes": 7, "quota_bytes": 9, "oldest_ns": 0, "full": "", "whole_in_s": None}
NEVER_NUMBERS = {
    "site", "connected", "comparing", "oldest_point", "newest_point", "whole_in_s",
    "missing_bytes", "compression", "round_trip_ms",
}  # fmt: skip


@pytest.mark.parametrize("down", [set(), {"filter"}, {"source"}, {"filter", "source"}])
def test_a_figure_that_nobody_knows_is_no_zero(rig: Rig, down: set[str]) -> None:
    rig.add("web")
    for role, answer in (("filter", FILTERED), ("source", {**SESSION, "spill": SPILL})):
        if role not in down:
            rig.serve(role, lambda said={"web": answer}: said)
    rig.serve("target", lambda: {"groups": {}})
    group = rig.site.status()["groups"]["web"]
    (target,) = group["targets"]
    unknown = (FILTER_KNOWS if "filter" in down else set()) | (
        SOURCE_KNOWS if "source" in down else set()
    )
    figures = {name: value for name, value in target.items() if name not in NEVER_NUMBERS}
    assert {name for name, value in figures.items() if value is None} == unknown
    assert set(figures) == FILTER_KNOWS | SOURCE_KNOWS
    assert (group["clients"] is None) == ("filter" in down)
    found = {name for name, _labels, _value in samples("west", rig.site.status())}
    assert ("vrep_target_rpo_seconds" in found) == ("filter" not in down)
    assert ("vrep_target_lag_bytes" in found) == (not down)
    assert ("vrep_target_sent_bytes_total" in found) == ("source" not in down)
    assert ("vrep_group_clients" in found) == ("filter" not in down)
    assert "vrep_target_connected" in found
    code, _reasons = rig.site.verdict(rig.site.status())
    assert code == (CRITICAL if down else WARNING)  # it spills
    text_of(rig.site.status())


def test_a_spill_tells_its_age_without_the_filter(rig: Rig) -> None:
    rig.add("web")
    oldest_ns = time.time_ns() - 60_000_000_000
    rig.serve("source", lambda: {"web": {**SESSION, "spill": {**SPILL, "oldest_ns": oldest_ns}}})
    (target,) = rig.site.status()["groups"]["web"]["targets"]
    assert 60_000 <= target["rpo_ms"] < 120_000
    assert target["lag_bytes"] is None


def test_what_was_not_taken_is_not_known_without_the_filter(rig: Rig) -> None:
    rig.add("web", fenced=True)
    assert rig.site.status()["groups"]["web"]["untaken"]["bytes"] is None
    rig.serve("filter", lambda: {"web": {**FILTERED, "dirty_bytes": 65536}})
    assert rig.site.status()["groups"]["web"]["untaken"]["bytes"] == 65536


# ---- what is held here -----------------------------------------------------------------------


def test_what_is_held_is_shown_while_the_target_is_down(rig: Rig) -> None:
    rig.store("mail")
    for named in ("mail", STORED.hex()):
        groups = rig.site.status(named)["groups"]
        assert list(groups) == ["mail"]
        assert groups["mail"]["state"] == "offline"
        assert groups["mail"]["conditions"] == ["target-down"]
        assert groups["mail"]["disks"] == [{"name": "root", "size": 4096, "index": 0}]
    assert "offline (held here)" in text_of(rig.site.status())
    assert values(rig.site, "vrep_group_condition") == {("mail", "target-down"): 1}
    with pytest.raises(NotFoundError):
        rig.site.status("web")
    for manifest in (rig.site.paths.store / STORED.hex()).glob("manifest-*"):
        manifest.write_bytes(b"x" * manifest.stat().st_size)
    damaged = rig.site.status()["groups"][STORED.hex()]
    assert damaged["state"] == "error"
    assert damaged["error"]


def test_tests_and_views_that_are_down_are_conditions(rig: Rig) -> None:
    rig.store("mail")

    def conditions() -> list[str]:
        group = rig.site.status("mail")["groups"]["mail"]
        assert "vrep_group_condition" in {name for name, _, _ in samples("w", rig.site.status())}
        return [c for c in group["conditions"] if c != "target-down"]

    assert conditions() == []
    rig.view("a1", kind="test", serve=True)
    assert conditions() == ["testing"]
    rig.view("a2", kind="failover", serve=True, state="committed")
    assert conditions() == ["testing"]
    rig.view("a3", kind="test", serve=False, state="starting")
    rig.view("a4", kind="failover", serve=False, state="rolling-back")
    assert conditions() == ["testing"]
    rig.view("a5", kind="failover", serve=False, state="committed")
    assert conditions() == ["testing", "view-down"]


# ---- the verdict -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("age_s", "expected"),
    [(0, WELL), (4, WELL), (6, WARNING), (29, WARNING), (31, CRITICAL), (9999, CRITICAL)],
)
def test_the_verdict_knows_how_old_what_is_not_durable_is(
    rig: Rig, age_s: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_ns = time.time_ns()
    # It stands still: however long this takes, nothing becomes older meanwhile.
    monkeypatch.setattr("vrep.status.time", SimpleNamespace(time_ns=lambda: now_ns))
    oldest_ns = now_ns - age_s * 1_000_000_000 if age_s else 0
    rig.add("web")
    rig.run({"web": {**FILTERED, "head": 10, "oldest_ns": oldest_ns}}, {"web": SESSION})
    status = rig.site.status()
    assert status["groups"]["web"]["state"] == "replicating"  # a session that stands is not enough
    code, reasons = rig.site.verdict(status)
    assert code == expected
    assert [EAST in reason for reason in reasons] == ([True] if expected else [])
    gauges = SiteCollector(rig.site).collect()
    assert [m.samples[0].value for m in gauges if m.name == "vrep_verdict"] == [expected]


def test_the_limits_are_settings(rig: Rig) -> None:
    rig.add("web")
    oldest_ns = time.time_ns() - 10 * 1_000_000_000
    rig.run({"web": {**FILTERED, "oldest_ns": oldest_ns}}, {"web": SESSION})
    for text, expected in (
        ("rpo_warning_s = 60", WELL),
        ("rpo_warning_s = 1", WARNING),
        ("rpo_warning_s = 1\nrpo_critical_s = 2", CRITICAL),
    ):
        rig.site.paths.config.write_text(f"[status]\n{text}\n")
        assert rig.site.verdict(rig.site.status())[0] == expected


def status_of(state: str, conditions: list[str], rpo_ms: int) -> dict[str, Any]:
    target = {"site": "east", "rpo_ms": rpo_ms}
    group = {"role": "source", "state": state, "conditions": conditions, "targets": [target]}
    roles = {"filter": True, "source": True, "target": True}
    return {"roles": roles, "groups": {"web": group}}


@pytest.mark.parametrize(
    ("state", "conditions", "rpo_ms", "expected"),
    [
        ("replicating", ["testing"], 0, WELL),
        ("replicating", ["view-down"], 0, WARNING),
        ("replicating", ["target-full"], 0, CRITICAL),
        ("initial-sync", [], 10**7, WARNING),  # there is nothing to lose yet
        ("resync", [], 10, WARNING),
        ("resync", [], 10**7, CRITICAL),
        ("paused", [], 10**7, CRITICAL),
        ("offline", [], 0, CRITICAL),
    ],
)
def test_verdicts(state: str, conditions: list[str], rpo_ms: int, expected: int) -> None:
    assert verdict(status_of(state, conditions, rpo_ms), StatusConfig())[0] == expected


def test_what_a_session_says_of_its_history(rig: Rig) -> None:
    spill = {
        "bytes": 5 << 20,
        "quota_bytes": 1 << 30,
        "oldest_ns": 0,
        "full": "",
    }
    changes: dict[str, Any] = {"since_ns": 5, "counts": {"spilling": 1}, "missing_bytes": 6 << 20}
    changes["whole_in_s"] = 7.5
    full = {**SESSION, "spill": {**spill, "full": "no room"}}
    for name in ("web", "full", "lost", "part"):
        rig.add(name)
    rig.run(
        dict.fromkeys(("web", "full", "lost", "part"), FILTERED),
        {
            "web": {**SESSION, "spill": spill, "transitions": changes},
            "full": full,
            "lost": {**SESSION, "history_lost": True, "lost_bytes": None},
            "part": {**SESSION, "history_lost": True, "lost_bytes": 65536},
        },
    )
    groups = rig.site.status()["groups"]
    target = groups["web"]["targets"][0]
    assert (groups["web"]["state"], groups["web"]["conditions"]) == ("spilling", [])
    assert (target["spill_bytes"], target["whole_in_s"]) == (5 << 20, 7.5)
    assert target["missing_bytes"] == 6 << 20
    assert groups["web"]["transitions"] == {"since_ns": 5, "counts": {"spilling": 1}}
    assert groups["full"]["transitions"] is None
    assert "spilling, whole in 7.5 s" in text_of(rig.site.status())
    assert target["lag_bytes"] >= 5 << 20
    assert (target["compared_bytes"], target["equal_bytes"], target["hash_bytes"]) == (4, 3, 23)
    assert target["comparing"]
    assert groups["full"]["conditions"] == ["spill-full"]
    assert groups["lost"]["conditions"] == groups["part"]["conditions"] == ["history-lost"]
    lost = [groups[name]["targets"][0]["lost_bytes"] for name in ("web", "lost", "part")]
    assert lost == [0, None, 65536]
