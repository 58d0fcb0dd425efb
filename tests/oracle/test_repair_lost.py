"""What a repair does without records, or without a manifest: what is sound stays and recovers, what
is not is named and never offered."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import recovery_lab as lab_module

from vrep import errors
from vrep._core import layout
from vrep.paths import SitePaths
from vrep.recovery.export import export
from vrep.recovery.points import list_points
from vrep.recovery.repair import repair
from vrep.recovery.view import discard, start_test, view_directories
from vrep.target import runs
from vrep.target.lease import Lease
from vrep.target.manifest import DiskEntry, Manifest, Position, manifest_numbers, manifest_path
from vrep.target.reader import StoreReader
from vrep.target.segment import entry_path, segment_path

DISKS = [DiskEntry("root", 1 << 20, 0)]


@pytest.fixture
def lab(tmp_path: Path, rng: random.Random) -> Iterator[Any]:
    lab = lab_module.Lab(tmp_path, DISKS, rng, level=0, segment_bytes=1 << 17, merge=False)
    yield lab
    for each in view_directories(lab.paths):
        discard(each)  # of a test that failed
    lab.close()


def grow(lab: Any, count: int = 160) -> list[Position]:
    if not lab.changes:
        lab.sync()
    good = []
    for number in range(count):
        good.append(lab.random_write())
        if number % 7 == 0:
            lab.commit()
        if number % 60 == 30:
            lab.start_stream()
    lab.commit()
    while lab.store.merge_once():
        continue
    return good


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def at(lab: Any, point: Position) -> list[bytearray]:
    """What the disks held; there is one epoch."""
    found: list[bytearray] = lab.model([(point.epoch, point.seq)])
    return found


def recovers(lab: Any, points: list[Position], out: Path) -> None:
    for point in points:
        result = export(lab.paths, lab.group_id.hex(), f"pos:{point}", out / str(point.seq))
        assert [Path(d.path).read_bytes() for d in result.disks] == at(lab, point), point
        assert result.verdict.sealed
        shutil.rmtree(out / str(point.seq))


def write_on(lab: Any) -> Position:
    lab.open()
    lab.start_stream()
    position = lab.random_write()
    lab.commit()
    return position


# ---- records -------------------------------------------------------------------------------


def damage(lab: Any, manifest: Any, directory: Path, kind: str, at: int) -> None:
    if kind == "open":
        path = segment_path(directory, manifest.active_segment)
        flip(path, lab.rng.randrange(200, path.stat().st_size // 2))
        return
    for entry in manifest.segments[at : at + (3 if kind == "files" else 1)]:
        path = entry_path(directory, entry)
        end = int(entry["data_end"])
        if kind == "files":
            path.unlink()
        elif kind == "byte":
            flip(path, lab.rng.randrange(200, end))
        else:
            path.write_bytes(path.read_bytes()[: lab.rng.randrange(0, end)])


@pytest.mark.parametrize("kind", ["byte", "files", "short", "open"])
def test_what_is_sound_before_a_loss_stays_and_the_rest_is_sent_again(
    lab: Any, tmp_path: Path, kind: str
) -> None:
    """Every point of before recovers at once, none of behind is offered, and all is well once the
    source has sent what differs; it may be given twice, and after a crash."""
    good = grow(lab)
    head = lab.seq
    newest = at(lab, Position(1, 0, head))
    directory = lab.store.directory
    manifest = lab.store.manifest
    lab.close()
    where = lab.rng.randrange(3, len(manifest.segments) - 3)
    damage(lab, manifest, directory, kind, where)
    named = repair(lab.paths, lab.group_id.hex())
    assert len(named.lost) == (3 if kind == "files" else 1)
    assert named.kept_to == named.set_aside == ""
    report = repair(lab.paths, lab.group_id.hex(), resend=True)
    assert [each.object for each in report.lost] == [each.object for each in named.lost]
    end = Position(1, 0, int(report.kept_to.split("/")[-1]))
    before = Position.of(manifest.segments[where - 1]["last"])
    if kind == "open":
        before = Position.of(manifest.segments[-1]["last"])
    assert before <= end < Position(1, 0, head)
    assert list(Path(report.set_aside).iterdir())
    assert repair(lab.paths, lab.group_id.hex()).lost == []
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        reader.verify()
        assert reader.durable == Position(1, 0, head)
    assert report.salvaged_bytes or kind == "open"
    kept = [point for point in good if point <= end]
    recovers(lab, [*lab.rng.sample(kept, 3), kept[-1]], tmp_path / "out")
    points = list_points(lab.paths, lab.group_id.hex())
    assert points.verdict.whole
    assert points.newest is not None
    assert points.newest.point == f"pos:{end}"
    lost = [point for point in good if point > end]
    for point in (lost[0], lost[-1]):
        with pytest.raises((errors.PointNotFoundError, errors.GapError)):
            export(lab.paths, "web", f"pos:{point}", tmp_path / "no")
    # The source goes on: a gap that passes over all numbers that it gave, and what differs.
    lab.changes = [change for change in lab.changes if change.position <= end]
    lab.open()
    lab.seq = lab.store.resume_position().seq
    lab.start_stream()
    lab.gap_begin(jump=head + 1 - lab.seq)
    lab.write(0, 0, newest[0][: 1 << 19], kind=layout.KIND_SYNC)
    lab.write(0, 1 << 19, newest[0][1 << 19 :], kind=layout.KIND_SYNC)
    ended = lab.gap_end()
    after = lab.random_write()
    lab.commit()
    assert at(lab, ended) == newest
    recovers(lab, [kept[-1], ended, after], tmp_path / "out")
    gaps = list_points(lab.paths, "web").gaps
    assert [(gap.end.point, gap.open) for gap in gaps] == [
        ("pos:1/0/2", False),
        (f"pos:{ended}", False),
    ]
    for point in (lost[0], lost[-1]):
        with pytest.raises(errors.VrepError):
            export(lab.paths, "web", f"pos:{point}", tmp_path / "no")


def test_a_crash_in_the_middle_of_it_costs_nothing(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was lost is known from a segment alone, which is replaced by then."""
    lab.sync()
    good = []
    for _ in range(60):  # of which eight make a segment
        good.append(lab.write(0, lab.rng.randrange(63) << 14, lab.rng.randbytes(1 << 14)))
        lab.commit()
    manifest, directory = lab.store.manifest, lab.store.directory
    lab.close()
    rows = manifest.segments
    where = len(rows) // 2
    row = rows[where]
    flip(entry_path(directory, row), int(row["data_end"]) // 2)  # commits before and behind it
    shutil.copytree(lab.paths.root, tmp_path / "other")
    wanted = repair(SitePaths(tmp_path / "other"), "web", resend=True)
    assert wanted.compared_bytes is not None

    class CrashError(Exception):
        pass

    def crash(*_args: object, **_changes: object) -> None:
        raise CrashError

    with monkeypatch.context() as patch:
        patch.setattr(Lease, "publish", crash)
        with pytest.raises(CrashError):
            repair(lab.paths, "web", resend=True)
    assert repair(lab.paths, "web").lost
    report = repair(lab.paths, "web", resend=True)
    # What it keeps, and what its source compares, is what it would have been.
    assert report.salvaged_bytes == wanted.salvaged_bytes > 0
    assert report.compared_bytes == wanted.compared_bytes
    end = Position(1, 0, int(report.kept_to.split("/")[-1]))
    assert end >= Position.of(manifest.segments[where - 1]["last"])
    kept = [point for point in good if point <= end]
    recovers(lab, kept[-1:], tmp_path / "out")
    lab.open()
    lab.seq = lab.store.resume_position().seq
    lab.start_stream()
    lab.gap_begin(jump=1000)
    lab.commit()


def test_nothing_goes_that_somebody_reads(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = grow(lab)
    lab.store.set_horizon(good[80])
    lab.store.fold(good[80])
    directory, manifest = lab.store.directory, lab.store.manifest
    lab.close()
    start_test(lab.paths, "web", f"pos:{good[-1]}")
    last = entry_path(directory, manifest.segments[-1])
    flip(last, 700)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "pinned", lambda _directory: False)  # its process was ended
        with pytest.raises(errors.BusyError, match="which is lost"):
            repair(lab.paths, "web", resend=True)
    try:
        with pytest.raises(errors.BusyError):
            repair(lab.paths, "web", resend=True)
    finally:
        discard(view_directories(lab.paths)[0])
    assert repair(lab.paths, "web", resend=True).kept_to
    with pytest.raises(errors.InvalidError):
        repair(lab.paths, "web", resend=True, start_over=True)
    recovers(lab, [good[81]], tmp_path / "out")


# ---- the manifest ----------------------------------------------------------------------------


def begin_small(lab: Any) -> None:
    """A segment that no commit of a few records closes, nor the end of the store."""
    room = 1 << 14
    while lab.store._writer.end + room >= lab.segment_bytes:
        lab.write(0, 0, lab.rng.randbytes(room))
        lab.commit()


def rotate(lab: Any) -> None:
    number = lab.store.manifest.active_segment
    while lab.store.manifest.active_segment == number:
        lab.random_write()
        lab.commit()


def merge(lab: Any) -> None:
    for _ in range(200):
        rotate(lab)
        if lab.store.merge_once():
            return
    raise AssertionError("nothing was merged")


def fold(lab: Any) -> None:
    lab.store.fold(Position(1, 0, 90))


def open_again(lab: Any) -> None:
    lab.close()
    lab.open()
    lab.start_stream()


CHANGES: dict[str, Callable[[Any], None]] = {
    "rotate": rotate,
    "merge": merge,
    "fold": fold,
    "horizon": lambda lab: lab.store.set_horizon(Position(1, 0, 90)),
    "open": open_again,
    "limits": lambda lab: lab.store.set_limits(1000, 1 << 30),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_damaged_manifest_is_made_again(lab: Any, tmp_path: Path, change: str) -> None:
    """Whatever its change was: every point from the horizon on recovers, and the store takes
    records."""
    good = grow(lab)
    CHANGES[change](lab)
    good.append(lab.random_write())
    lab.commit()
    durable, directory = lab.store.durable, lab.store.directory
    folded = lab.store.manifest.horizon.seq
    lab.close()
    newest = manifest_path(directory, manifest_numbers(directory)[-1])
    flip(newest, lab.rng.randrange(newest.stat().st_size))
    with pytest.raises(errors.IntegrityError):
        StoreReader(lab.paths.store, lab.group_id)
    report = repair(lab.paths, lab.group_id.hex())
    assert (report.repaired, report.lost) == ([newest.name], [])
    assert [p.name for p in (lab.paths.root / "damaged").rglob("manifest-*")] == [newest.name]
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        reader.verify()
        assert reader.durable == durable
    sample = [point for point in good if point.seq >= max(91, folded)]
    recovers(lab, [*lab.rng.sample(sample, 3), good[-1]], tmp_path / "out")
    position = write_on(lab)
    recovers(lab, [position], tmp_path / "out")
    assert repair_again(lab).repaired == []


def repair_again(lab: Any) -> Any:
    lab.close()
    return repair(lab.paths, "web")


def test_a_manifest_that_alone_knew_an_epoch_is_not_made_up(lab: Any) -> None:
    """Who was replaced is never heard again; nor is anything made of two damaged ones."""
    grow(lab)
    directory = lab.store.directory
    begin_small(lab)
    lab.new_epoch(
        lab.store.add_epoch(writer=bytes(range(16)), parent=Position(1, 0, lab.store.durable.seq))
    )
    lab.gap_begin()
    lab.commit()
    lab.close()
    newest = manifest_path(directory, manifest_numbers(directory)[-1])
    flip(newest, 300)
    stood = sorted(path.name for path in directory.iterdir())
    report = repair(lab.paths, lab.group_id.hex())
    assert [each.object for each in report.lost] == ["manifest"]
    assert "epoch" in report.lost[0].text
    assert sorted(path.name for path in directory.iterdir()) == stood
    flip(newest, 300)
    lab.open()
    lab.close()
    for number in manifest_numbers(directory)[-2:]:
        flip(manifest_path(directory, number), 300)
    report = repair(lab.paths, lab.group_id.hex())
    assert [each.object for each in report.lost] == ["manifest"]
    assert repair(lab.paths, lab.group_id.hex(), start_over=True).set_aside


@pytest.mark.parametrize("gone", ["newest", "one-before"])
def test_a_manifest_is_not_made_again_without_what_was_appended(lab: Any, gone: str) -> None:
    """Else records that were acknowledged would be missing, and nobody would say so."""
    grow(lab)
    lab.store.merge_once()
    directory = lab.store.directory
    begin_small(lab)
    if gone == "one-before":
        rotate(lab)
    else:
        lab.store.set_limits(1000, 0)
    lab.close()
    older = manifest_path(directory, manifest_numbers(directory)[-2])
    segment_path(directory, Manifest.decode(older.read_bytes()).active_segment).unlink()
    newest = manifest_path(directory, manifest_numbers(directory)[-1])
    flip(newest, 300)
    report = repair(lab.paths, lab.group_id.hex(), resend=True)
    assert [each.object for each in report.lost] == ["manifest"]
    assert report.kept_to == ""


def test_the_stream_of_an_epoch_without_a_record_is_lost(lab: Any, tmp_path: Path) -> None:
    """As right after a rollback. No position of the history is the epoch's own yet: nothing takes
    the place of the STREAM, and the writer goes on with another."""
    good = grow(lab, 20)
    parent = lab.commit()
    lab.new_epoch(lab.store.add_epoch(writer=b"n" * 16, parent=parent))
    lab.commit()
    path = segment_path(lab.store.directory, lab.store.manifest.active_segment)
    lab.close()
    flip(path, path.read_bytes().index(lab.sealer.stream_id))
    report = repair(lab.paths, "web", resend=True)
    assert report.kept_to == f"pos:{parent}"
    lab.open()
    assert not lab.store.salvaged  # its source has what follows
    lab.start_stream()
    last = lab.write(0, 0, b"w" * 4096)
    assert last.epoch == parent.epoch + 1
    lab.commit()
    wanted = lab.at(last)
    lab.close()
    assert list_points(lab.paths, "web").verdict.whole
    recovers(lab, good, tmp_path)
    result = export(lab.paths, lab.group_id.hex(), f"pos:{last}", tmp_path / "last")
    assert [Path(d.path).read_bytes() for d in result.disks] == wanted
