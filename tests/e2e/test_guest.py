"""The demonstration guest: its image, its disk, its run and the judge of its disk."""

from __future__ import annotations

import hashlib
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from vrep.app.demo.guest import Guest, GuestDisk, GuestTask, WitnessedLine
from vrep.app.demo.guest_check import (
    LINE_SIZE,
    chain_check,
    check_disk,
    judge_lines,
    parse_lines,
)
from vrep.app.demo.guest_disk import DiskContent, Manifest, build_disk
from vrep.app.demo.guest_image import CpioWriter, GuestError, GuestImage, load_modules

CACHE = Path(__file__).parents[2] / "build" / "guest"
BOOT_LIMIT_S = 300.0
SMALL = DiskContent(
    size=128 << 20,
    small_files=40,
    small_size_max=16 << 10,
    text_files=10,
    text_size_max=32 << 10,
    big_files=1,
    big_size=1 << 20,
)


@pytest.fixture(scope="session")
def image() -> GuestImage:
    return GuestImage.build(CACHE)


@pytest.fixture
def disk(tmp_path: Path) -> tuple[Path, Manifest]:
    path = tmp_path / "disk.raw"
    return path, build_disk(path, SMALL)


@contextmanager
def nbd_server(disk: Path, address: Path) -> Iterator[subprocess.Popen[bytes]]:
    address.unlink(missing_ok=True)
    command = [
        "qemu-nbd", "--format=raw", "--persistent", "--shared=4", "--cache=writeback",
        "--discard=unmap", "--export-name=disk", f"--socket={address}", str(disk),
    ]  # fmt: skip
    server = subprocess.Popen(command)
    try:
        while not address.exists():
            assert server.poll() is None, "qemu-nbd ended at its start"
            time.sleep(0.01)
        yield server
    finally:
        server.terminate()
        server.wait()


def nbd_disk(address: Path) -> GuestDisk:
    return GuestDisk(f"nbd+unix:///disk?socket={address}")


# Lines


def log_content(count: int, *, run: str = "0badcafe", start_ms: int = 1_700_000_000_000) -> bytes:
    content, check = b"", 0
    for number in range(1, count + 1):
        stamped = start_ms + 10 * number
        check = chain_check(check, number, stamped, run)
        content += b"L %010d %013d %s %08x " % (number, stamped, run.encode(), check)
        content += b"." * 18 + b"\n"
    return content


def test_whole_log_is_read() -> None:
    log = parse_lines(log_content(50))
    assert [line.number for line in log.lines] == list(range(1, 51))
    assert log.damaged_slots == ()
    assert log.torn_bytes == 0
    assert log.holes() == []
    assert log.last is not None
    assert log.last.stamped_ms == 1_700_000_000_500
    assert [line.number for line in log.after(1_700_000_000_480)] == [49, 50]


def test_torn_tail_is_told_from_a_line() -> None:
    log = parse_lines(log_content(5)[:-1])
    assert log.last is not None
    assert (log.last.number, log.torn_bytes) == (4, LINE_SIZE - 1)


@pytest.mark.parametrize("position", range(LINE_SIZE))
def test_any_changed_byte_of_a_line_shows(position: int) -> None:
    content = bytearray(log_content(5))
    content[2 * LINE_SIZE + position] ^= 1
    assert 2 in parse_lines(bytes(content)).damaged_slots


def test_lost_repeated_and_swapped_lines_show() -> None:
    content = log_content(5)
    slots = [content[at : at + LINE_SIZE] for at in range(0, len(content), LINE_SIZE)]
    lost = parse_lines(b"".join(slots[:2] + slots[3:]))
    assert (lost.holes(), lost.damaged_slots) == ([3], (2,))
    assert parse_lines(b"".join([*slots[:2], slots[1], *slots[2:]])).damaged_slots
    assert parse_lines(b"".join([slots[0], slots[2], slots[1], *slots[3:]])).damaged_slots
    assert parse_lines(slots[0] + bytes(LINE_SIZE) + slots[1]).damaged_slots == (1,)


def test_lines_are_judged_by_the_point() -> None:
    log = parse_lines(log_content(10))
    start = 1_700_000_000_000
    witness = [
        WitnessedLine(line.number, line.stamped_ms, line.stamped_ms + 3, 0.0) for line in log.lines
    ]
    assert judge_lines(log, witness, point_ms=start + 100).violations() == []
    beyond = judge_lines(log, witness, point_ms=start + 85)
    assert (beyond.beyond, beyond.missing) == ((9, 10), ())
    shorter = replace(log, lines=log.lines[:6])
    verdict = judge_lines(shorter, witness, point_ms=start + 105, tolerance_ms=20)
    assert (verdict.missing, verdict.missing_tolerated) == ((7, 8), (9, 10))
    assert len(verdict.violations()) == 1
    other = [replace(witness[0], stamped_ms=1)]
    assert judge_lines(log, other, point_ms=start + 105).contradicted == (1,)


# Image and disk


def test_archive_is_what_cpio_reads(tmp_path: Path) -> None:
    writer = CpioWriter()
    writer.add_directory("bin")
    writer.add_file("bin/tool", b"odd", mode=0o755)
    writer.add_file("empty", b"")
    archive = writer.finish()
    done = subprocess.run(
        ["busybox", "cpio", "-i"], input=archive, cwd=tmp_path, capture_output=True, check=True
    )
    assert done.returncode == 0
    assert (tmp_path / "bin/tool").read_bytes() == b"odd"
    assert (tmp_path / "bin/tool").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "empty").read_bytes() == b""


def test_modules_come_after_what_they_need(tmp_path: Path) -> None:
    def module(name: str, needs: str) -> None:
        (tmp_path / f"{name}.ko").write_bytes(b"ELF\0depends=" + needs.encode() + b"\0name\0")

    module("top-one", "middle,low,built_in")
    module("middle", "low")
    module("low", "")
    (tmp_path / "modules.builtin").write_text("kernel/lib/built-in.ko\n")
    order = [name for name, _ in load_modules(tmp_path, ["top_one"])]
    assert order == ["low.ko", "middle.ko", "top_one.ko"]
    with pytest.raises(GuestError, match="no module absent, needed by the guest"):
        load_modules(tmp_path, ["absent"])


def test_manifest_survives_its_text() -> None:
    manifest = Manifest({"b/two words": "1" * 64, "a": "2" * 64})
    assert Manifest.from_text(manifest.to_text()) == manifest
    with pytest.raises(GuestError, match="not a hash and a path"):
        Manifest.from_text("abc  name\n")


def test_fresh_disk_is_right_and_its_content_repeats(
    disk: tuple[Path, Manifest], tmp_path: Path
) -> None:
    path, manifest = disk
    verdict = check_disk(path, manifest)
    assert verdict.violations() == []
    assert verdict.files_right == len(manifest.sha256) == 51
    assert build_disk(tmp_path / "again.raw", SMALL) == manifest
    assert path.stat().st_blocks * 512 < SMALL.size // 4, "the disk is not sparse"


def test_changed_file_and_missing_file_are_found(disk: tuple[Path, Manifest]) -> None:
    path, manifest = disk
    content = bytearray(path.read_bytes())
    page = content.find(b"00000000 ")
    assert page > 0
    content[page + 20] ^= 1
    path.write_bytes(content)
    more = Manifest({**manifest.sha256, "files/absent": "0" * 64})
    verdict = check_disk(path, more)
    assert verdict.fsck_clean
    assert len(verdict.files_wrong) == 1
    assert verdict.files_missing == ("files/absent",)
    assert len(verdict.violations()) == 2


def test_damaged_filesystem_is_found(disk: tuple[Path, Manifest]) -> None:
    path, manifest = disk
    subprocess.run(
        ["debugfs", "-w", "-R", "clri /files/small", str(path)], capture_output=True, check=True
    )
    before = hashlib.sha256(path.read_bytes()).digest()
    verdict = check_disk(path, manifest)
    assert any("fsck finds errors" in violation for violation in verdict.violations())
    assert hashlib.sha256(path.read_bytes()).digest() == before, "the checked disk was changed"


def test_locations_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(GuestError, match="socket=PATH"):
        GuestDisk("nbd+unix:///disk").blockdev("disk0")
    with pytest.raises(GuestError, match="run id"):
        GuestTask(run="x vrep.mode=verify").kernel_options()


# Runs


@pytest.mark.e2e
def test_image_is_cached(image: GuestImage) -> None:
    before = image.initramfs.stat().st_mtime_ns
    again = GuestImage.build(CACHE)
    assert again == image
    assert again.initramfs.stat().st_mtime_ns == before


@pytest.mark.e2e
def test_killed_guest_keeps_every_witnessed_line(
    image: GuestImage, disk: tuple[Path, Manifest], tmp_path: Path
) -> None:
    path, manifest = disk
    address = tmp_path / "nbd.sock"
    task = GuestTask(pause_s=0.02, churn_pause_s=0.02)
    with nbd_server(path, address):
        with Guest(image, [nbd_disk(address)], task) as guest:
            guest.wait_for("^READY workload$", BOOT_LIMIT_S)
            guest.wait_for_lines(40, BOOT_LIMIT_S)
            guest.wait_for(r"^CHURN 12 ", BOOT_LIMIT_S)
        killed_ms = time.time_ns() // 1_000_000
        verdict = check_disk(f"nbd+unix:///disk?socket={address}", manifest)
        assert verdict.violations() == []
        assert "recovering journal" in verdict.fsck_output
        assert verdict.churn_right >= 8
        assert {line.run for line in verdict.log.lines} == {task.run}
        witness = guest.witness
        assert [line.number for line in witness] == list(range(1, len(witness) + 1))
        assert len(witness) >= 40
        assert all(line.stamped_ms <= line.arrived_ms for line in witness)
        lines = judge_lines(verdict.log, witness, point_ms=killed_ms)
        assert lines.violations() == []

        # A second guest takes the same disk and goes on where it ends.
        last = verdict.log.last
        assert last is not None
        onward = GuestTask(mode="verify,continue", lines=5)
        with Guest(image, [nbd_disk(address)], onward) as second:
            second.wait_for(f"^VERIFY ok {len(manifest.sha256)}$", BOOT_LIMIT_S)
            second.wait_for(f"^CONTINUED from {last.number}$", BOOT_LIMIT_S)
            second.wait_for("^POWEROFF$", BOOT_LIMIT_S)
            assert second.wait_exit(BOOT_LIMIT_S) == 0
    after = check_disk(path, manifest, in_place=True)
    assert after.violations() == []
    assert "recovering journal" not in after.fsck_output
    assert after.log.last is not None
    assert (after.log.last.number, after.log.last.run) == (last.number + 5, onward.run)
    assert {line.number for line in second.witness} <= after.log.numbers


@pytest.mark.e2e
def test_guest_outlives_a_killed_disk_server_and_stops_cleanly(
    image: GuestImage, disk: tuple[Path, Manifest], tmp_path: Path
) -> None:
    path, manifest = disk
    address, monitor = tmp_path / "nbd.sock", tmp_path / "qmp.sock"
    with nbd_server(path, address) as server:
        guest = Guest(image, [nbd_disk(address)], GuestTask(pause_s=0.02), qmp_socket=monitor)
        guest.start()
        try:
            guest.wait_for_lines(10, BOOT_LIMIT_S)
            with socket.socket(socket.AF_UNIX) as control:
                control.connect(str(monitor))
                assert b'"QMP"' in control.recv(4096)
            server.kill()
            server.wait()
            before = len(guest.witness)
            with nbd_server(path, address):
                guest.wait_for_lines(before + 10, BOOT_LIMIT_S)
                guest.request_stop()
                guest.wait_for("^STOPPED ", BOOT_LIMIT_S)
                assert guest.wait_exit(BOOT_LIMIT_S) == 0
        finally:
            guest.kill9()
    verdict = check_disk(path, manifest)
    assert verdict.violations() == []
    assert verdict.log.missing(line.number for line in guest.witness) == []


@pytest.mark.e2e
def test_guest_that_fails_says_why(image: GuestImage, tmp_path: Path) -> None:
    empty = tmp_path / "empty.raw"
    with empty.open("wb") as stream:
        stream.truncate(16 << 20)
    with (
        Guest(image, [GuestDisk(str(empty))]) as guest,
        pytest.raises(GuestError, match="failed mount of /dev/sda"),
    ):
        guest.wait_for("READY", BOOT_LIMIT_S)
    with (
        Guest(image, [GuestDisk(str(tmp_path / "absent.raw"))]) as guest,
        pytest.raises(GuestError, match=r"absent\.raw"),
    ):
        guest.wait_for("READY", BOOT_LIMIT_S)


@pytest.mark.e2e
def test_guest_finds_a_changed_file(image: GuestImage, disk: tuple[Path, Manifest]) -> None:
    path, manifest = disk
    content = bytearray(path.read_bytes())
    content[content.find(b"00000000 ") + 20] ^= 1
    path.write_bytes(content)
    with Guest(image, [GuestDisk(str(path))], GuestTask(mode="verify")) as guest:
        guest.wait_for(f"^VERIFY bad {len(manifest.sha256) - 1}$", BOOT_LIMIT_S)
        assert guest.wait_exit(BOOT_LIMIT_S) == 0
