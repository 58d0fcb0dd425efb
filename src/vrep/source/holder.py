"""Holder: a session's hold on the ring, and what is drained of it.

The hold stands until its filter or the session ends. It is taken by the session's thread, and by
the spiller's when the filter restarted while the session waits or connects, which may take long:
spilling goes on. What is spilled is sealed under the data keys of the group's definition.
"""

from __future__ import annotations

import base64
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import structlog

from vrep._core import layout
from vrep.control import ControlClient
from vrep.errors import NotFoundError, VrepError
from vrep.groups import GroupDefinition, GroupDirectory
from vrep.keys.datakey import DataKey, inspect_wrapped, unwrap_data_key
from vrep.keys.tenant import TenantKeyring
from vrep.source.attach import RingHold
from vrep.source.feed import Feed
from vrep.source.spill import SpillKeys
from vrep.source.spiller import Spiller, Work
from vrep.wire.peers import PeerRegistry
from vrep.wire.stream import Clock

__all__ = ["Holder", "SealKeys", "stream_of"]

log = structlog.get_logger("vrep.source")


class SealKeys:
    """The data keys of a group, opened with the tenant's; nothing is kept."""

    def __init__(self, name: str, groups: GroupDirectory, keys: TenantKeyring) -> None:
        self._name = name
        self._groups = groups
        self._keys = keys

    def open(self, definition: GroupDefinition, index: int = -1) -> DataKey:
        """One of a definition's, by its place; the newest. TenantKeyError: not held here."""
        tenant = self._keys.get(definition.key)
        blob = base64.b64decode(definition.wrapped_keys[index])
        needed = inspect_wrapped(blob).tenant_key_id
        if needed != tenant.key_id:
            tenant = self._keys.find(needed)  # another generation: a rotation is under way
        return unwrap_data_key(blob, tenant, group_id=bytes.fromhex(definition.group_id))

    def find(self, generation: int) -> DataKey:
        """An older one, for what was spilled under it."""
        definition = self._groups.load(self._name)
        for index in range(len(definition.wrapped_keys)):
            key = self.open(definition, index)
            if key.generation == generation:
                return key
        raise NotFoundError(f"no data key of generation {generation} of group {self._name!r}")


def stream_of(definition: GroupDefinition, data_key: DataKey, clock: Clock) -> np.ndarray[Any, Any]:
    """A STREAM struct of now, without its ids."""
    stream = np.zeros(1, layout.STREAM)
    stream["epoch_id"] = np.frombuffer(bytes.fromhex(definition.epoch_id), np.uint8)
    stream["key_generation"] = data_key.generation
    stream["wall_ns"] = clock.time_ns()
    stream["parent"]["epoch"] = definition.parent.epoch
    stream["parent"]["lane"] = definition.parent.lane
    stream["parent"]["seq"] = definition.parent.seq
    return stream


class Holder:
    """The hold of one session, from the first `take` to `drop`. Any thread."""

    def __init__(
        self,
        name: str,
        groups: GroupDirectory,
        peers: PeerRegistry,
        filter_control: ControlClient,
        keys: SealKeys,
        spiller: Spiller | None,
        clock: Clock,
        stopping: threading.Event,
    ) -> None:
        """From when `stopping` is set nothing is renewed."""
        self.name = name
        self._groups = groups
        self._peers = peers
        self._filter = filter_control
        self._keys = keys
        self._spiller = spiller
        self._clock = clock
        self._stopping = stopping
        self._holding = threading.RLock()
        self._claimed = False
        self._hold: RingHold | None = None
        self._feed: Feed | None = None

    def drop_unless_alive(self) -> None:
        """Let go of a ring whose filter is gone."""
        with self._holding:
            if self._hold is not None and not self._hold.alive():
                self.drop()

    def drop(self) -> None:
        with self._holding:
            if self._spiller is not None:
                self._spiller.take(None)
            if self._hold is not None:
                self._hold.close()
                self._hold = self._feed = None

    def renew(self) -> None:
        """Hold the ring of a filter that restarted, unless the session does. For the spiller."""
        with self._holding:
            if self._claimed or self._stopping.is_set():
                return
            try:
                definition = self._groups.load(self.name)
                self.take(definition, self._keys.open(definition))
            except (VrepError, OSError) as error:
                log.debug("the ring is not held", group=self.name, error=str(error))

    @contextlib.contextmanager
    def claim(
        self, definition: GroupDefinition, data_key: DataKey
    ) -> Iterator[tuple[RingHold, Feed]]:
        """The hold, which nobody else renews meanwhile."""
        with self._holding:
            hold, feed = self.take(definition, data_key)
            self._claimed = True
        try:
            yield hold, feed
        finally:
            self._claimed = False

    def take(self, definition: GroupDefinition, data_key: DataKey) -> tuple[RingHold, Feed]:
        """The hold on the ring, and from then on what the ring cannot keep is spilled."""
        with self._holding:
            self.drop_unless_alive()
            if self._hold is None or self._feed is None:
                self._hold = self._attach(definition)
                self._feed = self._feed_of(self._hold, data_key)
            self._spill(definition, data_key, self._hold, self._feed)
            return self._hold, self._feed

    def _attach(self, definition: GroupDefinition) -> RingHold:
        peer = self._peers.get(definition.to_site)
        return RingHold(self._filter, self.name, peer.site_id)

    def _feed_of(self, hold: RingHold, data_key: DataKey) -> Feed:
        spiller = self._spiller
        if spiller is None:
            return Feed(hold.reader, None, None)
        with spiller.still():
            # A crash between the two left records in both; the ring's are this history's.
            spiller.spill.cut(hold.reader.released)
        # A process before this one may have left what the target took since.
        acknowledged = int(hold.status()["acknowledged"])
        spiller.durable = max(spiller.durable, acknowledged)
        return Feed(hold.reader, spiller.spill, SpillKeys(data_key, self._keys.find))

    def _spill(
        self, definition: GroupDefinition, data_key: DataKey, hold: RingHold, feed: Feed
    ) -> None:
        if self._spiller is None:
            return
        assert feed.keys is not None
        feed.keys.renew(data_key)
        self._spiller.take(
            Work(
                hold,
                feed,
                feed.keys,
                lambda: stream_of(definition, data_key, self._clock),
                definition.epoch,
                definition.options.compression,
            )
        )
