"""A file as a block device, where the host has loop devices to give."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["loop_device"]


@contextmanager
def loop_device(path: Path, *, sector_bytes: int = 512) -> Iterator[Path]:
    """The device; its logical blocks have `sector_bytes`. Skips the test where there is none."""
    command = ["losetup", "--find", "--show", "--sector-size", str(sector_bytes), str(path)]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    if told.returncode:
        pytest.skip(f"no loop device: {told.stderr.strip()}")
    device = told.stdout.strip()
    try:
        yield Path(device)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
