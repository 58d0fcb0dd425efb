"""An overlay under random load, below forget.c; see test_overlay_crash.py.

python overlay_worker.py ROOT SEED STEPS [onto]
"""

from __future__ import annotations

import ctypes
import json
import random
import sys
from pathlib import Path

from vrep._core.disk import Disk, Engine

BLOCK, SIZE, VIEW = 4096, 200 * 4096 + 512, b"v" * 16
BLOCKS = -(-SIZE // BLOCK)
ONTO = "onto.raw"


def block_of(seed: int, number: int, block: int) -> bytes:
    length = min(BLOCK, SIZE - block * BLOCK)
    return random.Random(f"{seed}/{number}/{block}").randbytes(length)


def open_overlay(engine: Engine, directory: Path) -> Disk:
    """One that fills another disk, where there is one."""
    onto = directory / ONTO
    return Disk(
        engine,
        directory / "view",
        view_id=VIEW,
        size=SIZE,
        block_bytes=BLOCK,
        onto=f"file:{onto}" if onto.exists() else None,
    )


def main() -> None:
    root, seed, steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    rng = random.Random(seed)
    library = ctypes.CDLL(None)

    def say(**fields: object) -> None:
        text = json.dumps(fields).encode()
        library.forget_mark(text, ctypes.c_size_t(len(text)))

    with Engine(3) as engine, open_overlay(engine, root / "durable") as disk:
        say(what="opened")
        flights = []
        for number in range(1, steps + 1):
            op = rng.choices(["write", "flush", "finish"], [10, 2, 2])[0]
            if op == "write":
                first = rng.randrange(BLOCKS)
                blocks = range(first, min(BLOCKS, first + rng.choice([1, 1, 2, 40])))
                if any(set(blocks) & set(other) for _, _, other in flights):
                    continue  # the filter holds what overlaps
                data = b"".join(block_of(seed, number, block) for block in blocks)
                fua = rng.random() < 0.2
                say(what="issue", number=number, blocks=list(blocks), fua=fua)
                request = disk.submit("write", first * BLOCK, 0, data, fua=fua)
                flights.append((number, request, blocks))
            elif op == "flush":
                say(what="issue", number=number, blocks=[], fua=False)
                flights.append((number, disk.submit("flush"), range(0)))
            while flights and (op == "finish" or flights[0][1].done or len(flights) > 6):
                done, request, _ = flights.pop(0)
                engine.wait(request)
                request.result()
                say(what="ack", number=done)
        engine.wait()


if __name__ == "__main__":
    main()
