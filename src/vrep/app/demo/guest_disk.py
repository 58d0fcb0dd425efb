"""The guest's disk: a raw file with a real ext4 filesystem and files of known hash.

Small files are incompressible, text files compress well, big files are half
and half. The same content description gives the same files. The filesystem is
made by `mke2fs -d`, so neither root nor a loop device is needed.
"""

from __future__ import annotations

import hashlib
import os
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vrep.app.demo.guest_image import GuestError, run_tool

MANIFEST_NAME = "MANIFEST.sha256"

_KIB = 1 << 10
_MIB = 1 << 20
_WORDS = ("order", "write", "record", "journal", "point", "view", "epoch", "lane", "ring", "fold")


@dataclass(frozen=True)
class DiskContent:
    """How large the disk is and what lies on it."""

    size: int = 1 << 30
    small_files: int = 300
    small_size_max: int = 64 * _KIB
    text_files: int = 100
    text_size_max: int = 256 * _KIB
    big_files: int = 4
    big_size: int = 12 * _MIB
    seed: int = 1


@dataclass(frozen=True)
class Manifest:
    """What the files on the disk must be: path in the filesystem to SHA-256."""

    sha256: dict[str, str]

    def to_text(self) -> str:
        """The form that `sha256sum -c` reads."""
        return "".join(f"{digest}  {path}\n" for path, digest in sorted(self.sha256.items()))

    @classmethod
    def from_text(cls, text: str) -> Manifest:
        """Read what `to_text` wrote."""
        entries: dict[str, str] = {}
        for line in text.splitlines():
            digest, separator, path = line.partition("  ")
            if not separator or len(digest) != 64 or not path:
                raise GuestError(f"line of {MANIFEST_NAME} is not a hash and a path: {line[:80]!r}")
            entries[path] = digest
        return cls(entries)


def build_disk(path: Path, content: DiskContent | None = None) -> Manifest:
    """Make the disk as a sparse raw file at `path` and return what is on it."""
    content = content if content is not None else DiskContent()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="disk-") as tree_name:
        tree = Path(tree_name)
        tree.chmod(0o755)
        manifest = _write_tree(tree, content)
        path.unlink(missing_ok=True)
        with path.open("wb") as disk:
            disk.truncate(content.size)
        _make_filesystem(path, tree, content.seed)
    return manifest


def _make_filesystem(path: Path, tree: Path, seed: int) -> None:
    # Tables are written now: else the kernel writes them in the background of
    # the first mount, and traffic of the guest would not be its own.
    run_tool(
        [
            "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-L", "vrep-guest",
            "-U", f"00000000-0000-4000-8000-{seed:012x}",
            "-E", "root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0",
            "-d", str(tree), str(path),
        ],
    )  # fmt: skip


def _write_tree(tree: Path, content: DiskContent) -> Manifest:
    source = random.Random(content.seed)
    for directory in ("log", "churn", "files/small", "files/text", "files/big"):
        (tree / directory).mkdir(parents=True)
    digests: dict[str, str] = {}

    def write(name: str, data: bytes) -> None:
        (tree / name).write_bytes(data)
        digests[name] = hashlib.sha256(data).hexdigest()

    for index in range(content.small_files):
        size = source.randint(1, content.small_size_max)
        write(f"files/small/s{index:04d}.bin", source.randbytes(size))
    for index in range(content.text_files):
        size = source.randint(1, content.text_size_max)
        write(f"files/text/t{index:04d}.txt", _text(source, size))
    for index in range(content.big_files):
        half = content.big_size // 2
        data = source.randbytes(content.big_size - half) + _text(source, half)
        write(f"files/big/b{index:04d}.dat", data)

    manifest = Manifest(digests)
    (tree / MANIFEST_NAME).write_text(manifest.to_text())
    for directory_name, _, _ in os.walk(tree):
        Path(directory_name).chmod(0o755)
    return manifest


def _text(source: random.Random, size: int) -> bytes:
    # One page of words, numbered and repeated: compressible, yet no two blocks equal.
    page = " ".join(source.choice(_WORDS) for _ in range(400)).encode()
    parts: list[bytes] = []
    length = 0
    while length < size:
        part = b"%08d %s\n" % (len(parts), page)
        parts.append(part)
        length += len(part)
    return b"".join(parts)[:size]
