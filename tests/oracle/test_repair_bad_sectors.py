"""A repair over a disk whose sectors cannot be read: real errors of reads, through FUSE."""

from __future__ import annotations

import random
import shutil
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import recovery_lab as lab_module

from vrep._core import layout
from vrep.recovery.repair import _index_whole
from vrep.recovery.resend import _front
from vrep.recovery.salvage import Salvage, Source, index_of
from vrep.recovery.unreadable import read_sound, require_readable
from vrep.target.files import Files
from vrep.target.lease import Lease
from vrep.target.manifest import DiskEntry, Position
from vrep.target.segment import entry_path

WAIT_S = 30.0
BAD = (300_000, 12_288)
"""from its page on, some pages of a file cannot be read"""

pytestmark = pytest.mark.skipif(
    shutil.which("nbdfuse") is None or not Path("/dev/fuse").exists(), reason="no FUSE here"
)

Failing = Callable[[bytes], Path]


@pytest.fixture
def failing(tmp_path: Path) -> Iterator[Failing]:
    """Makes a file of given bytes, of which `BAD` fails with EIO."""
    running: list[tuple[subprocess.Popen[bytes], Path]] = []

    def make(data: bytes) -> Path:
        whole, shown = tmp_path / "whole", tmp_path / "seg-00000001"
        whole.write_bytes(data)
        shown.touch()
        bad = BAD[0] // 4096
        script = textwrap.dedent(f"""\
            first=$(($4 / 4096)); last=$((($4 + $3 - 1) / 4096))
            if [ $first -lt {bad + BAD[1] // 4096} ] && [ $last -ge {bad} ]; then
              echo EIO >&2; exit 1
            fi
            dd if={whole} iflag=skip_bytes,count_bytes skip=$4 count=$3 status=none
        """)
        command = ["nbdfuse", str(shown), "--command", "nbdkit", "-s", "eval"]
        plugin = [f"get_size=echo {len(data)}", f"pread={script}"]
        server = subprocess.Popen([*command, *plugin])
        running.append((server, shown))
        deadline = time.monotonic() + WAIT_S
        while shown.stat().st_size != len(data):
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return shown

    yield make
    for server, shown in running:
        subprocess.run(["fusermount3", "-uz", str(shown)], check=False)
        server.terminate()
        server.wait(WAIT_S)


def test_what_can_be_read_is_read(failing: Failing, rng: random.Random) -> None:
    data = rng.randbytes(3 << 20)
    start = BAD[0] // 4096 * 4096
    path = failing(data)
    wanted = data[:start] + bytes(BAD[1]) + data[start + BAD[1] :]
    assert read_sound(path) == wanted
    with pytest.raises(OSError, match="Input/output"):
        require_readable(path)
    require_readable(path, start + BAD[1])


def test_what_is_sound_around_bad_sectors_is_salvaged(
    failing: Failing, tmp_path: Path, rng: random.Random
) -> None:
    """A mapping of the segment would end the process. The commits before the sectors are the front,
    those behind them are salvaged."""
    disks = [DiskEntry("root", 2 << 20, 0)]
    lab = lab_module.Lab(tmp_path, disks, rng, level=0, segment_bytes=1 << 20, merge=False)
    lab.sync()
    blocks = rng.sample(range(disks[0].bytes // 4096), disks[0].bytes // 4096)
    while not len(lab.store.manifest.segments):
        for _ in range(rng.randrange(1, 8)):
            lab.write(0, blocks.pop() * 4096, rng.randbytes(4096))
        lab.commit()
    lab.close()
    lease = Lease(lab.paths.store / lab.group_id.hex(), lab.group_id, Files(), time.time_ns)
    lease.load()
    entry = lease.manifest.segments[0]
    number, end = int(entry["segment"]), Position.of(entry["last"])
    whole = entry_path(lease.directory, entry)
    path = failing(whole.read_bytes())

    def found(path: Path) -> int:
        index = index_of(path, entry)
        assert index is not None
        salvage = Salvage(lab.group_id, lease, [Source(path, number, index)], None)
        assert salvage.end == end
        total = salvage.find(Position())
        assert max(salvage._positions[number]) > sum(BAD)  # the newest stands behind them
        return total

    assert _index_whole(path, entry)  # its own sectors are
    front = _front(path, lab.group_id, number)
    assert layout.SEGMENT_HEADER.itemsize < len(front) <= BAD[0]
    assert whole.read_bytes().startswith(front)
    assert 0 < found(path) < found(whole)
    lease.close()
