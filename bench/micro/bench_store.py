"""The store beside a loop of write and fdatasync of the same bytes, and the target over TLS.

    python bench/micro/bench_store.py [--json FILE] [--dir DIR] [--mib 128] [--runs 3]

Batches of about 1 MiB of sealed records, of 4 KiB and of 64 KiB writes. `store` appends them
and waits until all is durable; `raw` writes the same batches to a file with an fdatasync after
each 4 MiB; `tls` sends them to a target in the same process over loopback TLS and waits for
the durable acknowledgement. Runs alternate; `ratio` is the median of ours ÷ raw. `cpu_us` is
the processor time of the whole process for each record (the `tls` one with its sender).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vrep.errors import VrepError
from vrep.keys import SiteIdentity
from vrep.paths import SitePaths
from vrep.settings import Config, NetworkConfig, TargetConfig
from vrep.target.daemon import Target
from vrep.target.store import GroupStore, StoreOptions
from vrep.wire import messages as m
from vrep.wire.peers import PeerRegistry
from vrep.wire.site import connect

AHEAD_BYTES = 32 << 20
SYNC_BYTES = 4 << 20


def load_records() -> Any:
    path = Path(__file__).resolve().parents[2] / "tests" / "oracle" / "store_records.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def raw(where: Path, batches: list[bytes]) -> None:
    fd = os.open(where / "raw", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    waiting = 0
    for batch in batches:
        waiting += os.write(fd, batch)
        if waiting >= SYNC_BYTES:
            os.fdatasync(fd)
            waiting = 0
    os.fdatasync(fd)
    os.close(fd)


def store(records: Any, where: Path, batches: list[bytes]) -> None:
    options = StoreOptions(reserve_bytes=0)
    with GroupStore.open(where, records.GROUP, create=records.spec(), options=options) as opened:
        for batch in batches:
            while opened.pending_bytes > AHEAD_BYTES:
                time.sleep(0.0002)
            opened.append(batch)
        opened.commit()


def tls(records: Any, where: Path, batches: list[bytes], last_seq: int, stream_id: bytes) -> None:
    paths = SitePaths(where / "b")
    ours, theirs = SiteIdentity.create(where / "a", "a"), SiteIdentity.create(paths.root, "b")
    for place, whom in ((where / "a", theirs), (paths.root, ours)):
        peers = PeerRegistry(place)
        certificate, joined = whom.certificate_pem, whom.created
        peers.add(
            peers.check(
                name=whom.name,
                site_id=whom.site_id,
                certificate=certificate,
                address="",
                joined=joined,
            )
        )
    config = Config(
        network=NetworkConfig(listen="127.0.0.1:0"), target=TargetConfig(reserve_bytes=0)
    )
    target = Target(paths, config)
    target.start()
    peer = PeerRegistry(where / "a").get("b")
    transport = connect(ours, peer, address=target.address)
    epoch = m.EpochInfo(counter=1, id=records.EPOCH_1.epoch_id)
    opening = m.OpenGroup(
        group_id=records.GROUP,
        name="bench",
        epoch=epoch,
        disks=[m.DiskInfo(index=0, name="root", size=records.DISK_BYTES)],
        lanes=[m.LaneOffer(durable_seq=0, oldest_seq=1, newest_seq=last_seq)],
        wrapped_keys=[],
    )
    transport.send(opening, 1)
    answer = transport.expect(10).message
    assert isinstance(answer, m.GroupOpened), answer
    transport.send(m.StreamStart(stream_id=stream_id, key_generation=1, resume_seq=0), 1)
    moved = threading.Condition()
    durable = 0

    def listen() -> None:
        nonlocal durable
        while durable < last_seq:
            message = transport.expect(30).message
            assert isinstance(message, m.Ack), message
            with moved:
                durable = message.durable_seq
                moved.notify()

    reader = threading.Thread(target=listen)
    reader.start()
    for batch in batches:
        size = len(batch)
        with moved:
            moved.wait_for(lambda size=size: transport.connection.credit(1) >= size, 30)  # type: ignore[misc]
        transport.send_data(1, [batch])
    reader.join()
    transport.close()
    target.close()


def measure(work: Callable[[Path], None], base: Path) -> tuple[float, float]:
    """Seconds on the wall and of the processor."""
    with tempfile.TemporaryDirectory(dir=base) as name:
        cpu, begin = time.process_time(), time.perf_counter()
        work(Path(name))
        return time.perf_counter() - begin, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--mib", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    records = load_records()
    rows = []
    for length in (4096, 65536):
        feed = records.Feed()
        stream, stream_id = feed.stream(), feed.stream_id
        count = (1 << 20) // length
        batches = [stream + feed.writes(count, length)]
        batches += [feed.writes(count, length) for _ in range(options.mib - 1)]
        total = sum(len(batch) for batch in batches)
        works: dict[str, Callable[[Path], None]] = {
            "raw": lambda where, b=batches: raw(where, b),  # type: ignore[misc]
            "store": lambda where, b=batches: store(records, where, b),  # type: ignore[misc]
            "tls": lambda where, b=batches, s=feed.seq, i=stream_id: tls(  # type: ignore[misc]
                records, where, b, s, i
            ),
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
        for _ in range(options.runs):
            for name, work in works.items():
                times[name].append(measure(work, options.dir))
        plain = [wall for wall, _cpu in times["raw"]]
        for name in ("store", "tls"):
            ratios = [p / wall for p, (wall, _cpu) in zip(plain, times[name], strict=True)]
            wall = statistics.median(wall for wall, _cpu in times[name])
            cpu = statistics.median(cpu for _wall, cpu in times[name])
            rows.append(
                {
                    "name": f"{name} {length >> 10} KiB",
                    "value": round(total / wall / 1e6, 1),
                    "unit": "MB/s",
                    "against": "write and fdatasync",
                    "ratio": round(statistics.median(ratios), 3),
                    "spread": round(max(ratios) - min(ratios), 3),
                    "cpu_us": round(cpu / feed.seq * 1e6, 2),
                }
            )
            print(json.dumps(rows[-1]))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except VrepError as error:
        sys.exit(str(error))
