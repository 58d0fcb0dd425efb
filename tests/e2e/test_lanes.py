"""Groups with several lanes: real processes, dependent writes, cuts, and lanes that go."""

from __future__ import annotations

import random
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from sites import GROUP, MIB, WAIT_S, Client, Pair, wait_until

from vrep import errors
from vrep.app.cli_view import points_text
from vrep.recovery.cuts import Cut, LaneSet, find_lanes
from vrep.recovery.fetch import Fetcher

NUMBER = struct.Struct("<Q")


class Lanes(Pair):
    """Two disks in two lanes."""

    def protect(self) -> None:
        self.definition = self.a.protect(
            GROUP,
            {name: f"file:{path}" for name, path in self.images.items()},
            to="beta",
            key="acme",
            options=self.options,
            lanes=len(self.images),
        )

    def lane(self, number: int) -> dict[str, Any]:
        found: dict[str, Any] = self.a.status(GROUP)["groups"][f"{GROUP}@{number}"]
        return found

    def settled(self) -> dict[str, Any] | None:
        groups = self.a.status(GROUP)["groups"]
        done = len(groups) == len(self.images) and all(
            one["state"] == "replicating"
            and one["targets"][0]["seq"] == one["targets"][0]["durable_seq"]
            for one in groups.values()
        )
        self.last_status = groups
        return groups if done else None

    def cuts(self) -> list[Cut]:
        held = find_lanes(self.b.paths, GROUP)
        if held is None:
            return []
        with LaneSet(self.b.paths, held) as lanes:
            return lanes.cuts()

    def numbers(self) -> list[tuple[Cut, list[int]]]:
        """What the first eight bytes of each disk are, at every cut."""
        held = find_lanes(self.b.paths, GROUP)
        assert held is not None
        found = []
        with LaneSet(self.b.paths, held) as lanes:
            for cut in lanes.cuts():
                values = []
                for at in cut.at:
                    lane = lanes.lane(at.lane)
                    assert lane is not None
                    extents = lane.reader.extent_map(at)
                    data = Fetcher(lane.reader, extents, lane.access).read(0, 0, 8)
                    values.append(NUMBER.unpack(data)[0] if data is not None else 0)
                found.append((cut, values))
        return found


@pytest.fixture
def pair() -> Iterator[Lanes]:
    made = Lanes(
        disks={"first": 16 * MIB, "second": 16 * MIB},
        source_settings="cut_every_s = 0.05\nlane_gone_s = 1.0",
    )
    try:
        yield made.up(settle=False)
    finally:
        made.close()


class Dependent:
    """Writes n to the first disk, when that is acknowledged to the second, and so on."""

    def __init__(self, pair: Lanes, *, patient: bool = False) -> None:
        self._pair = pair
        self._patient = patient
        self._stop = threading.Event()
        self.written = 0
        self.error: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._run, daemon=True),
            *(
                threading.Thread(target=self._load, args=(name,), daemon=True)
                for name in pair.images
            ),
        ]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with self._pair.client("first") as first, self._pair.client("second") as second:
                    while not self._stop.is_set():
                        n = self.written + 1  # what was cut off is done again
                        first.write(0, NUMBER.pack(n) + bytes(504))
                        second.write(0, NUMBER.pack(n) + bytes(504))
                        self.written = n
            except (OSError, errors.VrepError) as error:
                if not self._patient:
                    self.error = error
                    return
                time.sleep(0.05)  # the filter is gone for a moment
            except BaseException as error:  # noqa: BLE001 - told by stop
                self.error = error
                return

    def _load(self, name: str) -> None:
        """Others write as well, so that a lane has more to do than the other."""
        at = 0
        while not self._stop.is_set():
            try:
                with self._pair.client(name) as client:
                    while not self._stop.is_set():
                        at = (at + 65536) % (8 * MIB)
                        client.write(MIB + at, bytes([at % 251]) * 65536)
                        time.sleep(0.008)  # the ring outlasts a target that stalls for seconds
            except (OSError, errors.VrepError) as error:
                if not self._patient:
                    self.error = error
                    return
                time.sleep(0.05)

    def stop(self) -> int:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if self.error is not None:
            raise self.error
        return self.written


def assert_never_torn(found: list[tuple[Cut, list[int]]], least: int) -> None:
    """The second disk is never ahead of the first, and at most one write behind. A cut without a
    lane, whose disk was opened late, says nothing of that."""
    whole = [values for cut, values in found if not cut.absent]
    assert len(whole) >= least
    assert not [values for values in whole if not values[1] <= values[0] <= values[1] + 1]


def test_dependent_writes_are_never_torn_apart(pair: Lanes) -> None:
    """At every cut the second disk is never ahead of the first, and at most one write behind."""
    pair.settle()
    begun = len(pair.cuts())
    load = Dependent(pair)
    wait_until("there are some cuts", lambda: len(pair.cuts()) >= 6)
    time.sleep(2)
    wait_until("there are some writes", lambda: load.written > 100)
    marks = [pair.a.checkpoint(GROUP, f"mark-{i}", wait_s=WAIT_S) for i in range(3)]
    written = load.stop()
    pair.settle()
    last = pair.a.checkpoint(GROUP, "last", wait_s=WAIT_S)
    found = pair.numbers()
    print(f"{written} dependent writes, {len(found)} cuts", pair.lane(0)["cuts"])
    assert_never_torn(found, 4)
    assert not [cut for cut, _values in found[begun:] if cut.absent]
    assert [cut.label for cut, _values in found if cut.label] == [
        "mark-0", "mark-1", "mark-2", "last",
    ]  # fmt: skip
    assert found[-1][1] == [written, written]
    assert len({tuple(values) for _cut, values in found}) > 1  # they are of different instants
    by_label = {cut.label: cut.point for cut, _values in found}
    assert by_label["last"] == last["point"]
    assert by_label["mark-1"] == marks[1]["point"]
    for name in pair.images:
        status = pair.lane(["first", "second"].index(name))["filter"]
        assert status["cuts"] >= len(found)
        assert status["cut_hold_ns_max"] < 1_000_000_000
    pair.same_as_source()
    pair.b.test_stop(GROUP)
    pair.alive()


def test_no_cut_survives_a_kill_that_tore_it(pair: Lanes, rng: random.Random) -> None:
    """The filter dies at any moment, between a hold and its mark too, and the source."""
    pair.settle()
    load = Dependent(pair, patient=True)
    for _round in range(4):
        time.sleep(rng.uniform(0.3, 1.2))
        victim = rng.choice(["filter", "filter", "source"])
        pair.kill(victim)
        pair.start(victim)
        wait_until("it is back", lambda: pair.a.running("filter") and pair.a.running("source"))
    # What is stopped between its two writes by a kill would leave the disks one apart.
    so_far = load.written
    wait_until("the load goes on", lambda: load.written > so_far)
    wait_until("there are some cuts", lambda: len([c for c in pair.cuts() if not c.absent]) >= 3)
    written = load.stop()
    pair.settle()
    pair.a.checkpoint(GROUP, "last", wait_s=WAIT_S)
    found = pair.numbers()
    print(f"{written} dependent writes, {len(found)} cuts")
    assert_never_torn(found, 3)
    assert found[-1][1] == [written, written]
    pair.same_as_source()
    pair.b.test_stop(GROUP)


def all_is_cut(pair: Lanes) -> bool:
    """Whether the newest cut, with its record in the first lane, is the last that there is: one
    that was void is tried again, ever later."""
    newest = pair.cuts()[-1]
    first, second = newest.of(0), newest.of(1)
    heads = [pair.lane(number)["targets"][0]["seq"] for number in (0, 1)]
    return (
        first is not None
        and second is not None
        and newest.completed.seq == first.seq + 1
        and heads == [newest.completed.seq, second.seq]
    )


def test_points_are_cuts_and_status_shows_them(pair: Lanes) -> None:
    pair.settle()
    with pair.client("first") as client:
        client.write(0, b"x" * 512)
    wait_until("a cut is durable", lambda: pair.lane(0)["targets"][0]["newest_point"])
    point = pair.lane(1)["targets"][0]["newest_point"]["point"]
    assert point in [cut.point for cut in pair.cuts()]
    stored = pair.b.status(f"{GROUP}@0")["groups"][f"{GROUP}@0"]
    assert stored["newest_point"] is None  # a lane alone offers nothing
    points = pair.b.points(GROUP)
    assert points.verdict.whole
    assert points.ranges == []
    assert points.newest is not None
    assert f"cut 1 of {len(points.cuts)}" in points_text(points)
    # Nothing is written: nothing is cut.
    wait_until("the last write is cut", lambda: all_is_cut(pair))
    time.sleep(0.5)
    made = pair.lane(0)["cuts"]["made"]
    time.sleep(0.5)
    assert pair.lane(0)["cuts"]["made"] == made


def test_a_lane_that_is_gone_is_left_out_and_comes_back(pair: Lanes) -> None:
    pair.settle()
    with pair.client("first") as client:
        client.write(0, b"1" * 512)
    whole = pair.a.checkpoint(GROUP, "whole", wait_s=WAIT_S)
    assert whole["absent"] == []
    # The host lost the second disk: its lane cannot be served when the filter comes back.
    pair.kill("filter")
    image = pair.images["second"]
    image.rename(image.with_suffix(".away"))
    pair.start("filter")
    wait_until("the first lane is served", lambda: pair.lane(0)["filter"])
    with Client(pair.a.disk_uri(GROUP, "first")) as client:
        client.write(0, b"2" * 512)
    wait_until("cuts go on", lambda: "lane-absent" in pair.lane(0)["conditions"])
    part = pair.a.checkpoint(GROUP, "part", wait_s=WAIT_S)
    assert part["absent"] == [1]
    with pytest.raises(errors.PointNotFoundError, match="lane 1 had no part"):
        pair.b.test_start(GROUP)
    view = pair.b.test_start(GROUP, "part")
    assert [disk.name for disk in view.disks] == ["first"]
    pair.b.test_stop(GROUP)
    # It comes back as the same lane: its map is intact.
    image.with_suffix(".away").rename(image)
    wait_until("the lane is back", lambda: pair.lane(1)["filter"])
    wait_until("cuts are whole", lambda: "lane-absent" not in pair.lane(0)["conditions"])
    pair.settle()
    again = pair.a.checkpoint(GROUP, "again", wait_s=WAIT_S)
    assert again["absent"] == []
    copied = pair.lane(1)["filter"]["resync_bytes"]
    assert copied <= MIB, "a lane that comes back is not copied whole"
    assert [c.label for c in pair.cuts() if c.label] == ["whole", "part", "again"]
    pair.same_as_source()
    pair.b.test_stop(GROUP)


def test_a_lane_that_is_dropped_is_not_missed(pair: Lanes) -> None:
    pair.settle()
    pair.a.unprotect(f"{GROUP}@1")
    with pair.client("first") as client:
        client.write(0, b"1" * 512)
    mark = pair.a.checkpoint(GROUP, "alone", wait_s=WAIT_S)
    assert mark["absent"] == []
    view = pair.b.test_start(GROUP)
    assert [disk.name for disk in view.disks] == ["first"]
    pair.b.test_stop(GROUP)


def test_failover_of_all_lanes_under_load(pair: Lanes) -> None:
    pair.settle()
    load = Dependent(pair)
    time.sleep(1)
    pair.a.checkpoint(GROUP, "before", wait_s=WAIT_S)
    with pytest.raises(errors.SourceAliveError):
        pair.b.failover_start(GROUP)
    assert pair.b.tests() == []
    load.stop()
    view = pair.b.failover_start(GROUP, "before", force=True)
    values = []
    for disk in view.disks:
        with Client(disk.uri, 60.0) as client:
            values.append(NUMBER.unpack(client.read(0, 8))[0])
    assert values[1] <= values[0] <= values[1] + 1
    wait_until("the source is fenced", lambda: "fenced" in pair.lane(0)["conditions"])
    wait_until("in every lane", lambda: "fenced" in pair.lane(1)["conditions"])
    pair.b.failover_rollback(GROUP)
    wait_until("the source writes again", lambda: "fenced" not in pair.lane(1)["conditions"])
    with pair.client("second") as client:
        client.write(4096, b"z" * 512)
    pair.settle()
    pair.a.checkpoint(GROUP, "after", wait_s=WAIT_S)
    assert [c.label for c in pair.cuts() if c.label] == ["before", "after"]
    pair.same_as_source()
    pair.b.test_stop(GROUP)
