"""One sample of each message at least, with every field set, and the files that pin
their bytes. Run as a program it writes the missing files; it never changes one
that is there: a changed encoding is a new protocol version."""

from __future__ import annotations

from pathlib import Path

from vrep.wire import messages as m
from vrep.wire.frames import FrameFlag, FrameHeader, FrameType, encode_header

DIRECTORY = Path(__file__).parent / "wire"
_ID = bytes(range(16))
_SITE = "00112233445566778899aabbccddeeff"
_POSITION = m.Position(epoch=2, lane=1, seq=0x1122334455667788)
_POINTS = m.Points(
    oldest=m.Point(position=m.Position(epoch=1, seq=9), time_ns=1_767_225_600_000_000_000),
    newest=m.Point(position=_POSITION),
)
_EPOCH = m.EpochInfo(counter=3, id=_ID, parent=_POSITION, parent_id=bytes(range(16, 32)))

MESSAGES: dict[str, tuple[int, m.Message]] = {
    "hello": (
        0,
        m.Hello(
            min_version=1,
            max_version=1,
            site_id=_SITE,
            name="site-a",
            software="vrep 0.1.0",
            features=["records"],
        ),
    ),
    "welcome": (
        0,
        m.Welcome(
            version=1, site_id=_SITE, name="site-b", software="vrep 0.1.0", features=["records"]
        ),
    ),
    "join": (
        0,
        m.Join(
            secret=_ID,
            site_id=_SITE,
            name="site-a",
            certificate="-----BEGIN CERTIFICATE-----\n",
            address="[2001:db8::1]:7001",
        ),
    ),
    "joined": (0, m.Joined(site_id=_SITE, name="site-b", address="b.example:7001")),
    "open_group": (
        1,
        m.OpenGroup(
            group_id=_ID,
            name="shop",
            epoch=_EPOCH,
            disks=[m.DiskInfo(index=0, name="root", size=1 << 40)],
            lanes=[m.LaneOffer(lane=1, durable_seq=7, oldest_seq=8, newest_seq=300)],
            wrapped_keys=[b"\x01\x02\x03"],
            window="24h",
            quota=500 << 30,
        ),
    ),
    "group_opened": (
        1,
        m.GroupOpened(
            epoch=_EPOCH,
            lanes=[m.LaneState(durable=_POSITION, received=_POSITION)],
            credit_bytes=64 << 20,
            empty=False,
            conditions=["target-full"],
        ),
    ),
    "refused": (1, m.Refused(code="fenced", text="a newer epoch rules", epoch=_EPOCH)),
    "stream_start": (1, m.StreamStart(stream_id=_ID, key_generation=1, lane=1, resume_seq=300)),
    "ack": (
        1,
        m.Ack(
            lane=1,
            received_seq=400,
            durable_seq=399,
            credit_bytes=(64 << 20) + 4096,
            conditions=["target-full"],
        ),
    ),
    "status": (
        1,
        m.Status(
            time_ns=1_767_225_600_000_000_000,
            state="replicating",
            conditions=["bypass"],
            values={"lag-bytes": 4096, "rpo-ms": -1},
        ),
    ),
    "ping": (0, m.Ping(id=1, time_ns=1_767_225_600_000_000_000)),
    "pong": (
        0,
        m.Pong(id=1, ping_time_ns=1_767_225_600_000_000_000, time_ns=1_767_225_600_000_000_001),
    ),
    "error": (0, m.Error(code="protocol", text="an empty DATA frame")),
    "bye": (0, m.Bye(reason="the site stops")),
    "request": (
        0,
        m.Request(
            id=9, method="points.list", params={"group": _ID, "limit": 10, "deep": [1, None]}
        ),
    ),
    "response": (0, m.Response(id=9, result={"points": [1, 2.5, True, "x"]}, error=None, text="")),
    "group_opened_points": (
        1,
        m.GroupOpened(
            epoch=_EPOCH,
            lanes=[m.LaneState(durable=_POSITION, received=_POSITION, points=_POINTS)],
            credit_bytes=64 << 20,
            empty=False,
        ),
    ),
    "ack_points": (
        1,
        m.Ack(
            lane=1,
            received_seq=400,
            durable_seq=399,
            credit_bytes=(64 << 20) + 4096,
            points=_POINTS,
        ),
    ),
    "group_opened_compare": (
        1,
        m.GroupOpened(
            epoch=_EPOCH,
            lanes=[m.LaneState(durable=_POSITION, received=_POSITION)],
            credit_bytes=64 << 20,
            empty=False,
            compare=True,
        ),
    ),
    "group_opened_lost": (
        1,
        m.GroupOpened(
            epoch=_EPOCH,
            lanes=[m.LaneState(durable=_POSITION, received=_POSITION)],
            credit_bytes=64 << 20,
            empty=False,
            compare=True,
            lost=[m.LostRange(disk=1, offset=1 << 40, length=65536)],
        ),
    ),
}

RECORDS = b"VEPR" + bytes(range(124))


def frames() -> dict[str, bytes]:
    """File name (without suffix) to the bytes of the frame."""
    out: dict[str, bytes] = {}
    for sequence, (name, (channel, message)) in enumerate(MESSAGES.items()):
        payload = m.encode_message(message)
        kind = m.frame_type(message)
        out[name] = (
            encode_header(FrameHeader(1, kind, 0, len(payload), channel, sequence)) + payload
        )
    for name, flags in (("data", 0), ("data_more", int(FrameFlag.MORE))):
        header = FrameHeader(1, FrameType.DATA, flags, len(RECORDS), 0x01020304, 0x0102030405060708)
        out[name] = encode_header(header) + RECORDS
    return out


if __name__ == "__main__":
    DIRECTORY.mkdir(exist_ok=True)
    for stem, content in frames().items():
        path = DIRECTORY / f"{stem}.bin"
        if not path.exists():
            path.write_bytes(content)
            print(f"wrote {path.name}: {len(content)} bytes")
