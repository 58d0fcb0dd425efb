"""Wire frames: whatever a peer sends, a Connection answers with events or with
ProtocolError or VersionError, and its bounds hold.

The first byte of an input says which end listens and how the rest is read: raw
bytes of the stream, or a list of frames whose checksum and sequence the target
sets right, so that the code behind them is reached: type, flags, channel, two
bytes of length, payload. With VREP_FUZZ_CANARY=1 records other
than those of the seeds are taken for a fault: the fuzzer must find it, behind greeting,
group and stream. `--seeds` writes the seeds.
"""

from __future__ import annotations

import contextlib
import os
import struct
import sys
from pathlib import Path

import atheris
import xxhash

# The finder of an editable install brings a loader that atheris cannot instrument: without
# coverage nothing is ever found. The wire needs no native module, so plain files do.
sys.meta_path[:] = [
    finder for finder in sys.meta_path if "Redirecting" not in type(finder).__name__
]
sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

with atheris.instrument_imports(include=["vrep.wire"]):
    from vrep.errors import ProtocolError, StateError, VersionError
    from vrep.wire import messages as m
    from vrep.wire import protocol
    from vrep.wire.frames import FrameHeader, FrameType

CANARY = os.environ.get("VREP_FUZZ_CANARY") == "1"
WINDOW = 1 << 16
SEED_RECORDS = b"records"
SITE = "0123456789abcdef" * 2


def must(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def unchecked(kind: int, flags: int, length: int, channel: int, sequence: int) -> bytes:
    """A header with the right checksum, whatever its fields are."""
    fields = struct.pack("<IBBHIIQ", 0x46575256, 1, kind, flags, length, channel, sequence)
    return fields + struct.pack("<Q", xxhash.xxh3_64_intdigest(fields))


def frames(data: bytes) -> list[bytes]:
    """The input as whole frames."""
    out, at = [], 0
    while at + 5 <= len(data):
        kind, flags, channel, length = struct.unpack_from("<BBBH", data, at)
        payload = data[at + 5 : at + 5 + length]
        at += 5 + length
        out.append(unchecked(kind, flags, len(payload), channel, len(out)) + payload)
    return out


def answer(connection: protocol.Connection, event: protocol.Event) -> None:
    """What an owner says, so that the conversation goes on."""
    message = event.message
    # The peer may have ended what would be answered: the owner is told, no more.
    with contextlib.suppress(StateError):
        match message:
            case m.Hello():
                version = connection.offered_version
                connection.send(m.Welcome(version=version, site_id=SITE, name="b"))
            case m.OpenGroup():
                zero = m.Position(epoch=1, seq=0)
                lanes = [
                    m.LaneState(durable=m.Position(epoch=1, lane=lane.lane, seq=0), received=zero)
                    for lane in message.lanes
                ]
                epoch = m.EpochInfo(counter=1, id=bytes(16))
                connection.send(
                    m.GroupOpened(epoch=epoch, lanes=lanes, credit_bytes=WINDOW, empty=True),
                    event.channel,
                )
            case m.Request():
                connection.send(m.Response(id=message.id, result=1))
            case m.Data():
                must(connection.held(event.channel) <= WINDOW, "more is held than was granted")
                if CANARY and message.payload != SEED_RECORDS:
                    raise RuntimeError("fuzz canary found")
                connection.release(event.channel, len(message.payload))
            case m.GroupOpened():
                connection.send(
                    m.StreamStart(stream_id=bytes(16), key_generation=1, resume_seq=0),
                    event.channel,
                )


def client() -> protocol.Connection:
    """A client that has said what it may: it waits for all kinds of answers."""
    connection = protocol.Connection(protocol.Role.CLIENT)
    connection.send(m.Hello(min_version=1, max_version=1, site_id=SITE, name="a"))
    return connection


def ask(connection: protocol.Connection) -> None:
    with contextlib.suppress(StateError):
        connection.send(m.Request(id=1, method="x"))
        connection.send(m.Ping(id=1, time_ns=0))
        connection.send(
            m.OpenGroup(
                group_id=bytes(16),
                name="g",
                epoch=m.EpochInfo(counter=1, id=bytes(16)),
                disks=[m.DiskInfo(index=0, name="d", size=1)],
                lanes=[m.LaneOffer(durable_seq=0, oldest_seq=1, newest_seq=0)],
                wrapped_keys=[],
            ),
            1,
        )


def one_input(data: bytes) -> None:
    if not data:
        return
    mode, rest = data[0], data[1:]
    listening = (
        client() if mode & 1 else protocol.Connection(protocol.Role.SERVER, known=not mode & 4)
    )
    pieces = frames(rest) if mode & 2 else [rest[at : at + 7] for at in range(0, len(rest), 7)]
    heard = 0
    try:
        for piece in pieces:
            for event in listening.feed(piece):
                heard += 1
                answer(listening, event)
                if isinstance(event.message, m.Welcome):
                    ask(listening)
    except (ProtocolError, VersionError) as error:
        must(bool(error.detail), "an error without words")
    must(len(listening.channels()) <= protocol.CHANNELS_MAX, "too many channels")
    must(heard <= len(pieces), "more events than frames")


def seeds() -> dict[str, bytes]:
    """Lawful conversations, in both ways of reading."""

    def structured(mode: int, *said: tuple[m.Message | bytes, int]) -> bytes:
        out = bytes([mode])
        for message, channel in said:
            raw = isinstance(message, bytes)
            payload = message if raw else m.encode_message(message)
            kind = FrameType.DATA if raw else m.frame_type(message)
            out += struct.pack("<BBBH", kind, 0, channel, len(payload)) + payload
        return out

    zero = m.Position(epoch=1, seq=0)
    epoch = m.EpochInfo(counter=1, id=bytes(16), parent=zero, parent_id=bytes(16))
    hello = m.Hello(min_version=1, max_version=2, site_id=SITE, name="a", features=["x"])
    group = m.OpenGroup(
        group_id=bytes(16),
        name="g",
        epoch=epoch,
        disks=[m.DiskInfo(index=0, name="d", size=1)],
        lanes=[m.LaneOffer(durable_seq=0, oldest_seq=1, newest_seq=0)],
        wrapped_keys=[b"w"],
    )
    stream = m.StreamStart(stream_id=bytes(16), key_generation=1, resume_seq=0)
    source = structured(
        2,
        (hello, 0),
        (group, 1),
        (stream, 1),
        (SEED_RECORDS, 1),
        (m.Request(id=1, method="points.list", params={"a": [1, None, b"x"]}), 0),
        (m.Ping(id=1, time_ns=1), 0),
        (m.Status(time_ns=1, state="x", values={"lag": 1}), 1),
        (m.Bye(), 1),
        (m.Bye(), 0),
    )
    lane = m.LaneState(durable=zero, received=zero)
    target = structured(
        3,
        (m.Welcome(version=1, site_id=SITE, name="b"), 0),
        (m.GroupOpened(epoch=epoch, lanes=[lane], credit_bytes=9, empty=True), 1),
        (m.Ack(received_seq=2, durable_seq=1, credit_bytes=10, conditions=["full"]), 1),
        (m.Response(id=1, result={"a": 1.5}), 0),
        (m.Pong(id=1, ping_time_ns=0, time_ns=1), 0),
        (m.Refused(code="fenced", text="t", epoch=epoch), 1),
        (m.Error(code="x", text="t"), 0),
    )
    stranger = structured(
        6,
        (hello, 0),
        (m.Join(secret=bytes(16), site_id=SITE, name="a", certificate="c", address="h:1"), 0),
    )
    payload = m.encode_message(hello)
    header = FrameHeader(1, FrameType.HELLO, 0, len(payload), 0, 0)
    raw = bytes([0]) + protocol.encode_header(header) + payload
    return {"source": source, "target": target, "stranger": stranger, "raw": raw}


if __name__ == "__main__" and sys.argv[1:] == ["--seeds"]:
    corpus = Path(__file__).parent / "corpus" / "wire"
    corpus.mkdir(parents=True, exist_ok=True)
    for name, content in seeds().items():
        (corpus / name).write_bytes(content)
elif __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
