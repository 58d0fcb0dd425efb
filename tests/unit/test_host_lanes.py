"""What another host of a group may say, and what of it is believed. Real ones are in
`tests/e2e/test_hosts.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vrep import errors
from vrep.app.host_lanes import HostLanes
from vrep.groups import VERSION, DiskDefinition, GroupDefinition, GroupDirectory
from vrep.keys import SiteIdentity
from vrep.lanes import LANES_MAX
from vrep.wire import messages as m

LEADER = "a" * 32


class Source:
    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        assert method == "cut_look"
        self.told.append(params)
        return {"lanes": {}}


@pytest.fixture
def lanes(tmp_path: Path) -> HostLanes:
    """Lane 1 is here; the leader has lane 0."""
    from vrep.paths import SitePaths

    mine = SiteIdentity.create(tmp_path, "south").site_id
    groups = GroupDirectory(tmp_path)
    groups.store(
        GroupDefinition(
            version=VERSION, group_id="1" * 28 + "0001", name="web@1",
            disks=(DiskDefinition("root", "file:/nowhere", 1 << 20, 0),),
            to_site="d" * 32, key="acme", tenant_key_id="00" * 8, epoch=1, epoch_id="2" * 32,
            wrapped_keys=(), created=0.0, lanes=(0, 1), hosts=((0, LEADER), (1, mine)),
            numbered=7,
        )
    )  # fmt: skip
    made = HostLanes(SitePaths(tmp_path))
    made._source = Source()  # type: ignore[assignment]
    return made


def said(lanes: HostLanes, **changes: Any) -> dict[str, Any]:
    return {
        "group_id": "1" * 28 + "0000",
        "hosts": [[0, LEADER], [1, lanes._site_id], [2, "b" * 32]],
        "numbered": 8,
        "leads": True,
        "whole": [[1, 0, 10], [1, 1, 11]],
        "newest": {"point": "pos:1/0/10", "wall_ns": 5},
        **changes,
    }


def test_who_leads_says_who_came(lanes: HostLanes) -> None:
    lanes.answer(LEADER, m.LANES_LOOK, said(lanes))
    found = lanes._groups.load("web@1")
    assert (found.lanes, found.numbered) == ((0, 1, 2), 8)
    assert lanes._source.told[0]["newest"] == {  # type: ignore[attr-defined]
        "point": "pos:1/0/10",
        "wall_ns": 5,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"hosts": [[99, "b" * 32]]},
        {"hosts": [[-1, "b" * 32]]},
        {"hosts": [[2, "../../etc"]]},
        {"hosts": [[2, "b" * 32]] * 1000},
        {"hosts": [[2, "b" * 32], [2, "c" * 32]]},
        {"hosts": "x"},
        {"numbered": 1 << 62},
        {"numbered": -1},
        {"newest": {"point": "pos:1/0/1", "wall_ns": "x"}},
        {"newest": {"point": "p" * 1000, "wall_ns": 1}},
        {"newest": 7},
        {"whole": [[1, 0]]},
        {"whole": [[1, 0, 1 << 70]]},
        {"leads": "yes"},
        {"joining": [64]},
        {"joining": 2},
    ],
)
def test_nonsense_changes_nothing(lanes: HostLanes, changes: dict[str, Any]) -> None:
    before = lanes._groups.load("web@1")
    with pytest.raises(errors.InvalidError, match=r"lanes\.look"):
        lanes.answer(LEADER, m.LANES_LOOK, said(lanes, **changes))
    assert lanes._groups.load("web@1") == before
    assert lanes._source.told == []  # type: ignore[attr-defined]


def test_who_leads_says_who_has_not_come_yet(lanes: HostLanes) -> None:
    lanes.answer(LEADER, m.LANES_LOOK, said(lanes, joining=[2]))
    assert lanes._groups.load("web@1").joining == (2,)
    lanes.answer(LEADER, m.LANES_LOOK, said(lanes))  # of an older release, or they have come
    assert lanes._groups.load("web@1").joining == ()


def test_a_number_that_was_given_is_not_given_again(lanes: HostLanes) -> None:
    lanes.answer(LEADER, m.LANES_LOOK, said(lanes, numbered=3))
    assert lanes._groups.load("web@1").numbered == 7
    assert lanes._groups.load("web@1").numbered <= LANES_MAX


def test_a_stranger_is_not_heard(lanes: HostLanes) -> None:
    with pytest.raises(errors.FencedError):
        lanes.answer("e" * 32, m.LANES_LOOK, said(lanes))
