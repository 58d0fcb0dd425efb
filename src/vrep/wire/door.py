"""Who stands at a listener's door: connections whose peer is not known yet.

Anybody can connect and say nothing, until a time limit ends that.  So those that
are not known have few places, and where all are taken the next one does not wait
for a limit: of the network that holds most places, the one that came first gives
way.  Who opens many connections closes its own; a site that comes from elsewhere
finds a place, and keeps it for as long as the limits give.  One that comes from the
same network as they do keeps its place until as many others came after it.

Not thread-safe: it belongs to its listener's lock.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from typing import Final

from vrep.wire.stream import TlsStream

__all__ = ["STRANGERS_MAX", "Door", "Visit", "network_of"]

STRANGERS_MAX: Final = 32
IPV6_NETWORK_BITS: Final = 64
"""one host has as many addresses as it likes below them"""


def network_of(host: str) -> str:
    """What one who connects cannot easily change: its address, of an IPv6 one the network.
    What is no address is a network of its own."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, IPV6_NETWORK_BITS), strict=False))


class Visit:
    """One connection, from its acceptance on."""

    def __init__(self, network: str) -> None:
        self.network = network
        self.stream: TlsStream | None = None
        self.gone = False
        """it gave way: whoever has its stream closes it"""


class Door:
    """Visits of those that are not known, in the order in which they came."""

    def __init__(self, places: int = STRANGERS_MAX) -> None:
        self._places = places
        self._waiting: dict[Visit, None] = {}

    def enter(self, visit: Visit) -> Visit | None:
        """A place for one more. Who gives way for it; None: there was room."""
        gone = self._gives_way() if len(self._waiting) >= self._places else None
        if gone is not None:
            gone.gone = True
            del self._waiting[gone]
        self._waiting[visit] = None
        return gone

    def leave(self, visit: Visit) -> None:
        """It is known now, or its connection ended."""
        self._waiting.pop(visit, None)

    def _gives_way(self) -> Visit:
        held = Counter(visit.network for visit in self._waiting)
        most = max(held.values())
        return next(visit for visit in self._waiting if held[visit.network] == most)
