"""What a target could do to a history is noticed: by points, by export, and by a view's reads.

A forger here knows all formats and no key: it rebuilds segments, indexes and manifests so that
every digest is right again.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recovery_lab as lab_module

from vrep import errors
from vrep._core import layout, record
from vrep.recovery.export import export
from vrep.recovery.points import list_points
from vrep.recovery.view import (
    discard,
    list_views,
    start_test,
    stop_test,
    view_directories,
)
from vrep.target.files import Files
from vrep.target.manifest import DiskEntry, Position, load_newest, manifest_path
from vrep.target.reader import StoreReader
from vrep.target.segment import Batch, SegmentId, SegmentWriter, segment_path

HEADER = layout.RECORD.itemsize
STRIDE = 64 * 1024  # a view fetches as much at once
DISK = 16 * STRIDE


@pytest.fixture
def lab(tmp_path: Path, rng: random.Random) -> Iterator[Any]:
    """A first sync and sixteen writes of one block each, each with its tally."""
    lab = lab_module.Lab(tmp_path / "site", [DiskEntry("root", DISK, 0)], rng, level=0)
    lab.sync()
    for block in range(16):
        lab.write(0, block * STRIDE, rng.randbytes(4096))
        lab.commit()
    yield lab
    for each in view_directories(lab.paths):
        discard(each)  # of a test that failed
    lab.close()


def records_of(lab: Any) -> list[bytes]:
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        return [
            bytes(reader.record(span.segment, span.start + int(found["position"])))
            for span in reader.records()
            for found in span.found
        ]


def forge(lab: Any, edit: Callable[[list[bytes]], list[bytes]]) -> None:
    """Replace the history by an edited one, with everything but the sealed parts made right."""
    lab.close()
    records = edit(records_of(lab))
    directory = lab.paths.store / lab.group_id.hex()
    manifest = load_newest(directory, lab.group_id)
    files, number = Files(), manifest.next_segment
    ident = SegmentId(lab.group_id, manifest.store_id, number, manifest.lease)
    writer = SegmentWriter(files, segment_path(directory, number), ident, Position(), None, 1)
    for one in records:
        batch = Batch.of(one, record.scan(one)[0])
        end = writer.write([batch], writer.last, 1)
        writer.committed([batch], end)
    entry = writer.seal()
    writer.close()
    changed = manifest.next(
        2,
        segments=entry.reshape(1),
        runs=np.zeros(0, layout.MANIFEST_RUN),
        active_segment=0,
        next_segment=number + 1,
    )
    manifest_path(directory, changed.number).write_bytes(changed.encode())


def header_of(data: bytes) -> Any:
    return np.frombuffer(data[:HEADER], layout.RECORD)[0]


def with_header(data: bytes, **fields: int) -> bytes:
    header = np.frombuffer(data[:HEADER], layout.RECORD).copy()
    for name, value in fields.items():
        header[name] = value
    record.finish(header)
    return header.tobytes() + data[HEADER:]


def at(records: list[bytes], kind: int, nth: int) -> int:
    return [i for i, data in enumerate(records) if header_of(data)["kind"] == kind][nth]


def noticed(lab: Any, kind: type[errors.VrepError], text: str) -> None:
    """Points name it, export refuses, with the segment and the place."""
    verdict = list_points(lab.paths, "web").verdict
    assert not verdict.whole
    assert verdict.error.startswith(kind.__name__)
    assert text in verdict.error
    assert "seg" in verdict.error
    out = lab.root / "out"
    with pytest.raises(kind, match="seg"):
        export(lab.paths, "web", "latest", out)
    assert not out.exists()


def test_the_forger_is_not_noticed_when_it_changes_nothing(lab: Any) -> None:
    forge(lab, lambda records: records)
    verdict = list_points(lab.paths, "web").verdict
    assert verdict.whole
    assert verdict.tallies == 18
    result = export(lab.paths, "web", "latest", lab.root / "out")
    assert Path(result.disks[0].path).read_bytes() == lab.model([(1, 99)])[0]


def test_a_record_that_was_removed(lab: Any) -> None:
    def drop(records: list[bytes]) -> list[bytes]:
        del records[at(records, layout.KIND_WRITE, 7)]
        return records

    forge(lab, drop)
    noticed(lab, errors.OmittedError, "1/0/")


def test_a_record_and_its_tally_that_were_removed(lab: Any) -> None:
    def drop(records: list[bytes]) -> list[bytes]:
        gone = at(records, layout.KIND_WRITE, 7)
        del records[gone : gone + 2]
        return records

    forge(lab, drop)
    noticed(lab, errors.OmittedError, "1/0/11 follows 1/0/9")


def test_a_record_that_was_removed_and_the_rest_renumbered(lab: Any) -> None:
    def drop(records: list[bytes]) -> list[bytes]:
        gone = at(records, layout.KIND_WRITE, 7)
        kept = records[:gone] + records[gone + 2 :]
        return kept[:gone] + [
            with_header(data, seq=int(header_of(data)["seq"]) - 1) for data in kept[gone:]
        ]

    forge(lab, drop)
    noticed(lab, errors.AuthError, "1/0/10")


def test_a_removed_record_hidden_by_a_false_gap(lab: Any) -> None:
    """A gap-begin may jump: but none can be made, nor its flag set, without the key."""

    def hide(records: list[bytes]) -> list[bytes]:
        gone = at(records, layout.KIND_WRITE, 7)
        begin = np.zeros(1, layout.RECORD)
        begin["kind"], begin["epoch"], begin["flags"] = layout.KIND_GAP_BEGIN, 1, 8
        begin["magic"], begin["version"] = layout.RECORD_MAGIC, layout.RECORD_VERSION
        begin["seq"], begin["wall_ns"] = 10, 5
        record.finish(begin)
        records[gone : gone + 2] = [begin.tobytes()]
        return records

    forge(lab, hide)
    noticed(lab, errors.OmittedError, "1/0/")


def test_records_that_changed_places(lab: Any) -> None:
    def swap(records: list[bytes]) -> list[bytes]:
        one, two = (at(records, layout.KIND_WRITE, n) for n in (4, 5))
        records[one], records[two] = records[two], records[one]
        return records

    forge(lab, swap)
    noticed(lab, errors.OmittedError, "1/0/")


@pytest.mark.parametrize(
    ("field", "value"), [("offset", 0), ("wall_ns", 7), ("disk", 0), ("flags", 5)]
)
def test_a_header_that_was_changed(lab: Any, field: str, value: int) -> None:
    def change(records: list[bytes]) -> list[bytes]:
        one = at(records, layout.KIND_WRITE, 9)
        changed = with_header(records[one], **{field: value})
        if changed == records[one]:
            changed = with_header(records[one], mono_ns=1)
        records[one] = changed
        return records

    forge(lab, change)
    noticed(lab, errors.AuthError, "1/0/12")


@pytest.mark.parametrize("where", ["piece", "tag"])
def test_a_sealed_byte_that_was_changed(lab: Any, where: str) -> None:
    def change(records: list[bytes]) -> list[bytes]:
        one = at(records, layout.KIND_WRITE, 9)
        data = bytearray(records[one])
        body = HEADER + 4 * int(header_of(records[one])["pieces"])
        data[{"piece": body + 100, "tag": body + 4096 + 3}[where]] ^= 0x40
        records[one] = bytes(data)
        return records

    forge(lab, change)
    if where == "tag":
        noticed(lab, errors.AuthError, "1/0/12")
        return
    # The tally covers tags: a changed byte below one shows when its piece is opened.
    out = lab.root / "out"
    with pytest.raises(errors.AuthError, match="1/0/12 in segment"):
        export(lab.paths, "web", "latest", out)
    assert list(out.iterdir()) == []
    info = start_test(lab.paths, "web")
    good = lab.model([(1, 99)])[0]
    with lab_module.Nbd(info.socket) as nbd:
        assert nbd.read(0, 4096) == good[:4096]
        for _ in range(2):
            with pytest.raises(OSError, match="5"):
                nbd.read(9 * STRIDE, 4096)
        assert nbd.read(10 * STRIDE, 4096) == good[10 * STRIDE : 10 * STRIDE + 4096]
    conditions = list_views(lab.paths)[0].conditions
    assert any("unreadable" in text and "1/0/12" in text for text in conditions)
    stop_test(lab.paths, "web")


def test_a_tally_that_was_changed(lab: Any) -> None:
    def change(records: list[bytes]) -> list[bytes]:
        one = at(records, layout.KIND_TALLY, 9)
        records[one] = records[one][:-1] + bytes([records[one][-1] ^ 1])
        return records

    forge(lab, change)
    noticed(lab, errors.AuthError, "tally")


def test_an_end_that_was_taken_back_after_a_check(lab: Any) -> None:
    assert list_points(lab.paths, "web").verdict.whole
    forge(lab, lambda records: records[:-4])
    noticed_text = list_points(lab.paths, "web").verdict.error
    assert noticed_text.startswith("OmittedError")
    assert "1/0/16" in noticed_text
    assert "1/0/18" in noticed_text
    with pytest.raises(errors.OmittedError):
        export(lab.paths, "web", "latest", lab.root / "out")


def test_a_full_disk_does_not_spoil_a_good_check(
    lab: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vrep.recovery.check.write_atomic", full)
    assert list_points(lab.paths, "web").verdict.whole
    assert "No space left" in caplog.text
    assert export(lab.paths, "web", "latest", lab.root / "out").disks
    monkeypatch.setattr("vrep.recovery.check.make_private_directory", full)
    assert list_points(lab.paths, "web").verdict.whole


def test_an_index_that_leaves_a_record_out(lab: Any) -> None:
    """The records are all there, but the index of their segment would show an older block."""

    def twice(records: list[bytes]) -> list[bytes]:
        return records

    lab.write(0, 0, b"new" * 1000)
    lab.commit()
    forge(lab, twice)
    directory = lab.paths.store / lab.group_id.hex()
    manifest = load_newest(directory, lab.group_id)
    records = records_of(lab)
    files, number = Files(), manifest.next_segment
    ident = SegmentId(lab.group_id, manifest.store_id, number, manifest.lease)
    writer = SegmentWriter(files, segment_path(directory, number), ident, Position(), None, 1)
    last = at(records, layout.KIND_WRITE, -1)
    for i, one in enumerate(records):
        batch = Batch.of(one, record.scan(one)[0])
        end = writer.write([batch], writer.last, 1)
        if i == last:  # in the file, not in the index
            writer.commits, writer.end, writer.records = writer.commits + 1, end, i
            writer.last = batch.last
        else:
            writer.committed([batch], end)
    entry = writer.seal()
    writer.close()
    changed = manifest.next(3, segments=entry.reshape(1), next_segment=number + 1)
    manifest_path(directory, changed.number).write_bytes(changed.encode())
    noticed(lab, errors.CorruptError, "does not say what its records say")


def test_a_checked_segment_is_read_again_when_its_file_was_changed(lab: Any) -> None:
    forge(lab, lambda records: records)
    assert list_points(lab.paths, "web").verdict.whole
    directory = lab.paths.store / lab.group_id.hex()
    path = segment_path(directory, load_newest(directory, lab.group_id).next_segment - 1)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    verdict = list_points(lab.paths, "web").verdict
    assert not verdict.whole
    assert "damaged" in verdict.error


def test_what_a_check_remembers_cannot_be_forged(lab: Any) -> None:
    """Its file is under a MAC: an edited or foreign one counts for nothing."""
    forge(lab, lambda records: records)
    list_points(lab.paths, "web")
    [path] = (lab.root / "checked").iterdir()
    saved = path.read_bytes()

    def drop(records: list[bytes]) -> list[bytes]:
        del records[at(records, layout.KIND_WRITE, 7)]
        return records

    assert b'"records":18' in saved
    path.write_bytes(saved.replace(b'"records":18', b'"records":17'))
    assert list_points(lab.paths, "web").verdict.records == 18
    forge(lab, drop)
    noticed(lab, errors.OmittedError, "1/0/")


def test_another_tenants_key_opens_nothing(lab: Any, tmp_path: Path) -> None:
    """A key of the right name and the wrong secret is refused before anything starts."""
    other = lab_module.Lab(tmp_path / "other", [DiskEntry("root", DISK, 0)], lab.rng)
    other.close()
    shutil.copy(other.root / "keys" / "acme.key", lab.root / "keys" / "acme.key")
    for attempt in (
        lambda: start_test(lab.paths, "web"),
        lambda: export(lab.paths, "web", "latest", lab.root / "out"),
    ):
        with pytest.raises(errors.TenantKeyError, match=lab.tenant.key_id):
            attempt()
    assert list_views(lab.paths) == []
    assert not (lab.root / "out").exists()


def test_a_data_key_of_another_group_opens_nothing(lab: Any) -> None:
    """Wrapped by the right tenant, but not what sealed these records."""
    from vrep.keys.datakey import DataKey

    wrong = DataKey.create(lab.group_id).wrap(lab.tenant)
    lab.store.set_wrapped_keys([wrong])
    with pytest.raises(errors.AuthError, match="another key"):
        start_test(lab.paths, "web")
    assert list_views(lab.paths) == []
    assert not list_points(lab.paths, "web").verdict.whole
