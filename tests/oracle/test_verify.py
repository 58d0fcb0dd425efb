"""Verification: what recovers is proven, what does not is named, and no verdict is believed that
does not speak of the history that is there. Real ext4 images, real e2fsck."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from vrep import errors
from vrep._core import layout
from vrep._core.index import Index, merge
from vrep.app import cli
from vrep.recovery import alone, check, verdict, view
from vrep.recovery.history import History
from vrep.recovery.points import list_points
from vrep.recovery.schedule import AGAIN_S, VerifySchedule
from vrep.recovery.verdict import VerdictBook, decode, newest
from vrep.recovery.verify import VerifyOptions, VerifyReport, verify
from vrep.recovery.view import list_views, restart_views, start_test
from vrep.settings import VerifyConfig, load_config
from vrep.site import Site
from vrep.target.manifest import DiskEntry, EpochState, Position, load_newest, manifest_path
from vrep.target.reader import StoreReader
from vrep.target.segment import run_path, segment_path

MIB = 1 << 20
DISK = 8 * MIB
QUICK = VerifyOptions(samples=0, file_systems=False)


def load_lab() -> Any:
    name = "recovery_lab"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


lab_module = load_lab()


@pytest.fixture
def lab(tmp_path: Path, rng: random.Random) -> Iterator[Any]:
    lab = lab_module.Lab(tmp_path / "site", [DiskEntry("root", DISK, 0)], rng, level=0)
    yield lab
    lab.close()


def image(tmp_path: Path, *, journal: bool = True) -> bytearray:
    """A real ext4 file system with files, as a crash leaves it: its journal must be replayed."""
    tree, path = tmp_path / "tree", tmp_path / "root.raw"
    tree.mkdir()
    for number in range(40):
        (tree / f"file{number}").write_bytes(os.urandom(3000 + number))
    kind = ["-O", "has_journal", "-J", "size=1"] if journal else ["-O", "^has_journal"]
    subprocess.run(
        [
            "mke2fs",
            "-q",
            "-F",
            "-t",
            "ext4",
            "-b",
            "1024",
            *kind,
            "-d",
            tree,
            path,
            str(DISK >> 10),
        ],
        check=True,
        capture_output=True,
    )
    if journal:
        commands = tmp_path / "commands"
        block = tmp_path / "block"
        block.write_bytes(b"\0" * 1024)
        commands.write_text(f"jo\njw -b 8000 {block}\njc\n")
        subprocess.run(["debugfs", "-w", "-f", commands, path], check=True, capture_output=True)
        shown = subprocess.run(["dumpe2fs", "-h", path], check=True, capture_output=True, text=True)
        assert "needs_recovery" in shown.stdout
    return bytearray(path.read_bytes())


def fill(lab: Any, content: bytes | bytearray) -> Position:
    """A first sync of a disk."""
    lab.gap_begin()
    for at in range(0, len(content), 65536):
        part = bytes(content[at : at + 65536])
        if any(part):
            lab.write(0, at, part, layout.KIND_SYNC)
    lab.gap_end()
    position: Position = lab.commit()
    return position


def no_view(lab: Any) -> None:
    assert list_views(lab.paths) == []
    assert "vrep-verify-" not in Path("/proc/self/mounts").read_text()


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def shown(lab: Any) -> dict[str, str]:
    """States of the verdicts that `points` shows."""
    return {each.point: each.state for each in list_points(lab.paths, "web").verdicts}


def site_of(lab: Any) -> Site:
    return Site(lab.root)


# ---- what recovers -----------------------------------------------------------------------------


def test_a_point_that_recovers_is_good_with_its_file_system(lab: Any, tmp_path: Path) -> None:
    first = fill(lab, image(tmp_path))
    lab.mark("nightly")
    last = lab.write(0, DISK - 4096, b"x" * 4096)
    lab.commit()
    seen: list[tuple[str, int, int]] = []
    report = verify(
        lab.paths,
        "web",
        options=VerifyOptions(samples=1),
        progress=lambda *step: seen.append(step),
    )
    assert report.result == "good"
    assert [v.point for v in report.verdicts] == [f"pos:{last}", f"pos:{first}"]
    (check,) = report.verdicts[0].checks
    assert (check.what, check.disk, check.result) == ("e2fsck", "root", "good")
    assert re.match(r"root: \d+/\d+ files", check.text)
    assert report.records == last.seq
    assert report.tallies == last.seq
    assert report.objects["segments"] == 1
    assert report.bytes > 100_000
    assert {what for what, _done, _total in seen} == {"root"}
    no_view(lab)
    assert shown(lab) == {f"pos:{first}": "good", f"pos:{last}": "good"}
    told = site_of(lab).status("web")["groups"]["web"]
    assert told["verdict"]["state"] == "good"
    assert told["verdict"]["point"] == f"pos:{last}"
    assert "verify-failed" not in told["conditions"]


def test_a_partition_is_found(lab: Any, tmp_path: Path) -> None:
    start = MIB
    content = bytearray(DISK)
    inner = image(tmp_path)
    subprocess.run(
        ["resize2fs", "-f", tmp_path / "root.raw", "5M"], capture_output=True, check=False
    )
    shutil.rmtree(tmp_path / "tree")
    path = tmp_path / "root.raw"
    path.unlink()
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", path, "5M"], check=True)
    inner = bytearray(path.read_bytes())
    content[start : start + len(inner)] = inner
    content[446 + 4] = 0x83
    content[446 + 8 : 446 + 12] = (start // 512).to_bytes(4, "little")
    content[510:512] = b"\x55\xaa"
    fill(lab, content)
    report = verify(lab.paths, "web", options=VerifyOptions(samples=0))
    (check,) = report.verdicts[0].checks
    assert (check.disk, check.result) == ("root:1", "good")


def test_a_file_system_that_is_damaged_is_bad(lab: Any, tmp_path: Path) -> None:
    content = image(tmp_path, journal=False)
    good = fill(lab, content)
    lab.write(0, 40 * 1024, b"\xff" * 65536)  # bitmaps and inodes
    last = lab.commit()
    report = verify(lab.paths, "web", options=VerifyOptions(samples=0))
    assert report.result == "bad"
    (check,) = report.verdicts[0].checks
    assert check.result == "bad"
    assert not report.verdicts[0].damages
    no_view(lab)
    told = site_of(lab).status("web")["groups"]["web"]
    assert told["conditions"].count("verify-failed") == 1
    assert site_of(lab).verdict(site_of(lab).status())[0] == 2
    # What is wrong at one point is not held against another.
    assert verify(lab.paths, "web", f"pos:{good}").result == "good"
    assert shown(lab) == {f"pos:{good}": "good", f"pos:{last}": "bad"}


def test_without_nbdfuse_the_check_is_skipped_and_says_why(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(lab, image(tmp_path))
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "nbdfuse" else which(name))
    (check,) = verify(lab.paths, "web", options=VerifyOptions(samples=0)).verdicts[0].checks
    assert check.result == "skipped"
    assert "nbdfuse" in check.text
    no_view(lab)


def test_a_command_sees_the_view_and_its_status_counts(lab: Any, tmp_path: Path) -> None:
    content = b"as it was".ljust(65536, b"!")
    point = fill(lab, content)
    out = tmp_path / "out"
    script = (
        f'test "$VREP_DISKS" = root && test "$VREP_POINT" = pos:{point} &&'
        f' nbdcopy "$VREP_URI_ROOT" {out} && echo seen'
    )
    options = VerifyOptions(samples=0, command=script)
    report = verify(lab.paths, "web", options=options)
    assert report.result == "good"
    assert [c.text for c in report.verdicts[0].checks if c.what == "command"] == ["seen"]
    assert out.read_bytes()[:65536] == content
    failing = VerifyOptions(samples=0, command="echo no database; exit 3")
    report = verify(lab.paths, "web", options=failing)
    assert report.result == "bad"
    assert "exit status 3: no database" in report.verdicts[0].text
    slow = VerifyOptions(samples=0, command="sleep 60", limit_s=0.2)
    report = verify(lab.paths, "web", options=slow)
    assert "did not end within 0.2 s" in report.verdicts[0].text
    no_view(lab)


def test_without_the_key_objects_are_intact_and_nothing_is_called_good(lab: Any) -> None:
    point = fill(lab, b"x" * 65536)
    (lab.root / "keys" / "acme.key").unlink()
    report = verify(lab.paths, "web")
    assert report.result == "intact"
    assert lab.tenant.key_id in report.note
    assert report.tallies == 0
    assert shown(lab) == {f"pos:{point}": "intact"}


def test_samples_are_other_points_and_each_has_its_verdict(lab: Any, rng: random.Random) -> None:
    lab.sync()
    for _ in range(30):
        lab.random_write()
    lab.commit()
    report = verify(lab.paths, "web", options=VerifyOptions(samples=5, file_systems=False), rng=rng)
    assert report.result == "good"
    points = [v.point for v in report.verdicts]
    assert len(set(points)) == 6
    assert points[1] == "pos:1/0/2"
    assert set(shown(lab)) == set(points)


def test_the_digest_of_a_point_is_that_of_its_bytes(lab: Any) -> None:
    """The model says what the disk holds; a verdict's digest is over just that."""
    import hashlib
    import struct

    lab.sync()
    for _ in range(20):
        lab.random_write()
    end = lab.commit()
    wanted = hashlib.sha256()
    (content,) = lab.at(end)
    for at in range(0, DISK, 4 * MIB):
        if any(content[at : at + 4 * MIB]):
            wanted.update(struct.pack("<QQ", at, 4 * MIB) + content[at : at + 4 * MIB])
    (info,) = verify(lab.paths, "web", options=QUICK).verdicts
    assert [disk.sha256 for disk in info.disks] == [wanted.hexdigest()]


def test_replication_goes_on_meanwhile(lab: Any, tmp_path: Path) -> None:
    fill(lab, b"a" * 65536)
    written = []

    def write() -> None:
        lab.write(0, 65536, b"b" * 65536)
        written.append(lab.commit())

    marker = tmp_path / "marker"
    command = f"touch {marker}; while test -e {marker}; do sleep 0.05; done"
    reports: list[VerifyReport] = []
    options = VerifyOptions(samples=0, file_systems=False, command=command)
    thread = threading.Thread(
        target=lambda: reports.append(verify(lab.paths, "web", options=options))
    )
    thread.start()
    wait(marker.exists)
    write()
    marker.unlink()
    thread.join()
    assert reports[0].result == "good"
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        assert History(reader).newest == written[0]


def wait(probe: Any, limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not probe():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- damage ------------------------------------------------------------------------------------


@pytest.fixture
def long(tmp_path: Path, rng: random.Random) -> Iterator[Any]:
    """A history of many small segments, merged into runs of two levels."""
    lab = lab_module.Lab(
        tmp_path / "site", [DiskEntry("root", DISK, 0)], rng, level=0, segment_bytes=4096
    )
    lab.sync()
    for number in range(80):
        lab.write(0, number * 65536 % DISK, rng.randbytes(8192))
        lab.commit()
    wait(lambda: any(run["level"] == 2 for run in lab.store.manifest.runs))
    lab.close()
    yield lab
    lab.close()


def test_every_run_is_what_its_segments_say(long: Any) -> None:
    report = verify(long.paths, "web", options=QUICK)
    assert report.result == "good"
    assert report.objects["runs"] >= 2
    assert report.objects["segments"] >= 70


def test_a_flipped_byte_is_named_and_takes_older_verdicts_with_it(long: Any) -> None:
    directory = long.paths.store / long.group_id.hex()
    manifest = load_newest(directory, long.group_id)
    entries = [manifest.segments[20], manifest.segments[40]]
    early = Position.of(manifest.segments[10]["last"])
    assert verify(long.paths, "web", f"pos:{early}", options=QUICK).result == "good"
    report = verify(long.paths, "web", options=QUICK)
    assert report.result == "good"
    for entry in entries:
        flip(segment_path(directory, int(entry["segment"])), 300)
    report = verify(long.paths, "web", options=QUICK)
    assert report.result == "bad"
    assert [(d.object, d.first, d.last) for d in report.verdicts[0].damages] == [
        (
            f"seg-{int(e['segment']):08x}",
            f"pos:{Position.of(e['first'])}",
            f"pos:{Position.of(e['last'])}",
        )
        for e in entries
    ]
    assert "byte" in report.verdicts[0].damages[0].text
    states = [
        v.state
        for v in verdict.judge(list(VerdictBook(long.paths, long.group_id).all()), manifest, None)
    ]
    assert states == ["good", "bad"]  # the damage begins behind the early point
    late = manifest.segments[30]["last"]
    assert verify(long.paths, "web", f"pos:{Position.of(late)}", options=QUICK).result == "bad"
    told = newest(long.paths, manifest, None)
    assert told is not None
    assert told["state"] == "bad"
    # Known to be damaged now, nothing is shown as good.
    assert set(shown(long).values()) == {"void", "bad"}


def test_a_missing_segment_is_named(long: Any) -> None:
    directory = long.paths.store / long.group_id.hex()
    entry = load_newest(directory, long.group_id).segments[30]
    path = segment_path(directory, int(entry["segment"]))
    path.unlink()
    report = verify(long.paths, "web", options=QUICK)
    assert report.result == "bad"
    (damage,) = report.verdicts[0].damages
    assert (damage.object, damage.text) == (path.name, "it is missing")
    assert set(shown(long).values()) == {"bad"}


def test_a_damaged_run_is_named_and_its_damage_is_not_served(long: Any) -> None:
    directory = long.paths.store / long.group_id.hex()
    run = load_newest(directory, long.group_id).runs[0]
    path = run_path(directory, int(run["run"]))
    flip(path, 64)
    report = verify(long.paths, "web", options=QUICK)
    assert report.result == "bad"
    assert report.verdicts[0].damages[0].object == path.name
    assert report.verdicts[0].damages[0].first


def forge_run(lab: Any) -> str:
    """A run that leaves a segment out, named by a manifest of which every digest is right."""
    directory = lab.paths.store / lab.group_id.hex()
    manifest = load_newest(directory, lab.group_id)
    run = next(r for r in manifest.runs if r["level"] == 1)
    inside = [
        int(s["segment"])
        for s in manifest.segments
        if run["first_segment"] <= s["segment"] <= run["last_segment"]
    ]
    number = 1 + max(int(r["run"]) for r in manifest.runs)
    path = run_path(directory, number)
    trailer = merge([Index.open(segment_path(directory, n)) for n in inside[:-1]], path, 1)
    forged = run.copy()
    forged["run"], forged["file_bytes"] = number, trailer["file_bytes"]
    forged["index_digest"] = np.frombuffer(trailer["digest"], np.uint8)
    runs = manifest.runs.copy()
    runs[[int(r["run"]) for r in runs].index(int(run["run"]))] = forged
    changed = manifest.next(1, runs=runs)
    manifest_path(directory, changed.number).write_bytes(changed.encode())
    return path.name


def test_a_forged_run_that_leaves_records_out_is_noticed(long: Any) -> None:
    name = forge_run(long)
    report = verify(long.paths, "web", options=QUICK)
    assert report.result == "bad"
    assert [d.object for d in report.verdicts[0].damages] == [name]
    assert "indexes of its segments" in report.verdicts[0].text


def test_a_damaged_manifest_that_is_kept_is_named(long: Any) -> None:
    directory = long.paths.store / long.group_id.hex()
    older = sorted(directory.glob("manifest-*"))[-2]
    flip(older, 200)
    report = verify(long.paths, "web", options=QUICK)
    assert report.result == "bad"
    assert [d.object for d in report.verdicts[0].damages] == [older.name]


def test_the_newest_manifest_damaged_is_an_error_with_its_name(long: Any) -> None:
    directory = long.paths.store / long.group_id.hex()
    newest_one = sorted(directory.glob("manifest-*"))[-1]
    flip(newest_one, 200)
    with pytest.raises(errors.CorruptError, match=newest_one.name):
        verify(long.paths, "web", options=QUICK)


def test_files_are_read_again_although_their_stamps_are_the_same(
    long: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits rot without a trace in the times of a file, which is what other checks go by."""
    monkeypatch.setattr(check, "_stamps", lambda _reader, number: (number, 0, 0, 0))
    assert list_points(long.paths, "web").verdict.whole
    directory = long.paths.store / long.group_id.hex()
    number = int(load_newest(directory, long.group_id).segments[5]["segment"])
    flip(segment_path(directory, number), 40)  # no rebuild comes by here
    assert list_points(long.paths, "web").verdict.whole
    report = verify(long.paths, "web", options=QUICK)
    assert [d.object for d in report.verdicts[0].damages] == [f"seg-{number:08x}"]


# ---- verdicts ----------------------------------------------------------------------------------


def made(lab: Any) -> tuple[Position, Path]:
    """A good verdict and its file."""
    point = fill(lab, b"x" * 65536)
    assert verify(lab.paths, "web", options=QUICK).result == "good"
    return point, VerdictBook(lab.paths, lab.group_id).path(point)


def test_every_changed_byte_of_a_verdict_is_noticed(lab: Any) -> None:
    point, path = made(lab)
    data = path.read_bytes()
    key = lab.identity.certificate.public_key()
    assert decode(data, key).position == point
    for at in range(len(data)):
        bad = bytearray(data)
        bad[at] ^= 1 << (at % 8)
        with pytest.raises(errors.IntegrityError):
            decode(bytes(bad), key)
    for end in (0, 1, 127, 128, 200, len(data) - 1):
        with pytest.raises(errors.IntegrityError):
            decode(data[:end], key)
    with pytest.raises(errors.IntegrityError):
        decode(data + b"\0", key)
    flip(path, len(data) - 5)
    assert shown(lab) == {f"pos:{point}": "damaged"}
    assert path.name in list_points(lab.paths, "web").verdicts[0].text
    told = site_of(lab).status("web")["groups"]["web"]
    assert told["verdict"]["state"] == "damaged"
    assert "verify-failed" in told["conditions"]


def resigned(lab: Any, path: Path, **changes: Any) -> None:
    """The same verdict with other words, signed: to test what follows the signature."""
    key = lab.identity.certificate.public_key()
    found = decode(path.read_bytes(), key)
    finding = msgspec.structs.replace(found.finding, **changes)
    replaced = verdict.SignedVerdict(
        found.group_id, found.store_id, found.position, found.wall_ns, finding
    )
    path.write_bytes(verdict.encode(replaced, lab.identity.private_key()))


def test_a_verdict_that_another_key_signed_is_not_believed(lab: Any, tmp_path: Path) -> None:
    point, path = made(lab)
    from vrep.keys.identity import SiteIdentity

    other = SiteIdentity.create(tmp_path / "other", "other")
    found = decode(path.read_bytes(), lab.identity.certificate.public_key())
    path.write_bytes(verdict.encode(found, other.private_key()))
    assert shown(lab) == {f"pos:{point}": "damaged"}
    assert "did not sign" in list_points(lab.paths, "web").verdicts[0].text


def test_a_verdict_under_another_name_is_not_believed(lab: Any) -> None:
    _point, path = made(lab)
    later = lab.write(0, 0, b"y" * 4096)
    lab.commit()
    shutil.copy(path, VerdictBook(lab.paths, lab.group_id).path(later))
    assert shown(lab)[f"pos:{later}"] == "damaged"


def test_a_verdict_on_a_rolled_back_epoch_is_void(lab: Any) -> None:
    lab.sync()
    kept = lab.write(0, 0, b"a" * 4096)
    lost = lab.write(0, 0, b"b" * 4096)
    lab.commit()
    assert verify(lab.paths, "web", options=QUICK).result == "good"
    assert verify(lab.paths, "web", f"pos:{kept}", options=QUICK).result == "good"
    assert shown(lab) == {f"pos:{kept}": "good", f"pos:{lost}": "good"}
    entry = lab.store.add_epoch(writer=bytes(16), parent=kept)
    assert shown(lab) == {f"pos:{kept}": "good", f"pos:{lost}": "void"}
    manifest = load_newest(lab.store.directory, lab.group_id)
    told = newest(lab.paths, manifest, None)
    assert told is not None
    assert told["state"] == "good"
    # The writer of the new epoch comes to the same place with other bytes.
    lab.new_epoch(entry)
    here = lab.write(0, 0, b"c" * 4096)
    lab.commit()
    assert here.seq == lost.seq
    assert shown(lab) == {f"pos:{kept}": "good", f"pos:{lost}": "void"}
    # A provisional epoch that is abandoned takes its points with it.
    trial = lab.store.raise_epoch(writer=b"f" * 16, parent=here, state=EpochState.PROVISIONAL)
    assert verify(lab.paths, "web", options=QUICK).result == "good"
    lab.store.roll_back_epoch(trial.epoch)
    assert shown(lab)[f"pos:{here}"] == "good"


def test_a_verdict_on_another_store_is_void(lab: Any, rng: random.Random, tmp_path: Path) -> None:
    _point, path = made(lab)
    name = path.name
    kept = path.read_bytes()
    lab.close()
    shutil.rmtree(lab.paths.store)
    other = lab_module.Lab(
        lab.root, lab.disks, rng, level=0, group_id=lab.group_id, source_id=lab.source_id
    )
    try:
        point = fill(other, b"x" * 65536)
        assert VerdictBook(lab.paths, lab.group_id).path(point).name == name
        assert path.read_bytes() == kept
        assert shown(other) == {f"pos:{point}": "void"}
        manifest = load_newest(other.store.directory, lab.group_id)
        told = newest(other.paths, manifest, None)
        assert told is not None
        assert told["state"] == "void"
        assert "another store" in told["text"]
    finally:
        other.close()


def test_a_verdict_on_a_store_that_was_taken_back_is_void(lab: Any, tmp_path: Path) -> None:
    fill(lab, b"x" * 65536)
    lab.close()
    shutil.copytree(lab.paths.store, tmp_path / "old")
    lab.open()
    lab.start_stream()
    point = lab.write(0, 0, b"y" * 4096)
    lab.close()
    lab.open()
    assert verify(lab.paths, "web", options=QUICK).result == "good"
    lab.close()
    shutil.rmtree(lab.paths.store)
    shutil.copytree(tmp_path / "old", lab.paths.store)
    assert shown(lab) == {f"pos:{point}": "void"}
    manifest = load_newest(lab.paths.store / lab.group_id.hex(), lab.group_id)
    told = newest(lab.paths, manifest, None)
    assert told is not None
    assert told["state"] == "void"


def test_a_verdict_whose_record_is_another_is_void(lab: Any) -> None:
    point, path = made(lab)
    resigned(lab, path, anchor="0" * 64)
    assert shown(lab) == {f"pos:{point}": "void"}


def test_other_bytes_at_a_verified_point_are_noticed(lab: Any) -> None:
    _point, path = made(lab)
    disks = decode(path.read_bytes(), None).finding.disks
    resigned(lab, path, disks=[msgspec.structs.replace(disks[0], sha256="0" * 64)])
    report = verify(lab.paths, "web", options=QUICK)
    assert report.result == "bad"
    assert "other bytes" in report.verdicts[0].text


def test_only_so_many_verdicts_are_kept(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.sync()
    monkeypatch.setattr(verdict, "KEPT", 3)
    for _ in range(5):
        last = lab.write(0, 0, b"x" * 4096)
        lab.commit()
        verify(lab.paths, "web", options=QUICK)
    positions = VerdictBook(lab.paths, lab.group_id).positions()
    assert [p.seq for p in positions] == [last.seq - 2, last.seq - 1, last.seq]


# ---- one at a time, and nothing left -----------------------------------------------------------


def test_two_verifications_never_run_at_once(lab: Any) -> None:
    fill(lab, b"x" * 65536)
    assert not alone.under_way(lab.paths)
    with alone.alone(lab.paths):
        assert alone.under_way(lab.paths)
        with pytest.raises(errors.LockedError, match="another verification"):
            verify(lab.paths, "web", options=QUICK)
    assert not alone.under_way(lab.paths)
    assert verify(lab.paths, "web", options=QUICK).result == "good"


def test_the_view_of_a_verification_that_died_is_removed(lab: Any) -> None:
    fill(lab, b"x" * 65536)
    with alone.alone(lab.paths):
        left = start_test(lab.paths, "web", kind="verify")
        assert restart_views(lab.paths) == []
        assert [each.id for each in list_views(lab.paths)] == [left.id]
        with pytest.raises(errors.StateError):
            view.stop_test(lab.paths, "web")
    assert restart_views(lab.paths) == []
    no_view(lab)
    start_test(lab.paths, "web", kind="verify")
    assert verify(lab.paths, "web", options=QUICK).result == "good"
    no_view(lab)


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL], ids=["term", "kill"])
def test_a_verification_that_is_ended_leaves_no_view(lab: Any, tmp_path: Path, kill: int) -> None:
    fill(lab, image(tmp_path))
    marker = tmp_path / "marker"
    config = f'[verify]\ncommand = "touch {marker}; sleep 60"\n'
    lab.paths.config.write_text(config)
    process = subprocess.Popen(
        [sys.executable, "-m", "vrep.recovery.schedule", str(lab.root), lab.group_id.hex()]
    )
    wait(marker.exists)
    assert [each.kind for each in list_views(lab.paths)] == ["verify"]
    process.send_signal(kill)
    process.wait(60)
    if kill == signal.SIGKILL:
        wait(lambda: not alone.under_way(lab.paths))
        restart_views(lab.paths)
    no_view(lab)
    assert shown(lab) == {}


# ---- the command, and the schedule -------------------------------------------------------------


def run_cli(
    lab: Any, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, dict[str, Any]]:
    code = cli.run(["verify", "web", *words, "--dir", str(lab.root), "--json"])
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return code, answer


def test_the_command_tells_its_verdict_by_its_exit_code(
    lab: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    point = fill(lab, b"x" * 65536)
    code, answer = run_cli(lab, capsys, "--samples", "0")
    assert (code, answer["result"]) == (0, "good")
    assert answer["verdicts"][0]["point"] == f"pos:{point}"
    code, answer = run_cli(lab, capsys, "--command", "exit 7", "--limit", "30s", "--no-fsck")
    assert (code, answer["result"]) == (2, "bad")
    assert cli.run(["verify", "web", "--dir", str(lab.root), "--command", "exit 7"]) == 2
    out = capsys.readouterr().out
    assert f"pos:{point}: command: bad: exit status 7" in out
    assert "no ext2, ext3 or ext4" in out
    (lab.root / "keys" / "acme.key").unlink()
    code, answer = run_cli(lab, capsys)
    assert (code, answer["result"]) == (1, "intact")
    assert cli.run(["verify", "mail", "--dir", str(lab.root)]) == errors.NotFoundError.exit_code
    capsys.readouterr()
    wrong = cli.run(["verify", "web", "--dir", str(lab.root), "--at", "pos:1/0/999"])
    assert wrong == errors.PointNotFoundError.exit_code


def test_what_is_due_is_the_group_that_waited_longest(lab: Any, rng: random.Random) -> None:
    other = lab_module.Lab(lab.root, lab.disks, rng, name="mail")
    other.sync()
    other.close()
    fill(lab, b"x" * 65536)
    began = lab_module.START_NS / 1e9
    clock = [began]
    config = VerifyConfig(every_h=24)
    schedule = VerifySchedule(lab.paths, config, lambda: clock[0])
    assert schedule.due() is None
    clock[0] = began + 24 * 3600 - 1
    assert schedule.due() is None
    clock[0] = began + 24 * 3600
    assert schedule.due() in (lab.group_id, other.group_id)
    assert VerifySchedule(lab.paths, VerifyConfig(), lambda: clock[0]).due() is None
    verify(lab.paths, lab.group_id.hex(), options=QUICK)
    path = VerdictBook(lab.paths, lab.group_id).path(Position(1, 0, lab.seq))
    os.utime(path, (clock[0], clock[0]))
    assert schedule.due() == other.group_id
    schedule._tried[other.group_id] = clock[0]  # an attempt that left no verdict
    assert schedule.due() is None
    clock[0] += AGAIN_S
    assert schedule.due() == other.group_id
    clock[0] += 24 * 3600
    assert schedule.due() == other.group_id


def test_a_running_site_verifies_by_itself_and_stops_at_once(lab: Any, tmp_path: Path) -> None:
    point = fill(lab, image(tmp_path))
    nice = tmp_path / "nice"
    lab.paths.config.write_text(
        f"[verify]\nevery_h = 24.0\nsamples = 0\ncommand = 'nice > {nice}; ionice > {nice}.io'\n"
    )
    clock = [lab_module.START_NS / 1e9 + 25 * 3600]
    stopping = threading.Event()
    schedule = VerifySchedule(lab.paths, load_config(lab.paths.config).verify, lambda: clock[0])
    thread = threading.Thread(target=schedule.run, args=(stopping, 0.05))
    thread.start()
    try:
        wait(lambda: shown(lab) == {f"pos:{point}": "good"})
        assert nice.read_text().strip() == "19"
        assert Path(f"{nice}.io").read_text().strip() == "idle"
        # The next one hangs in its command; the site stops, and it goes with its view.
        marker = tmp_path / "marker"
        lab.paths.config.write_text(f'[verify]\ncommand = "touch {marker}; sleep 60"\n')
        clock[0] += 10 * 365 * 24 * 3600
        wait(marker.exists)
    finally:
        stopping.set()
        thread.join(60)
    assert not thread.is_alive()
    no_view(lab)
