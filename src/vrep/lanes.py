"""Lanes: how the parts of a group that is served by several filter threads are called.

A lane is what a group with one lane is as a whole: a filter thread with its disks, ring, change
map and order, a stream to the target, and a history there. Lane K of group ``web`` is called
``web@K`` wherever a group is named. Its id is the group's, whose last two bytes are zero, with K
(big-endian) in them; the id of lane 0 is the group's. What joins the lanes to one group again are
its cuts: see docs/internals/cuts.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from vrep.errors import InvalidError

__all__ = [
    "GROUP_LETTERS_MAX",
    "LANES_MAX",
    "check_lanes",
    "group_of",
    "is_lane",
    "lane_id",
    "lane_ids_agree",
    "lane_name",
    "lane_of",
    "lanes_among",
]

LANES_MAX: Final = 64
GROUP_LETTERS_MAX: Final = 60
"""of a group's name, so that those of its lanes are names as well"""
_LANE: Final = re.compile(r"(.+)@(0|[1-9][0-9]?)")


def is_lane(name: str) -> bool:
    """Whether a name is that of a lane, and not of a whole group."""
    if "@" not in name:
        return False
    match = _LANE.fullmatch(name)
    return match is not None and int(match[2]) < LANES_MAX


def lane_name(group: str, lane: int) -> str:
    """The name of a lane; InvalidError for a number that no lane has."""
    if not 0 <= lane < LANES_MAX:
        raise InvalidError(f"lanes are numbered 0 to {LANES_MAX - 1}, not {lane}")
    return f"{group}@{lane}"


def group_of(name: str) -> str:
    """The group that a name means: its own, or that of its lane."""
    return name.rpartition("@")[0] if is_lane(name) else name


def lane_of(name: str) -> int:
    """The number of a lane, by its name; 0 for a group that has one lane."""
    return int(name.rpartition("@")[2]) if is_lane(name) else 0


def lane_id(group_id: bytes, lane: int) -> bytes:
    """The id of a lane of the group with this id, or with this lane."""
    return group_id[:14] + lane.to_bytes(2, "big")


def lane_ids_agree(name: str, group_id: bytes, lane: int) -> bool:
    """Whether a name, an id and a lane's number belong together."""
    if not is_lane(name):
        return lane == 0
    return lane_of(name) == lane == int.from_bytes(group_id[14:], "big")


def check_lanes(group: str, lanes: int, disks: int) -> None:
    """InvalidError when a group of this name cannot have so many lanes for its disks here."""
    if not 1 <= lanes <= LANES_MAX or lanes > disks:
        raise InvalidError(f"{disks} disk(s) go to 1 to {min(disks, LANES_MAX)} lanes, not {lanes}")
    if len(group) > GROUP_LETTERS_MAX:
        raise InvalidError(
            f"the name of a group with several lanes has at most {GROUP_LETTERS_MAX} letters"
        )


def lanes_among(group: str, names: Iterable[str]) -> list[str]:
    """Those of some names that are lanes of a group, by their numbers."""
    return sorted(
        (name for name in names if is_lane(name) and group_of(name) == group), key=lane_of
    )
