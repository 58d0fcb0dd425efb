"""Points: what can be recovered, and what each way to name a point means."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import recovery_lab as lab_module

from vrep import errors
from vrep.recovery.access import KeyAccess
from vrep.recovery.history import Found, History, format_time, resolve
from vrep.recovery.points import list_points
from vrep.target.manifest import DiskEntry, EpochState, Position
from vrep.target.reader import StoreReader

NS = lab_module.NS


@pytest.fixture
def lab(tmp_path: Path, rng: random.Random) -> Iterator[Any]:
    lab = lab_module.Lab(tmp_path, [DiskEntry("root", 1 << 20, 0)], rng)
    yield lab
    lab.close()


def find(lab: Any, text: str, now_ns: int = 0) -> Found:
    lab.commit()
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        access = KeyAccess.open(lab.paths, lab.group_id, reader.wrapped_keys)
        return resolve(reader, text, access, now_ns)


def write(lab: Any) -> Position:
    position: Position = lab.write(0, 0, b"x" * 4096)
    return position


def test_nothing_can_be_recovered_before_the_first_sync_ended(lab: Any) -> None:
    write(lab)
    with pytest.raises(errors.PointNotFoundError, match="first sync"):
        find(lab, "latest")
    lab.gap_begin()
    write(lab)
    with pytest.raises(errors.PointNotFoundError, match="first sync"):
        find(lab, "latest")
    end = lab.gap_end()
    assert find(lab, "latest").position == end


def test_latest_is_the_newest_position_before_an_open_gap(lab: Any) -> None:
    lab.sync()
    before = write(lab)
    begin = lab.gap_begin()
    inside = write(lab)
    assert find(lab, "latest").position == before
    for position in (begin, inside):
        with pytest.raises(errors.GapError, match=f"before: pos:{before}"):
            find(lab, f"pos:{position}")
    end = lab.gap_end()
    assert find(lab, "latest").position == end
    with pytest.raises(errors.GapError, match=f"before: pos:{before}.*after: pos:{end}"):
        find(lab, f"pos:{inside}")
    assert find(lab, f"pos:{end}").position == end


def test_a_gap_that_jumps_begins_after_the_record_before_it(lab: Any) -> None:
    lab.sync()
    before = write(lab)
    lab.gap_begin(jump=1000)
    lab.gap_end()
    lab.commit()
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        first = History(reader).ranges[0]
    assert first.last == before
    with pytest.raises(errors.PointNotFoundError, match="no record"):
        find(lab, f"pos:1/0/{before.seq + 5}")


def test_times_mean_the_newest_position_that_is_not_later(lab: Any) -> None:
    lab.sync()
    positions = [write(lab) for _ in range(20)]
    walls = {change.position: change.wall_ns for change in lab.changes}
    for position in positions:
        wall_ns = walls[position]
        assert find(lab, format_time(wall_ns)).position == position
        assert find(lab, format_time(wall_ns + NS // 200)).position == position
        assert find(lab, "-5s", wall_ns + 5 * NS).position == position
        assert find(lab, "-2m", wall_ns + 120 * NS + NS // 200).position == position
    assert find(lab, "2099-01-01T00:00:00Z").position == positions[-1]
    assert find(lab, "2099-01-01T00:00:00+14:00").position == positions[-1]


def test_times_before_the_oldest_point_and_inside_a_gap_name_the_nearest(lab: Any) -> None:
    lab.gap_begin()
    inside = lab.wall_ns + NS // 1000
    oldest = lab.gap_end()
    with pytest.raises(errors.PointNotFoundError, match=f"oldest point.*pos:{oldest}"):
        find(lab, format_time(inside))
    with pytest.raises(errors.PointNotFoundError, match=f"pos:{oldest}"):
        find(lab, "2001-01-01T00:00:00Z")
    before = write(lab)
    lab.gap_begin()
    write(lab)
    late = lab.wall_ns + NS // 1000
    end = lab.gap_end()
    with pytest.raises(errors.GapError, match=f"pos:{before}.*pos:{end}"):
        find(lab, format_time(late))


def test_a_time_that_the_clock_passed_twice_is_ambiguous(lab: Any) -> None:
    lab.sync()
    first, again = [], []
    for positions in (first, again):
        for _ in range(5):
            positions.append(write(lab))
            lab.commit()
        lab.wall_ns -= 3 * NS // 100
    wall_ns = next(c.wall_ns for c in lab.changes if c.position == first[3])
    with pytest.raises(errors.PointAmbiguousError) as caught:
        find(lab, format_time(wall_ns))
    assert f"pos:{first[3]} " in str(caught.value)
    assert any(f"pos:{position} " in str(caught.value) for position in again)
    early = next(c.wall_ns for c in lab.changes if c.position == first[0])
    assert find(lab, format_time(early)).position == first[0]


def test_labels_name_their_mark_and_are_ambiguous_when_used_twice(lab: Any) -> None:
    lab.sync()
    one = lab.mark("before upgrade")
    write(lab)
    two = lab.mark("nightly")
    write(lab)
    assert find(lab, "before upgrade").position == one
    assert find(lab, "nightly").position == two
    three = lab.mark("nightly")
    with pytest.raises(errors.PointAmbiguousError, match=f"pos:{two}.*pos:{three}"):
        find(lab, "nightly")
    with pytest.raises(errors.PointNotFoundError, match="'weekly'"):
        find(lab, "weekly")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("2026-01-31T12:00:00", errors.InvalidError),
        ("2026-13-31T12:00:00Z", errors.InvalidError),
        ("-5 minutes", errors.InvalidError),
        ("pos:1/2", errors.InvalidError),
        ("pos:9/0/3", errors.PointNotFoundError),
        ("pos:1/0/99999", errors.PointNotFoundError),
        ("pos:1/1/3", errors.PointNotFoundError),
    ],
)
def test_points_that_mean_nothing_are_refused(
    lab: Any, text: str, kind: type[errors.VrepError]
) -> None:
    lab.sync()
    write(lab)
    with pytest.raises(kind):
        find(lab, text)


def test_positions_follow_the_line_of_their_epoch(lab: Any) -> None:
    """What a failover left behind is not in the accepted line, but can be named."""
    lab.sync()
    kept = write(lab)
    lost = write(lab)
    lab.commit()
    entry = lab.store.add_epoch(writer=bytes(16), parent=kept)
    assert find(lab, "latest").position.seq == kept.seq
    lab.new_epoch(entry)
    new = write(lab)
    assert new.seq == lost.seq
    assert find(lab, "latest").position == new
    assert find(lab, f"pos:{lost}").position == lost
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        assert not History(reader).visible(lost)
        assert History(reader).visible(kept)


def test_a_provisional_epoch_does_not_change_what_latest_means(lab: Any) -> None:
    lab.sync()
    kept = write(lab)
    newest = write(lab)
    lab.commit()
    lab.store.add_epoch(writer=b"f" * 16, parent=kept, state=EpochState.PROVISIONAL)
    assert find(lab, "latest").position == newest


def test_the_list_names_ranges_gaps_marks_and_epochs(lab: Any) -> None:
    lab.sync()
    lab.mark("one")
    last = write(lab)
    lab.gap_begin()
    lab.commit()
    found = list_points(lab.paths, "web")
    assert found.newest is not None
    assert found.newest.point == f"pos:{last}"
    assert found.oldest is not None
    assert found.oldest.point == "pos:1/0/2"
    assert [gap.open for gap in found.gaps] == [False, True]
    assert [(mark.label, mark.recoverable) for mark in found.marks] == [("one", True)]
    assert found.verdict.whole
    assert found.verdict.sealed
    assert found.verdict.tallied_to == "pos:1/0/5"
    assert list_points(lab.paths, lab.group_id.hex()) == found


def test_without_the_key_labels_stay_sealed_and_the_verdict_says_so(lab: Any) -> None:
    lab.sync()
    lab.mark("secret name")
    lab.commit()
    (lab.root / "keys" / "acme.key").unlink()
    found = list_points(lab.paths, "web")
    assert [mark.label for mark in found.marks] == [None]
    assert not found.key_held
    assert found.verdict.whole
    assert not found.verdict.sealed
    assert lab.tenant.key_id in found.verdict.note
    assert found.verdict.checked_to == "pos:1/0/3"
    assert found.verdict.tallied_to == ""


def test_groups_of_one_name_are_told_apart_by_their_ids(tmp_path: Path, rng: random.Random) -> None:
    labs = [lab_module.Lab(tmp_path, [DiskEntry("root", 1 << 20, 0)], rng) for _ in range(2)]
    try:
        for each in labs:
            each.sync()
            each.commit()
        with pytest.raises(errors.InvalidError, match=labs[1].group_id.hex()):
            list_points(labs[0].paths, "web")
        assert list_points(labs[0].paths, labs[1].group_id.hex()).group == "web"
        with pytest.raises(errors.NotFoundError, match="'mail'"):
            list_points(labs[0].paths, "mail")
    finally:
        for each in labs:
            each.close()
