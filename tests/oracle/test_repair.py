"""A damaged store is repaired from what is whole, or named and left as it is."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import recovery_lab as lab_module

from vrep import errors
from vrep.recovery.export import export
from vrep.recovery.repair import repair
from vrep.target.manifest import DiskEntry, Position
from vrep.target.reader import StoreReader
from vrep.target.segment import entry_path, run_path

DISKS = [DiskEntry("root", 1 << 20, 0)]


@pytest.fixture
def lab(tmp_path: Path, rng: random.Random) -> Iterator[Any]:
    lab = lab_module.Lab(tmp_path, DISKS, rng, level=0, segment_bytes=1 << 17, merge=False)
    yield lab
    lab.close()


def grow(lab: Any) -> list[Position]:
    lab.sync()
    good = []
    for number in range(260):
        good.append(lab.random_write())
        if number % 12 == 0:
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


def recovers(lab: Any, points: list[Position], out: Path) -> None:
    for point in points:
        result = export(lab.paths, "web", f"pos:{point}", out / str(point).replace("/", "-"))
        assert [Path(d.path).read_bytes() for d in result.disks] == lab.at(point)
        assert result.verdict.sealed


def digests(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.iterdir()
        if path.name.startswith(("seg-", "run-", "manifest-"))
    }


@pytest.mark.parametrize("folded", [False, True])
def test_indexes_and_runs_are_made_again(lab: Any, tmp_path: Path, folded: bool) -> None:
    good = grow(lab)
    with pytest.raises(errors.LockedError, match="stop it"):
        repair(lab.paths, "web")
    if folded:
        horizon = good[130]
        lab.store.fold(horizon)
        good = [point for point in good if point >= horizon]
    sample = lab.rng.sample(good, 4)
    wanted = {point: lab.at(point) for point in sample}
    lab.at = wanted.__getitem__
    manifest, directory = lab.store.manifest, lab.store.directory
    lab.close()
    assert repair(lab.paths, "web").repaired == []
    damaged = set()
    for entry in lab.rng.sample(list(manifest.segments), 4):
        path = entry_path(directory, entry)
        end, size = int(entry["data_end"]), int(entry["file_bytes"])
        if lab.rng.random() < 0.3:
            path.write_bytes(path.read_bytes()[: lab.rng.randrange(end, size)])
        else:
            flip(path, lab.rng.randrange(size - 256, size))  # its trailer
        damaged.add(path.name)
    for run in manifest.runs[:1]:
        path = run_path(directory, int(run["run"]))
        path.unlink()
        damaged.add(path.name)
    with pytest.raises(errors.IntegrityError):
        StoreReader(lab.paths.store, lab.group_id).verify()
    report = repair(lab.paths, "web")
    assert (set(report.repaired), report.lost) == (damaged, [])
    assert repair(lab.paths, "web").repaired == []
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        reader.verify()
    recovers(lab, sample, tmp_path / "out")
    lab.open()  # and its writer goes on
    lab.start_stream()
    lab.random_write()
    lab.commit()


def test_lost_records_are_named_and_nothing_is_changed(lab: Any) -> None:
    grow(lab)
    manifest, directory = lab.store.manifest, lab.store.directory
    lab.close()
    entry = manifest.segments[lab.rng.randrange(1, len(manifest.segments))]
    path = entry_path(directory, entry)
    other = entry_path(directory, manifest.segments[0])
    for damage in ("byte", "file", "an index as well"):
        whole, other_whole = path.read_bytes(), other.read_bytes()
        if damage == "an index as well":  # which could be made again
            flip(other, len(other_whole) - 100)
        if damage == "byte":
            flip(path, lab.rng.randrange(200, int(entry["data_end"]) - 200))
        else:
            path.unlink()
        stood = digests(directory)
        report = repair(lab.paths, lab.group_id.hex())
        assert report.repaired == []
        assert digests(directory) == stood
        assert [each.object for each in report.lost] == [path.name]
        assert report.lost[0].first == f"pos:{Position.of(entry['first'])}"
        assert report.lost[0].last == f"pos:{Position.of(entry['last'])}"
        path.write_bytes(whole)
        other.write_bytes(other_whole)
    path.unlink()
    report = repair(lab.paths, "web", start_over=True)
    assert not directory.exists()
    assert sorted(p.name for p in Path(report.set_aside).glob("seg-*"))
    with pytest.raises(errors.NotFoundError):
        StoreReader(lab.paths.store, lab.group_id)
