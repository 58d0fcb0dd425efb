"""Recovery against a plain model: random histories, recovered at random points."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import recovery_lab as lab_module

from vrep import errors
from vrep._core import layout
from vrep.recovery.changes import list_changes
from vrep.recovery.export import export
from vrep.recovery.points import list_points
from vrep.recovery.view import discard, start_test, stop_test, view_directories
from vrep.target.manifest import DiskEntry, Position

# Not multiples of a view's block, and one that is smaller than a record may be.
DISKS = [DiskEntry("root", (1 << 20) + 512, 0), DiskEntry("data", 300 * 1024 + 1536, 1)]


@pytest.fixture
def lab(tmp_path: Path, rng: random.Random) -> Iterator[Any]:
    lab = lab_module.Lab(tmp_path, DISKS, rng, level=rng.choice([0, 1]))
    yield lab
    for each in view_directories(lab.paths):
        discard(each)  # of a test that failed
    lab.close()


def position_of(point: str) -> Position:
    return Position(*(int(part) for part in point[4:].split("/")))


def compare_view(lab: Any, at: str) -> None:
    info = start_test(lab.paths, "web", at)
    wanted = lab.at(position_of(info.point))
    for disk, content in zip(info.disks, wanted, strict=True):
        with lab_module.Nbd(info.socket, disk.name) as nbd:
            assert nbd.size == len(content)
            for _ in range(30):
                offset = lab.rng.randrange(nbd.size)
                length = min(lab.rng.randrange(1, 70000), nbd.size - offset)
                assert nbd.read(offset, length) == content[offset : offset + length]
            for _ in range(10):  # writes beside what is not fetched yet
                offset = lab.rng.randrange(nbd.size)
                data = lab.rng.randbytes(min(lab.rng.randrange(1, 9000), nbd.size - offset))
                nbd.write(offset, data)
                content[offset : offset + len(data)] = data
            nbd.flush()
            assert nbd.read(0, nbd.size) == content
    stop_test(lab.paths, "web")
    assert list(lab.paths.views.iterdir()) == []


def test_views_show_the_disks_as_they_were(lab: Any) -> None:
    good = lab_module.grow(lab)
    compare_view(lab, "latest")
    for position in lab.rng.sample(good, 6):
        compare_view(lab, f"pos:{position}")


def test_exports_hold_the_disks_as_they_were(lab: Any, tmp_path: Path) -> None:
    good = lab_module.grow(lab)
    for number, position in enumerate(lab.rng.sample(good, 12)):
        result = export(lab.paths, "web", f"pos:{position}", tmp_path / f"out{number}")
        assert result.verdict.whole
        assert result.verdict.sealed
        wanted = lab.at(position)
        found = [Path(disk.path).read_bytes() for disk in result.disks]
        assert found == wanted, f"at {position}"


def test_bytes_outside_of_the_changes_are_equal(lab: Any) -> None:
    """Between any two points, also of branches that a failover left and with gaps and sync copies
    between: what was equal before a gap and is copied again is a change too."""
    good = lab_module.grow(lab)
    disks = {disk.name: disk.index for disk in DISKS}
    told = 0
    for _ in range(60):
        since, at = lab.rng.choice(good), lab.rng.choice(good)
        found = list_changes(lab.paths, "web", f"pos:{since}", f"pos:{at}")
        assert (found.since.point, found.at.point) == (f"pos:{since}", f"pos:{at}")
        before, after = lab.at(since), lab.at(at)
        assert [disk.name for disk in found.disks] == list(disks)
        for disk in found.disks:
            there = after[disks[disk.name]]
            here = before[disks[disk.name]][: len(there)].ljust(len(there), b"?")
            assert disk.bytes == len(there)
            assert disk.changed_bytes == sum(extent.length for extent in disk.extents)
            told += disk.changed_bytes
            for extent in disk.extents:
                here[extent.offset : extent.offset + extent.length] = bytes(extent.length)
                there[extent.offset : extent.offset + extent.length] = bytes(extent.length)
            assert here == there, f"{disk.name} from {since} to {at}"
    assert told > 0
    same = list_changes(lab.paths, "web", f"pos:{good[9]}", f"pos:{good[9]}", "data")
    assert [(disk.name, disk.extents) for disk in same.disks] == [("data", [])]


def test_sync_copies_in_a_gap_are_changes(lab: Any) -> None:
    lab.sync()
    before = lab.write(0, 8192, b"a" * 4096)
    lab.gap_begin(jump=1000)
    lab.write(0, 8192, b"a" * 4096, layout.KIND_SYNC)
    lab.record(layout.KIND_SYNC_ZEROES, 1, 100 * 1024, length=200 * 1024)
    inside = lab.write(0, 65536, b"b" * 4096)
    after = lab.gap_end()
    lab.commit()
    found = list_changes(lab.paths, "web", f"pos:{before}", f"pos:{after}")
    assert [[(e.offset, e.length) for e in disk.extents] for disk in found.disks] == [
        [(8192, 4096), (65536, 4096)],
        [(100 * 1024, 200 * 1024)],
    ]
    for since, at in ((inside, after), (before, inside)):
        with pytest.raises(errors.GapError):
            list_changes(lab.paths, "web", f"pos:{since}", f"pos:{at}")
    with pytest.raises(errors.NotFoundError, match="root, data"):
        list_changes(lab.paths, "web", f"pos:{before}", disk="other")


def test_recovery_goes_on_beside_a_writer(lab: Any, tmp_path: Path) -> None:
    """The store is read while it is written, its segments closed and its runs merged."""
    lab.sync()
    for _ in range(12):
        for _ in range(25):
            lab.random_write()
        lab.commit()
        found = list_points(lab.paths, "web")
        assert found.verdict.whole
        assert found.newest is not None
        where = tmp_path / found.newest.point.replace("/", "-")
        result = export(lab.paths, "web", "latest", where)
        wanted = lab.at(position_of(result.point))
        assert [Path(disk.path).read_bytes() for disk in result.disks] == wanted
