"""Verification: what recovers is proven, and what does not is named. Real ext4 images, real
e2fsck."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recovery_lab as lab_module
import verify_rig as rig

from vrep import errors
from vrep._core.index import Index, merge
from vrep.recovery import check, verdict
from vrep.recovery.history import History
from vrep.recovery.points import list_points
from vrep.recovery.verdict import VerdictBook, newest
from vrep.recovery.verify import VerifyOptions, VerifyReport, verify
from vrep.target.manifest import DiskEntry, Position, load_newest, manifest_path
from vrep.target.reader import StoreReader
from vrep.target.runs import units_to_merge
from vrep.target.segment import run_path, segment_path

DISK, QUICK = rig.DISK, rig.QUICK
fill, flip, image, no_view, shown, wait = (
    rig.fill,
    rig.flip,
    rig.image,
    rig.no_view,
    rig.shown,
    rig.wait,
)


@pytest.fixture
def lab(tmp_path: Path, rng: random.Random) -> Iterator[Any]:
    lab = lab_module.Lab(tmp_path / "site", [DiskEntry("root", DISK, 0)], rng, level=0)
    yield lab
    lab.close()


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
    told = rig.site_of(lab).status("web")["groups"]["web"]
    assert told["verdict"]["state"] == "good"
    assert told["verdict"]["point"] == f"pos:{last}"
    assert "verify-failed" not in told["conditions"]


def test_a_partition_is_found(lab: Any, tmp_path: Path) -> None:
    start = rig.MIB
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
    told = rig.site_of(lab).status("web")["groups"]["web"]
    assert told["conditions"].count("verify-failed") == 1
    assert rig.site_of(lab).verdict(rig.site_of(lab).status())[0] == 2
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
    for at in range(0, DISK, 4 * rig.MIB):
        if any(content[at : at + 4 * rig.MIB]):
            wanted.update(struct.pack("<QQ", at, 4 * rig.MIB) + content[at : at + 4 * rig.MIB])
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
    # The thread that merges may be far behind, and is not cut off before it is done.
    wait(lambda: not units_to_merge(lab.store.manifest))
    assert {int(run["level"]) for run in lab.store.manifest.runs} == {1, 2}
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


def test_what_a_disk_cannot_read_is_named(long: Any) -> None:
    """A real read that fails, on a FUSE file whose middle is bad, in the place of a segment."""
    directory = long.paths.store / long.group_id.hex()
    entry = load_newest(directory, long.group_id).segments[30]
    path = segment_path(directory, int(entry["segment"]))
    data = path.with_name("data")
    path.rename(data)
    path.touch()
    script = long.root / "bad.sh"
    script.write_text(
        '#!/bin/sh\ncase "$1" in\n'
        f"get_size) stat -c %s {data} ;;\n"
        f'pread) if test "$4" -lt 4096 && test "$(($4 + $3))" -gt 1024; then echo EIO >&2; exit 1; '
        f'fi; dd if={data} iflag=skip_bytes,count_bytes skip="$4" count="$3" 2>/dev/null ;;\n'
        "*) exit 2 ;;\nesac\n"
    )
    script.chmod(0o700)
    fuse = subprocess.Popen(
        ["nbdfuse", path, "--command", "nbdkit", "-s", "sh", script], stderr=subprocess.DEVNULL
    )
    try:
        wait(lambda: path.stat().st_size == data.stat().st_size)
        with pytest.raises(OSError, match="Input/output"):
            path.read_bytes()
        report = verify(long.paths, "web", options=QUICK)
    finally:
        fuse.terminate()
        fuse.wait(30)
    assert report.result == "bad"
    (damage,) = report.verdicts[0].damages
    assert (damage.object, damage.first) == (path.name, f"pos:{Position.of(entry['first'])}")
    assert "cannot be read: Input/output error" in damage.text
