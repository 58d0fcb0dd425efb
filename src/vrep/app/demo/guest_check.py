"""Judges a disk of the demonstration guest from outside, without mounting it.

The journal is replayed as a mount would, then a full check must find nothing
to repair; then the files are read out with debugfs and compared. Works on a
copy unless told otherwise; no root, no loop device.

A line of log/lines.txt has 64 bytes: `L number ms run check dots newline`. The
checksum is chained over the lines before, so a lost, torn, repeated or altered
line shows.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vrep.app.demo.guest import WitnessedLine
from vrep.app.demo.guest_disk import Manifest
from vrep.app.demo.guest_image import GuestError, run_tool

LINE_SIZE = 64

_MASK = 0xFFFFFFFF
_LINE = re.compile(rb"L (\d{10}) (\d{13}) ([0-9a-f]{8}) ([0-9a-f]{8}) \.{18}\n")
_CHURN_NAME = re.compile(r"[0-9a-f]{8}-\d+@(.+?)(\.tmp)?")

#: What `e2fsck -p` says when it does no more than a mount would do after a
#: crash: replay the journal, free what was deleted while open, sum up.
_FSCK_EXPECTED = re.compile(
    r"recovering journal$"
    r"|Clearing orphaned inode"
    r"|Setting free (inodes|blocks) count to "
    r"|: clean, "
    r"|^e2fsck "
)


@dataclass(frozen=True)
class LogLine:
    """One whole line that the disk holds."""

    number: int
    stamped_ms: int
    run: str
    check: int


@dataclass(frozen=True)
class LineLog:
    """What log/lines.txt holds."""

    lines: tuple[LogLine, ...]
    #: Bytes after the last whole slot of 64.
    torn_bytes: int
    #: Slots (counted from 0) that are not a line, or whose checksum does not
    #: follow from the line before.
    damaged_slots: tuple[int, ...]

    @property
    def last(self) -> LogLine | None:
        """The last whole line."""
        return self.lines[-1] if self.lines else None

    @property
    def numbers(self) -> frozenset[int]:
        """The numbers of all whole lines."""
        return frozenset(line.number for line in self.lines)

    def missing(self, expected: Iterable[int]) -> list[int]:
        """Those of the expected numbers that the disk does not hold."""
        return sorted(set(expected) - self.numbers)

    def holes(self) -> list[int]:
        """Numbers between 1 and the last that are not there."""
        return self.missing(range(1, max(self.numbers, default=0) + 1))

    def after(self, point_ms: int) -> list[LogLine]:
        """Lines stamped later than `point_ms`: none may be on a disk of that time."""
        return [line for line in self.lines if line.stamped_ms > point_ms]


@dataclass(frozen=True)
class DiskCheck:
    """The verdict on one disk."""

    fsck_clean: bool
    #: What replay changed beyond what a mount changes; must be empty.
    fsck_repairs: tuple[str, ...]
    fsck_output: str
    files_right: int
    files_wrong: tuple[str, ...]
    files_missing: tuple[str, ...]
    churn_right: int
    churn_wrong: tuple[str, ...]
    #: Copies that were under way; they have a name of their own and no promise.
    churn_unfinished: int
    log: LineLog

    def violations(self) -> list[str]:
        """Everything that is not as it must be, whatever the point; empty is good."""
        found = [f"fsck repaired: {repair}" for repair in self.fsck_repairs]
        if not self.fsck_clean:
            found.append("fsck finds errors after journal replay")
        found += [f"file has another content: {name}" for name in self.files_wrong]
        found += [f"file is missing: {name}" for name in self.files_missing]
        found += [f"finished copy has another content: {name}" for name in self.churn_wrong]
        found += [f"line slot {slot} is damaged" for slot in self.log.damaged_slots]
        holes = self.log.holes()
        if holes:
            found.append(f"{len(holes)} lines missing in the middle, first {holes[0]}")
        if self.log.torn_bytes:
            found.append(f"{self.log.torn_bytes} bytes of a torn line at the end")
        return found


def check_disk(
    image: Path | str,
    manifest: Manifest,
    *,
    in_place: bool = False,
    scratch_dir: Path | None = None,
) -> DiskCheck:
    """Check a raw file, or an NBD URI (then it is copied).

    With `in_place` a raw file is itself repaired by the journal replay.
    """
    with tempfile.TemporaryDirectory(dir=scratch_dir, prefix="check-") as work_name:
        work = Path(work_name)
        disk = _open_image(image, work, in_place=in_place)
        clean, repairs, output = _check_filesystem(disk)
        tree = work / "tree"
        tree.mkdir()
        _read_out(disk, tree)
        right, wrong, missing = _compare_files(tree, manifest)
        churn_right, churn_wrong, churn_unfinished = _compare_churn(tree / "churn", manifest)
        log_path = tree / "log/lines.txt"
        log = parse_lines(log_path.read_bytes() if log_path.exists() else b"")
    return DiskCheck(
        fsck_clean=clean,
        fsck_repairs=repairs,
        fsck_output=output,
        files_right=right,
        files_wrong=wrong,
        files_missing=missing,
        churn_right=churn_right,
        churn_wrong=churn_wrong,
        churn_unfinished=churn_unfinished,
        log=log,
    )


def _open_image(image: Path | str, work: Path, *, in_place: bool) -> Path:
    if isinstance(image, str) and image.startswith(("nbd:", "nbd+")):
        if in_place:
            raise GuestError(f"only a raw file can be checked in place, not {image}")
        copy = work / "disk.raw"
        run_tool(["qemu-img", "convert", "-O", "raw", str(image), str(copy)])
        return copy
    path = Path(str(image).removeprefix("file:"))
    if not path.is_file():
        raise GuestError(f"no disk to check at {path}")
    if in_place:
        return path
    copy = work / "disk.raw"
    run_tool(["cp", "--sparse=always", "--reflink=auto", str(path), str(copy)])
    return copy


# Filesystem


def _check_filesystem(disk: Path) -> tuple[bool, tuple[str, ...], str]:
    replay_status, replay = _fsck(["-p", str(disk)])
    # 1 says that something was changed, which a replay is; above, it gave up.
    repairs = tuple(
        line for line in replay.splitlines() if line.strip() and not _FSCK_EXPECTED.search(line)
    )
    check_status, check = _fsck(["-f", "-n", str(disk)])
    return replay_status <= 1 and check_status == 0, repairs, replay + check


def _fsck(arguments: Sequence[str]) -> tuple[int, str]:
    try:
        done = subprocess.run(
            ["e2fsck", *arguments],
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
    except FileNotFoundError as error:
        raise GuestError("e2fsck is not installed on this machine (package e2fsprogs)") from error
    return done.returncode, done.stdout


def _read_out(disk: Path, tree: Path) -> None:
    # Status and messages of debugfs say little; what did not come out is
    # missing from the tree, and found there.
    run_tool(["debugfs", "-R", f'rdump / "{tree}"', str(disk)])


# Files


def _compare_files(tree: Path, manifest: Manifest) -> tuple[int, tuple[str, ...], tuple[str, ...]]:
    wrong: list[str] = []
    missing: list[str] = []
    for name, digest in sorted(manifest.sha256.items()):
        path = tree / name
        if not path.is_file():
            missing.append(name)
        elif _sha256(path) != digest:
            wrong.append(name)
    right = len(manifest.sha256) - len(wrong) - len(missing)
    return right, tuple(wrong), tuple(missing)


def _compare_churn(directory: Path, manifest: Manifest) -> tuple[int, tuple[str, ...], int]:
    digests = {Path(name).name: digest for name, digest in manifest.sha256.items()}
    right, unfinished = 0, 0
    wrong: list[str] = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        match = _CHURN_NAME.fullmatch(path.name)
        if match is not None and match.group(2) is not None:
            unfinished += 1
        elif match is not None and digests.get(match.group(1)) == _sha256(path):
            right += 1
        else:
            wrong.append(path.name)
    return right, tuple(wrong), unfinished


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# Lines


def chain_check(previous: int, number: int, stamped_ms: int, run: str) -> int:
    """The checksum of a line, from that of the line before; the guest's shell does the same."""
    check = ((previous ^ number) * 2654435761) & _MASK
    check = ((check ^ (check >> 15) ^ (stamped_ms & _MASK)) * 2246822519) & _MASK
    check = ((check ^ (check >> 13) ^ int(run, 16)) * 3266489917) & _MASK
    return check ^ (check >> 16)


def parse_lines(content: bytes) -> LineLog:
    """Read log/lines.txt; nothing in it is trusted."""
    lines: list[LogLine] = []
    damaged: list[int] = []
    previous: LogLine | None = None
    slots, torn = divmod(len(content), LINE_SIZE)
    for slot in range(slots):
        match = _LINE.fullmatch(content[slot * LINE_SIZE : (slot + 1) * LINE_SIZE])
        if match is None:
            damaged.append(slot)
            continue
        line = LogLine(
            int(match.group(1)),
            int(match.group(2)),
            match.group(3).decode(),
            int(match.group(4), 16),
        )
        before = previous.check if previous is not None else 0
        expected = chain_check(before, line.number, line.stamped_ms, line.run)
        after = previous.number + 1 if previous is not None else 1
        # What follows a lost line fails too: its chain began before the loss.
        if line.check != expected or line.number != after:
            damaged.append(slot)
        lines.append(line)
        previous = line
    return LineLog(tuple(lines), torn, tuple(damaged))


@dataclass(frozen=True)
class LineVerdict:
    """The lines of a recovered disk, held against what the console witnessed."""

    #: Witnessed early enough to be demanded, but not on the disk.
    missing: tuple[int, ...]
    #: Witnessed within the tolerance before the point, and not on the disk.
    missing_tolerated: tuple[int, ...]
    #: On the disk, but written after the point.
    beyond: tuple[int, ...]
    #: On the disk with another stamp than the console reported.
    contradicted: tuple[int, ...]

    def violations(self) -> list[str]:
        """What is not as it must be; empty is good."""
        found = []
        if self.missing:
            found.append(f"{len(self.missing)} witnessed lines lost, first {self.missing[0]}")
        if self.beyond:
            found.append(f"{len(self.beyond)} lines from after the point, first {self.beyond[0]}")
        if self.contradicted:
            found.append(
                f"{len(self.contradicted)} lines differ from the witnessed, "
                f"first {self.contradicted[0]}"
            )
        return found


def judge_lines(
    log: LineLog, witness: Sequence[WitnessedLine], *, point_ms: int, tolerance_ms: int = 0
) -> LineVerdict:
    """Judge the lines of a disk recovered as it was at `point_ms` of the host's clock.

    A line is demanded when the console had reported it `tolerance_ms` before the
    point: it was durable in the guest by then. A line stamped after the point is
    beyond it: stamps are never ahead of the host's clock. Each judgement can
    only err in favour of the disk, by the time that a message takes.
    """
    reported = [line for line in witness if line.arrived_ms <= point_ms]
    lost = [line for line in reported if line.number not in log.numbers]
    demanded_ms = point_ms - tolerance_ms
    stamps = {line.number: line.stamped_ms for line in log.lines}
    return LineVerdict(
        missing=tuple(line.number for line in lost if line.arrived_ms <= demanded_ms),
        missing_tolerated=tuple(line.number for line in lost if line.arrived_ms > demanded_ms),
        beyond=tuple(line.number for line in log.after(point_ms)),
        contradicted=tuple(
            line.number
            for line in witness
            if stamps.get(line.number, line.stamped_ms) != line.stamped_ms
        ),
    )
