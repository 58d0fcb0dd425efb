"""Data keys: wrapping, and the derivations that C must agree with."""

from __future__ import annotations

import datetime
import hashlib
import hmac

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrep.errors import TenantKeyError
from vrep.keys import DataKey, TenantKey, inspect_wrapped, unwrap_data_key

NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
TENANT = TenantKey("acme", b"\x11" * 32, NOW)
GROUP = bytes(range(16))


def hkdf_by_hand(key: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869 with an empty salt, written out."""
    pseudo_random = hmac.digest(bytes(32), key, "sha256")
    block, out = b"", b""
    for number in range(1, -(-length // 32) + 1):
        block = hmac.digest(pseudo_random, block + info + bytes([number]), "sha256")
        out += block
    return out[:length]


def test_wrap_and_unwrap() -> None:
    key = DataKey.create(GROUP, 7)
    blob = key.wrap(TENANT)
    assert len(blob) <= 512
    assert key.secret not in blob
    assert unwrap_data_key(blob, TENANT) == key
    assert unwrap_data_key(blob, TENANT, group_id=GROUP) == key
    info = inspect_wrapped(blob)
    assert (info.tenant_key_id, info.group_id, info.generation) == (TENANT.key_id, GROUP, 7)
    assert key.wrap(TENANT) != blob


def test_wrong_key_and_wrong_group_are_named() -> None:
    blob = DataKey.create(GROUP).wrap(TENANT)
    other = TenantKey("other", b"\x22" * 32, NOW)
    with pytest.raises(TenantKeyError, match=f"{TENANT.key_id}.*other.*{other.key_id}"):
        unwrap_data_key(blob, other)
    with pytest.raises(TenantKeyError, match="not of"):
        unwrap_data_key(blob, TENANT, group_id=bytes(16))


def test_every_field_is_authenticated() -> None:
    blob = DataKey.create(GROUP, 3).wrap(TENANT)
    fields = msgspec.msgpack.decode(blob)
    for name, value in {
        "group_id": bytes(16),
        "generation": 4,
        "nonce": bytes(12),
        "sealed": bytes(48),
    }.items():
        with pytest.raises(TenantKeyError, match="changed or damaged"):
            unwrap_data_key(msgspec.msgpack.encode(fields | {name: value}), TENANT)
    with pytest.raises(TenantKeyError, match="version 2"):
        unwrap_data_key(msgspec.msgpack.encode(fields | {"version": 2}), TENANT)


@given(st.data())
def test_damage_is_only_ever_a_tenant_key_error(data: st.DataObject) -> None:
    blob = bytearray(DataKey(GROUP, 1, bytes(32)).wrap(TENANT))
    at = data.draw(st.integers(0, len(blob) - 1))
    blob[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(TenantKeyError):
        unwrap_data_key(bytes(blob[: data.draw(st.integers(0, len(blob)))]), TENANT)


@given(st.binary(max_size=600))
def test_garbage(blob: bytes) -> None:
    with pytest.raises(TenantKeyError):
        unwrap_data_key(blob, TENANT)


def test_derivations_are_hkdf_sha256() -> None:
    key = DataKey(GROUP, 1, bytes(range(32)))
    stream_id = bytes(range(16, 32))
    assert key.stream_key(stream_id) == hkdf_by_hand(key.secret, b"vrep stream v1" + stream_id, 32)
    assert key.hash_secret() == hkdf_by_hand(key.secret, b"vrep block-hash secret v1", 192)
    # Pinned: a change makes all that was sealed before unreadable.
    digest = hashlib.sha256(key.stream_key(stream_id) + key.hash_secret()).hexdigest()
    assert digest == "fcd0ffff32630dd13a4c6bdbc64309581b4dbd87256df74a79f3ad2e336d0faa"
    assert key.stream_key(bytes(16)) != key.stream_key(stream_id)
    with pytest.raises(ValueError, match="16 bytes"):
        key.stream_key(b"short")


def test_bounds_and_repr() -> None:
    for group_id, generation, secret in [
        (bytes(15), 1, bytes(32)),
        (GROUP, 0, bytes(32)),
        (GROUP, 1 << 32, bytes(32)),
        (GROUP, 1, bytes(31)),
    ]:
        with pytest.raises(ValueError, match=r"bytes|counted"):
            DataKey(group_id, generation, secret)
    key = DataKey.create(GROUP)
    assert key.secret.hex() not in repr(key)
    assert repr(key.secret) not in repr(key)
