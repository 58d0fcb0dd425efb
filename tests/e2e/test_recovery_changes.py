"""Incremental copies with real clients: what a view's dirty bitmap tells is enough."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import recovery_lab as lab_module

from vrep import errors
from vrep.recovery import failover, view
from vrep.recovery.changes import list_changes
from vrep.recovery.export import export
from vrep.target.manifest import DiskEntry, Position

CLIENTS = ("nbdinfo", "nbdcopy", "qemu-img", "qemu-io")
pytestmark = pytest.mark.skipif(
    any(shutil.which(name) is None for name in CLIENTS), reason="needs qemu-utils and libnbd-bin"
)


DISKS = [DiskEntry("root", (8 << 20) + 512, 0), DiskEntry("data", 3 << 20, 1)]


@pytest.fixture
def lab(tmp_path: Path, rng: random.Random) -> Iterator[Any]:
    lab = lab_module.Lab(tmp_path / "site", DISKS, rng)
    lab.sync()
    for _ in range(60):
        lab.random_write()
    lab.mark("monday")
    for _ in range(12):
        lab.random_write()
    lab.mark("tuesday")
    for _ in range(12):
        lab.random_write()
    lab.commit()
    yield lab
    for each in view.view_directories(lab.paths):
        view.discard(each)
    lab.close()


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def dirty(uri: str, context: str) -> list[tuple[int, int]]:
    """What nbdinfo sees of a bitmap."""
    rows = json.loads(run("nbdinfo", "--json", f"--map={context}", uri))
    assert sum(row["length"] for row in rows) == int(run("nbdinfo", "--size", uri))
    return [(row["offset"], row["length"]) for row in rows if row["type"] == 1]


def copy_ranges(uri: str, ranges: list[tuple[int, int]], onto: Path) -> None:
    """Read ranges with QEMU's client, and write them over an older copy."""
    options = ["-f", "raw", "-O", "raw"]
    for offset, length in ranges:
        part = onto.with_suffix(".part")
        window = f"driver=raw,offset={offset},size={length},file.driver=nbd,file.export="
        path, socket = uri.removeprefix("nbd+unix:///").split("?socket=")
        image = f"{window}{path},file.server.type=unix,file.server.path={socket}"
        run("qemu-img", "convert", *options[2:], "--image-opts", image, str(part))
        with onto.open("r+b") as file:
            file.seek(offset)
            file.write(part.read_bytes()[:length])


def position_of(point: str) -> Position:
    return Position(*(int(part) for part in point[4:].split("/")))


def wait_dead(lab: Any, view_id: str) -> None:
    directory = view.ViewDirectory(lab.paths, view_id)
    deadline = time.monotonic() + 120
    while directory.holder() is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_full_copy_and_then_what_changed(lab: Any, tmp_path: Path) -> None:
    """Monday in full with nbdcopy, then only what the bitmap tells, up to Tuesday and to now."""
    monday = view.start_test(lab.paths, "web", "monday")
    assert (monday.since, monday.bitmap) == (None, None)
    assert "dirty" not in run("nbdinfo", "--list", "--json", monday.disks[0].uri)
    copies = [tmp_path / f"{disk.name}.copy" for disk in monday.disks]
    for disk, copy in zip(monday.disks, copies, strict=True):
        run("nbdcopy", disk.uri, str(copy))
    base = monday.point
    for at in ("tuesday", "latest"):
        info = view.start_test(lab.paths, "web", at, base)
        assert info.since == base
        name = "qemu:dirty-bitmap:vrep-since-" + base[4:].replace("/", "-")
        assert info.bitmap == name
        listed = list_changes(lab.paths, "web", base, at)
        whole = export(lab.paths, "web", at, tmp_path / at)
        moved = 0
        for disk, change, copy, file in zip(
            info.disks, listed.disks, copies, whole.disks, strict=True
        ):
            assert name in run("nbdinfo", "--list", "--json", disk.uri)
            ranges = dirty(disk.uri, name)
            assert ranges == [(extent.offset, extent.length) for extent in change.extents]
            copy_ranges(disk.uri, ranges, copy)
            moved += sum(length for _offset, length in ranges)
            assert copy.read_bytes() == Path(file.path).read_bytes()
        assert 0 < moved < sum(disk.bytes for disk in info.disks)
        base = info.point


def test_qemu_reads_the_bitmap(lab: Any) -> None:
    """x-dirty-bitmap is how QEMU's own tools read one: what is dirty shows as no data."""
    info = view.start_test(lab.paths, "web", "latest", "monday")
    assert info.bitmap is not None
    for disk in info.disks:
        image = (
            f"driver=nbd,export={disk.name},server.type=unix,server.path={info.socket},"
            f"x-dirty-bitmap={info.bitmap}"
        )
        rows = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", image))
        # It looks at the disk in its own granularity: what it calls clean must be clean.
        clean = [(r["start"], r["start"] + r["length"]) for r in rows if r["data"]]
        assert clean
        for offset, length in dirty(disk.uri, info.bitmap):
            assert not any(begin < offset + length and offset < end for begin, end in clean)


def test_another_base_is_refused(lab: Any) -> None:
    """A client that asks for the bitmap of a base that is not this view's gets none: its copy
    would lack bytes."""
    info = view.start_test(lab.paths, "web", "latest", "tuesday")
    for context in ("vrep-since-1-0-1", "vrep", "vrep-since"):
        done = subprocess.run(
            ["nbdinfo", f"--map=qemu:dirty-bitmap:{context}", info.disks[0].uri],
            capture_output=True,
            check=False,
        )
        assert done.returncode != 0
    for point in ("nothing-of-that-name", "pos:1/0/1", "pos:9/0/1"):
        with pytest.raises(errors.VrepError):
            view.start_test(lab.paths, "web", "latest", point)
    assert [each.id for each in view.list_views(lab.paths)] == [info.id]


def test_what_is_written_to_the_view_is_told_too(lab: Any) -> None:
    """Also after its process was killed: then everything that was there counts."""
    info = view.start_test(lab.paths, "web", "latest", "latest")
    assert info.bitmap is not None
    assert dirty(info.disks[0].uri, info.bitmap) == []
    uri = info.disks[0].uri
    run("qemu-io", "-f", "raw", "-c", "write -P 7 1M 1000", uri)
    run("qemu-io", "-f", "raw", "-c", "write -z 2M 64k", "-c", "discard 3M 64k", uri)
    written = [(1 << 20, 4096), (2 << 20, 65536), (3 << 20, 65536)]
    assert dirty(uri, info.bitmap) == written
    assert dirty(info.disks[1].uri, info.bitmap) == []
    run("qemu-io", "-f", "raw", "-c", "read 5M 4k", uri)
    assert dirty(uri, info.bitmap) == written  # what is only read is no change
    assert info.pid is not None
    os.kill(info.pid, signal.SIGKILL)
    wait_dead(lab, info.id)
    assert view.restart_views(lab.paths) == []
    (again,) = view.list_views(lab.paths)
    assert (again.running, again.since, again.bitmap) == (True, info.since, info.bitmap)
    ranges = dirty(uri, info.bitmap)
    for offset, length in written:
        assert any(begin <= offset and offset + length <= begin + size for begin, size in ranges)
    assert sum(length for _offset, length in ranges) <= 5 * 65536  # blocks that are present


@pytest.fixture
def folding(tmp_path: Path, rng: random.Random) -> Iterator[Any]:
    """A history whose segments end where its checkpoints stand."""
    lab = lab_module.Lab(tmp_path / "site", DISKS, rng, merge=False, hold=False)
    lab.sync()
    for label in ("monday", "tuesday", "wednesday", "thursday"):
        for _ in range(20):
            lab.random_write()
        lab.mark(label)
        lab.close()
        lab.open()
        lab.start_stream()
    yield lab
    for each in view.view_directories(lab.paths):
        view.discard(each)
    lab.close()


def test_a_fold_hides_no_change(folding: Any) -> None:
    """Between kept points a fold changes nothing; of a base that is folded away nothing is told,
    and a view that counted from it, started again, says that all may differ. One whose own point
    is gone is not served any more: what was not fetched would show as it was before."""
    lab = folding
    old = view.start_test(lab.paths, "web", "monday")
    info = view.start_test(lab.paths, "web", "latest", "monday")
    assert info.bitmap is not None
    wanted = list_changes(lab.paths, "web", "tuesday")
    tuesday, at = wanted.since.point, wanted.at.point
    folded = lab.store.fold(position_of(tuesday))
    assert sum(step.input_bytes - step.output_bytes for step in folded) > 0
    assert list_changes(lab.paths, "web", tuesday, at).disks == wanted.disks
    with pytest.raises(errors.PointNotFoundError, match="folded away"):
        list_changes(lab.paths, "web", info.since or "", at)
    with pytest.raises(errors.PointNotFoundError, match="folded away"):
        view.start_test(lab.paths, "web", "latest", info.since)
    for each in (old, info):
        assert each.pid is not None
        os.kill(each.pid, signal.SIGKILL)
    for each in (old, info):
        wait_dead(lab, each.id)
    (problem,) = view.restart_views(lab.paths)
    assert "folded away" in problem
    assert [each.id for each in view.list_views(lab.paths) if each.running] == [info.id]
    for disk in info.disks:
        assert dirty(disk.uri, info.bitmap) == [(0, disk.bytes)]


def test_a_failover_offers_one(lab: Any) -> None:
    """Its view is filled in meanwhile; what is filled in is no change."""
    lab.close()
    info = failover.start(lab.paths, "web", force=True, since="tuesday")
    assert info.bitmap is not None
    listed = list_changes(lab.paths, "web", "tuesday", info.point)
    deadline = time.monotonic() + 120  # at a low priority
    while not view.describe(view.ViewDirectory(lab.paths, info.id)).fill.get("done"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for disk, change in zip(info.disks, listed.disks, strict=True):
        assert dirty(disk.uri, info.bitmap) == [(e.offset, e.length) for e in change.extents]
    # A command that is repeated goes on with the same failover; another base is another one.
    assert failover.start(lab.paths, "web", force=True, since="tuesday").id == info.id
    with pytest.raises(errors.StateError, match="count from monday"):
        failover.start(lab.paths, "web", force=True, since="monday")
    failover.rollback(lab.paths, "web")


def vrep(lab: Any, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "vrep.app.cli", *arguments, "--dir", str(lab.paths.root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def test_the_commands(lab: Any) -> None:
    code, out = vrep(lab, "changes", "web", "--since", "monday", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["block_bytes"] == 4096
    assert [disk["name"] for disk in found["disks"]] == ["root", "data"]
    options = ("--since", "monday", "--at", "tuesday")
    code, out = vrep(lab, "changes", "web", *options, "--disk", "data")
    assert code == 0
    assert "data: " in out
    assert "root" not in out
    code, out = vrep(lab, "changes", "web", "--since", "tuesday", "--at", "tuesday")
    assert code == 0
    assert "in 0 extents" in out
    code, _out = vrep(lab, "changes", "web", "--since", "friday")
    assert code == errors.PointNotFoundError.exit_code
    code, out = vrep(lab, "test", "start", "web", *options, "--json")
    assert code == 0
    shown = json.loads(out)
    assert shown["bitmap"].startswith("qemu:dirty-bitmap:vrep-since-1-0-")
    # Rarely all of a day's writes are of one disk.
    assert any(dirty(disk["uri"], shown["bitmap"]) for disk in shown["disks"])
    code, out = vrep(lab, "test", "start", "web", "--since=monday")
    assert code == 0
    assert shown["bitmap"] in out
