"""Folds against a history that is kept whole: every point that is kept recovers as before, and
the others are refused. The oracle is the laboratory's plain list of all changes."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import recovery_lab as lab_module

from vrep._core import layout
from vrep._core import segment as native
from vrep.errors import CorruptError, GapError, OmittedError, PointNotFoundError, StateError
from vrep.objects import plaintext
from vrep.recovery.access import KeyAccess
from vrep.recovery.check import check_history
from vrep.recovery.export import export
from vrep.recovery.fetch import Fetcher
from vrep.recovery.held import find_group
from vrep.recovery.history import History, resolve
from vrep.recovery.object_records import objects_at
from vrep.recovery.points import list_points
from vrep.recovery.view import (
    ViewDirectory,
    discard,
    points_in_use,
    record_of,
    restart_views,
    start_test,
    stop_test,
    view_directories,
)
from vrep.site import Site
from vrep.target import journal
from vrep.target.manifest import DiskEntry, EpochState, Position, manifest_path
from vrep.target.reader import StoreReader
from vrep.target.segment import entry_path

DISKS = [DiskEntry("root", (192 << 10) + 512, 0), DiskEntry("data", 64 << 10, 1)]


@pytest.fixture
def lab(tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    # The mark of a quiet second would close a full segment, between any two steps of a test.
    monkeypatch.setattr(journal, "IDLE_S", 3600.0)
    lab = lab_module.Lab(tmp_path, DISKS, rng, segment_bytes=1 << 15, merge=False)
    yield lab
    for each in view_directories(lab.paths):
        discard(each)  # of a test that failed
    lab.close()


def small_write(lab: Any) -> None:
    """Something a guest might do to a small disk; zeroes often, and in pieces over each other."""
    disk = lab.rng.randrange(len(DISKS))
    size = DISKS[disk].bytes
    length = lab.rng.choice([512, 4096, 4096, 4096, 12288, lab.rng.randrange(1, 9000)])
    if lab.rng.random() < 0.02:
        length = 160_000 if disk == 0 else 60_000  # of two pieces
    offset = lab.rng.randrange(size - length + 1) // 512 * 512
    if lab.rng.random() < 0.3:
        lab.zeroes(disk, offset, min(length * lab.rng.randrange(1, 4), size - offset))
    else:
        lab.write(disk, offset, lab.rng.randbytes(length))


def recoverable(lab: Any) -> dict[Position, bool]:
    """Every position that has a record, and whether it was a recovery point: the last gap-begin
    or gap-end of its line up to it is a gap-end."""
    found = {}
    for change in lab.changes:
        reach = dict(lab.store.manifest.ancestry(change.position))
        open_ = False
        for each in sorted(lab.changes, key=lambda c: c.position):
            if each.position.seq > reach.get(each.position.epoch, 0):
                continue
            if each.kind == layout.KIND_GAP_BEGIN:
                open_ = False
            elif each.kind == layout.KIND_GAP_END:
                open_ = True
        found[change.position] = open_
    return found


def disks_at(reader: StoreReader, access: KeyAccess, position: Position) -> list[bytes]:
    fetcher = Fetcher(reader, reader.extent_map(position), access)
    return [bytes(fetcher.read(d.index, 0, d.bytes) or bytes(d.bytes)) for d in DISKS]


def compare_all(lab: Any) -> int:
    """Every position there ever was: recovered bit for bit, or refused, as it must be."""
    lab.commit()
    manifest = lab.store.manifest
    kept = 0
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        access = KeyAccess.open(lab.paths, lab.group_id, reader.wrapped_keys)
        for position, good in recoverable(lab).items():
            if good and manifest.keeps(position):
                point = resolve(reader, f"pos:{position}", access, time.time_ns())
                assert point.position == position
                assert disks_at(reader, access, position) == lab.at(position), position
                kept += 1
            else:
                with pytest.raises((PointNotFoundError, GapError)):
                    resolve(reader, f"pos:{position}", access, time.time_ns())
        verdict = check_history(lab.paths, reader, access)
        assert (verdict.whole, verdict.sealed) == (True, True)
        history = History(reader)
        assert manifest.horizon.seq == 0 or history.oldest == manifest.horizon
        points = lab.store.points()
        assert points is not None
        assert (points[0].position, points[1].position) == (history.oldest, history.newest)
        times = {c.position: c.wall_ns for c in lab.changes}
        assert [p.wall_ns for p in points] in (
            [times[p.position] for p in points],
            [0, times[points[1].position]],  # the horizon's segment is open
        )
        assert reader.verify() > 0
    return kept


def step(lab: Any) -> None:
    """Something that happens to a group."""
    rng: random.Random = lab.rng
    chance = rng.random()
    if chance < 0.1:
        lab.gap_begin(jump=rng.choice([0, 0, 7]))
        small_write(lab)
        lab.gap_end()
    elif chance < 0.2:
        lab.start_stream()
    elif chance < 0.3:
        lab.mark(f"mark {lab.seq}")
    elif chance < 0.4:
        lab.close()
        lab.open()
        lab.start_stream()
    elif chance < 0.45:
        while lab.store.merge_once():
            continue
    for _ in range(rng.randrange(1, 12)):
        small_write(lab)
        if rng.random() < 0.3:
            lab.commit()


def candidates(lab: Any) -> list[Position]:
    """Where the horizon may go."""
    manifest = lab.store.manifest
    line = dict(manifest.ancestry(Position(manifest.accepted_epoch.epoch, 0, 1 << 62)))
    return [
        p
        for p, good in recoverable(lab).items()
        if good and p.seq <= line.get(p.epoch, 0) and manifest.keeps(p)
    ]


def choose_horizon(lab: Any) -> Position:
    """Any recovery point; often the last of a segment, where a fold reaches the horizon."""
    found = candidates(lab)
    lasts = [Position.of(row["last"]) for row in lab.store.manifest.segments]
    at_ends = [p for p in found if p in lasts]
    return lab.rng.choice(at_ends if at_ends and lab.rng.random() < 0.6 else found)


def fail_over(lab: Any) -> None:
    """A failover to a point that is kept, committed or rolled back."""
    lab.commit()
    parent = lab.rng.choice(candidates(lab)[-30:])
    if lab.rng.random() < 0.5:
        lab.new_epoch(lab.store.add_epoch(writer=b"n" * 16, parent=parent))
        return
    given_up = lab.store.add_epoch(writer=b"o" * 16, parent=parent, state=EpochState.PROVISIONAL)
    lab.new_epoch(lab.store.roll_back_epoch(given_up.epoch))


@pytest.mark.parametrize("round_", range(30))
def test_every_kept_point_recovers_as_before(lab: Any, round_: int) -> None:
    """Random histories with all that happens, folded at random horizons, again and again."""
    lab.sync()
    folded = gone = 0
    for _ in range(3):
        for _ in range(lab.rng.randrange(3, 9)):
            step(lab)
        if lab.rng.random() < 0.6:
            fail_over(lab)
            step(lab)
        lab.commit()
        before = lab.store.status()["bytes"]
        done = lab.store.fold(choose_horizon(lab))
        folded += len(done)
        gone += before - lab.store.status()["bytes"]
        kept = compare_all(lab)
        assert kept > 0
    lab.close()
    lab.open()
    assert compare_all(lab) == kept
    assert not folded or gone > 0


def fill_segment(lab: Any, *last: Any) -> Position:
    """A segment of its own, which ends with what `last` appends."""
    lab.commit()
    lab.write(0, 0, lab.rng.randbytes(40 << 10))
    for append in last:
        position = append()
    lab.commit()
    return position


@pytest.mark.parametrize("kind", ["mark", "zeroes", "gap-end", "write"])
def test_the_record_at_the_horizon_stays(lab: Any, kind: str) -> None:
    """The horizon is the last record that is folded, and of a kind that a fold drops else."""
    lab.sync()
    append = {
        "mark": lambda: lab.mark("here"),
        "zeroes": lambda: lab.zeroes(1, 0, 4096),  # over nothing
        "gap-end": lab.gap_end,
        "write": lambda: lab.write(1, 0, b"x" * 512),
    }[kind]
    horizon = fill_segment(lab, *([lab.gap_begin] if kind == "gap-end" else []), append)
    for _ in range(3):
        fill_segment(lab, lambda: lab.write(0, 0, lab.rng.randbytes(512)))
    done = lab.store.fold(horizon)
    assert [step.last for step in done] == [1]
    compare_all(lab)
    listed = list_points(lab.paths, "web")
    assert listed.oldest is not None
    assert listed.oldest.point == f"pos:{horizon}"
    assert [mark.label for mark in listed.marks] == (["here"] if kind == "mark" else [])


def test_zeroes_stay_while_something_older_does(lab: Any) -> None:
    """They go when the write below them is gone, not before, in whatever segment it is."""
    lab.sync()
    lab.write(1, 0, b"a" * 8192)
    zeroes = fill_segment(lab, lambda: lab.zeroes(1, 0, 4096))
    assert zeroes == fill_position(lab, layout.KIND_ZEROES)[-1]
    after = fill_segment(lab, lambda: lab.write(0, 0, b"b" * 512))
    over = fill_segment(lab, lambda: lab.write(1, 4096, b"c" * 4096))
    for _ in range(2):
        fill_segment(lab, lambda: lab.write(0, 0, b"d" * 512))
    lab.store.fold(after)
    assert zeroes in stored(lab)  # half of the write below them is live
    compare_all(lab)
    lab.store.fold(over)
    compare_all(lab)
    lab.store.fold(lab.commit())
    compare_all(lab)
    assert zeroes not in stored(lab)


def fill_position(lab: Any, kind: int) -> list[Position]:
    return [c.position for c in lab.changes if c.kind == kind]


def stored(lab: Any) -> list[Position]:
    """Positions of the records that the store holds."""
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        return [Position.of(h) for span in reader.records() for h in span.found["header"]]


# ---- what can still be proven ----------------------------------------------------------------


def checked(lab: Any) -> Any:
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        access = KeyAccess.open(lab.paths, lab.group_id, reader.wrapped_keys)
        return check_history(lab.paths, reader, access)


def half_folded(lab: Any) -> Position:
    """A history whose older half is folded, up to inside a stream that goes on."""
    lab.sync()
    for _ in range(60):
        small_write(lab)
        lab.commit()
    horizon = lab.rng.choice(candidates(lab)[25:35])
    assert lab.store.fold(horizon)
    return horizon


def alter_tally(lab: Any) -> None:
    """Another state of the digest where the fold ends, with all checksums right."""
    row = [r for r in lab.store.manifest.segments if r["generation"]][-1]
    path = entry_path(lab.store.directory, row)
    raw = bytearray(path.read_bytes())
    block = native.parse_fold(bytes(raw)).copy()
    assert int(block["flags"]) == layout.FOLD_TALLIED
    block["tally"][3] ^= 1
    raw[128:384] = native.fold(block)
    path.write_bytes(raw)


def test_the_verdict_says_how_far_was_folded(lab: Any) -> None:
    horizon = half_folded(lab)
    verdict = checked(lab)
    assert (verdict.whole, verdict.sealed) == (True, True)
    end = Position(*(int(n) for n in verdict.folded_to[4:].split("/")))
    assert end <= horizon
    assert verdict.folded_to in verdict.note
    assert verdict.tallied_to == f"pos:{lab.commit()}"
    assert list_points(lab.paths, "web").verdict.folded_to == verdict.folded_to


def test_tallies_behind_a_fold_go_on_from_its_state(lab: Any) -> None:
    half_folded(lab)
    alter_tally(lab)
    with pytest.raises(OmittedError, match="not those that the source sealed"):
        checked(lab)


def test_a_state_that_differs_from_what_was_checked_is_noticed(lab: Any) -> None:
    lab.sync()
    for _ in range(60):
        small_write(lab)
        lab.commit()
    assert checked(lab).folded_to == ""
    assert lab.store.fold(lab.rng.choice(candidates(lab)[25:35]))
    alter_tally(lab)
    with pytest.raises(OmittedError, match="does not lead to what was checked"):
        checked(lab)


@pytest.mark.parametrize("known", [False, True])
def test_a_segment_of_a_stream_alone_ends_where_the_one_before_did(lab: Any, known: bool) -> None:
    """A source came, sent nothing and went, and a fold ends behind its stream: two states of one
    position, of which an earlier check knows the first (the second stood in the open segment), or
    both."""
    lab.sync()
    small_write(lab)
    horizon = lab.commit()
    for _ in range(2):
        lab.close()
        lab.open()
        lab.start_stream()  # restarts close segments
        lab.commit()
    rows = lab.store.manifest.segments
    alone = [row for row in rows if Position.of(row["last"]) == horizon]
    assert len(alone) >= 2, rows
    if not known:
        assert checked(lab).folded_to == ""
    for _ in range(2):
        lab.close()
        lab.open()
        lab.start_stream()
        small_write(lab)
        lab.commit()
    if known:
        assert checked(lab).folded_to == ""
    assert lab.store.fold(horizon)
    assert checked(lab).folded_to == f"pos:{horizon}"


def test_what_was_checked_before_a_fold_is_not_read_again(lab: Any, monkeypatch: Any) -> None:
    lab.sync()
    for _ in range(60):
        small_write(lab)
        lab.commit()
    assert checked(lab).whole
    lab.store.fold(lab.rng.choice(candidates(lab)[25:35]))
    read = []
    spans = StoreReader.spans
    monkeypatch.setattr(StoreReader, "spans", lambda self, n: (read.append(n), spans(self, n))[1])
    assert checked(lab).whole
    plain = [int(r["segment"]) for r in lab.store.manifest.segments if not r["generation"]]
    assert plain
    assert not set(read) & set(plain)


def test_a_fold_past_the_horizon_is_noticed(lab: Any) -> None:
    horizon = half_folded(lab)
    directory, manifest = lab.store.directory, lab.store.manifest
    lab.close()
    before = replace(manifest, number=manifest.number + 1, horizon=Position(1, 0, 5))
    manifest_path(directory, before.number).write_bytes(before.encode())
    lab.open()
    assert lab.store.manifest.horizon < horizon
    with pytest.raises(OmittedError, match="past the horizon"):
        checked(lab)


def test_a_changed_byte_is_not_folded_on(lab: Any) -> None:
    """A damaged segment is named and stays; its neighbours are not lost to it."""
    lab.sync()
    for _ in range(60):
        small_write(lab)
        lab.commit()
    rows = lab.store.manifest.segments
    path = entry_path(lab.store.directory, rows[1])
    raw = bytearray(path.read_bytes())
    raw[int(rows[1]["data_end"]) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CorruptError, match=path.name):
        lab.store.fold(candidates(lab)[40])
    assert path.exists()
    assert int(lab.store.manifest.segments[1]["generation"]) == 0
    numbers = lab.store.manifest.segments["segment"].tolist()
    assert len(list(lab.store.directory.glob("seg-*"))) == len(numbers) + 1  # nothing half made
    raw[int(rows[1]["data_end"]) // 2] ^= 1
    path.write_bytes(raw)
    lab.store.fold(lab.store.manifest.horizon)
    assert not path.exists()
    compare_all(lab)


def test_an_export_of_a_folded_history(lab: Any, tmp_path: Path) -> None:
    horizon = half_folded(lab)
    result = export(lab.paths, "web", f"pos:{horizon}", tmp_path / "out")
    assert [Path(disk.path).read_bytes() for disk in result.disks] == lab.at(horizon)
    with pytest.raises(PointNotFoundError, match="oldest point that is kept"):
        export(lab.paths, "web", "pos:1/0/5", tmp_path / "none")


def test_a_horizon_is_a_point_of_the_line_and_moves_forward(lab: Any) -> None:
    lab.sync()
    for _ in range(20):
        small_write(lab)
    gap = lab.gap_begin()
    inside = lab.write(0, 0, b"x" * 512)
    last = lab.gap_end()
    lab.commit()
    for wrong in (gap, inside, Position(1, 0, last.seq + 1), Position(1, 0, 1)):
        with pytest.raises(StateError):
            lab.store.set_horizon(wrong)
    parent = Position(1, 0, 10)
    provisional = lab.store.add_epoch(writer=b"o" * 16, parent=parent, state=EpochState.PROVISIONAL)
    with pytest.raises(StateError, match="left its parents before"):
        lab.store.set_horizon(last)  # a rollback needs it, a commit what is before
    lab.store.set_horizon(Position(1, 0, 8))
    lab.store.roll_back_epoch(provisional.epoch)
    lab.store.set_horizon(last)
    with pytest.raises(StateError, match="before the oldest"):
        lab.store.set_horizon(Position(1, 0, 9))
    with pytest.raises(StateError, match="not kept any more"):
        lab.store.add_epoch(writer=b"n" * 16, parent=parent)
    lab.new_epoch(lab.store.manifest.current_epoch)
    small_write(lab)
    compare_all(lab)


# ---- with everything around it ---------------------------------------------------------------


def test_a_view_reads_its_point_whatever_is_folded(lab: Any) -> None:
    """Before and after a fold past its point, and after its process was killed."""
    lab.sync()
    for _ in range(40):
        small_write(lab)
        lab.commit()
    point = candidates(lab)[10]
    want = lab.at(point)
    info = start_test(lab.paths, "web", f"pos:{point}")
    try:
        with lab_module.Nbd(info.socket, "root") as nbd:
            assert nbd.read(0, 65536) == want[0][:65536]
            for _ in range(20):
                small_write(lab)
                lab.commit()
            lab.store.fold(candidates(lab)[-5])
            assert lab.store.status()["held_at"] == str(point)
            assert nbd.read(0, nbd.size) == want[0]
        with pytest.raises(PointNotFoundError, match="oldest point that is kept"):
            start_test(lab.paths, "web", f"pos:{point}")
        assert info.pid is not None
        os.kill(info.pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        view = ViewDirectory(lab.paths, info.id)
        while view.holder() in (None, info.pid) and time.monotonic() < deadline:
            assert restart_views(lab.paths) == []
            time.sleep(0.1)
        with lab_module.Nbd(info.socket, "data") as nbd:
            assert nbd.read(0, nbd.size) == want[1]
    finally:
        stop_test(lab.paths, "web")
    lab.store.fold(lab.store.manifest.horizon)
    assert lab.store.status()["held_at"] is None
    compare_all(lab)


def test_a_view_is_refused_whose_point_went_since_it_was_chosen(lab: Any) -> None:
    lab.sync()
    for _ in range(20):
        small_write(lab)
    lab.commit()
    point = candidates(lab)[3]
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        held = find_group(lab.paths, "web")
        record = record_of(lab.paths, held, reader, f"pos:{point}", "test", None)
    lab.store.set_horizon(candidates(lab)[10])
    with pytest.raises(PointNotFoundError, match="folded away since"):
        ViewDirectory(lab.paths, record.id).claim(record)
    assert points_in_use(lab.paths, lab.group_id) == []


def test_a_fold_by_hand(lab: Any) -> None:
    """Without a target process, through the Python API."""
    lab.sync()
    for _ in range(40):
        small_write(lab)
        lab.commit()
    lab.mark("keep from here")
    for _ in range(10):
        small_write(lab)
        lab.commit()
    lab.close()
    before = sum(p.stat().st_size for p in lab.paths.store.rglob("seg-*"))
    done = Site(lab.paths.root).fold("web", "keep from here")
    assert not done.background
    assert done.input_bytes > done.output_bytes > 0
    assert sum(p.stat().st_size for p in lab.paths.store.rglob("seg-*")) < before
    lab.open()
    assert done.horizon == f"pos:{lab.store.manifest.horizon}"
    lab.start_stream()
    compare_all(lab)
    assert [mark.label for mark in list_points(lab.paths, "web").marks] == ["keep from here"]


@pytest.mark.parametrize("tagged", [True, False])
def test_objects_of_every_kept_point_outlive_folds(lab: Any, tagged: bool) -> None:
    """Also the version of the oldest point, which was put long before it; their bytes are read, so
    their streams are there too."""
    names = ("domain.xml", "nvram", "notes")
    tags = [lab.rng.randrange(1, 1 << 63) if tagged else 0 for _ in names]
    put: dict[Position, str] = {}
    sizes: dict[Position, int] = {}
    held: dict[Position, dict[str, bytes]] = {}
    now: dict[str, bytes] = {}
    lab.sync()
    for number in range(150):
        if number % 40 == 3:
            lab.start_stream()
        # Two versions of one object come first: whatever follows, each fold has one to let go of.
        if number < 2 or lab.rng.random() < 0.2:
            name = names[0] if number < 2 else lab.rng.choice(names)
            blob = lab.rng.randbytes(lab.rng.randrange(1, 3000))
            data = plaintext(name, blob, lab.wall_ns)
            at = lab.record(layout.KIND_OBJECT, 0, tags[names.index(name)], data)
            put[at], sizes[at] = name, len(data)
            now = {**now, name: blob}
        else:
            at = lab.write(0, lab.rng.randrange(40) * 4096, lab.rng.randbytes(4096))
        held[at] = now
        lab.commit()
    for share in (3, 2, 1):
        points = [p for p in held if lab.store.manifest.keeps(p)]
        horizon = points[len(points) // 4 * share // 3]
        lab.store.fold(horizon)
        with StoreReader(lab.paths.store, lab.group_id) as reader:
            access = KeyAccess.open(lab.paths, lab.group_id, reader.wrapped_keys)
            kept = [p for p in held if p >= horizon]
            for point in (horizon, kept[-1], *lab.rng.sample(kept, 5)):
                found = objects_at(reader, access, point)
                assert {name: plain.data for name, (_at, plain) in found.items()} == held[point]
            there = {e.position for e in reader.events() if e.kind == layout.KIND_OBJECT}
        # What no kept point can reach is let go of, where a version is known by its tag, and counts
        # as dead until it is: a fold leaves less than a quarter of that.
        reached = {p for p in put if p > horizon}
        for name in held[horizon]:
            reached.add(max(p for p, each in put.items() if each == name and p <= horizon))
        assert reached <= there
        if tagged:
            rows = [row for row in lab.store.manifest.segments if row["generation"]]
            there = {p for p in there if p <= max(Position.of(row["last"]) for row in rows)}
            old = sum(sizes[p] for p in there - reached)
            total = sum(int(row["data_bytes"]) for row in rows) + sum(sizes[p] for p in there)
            assert old < 0.25 * total
            assert len(there) < sum(p <= horizon for p in put)
        else:
            assert there == set(put)
