"""Cuts over the lanes of a group: what is offered, and that it holds what it must."""

from __future__ import annotations

import random
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import recovery_lab as lab

from vrep import Site, errors
from vrep.lanes import lane_id, lane_name
from vrep.recovery.cuts import Cut, LaneSet, find_lanes
from vrep.recovery.view import ViewDirectory, discard
from vrep.target.aging import Aging, Count, host_steady
from vrep.target.manifest import DiskEntry, Position
from vrep.target.store import GroupStore

BYTES = 1 << 20


class Group:
    """Lanes of one group, written by a source that the test plays; one disk each."""

    def __init__(self, root: Path, rng: random.Random, lanes: int = 2, **options: Any) -> None:
        self.root = root
        self.site = Site(root)
        self.group_id = lane_id(secrets.token_bytes(16), 0)
        self.lanes = [
            lab.Lab(
                root,
                [DiskEntry(f"disk{lane}", BYTES, 0)],
                rng,
                name=lane_name("web", lane),
                group_id=lane_id(self.group_id, lane),
                **options,
            )
            for lane in range(lanes)
        ]
        for lane in self.lanes:
            lane.sync()

    def cut(
        self,
        *,
        label: str = "",
        of: tuple[int, ...] | None = None,
        complete: bool = True,
        coordinator: int = 0,
    ) -> list[Position]:
        """A cut of some lanes; the marks' positions."""
        cut_id = secrets.token_bytes(16)
        chosen = range(len(self.lanes)) if of is None else of
        marks = {lane: self.lanes[lane].cut_mark(cut_id) for lane in chosen}
        at = [tuple(marks.get(lane, (0, lane, 0))) for lane in range(len(self.lanes))]
        if complete:
            self.lanes[coordinator].cut_mark(cut_id, at, label)
        return list(marks.values())

    def commit(self) -> None:
        for lane in self.lanes:
            lane.commit()

    def close(self) -> None:
        for lane in self.lanes:
            lane.close()

    def cuts(self) -> list[Cut]:
        return self.cuts_of(self.lanes)

    def cuts_of(self, lanes: list[Any]) -> list[Cut]:
        """Those that are offered, once what some lanes have is durable."""
        for lane in lanes:
            lane.commit()
        held = find_lanes(self.site.paths, "web")
        assert held is not None
        with LaneSet(self.site.paths, held) as found:
            return found.cuts()


@pytest.fixture
def group(tmp_path: Path, rng: random.Random) -> Iterator[Group]:
    made = Group(tmp_path / "site", rng)
    yield made
    made.close()


def exported(group: Group, at: str, out: Path) -> list[bytes]:
    group.site.export("web", out, at=at)
    return [(out / f"disk{lane}.raw").read_bytes() for lane in range(len(group.lanes))]


def test_every_cut_holds_each_lane_at_its_mark(
    group: Group, rng: random.Random, tmp_path: Path
) -> None:
    expected: list[tuple[list[Position], list[bytes]]] = []
    for _round in range(12):
        for _write in range(rng.randrange(1, 20)):
            rng.choice(group.lanes).random_write()
        at = group.cut(coordinator=rng.randrange(2))
        group.commit()
        disks = [bytes(lane.at(p)[0]) for lane, p in zip(group.lanes, at, strict=True)]
        expected.append((at, disks))
    for lane in group.lanes:
        lane.random_write()  # behind every cut
    assert [list(cut.at) for cut in group.cuts()] == [at for at, _disks in expected]
    for i, (at, disks) in enumerate(expected):
        assert exported(group, f"pos:{rng.choice(at)}", tmp_path / f"out{i}") == disks
    assert exported(group, "latest", tmp_path / "latest") == expected[-1][1]


@pytest.mark.parametrize("gone", ["no", "given up", "silent"])
def test_a_lane_that_a_cut_does_not_name_is_missed(
    tmp_path: Path, rng: random.Random, gone: str
) -> None:
    """Two sites did not hear each other, and one made a cut without the other's lane."""
    group = Group(tmp_path / "site", rng, lanes=3)
    try:
        group.cut()
        if gone == "silent":  # its site was lost, and the others were told so, long ago
            for lane in group.lanes[:2]:
                lane.wall_ns += 100_000_000_000
        for lane in group.lanes:
            lane.wall_ns = max(each.wall_ns for each in group.lanes[:2])
        cut_id = secrets.token_bytes(16)
        at = [tuple(lane.cut_mark(cut_id)) for lane in group.lanes[:2]]
        group.lanes[0].cut_mark(cut_id, at)
        group.commit()
        if gone == "given up":
            group.lanes[2].store.set_unprotected(True)
        if gone == "no":
            with pytest.raises(errors.PointNotFoundError, match="lane 2 had no part"):
                group.site.export("web", tmp_path / "out")
            assert [cut.absent for cut in group.cuts()] == [(), (2,)]
        else:
            group.site.export("web", tmp_path / "out")
            assert group.cuts()[-1].absent == ()
    finally:
        group.close()


def test_what_goes_to_another_target_is_no_point_of_all(
    group: Group, rng: random.Random, tmp_path: Path
) -> None:
    """Each lane goes to a target of its own: the record of a cut is there, what it names is not."""
    (tmp_path / "other").mkdir()
    for lane in group.lanes:
        lane.random_write()
    group.cut(label="both", coordinator=0)
    for lane in group.lanes:
        lane.random_write()
    group.cut(label="elsewhere", coordinator=1)
    group.commit()
    disk = bytes(group.lanes[0].at(group.cuts()[0].at[0])[0])
    group.lanes[1].close()
    stored = group.site.paths.store / group.lanes[1].group_id.hex()
    stored.rename(tmp_path / "other" / stored.name)
    (cut,) = group.cuts_of(group.lanes[:1])
    assert (cut.label, cut.absent, [at.lane for at in cut.at]) == ("both", (1,), [0])
    for at in ("latest", "2100-01-01T00:00:00Z"):
        with pytest.raises(errors.PointNotFoundError, match="lane 1 had no part, or is not held"):
            group.site.export("web", tmp_path / "out", at=at)
    found = group.site.export("web", tmp_path / "out", at="both")
    assert [one.name for one in found.disks] == ["disk0"]
    assert (tmp_path / "out" / "disk0.raw").read_bytes() == disk


def test_a_lane_that_a_stranger_left_does_not_keep_others_from_recovering(
    group: Group, rng: random.Random, tmp_path: Path
) -> None:
    """Who knows the id of a group can send a lane of it, under keys that nobody here has."""
    group.cut()
    group.commit()
    strange = lab.Lab(
        group.root, [DiskEntry("disk9", BYTES, 0)], rng, name="web@9",
        group_id=lane_id(group.group_id, 9),
    )  # fmt: skip
    try:
        strange.sync()
        strange.commit()
        assert strange.store is not None
        strange.store.set_wrapped_keys([b"junk"])
        group.site.export("web", tmp_path / "out")
        assert group.site.points("web").newest is not None
        # One that a cut names is of the group: what is older is not given out in its place.
        cut_id = secrets.token_bytes(16)
        at = [tuple(lane.cut_mark(cut_id)) for lane in (*group.lanes, strange)]
        group.lanes[0].cut_mark(cut_id, at)
        strange.commit()
        group.commit()
        with pytest.raises(errors.VrepError, match="key"):
            group.site.export("web", tmp_path / "more")
    finally:
        strange.close()


def test_what_is_not_completed_by_all_is_no_point(group: Group) -> None:
    group.cut(complete=False)  # void: a hold ended too early
    assert group.cuts() == []
    with pytest.raises(errors.PointNotFoundError, match="no cut over the lanes"):
        group.site.export("web", group.root / "out")
    # The record that completes it is durable, the mark of the other lane is not there.
    cut_id = secrets.token_bytes(16)
    first = group.lanes[0].cut_mark(cut_id)
    missing = Position(1, 1, group.lanes[1].seq + 1)
    group.lanes[0].cut_mark(cut_id, [tuple(first), tuple(missing)], "early")
    assert group.cuts() == []
    group.lanes[1].cut_mark(cut_id)
    assert [cut.label for cut in group.cuts()] == ["early"]


def test_a_position_is_no_point_but_at_a_cut(group: Group) -> None:
    group.lanes[0].write(0, 0, b"x" * 512)
    group.cut()
    last = group.lanes[1].write(0, 0, b"y" * 512)
    group.commit()
    with pytest.raises(errors.PointNotFoundError, match="belongs to no cut"):
        group.site.export("web", group.root / "out", at=f"pos:{last}")


def test_a_forged_vector_is_noticed(group: Group) -> None:
    """The marks that it names are not of this cut."""
    other = group.cut(complete=False)
    cut_id = secrets.token_bytes(16)
    mine = group.lanes[0].cut_mark(cut_id)
    group.lanes[0].cut_mark(cut_id, [tuple(mine), tuple(other[1])])
    group.commit()
    with pytest.raises(errors.CorruptError, match="no mark of that cut"):
        group.site.export("web", group.root / "out")


def test_no_point_lies_in_a_gap_of_any_lane(group: Group) -> None:
    group.cut(label="before")
    group.lanes[1].gap_begin()
    cut_id = secrets.token_bytes(16)
    first, second = group.lanes[0].cut_mark(cut_id), group.lanes[1].cut_mark(cut_id)
    group.lanes[0].cut_mark(cut_id, [tuple(first), tuple(second)], "inside")
    group.lanes[1].gap_end()
    group.cut(label="after")
    assert [cut.label for cut in group.cuts()] == ["before", "after"]


def test_a_lane_that_ended_has_no_part_and_nobody_gets_less_unasked(
    group: Group, tmp_path: Path
) -> None:
    group.lanes[1].write(0, 0, b"b" * 512)
    whole = group.cut(label="whole")
    group.lanes[0].write(0, 0, b"a" * 512)
    (part,) = group.cut(of=(0,), label="part")
    group.commit()
    assert [cut.absent for cut in group.cuts()] == [(), (1,)]
    with pytest.raises(errors.PointNotFoundError, match=f"lane 1 had no part.*disk1.*{whole[0]}"):
        group.site.export("web", tmp_path / "out")
    done = group.site.export("web", tmp_path / "part", at="part")
    assert [disk.name for disk in done.disks] == ["disk0"]
    assert done.point == f"pos:{part}"
    assert (tmp_path / "part" / "disk0.raw").read_bytes()[:512] == b"a" * 512
    both = group.site.export("web", tmp_path / "whole", at="whole")
    assert [disk.name for disk in both.disks] == ["disk0", "disk1"]
    shown = group.site.points("web").cuts
    assert [(cut.label, cut.absent) for cut in shown] == [("whole", []), ("part", [1])]


def test_points_by_label_and_time(group: Group) -> None:
    group.cut(label="one")
    group.lanes[0].write(0, 0, b"a" * 512)
    group.cut(label="two")
    group.cut(label="two")
    cuts = group.cuts()
    with pytest.raises(errors.PointAmbiguousError, match="2 checkpoints"):
        group.site.export("web", group.root / "out", at="two")
    points = group.site.points("web")
    assert [mark.label for mark in points.marks] == ["one", "two", "two"]
    assert points.oldest is not None
    assert points.oldest.point == cuts[0].point
    assert points.ranges == []
    between = group.site.export("web", group.root / "between", at=points.cuts[1].time)
    assert between.point == cuts[1].point
    with pytest.raises(errors.PointNotFoundError, match="nothing is as old"):
        group.site.export("web", group.root / "none", at="2001-01-01T00:00:00Z")


def test_changes_between_two_cuts(group: Group) -> None:
    group.cut(label="one")
    group.lanes[0].write(0, 8192, b"a" * 4096)
    group.lanes[1].write(0, 65536, b"b" * 4096)
    group.cut(label="two")
    group.lanes[1].write(0, 0, b"c" * 4096)
    group.commit()
    found = group.site.changes("web", "one", "two")
    assert {d.name: [(e.offset, e.length) for e in d.extents] for d in found.disks} == {
        "disk0": [(8192, 4096)],
        "disk1": [(65536, 4096)],
    }
    only = group.site.changes("web", "one", "two", disk="disk1")
    assert [disk.name for disk in only.disks] == ["disk1"]
    with pytest.raises(errors.NotFoundError, match="no disk 'disk7'"):
        group.site.changes("web", "one", "two", disk="disk7")


def test_a_fold_by_hand_keeps_the_cuts_from_one_on(group: Group, tmp_path: Path) -> None:
    group.cut(label="old")
    for lane in group.lanes:
        lane.write(0, 0, b"n" * 512)
    group.cut(label="kept")
    group.close()
    group.site.fold("web", "kept")
    for lane in group.lanes:
        lane.open()
    assert [cut.label for cut in group.cuts()] == ["kept"]
    with pytest.raises(errors.PointNotFoundError):
        group.site.export("web", tmp_path / "old", at="old")
    assert exported(group, "kept", tmp_path / "kept") == [
        b"n" * 512 + bytes(BYTES - 512),
        b"n" * 512 + bytes(BYTES - 512),
    ]


def test_no_lane_is_folded_by_itself(group: Group) -> None:
    """What it has now is behind every cut: there would be no point of the group any more."""
    group.cut(label="only")
    for lane in group.lanes:
        lane.write(0, 0, b"n" * 512)
    group.close()
    for name in ("web@1", lane_id(group.group_id, 1).hex()):
        with pytest.raises(errors.InvalidError, match="all lanes of 'web' go together"):
            group.site.fold(name, "latest")
    for lane in group.lanes:
        lane.open()
    assert [cut.label for cut in group.cuts()] == ["only"]


def time_passes(store: GroupStore) -> None:
    """Far more than any window."""
    passed = Count(store._lease.aging.now_ns() + 10**15)
    store._lease.aging = Aging(host_steady, passed)


def test_a_window_never_takes_the_newest_cut(tmp_path: Path, rng: random.Random) -> None:
    """Nothing older than the window is needed, but what the last cut needs."""
    group = Group(tmp_path / "site", rng, segment_bytes=64 << 10, merge=False)
    first, second = group.cut(label="last")
    for lane in group.lanes:
        for _i in range(6):  # a segment each
            lane.write(0, 0, rng.randbytes(60_000))
            lane.commit()
    group.commit()
    store: GroupStore = group.lanes[0].store
    store.set_limits(1, 0)
    time_passes(store)  # everything is older
    assert not store._upkeep.move_horizon()  # no cut is known to be durable with all lanes
    store.note_cut(Position(1, 0, 1 << 40))  # of what is not here nothing is believed
    assert not store._upkeep.move_horizon()
    store.note_cut(first)
    while store._upkeep.move_horizon():
        pass
    assert store.manifest.horizon <= first
    assert [cut.label for cut in group.cuts()] == ["last"]
    newer = group.cut(label="newer")
    for _i in range(6):
        group.lanes[0].write(0, 0, rng.randbytes(60_000))
        group.commit()
    store.note_cut(newer[0])
    time_passes(store)
    assert store._upkeep.move_horizon()
    assert first < store.manifest.horizon <= newer[0]
    assert [cut.label for cut in group.cuts()] == ["newer"]
    assert second.lane == 1
    group.close()


def test_verify_proves_every_lane(group: Group) -> None:
    for lane in group.lanes:
        lane.write(0, 0, b"v" * 4096)
    at = group.cut()
    group.commit()
    report = group.site.verify("web")
    assert report.result == "good"
    assert {f"pos:{position}" for position in at} <= {v.point for v in report.verdicts}
    assert {d.name for v in report.verdicts for d in v.disks} == {"disk0", "disk1"}


def test_a_store_of_a_lane_takes_records_of_that_lane_only(group: Group) -> None:
    wrong = lab.Lab(
        group.root,
        [DiskEntry("x", BYTES, 0)],
        random.Random(0),
        name="other",
        group_id=secrets.token_bytes(16),
    )
    record = wrong.sealer
    assert record is not None
    wrong.name = "web@1"  # seals for lane 1 from here on, into the store of a group without lanes
    with pytest.raises(errors.CorruptError, match="another lane"):
        wrong.start_stream()
    wrong.name = "other"
    wrong.close()


def test_a_hole_in_the_order_of_a_lane_is_refused_after_a_restart(group: Group) -> None:
    lane = group.lanes[1]
    lane.write(0, 0, b"a" * 512)
    lane.close()
    lane.open()
    lane.seq += 1  # one is left out
    with pytest.raises(errors.VrepError):
        lane.start_stream()
    lane.seq -= 1
    lane.start_stream()
    lane.write(0, 0, b"b" * 512)
    lane.commit()


def test_a_lane_whose_manifest_is_damaged_is_not_left_out(group: Group, tmp_path: Path) -> None:
    """It is no lane of another target, whose part of a cut is a point without it."""
    group.cut(label="all")
    group.close()
    newest = max((group.root / "store" / group.lanes[1].group_id.hex()).glob("manifest-*"))
    data = bytearray(newest.read_bytes())
    data[40] ^= 1
    newest.write_bytes(data)
    for name in ("web", group.group_id.hex()):
        with pytest.raises(errors.CorruptError, match="manifest"):
            group.site.export(name, tmp_path / "out", at="all")
    assert not (tmp_path / "out").exists()
    newest.unlink()
    for lane in group.lanes[:1]:
        lane.open()


def test_names_and_ids_of_lanes(group: Group, tmp_path: Path, rng: random.Random) -> None:
    held = find_lanes(group.site.paths, group.group_id.hex())
    assert held is not None
    assert (held.name, held.hex) == ("web", group.group_id.hex())
    assert [lane.name for lane in held.lanes] == ["web@0", "web@1"]
    assert find_lanes(group.site.paths, "web@1") is None
    assert find_lanes(group.site.paths, "nothing") is None
    again = Group(group.root, rng)
    with pytest.raises(errors.InvalidError, match="2 groups are called 'web'"):
        find_lanes(group.site.paths, "web")
    again.close()


# ---- views -------------------------------------------------------------------------------


def served(view: Any) -> dict[str, bytes]:
    """The first bytes of each disk of a view, each from its own socket."""
    found = {}
    for disk in view.disks:
        with lab.Nbd(disk.uri.partition("?socket=")[2], disk.name) as client:
            found[disk.name] = client.read(0, 1)
    return found


def written(group: Group, text: bytes) -> None:
    for lane in group.lanes:
        lane.write(0, 0, text)


def test_a_test_serves_the_disks_of_all_lanes(group: Group) -> None:
    written(group, b"1")
    group.cut(label="one")
    written(group, b"2")
    group.cut(label="two")
    written(group, b"3")
    group.commit()
    view = group.site.test_start("web", "one", since="two")
    try:
        assert served(view) == {"disk0": b"1", "disk1": b"1"}
        assert view.group == "web"
        bitmaps = [disk.bitmap for disk in view.disks]
        assert all(name and name.startswith("qemu:dirty-bitmap:vrep-since-") for name in bitmaps)
        assert len(set(bitmaps)) == 2
        assert len(group.site.tests()) == 2
    finally:
        group.site.test_stop("web")
    assert group.site.tests() == []
    with pytest.raises(errors.NotFoundError):
        group.site.test_stop("web")


def test_failover_and_rollback_of_all_lanes(group: Group) -> None:
    written(group, b"1")
    at = group.cut(label="one")
    written(group, b"2")
    group.cut(label="two")
    group.commit()
    group.close()
    with pytest.raises(errors.SourceAliveError):
        group.site.failover_start("web", "one")
    assert group.site.tests() == []
    view = group.site.failover_start("web", "one", force=True)
    assert served(view) == {"disk0": b"1", "disk1": b"1"}
    again = group.site.failover_start("web", force=True)  # it is under way: the same
    assert again.point == view.point == f"pos:{at[0]}"
    with pytest.raises(errors.StateError, match="under way"):
        group.site.failover_start("web", "two", force=True)
    group.site.failover_rollback("web")
    assert group.site.tests() == []
    assert [cut.label for cut in group.site.points("web").cuts] == ["one", "two"]
    with pytest.raises(errors.NotFoundError, match="no failover"):
        group.site.failover_rollback("web")


def test_a_failover_that_was_cut_off_goes_on_at_its_cut(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vrep.recovery import failover

    written(group, b"1")
    at = group.cut()
    group.commit()
    group.close()
    claim, shut_out = failover.claim, failover.shut_out

    def no_room(one: Any, at: str, **options: Any) -> Any:
        if one.held.hex.endswith("0001"):
            raise errors.StorageError("no space left")
        return claim(one, at, **options)

    def cut_off(one: Any, view: Any) -> None:
        if one.held.hex.endswith("0001"):
            raise errors.StorageError("no space left")
        shut_out(one, view)

    with monkeypatch.context() as patch:
        patch.setattr(failover, "claim", no_room)
        with pytest.raises(errors.StorageError):
            group.site.failover_start("web", force=True)
    assert group.site.tests() == []  # nothing of it is left, in no lane
    with pytest.raises(errors.NotFoundError, match="no failover"):
        group.site.failover_rollback("web")
    monkeypatch.setattr(failover, "shut_out", cut_off)
    with pytest.raises(errors.StorageError):
        group.site.failover_start("web", force=True)
    with pytest.raises(errors.StateError, match="has not reached lane 0, 1"):
        group.site.failover_commit("web")
    monkeypatch.undo()
    # A newer cut came meanwhile: the lane that was not reached is taken over at the same one.
    group.lanes[1].open()
    group.lanes[1].random_write()
    group.lanes[1].close()
    view = group.site.failover_start("web", force=True)
    assert view.point == f"pos:{at[0]}"
    assert served(view) == {"disk0": b"1", "disk1": b"1"}
    change = ViewDirectory.change

    def cut_off_again(directory: ViewDirectory, **changes: Any) -> Any:
        if changes.get("state") == "committed":
            raise errors.StorageError("no space left")
        return change(directory, **changes)

    # Of a commit that is cut off, one lane's epoch is accepted: nothing is given back, of none.
    with monkeypatch.context() as patch:
        patch.setattr(ViewDirectory, "change", cut_off_again)
        with pytest.raises(errors.StorageError):
            failover.commit(group.site.paths, group.lanes[1].group_id.hex())
    with pytest.raises(errors.StateError, match="committed"):
        group.site.failover_rollback("web")
    group.site.failover_commit("web")
    with pytest.raises(errors.StateError, match="committed"):
        group.site.failover_rollback("web")
    assert [cut.point for cut in group.site.points("web").cuts] == [view.point]
    for each in group.site.tests():
        discard(ViewDirectory(group.site.paths, each.id))


def test_the_command_line_starts_a_test_of_all_lanes(group: Group) -> None:
    import json
    import subprocess

    written(group, b"7")
    group.cut()
    group.commit()
    command = [sys.executable, "-m", "vrep.app.cli", "test", "start", "web", "--json"]
    done = subprocess.run(
        [*command, "--dir", str(group.root)], capture_output=True, text=True, check=False
    )
    try:
        assert done.returncode == 0, done.stderr
        assert [disk["name"] for disk in json.loads(done.stdout)["disks"]] == ["disk0", "disk1"]
    finally:
        group.site.test_stop("web")
