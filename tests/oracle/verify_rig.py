"""What the tests of verifications and of verdicts share. Load it by its path."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from vrep._core import layout
from vrep.recovery.points import list_points
from vrep.recovery.verify import VerifyOptions
from vrep.recovery.view import list_views
from vrep.site import Site
from vrep.target.manifest import Position

MIB = 1 << 20
DISK = 8 * MIB
QUICK = VerifyOptions(samples=0, file_systems=False)


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
    """No view, and nothing that had mounted one."""
    assert list_views(lab.paths) == []
    mounts = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
            program = words.split(b"\0")[0]
            if program.endswith(b"nbdfuse") and os.fsencode(lab.root) in words:
                mounts.append(words)
    assert mounts == []


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def shown(lab: Any) -> dict[str, str]:
    """States of the verdicts that `points` shows."""
    return {each.point: each.state for each in list_points(lab.paths, "web").verdicts}


def site_of(lab: Any) -> Site:
    return Site(lab.root)


def wait(probe: Any, limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not probe():
        assert time.monotonic() < deadline
        time.sleep(0.02)
