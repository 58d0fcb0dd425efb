"""The golden files: ``python tests/golden/build.py --regenerate`` writes them.

Each is built from fixed values by vrep's own definitions, and kept in the repository: a
change of any byte is a change of a format. ``parse.py`` reads them without vrep.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from vrep._core import layout, record, seal
from vrep.source import shipped as shipping

FOLDER = Path(__file__).parent / "core"
DATA_KEY = bytes(range(1, 33))
STREAM_ID = bytes(range(0x20, 0x30))
EPOCH_ID = bytes(range(0x30, 0x40))
GROUP_ID = bytes(range(0x40, 0x50))
STORE_ID = bytes(range(0x50, 0x60))
TARGET_ID = bytes(range(0x60, 0x70))
BOOT_ID = bytes(range(0x70, 0x80))
SITE_ID = bytes(range(0x80, 0x90))
SECRET = bytes((7 * i + 3) % 256 for i in range(192))
VERDICT_SECRET = 0x5EED
VERDICT = {
    "group": "web", "time_ns": 1_700_000_000_000_000_102, "result": "bad", "site": "east",
    "site_id": SITE_ID.hex(), "fingerprint": "ab" * 32, "manifest": 42,
    "history": [[3, EPOCH_ID.hex(), 102], [2, EPOCH_ID[::-1].hex(), 99]], "anchor": "cd" * 32,
    "records": 12, "tallies": 3, "tallied_to": "pos:3/0/101",
    "objects": {"manifests": 2, "segments": 1, "indexes": 1, "runs": 0},
    "disks": [{"name": "root", "bytes": 65536, "data_bytes": 4096, "sha256": "ef" * 32}],
    "checks": [{"what": "e2fsck", "disk": "root:1", "result": "good", "text": "clean"}],
    "damages": [
        {"object": "seg-00000001", "first": "pos:3/0/100", "last": "pos:3/0/102", "text": "byte 9"}
    ],
    "note": "", "seconds": 0.5, "folded_to": "pos:2/0/90",
}  # fmt: skip
WALL = 1_700_000_000_000_000_000


def one(struct: str, /, **fields: object) -> np.ndarray:
    out = np.zeros(1, layout.STRUCTS[struct])
    for field, value in fields.items():
        if isinstance(value, bytes) and out.dtype[field].subdtype is not None:
            value = np.frombuffer(value, np.uint8)
        out[field] = value
    return out


def position(seq: int, *, epoch: int = 1, lane: int = 0) -> np.ndarray:
    return one("POSITION", epoch=epoch, lane=lane, seq=seq)[0]


def checksum(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data, seed=0x76726570) & 0xFFFFFFFF


def checked(made: np.ndarray) -> bytes:
    """The bytes of a struct with its checksum stored."""
    end = made.dtype.fields["checksum"][1]  # type: ignore[index]
    made["checksum"] = checksum(made.tobytes()[:end])
    return made.tobytes()


def digest(data: bytes) -> bytes:
    return xxhash.xxh3_128_intdigest(data).to_bytes(16, "little")


def bitmap(words: int, *bits: int) -> bytes:
    return sum(1 << bit for bit in bits).to_bytes(8 * words, "little")


def padded(data: bytes, unit: int) -> bytes:
    return data + bytes(-len(data) % unit)


def records(level: int = 0) -> bytes:
    key = seal.stream_key(DATA_KEY, STREAM_ID)
    sealer = seal.Sealer(key, STREAM_ID, epoch=3, lane=1, resume_seq=99, secret=SECRET, level=level)
    out = bytearray(1 << 20)
    stream = one(
        "STREAM",
        epoch_id=EPOCH_ID,
        parent_epoch_id=EPOCH_ID[::-1],
        parent=position(99, epoch=2, lane=1),
        key_generation=2,
        wall_ns=WALL,
    )
    at = sealer.stream(stream, out)
    label, name, blob = b"nightly", b"definition.xml", b"<domain/>" * 40
    mark = one("MARK", wall_ns=WALL + 5, version=1, label_bytes=len(label)).tobytes() + label
    thing = one("OBJECT", wall_ns=WALL + 6, version=1, name_bytes=len(name)).tobytes() + name + blob
    data = bytes(i * i % 251 for i in range(150_000))
    changes = [
        ("WRITE", 100, layout.RECORD_FUA, 2, 4096, data[:4096]),
        ("WRITE", 101, 0, 0, 1000, data[:1]),
        ("WRITE", 102, 0, 63, 1 << 40, data),
        ("ZEROES", 103, 0, 2, 65536, 1 << 31),
        ("RESIZE", 104, 0, 2, 1 << 30, 0),
        ("SYNC", 105, layout.RECORD_REPLAY, 2, 131072, data[:8192]),
        ("SYNC_ZEROES", 106, 0, 2, 0, 65536),
        ("MARK", 107, 0, 0, 0, mark),
        ("GAP_BEGIN", 200, layout.RECORD_JUMP, 0, 0, 0),
        ("GAP_END", 201, 0, 0, 0, 0),
        ("OBJECT", 202, 0, 0, 0, thing),
    ]
    made = np.zeros(len(changes), layout.RECORD)
    payloads: list[bytes | None] = []
    for i, (kind, seq, flags, disk, offset, body) in enumerate(changes):
        length = body if isinstance(body, int) else len(body)
        made[i]["kind"] = layout.CONSTANTS[f"KIND_{kind}"]
        made[i]["seq"], made[i]["flags"], made[i]["disk"] = seq, flags, disk
        made[i]["offset"], made[i]["length"] = offset, length
        made[i]["wall_ns"], made[i]["mono_ns"] = WALL + seq, 5_000_000 + seq
        payloads.append(None if isinstance(body, int) else body)
    written, done = sealer.seal(made, payloads, memoryview(out)[at:])
    assert done == len(changes)
    at += written
    at += sealer.tally(memoryview(out)[at:], wall_ns=WALL + 300, mono_ns=5_000_300)
    return bytes(out[:at])


def cut() -> bytes:
    """A lane's mark of a cut, and the record that completes one over lanes 0, 1 and 5, of which
    the last had no part."""
    key = seal.stream_key(DATA_KEY, STREAM_ID)
    sealer = seal.Sealer(key, STREAM_ID, epoch=3, lane=1, resume_seq=99, secret=SECRET, level=0)
    out = bytearray(1 << 16)
    stream = one("STREAM", epoch_id=EPOCH_ID, key_generation=2, wall_ns=WALL)
    at = sealer.stream(stream, out)
    label = b"nightly"
    part = one("MARK", wall_ns=WALL + 5, version=2).tobytes() + one("CUT", cut_id=SITE_ID).tobytes()
    lanes = [(7, 3, 0), (100, 3, 1), (0, 0, 5)]
    whole = (
        one("MARK", wall_ns=WALL + 6, version=2, label_bytes=len(label)).tobytes()
        + one("CUT", cut_id=SITE_ID, lanes=3).tobytes()
        + b"".join(position(seq, epoch=epoch, lane=lane).tobytes() for seq, epoch, lane in lanes)
        + label
    )
    made = np.zeros(2, layout.RECORD)
    made["kind"], made["seq"] = layout.KIND_MARK, [100, 101]
    made["length"], made["wall_ns"] = [len(part), len(whole)], WALL + 7
    made["mono_ns"] = 5_000_007
    written, done = sealer.seal(made, [part, whole], memoryview(out)[at:])
    assert done == 2
    return bytes(out[: at + written])


def ring() -> bytes:
    slots, descs, chunks = 2, 4, 8
    slots_at, descs_at, next_at, chunks_at = 4096, 4096 + 4096, 4096 * 3, 4096 * 4
    total = chunks_at + chunks * 4096
    header = one(
        "RING_HEADER", magic=layout.RING_MAGIC, version=layout.RING_VERSION, header_bytes=4096,
        file_bytes=total, group_id=GROUP_ID, boot_id=BOOT_ID, epoch_id=EPOCH_ID, epoch=3, lane=1,
        descriptors=descs, slots=slots, chunks=chunks, chunk_bytes=4096, slots_at=slots_at,
        descs_at=descs_at, next_at=next_at, chunks_at=chunks_at, first_seq=99, head=101,
        released=100, durable=90, spilled_ns=1_700_000_000_000_000_000, incarnation=2,
        producer_pid=4242, clean=0,
    )  # fmt: skip
    slot = one(
        "RING_SLOT", state=layout.SLOT_GRANTED, kind=layout.KIND_WRITE, generation=1, disk=2,
        offset=8192, length=5000, chunk=3, chunks=2, flags=layout.RECORD_FUA, lane=1,
        granted_ns=77,
    )  # fmt: skip
    desc = one(
        "RING_DESC", seq=101, offset=4096, length=4096, chunk=1, chunks=1, kind=layout.KIND_WRITE,
        generation=layout.GENERATIONS - 1, disk=2, lane=1, epoch=3, wall_ns=WALL, mono_ns=88,
    )  # fmt: skip
    out = bytearray(total)
    out[:4096] = checked(header)
    out[slots_at : slots_at + 64] = slot.tobytes()
    out[descs_at + 64 : descs_at + 128] = desc.tobytes()  # seq 101 % 4
    links = np.full(chunks, layout.NO_CHUNK, np.uint32)
    links[3] = 5
    out[next_at : next_at + 4 * chunks] = links.tobytes()
    out[chunks_at + 4096 : chunks_at + 8192] = bytes(range(256)) * 16
    return bytes(out)


def control() -> bytes:
    return one(
        "RING_CONTROL", magic=layout.CONTROL_MAGIC, version=layout.CONTROL_VERSION,
        role=layout.CONTROL_TARGET, target_id=TARGET_ID, pid=4243, durable=100, received=101,
        read=101, spilled=100, waiting=1,
    ).tobytes()  # fmt: skip


def change_map() -> bytes:
    disk = one("MAP_DISK", bytes=100 * 65536, bits=100, words=512, bitmaps_at=4096)
    header = one(
        "MAP_HEADER", magic=layout.MAP_MAGIC, version=layout.MAP_VERSION, header_bytes=4096,
        file_bytes=4096 + 5 * 4096, group_id=GROUP_ID, target_id=TARGET_ID, boot_id=BOOT_ID,
        bit_bytes=layout.MAP_BIT_BYTES, disks=1, gap=1, gap_open=1, gap_seq=90,
        open_generation=1, unverified=0,
    )  # fmt: skip
    header["disk"][0][0] = disk[0]
    states = (layout.GENERATION_SEALED, layout.GENERATION_OPEN)
    for i, state in enumerate(states):
        header["generation"][0][i]["state"] = state
        header["generation"][0][i]["last_seq"] = 100 + i
        header["generation"][0][i]["opened_seq"] = 80 + 20 * i
        header["generation"][0][i]["inflight"] = i
    maps = bitmap(512, 0, 99) + bitmap(512, 64) + bytes(2 * 4096) + bitmap(512, 7)
    return checked(header) + maps


def checkpoint() -> bytes:
    maps = bitmap(2, 0, 99) + bitmap(1, 63)
    header = one(
        "CHECKPOINT_HEADER", magic=layout.CHECKPOINT_MAGIC, version=layout.CHECKPOINT_VERSION,
        disks=2, counter=12, group_id=GROUP_ID, target_id=TARGET_ID,
        bit_bytes=layout.MAP_BIT_BYTES, clean=1, head=101, digest=digest(maps),
        durable=99,
    )  # fmt: skip
    header["words"][0][:2], header["bytes"][0][:2] = (2, 1), (100 * 65536, 64 * 65536)
    return checked(header) + maps


def intent() -> bytes:
    out = b""
    for counter, extents in ((8, (3,)), (7, (3, 5))):
        body = bitmap(2, *extents)
        header = one(
            "INTENT_HEADER", magic=layout.INTENT_MAGIC, version=layout.INTENT_VERSION,
            extent_bytes=layout.INTENT_BYTES, counter=counter, group_id=GROUP_ID, disks=1,
            slot_bytes=4096, words=2, digest=digest(body),
        )  # fmt: skip
        out += padded(checked(header) + body, 4096)
    return out


def state() -> bytes:
    out = b""
    for counter in (4, 5):
        header = one(
            "STATE", magic=layout.STATE_MAGIC, version=layout.STATE_VERSION,
            flags=layout.STATE_OPEN | layout.STATE_SYNCED, counter=counter, group_id=GROUP_ID,
            epoch_id=EPOCH_ID, epoch=3, lane=1, disks=1, seq_limit=10_000, durable_seq=100,
        )  # fmt: skip
        header["disk"][0][0] = one(
            "STATE_DISK", bytes=1 << 30, device=0xFE00, inode=77, mtime_ns=WALL, ctime_ns=WALL + 1
        )[0]
        out += checked(header)
    return out


def reservations() -> bytes:
    out = b""
    for counter in (6, 7):
        made = one(
            "RESERVATIONS", magic=layout.RESERVATIONS_MAGIC, version=layout.RESERVATIONS_VERSION,
            counter=counter, unit=SITE_ID, count=2, holder=1, type=2 * counter - 9,
        )  # fmt: skip
        for i, name in enumerate((b"iqn.2026-01.test:a", b"iqn.2026-01.test:b")):
            transport = (b"\x45\0\0\x28" + name + b",i,0x00023d00000%d" % i).ljust(44, b"\0")
            made["list"][0][i] = one(
                "REGISTRATION", key=0xA + i, port=1, transport_id_bytes=44,
                transport_id=transport.ljust(248, b"\0"),
            )[0]  # fmt: skip
        out += checked(made)
    return out


def segment() -> bytes:
    body = records()
    header = one(
        "SEGMENT_HEADER", magic=layout.SEGMENT_MAGIC, version=1,
        header_bytes=128, group_id=GROUP_ID, store_id=STORE_ID, segment=7, lease=3, wall_ns=WALL,
        after=position(99, epoch=2, lane=1),
    )  # fmt: skip
    out = checked(header) + body
    end = len(out)
    out = padded(out, 64)
    commit = one(
        "COMMIT", magic=layout.COMMIT_MAGIC, version=layout.COMMIT_VERSION, block_bytes=128,
        segment=7, number=1, start=128, end=end, digest=digest(out[128:]),
        last=position(202, epoch=3, lane=1), durable=position(99, epoch=2, lane=1),
        group_id=GROUP_ID, wall_ns=WALL + 1, records=13,
    )  # fmt: skip
    return out + checked(commit)


def segment_folded() -> bytes:
    """The writes of `segment` that a fold left, and the state of its tally behind all."""
    whole = records()
    found, _consumed = record.scan(whole)
    parts = [
        whole[int(at) : int(at) + 64 + int(header["body_bytes"])]
        for header, at in zip(found["header"], found["position"], strict=True)
    ]
    tally = seal.Tally()
    tally.update(b"".join(parts[1:-1]))
    header = one(
        "SEGMENT_HEADER", magic=layout.SEGMENT_MAGIC, version=2, header_bytes=128,
        group_id=GROUP_ID, store_id=STORE_ID, segment=7, lease=4, wall_ns=WALL + 9,
        flags=layout.SEGMENT_FOLDED, after=position(99, epoch=2, lane=1),
    )  # fmt: skip
    block = one(
        "FOLD", magic=layout.FOLD_MAGIC, version=layout.FOLD_VERSION, block_bytes=256, segment=7,
        generation=1, flags=layout.FOLD_TALLIED, horizon=position(202, epoch=3, lane=1),
        end=position(202, epoch=3, lane=1), input_bytes=164_000, input_records=11,
        tally=np.frombuffer(tally.save(), np.uint8),
    )  # fmt: skip
    out = checked(header) + checked(block)
    commits = (([parts[0], parts[1], parts[2], parts[6]], 105), ([parts[0]], 99))
    for number, (kept, last) in enumerate(commits, 1):
        start = len(out)
        out += b"".join(kept)
        end = len(out)
        out = padded(out, 64)
        out += checked(
            one(
                "COMMIT",
                magic=layout.COMMIT_MAGIC,
                version=layout.COMMIT_VERSION,
                block_bytes=128,
                segment=7,
                number=number,
                start=start,
                end=end,
                digest=digest(out[start:]),
                last=position(last, epoch=3, lane=1),
                durable=position(99, epoch=2, lane=1),
                group_id=GROUP_ID,
                wall_ns=WALL + 9,
                records=len(kept),
            )
        )
    return out


def index() -> bytes:
    def entries(*rows: tuple[int, int, int, int]) -> bytes:
        out = np.zeros(len(rows), layout.INDEX_ENTRY)
        for i, (offset, seq, length, kind) in enumerate(rows):
            out[i]["offset"], out[i]["seq"], out[i]["length"] = offset, seq, length
            out[i]["kind"], out[i]["disk"], out[i]["epoch"] = kind, 2, 3
            out[i]["segment"], out[i]["position"] = 7, 128 + 192 * (seq - 100)
        return out.tobytes()

    write, zeroes = layout.KIND_WRITE, layout.KIND_ZEROES
    parts = {
        "short": entries((0, 102, 512, write), (4096, 105, 4096, write), (4096, 100, 4096, write)),
        "long": entries((65536, 103, 1 << 31, zeroes)),
        "streams": one(
            "INDEX_STREAM", stream_id=STREAM_ID, epoch_id=EPOCH_ID, epoch=3, key_generation=2,
            first_seq=100,
        ).tobytes(),
        "events": one(
            "INDEX_EVENT", at=position(107, epoch=3, lane=1), wall_ns=WALL + 107, segment=7,
            position=9000, kind=layout.KIND_MARK,
        ).tobytes(),
        "times": one(
            "INDEX_TIME", wall_ns=WALL + 202, at=position(202, epoch=3, lane=1)
        ).tobytes(),
    }  # fmt: skip

    def node(rows: bytes) -> np.ndarray:
        found = np.frombuffer(rows, layout.INDEX_ENTRY)
        return one(
            "INDEX_NODE", offset=found[0]["offset"],
            end=max(int(row["offset"]) + int(row["length"]) for row in found),
            seq_low=found["seq"].min(), seq_high=found["seq"].max(), epoch_low=3, epoch_high=3,
            disk_first=2, disk_last=2, checksum=checksum(rows),
        )  # fmt: skip

    roots = node(parts["long"]).tobytes(), node(parts["short"]).tobytes()
    trailer = one(
        "INDEX_TRAILER", magic=layout.INDEX_MAGIC, version=layout.INDEX_VERSION,
        trailer_bytes=256, segment=7, first=position(100, epoch=3, lane=1),
        last=position(202, epoch=3, lane=1), data_bytes=8704 + (1 << 31), segment_bytes=30_000,
        wall_first_ns=WALL + 100, wall_last_ns=WALL + 202, group_id=GROUP_ID,
        short_digest=digest(parts["short"]),
        rest_digest=digest(b"".join(parts[name] for name in list(parts)[1:])),
        long_root=checksum(roots[0]), short_root=checksum(roots[1]),
        streams_checksum=checksum(parts["streams"]),
        events_checksum=int.from_bytes(digest(parts["events"])[:4], "little"),
    )  # fmt: skip
    parts["nodes"] = b"".join(roots)
    out, sizes = b"", {"short": 40, "long": 40, "streams": 64, "events": 40, "times": 24}
    sizes["nodes"] = 48
    for name, part in parts.items():
        out = padded(out, 64)
        trailer[f"{name}_at"], trailer[f"{name}_count"] = len(out), len(part) // sizes[name]
        out += part
    return padded(out, 64) + checked(trailer)


def manifest(version: int = 1) -> bytes:
    disk = one("MANIFEST_DISK", name=b"root", bytes=1 << 30, index=0)
    epochs = [
        one(
            "MANIFEST_EPOCH", epoch=2, state=1, epoch_id=EPOCH_ID[::-1], writer=SITE_ID,
            wall_ns=WALL,
        ),
        one(
            "MANIFEST_EPOCH", epoch=3, state=2, epoch_id=EPOCH_ID, writer=STORE_ID,
            parent=position(99, epoch=2, lane=1), wall_ns=WALL + 1,
        ),
    ]  # fmt: skip
    segment_entry = one(
        "MANIFEST_SEGMENT", segment=7, file_bytes=99_000, data_end=98_000,
        first=position(100, epoch=3, lane=1), last=position(202, epoch=3, lane=1), records=13,
        data_bytes=162_000, index_digest=digest(b"trailer"), generation=version - 1,
    )  # fmt: skip
    run = one(
        "MANIFEST_RUN", run=1, level=1, first_segment=1, last_segment=6, file_bytes=5000,
        index_digest=digest(b"run"),
    )  # fmt: skip
    keys = b"wrapped data keys, opaque here"
    parts = [*epochs, segment_entry, run, disk]
    body = b"".join(part.tobytes() for part in parts) + keys
    header = one(
        "MANIFEST_HEADER", magic=layout.MANIFEST_MAGIC, version=version,
        header_bytes=256, number=42, lease=3, group_id=GROUP_ID, store_id=STORE_ID,
        wall_ns=WALL + 2, epochs=2, segments=1, runs=1, disks=1, key_bytes=len(keys),
        body_bytes=len(body), next_segment=9, active_segment=8, group_name=b"web",
        digest=digest(body),
    )  # fmt: skip
    if version == 2:
        header["horizon"] = position(150, epoch=3, lane=1)
        header["window_s"], header["quota_bytes"] = 86_400, 1 << 39
        header["received_bytes"], header["folded_bytes"] = 1 << 33, 1 << 31
    return checked(header) + body


def presence() -> bytes:
    header = one(
        "PRESENCE_HEADER", magic=layout.PRESENCE_MAGIC, version=layout.PRESENCE_VERSION,
        block_bytes=65536, disk_bytes=100 * 65536, words=2, view_id=SITE_ID,
    )  # fmt: skip
    return checked(header) + bitmap(2, 1, 64, 99)


def shipped() -> bytes:
    return shipping.encode(shipping.Mark(2, 3, EPOCH_ID.hex(), 102))


def lost() -> bytes:
    ranges = [one("LOST_RANGE", disk=disk, offset=offset, length=65536 * n)
              for disk, offset, n in ((0, 65536, 1), (0, 1 << 30, 3), (2, 0, 1))]  # fmt: skip
    body = b"".join(each.tobytes() for each in ranges)
    header = one(
        "LOST_HEADER", magic=layout.LOST_MAGIC, version=layout.LOST_VERSION, group_id=GROUP_ID,
        store_id=STORE_ID, at=position(102, epoch=3), ranges=len(ranges), digest=digest(body),
    )  # fmt: skip
    return checked(header) + body


def verdict() -> bytes:
    body = json.dumps(VERDICT, separators=(",", ":")).encode()
    header = one(
        "VERDICT_HEADER", magic=layout.VERDICT_MAGIC, version=layout.VERDICT_VERSION,
        header_bytes=128, group_id=GROUP_ID, store_id=STORE_ID, at=position(102, epoch=3),
        wall_ns=WALL + 4, body_bytes=len(body), signature_bytes=64, digest=digest(body),
    )  # fmt: skip
    signed = checked(header) + body
    key = ec.derive_private_key(VERDICT_SECRET, ec.SECP256R1())
    r, s = decode_dss_signature(key.sign(b"vrep verdict v1\0" + signed, ec.ECDSA(hashes.SHA256())))
    return signed + r.to_bytes(32, "big") + s.to_bytes(32, "big")


SAMPLES: dict[str, Callable[[], bytes]] = {
    "records": records,
    "cut": cut,
    "ring": ring,
    "control": control,
    "map": change_map,
    "checkpoint": checkpoint,
    "intent": intent,
    "state": state,
    "reservations": reservations,
    "segment": segment,
    "segment-folded": segment_folded,
    "index": index,
    "manifest": manifest,
    "manifest-2": lambda: manifest(2),
    "presence": presence,
    "lost": lost,
    "shipped": shipped,
}
# Any release reads them, and none writes the same bytes twice: zstd promises only the former, and
# a signature has a random part.
READ_ONLY: dict[str, Callable[[], bytes]] = {
    "records-zstd": lambda: records(level=3),
    "verdict": verdict,
}


def main() -> int:
    if sys.argv[1:] != ["--regenerate"]:
        print(__doc__)
        return 2
    FOLDER.mkdir(exist_ok=True)
    for name, build in (SAMPLES | READ_ONLY).items():
        (FOLDER / f"{name}.bin").write_bytes(build())
    return 0


if __name__ == "__main__":
    sys.exit(main())
