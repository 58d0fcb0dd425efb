"""Ring publish beside memcpy, and the cost of a small publish, in one run.

    python bench/micro/bench_ring.py [--json FILE] [--runs 5]

A C program is built from the ring's own sources. In turns, 64 KiB at a time, it copies a
buffer into plain memory as large as the ring's payload, used round and round, and
reserves, fills, publishes, notifies and releases in the ring. `ratio` is memcpy's time
over ours, the median of the runs; a row whose spread is over a quarter of it is void.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

NATIVE = Path(__file__).resolve().parents[2] / "src" / "_native"
TARGET = 0.90
PROGRAM = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include "ring/ring.h"

enum { RING = 64 << 20 };

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void publish(struct vrep_ring *ring, struct vrep_ring_consumer *consumer, const char *from,
                    uint32_t size, uint64_t keep)
{
    struct iovec iov[32];
    struct vrep_ring_slot *slot = vrep_ring_reserve(ring, size);
    int n = vrep_ring_iov(ring, slot, 0, size, iov, 32);
    for (int i = 0; i < n; i++) {
        memcpy(iov[i].iov_base, from, iov[i].iov_len);
        from += iov[i].iov_len;
    }
    slot->kind = VREP_KIND_WRITE;
    slot->length = size;
    vrep_ring_grant(ring, slot, 1);
    uint64_t seq = vrep_ring_stage(ring, slot, 1, 1);
    vrep_ring_commit(ring, slot);
    vrep_ring_consumer_notify(ring, consumer);
    if (seq > keep)
        (void)vrep_ring_release(ring, seq - keep);
}

int main(int argc, char **argv)
{
    uint32_t size = (uint32_t)atoi(argv[2]);
    int runs = atoi(argv[3]), count = (int)((2u << 30) / 8 / (size < 16384 ? 16384 : size));
    uint64_t keep = RING / size - 64;
    struct vrep_ring_config config = {.descriptors = 1 << 16, .slots = 64, .payload_bytes = RING,
                                      .mode = 0600};
    struct vrep_ring *ring;
    struct vrep_ring_consumer consumer;
    if (argc != 4 || vrep_ring_create(argv[1], &config, &ring) != 0 ||
        vrep_ring_consumer_create(VREP_CONTROL_TARGET, NULL, 0, 0, &consumer) != 0)
        return 1;
    unlink(argv[1]);
    char *plain = mmap(NULL, RING, PROT_READ | PROT_WRITE,
                       MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    char *from = malloc(size);
    memset(from, 7, size);
    size_t at = 0;
    for (int run = -1; run < runs; run++) {
        double ours = 0, theirs = 0;
        for (int part = 0; part < 64; part++) {
            double begin = now();
            for (int i = 0; i < count / 64; i++)
                publish(ring, &consumer, from, size, keep);
            double middle = now();
            for (int i = 0; i < count / 64; i++) {
                memcpy(plain + at, from, size);
                __asm__ volatile("" ::: "memory");
                at = at + 2 * size <= RING ? at + size : 0;
            }
            ours += middle - begin;
            theirs += now() - middle;
        }
        if (run >= 0)
            printf("%.9f %.9f\n", ours / (count / 64 * 64), theirs / (count / 64 * 64));
    }
    return 0;
}
"""


def build(folder: Path) -> Path:
    source, program = folder / "bench.c", folder / "bench"
    source.write_text(PROGRAM)
    rooms = [path for room in ("ring", "base", "format") for path in (NATIVE / room).glob("*.c")]
    options = ["-O3", "-std=c11", "-D_GNU_SOURCE", f"-I{NATIVE}"]
    subprocess.run(["cc", *options, source, *rooms, "-o", program, "-lxxhash"], check=True)
    return program


def measure(
    program: Path, folder: Path, size: int, runs: int, target: float | None
) -> dict[str, Any]:
    ring = Path("/dev/shm") / f"vrep-bench-{folder.name}"
    command = [program, ring, str(size), str(runs)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    pairs = [tuple(map(float, line.split())) for line in out.splitlines()]
    ratios = [theirs / ours for ours, theirs in pairs]
    ratio, spread = statistics.median(ratios), max(ratios) - min(ratios)
    ours = statistics.median(ours for ours, _ in pairs)
    void = spread > ratio / 4
    return {
        "name": f"ring publish, {size // 1024} KiB payload",
        "value": round(ours * 1e9),
        "unit": "ns",
        "against": "memcpy",
        "against_value": round(statistics.median(theirs for _, theirs in pairs) * 1e9),
        "ratio": round(ratio, 3),
        "spread": round(spread, 3),
        "target": target,
        "met": None if target is None or void else ratio >= target,
        "void": void,
    }


def rows(runs: int = 5) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = build(folder)
        return [
            measure(program, folder, 65536, runs, TARGET),
            measure(program, folder, 4096, runs, None),
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    found = rows(arguments.runs)
    for row in found:
        print(json.dumps(row))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
