"""Metrics are API: their names are pinned here, and the reference documents each."""

from __future__ import annotations

import urllib.request
from pathlib import Path
from typing import Any

import pytest

from vrep.app.metrics import METRICS, MetricsServer, samples
from vrep.errors import ConfigError
from vrep.site import Site
from vrep.status import STATES

# Change a line and dashboards break: a release may add, not rename or take away.
PINNED = """
vrep_up gauge site
vrep_role_up gauge role
vrep_verdict gauge
vrep_group_state gauge group,role,state
vrep_group_condition gauge group,condition
vrep_group_epoch gauge group
vrep_group_clients gauge group
vrep_group_size_bytes gauge group,disk
vrep_group_transitions_total counter group,state
vrep_lane_cuts_total counter group
vrep_lane_cuts_void_total counter group
vrep_lane_hold_max_seconds gauge group
vrep_target_connected gauge group,target
vrep_target_rpo_seconds gauge group,target
vrep_target_lag_bytes gauge group,target
vrep_target_spill_bytes gauge group,target
vrep_target_missing_bytes gauge group,target
vrep_target_whole_seconds gauge group,target
vrep_target_dirty_bytes gauge group,target
vrep_target_unshipped_bytes gauge group,target
vrep_target_seq gauge group,target
vrep_target_durable_seq gauge group,target
vrep_target_round_trip_seconds gauge group,target
vrep_target_sent_bytes_total counter group,target
vrep_target_sent_records_total counter group,target
vrep_target_compared_bytes gauge group,target
vrep_target_equal_bytes gauge group,target
vrep_target_hash_bytes_total counter group,target
vrep_store_bytes gauge group
vrep_store_durable_seq gauge group
vrep_store_segments gauge group
vrep_store_quota_bytes gauge group
vrep_store_window_seconds gauge group
vrep_store_folded_bytes_total counter group
vrep_store_write_amplification gauge group
vrep_store_dead_ratio gauge group
vrep_store_stale_bytes gauge group
"""

TARGET = {
    "site": "east", "connected": True, "rpo_ms": 250, "lag_bytes": 1, "dirty_bytes": 2,
    "spill_bytes": 1, "missing_bytes": 12, "whole_in_s": 2.5,
    "unshipped_bytes": 3, "seq": 10, "durable_seq": 9, "round_trip_ms": 1.5, "bytes_sent": 4,
    "records_sent": 5, "compared_bytes": 6, "equal_bytes": 7, "hash_bytes": 8,
}  # fmt: skip
STATUS: dict[str, Any] = {
    "site": {"name": "west"},
    "roles": {"filter": True, "source": False, "target": True},
    "groups": {
        "web": {
            "role": "source", "state": "gap", "conditions": ["fenced"], "epoch": 3, "clients": 1,
            "disks": [{"name": "root", "size": 4096}], "targets": [TARGET],
            "transitions": {"since_ns": 1, "counts": {"gap": 2}},
        },
        "shop@1": {
            "role": "source", "state": "gap", "conditions": [], "epoch": 1, "clients": 0,
            "disks": [], "targets": [], "cuts": {"made": 3},
            "filter": {"cuts": 3, "cuts_void": 1, "cut_hold_ns_max": 2_000_000},
        },
        "mail": {
            "role": "target", "state": "offline", "conditions": [], "epoch": 1, "bytes": 7,
            "durable_seq": 8, "segments": 2, "quota_bytes": 9, "real_window_s": 2.5,
            "folded_bytes": 3, "write_amplification": 1.5, "dead_share": 0.25, "stale_bytes": 0,
        },
        "bad": {"role": "target", "state": "error", "conditions": ["damaged"]},
    },
}  # fmt: skip


def test_names_types_and_labels_are_pinned() -> None:
    lines = [f"{m.name} {m.kind} {','.join(m.labels)}".strip() for m in METRICS]
    assert lines == PINNED.strip().splitlines()


def test_the_reference_documents_each(repository: Path) -> None:
    text = (repository / "docs" / "reference" / "metrics.md").read_text()
    rows = {f"| `{m.name}` | {m.kind} | {', '.join(m.labels)} | {m.help} |" for m in METRICS}
    assert rows == {line for line in text.splitlines() if line.startswith("| `")}


def test_every_value_belongs_to_a_metric() -> None:
    known = {metric.name: metric for metric in METRICS}
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for name, labels, value in samples("west", STATUS):
        assert len(labels) == len(known[name].labels)
        assert labels not in found.setdefault(name, {})
        found[name][labels] = value
    assert set(found) == set(known)
    assert found["vrep_target_rpo_seconds"] == {("web", "east"): 0.25}
    assert found["vrep_target_round_trip_seconds"] == {("web", "east"): 0.0015}
    assert found["vrep_lane_hold_max_seconds"] == {("shop@1",): 0.002}
    assert found["vrep_group_transitions_total"] == {("web", "gap"): 2}
    assert found["vrep_target_whole_seconds"] == {("web", "east"): 2.5}
    assert found["vrep_verdict"] == {(): 2}
    assert found["vrep_role_up"][("source",)] == 0
    states = {k[2]: v for k, v in found["vrep_group_state"].items() if k[0] == "web"}
    assert set(states) == set(STATES)
    assert [state for state, value in states.items() if value] == ["gap"]


def test_served_over_http(tmp_path: Path) -> None:
    site = Site.init(tmp_path / "site", name="west")
    with MetricsServer(site, "127.0.0.1:0") as server:
        with pytest.raises(ConfigError, match="in use"):
            MetricsServer(site, f"127.0.0.1:{server.port}")
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as answer:
            text = answer.read().decode()
    assert 'vrep_up{site="west"} 1.0' in text
    assert 'vrep_role_up{role="filter"} 0.0' in text
    assert "# TYPE vrep_verdict gauge" in text
