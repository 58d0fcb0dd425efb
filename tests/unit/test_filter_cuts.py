"""The part of one host in a cut: its lanes hold, mark, and say whether they held to the end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from structlog.testing import capture_logs

from vrep import errors
from vrep._core.filter import Disk, Group, cut_all, cut_hold, cut_release
from vrep._core.serve import Server
from vrep.app.filter_cuts import FilterCuts
from vrep.groups import VERSION, DiskDefinition, GroupDefinition, GroupDirectory

ONE, OTHER = b"1" * 16, b"2" * 16
T = TypeVar("T")


def lane(root: Path, number: int) -> tuple[Group, Server]:
    """One lane that is served, and whose first sync has ended."""
    place = root / str(number)
    for name in ("shm", "state"):
        (place / name).mkdir(parents=True)
    (place / "disk").write_bytes(bytes(64 << 10))
    made = Group(
        [Disk("root", f"file:{place / 'disk'}")],
        group_id=bytes(14) + number.to_bytes(2, "big"),
        lane=number,
        shm_dir=place / "shm",
        state_dir=place / "state",
        ring_bytes=4 << 20,
        ring_descriptors=1024,
    )
    server = Server(made, unix_path=place / "socket")
    server.start()
    for fd in made.consumer_attach("target"):  # there is room for all that is copied
        os.close(fd)
    made.resync()
    deadline = time.monotonic() + 20
    while made.status()["gap"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return made, server


@pytest.fixture
def lanes(tmp_path: Path) -> Iterator[list[Group]]:
    made = [lane(tmp_path, number) for number in range(2)]
    yield [group for group, _server in made]
    for group, server in made:
        server.stop()
        group.close()


def in_time(cut: Callable[[], T]) -> T:
    """A cut that is made in the end: where the machine is busy, holds end before."""
    for _try in range(200):
        try:
            return cut()
        except errors.TimeLimitError:
            continue
    pytest.fail("no hold lasted")


def test_lanes_hold_until_they_are_told_to_go_on(lanes: list[Group]) -> None:
    def whole() -> list[int]:
        before = [one.status()["cuts"] for one in lanes]
        assert cut_hold(lanes, ONE) == [one.status()["head"] for one in lanes]
        with pytest.raises(errors.TimeLimitError):
            cut_release(lanes, OTHER)  # which they do not hold for
        cut_release(lanes, ONE)
        return [one.status()["cuts"] - cuts for one, cuts in zip(lanes, before, strict=True)]

    assert in_time(whole) == [1, 1]
    assert len(in_time(lambda: cut_all(lanes, OTHER))) == 2  # nothing holds any more


def test_a_hold_that_ended_by_itself_is_no_hold(lanes: list[Group]) -> None:
    in_time(lambda: cut_hold(lanes, ONE, 1.0))
    deadline = time.monotonic() + 20
    while min(one.status()["cuts_void"] for one in lanes) == 0:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    with pytest.raises(errors.TimeLimitError) as late:
        cut_release(lanes, ONE)
    assert late.value.lane == 0  # type: ignore[attr-defined]
    assert [one.status()["cuts"] for one in lanes] == [0, 0]


def test_a_hold_that_one_lane_refuses_leaves_none(lanes: list[Group]) -> None:
    lanes[1].resync(False, everything=True)  # it is in a gap
    with pytest.raises(errors.GoneError) as refused:
        in_time(lambda: cut_hold(lanes, ONE))
    assert refused.value.lane == 1  # type: ignore[attr-defined]
    with pytest.raises(errors.TimeLimitError):
        cut_release(lanes[:1], ONE)
    assert len(in_time(lambda: cut_all(lanes[:1], OTHER))) == 1


def test_no_record_of_a_cut_is_put_into_a_lane_that_is_halted(
    lanes: list[Group], tmp_path: Path
) -> None:
    """A move takes it at the position that it has named."""
    groups = GroupDirectory(tmp_path / "site")
    for number in range(2):
        groups.store(
            GroupDefinition(
                version=VERSION, group_id="0" * 28 + f"{number:04x}", name=f"web@{number}",
                disks=(DiskDefinition("root", "file:/nowhere", 1 << 20, 0),), to_site="d" * 32,
                key="acme", tenant_key_id="", epoch=1, epoch_id="2" * 32, wrapped_keys=(),
                created=0.0, halted=number == 1,
            )
        )  # fmt: skip
    cuts = FilterCuts(groups, lambda name: lanes[int(name[-1])])
    heads = [one.status()["head"] for one in lanes]
    at = [[1, number, head] for number, head in enumerate(heads)]
    asked = {"lane": "web@0", "also": ["web@1"], "cut_id": ONE.hex(), "at": at}
    with capture_logs() as said:
        made = cuts.complete(asked)
        assert (made["seq"], made["also"]) == (heads[0] + 1, {})
        assert [one.status()["head"] for one in lanes] == [heads[0] + 1, heads[1]]
        assert cuts.complete(asked)["also"] == {}
    assert [one["lane"] for one in said] == ["web@1"]  # not with each cut
    groups.update("web@1", halted=False)
    assert cuts.complete(asked)["also"] == {"web@1": heads[1] + 1}
