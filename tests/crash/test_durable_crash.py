"""Power losses of the small files: what `vrep.durable` writes is the old content or the new one,
never a mixture nor nothing, and the new one from the moment that the call returned.

A process writes state files, files that must be new, and a log, over storage that forgets
(forget.c); its power is lost before each single step that it took.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import forget
import pytest

HERE = Path(__file__).resolve().parent
ROUNDS, LOSSES = 12, 4
WRITER = """
import ctypes, random, sys
from pathlib import Path
from vrep.durable import append_durable, write_atomic

library, where, rng = ctypes.CDLL(None), Path(sys.argv[1]), random.Random(int(sys.argv[2]))

def say(text):
    library.forget_mark(text.encode(), ctypes.c_size_t(len(text)))

for number in range(1, int(sys.argv[3]) + 1):
    content = (b"%d/" % number) + rng.randbytes(rng.choice((10, 511, 513, 5000)))
    for kind in ("state", "once", "log"):
        say(f"begin {kind} {number} {content.hex()}")
        if kind == "state":
            write_atomic(where / "state", content)
        elif kind == "once":
            write_atomic(where / f"once-{number}", content, exclusive=True)
        else:
            append_durable(where / "log", content)
        say(f"end {kind} {number}")
"""


class Promise:
    """What was begun and what was promised, by kind and number."""

    def __init__(self) -> None:
        self.begun: dict[tuple[str, int], bytes] = {}
        self.ended: set[tuple[str, int]] = set()

    def hear(self, mark: bytes) -> None:
        what, kind, number, *content = mark.decode().split()
        if what == "begin":
            self.begun[kind, int(number)] = bytes.fromhex(content[0])
        else:
            self.ended.add((kind, int(number)))

    def _of(self, kind: str) -> list[tuple[int, bytes, bool]]:
        return [
            (number, content, (kind, number) in self.ended)
            for (of, number), content in sorted(self.begun.items())
            if of == kind
        ]

    def check(self, there: Path) -> None:
        states = self._of("state")
        promised = [content for _number, content, ended in states if ended][-1:]
        allowed = promised + [content for _number, content, ended in states if not ended]
        if promised or (there / "state").exists():
            assert (there / "state").read_bytes() in allowed
        for number, content, ended in self._of("once"):
            path = there / f"once-{number}"
            if ended or path.exists():
                assert path.read_bytes() == content
        log = self._of("log")
        whole = b"".join(content for _number, content, ended in log if ended)
        if whole:
            assert (there / "log").read_bytes().startswith(whole)
        known = {"state", "log", *(f"once-{number}" for number, _content, _ in self._of("once"))}
        others = {path.name for path in there.iterdir()} - known
        assert all(name.endswith(".tmp") for name in others), others


def steps(root: Path, shim: Path, seed: int) -> list[Any]:
    """What a process that writes does, as it reaches the storage."""
    (root / "files").mkdir()
    environment = os.environ | {
        "LD_PRELOAD": str(shim),
        "VREP_FORGET_DIR": str(root / "files"),
        "VREP_FORGET_LOG": str(root / "steps"),
    }
    command = [sys.executable, "-c", WRITER, str(root / "files"), str(seed), str(ROUNDS)]
    subprocess.run(command, env=environment, check=True, timeout=120)
    return list(forget.read_log(root / "steps"))


@pytest.fixture
def shim(tmp_path: Path) -> Path:
    return Path(forget.compile_shim(tmp_path))


def test_a_power_loss_leaves_the_old_content_or_the_new(
    tmp_path: Path, shim: Path, seed: int
) -> None:
    root = (tmp_path / "root").resolve()
    root.mkdir()
    entries = steps(root, shim, seed)
    kinds = {entry.kind for entry in entries}
    assert {forget.RENAME, forget.LINK, forget.SYNC_END, forget.UNLINK} <= kinds
    (tmp_path / "nothing").mkdir()
    storage = forget.Storage(tmp_path / "nothing")
    storage.directory = (root / "files").stat().st_ino
    rng, promise = random.Random(seed), Promise()
    for number, entry in enumerate(entries):
        if entry.kind == forget.MARK:
            promise.hear(entry.data)
        else:
            storage.apply(entry)
        for loss in range(LOSSES):
            there = tmp_path / f"loss-{number}-{loss}"
            storage.after_loss(there, rng)
            promise.check(there)
    assert len(promise.ended) == 3 * ROUNDS
