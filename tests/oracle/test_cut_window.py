"""A window of a lane goes up to a cut that its source knows, but not while another lane may have
lost its part of it."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from recovery_lab import Lab
from test_cuts import Group

from vrep import errors
from vrep.lanes import lane_id
from vrep.target.manifest import DiskEntry, Position
from vrep.target.receive import GroupHost
from vrep.target.session import Session
from vrep.target.store import StoreOptions
from vrep.wire import messages as m


@pytest.fixture
def group(tmp_path: Path, rng: random.Random) -> Iterator[Group]:
    made = Group(tmp_path / "site", rng, lanes=3)
    yield made
    made.close()


def hosts_of(group: Group) -> list[GroupHost]:
    hosts: list[GroupHost] = []
    for lane in group.lanes:
        host = GroupHost(
            lane.paths.store, lane.group_id, StoreOptions(), 1 << 20, all_hosts=lambda: hosts
        )
        host._store = lane.store
        hosts.append(host)
    return hosts


def told(group: Group, hosts: list[GroupHost], cut: list[Position], lane: int) -> Position:
    """What the target believes of a lane after its source has said which cut is durable."""
    host, store = hosts[lane], group.lanes[lane].store
    transport: Any = mock.Mock(peer=None)
    session = Session(store, store.manifest.current_epoch, transport, 1, list, host._cuts_stand)
    values = {"cut-epoch": cut[lane].epoch, "cut-seq": cut[lane].seq}
    session.note(m.Status(time_ns=time.time_ns(), state="replicating", values=values))
    newest: Position = store._newest_cut
    return newest


def test_a_cut_is_not_believed_while_a_lane_is_in_a_gap(group: Group) -> None:
    cut = group.cut()
    group.commit()
    hosts = hosts_of(group)
    group.lanes[1].gap_begin()
    group.lanes[1].commit()
    assert told(group, hosts, cut, 0) == Position()
    assert told(group, hosts, cut, 1) == Position()
    group.lanes[1].gap_end()
    group.lanes[1].commit()
    assert told(group, hosts, cut, 0) == cut[0]


def test_a_cut_is_not_believed_while_a_lane_cannot_be_read(group: Group) -> None:
    cut = group.cut()
    group.commit()
    hosts = hosts_of(group)
    hosts[2]._store, hosts[2].error = None, errors.CorruptError("a manifest")
    assert told(group, hosts, cut, 0) == Position()
    hosts[2]._store, hosts[2].error = group.lanes[2].store, None
    assert told(group, hosts, cut, 0) == cut[0]


def test_a_lane_without_points_yet_keeps_no_window(group: Group, rng: random.Random) -> None:
    """One that joins is copied for days, perhaps, and in no cut meanwhile; another group's gap is
    its own matter."""
    disk = [DiskEntry("disk", 1 << 20, 0)]
    joining = Lab(group.root, disk, rng, name="web@3", group_id=lane_id(group.group_id, 3))
    other = Lab(group.root, disk, rng, name="mail")
    other.sync()
    for one in (joining, other):
        one.gap_begin()
        one.commit()
    cut = group.cut()
    group.commit()
    hosts = hosts_of(group)
    for one in (joining, other):
        hosts.append(GroupHost(one.paths.store, one.group_id, StoreOptions(), 1 << 20))
        hosts[-1]._store = one.store
    assert [one.store.in_gap for one in (joining, other)] == [False, True]
    assert told(group, hosts, cut, 0) == cut[0]
    for one in (joining, other):
        one.close()
