"""The manifests of a store are gone and its segments are there: it is damage by name, nothing is
begun in its place, and a manifest that is put back brings all of it back. And a store that is
deleted goes at once."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import recovery_lab as lab_module

from vrep import errors
from vrep.app import cli
from vrep.recovery.held import held_groups
from vrep.recovery.repair import repair
from vrep.target import removal
from vrep.target.manifest import DiskEntry, manifest_numbers, manifest_path
from vrep.target.reader import StoreReader
from vrep.target.segment import HEADER_BYTES, segment_path
from vrep.target.store import GroupStore, StoreSpec

DISKS = [DiskEntry("root", 1 << 20, 0)]


@pytest.fixture
def lab(tmp_path: Path, rng: random.Random) -> Iterator[Any]:
    lab = lab_module.Lab(tmp_path, DISKS, rng, level=0, segment_bytes=1 << 17, merge=False)
    lab.sync()
    for _ in range(60):
        lab.random_write()
    lab.commit()
    yield lab
    lab.close()


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def begin_a_segment(lab: Any) -> None:
    """So that the newest manifest alone names the newest segment, which has records, and so few
    that no end of the store begins another one behind it."""
    number = lab.store.manifest.active_segment
    while lab.store.manifest.active_segment == number:
        lab.write(0, 0, lab.rng.randbytes(4096))
        lab.commit()
    for _ in range(2):  # the later commit tells that the one before it was durable
        lab.write(0, 0, lab.rng.randbytes(4096))
        lab.commit()


def test_segments_without_a_manifest_are_damage_and_stay(lab: Any, tmp_path: Path) -> None:
    durable, directory = lab.store.durable, lab.store.directory
    spec = StoreSpec("web", DISKS, lab.epoch, [])
    lab.close()
    kept = tmp_path / "kept"
    kept.mkdir()
    for number in manifest_numbers(directory):
        manifest_path(directory, number).rename(kept / manifest_path(directory, number).name)
    held = content(directory)
    assert sum(name.startswith("seg-") for name in held) > 1

    with pytest.raises(
        errors.CorruptError, match=r"its manifests are lost, of its segments \d+ are"
    ):
        StoreReader(lab.paths.store, lab.group_id)
    for create in (None, spec):  # the source that comes back asks for a new one
        with pytest.raises(errors.CorruptError, match="its manifests are lost"):
            GroupStore.open(lab.paths.store, lab.group_id, create=create)
        assert content(directory) == held
    [(group_id, found)] = held_groups(lab.paths)
    assert group_id == lab.group_id
    assert isinstance(found, errors.CorruptError)
    for resend in (False, True):
        report = repair(lab.paths, lab.group_id.hex(), resend=resend)
        assert [lost.object for lost in report.lost] == ["manifest"]
        assert (report.repaired, report.set_aside, content(directory)) == ([], "", held)

    for path in kept.iterdir():
        shutil.copy(path, directory)
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        reader.verify()
        assert reader.durable == durable
    for number in manifest_numbers(directory):
        manifest_path(directory, number).unlink()
    report = repair(lab.paths, lab.group_id.hex(), start_over=True)
    assert content(Path(report.set_aside)) == held
    assert list(held_groups(lab.paths)) == []


def test_a_directory_without_a_history_is_no_damage(lab: Any) -> None:
    """As a creation leaves it that was cut off before its first manifest."""
    other = bytes(range(16))
    directory = lab.paths.store / other.hex()
    directory.mkdir()
    (directory / "lock").touch()
    assert [group_id for group_id, _ in held_groups(lab.paths)] == [lab.group_id]
    store = GroupStore.open(lab.paths.store, other, create=StoreSpec("mail", DISKS, lab.epoch, []))
    store.close()
    assert [group_id for group_id, _ in held_groups(lab.paths)] == sorted([lab.group_id, other])


def test_a_deletion_that_is_cut_off_is_a_deletion(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any file: nothing of the store is taken for damage, and the next start ends it."""
    directory = lab.store.directory
    lab.close()

    def cut(path: Path) -> None:
        next(Path(path).glob("manifest-*")).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(removal.shutil, "rmtree", cut)
        with pytest.raises(KeyboardInterrupt):
            removal.remove_store(directory)
    assert list(held_groups(lab.paths)) == []
    assert len(list(lab.paths.store.iterdir())) == 1
    removal.finish_removals(lab.paths.store)
    assert list(lab.paths.store.iterdir()) == []
    removal.finish_removals(lab.paths.root / "not there")


def test_repair_advises_only_what_can_be_done(lab: Any, capsys: pytest.CaptureFixture[str]) -> None:
    directory = lab.store.directory
    lab.close()
    for number in manifest_numbers(directory):
        manifest_path(directory, number).unlink()
    code = cli.run(["repair", lab.group_id.hex(), "--dir", str(lab.paths.root)])
    assert code == errors.CorruptError.exit_code
    told = capsys.readouterr()
    assert told.out.startswith("lost: manifest: ")
    assert "--start-over" in told.err
    assert "--resend" not in told.err


def test_a_lost_newest_manifest_is_damage_and_is_made_again(lab: Any) -> None:
    """The one before it does not know the newest segment, whose records were acknowledged."""
    begin_a_segment(lab)
    durable, directory = lab.store.durable, lab.store.directory
    lab.close()
    newest = manifest_path(directory, manifest_numbers(directory)[-1])
    newest.unlink()
    held = content(directory)
    for _ in range(2):
        with pytest.raises(errors.CorruptError, match=rf"{newest.name}: it is lost"):
            StoreReader(lab.paths.store, lab.group_id)
        with pytest.raises(errors.CorruptError, match=rf"{newest.name}: it is lost"):
            GroupStore.open(lab.paths.store, lab.group_id)
        assert content(directory) == held

    report = repair(lab.paths, lab.group_id.hex())
    assert report.repaired[0] == newest.name
    assert report.lost == []
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        reader.verify()
        assert reader.durable == durable
    lab.open()
    assert lab.store.durable == durable


def test_a_lost_newest_manifest_is_damage_over_a_damaged_segment(lab: Any) -> None:
    """Records that were durable are there, and are damaged: nothing is written over them."""
    directory = lab.store.directory
    begin_a_segment(lab)
    number = lab.store.manifest.active_segment
    lab.close()
    path = segment_path(directory, number)
    data = bytearray(path.read_bytes())
    data[HEADER_BYTES + 20] ^= 1
    path.write_bytes(data)
    manifest_path(directory, manifest_numbers(directory)[-1]).unlink()
    held = content(directory)
    with pytest.raises(errors.CorruptError, match="it is lost"):
        GroupStore.open(lab.paths.store, lab.group_id)
    report = repair(lab.paths, lab.group_id.hex())
    assert [lost.object for lost in report.lost] == ["manifest"]
    assert path.read_bytes() == bytes(data)
    assert set(content(directory)) == set(held)


def test_a_segment_that_was_only_begun_is_no_loss(lab: Any) -> None:
    """As a crash leaves it before the manifest that would have named it, cut anywhere."""
    durable, directory = lab.store.durable, lab.store.directory
    lab.close()
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        manifest = reader.manifest
    head = segment_path(directory, manifest.active_segment).read_bytes()[:HEADER_BYTES]
    for size in (0, 7, HEADER_BYTES):
        segment_path(directory, manifest.next_segment).write_bytes(head[:size])
        with StoreReader(lab.paths.store, lab.group_id) as reader:
            assert reader.durable == durable
    lab.open()
    assert lab.store.durable == durable
