"""The tenant's key at work: data keys of a group, and openers of its streams.

Nothing here is stored: keys live in memory of the process that recovers. Openers are not
shared between threads; each thread gets its own.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from vrep._core.seal import Opener
from vrep.errors import TenantKeyError
from vrep.keys.datakey import DataKey, inspect_wrapped, unwrap_data_key
from vrep.keys.tenant import TenantKeyring
from vrep.paths import SitePaths

__all__ = ["KeyAccess"]


class KeyAccess:
    """The data keys of one group, by generation."""

    def __init__(self, keys: dict[int, DataKey], key_id: str) -> None:
        if not keys:
            raise TenantKeyError("the group's history names no wrapped data key")
        self.key_id = key_id
        """of the tenant key that opened them"""
        self._keys = keys
        self._stream_keys: dict[bytes, bytes] = {}
        self._local = threading.local()

    @classmethod
    def open(cls, paths: SitePaths, group_id: bytes, wrapped: Sequence[bytes]) -> KeyAccess:
        """Unwrap every generation with the tenant keys held here. TenantKeyError, with the
        key's id, when one is missing, wrong or does not open what it should."""
        ring = TenantKeyring(paths.root)
        keys: dict[int, DataKey] = {}
        failures: dict[int, TenantKeyError] = {}
        key_id = ""
        for blob in wrapped:
            info = inspect_wrapped(blob)
            if info.generation in keys:
                continue
            try:
                tenant = ring.find(info.tenant_key_id)
                keys[info.generation] = unwrap_data_key(blob, tenant, group_id=group_id)
            except TenantKeyError as error:
                failures[info.generation] = error
            else:
                key_id = info.tenant_key_id
        for generation, failure in failures.items():
            if generation not in keys:
                raise failure
        return cls(keys, key_id)

    def derive(self, label: bytes) -> bytes:
        """A 32-byte key of the newest generation for a purpose of this site's own."""
        # The label makes it independent of every key that seals data.
        import hashlib
        import hmac

        newest = self._keys[max(self._keys)]
        return hmac.new(newest.secret, b"vrep local v1" + label, hashlib.sha256).digest()

    def hash_secret(self, generation: int) -> bytes:
        """With what the hashes are made of records that a generation's key seals."""
        return self._data_key(generation).hash_secret()

    def opener(self, stream: Any) -> Opener:
        """An opener of this thread's own for a stream (an INDEX_STREAM or STREAM struct)."""
        stream_id: bytes = stream["stream_id"].tobytes()
        openers: dict[bytes, Opener] | None = getattr(self._local, "openers", None)
        if openers is None:
            openers = self._local.openers = {}
        opener = openers.get(stream_id)
        if opener is None:
            opener = Opener(self._stream_key(stream_id, int(stream["key_generation"])), stream_id)
            openers[stream_id] = opener
        return opener

    def _stream_key(self, stream_id: bytes, generation: int) -> bytes:
        key = self._stream_keys.get(stream_id)
        if key is None:
            key = self._stream_keys[stream_id] = self._data_key(generation).stream_key(stream_id)
        return key

    def _data_key(self, generation: int) -> DataKey:
        key = self._keys.get(generation)
        if key is None:
            raise TenantKeyError(f"no wrapped data key of generation {generation} is held")
        return key
