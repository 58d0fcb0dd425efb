"""One bit of each kind of object of a store, flipped: named, or harmless, and never served."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import recovery_lab as lab_module

from vrep import errors
from vrep._core import layout
from vrep._core.index import Index
from vrep.recovery.changes import list_changes
from vrep.recovery.export import export
from vrep.recovery.history import History
from vrep.recovery.points import list_points
from vrep.recovery.view import discard, list_views, start_test, view_directories
from vrep.target.manifest import DiskEntry, Position, load_newest, manifest_path
from vrep.target.reader import StoreReader
from vrep.target.runs import run_path

DISKS = [DiskEntry("root", (1 << 20) + 512, 0), DiskEntry("data", 300 * 1024 + 1536, 1)]
FLIPS = 2
"""of each kind"""
ARRAYS = {
    "short": layout.INDEX_ENTRY,
    "long": layout.INDEX_ENTRY,
    "streams": layout.INDEX_STREAM,
    "events": layout.INDEX_EVENT,
    "times": layout.INDEX_TIME,
}
Places = dict[str, list[tuple[Path, int, int]]]
"""kind: (file, first byte, end)"""


@pytest.fixture
def lab(tmp_path: Path, rng: random.Random) -> Iterator[Any]:
    """Nine closed segments, eight of them in a run as well, and one that is open and empty."""
    lab = lab_module.Lab(tmp_path / "site", DISKS, rng, segment_bytes=4096, merge=False)
    lab.sync()
    lab.zeroes(0, 0, 400 * 1024)
    for number in range(9):
        for _ in range(6):
            lab.random_write()
        lab.mark(f"mark {number}")
        lab.close()
        lab.open()
        lab.start_stream()
    lab.random_write()
    lab.close()
    lab.open()
    while lab.store.merge_once():
        continue
    lab.close()
    yield lab
    for each in view_directories(lab.paths):
        discard(each)


def places(lab: Any) -> Places:
    found: Places = {}

    def add(kind: str, path: Path, begin: int, end: int) -> None:
        if begin < end:
            found.setdefault(kind, []).append((path, begin, end))

    with StoreReader(lab.paths.store, lab.group_id) as reader:
        manifest = load_newest(reader.directory, lab.group_id)
        add("manifest", manifest_path(reader.directory, manifest.number), 0,
            manifest_path(reader.directory, manifest.number).stat().st_size)  # fmt: skip
        for row in manifest.segments:
            number = int(row["segment"])
            path = reader.path(number)
            add("segment header", path, 0, layout.SEGMENT_HEADER.itemsize)
            spans = list(reader.spans(number))
            for span in spans:
                for one in span.found:
                    at = span.start + int(one["position"])
                    body = int(one["header"]["body_bytes"])
                    add("record header", path, at, at + layout.RECORD.itemsize)
                    kind = int(one["header"]["kind"])
                    name = "pieces" if kind in (layout.KIND_WRITE, layout.KIND_SYNC) else "body"
                    end = at + layout.RECORD.itemsize + body
                    add(name, path, at + layout.RECORD.itemsize, end)
            last = spans[-1]
            one = last.found[-1]
            end = last.start + int(one["position"]) + layout.RECORD.itemsize
            end += int(one["header"]["body_bytes"])
            add("commit", path, -(-end // 64) * 64, int(row["data_end"]))
            index(add, "index", path)
        for row in manifest.runs:
            index(add, "run", run_path(reader.directory, int(row["run"])))
        active = reader.path(manifest.active_segment)
        add("open segment header", active, 0, layout.SEGMENT_HEADER.itemsize)
    return found


def index(add: Any, kind: str, path: Path) -> None:
    trailer = Index.open(path).trailer
    for name, dtype in ARRAYS.items():
        at = trailer[f"{name}_at"]
        add(f"{kind} {name}", path, at, at + trailer[f"{name}_count"] * dtype.itemsize)
    size = path.stat().st_size
    add(f"{kind} nodes", path, trailer["nodes_at"], size - layout.INDEX_TRAILER.itemsize)
    add(f"{kind} trailer", path, size - layout.INDEX_TRAILER.itemsize, size)


def turn(path: Path, at: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


@contextmanager
def flipped(path: Path, at: int, bit: int) -> Iterator[None]:
    turn(path, at, bit)
    try:
        yield
    finally:
        turn(path, at, bit)


def noted(error: BaseException | str, path: Path, what: str) -> int:
    """An error must say which object is damaged: by its file, its number, or the place on the
    disk, or in the order, of what cannot be had. Counts as one that was noticed."""
    text = str(error)
    names = (path.name, path.name[4:12], "disk ", "position ")
    assert any(name in text for name in names), (what, text)
    return 1


def served(lab: Any, path: Path, what: str, wanted: list[bytearray]) -> int:
    """Every block of a view, right or refused; whether something was refused."""
    try:
        info = start_test(lab.paths, "web")
    except errors.VrepError as error:
        return noted(error, path, what)
    refused = False
    try:
        for disk, content in zip(info.disks, wanted, strict=True):
            with lab_module.Nbd(info.socket, disk.name) as nbd:
                for offset in range(0, len(content), 65536):
                    length = min(65536, len(content) - offset)
                    try:
                        data = nbd.read(offset, length)
                    except OSError:
                        refused = True
                    else:
                        assert data == content[offset : offset + length], (what, offset)
        (shown,) = list_views(lab.paths)
        assert refused == any(text.startswith("unreadable") for text in shown.conditions)
        for text in shown.conditions:
            noted(text, path, what)
    finally:
        discard(view_directories(lab.paths)[0])
    return int(refused)


def test_a_bit_of_each_kind_of_object(lab: Any, tmp_path: Path, rng: random.Random) -> None:
    where = places(lab)
    kinds = {"manifest", "segment header", "record header", "pieces", "body", "commit"}
    kinds |= {f"{of} {name}" for of in ("index", "run") for name in (*ARRAYS, "nodes", "trailer")}
    assert set(where) == kinds | {"open segment header"}
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        durable = reader.durable
        everything = lab.model(reader.ancestry(durable))
    good = list_points(lab.paths, "web")
    assert good.verdict.whole
    assert good.newest is not None
    changes = list_changes(lab.paths, "web", "mark 3")
    silent: dict[str, int] = {}
    for kind, spots in sorted(where.items()):
        for number in range(FLIPS):
            path, begin, end = rng.choice(spots)
            at, bit = rng.randrange(begin, end), rng.randrange(8)
            noticed = 0
            with flipped(path, at, bit):
                what = f"{kind}: {path.name}, byte {at}, bit {bit}"
                try:
                    listed = list_points(lab.paths, "web")
                except errors.VrepError as error:
                    noticed += noted(error, path, what)
                else:
                    if listed.verdict.whole:
                        assert listed.ranges == good.ranges, what
                        assert listed.marks == good.marks, what
                    else:
                        noticed += noted(listed.verdict.error, path, what)
                try:
                    out = export(lab.paths, "web", "latest", tmp_path / f"{kind}-{number}")
                except errors.VrepError as error:
                    noticed += noted(error, path, what)
                else:
                    found = [Path(disk.path).read_bytes() for disk in out.disks]
                    assert found == everything, what
                try:
                    assert list_changes(lab.paths, "web", "mark 3") == changes, what
                except errors.VrepError as error:
                    noticed += noted(error, path, what)
                if number == 0:
                    noticed += served(lab, path, what, everything)
            if not noticed:
                silent[kind] = silent.get(kind, 0) + 1
    # What nobody reads may rot unseen until somebody does. Nothing else may.
    assert not [kind for kind in silent if kind in ("pieces", "record header", "manifest")], silent
    assert set(silent) <= {
        "run short", "run long", "run times", "run nodes", "index nodes", "index times",
        "open segment header",
    }, silent  # fmt: skip
    assert list_points(lab.paths, "web").verdict.whole


def test_a_damaged_entry_leads_past_no_record(lab: Any) -> None:
    """A walk begins where an index says that an older record stands; one that says so of a newer
    record would pass over what is between: a time would mean an older point than it does."""
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        number = next(
            number
            for number in reader.manifest.segments["segment"][2:].tolist()
            if Index.open(reader.path(number)).short_entries.size
        )
        path = reader.path(number)
        headers = [one["header"] for span in reader.spans(number) for one in span.found]
        aside = (layout.KIND_STREAM, layout.KIND_TALLY)
        positions = [Position.of(h) for h in headers if int(h["kind"]) not in aside]
        times = [int(h["wall_ns"]) for h in headers if int(h["kind"]) not in aside]
    index = Index.open(path)
    entries = index.short_entries
    last = int(entries["position"].argmax())
    at = index.trailer["short_at"] + last * layout.INDEX_ENTRY.itemsize
    at += layout.INDEX_ENTRY.fields["seq"][1]
    with path.open("r+b") as file:
        file.seek(at)
        file.write((1).to_bytes(8, "little"))
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        history = History(reader)
        for position, wall_ns in zip(positions, times, strict=True):
            assert history.at_time(wall_ns).position == position
            found = history.locate(position)
            assert found is not None
            assert found.position == position
