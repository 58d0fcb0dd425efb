"""Data keys: what a group's records are sealed under.

Each group has a random 32-byte data key for each key generation.  It is stored
and sent only wrapped by the tenant key (AES-256-GCM; group, generation and
tenant key id are associated data), so a target keeps what it cannot open.
Keys of streams and the secret of block hashes are derived by HKDF-SHA256.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Annotated

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from vrep.keys.errors import TenantKeyError
from vrep.keys.tenant import TenantKey

__all__ = ["DataKey", "WrappedKeyInfo", "inspect_wrapped", "unwrap_data_key"]

GROUP_ID_BYTES = 16
STREAM_ID_BYTES = 16
STREAM_KEY_BYTES = 32
HASH_SECRET_BYTES = 192
WRAP_VERSION = 1
WRAPPED_BYTES_MAX = 512
_GENERATION_MAX = (1 << 32) - 1


class _Wrapped(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
    tenant_key_id: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}$")]
    group_id: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    generation: Annotated[int, msgspec.Meta(ge=1, le=_GENERATION_MAX)]
    nonce: Annotated[bytes, msgspec.Meta(min_length=12, max_length=12)]
    sealed: Annotated[bytes, msgspec.Meta(min_length=48, max_length=48)]


class WrappedKeyInfo(msgspec.Struct, frozen=True):
    """What a wrapped data key says without being opened."""

    tenant_key_id: str
    group_id: bytes
    generation: int


_DECODER = msgspec.msgpack.Decoder(_Wrapped)


def _associated(tenant_key_id: str, group_id: bytes, generation: int) -> bytes:
    return (
        b"vrep data key v1"
        + group_id
        + generation.to_bytes(4, "little")
        + bytes.fromhex(tenant_key_id)
    )


@dataclass(frozen=True)
class DataKey:
    """A data key in memory. The secret never shows in a repr."""

    group_id: bytes
    generation: int
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.group_id) != GROUP_ID_BYTES:
            raise ValueError(f"a group id has {GROUP_ID_BYTES} bytes, not {len(self.group_id)}")
        if len(self.secret) != 32:
            raise ValueError(f"a data key has 32 bytes, not {len(self.secret)}")
        if not 1 <= self.generation <= _GENERATION_MAX:
            raise ValueError(f"key generations are counted from 1, not {self.generation}")

    @classmethod
    def create(cls, group_id: bytes, generation: int = 1) -> DataKey:
        return cls(group_id, generation, secrets.token_bytes(32))

    def wrap(self, tenant: TenantKey) -> bytes:
        """The blob that is stored beside the data and sent to targets."""
        nonce = secrets.token_bytes(12)
        associated = _associated(tenant.key_id, self.group_id, self.generation)
        sealed = AESGCM(tenant.secret).encrypt(nonce, self.secret, associated)
        return msgspec.msgpack.encode(
            _Wrapped(WRAP_VERSION, tenant.key_id, self.group_id, self.generation, nonce, sealed)
        )

    def _derive(self, info: bytes, length: int) -> bytes:
        return HKDF(algorithm=hashes.SHA256(), length=length, salt=None, info=info).derive(
            self.secret
        )

    def stream_key(self, stream_id: bytes) -> bytes:
        """The 32-byte AES-256-GCM key of one stream."""
        if len(stream_id) != STREAM_ID_BYTES:
            raise ValueError(f"a stream id has {STREAM_ID_BYTES} bytes, not {len(stream_id)}")
        return self._derive(b"vrep stream v1" + stream_id, STREAM_KEY_BYTES)

    def hash_secret(self) -> bytes:
        """The 192-byte XXH3 secret of the group's block hashes."""
        return self._derive(b"vrep block-hash secret v1", HASH_SECRET_BYTES)


def _parse(blob: bytes) -> _Wrapped:
    if len(blob) > WRAPPED_BYTES_MAX:
        raise TenantKeyError(
            f"a wrapped data key has at most {WRAPPED_BYTES_MAX} bytes, not {len(blob)}"
        )
    try:
        wrapped = _DECODER.decode(blob)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise TenantKeyError(f"a wrapped data key is damaged: {error}") from None
    if wrapped.version != WRAP_VERSION:
        raise TenantKeyError(
            f"a wrapped data key has version {wrapped.version}; this release reads {WRAP_VERSION}"
        )
    return wrapped


def inspect_wrapped(blob: bytes) -> WrappedKeyInfo:
    """Which group, generation and tenant key a blob is for."""
    wrapped = _parse(blob)
    return WrappedKeyInfo(wrapped.tenant_key_id, wrapped.group_id, wrapped.generation)


def unwrap_data_key(blob: bytes, tenant: TenantKey, *, group_id: bytes | None = None) -> DataKey:
    """Open a blob. TenantKeyError says whether the tenant key is another one,
    the blob belongs to another group, or it was changed."""
    wrapped = _parse(blob)
    if group_id is not None and wrapped.group_id != group_id:
        raise TenantKeyError(
            f"the wrapped data key is of group {wrapped.group_id.hex()}, not of {group_id.hex()}"
        )
    if wrapped.tenant_key_id != tenant.key_id:
        raise TenantKeyError(
            f"wrong tenant key: the data need the key with id {wrapped.tenant_key_id}, "
            f"but {tenant.name!r} is {tenant.key_id}"
        )
    associated = _associated(wrapped.tenant_key_id, wrapped.group_id, wrapped.generation)
    try:
        secret = AESGCM(tenant.secret).decrypt(wrapped.nonce, wrapped.sealed, associated)
    except InvalidTag:
        raise TenantKeyError(
            f"the wrapped data key of group {wrapped.group_id.hex()} was changed or damaged"
        ) from None
    return DataKey(wrapped.group_id, wrapped.generation, secret)
