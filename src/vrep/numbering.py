"""Numbers of lanes: how a group with lanes gets further ones.

Its first lane's definition has the say, at the site that has it, under the lock of its file: a
number is given once, also when its lane has ended. A lane that got one is *joining* until it is
served and whole for the first time (`source.cutter`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from vrep.errors import StateError
from vrep.groups import GroupDefinition, GroupDirectory
from vrep.lanes import LANES_MAX

__all__ = ["give_numbers"]


def give_numbers(
    groups: GroupDirectory,
    names: Sequence[str],
    count: int,
    *,
    own: str,
    site: str,
    has: Collection[int] = (),
) -> tuple[list[int], GroupDefinition]:
    """`count` new lanes for a site, in the definitions `names` of the site `own`, which has the
    group's first lane: their numbers, and what the first definition says then. Lanes that the site
    got before and never served are withdrawn, but those that it `has`."""
    lanes: list[int] = []

    def number(one: GroupDefinition) -> dict[str, Any]:
        hosts = dict(one.hosts) or dict.fromkeys(one.lanes, own)
        if not lanes:  # the first definition has the say
            begin = max(one.numbered, *(lane + 1 for lane in hosts))
            if count < 1 or begin + count > LANES_MAX:
                raise StateError(f"{one.name!r} has had {begin} lanes of {LANES_MAX}")
            lanes.extend(range(begin, begin + count))
        void = {lane for lane in one.joining if hosts.get(lane) == site and lane not in has}
        hosts = {lane: whose for lane, whose in hosts.items() if lane not in void}
        hosts |= dict.fromkeys(lanes, site)
        return {
            "hosts": tuple(sorted(hosts.items())) if set(hosts.values()) != {own} else (),
            "lanes": tuple(sorted(hosts)),
            "joining": tuple(sorted({*one.joining, *lanes} - void)),
            "numbered": lanes[-1] + 1,
        }

    first = groups.revise(names[0], number)
    for name in names[1:]:
        groups.revise(name, number)
    return lanes, first
