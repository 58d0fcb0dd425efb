"""A site is made, and sites come to trust each other."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Self

from vrep import errors
from vrep.settings import set_listen
from vrep.site.base import SiteBase

if TYPE_CHECKING:
    from vrep.wire.peers import Peer

__all__ = ["Trust"]


class Trust(SiteBase):
    """See `vrep.Site`."""

    @classmethod
    def init(
        cls,
        directory: str | os.PathLike[str] | None = None,
        *,
        name: str,
        listen: str = "",
    ) -> Self:
        """Make a new site. `listen` is the HOST:PORT where other sites connect; without it
        the site can protect its own disks but receive nothing."""
        from vrep.keys.identity import SiteIdentity
        from vrep.wire.address import parse_address

        if listen:
            parse_address(listen)
        site = cls(directory)
        site.paths.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        SiteIdentity.create(site.paths.root, name)
        if listen:
            set_listen(site.paths.config, listen)
        return site

    def invite(self, *, lifetime_s: int = 86400) -> str:
        """A token with which one other site may join, once, within its lifetime."""
        from vrep.wire.invite import InviteBook, encode_invite

        identity, network = self.identity, self.config.network
        address = network.advertise or network.listen
        if not address:
            raise errors.ConfigError(
                "this site does not listen: set network.listen in config.toml, or run "
                "'vrep site init' with --listen"
            )
        invite = InviteBook(self.paths.root).create(
            name=identity.name,
            address=address,
            fingerprint=identity.fingerprint,
            lifetime_s=lifetime_s,
        )
        return encode_invite(invite)

    def join(self, token: str) -> Peer:
        """Use an invitation: both sites trust each other from now on."""
        from vrep.wire.site import join_site

        network = self.config.network
        return join_site(
            self.identity,
            self.peers,
            token,
            listen_address=network.advertise or network.listen,
        )

    def remove_peer(self, name: str) -> Peer:
        """Stop trusting a site. Refused while a group is protected to it, or has lanes there."""
        peer = self.peers.get(name)
        shared = [g.name for g in self.groups.readable() if peer.site_id in dict(g.hosts).values()]
        if shared:
            raise errors.BusyError(
                f"{', '.join(shared)} and lanes at {peer.name!r} are one group: unprotect them "
                "there first"
            )
        users = [g.name for g in self.groups.readable() if g.to_site == peer.site_id]
        if users:
            raise errors.BusyError(
                f"{', '.join(users)} replicate to {peer.name!r}: unprotect them first"
            )
        removed = self.peers.remove(name)
        self._tell("target", "reload")
        return removed
