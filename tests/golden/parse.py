"""An independent parser of every format of layout.h, but the wire's.

It imports nothing of vrep: struct, hashlib, xxhash, cryptography and zstandard only, so
that a mistake in the C definitions cannot hide in their own reflection. Slow and plain
on purpose; every rule that a reader must keep is an ``expect``.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import xxhash
import zstandard
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

Fields = dict[str, Any]


class BadFormat(Exception):
    """The bytes break a rule of their format."""


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise BadFormat(what)


def checksum32(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data, seed=0x76726570) & 0xFFFFFFFF


def digest(data: bytes) -> bytes:
    value = xxhash.xxh3_128_intdigest(data)
    return value.to_bytes(16, "little")


# A struct is a line of ``name:format``; a format is one of the struct module, with a
# count before it for an array, or the name of another struct here in brackets.
POSITION = "epoch:I lane:H reserved:H seq:Q"
RECORD = (
    "magic:I version:B kind:B flags:H epoch:I lane:H disk:H seq:Q offset:Q length:I"
    " body_bytes:I wall_ns:Q mono_ns:Q pieces:H reserved:H checksum:I"
)
STREAM = (
    "stream_id:16s epoch_id:16s parent_epoch_id:16s parent:[position] resume_seq:Q epoch:I"
    " key_generation:I wall_ns:Q reserved:36s checksum:I"
)
TALLY = "running:32s stream_id:16s records:Q first_seq:Q"
MARK = "wall_ns:Q version:H label_bytes:H flags:I"
CUT = "cut_id:16s lanes:H reserved:14s"
OBJECT = "wall_ns:Q version:H name_bytes:H flags:I"
RING_SLOT = (
    "state:I kind:B generation:B disk:H offset:Q seq:Q length:I chunk:I chunks:I flags:H lane:H"
    " granted_ns:Q reserved:16s"
)
RING_DESC = (
    "seq:Q offset:Q length:I chunk:I chunks:I kind:B generation:B flags:H disk:H lane:H epoch:I"
    " wall_ns:Q mono_ns:Q reserved:Q"
)
RING_HEADER = (
    "magic:Q version:I header_bytes:I file_bytes:Q group_id:16s boot_id:16s epoch_id:16s epoch:I"
    " lane:H reserved0:H descriptors:I slots:I chunks:I chunk_bytes:I slots_at:Q descs_at:Q"
    " next_at:Q chunks_at:Q first_seq:Q reserved1:372s checksum:I head:Q free_bytes_one:Q"
    " pad0:48s released:Q durable:Q spilled_ns:Q pad1:40s incarnation:Q producer_pid:Q clean:Q"
    " pad2:40s pad3:3392s"
)
RING_CONTROL = (
    "magic:Q version:I role:I target_id:16s pid:Q pad0:24s durable:Q received:Q read:Q spilled:Q"
    " pad1:32s waiting:I pad2:60s pad3:3904s"
)
MAP_GENERATION = "state:I inflight:I last_seq:Q opened_seq:Q reserved:Q"
MAP_DISK = "bytes:Q bits:Q words:Q bitmaps_at:Q"
MAP_HEADER = (
    "magic:Q version:I header_bytes:I file_bytes:Q group_id:16s target_id:16s boot_id:16s"
    " bit_bytes:I disks:I reserved0:44s checksum:I gap:I gap_open:I gap_seq:Q open_generation:I"
    " unverified:I merge:I reserved1:I gap_last:Q reserved4:24s generation:4[map_generation]"
    " reserved2:192s disk:64[map_disk] reserved3:1536s"
)
CHECKPOINT_HEADER = (
    "magic:Q version:I disks:I counter:Q group_id:16s target_id:16s bit_bytes:I clean:I head:Q"
    " digest:16s words:64Q bytes:64Q durable:Q reserved:28s checksum:I"
)
INTENT_HEADER = (
    "magic:Q version:I extent_bytes:I counter:Q group_id:16s disks:I slot_bytes:I words:Q"
    " digest:16s reserved:52s checksum:I"
)
STATE_DISK = "bytes:Q device:Q inode:Q mtime_ns:Q ctime_ns:Q commands:Q sectors:Q reserved:8s"
STATE = (
    "magic:Q version:I flags:I counter:Q group_id:16s epoch_id:16s epoch:I lane:H disks:H"
    " seq_limit:Q durable_seq:Q unverified:I reserved0:I disk:64[state_disk] boot_id:16s"
    " reserved1:3988s checksum:I"
)
REGISTRATION = "key:Q port:H transport_id_bytes:H reserved0:I transport_id:248s reserved1:56s"
RESERVATIONS = (
    "magic:Q version:I flags:I counter:Q unit:16s count:I holder:I type:B reserved0:79s"
    " list:64[registration] reserved1:3964s checksum:I"
)
SEGMENT_HEADER = (
    "magic:I version:H header_bytes:H group_id:16s store_id:16s segment:I flags:I lease:Q"
    " wall_ns:Q after:[position] stream_id:16s reserved:28s checksum:I"
)
FOLD = (
    "magic:I version:H block_bytes:H segment:I generation:I flags:I reserved0:I"
    " horizon:[position] end:[position] input_bytes:Q input_records:Q tally:128s"
    " reserved1:52s checksum:I"
)
TALLY_STATE = (
    "sums:8I bits_low:I bits_high:I pending:64s pending_bytes:I reserved:I records:Q first_seq:Q"
)
COMMIT = (
    "magic:I version:H block_bytes:H segment:I number:I start:Q end:Q digest:16s last:[position]"
    " durable:[position] group_id:16s wall_ns:Q records:I reserved:16s checksum:I"
)
INDEX_ENTRY = (
    "offset:Q seq:Q length:I epoch:I segment:I position:I disk:H piece:H kind:B flags:B stream:H"
)
INDEX_STREAM = "stream_id:16s epoch_id:16s epoch:I key_generation:I first_seq:Q reserved:16s"
INDEX_EVENT = "at:[position] wall_ns:Q segment:I position:I kind:B reserved0:B stream:H reserved1:I"
INDEX_TIME = "wall_ns:Q at:[position]"
INDEX_NODE = (
    "offset:Q end:Q seq_low:Q seq_high:Q epoch_low:I epoch_high:I disk_first:H disk_last:H"
    " checksum:I"
)
INDEX_TRAILER = (
    "magic:I version:H trailer_bytes:H segment:I level:I short_at:Q short_count:Q long_at:Q"
    " long_count:Q streams_at:Q streams_count:Q events_at:Q events_count:Q times_at:Q"
    " times_count:Q first:[position] last:[position] data_bytes:Q segment_bytes:Q wall_first_ns:Q"
    " wall_last_ns:Q group_id:16s short_digest:16s rest_digest:16s nodes_at:Q nodes_count:Q"
    " long_root:I short_root:I streams_checksum:I events_checksum:I aged_ns:Q"
    " reserved:4s checksum:I"
)
MANIFEST_HEADER = (
    "magic:I version:H header_bytes:H number:Q lease:Q group_id:16s store_id:16s wall_ns:Q"
    " epochs:I segments:I runs:I disks:I key_bytes:I body_bytes:I next_segment:I flags:I"
    " active_segment:I reserved0:I group_name:64s digest:16s horizon:[position]"
    " window_s:Q quota_bytes:Q received_bytes:Q folded_bytes:Q aged_ns:Q"
    " boot_ns:Q boot:I checksum:I"
)
MANIFEST_EPOCH = "epoch:I state:I epoch_id:16s writer:16s parent:[position] wall_ns:Q"
MANIFEST_SEGMENT = (
    "segment:I generation:I file_bytes:Q data_end:Q first:[position] last:[position] records:Q"
    " data_bytes:Q index_digest:16s"
)
MANIFEST_RUN = (
    "run:I level:I first_segment:I last_segment:I file_bytes:Q index_digest:16s reserved:Q"
)
MANIFEST_DISK = "name:64s bytes:Q index:I flags:I"
PRESENCE_HEADER = (
    "magic:Q version:I block_bytes:I disk_bytes:Q words:Q view_id:16s boot_id:16s distrust:I "
    "reserved0:4024s checksum:I"
)
VERDICT_HEADER = (
    "magic:I version:H header_bytes:H group_id:16s store_id:16s at:[position] wall_ns:Q"
    " body_bytes:I signature_bytes:I digest:16s reserved:36s checksum:I"
)
LOST_HEADER = (
    "magic:I version:H flags:H group_id:16s store_id:16s at:[position] ranges:I reserved0:I "
    "digest:16s reserved:44s checksum:I"
)
LOST_RANGE = "offset:Q length:Q disk:I reserved:I"

INNER = {
    "position": POSITION,
    "map_generation": MAP_GENERATION,
    "map_disk": MAP_DISK,
    "state_disk": STATE_DISK,
    "registration": REGISTRATION,
}


def size_of(spec: str) -> int:
    return read(spec, None, 0)[1]


def read(spec: str, data: bytes | None, at: int) -> tuple[Fields, int]:
    """The fields of a struct at ``at``, and where it ends. Without data: only the end."""
    out: Fields = {}
    for token in spec.split():
        name, form = token.split(":")
        count, inner = form.partition("[")[::2]
        if inner:
            items = []
            for _ in range(int(count or 1)):
                item, at = read(INNER[inner[:-1]], data, at)
                items.append(item)
            out[name] = items if count else items[0]
            continue
        size = struct.calcsize("<" + form)
        if data is not None:
            expect(at + size <= len(data), f"the bytes end inside {name}")
            values = struct.unpack_from("<" + form, data, at)
            out[name] = values[0] if len(values) == 1 else list(values)
            if name.startswith(("reserved", "pad")):
                expect(not any(data[at : at + size]), f"{name} is not zero")
        at += size
    return out, at


def headed(
    spec: str, data: bytes, at: int, magic: bytes, what: str, newest: int = 1
) -> tuple[Fields, int]:
    """A struct with magic, version up to `newest` and a checksum of the bytes before it."""
    fields, end = read(spec, data, at)
    expect(fields["magic"] == int.from_bytes(magic, "little"), f"{what}: magic")
    offset = size_of(spec[: spec.index(" checksum:")])
    expect(fields["checksum"] == checksum32(data[at : at + offset]), f"{what}: checksum")
    expect(1 <= fields["version"] <= newest, f"{what}: version")
    return fields, end


# ---- records --------------------------------------------------------------------

KINDS = {
    1: "write", 2: "zeroes", 3: "resize", 4: "sync", 5: "sync-zeroes", 6: "mark",
    7: "gap-begin", 8: "gap-end", 9: "object", 10: "stream", 11: "tally",
}  # fmt: skip
FUA, REPLAY, HASHED, JUMP = 1, 2, 4, 8
ZSTD, HASH_INDEX, TALLY_INDEX = 0x01000000, 0x80000000, 0x80000001
PIECE = 128 << 10


def stream_key(data_key: bytes, stream_id: bytes) -> bytes:
    info = b"vrep stream v1" + stream_id
    return HKDF(hashes.SHA256(), 32, None, info).derive(data_key)


def covered_blocks(offset: int, length: int) -> int:
    return max(0, (offset + length) // 4096 - -(-offset // 4096))


def parse_header(data: bytes, at: int) -> Fields:
    header, _ = headed(RECORD, data, at, b"VEPR", "record")
    kind = KINDS.get(header["kind"])
    expect(kind is not None, "record: kind")
    header["name"] = kind
    length, offset = header["length"], header["offset"]
    limits = {
        "write": (1, 32 << 20), "sync": (1, 32 << 20), "zeroes": (1, 2**32 - 1),
        "sync-zeroes": (1, 2**32 - 1), "mark": (16, 1327), "object": (17, 8 << 20),
        "stream": (128, 128), "tally": (64, 64),
    }  # fmt: skip
    low, high = limits.get(kind, (0, 0))
    expect(low <= length <= high, "record: length")
    allowed = {
        "write": FUA | REPLAY | HASHED, "sync": FUA | REPLAY | HASHED, "zeroes": FUA | REPLAY,
        "sync-zeroes": FUA | REPLAY, "gap-begin": JUMP,
    }.get(kind, 0)  # fmt: skip
    expect(header["flags"] & ~allowed == 0, "record: flags")
    expect(header["seq"] > 0 or kind in ("stream", "tally"), "record: seq")
    if kind in ("write", "sync", "zeroes", "sync-zeroes", "resize"):
        expect(header["disk"] < 64 and offset + length < 1 << 63, "record: range")
    else:
        expect(header["disk"] == 0 and (offset == 0 or kind == "object"), "record: range")
    if kind == "resize":
        expect(offset > 0 and offset % 512 == 0, "record: size of the disk")
    pieces = 0
    if kind in ("write", "sync", "mark", "object", "tally"):
        pieces = -(-length // PIECE)
    if header["flags"] & HASHED:
        expect(covered_blocks(offset, length) > 0, "record: hashes of no block")
        pieces += 1
    expect(header["pieces"] == pieces, "record: pieces")
    return header


def parse_records(
    data: bytes, keys: dict[bytes, bytes] | None = None, *, folded: bool = False
) -> Iterator[Fields]:
    """Every record of ``data``; opened when ``keys`` holds the key of its stream. What a fold
    left has holes, and no tally."""
    at, stream_id, count, first_seq = 0, b"", 0, 0
    running = hashlib.sha256()
    last: dict[int, tuple[int, int]] = {}
    while at < len(data):
        header = parse_header(data, at)
        body = data[at + 64 : at + 64 + header["body_bytes"]]
        expect(len(body) == header["body_bytes"], "record: torn")
        kind, lane, seq = header["name"], header["lane"], header["seq"]
        out: Fields = {"header": header, "at": at}
        if kind == "stream":
            expect(len(body) == 128, "stream: size")
            out["stream"], _ = read(STREAM, body, 0)
            expect(out["stream"]["checksum"] == checksum32(body[:124]), "stream: checksum")
            expect(out["stream"]["resume_seq"] == seq, "stream: resume_seq")
            expect(out["stream"]["epoch"] == header["epoch"], "stream: epoch")
            stream_id, count, running = out["stream"]["stream_id"], 0, hashlib.sha256()
            expect(folded or lane not in last or (header["epoch"], seq) == last[lane]
                   or header["epoch"] > last[lane][0], "stream: order")  # fmt: skip
        elif folded:
            expect(kind != "tally" and (header["epoch"], seq) > last.get(lane, (0, 0)), "folded")
        elif lane in last:
            epoch, before = last[lane]
            jumps = kind == "gap-begin" and header["flags"] & JUMP
            expect(header["epoch"] == epoch, "order: epoch")
            expect(
                seq == before if kind == "tally" else seq > before if jumps else seq == before + 1,
                "order: seq",
            )
        last[lane] = (header["epoch"], seq)
        tags, stored = split_pieces(header, body)
        if kind not in ("stream", "tally"):
            running.update(data[at : at + 64] + b"".join(tags))
            first_seq = seq if count == 0 else first_seq
            count += 1
        if keys is not None and stored:
            open_pieces(out, data[at : at + 64], stored, keys[stream_id])
        if "tally" in out:
            want = (running.digest(), stream_id, count, first_seq)
            got = tuple(out["tally"][name] for name in TALLY_NAMES)
            expect(got == want, "tally: records are missing")
        yield out
        at += 64 + len(body)


TALLY_NAMES = ("running", "stream_id", "records", "first_seq")


def split_pieces(header: Fields, body: bytes) -> tuple[list[bytes], list[tuple[int, int, bytes]]]:
    """Tags, and (index, word, stored bytes) of each piece."""
    tags, stored, at = [], [], 4 * header["pieces"]
    for i in range(header["pieces"]):
        (word,) = struct.unpack_from("<I", body, 4 * i)
        size, flags = word & 0xFFFFFF, word & ~0xFFFFFF
        index, plain = i, min(PIECE, header["length"] - i * PIECE)
        if header["flags"] & HASHED and i == header["pieces"] - 1:
            index, plain = HASH_INDEX, 16 * covered_blocks(header["offset"], header["length"])
        if header["name"] == "tally":
            index = TALLY_INDEX
        if flags == ZSTD:
            expect(header["name"] in ("write", "sync", "object"), "piece: compressed")
            expect(index != HASH_INDEX and 16 < size < plain + 16, "piece: compressed length")
        else:
            expect(flags == 0 and size == plain + 16, "piece: length")
        part = body[at : at + size]
        expect(len(part) == size, "piece: outside the body")
        tags.append(part[-16:])
        stored.append((index, word, part))
        at += size
    if header["pieces"]:
        expect(at == len(body), "record: body_bytes")
    return tags, stored


def open_pieces(
    out: Fields, header: bytes, stored: list[tuple[int, int, bytes]], key: bytes
) -> None:
    plain, kind, seq = b"", out["header"]["name"], out["header"]["seq"]
    for index, word, part in stored:
        nonce = struct.pack("<QI", seq, index)
        content = AESGCM(key).decrypt(nonce, part, header + struct.pack("<II", word, index))
        if word & ZSTD:
            content = zstandard.ZstdDecompressor().decompress(content, max_output_size=PIECE)
        if index == HASH_INDEX:
            out["hashes"] = [content[i : i + 16] for i in range(0, len(content), 16)]
        else:
            plain += content
    expect(len(plain) == out["header"]["length"], "record: plaintext length")
    out["plain"] = plain
    if kind == "tally":
        out["tally"], _ = read(TALLY, plain, 0)
    elif kind == "mark":
        out["mark"], end = read(MARK, plain, 0)
        version = out["mark"]["version"]
        expect(version in (1, 2) and out["mark"]["flags"] == 0, "mark: version, flags")
        if version == 2:
            out["cut"], end = read(CUT, plain, end)
            expect(out["cut"]["lanes"] <= 64, "cut: lanes")
            expect(not any(out["cut"]["reserved"]), "cut: reserved")
            out["at"] = []
            for _lane in range(out["cut"]["lanes"]):
                lane, end = read(POSITION, plain, end)
                out["at"].append(lane)
            numbers = [lane["lane"] for lane in out["at"]]
            expect(numbers == sorted(set(numbers)), "cut: order of lanes")
        expect(out["mark"]["label_bytes"] == len(plain) - end, "mark: label")
        out["label"] = plain[end:].decode()
    elif kind == "object":
        out["object"], end = read(OBJECT, plain, 0)
        expect(out["object"]["version"] == 1 and out["object"]["flags"] == 0, "object: version")
        size = out["object"]["name_bytes"]
        expect(1 <= size <= 255 and end + size <= len(plain), "object: name")
        out["label"], out["blob"] = plain[end : end + size].decode(), plain[end + size :]


# ---- shared memory and state ------------------------------------------------------


def parse_ring(data: bytes) -> Fields:
    header, end = headed(RING_HEADER, data, 0, b"VREPRING", "ring")
    expect(end == header["header_bytes"] == 4096, "ring: header")
    expect(header["file_bytes"] == len(data), "ring: size")
    count = header["descriptors"]
    expect(count > 0 and count & (count - 1) == 0, "ring: descriptors")
    regions = (
        ("slots", "slots_at", RING_SLOT, header["slots"]),
        ("descs", "descs_at", RING_DESC, header["descriptors"]),
        ("next", "next_at", "value:I", header["chunks"]),
    )
    out: Fields = {"header": header}
    at = 4096
    for name, place, spec, number in regions:
        expect(header[place] >= at, f"ring: {name} overlap")
        at = header[place]
        out[name] = []
        for _ in range(number):
            item, at = read(spec, data, at)
            out[name].append(item)
    expect(header["chunks_at"] >= at, "ring: chunks overlap")
    expect(header["chunks_at"] + header["chunks"] * header["chunk_bytes"] <= len(data), "ring: end")
    expect(header["first_seq"] <= header["released"] <= header["head"], "ring: released, head")
    return out


def parse_control(data: bytes) -> Fields:
    control, end = read(RING_CONTROL, data, 0)
    expect(
        control["magic"] == int.from_bytes(b"VREPRCTL", "little") and control["version"] == 1,
        "control: magic",
    )
    expect(control["role"] in (1, 2) and end == len(data) == 4096, "control: role, size")
    return control


def set_bits(data: bytes, at: int, words: int) -> list[int]:
    value = int.from_bytes(data[at : at + 8 * words], "little")
    return [bit for bit in range(value.bit_length()) if value >> bit & 1]


def parse_map(data: bytes) -> Fields:
    header, end = headed(MAP_HEADER, data, 0, b"\0VREPMAP", "map")
    expect(end == header["header_bytes"] == 4096, "map: header")
    expect(header["file_bytes"] == len(data), "map: size")
    expect(0 < header["disks"] <= 64, "map: disks")
    expect(header["open_generation"] < 4, "map: generation")
    out: Fields = {"header": header, "bitmaps": []}
    for disk in header["disk"][: header["disks"]]:
        expect(disk["bits"] == -(-disk["bytes"] // header["bit_bytes"]), "map: bits")
        expect(disk["words"] * 64 >= disk["bits"], "map: words")
        expect(disk["bitmaps_at"] + 5 * 8 * disk["words"] <= len(data), "map: bitmaps")
        out["bitmaps"].append(
            [set_bits(data, disk["bitmaps_at"] + i * 8 * disk["words"], disk["words"])
             for i in range(5)]
        )  # fmt: skip
    return out


def parse_checkpoint(data: bytes) -> Fields:
    header, at = headed(CHECKPOINT_HEADER, data, 0, b"VREPCKPT", "checkpoint")
    expect(0 < header["disks"] <= 64, "checkpoint: disks")
    words = header["words"][: header["disks"]]
    expect(at + 8 * sum(words) <= len(data), "checkpoint: torn")
    expect(digest(data[at : at + 8 * sum(words)]) == header["digest"], "checkpoint: digest")
    out: Fields = {"header": header, "bitmaps": []}
    for count in words:
        out["bitmaps"].append(set_bits(data, at, count))
        at += 8 * count
    return out


def newest(slots: list[Fields]) -> Fields:
    expect(bool(slots), "no slot is whole")
    return max(slots, key=lambda slot: int(slot["header"]["counter"]))


def parse_intent(data: bytes) -> Fields:
    slots, slot_bytes = [], len(data) // 2
    for at in (0, slot_bytes):
        try:
            header, end = headed(INTENT_HEADER, data, at, b"\0VREPINT", "intent")
            expect(header["slot_bytes"] == slot_bytes, "intent: slot_bytes")
            expect(128 + 8 * header["words"] <= slot_bytes, "intent: words")
            bitmap = data[end : end + 8 * header["words"]]
            expect(digest(bitmap) == header["digest"], "intent: digest")
        except BadFormat:
            continue
        slots.append({"header": header, "extents": set_bits(bitmap, 0, header["words"])})
    return newest(slots)


def parse_state(data: bytes) -> Fields:
    slots = []
    for at in range(0, len(data), 8192):
        try:
            header, _ = headed(STATE, data, at, b"\0\0VREPST", "state")
            expect(header["flags"] & ~0x1FF == 0 and header["disks"] <= 64, "state: flags, disks")
        except BadFormat:
            continue
        slots.append({"header": header})
    return newest(slots)


def parse_reservations(data: bytes) -> Fields:
    slots = []
    for at in range(0, len(data), 24576):
        try:
            header, _ = headed(RESERVATIONS, data, at, b"\0\0VREPRS", "reservations")
            expect(header["flags"] == 0 and header["count"] <= 64, "reservations: flags, count")
            expect(header["type"] in (0, 1, 3, 5, 6, 7, 8), "reservations: type")
            expect(header["holder"] < max(header["count"], 1), "reservations: holder")
        except BadFormat:
            continue
        slots.append({"header": header, "list": header["list"][: header["count"]]})
    return newest(slots)


# ---- store ----------------------------------------------------------------------


def parse_segment(data: bytes, keys: dict[bytes, bytes] | None = None) -> Fields:
    header, at = headed(SEGMENT_HEADER, data, 0, b"VSEG", "segment", newest=2)
    expect(header["header_bytes"] == 128, "segment: header")
    expect(header["flags"] == (header["version"] == 2), "segment: flags")
    out: Fields = {"header": header, "commits": [], "records": [], "fold": None}
    if header["flags"]:
        out["fold"], at = parse_fold(data, at, header)
    while at + 128 <= len(data):
        place = at
        while data[place : place + 4] == b"VEPR":
            record = parse_header(data, place)
            place += 64 + record["body_bytes"]
        end, place = place, -(-place // 64) * 64
        expect(not any(data[end:place]), "segment: padding")
        commit, after = headed(COMMIT, data, place, b"VCMT", "commit")
        expect(commit["block_bytes"] == 128, "commit: size")
        expect((commit["start"], commit["end"]) == (at, end), "commit: range")
        expect(commit["segment"] == header["segment"], "commit: segment")
        expect(commit["group_id"] == header["group_id"], "commit: group")
        expect(commit["number"] == len(out["commits"]) + 1, "commit: number")
        expect(commit["digest"] == digest(data[at:place]), "commit: digest")
        folded = out["fold"] is not None
        records = list(parse_records(data[at:end], keys, folded=folded))
        expect(len(records) == commit["records"], "commit: records")
        out["commits"].append(commit)
        out["records"] += records
        at = after
    return out


def parse_fold(data: bytes, at: int, header: Fields) -> tuple[Fields, int]:
    """The block behind the header of a folded segment."""
    fold, after = headed(FOLD, data, at, b"VFLD", "fold")
    expect(fold["block_bytes"] == 256, "fold: size")
    expect(fold["segment"] == header["segment"] and fold["generation"] > 0, "fold: segment")
    expect(fold["flags"] & ~1 == 0 and not any(fold["reserved1"]), "fold: flags")
    state, _ = read(TALLY_STATE, fold["tally"], 0)
    if fold["flags"]:
        expect(state["pending_bytes"] < 64 and state["reserved"] == 0, "fold: tally")
        expect(state["bits_low"] % 512 == 8 * state["pending_bytes"], "fold: tally")
    else:
        expect(not any(fold["tally"]), "fold: tally")
    return {**fold, "tally": state}, after


def parse_index(data: bytes) -> Fields:
    at = len(data) - size_of(INDEX_TRAILER)
    trailer, _ = headed(INDEX_TRAILER, data, at, b"VIDX", "index")
    expect(trailer["trailer_bytes"] == 256, "index: trailer")
    out: Fields = {"trailer": trailer}
    tables = (
        ("short", INDEX_ENTRY), ("long", INDEX_ENTRY), ("streams", INDEX_STREAM),
        ("events", INDEX_EVENT), ("times", INDEX_TIME), ("nodes", INDEX_NODE),
    )  # fmt: skip
    before, raw = 0, {}
    for name, spec in tables:
        place, count = trailer[f"{name}_at"], trailer[f"{name}_count"]
        end = place + count * size_of(spec)
        expect(place % 64 == 0 and before <= place and end <= at, f"index: {name}")
        raw[name] = data[place:end]
        out[name] = [read(spec, data, place + i * size_of(spec))[0] for i in range(count)]
        before = end
    expect(digest(raw["short"]) == trailer["short_digest"], "index: digest of entries")
    rest = b"".join(raw[name] for name in ("long", "streams", "events", "times"))
    expect(digest(rest) == trailer["rest_digest"], "index: digest of the rest")
    for name in ("short", "long"):
        order = [
            (entry["disk"], entry["offset"], -entry["epoch"], -entry["seq"]) for entry in out[name]
        ]
        expect(order == sorted(order), f"index: order of {name}")
        for entry in out[name]:
            expect(entry["flags"] == 0 and entry["stream"] < len(out["streams"]), "index: entry")
            expect((entry["length"] <= PIECE) == (name == "short"), "index: length")
    expect(checksum32(raw["streams"]) == trailer["streams_checksum"], "index: streams")
    events = int.from_bytes(digest(raw["events"])[:4], "little")
    expect(events == trailer["events_checksum"], "index: events")
    nodes, after = out["nodes"], 0
    for name in ("long", "short"):
        after = check_tree(out[name], raw[name], 40, nodes, raw["nodes"], after)
        root = checksum32(raw["nodes"][48 * (after - 1) : 48 * after]) if out[name] else 0
        expect(trailer[f"{name}_root"] == root, f"index: root of {name}")
    expect(after == len(nodes), "index: nodes")
    return out


def check_tree(
    below: list[Fields], raw: bytes, size: int, nodes: list[Fields], raw_nodes: bytes, at: int
) -> int:
    """Every level of nodes over some entries, from node ``at`` on; returns where the tree ends."""
    while below:
        count = -(-len(below) // 64)
        expect(at + count <= len(nodes), "index: too few nodes")
        for i in range(count):
            some, node = below[64 * i : 64 * i + 64], nodes[at + i]
            lows = [
                (e.get("epoch_low", e.get("epoch")), e.get("seq_low", e.get("seq"))) for e in some
            ]
            highs = [
                (e.get("epoch_high", e.get("epoch")), e.get("seq_high", e.get("seq"))) for e in some
            ]
            ends = [e["end"] if "end" in e else e["offset"] + e["length"] for e in some]
            disks = [e.get("disk_first", e.get("disk")) for e in some[:1]]
            disks += [e.get("disk_last", e.get("disk")) for e in some[-1:]]
            expect((node["offset"], node["end"]) == (some[0]["offset"], max(ends)), "node: range")
            expect((node["epoch_low"], node["seq_low"]) == min(lows), "node: oldest")
            expect((node["epoch_high"], node["seq_high"]) == max(highs), "node: newest")
            expect([node["disk_first"], node["disk_last"]] == disks, "node: disks")
            part = raw[64 * size * i : 64 * size * (i + 1)]
            expect(node["checksum"] == checksum32(part), "node: checksum")
        below, raw, size = nodes[at : at + count], raw_nodes[48 * at : 48 * (at + count)], 48
        at += count
        if count == 1:
            break
    return at


def parse_manifest(data: bytes) -> Fields:
    header, at = headed(MANIFEST_HEADER, data, 0, b"VMAN", "manifest", newest=2)
    if header["version"] == 1:
        expect(not any(data[184:252]), "manifest: version 1")
    expect(
        (header["horizon"]["seq"] == 0) == (header["horizon"]["epoch"] == 0), "manifest: horizon"
    )
    expect(header["header_bytes"] == 256, "manifest: header")
    expect(len(data) == 256 + header["body_bytes"], "manifest: size")
    expect(digest(data[256:]) == header["digest"], "manifest: digest")
    out: Fields = {"header": header, "name": header["group_name"].rstrip(b"\0").decode()}
    tables = (
        ("epochs", MANIFEST_EPOCH), ("segments", MANIFEST_SEGMENT), ("runs", MANIFEST_RUN),
        ("disks", MANIFEST_DISK),
    )  # fmt: skip
    for name, spec in tables:
        out[name] = []
        for _ in range(header[name]):
            item, at = read(spec, data, at)
            out[name].append(item)
    expect(
        header["version"] > 1 or all(s["generation"] == 0 for s in out["segments"]),
        "manifest: generation",
    )
    out["keys"] = data[at : at + header["key_bytes"]]
    expect(at + header["key_bytes"] == len(data), "manifest: keys")
    return out


def parse_presence(data: bytes) -> Fields:
    header, at = headed(PRESENCE_HEADER, data, 0, b"\0\0\0VPRES", "presence")
    blocks = -(-header["disk_bytes"] // header["block_bytes"])
    expect(header["words"] * 64 >= blocks, "presence: words")
    expect(at == 4096 and at + 8 * header["words"] <= len(data), "presence: size")
    return {"header": header, "blocks": set_bits(data, at, header["words"])}


def parse_shipped(data: bytes) -> Fields:
    at = data.rfind(b',"checksum":')
    expect(at > 0, "shipped: checksum")
    expect(data[at:] == b',"checksum":%d}' % checksum32(data[:at] + b"}"), "shipped: checksum")
    got: Fields = json.loads(data)
    members = ["version", "epoch", "epoch_id", "seq", "checksum"]
    expect(list(got) == members and got["version"] == 2, "shipped: members")
    expect(got["epoch"] > 0 and len(bytes.fromhex(got["epoch_id"])) == 16, "shipped: epoch")
    expect(0 <= got["seq"] < 1 << 63, "shipped: seq")
    return got


def parse_lost(data: bytes) -> Fields:
    header, at = headed(LOST_HEADER, data, 0, b"VLST", "lost")
    expect(at == 128 and header["flags"] in (0, 1), "lost: header")
    expect(header["ranges"] <= (0 if header["flags"] else 1024), "lost: ranges")
    expect(digest(data[at:]) == header["digest"], "lost: digest")
    ranges = []
    for _ in range(header["ranges"]):
        row, at = read(LOST_RANGE, data, at)
        ranges.append((row["disk"], row["offset"], row["length"]))
        expect(row["length"] > 0 and row["reserved"] == 0, "lost: range")
    expect(at == len(data), "lost: size")
    for (disk, offset, length), (next_disk, next_offset, _) in pairwise(ranges):
        expect((disk, offset + length) < (next_disk, next_offset), "lost: order")
    return {"header": header, "ranges": ranges}


def parse_verdict(data: bytes, key: ec.EllipticCurvePublicKey) -> Fields:
    header, at = headed(VERDICT_HEADER, data, 0, b"VVRD", "verdict")
    expect(header["header_bytes"] == at == 128, "verdict: header")
    expect(header["signature_bytes"] == 64, "verdict: signature's size")
    end = at + header["body_bytes"]
    expect(end + 64 == len(data), "verdict: size")
    expect(digest(data[at:end]) == header["digest"], "verdict: digest")
    r, s = (int.from_bytes(data[end + i : end + i + 32], "big") for i in (0, 32))
    try:
        key.verify(
            encode_dss_signature(r, s),
            b"vrep verdict v1\0" + data[:end],
            ec.ECDSA(hashes.SHA256()),
        )
    except InvalidSignature:
        raise BadFormat("verdict: signature") from None
    return {"header": header, "body": json.loads(data[at:end])}
