"""RTO: from exec of the command to a thousand random mapped reads that are right.

    python -m bench.pipeline.rto [--records 10000000] [--disk-gib 1024] [--record-bytes 512]
                                 [--runs 5] [--where DIR] [--keep] [--json FILE]

A store of that many sealed records at random places of one sparse disk is made first (it is
kept and found again with --keep). Then, for the newest point and for old ones: the store's
files leave the page cache, ``vrep test start`` is executed in a fresh process, the first mapped
block is read over NBD and compared, then a thousand more. The median over the runs is shown,
with its spread. The same disk is written out by ``qemu-img convert`` from a sparse raw file,
which is what recovery from an image costs, when there are few enough records to wait for it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vrep._core import layout
from vrep._core.seal import Sealer
from vrep.keys.datakey import DataKey
from vrep.keys.identity import SiteIdentity
from vrep.keys.tenant import TenantKeyring
from vrep.paths import SitePaths
from vrep.recovery.export import export
from vrep.recovery.view import stop_test
from vrep.target.manifest import DiskEntry, EpochEntry, EpochState, Position
from vrep.target.store import GroupStore, StoreOptions, StoreSpec

SEED = 20260131
GROUP = "bench"
START_NS = 1_700_000_000_000_000_000
STEP_NS = 1_000_000
BLOCK = 4096
BATCH = 4096
READS = 1000
PEER_RECORDS_MAX = 50_000
TARGET_S = 1.0


def blocks_of(records: int, disk_gib: int) -> NDArray[np.int64]:
    """Which block each record writes; seq 3 is the first of them."""
    return np.random.default_rng(SEED).integers(0, (disk_gib << 30) // BLOCK, records)


def content(seqs: NDArray[np.uint64], record_bytes: int) -> bytes:
    """What each record holds: its seq, over and over."""
    return np.repeat(seqs, record_bytes // 8).tobytes()


def build(where: Path, records: int, disk_gib: int, record_bytes: int) -> None:
    """A site that holds the history of one group."""
    SiteIdentity.create(where, "backup")
    ring = TenantKeyring(where)
    ring.create("acme")
    group_id = bytes(range(16))
    key = DataKey.create(group_id)
    epoch = EpochEntry(1, EpochState.ACCEPTED, secrets.token_bytes(16), b"s" * 16)
    disks = [DiskEntry("root", disk_gib << 30, 0)]
    spec = StoreSpec(GROUP, disks, epoch, [key.wrap(ring.get("acme"))])
    stream_id = secrets.token_bytes(16)
    sealer = Sealer(key.stream_key(stream_id), stream_id, epoch=1, level=0)
    body = np.zeros((), layout.STREAM)
    body["epoch_id"], body["key_generation"] = np.frombuffer(epoch.epoch_id, np.uint8), 1
    places = blocks_of(records, disk_gib).astype(np.uint64)
    # Merged here, at the end: the store's own thread must not do it at the same time.
    options = StoreOptions(commit_s=0.05, merge=False)
    with GroupStore.open(where / "store", group_id, create=spec, options=options) as store:
        room = bytearray(BATCH * (record_bytes + 256) + 65536)
        count = sealer.stream(body, room)
        gap = np.zeros(2, layout.RECORD)
        gap["kind"], gap["seq"] = [layout.KIND_GAP_BEGIN, layout.KIND_GAP_END], [1, 2]
        gap["wall_ns"] = START_NS
        count += sealer.seal(gap, [None, None], memoryview(room)[count:])[0]
        store.append(bytes(room[:count]))
        for first in range(0, records, BATCH):
            n = min(BATCH, records - first)
            batch = np.zeros(n, layout.RECORD)
            batch["kind"], batch["length"] = layout.KIND_WRITE, record_bytes
            batch["seq"] = np.arange(first + 3, first + 3 + n)
            batch["offset"] = places[first : first + n] * np.uint64(BLOCK)
            batch["wall_ns"] = START_NS + STEP_NS * np.arange(first + 1, first + 1 + n)
            count, done = sealer.seal(batch, content(batch["seq"], record_bytes), room)
            assert done == n
            count += sealer.tally(memoryview(room)[count:], wall_ns=START_NS)
            store.append(bytes(room[:count]))
            if first % (64 * BATCH) == 0:
                store.commit(600)
                print(f"\r{first} of {records} records", end="", file=sys.stderr, flush=True)
        store.commit(600)
        while store.merge_once():
            pass
    print(f"\r{records} records stand", file=sys.stderr)


def sample(places: NDArray[np.int64], records: int, seed: int) -> list[tuple[int, int]]:
    """Blocks that were written in the first records, and the seq that each then holds."""
    newest_first = places[:records][::-1]
    chosen = random.Random(seed).sample(range(records), min(READS + 1, records))
    wanted = np.unique(newest_first[chosen])
    order = np.argsort(newest_first, kind="stable")
    at = np.searchsorted(newest_first, wanted, sorter=order)
    found = [(int(b), records - int(order[i]) + 2) for b, i in zip(wanted, at, strict=True)]
    random.Random(seed).shuffle(found)
    return found


class Nbd:
    """Reads of one export."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(path)
        self._take(18)
        self._socket.sendall(struct.pack(">IQII", 3, 0x49484156454F5054, 1, 0))
        self._take(10)

    def _take(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = self._socket.recv(count - len(data))
            if not part:
                raise SystemExit("the view closed the connection")
            data += part
        return bytes(data)

    def read(self, offset: int, length: int) -> bytes:
        self._socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, offset, length))
        _magic, error, _cookie = struct.unpack(">IIQ", self._take(16))
        if error:
            raise SystemExit(f"a read failed with error {error}")
        return self._take(length)

    def close(self) -> None:
        self._socket.close()


def forget(where: Path) -> None:
    """The store's files leave the page cache."""
    for path in (where / "store").rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def measure(
    where: Path, point: str, blocks: list[tuple[int, int]], record_bytes: int
) -> tuple[float, float]:
    """Seconds to the first right block, and to all of them."""
    forget(where)
    command = [str(Path(sys.executable).parent / "vrep"), "test", "start", GROUP, "--at", point]
    begin = time.perf_counter()
    done = subprocess.run(
        [*command, "--dir", str(where), "--json"], stdout=subprocess.PIPE, check=True
    )
    nbd = Nbd(json.loads(done.stdout)["socket"])
    first = 0.0
    for block, seq in blocks:
        data = nbd.read(block * BLOCK, record_bytes)
        if data != struct.pack("<Q", seq) * (record_bytes // 8):
            raise SystemExit(f"block {block} at {point} is wrong: not that of seq {seq}")
        first = first or time.perf_counter() - begin
    all_of_them = time.perf_counter() - begin
    nbd.close()
    stop_test(SitePaths.of(where), GROUP)
    return first, all_of_them


def row(name: str, values: list[float], target: float | None) -> dict[str, Any]:
    median = statistics.median(values)
    return {
        "name": name,
        "value": round(median, 3),
        "unit": "s",
        "against": "",
        "spread": round(max(values) - min(values), 3),
        "ratio": None if target is None else round(median / target, 3),
        "target": target,
        "met": None if target is None else median < target,
        "void": False,
    }


def peer(where: Path) -> float:
    """qemu-img convert of the same disk, out of a sparse raw file."""
    scratch = where / "peer"
    source = export(SitePaths.of(where), GROUP, "latest", scratch).disks[0].path
    fd = os.open(source, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    begin = time.perf_counter()
    command = ["qemu-img", "convert", "-f", "raw", "-O", "raw", source, f"{source}.copy"]
    subprocess.run(command, check=True)
    spent = time.perf_counter() - begin
    shutil.rmtree(scratch)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=int, default=10_000_000)
    parser.add_argument("--disk-gib", type=int, default=1024)
    parser.add_argument("--record-bytes", type=int, default=512)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--where", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    records, gib, size = arguments.records, arguments.disk_gib, arguments.record_bytes
    where = arguments.where / f"vrep-rto-{records}-{gib}-{size}"
    if not (where / "done").exists():
        shutil.rmtree(where, ignore_errors=True)
        build(where, records, gib, size)
        (where / "done").touch()
    places = blocks_of(records, gib)
    rows = []
    for name, share in (("newest", 1.0), ("half", 0.5), ("oldest tenth", 0.1)):
        upto = max(1, int(records * share))
        point = "latest" if share == 1.0 else f"pos:{Position(1, 0, upto + 2)}"
        blocks = sample(places, upto, SEED)
        times = [measure(where, point, blocks, size) for _ in range(arguments.runs)]
        scale = f"{records} records, {gib} GiB, {name} point"
        rows.append(row(f"rto first block: {scale}", [t[0] for t in times], TARGET_S))
        rows.append(row(f"rto {READS} reads: {scale}", [t[1] for t in times], None))
    if records <= PEER_RECORDS_MAX and shutil.which("qemu-img"):
        spent = peer(where)
        rows[0].update(against="qemu-img convert", against_value=round(spent, 3))
    for each in rows:
        print(json.dumps(each))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    if not arguments.keep:
        shutil.rmtree(where)


if __name__ == "__main__":
    main()
