"""Export: nobody but their owner can read the files, at any time."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import recovery_lab

from vrep.recovery.export import export
from vrep.target.manifest import DiskEntry


@pytest.fixture
def lab(tmp_path: Path, rng: random.Random) -> Iterator[Any]:
    """A group with something in it, exported by a process whose umask hides nothing."""
    lab = recovery_lab.Lab(tmp_path / "site", [DiskEntry("root", 1 << 20, 0)], rng)
    lab.sync()
    lab.write(0, 0, b"x" * 4096)
    lab.commit()
    umask = os.umask(0)
    try:
        yield lab
    finally:
        os.umask(umask)
        lab.close()


@pytest.mark.parametrize("format_", ["raw", "qcow2"])
def test_an_export_is_its_owners_only(lab: Any, format_: str, tmp_path: Path) -> None:
    result = export(lab.paths, "web", "latest", tmp_path / "out", format_)
    path = Path(result.disks[0].path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_a_qcow2_file_is_its_owners_only_from_its_creation_on(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    tool = tools / "qemu-img"
    seen = tmp_path / "seen"
    tool.write_text(f'#!/bin/sh\nfor file; do :; done\n: > "$file"\nstat -c %a "$file" > {seen}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    export(lab.paths, "web", "latest", tmp_path / "out", "qcow2")
    assert seen.read_text() == "600\n"
