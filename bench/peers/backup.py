"""Programs that copy what changed of one file: rsync and restic, on this host."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SECRET = {"RESTIC_PASSWORD": "bench"}
HASHES = ("hash_bytes", "question_bytes")
"""of ours, for comparison: the traffic that is not data"""


def rsync(source: Path, copy: Path) -> None:
    """In place, by its rolling checksums, whatever times and sizes say; synced at the end."""
    options = ["--inplace", "--no-whole-file", "--ignore-times", "--fsync"]
    subprocess.run(["rsync", *options, source, copy], check=True)


def restic_init(repository: Path) -> None:
    _restic(repository, "init")


def restic(source: Path, repository: Path) -> None:
    """A snapshot on top of the one before; without compression, as ours."""
    _restic(repository, "backup", "--compression", "off", source)


def _restic(repository: Path, *words: str | Path) -> None:
    command = ["restic", "--no-cache", "--quiet", "--repo", repository, *words]
    subprocess.run(command, check=True, env={**os.environ, **SECRET})
