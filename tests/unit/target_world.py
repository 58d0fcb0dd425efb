"""A target process over real TLS, in this process, and a source that says what a test wants."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import store_records as records

from vrep.control import ControlClient
from vrep.keys import SiteIdentity
from vrep.paths import SitePaths
from vrep.settings import Config, NetworkConfig, TargetConfig
from vrep.target.daemon import Target
from vrep.target.epochs import EpochDoor
from vrep.target.store import StoreReader
from vrep.wire import messages as m
from vrep.wire.peers import PeerRegistry
from vrep.wire.site import connect
from vrep.wire.transport import FrameTransport

WAIT_S = 30.0
CHANNEL = 1
GONE_S = 600.0
"""no test waits for so long: see `test_target_heard.wait_gone`"""


GROUP: bytes = records.GROUP


def trust(who: Path, whom: SiteIdentity) -> None:
    peers = PeerRegistry(who)
    peers.add(
        peers.check(
            name=whom.name,
            site_id=whom.site_id,
            certificate=whom.certificate_pem,
            address="",
            joined=whom.created,
        )
    )


class World:
    """A target site that runs, and source sites that may connect."""

    def __init__(self, where: Path) -> None:
        self.where = where
        self.paths = SitePaths(where / "b")
        self.b = SiteIdentity.create(self.paths.root, "b")
        self.sources: dict[str, SiteIdentity] = {}
        self.transports: list[FrameTransport] = []
        self.config = Config(
            network=NetworkConfig(listen="127.0.0.1:0"),
            target=TargetConfig(commit_s=0.004, reserve_bytes=0, source_gone_s=GONE_S),
        )
        self.target = Target(self.paths, self.config)
        self.target.start()

    def restart(self) -> None:
        self.target.close()
        self.target = Target(self.paths, self.config)
        self.target.start()

    def source(self, name: str = "a") -> SiteIdentity:
        if name not in self.sources:
            self.sources[name] = SiteIdentity.create(self.where / name, name)
            trust(self.paths.root, self.sources[name])
            trust(self.where / name, self.b)
        return self.sources[name]

    def connect(self, name: str = "a") -> FrameTransport:
        identity = self.source(name)
        peer = PeerRegistry(self.where / name).get("b")
        transport = connect(identity, peer, address=self.target.address)
        self.transports.append(transport)
        return transport

    def close(self) -> None:
        for transport in self.transports:
            transport.close()
        self.target.close()

    @property
    def control(self) -> ControlClient:
        return ControlClient(self.paths.socket("target"))

    def status(self) -> dict[str, Any]:
        return dict(self.control.call("status")["groups"][GROUP.hex()])

    @property
    def door(self) -> EpochDoor:
        return EpochDoor(self.paths.store, self.paths.socket("target"), GROUP)


class Client:
    """A source, as simple as one can be."""

    def __init__(self, world: World, name: str = "a", feed: Any = None, **offer: Any) -> None:
        self.transport = world.connect(name)
        self.feed = feed or records.Feed()
        self.ack = m.Ack(received_seq=0, durable_seq=0, credit_bytes=0)
        self.offer = offer

    def open(self) -> m.GroupOpened:
        epoch = self.feed.epoch
        fields: dict[str, Any] = {
            "group_id": GROUP,
            "name": "shop",
            "epoch": m.EpochInfo(counter=epoch.epoch, id=epoch.epoch_id),
            "disks": [m.DiskInfo(index=0, name="root", size=records.DISK_BYTES)],
            "lanes": [m.LaneOffer(durable_seq=0, oldest_seq=1, newest_seq=self.feed.seq)],
            "wrapped_keys": [b"wrapped"],
            **self.offer,
        }
        self.transport.send(m.OpenGroup(**fields), CHANNEL)
        answer = self.transport.expect(WAIT_S).message
        if isinstance(answer, m.Refused):
            raise RefusedByTarget(answer)
        assert isinstance(answer, m.GroupOpened)
        return answer

    def start(self) -> Client:
        """Open, and begin a stream where the target is."""
        opened = self.open()
        self.feed.restart(opened.lanes[0].durable.seq)
        self.announce()
        return self

    def announce(self) -> None:
        self.transport.send(
            m.StreamStart(
                stream_id=self.feed.stream_id, key_generation=1, resume_seq=self.feed.seq
            ),
            CHANNEL,
        )
        self.send(self.feed.stream())

    def send(self, data: bytes, *, more: bool = False) -> None:
        self.transport.send_data(CHANNEL, [data], more=more)

    def wait(self, durable_seq: int, limit_s: float = WAIT_S) -> m.Ack:
        deadline = time.monotonic() + limit_s
        while self.ack.durable_seq < durable_seq:
            self.take(max(0.001, deadline - time.monotonic()))
        return self.ack

    def take(self, limit_s: float = WAIT_S) -> m.Message:
        message = self.transport.expect(limit_s).message
        if isinstance(message, m.Ack):
            assert message.received_seq >= message.durable_seq
            self.ack = message
        elif isinstance(message, m.Refused):
            raise RefusedByTarget(message)
        return message


class GroupNamed(Client):
    """A source whose group has this name."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world)
        self.offer["name"] = name


class RefusedByTarget(Exception):
    def __init__(self, message: m.Refused) -> None:
        super().__init__(message.code, message.text)
        self.message = message


def content(world: World) -> bytes:
    with StoreReader(world.paths.store, GROUP) as reader:
        out = b""
        for span in reader.records():
            last = span.found[-1]
            end = int(last["position"]) + 64 + int(last["header"]["body_bytes"])
            out += bytes(reader.read(span.segment, span.start, end))
        return out
