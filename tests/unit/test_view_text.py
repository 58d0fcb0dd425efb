"""What `vrep test list` says of a recovered disk: above all, whether it still needs its view."""

from __future__ import annotations

from typing import Any

import pytest

from vrep.app.cli_view import view_text
from vrep.recovery.view import ViewDisk, ViewInfo

MIB = 1 << 20


def view(kind: str, fill: dict[str, Any]) -> ViewInfo:
    return ViewInfo(
        id="a1", kind=kind, group="web", group_id="22" * 16, point="pos:1/0/7",
        time="2026-03-01T12:00:00.000000Z", state="committed", running=True, pid=7, socket="/s",
        disks=[ViewDisk(name, 8 * MIB, f"nbd+unix:///{name}?socket=/s") for name in ("a", "b")],
        created="2026-03-01T12:00:00.000000Z", epoch=2, since=None, bitmap=None, conditions=[],
        fill=fill,
    )  # fmt: skip


UNDER_WAY = {"done": False, "filled_to": {"a": 8 * MIB, "b": MIB}}
FULL = {"done": True, "filled_to": {"a": 8 * MIB, "b": 8 * MIB}}


@pytest.mark.parametrize(
    ("kind", "fill", "last"),
    [
        ("failover", UNDER_WAY, "  filling: 9.0 MiB of 16.0 MiB"),
        ("failover", {"done": False, "filled_to": {}}, "  filling: 0 B of 16.0 MiB"),
        ("failover", FULL, "  filled: its disks are whole"),
        ("failover", {"web@0": FULL, "web@1": FULL}, "  filled: its disks are whole"),
        (
            "failover",
            {
                "web@0": {"done": True, "filled_to": {"a": 8 * MIB}},
                "web@1": {"done": False, "filled_to": {"b": MIB}},
            },
            "  filling: 9.0 MiB of 16.0 MiB",
        ),
        ("failover", {}, "  b: nbd+unix:///b?socket=/s"),  # its process does not answer
        ("test", {"done": False, "filled_to": {}}, "  b: nbd+unix:///b?socket=/s"),
    ],
)
def test_whether_the_disks_of_a_failover_are_whole(
    kind: str, fill: dict[str, Any], last: str
) -> None:
    assert view_text(view(kind, fill)).splitlines()[-1] == last
