"""The sites that this site trusts: one JSON file each, in DIR/peers.

The directory is the truth: every look-up reads it, so a peer that was removed,
by any process, is refused at its next connection.
"""

from __future__ import annotations

import datetime
import os
import re
from pathlib import Path
from typing import Annotated

import msgspec

from vrep.durable import make_private_directory, sync_directory, write_atomic
from vrep.errors import CorruptError, ExistsError, NotFoundError
from vrep.keys.errors import IdentityError
from vrep.keys.identity import certificate_fingerprint, check_name, load_certificate
from vrep.wire.address import parse_address

__all__ = ["Peer", "PeerRegistry"]

PEER_VERSION = 1
_SITE_ID = re.compile(r"[0-9a-f]{32}")


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """A trusted site."""

    version: int = PEER_VERSION
    name: str
    site_id: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}$")]
    certificate: str
    fingerprint: str
    address: str
    """where it listens, HOST:PORT; empty when it does not"""
    joined: datetime.datetime


class PeerRegistry:
    """The peers of the site in DIR."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._where = Path(directory) / "peers"

    def check(
        self,
        *,
        name: str,
        site_id: str,
        certificate: str,
        address: str,
        joined: datetime.datetime,
    ) -> Peer:
        """What `add` would trust, without trusting it yet. A name, id or
        certificate that is another peer's is refused."""
        check_name("site", name)
        if not _SITE_ID.fullmatch(site_id):
            raise IdentityError(f"{site_id!r} is no site id")
        if address:
            parse_address(address)
        fingerprint = certificate_fingerprint(load_certificate(certificate))
        for other in self.list():
            if other.site_id == site_id and other.fingerprint == fingerprint:
                continue
            if site_id == other.site_id or fingerprint == other.fingerprint or name == other.name:
                raise ExistsError(
                    f"a peer {other.name!r} (site {other.site_id}) is trusted already; "
                    f"'vrep site remove {other.name}' takes it out"
                )
        return Peer(
            name=name,
            site_id=site_id,
            certificate=certificate,
            fingerprint=fingerprint,
            address=address,
            joined=joined,
        )

    def add(self, peer: Peer) -> None:
        """Trust a site, durably. One that comes back with the same certificate
        replaces its own entry."""
        make_private_directory(self._where)
        write_atomic(self._where / f"{peer.site_id}.json", msgspec.json.encode(peer), 0o600)

    def list(self) -> list[Peer]:
        """All peers, by name."""
        try:
            paths = sorted(self._where.glob("[!.]*.json"))
        except FileNotFoundError:
            return []
        peers = [peer for path in paths if (peer := self._read(path)) is not None]
        return sorted(peers, key=lambda peer: (peer.name, peer.site_id))

    @staticmethod
    def _read(path: Path) -> Peer | None:
        try:
            peer = msgspec.json.decode(path.read_bytes(), type=Peer)
        except FileNotFoundError:
            return None  # removed between the listing and now
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise CorruptError(f"the peer file {path.name}: {error}") from None
        if peer.version != PEER_VERSION or path.name != f"{peer.site_id}.json":
            raise CorruptError(f"the peer file {path.name} has another version or site id")
        return peer

    def get(self, name_or_id: str) -> Peer:
        for peer in self.list():
            if name_or_id in (peer.name, peer.site_id):
                return peer
        raise NotFoundError(f"no peer {name_or_id!r}: 'vrep site list' shows those there are")

    def by_fingerprint(self, fingerprint: str) -> Peer | None:
        """The peer of a certificate, or None: not trusted, or no longer."""
        return next((peer for peer in self.list() if peer.fingerprint == fingerprint), None)

    def remove(self, name_or_id: str) -> Peer:
        """Trust a site no longer; durable when it returns."""
        peer = self.get(name_or_id)
        (self._where / f"{peer.site_id}.json").unlink(missing_ok=True)
        sync_directory(self._where)
        return peer
