"""What is sound behind a loss is salvaged: the source sends what was lost and no more, no position
that depends on what was lost is offered, and damage in the folded base is mended the same way.

Random histories with epochs, streams, folds and resizes; random damage; the oracle is a plain model
of the records that are left."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recovery_lab as lab_module

from vrep import errors
from vrep._core import layout
from vrep._core import segment as native
from vrep._core.hash import hash_blocks
from vrep.recovery.access import KeyAccess
from vrep.recovery.check import check_history
from vrep.recovery.export import export
from vrep.recovery.fetch import Fetcher
from vrep.recovery.history import History, resolve
from vrep.recovery.repair import RepairReport, repair
from vrep.recovery.salvage import sound_commits
from vrep.recovery.view import discard, view_directories
from vrep.source.delta import HashBook, Line, Window
from vrep.target.delta import look_up
from vrep.target.lost import Range, lost_path, read_lost, united
from vrep.target.manifest import DiskEntry, EpochState, Position, load_newest
from vrep.target.reader import StoreReader
from vrep.target.segment import entry_path, segment_path
from vrep.wire import messages as m

DISKS = [DiskEntry("root", 1 << 20, 0), DiskEntry("data", 300 * 1024 + 1536, 1)]
BLOCK = layout.HASH_BLOCK_BYTES


@pytest.fixture
def lab(tmp_path: Path, rng: random.Random) -> Iterator[Any]:
    lab = lab_module.Lab(tmp_path, DISKS, rng, level=0, segment_bytes=1 << 17, merge=False)
    yield lab
    for each in view_directories(lab.paths):
        discard(each)  # of a test that failed
    lab.close()


def grow(lab: Any, *, fold: bool, forks: bool) -> None:
    """A history; with `forks`, of several epochs, of which some were abandoned."""
    rng = lab.rng
    lab.sync()
    for number in range(rng.randrange(120, 220)):
        lab.random_write()
        if rng.random() < 0.01:
            lab.random_resize()
        if rng.random() < 0.05:
            lab.mark(f"m{number}")
        if rng.random() < 0.03:
            lab.gap_begin()
            lab.random_write()
            lab.gap_end()
        if number % 7 == 0:
            lab.commit()
        if rng.random() < 0.03:
            lab.commit()
            lab.start_stream()
        if forks and rng.random() < 0.02:
            here = lab.commit()
            low = max(2, lab.epoch.parent.seq + 1)
            parent = Position(here.epoch, 0, rng.randrange(min(low, here.seq), here.seq + 1))
            lab.new_epoch(lab.store.add_epoch(writer=b"n" * 16, parent=parent))
            lab.random_write()
    lab.commit()
    while lab.store.merge_once():
        continue
    if fold:
        with StoreReader(lab.paths.store, lab.group_id) as reader:
            ranges = History(reader).ranges
        line = [p for p in positions(lab) if any(r.first <= p <= r.last for r in ranges)]
        lab.store.fold(rng.choice(line[: len(line) * 3 // 4 + 1]))
        for _ in range(rng.randrange(3)):
            lab.random_write()
    lab.commit()


def positions(lab: Any) -> list[Position]:
    """Of the line of the writer."""
    return [c.position for c in line_of(lab, lab.changes)]


def line_of(lab: Any, changes: list[Any]) -> list[Any]:
    reach = dict(ancestry(lab))
    found = [c for c in changes if c.position.seq <= reach.get(c.position.epoch, 0)]
    return sorted(found, key=lambda c: c.position)


def ancestry(lab: Any, end: Position | None = None) -> list[tuple[int, int]]:
    manifest = load_newest(lab.paths.store / lab.group_id.hex(), lab.group_id)
    found: list[tuple[int, int]] = manifest.ancestry(end or Position(lab.epoch.epoch, 0, lab.seq))
    return found


def damage(lab: Any, *, base: bool) -> None:
    """One to three wounds of a closed store; `base`: one of them is in its first segment."""
    rng, directory = lab.rng, lab.paths.store / lab.group_id.hex()
    manifest = load_newest(directory, lab.group_id)
    rows = manifest.segments
    chosen = {0} if base else set()
    for _ in range(rng.randrange(0 if base else 1, 3)):
        chosen.add(rng.randrange(len(rows)))
    for row in rows[sorted(chosen)]:
        path, end = entry_path(directory, row), int(row["data_end"])
        kind = rng.choice(["byte", "byte", "block", "short", "file", "index"])
        data = bytearray(path.read_bytes())
        at = rng.randrange(0, end)
        if kind == "file":
            path.unlink()
            continue
        if kind == "short":
            del data[at:]
        elif kind == "block":
            size = min(rng.randrange(1, 20000), end - at)
            data[at : at + size] = rng.randbytes(size)
        else:
            data[at] ^= 1 << rng.randrange(8)
            if kind == "index":
                data[-rng.randrange(1, 200)] ^= 4
        path.write_bytes(data)
    if rng.random() < 0.3 and manifest.active_segment:
        path = segment_path(directory, manifest.active_segment)
        data = bytearray(path.read_bytes())
        if len(data) > 1000:
            data[rng.randrange(200, len(data) // 2)] ^= 8
            path.write_bytes(data)


def held(lab: Any) -> set[Position]:
    """The positions of which the store has a record."""
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        reader.verify()
        aside = (layout.KIND_STREAM, layout.KIND_TALLY)
        return {
            Position.of(header)
            for span in reader.records()
            for header in span.found["header"]
            if header["kind"] not in aside
        }


def shown(lab: Any, at: Position) -> list[bytes]:
    """What the store shows at a position, recovery point or not."""
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        access = KeyAccess.open(lab.paths, lab.group_id, reader.wrapped_keys)
        fetcher = Fetcher(reader, reader.extent_map(at), access)
        return [
            bytes(fetcher.read(d.index, 0, d.bytes) or bytes(d.bytes)) for d in reader.disks_at(at)
        ]


def left_of(lab: Any, report: RepairReport) -> list[Any]:
    """The changes of which the store has the records: but for gap-begins in their places."""
    there = held(lab)
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        gaps = {e.position for e in reader.events() if e.kind == layout.KIND_GAP_BEGIN}
    return [
        c
        for c in lab.changes
        if c.position in there and (c.position not in gaps or c.kind == layout.KIND_GAP_BEGIN)
    ]


def resend(lab: Any, wanted: list[bytearray]) -> tuple[Position, dict[int, set[int]]]:
    """What a source does that is told to compare what was lost; where its gap ends, and the units
    of each disk that it sent."""
    lab.open()
    assert lab.store.salvaged
    lost = lab.store.lost()
    assert lost == lost_ranges(lab, Position(lab.epoch.epoch, 0, lab.seq))
    lab.seq = lab.store.resume_position().seq
    lab.start_stream()
    lab.gap_begin(jump=lab.rng.choice([1, 1000]))
    lab.commit()
    assert not lab.store.salvaged
    windows = [Window(disk, disk, 0, len(data)) for disk, data in enumerate(wanted)]
    question = m.HashQuestion(
        group_id=lab.group_id,
        at_least=lab.seq,
        ranges=[m.HashRange(disk=w.disk, offset=0, length=w.length) for w in windows],
    )
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        answer = look_up(reader, reader.durable_of(lab.epoch.epoch), question)
    parent = lab.epoch.parent
    found, _refused = HashBook([lab.key]).read(
        answer, dict(enumerate(windows)), Line(lab.epoch.epoch, parent.epoch, parent.seq)
    )
    sent: dict[int, set[int]] = {}
    for disk, data in enumerate(wanted):
        keys, hashes = found[disk]
        sent[disk] = set()
        for unit, at in enumerate(range(0, len(data), BLOCK)):
            part = bytes(data[at : at + BLOCK])
            known = hashes[16 * unit : 16 * unit + 16]
            if not is_lost(lost, disk, at):
                continue
            if len(part) == BLOCK and keys[unit]:
                mine = hash_blocks(part, BLOCK, secret=lab.key.hash_secret()).hashes[0]
                if mine.tobytes() == known:
                    continue
            sent[disk].add(unit)
            lab.write(disk, at, part, kind=layout.KIND_SYNC)
        lab.record(layout.KIND_RESIZE, disk, len(data))
    ended = lab.gap_end()
    lab.commit()
    return ended, sent


def unknown_units(
    lab: Any, left: list[Any], line: list[tuple[int, int]], disk: int, size: int
) -> set[int]:
    """The units that a source must send: those of which no single record that is left is the
    newest of all of them, with the bytes that the disk has."""
    owner: list[Any] = [None] * size
    for change in line_of(lab, left):
        if change.disk == disk and change.kind in (layout.KIND_WRITE, layout.KIND_SYNC):
            for at in range(change.offset, min(change.offset + change.length, size)):
                owner[at] = change
        elif change.disk == disk and change.kind in (
            layout.KIND_ZEROES,
            layout.KIND_SYNC_ZEROES,
        ):
            for at in range(change.offset, min(change.offset + change.length, size)):
                owner[at] = None
    whole = lab.model(line)[disk]
    found = set()
    for unit in range(-(-size // BLOCK)):
        part = owner[unit * BLOCK : (unit + 1) * BLOCK]
        first = part[0]
        if first is None or len(part) < BLOCK or any(each is not first for each in part):
            found.add(unit)
            continue
        at = unit * BLOCK - first.offset
        if first.data[at : at + BLOCK] != whole[unit * BLOCK : (unit + 1) * BLOCK]:
            found.add(unit)
    return found


def lost_ranges(lab: Any, at: Position) -> list[Range] | None:
    directory = lab.paths.store / lab.group_id.hex()
    manifest = load_newest(directory, lab.group_id)
    return read_lost(directory, lab.group_id, manifest.store_id, at)


def is_lost(lost: list[Range] | None, disk: int, at: int) -> bool:
    return lost is None or any(r.disk == disk and r.offset <= at < r.end for r in lost)


def judge_ranges(lost: list[Range] | None, left: list[bytes], wanted: list[bytearray]) -> None:
    """What differs from what was there lies in what is said to be lost."""
    if lost is None:
        return
    assert lost == united(lost)
    for disk, (now, was) in enumerate(zip(left, wanted, strict=True)):
        size = min(len(now), len(was))  # a size that was lost is told again
        differs = np.frombuffer(now, np.uint8)[:size] != np.frombuffer(bytes(was), np.uint8)[:size]
        for one in lost:
            if one.disk == disk:
                differs[one.offset : one.end] = False
        assert not differs.any(), (disk, int(np.argmax(differs)))


def judge_positions(lab: Any, end: Position, truth: list[Any], out: Path) -> None:
    """Each position is bit-exact, or refused; those up to `end` that were points before are."""
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        offered = []
        for change in line_of(lab, truth):
            try:
                resolve(reader, f"pos:{change.position}", None, time.time_ns())
            except errors.VrepError:
                continue
            offered.append(change.position)
        assert all(p <= end for p in offered)
    for number, point in enumerate(lab.rng.sample(offered, min(3, len(offered)))):
        result = export(lab.paths, lab.group_id.hex(), f"pos:{point}", out / str(number))
        wanted = lab.model(ancestry(lab, point))
        assert [Path(d.path).read_bytes() for d in result.disks] == wanted, point


@pytest.mark.parametrize("turn", range(3))
@pytest.mark.parametrize("kind", ["plain", "folded", "forks", "base"])
def test_what_is_sound_is_not_sent_again(lab: Any, tmp_path: Path, kind: str, turn: int) -> None:
    grow(lab, fold=kind in ("folded", "base"), forks=kind == "forks")
    head = Position(lab.epoch.epoch, 0, lab.seq)
    wanted = lab.model(ancestry(lab, head))
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        before = [
            p for p in positions(lab) if any(r.first <= p <= r.last for r in History(reader).ranges)
        ]
    truth = list(lab.changes)
    lab.close()
    damage(lab, base=kind == "base")
    if not repair(lab.paths, lab.group_id.hex()).lost:
        return  # an index, or what stands between commits
    report = repair(lab.paths, lab.group_id.hex(), resend=True)
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        if reader.durable != head:
            return  # nothing stands behind the loss: see test_repair_lost
    assert repair(lab.paths, lab.group_id.hex()).lost == []
    end = Position(*(int(n) for n in (report.kept_to or "pos:0/0/0")[4:].split("/")))
    left = left_of(lab, report)
    # What the store shows is what its records say, and nothing of what was lost.
    lab.changes = left
    assert shown(lab, head) == lab.model(ancestry(lab, head))
    lost = lost_ranges(lab, head)
    assert report.compared_bytes == (None if lost is None else sum(r.length for r in lost))
    judge_ranges(lost, shown(lab, head), wanted)
    lab.changes = list(truth)
    judge_positions(lab, end, truth, tmp_path / "kept")
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        access = KeyAccess.open(lab.paths, lab.group_id, reader.wrapped_keys)
        verdict = check_history(lab.paths, reader, access)
        assert (verdict.whole, verdict.sealed) == (True, True)
        ranges = History(reader).ranges
        points = [p for p in before if any(r.first <= p <= r.last for r in ranges)]
    assert points == [p for p in before if p <= end]
    line = ancestry(lab, head)
    must = {d: unknown_units(lab, left, line, d, len(content)) for d, content in enumerate(wanted)}
    must = {d: {u for u in units if is_lost(lost, d, u * BLOCK)} for d, units in must.items()}
    ended, sent = resend(lab, wanted)
    # Of a large record of which little shows the hashes would cost more than they save.
    large = {
        d: {
            unit
            for c in left
            if c.disk == d and c.length > 127 * BLOCK
            for unit in range(c.offset // BLOCK, -(-(c.offset + c.length) // BLOCK))
        }
        for d in must
    }
    assert all(must[d] <= sent[d] <= must[d] | large[d] for d in must)
    assert shown(lab, ended) == wanted
    judge_positions_after(lab, ended, end, wanted, truth, tmp_path / "after")


def judge_positions_after(
    lab: Any, ended: Position, end: Position, wanted: Any, truth: list[Any], out: Path
) -> None:
    result = export(lab.paths, lab.group_id.hex(), "latest", out / "latest")
    assert result.point == f"pos:{ended}"
    assert [Path(d.path).read_bytes() for d in result.disks] == wanted
    assert result.verdict.sealed
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        for change in line_of(lab, truth):
            if change.position > end:
                with pytest.raises(errors.VrepError):
                    resolve(reader, f"pos:{change.position}", None, time.time_ns())


def aligned(lab: Any, count: int) -> None:
    """Writes of whole units, each in a commit of its own."""
    for _ in range(count):
        unit = lab.rng.randrange(DISKS[0].bytes // BLOCK - 4)
        lab.write(0, unit * BLOCK, lab.rng.randbytes(BLOCK * lab.rng.randrange(1, 5)))
        lab.commit()


def units_of(changes: list[Any]) -> set[int]:
    return {
        unit
        for c in changes
        if c.length
        for unit in range(c.offset // BLOCK, (c.offset + c.length) // BLOCK)
    }


@pytest.mark.parametrize("place", ["middle", "base", "base, behind its front"])
def test_a_lost_commit_costs_what_it_covered(lab: Any, tmp_path: Path, place: str) -> None:
    """Not what was written since, and also in the folded base, where every point is lost."""
    lab.sync()
    for at in range(0, DISKS[0].bytes, 1 << 16):
        lab.write(0, at, lab.rng.randbytes(1 << 16))
    lab.write(1, 0, lab.rng.randbytes(DISKS[1].bytes))
    aligned(lab, 40)
    base = place.startswith("base")
    if base:
        horizon = lab.mark("horizon")
        aligned(lab, 12)
        lab.store.fold(horizon)
    aligned(lab, 60)
    directory, manifest = lab.store.directory, lab.store.manifest
    head, wanted = Position(1, 0, lab.seq), lab.model([(1, lab.seq)])
    lab.close()
    rows = {"middle": len(manifest.segments) // 2, "base": 0}
    last = int((manifest.segments["generation"] > 0).sum()) - 1  # of those that were folded
    row = manifest.segments[rows.get(place, last)]
    assert bool(int(row["generation"])) == base
    path = entry_path(directory, row)
    data = bytearray(path.read_bytes())
    sound = sound_commits(memoryview(data), lab.group_id, int(row["segment"]))
    sound = [commit for commit in sound if commit[1] - commit[0] > 1000]
    start, stop = sound[len(sound) // 2]
    data[lab.rng.randrange(start, stop)] ^= 1
    path.write_bytes(data)
    report = repair(lab.paths, "web", resend=True)
    assert (report.kept_to == "") == base
    left = left_of(lab, report)
    end = Position(1, 0, int(report.kept_to.split("/")[-1])) if report.kept_to else Position()
    gone = [c for c in lab.changes if c not in left]
    if base:
        with StoreReader(lab.paths.store, lab.group_id) as reader:
            assert History(reader).ranges == []
        with pytest.raises(errors.PointNotFoundError):
            export(lab.paths, "web", "latest", tmp_path / "none")
    newest = {unit: c for c in lab.changes if c.disk == 0 for unit in units_of([c])}
    lost = {unit for unit, c in newest.items() if c in gone}
    assert lost
    said = lost_ranges(lab, head)
    assert said is not None
    odd_end = [Range(1, 0, DISKS[1].bytes)] if any(c.disk == 1 for c in gone) else []
    assert said == united([*(Range(0, unit * BLOCK, BLOCK) for unit in lost), *odd_end])
    ended, sent = resend(lab, wanted)
    assert sent[1] == (set() if not any(c.disk == 1 for c in gone) else sent[1])
    assert sent[0] == lost
    if base:
        assert len(lost) * BLOCK + report.salvaged_bytes >= DISKS[0].bytes
    else:
        since = units_of([c for c in lab.changes if c.disk == 0 and end < c.position <= head])
        assert len(since) > 4 * len(lost)
    assert ended > head > end
    result = export(lab.paths, "web", "latest", tmp_path / "latest")
    assert [Path(d.path).read_bytes() for d in result.disks] == wanted


def test_sound_commits_are_found_whatever_stands_between_them(
    tmp_path: Path, rng: random.Random
) -> None:
    """Exactly the one that a wound is in is missing."""
    lab = lab_module.Lab(tmp_path, DISKS, rng, level=0, segment_bytes=1 << 17, merge=False)
    lab.sync()
    aligned(lab, 40)
    directory, manifest = lab.store.directory, lab.store.manifest
    lab.close()
    row = manifest.segments[1]
    number = int(row["segment"])
    data = entry_path(directory, row).read_bytes()
    whole = sound_commits(memoryview(data), lab.group_id, number)
    assert len(whole) > 3
    assert whole[0][0] == 128
    for _ in range(60):
        torn = bytearray(data)
        at = lab.rng.randrange(128, int(row["data_end"]))
        torn[at] ^= 1
        found = sound_commits(memoryview(torn), lab.group_id, number)
        wounded = [c for c in whole if c[0] <= at < -(-c[1] // 64) * 64 + 128]
        assert [c for c in whole if c not in wounded] == found
    assert sound_commits(memoryview(data), b"x" * 16, number) == []
    assert sound_commits(memoryview(data), lab.group_id, number + 1) == []
    assert sound_commits(memoryview(b""), lab.group_id, number) == []


def test_a_commit_with_a_right_digest_and_wrong_records_is_one_more_loss(lab: Any) -> None:
    """Written so by a machine that errs. It stops no repair of what is sound around it."""
    lab.sync()
    aligned(lab, 75)  # of which four segments are made, however small they are
    wanted = lab.model([(1, lab.seq)])
    directory = lab.store.directory
    lab.close()
    rows = load_newest(directory, lab.group_id).segments
    assert len(rows) > 3
    entry_path(directory, rows[1]).unlink()
    path = entry_path(directory, rows[3])
    data = bytearray(path.read_bytes())
    number = int(rows[3]["segment"])
    start, stop = sound_commits(memoryview(data), lab.group_id, number)[-1]
    data[start] ^= 1  # of the first record's header
    at = -(-stop // 64) * 64
    block = np.frombuffer(data, layout.COMMIT, 1, at)[0].copy()
    made = native.commit(block, [bytes(data[start:stop])])
    data[stop : stop + len(made)] = made
    path.write_bytes(data)
    assert sound_commits(memoryview(data), lab.group_id, number)[-1] == (start, stop)
    report = repair(lab.paths, "web", resend=True)
    assert [lost.object for lost in report.lost] != ["manifest"]
    assert report.salvaged_bytes > 0
    lab.changes = left_of(lab, report)
    ended, _sent = resend(lab, wanted)
    assert lab.model([(1, ended.seq)]) == wanted


def test_a_store_of_which_nothing_of_the_epoch_is_left_is_not_salvaged(lab: Any) -> None:
    """Its source would not be told to compare: then only a new start helps."""
    lab.sync()
    aligned(lab, 30)
    horizon = lab.mark("horizon")
    aligned(lab, 12)
    lab.store.fold(horizon)
    here = lab.commit()
    lab.store.add_epoch(writer=b"n" * 16, parent=here)
    directory = lab.store.directory
    lab.close()
    manifest = load_newest(directory, lab.group_id)
    path = entry_path(directory, manifest.segments[0])
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(errors.StateError, match="--start-over"):
        repair(lab.paths, "web", resend=True)
    assert load_newest(directory, lab.group_id).number == manifest.number


def test_a_source_is_told_until_its_gap_began(lab: Any) -> None:
    """Also behind a second repair, and as the writer of an epoch that a rollback gave it."""
    lab.sync()
    aligned(lab, 75)  # both repairs find a segment behind the one that is lost
    lab.close()
    for _ in range(2):
        directory = lab.paths.store / lab.group_id.hex()
        manifest = load_newest(directory, lab.group_id)
        row = manifest.segments[len(manifest.segments) // 2]
        entry_path(directory, row).unlink()
        report = repair(lab.paths, "web", resend=True)
        assert report.salvaged_bytes
        lab.open()
        assert lab.store.salvaged
        assert lab.store.points()[1].plain()["point"] == report.kept_to
        lab.close()
    lab.open()
    end = Position(1, 0, int(report.kept_to.split("/")[-1]))
    given_up = lab.store.add_epoch(writer=b"o" * 16, parent=end, state=EpochState.PROVISIONAL)
    assert not lab.store.salvaged  # its line does not go through what was salvaged
    back = lab.store.roll_back_epoch(given_up.epoch)
    assert back.parent.seq == lab.seq
    assert lab.store.salvaged
    lab.new_epoch(back)
    assert lab.store.salvaged  # a stream is no record
    lab.gap_begin(jump=1)
    lab.commit()
    lab.close()
    lab.open()
    assert not lab.store.salvaged


def wound(lab: Any, path: Path, number: int, place: int) -> None:
    """Flip a bit of the middle one of the sound commits with records, so far from its start."""
    data = bytearray(path.read_bytes())
    sound = sound_commits(memoryview(data), lab.group_id, number)
    start, stop = sorted(c for c in sound if c[1] - c[0] > 1000)[len(sound) // 2]
    assert start + place < stop
    data[start + place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("place", [600, 20], ids=["body", "header"])
def test_headers_tell_what_a_damaged_commit_covered(lab: Any, place: int) -> None:
    """Of the segment that is being appended to, which has no index yet."""
    lab.sync()
    aligned(lab, 20)
    lab.close()
    lab.open()
    lab.start_stream()
    units = lab.rng.sample(range(0, DISKS[0].bytes // BLOCK, 16), 9)  # a bit of the map each
    for unit in units:
        lab.write(0, unit * BLOCK, lab.rng.randbytes(BLOCK))
        lab.commit()
    manifest = lab.store.manifest
    path = segment_path(lab.store.directory, manifest.active_segment)
    head, wanted = Position(1, 0, lab.seq), lab.model([(1, lab.seq)])
    lab.close()
    wound(lab, path, manifest.active_segment, place)
    report = repair(lab.paths, "web", resend=True)
    lost = lost_ranges(lab, head)
    judge_ranges(lost, shown(lab, head), wanted)
    if place < 64:
        assert (lost, report.compared_bytes) == (None, None)
    else:
        # Of those behind the damage nobody knows under which stream they were sealed.
        end = int(report.kept_to.split("/")[-1])
        behind = [c for c in lab.changes if c.position.seq > end and c.length]
        assert 0 < len(behind) < len(units)
        assert lost == united(Range(0, c.offset, c.length) for c in behind)
    ended, _sent = resend(lab, wanted)
    assert shown(lab, ended) == wanted


def test_what_an_earlier_repair_lost_counts_until_its_source_knows(lab: Any) -> None:
    """The records behind it are salvaged twice, and what they lack is told."""
    lab.sync()
    for unit in lab.rng.sample(range(0, DISKS[0].bytes // BLOCK, 2), 100):
        lab.write(0, unit * BLOCK, lab.rng.randbytes(BLOCK))
        lab.commit()
    head, wanted = Position(1, 0, lab.seq), lab.model([(1, lab.seq)])
    directory = lab.paths.store / lab.group_id.hex()
    lab.close()
    seen: list[Range] = []
    for _ in range(2):
        rows = load_newest(directory, lab.group_id).segments
        row = rows[0 if seen else len(rows) // 2]
        if seen:  # of what the first repair left the newest, which has data
            row = next(r for r in rows[::-1] if int(r["data_bytes"]) > 20 * BLOCK)
        wound(lab, entry_path(directory, row), int(row["segment"]), 600)
        repair(lab.paths, "web", resend=True)
        lost = lost_ranges(lab, head)
        assert lost
        assert united([*lost, *seen]) == lost
        judge_ranges(lost, shown(lab, head), wanted)
        seen = lost
    ended, _sent = resend(lab, wanted)
    assert shown(lab, ended) == wanted
    lab.close()
    path = lost_path(directory)
    path.write_bytes(path.read_bytes()[:-1])  # nothing is known then
    assert (
        read_lost(directory, lab.group_id, load_newest(directory, lab.group_id).store_id, head)
        is None
    )


def test_the_record_whose_place_the_gap_takes_is_lost(lab: Any) -> None:
    """All are sound: of the segment its own header alone is damaged. Before the first of them
    stands no other position, so that what it covered is not there any more."""
    lab.sync()
    bits = layout.MAP_BIT_BYTES

    def begin_a_segment(*places: int) -> Position:
        number = lab.store.manifest.active_segment
        while lab.store.manifest.active_segment == number:
            first = lab.write(0, lab.rng.choice(places) * bits, lab.rng.randbytes(BLOCK))
            lab.commit()
        return first

    first = begin_a_segment(0)  # the last that is written there
    number = lab.store.manifest.active_segment
    begin_a_segment(*range(1, DISKS[0].bytes // bits))
    head, wanted = Position(1, 0, lab.seq), lab.model([(1, lab.seq)])
    (row,) = [row for row in lab.store.manifest.segments if int(row["segment"]) == number]
    path = entry_path(lab.store.directory, row)
    lab.close()
    damaged = bytearray(path.read_bytes())
    damaged[20] ^= 1
    path.write_bytes(damaged)
    report = repair(lab.paths, "web", resend=True)
    assert report.kept_to == f"pos:1/0/{first.seq - 1}"
    lost = lost_ranges(lab, head)
    last = lab.changes[-1].offset  # another gap-begin ends the history
    assert lost == united([Range(0, 0, bits), Range(0, last, bits)])
    judge_ranges(lost, shown(lab, head), wanted)
    assert shown(lab, head)[0][:BLOCK] != wanted[0][:BLOCK]
    ended, sent = resend(lab, wanted)
    assert sent[0] >= {0, last // BLOCK}
    assert shown(lab, ended) == wanted
