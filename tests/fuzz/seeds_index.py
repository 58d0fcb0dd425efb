"""Write the seeds of fuzz_index: ``python tests/fuzz/seeds_index.py``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vrep._core import layout, record
from vrep._core.index import IndexBuilder

CORPUS = Path(__file__).parent / "corpus" / "index"
REPAIR, MERGE = 1, 2


def footer(count: int) -> bytes:
    builder = IndexBuilder(1, bytes(16))
    stream = np.zeros((), layout.STREAM)
    stream["epoch"] = 1
    builder.add(record.stream_record(stream), 128)
    headers = np.zeros(count, layout.RECORD)
    headers["magic"], headers["version"] = layout.RECORD_MAGIC, layout.RECORD_VERSION
    headers["epoch"], headers["seq"] = 1, np.arange(1, count + 1)
    headers["kind"] = layout.KIND_ZEROES
    headers["kind"][-1] = layout.KIND_GAP_BEGIN
    headers["offset"][:-1] = np.arange(count - 1) % 5 * 4096
    headers["length"][:-1] = 6000
    headers["length"][: count // 4] = 200_000
    record.finish(headers)
    builder.add(headers, 1024)
    body = np.array([layout.PIECE_ZSTD | 17], "<u4").tobytes() + bytes(17)
    write = np.zeros(1, layout.RECORD)
    write["magic"], write["version"] = layout.RECORD_MAGIC, layout.RECORD_VERSION
    write["epoch"], write["seq"], write["kind"] = 1, count + 1, layout.KIND_WRITE
    write["offset"], write["length"], write["pieces"] = 8192, 4096, 1
    write["body_bytes"] = len(body)
    record.finish(write)
    builder.add(write.tobytes() + body, 1 << 16)
    builder.time(9, 1, 0, count + 1)
    return builder.finish(0)


def main() -> None:
    CORPUS.mkdir(parents=True, exist_ok=True)
    for count in (2, 90):
        for options in (0, REPAIR, REPAIR | MERGE):
            (CORPUS / f"records{count}-options{options}").write_bytes(
                bytes([options]) + footer(count)
            )


if __name__ == "__main__":
    main()
