"""Tenant keys, data keys and site identity.

`tenant` is the ring of tenant keys, `datakey` what they wrap, `release` how
one is handed to a recovery host, `identity` who a site is.
"""

from __future__ import annotations

from vrep.keys.datakey import DataKey, WrappedKeyInfo, inspect_wrapped, unwrap_data_key
from vrep.keys.errors import (
    IdentityError,
    KeyExistsError,
    KeyFileError,
    KeyNotVerifiedError,
    TenantKeyError,
    UnknownKeyError,
)
from vrep.keys.identity import SiteIdentity, certificate_fingerprint, load_certificate
from vrep.keys.release import ReleaseEntry, open_released, opener, read_log
from vrep.keys.tenant import KeyInfo, TenantKey, TenantKeyring, tenant_key_id

__all__ = [
    "DataKey",
    "IdentityError",
    "KeyExistsError",
    "KeyFileError",
    "KeyInfo",
    "KeyNotVerifiedError",
    "ReleaseEntry",
    "SiteIdentity",
    "TenantKey",
    "TenantKeyError",
    "TenantKeyring",
    "UnknownKeyError",
    "WrappedKeyInfo",
    "certificate_fingerprint",
    "inspect_wrapped",
    "load_certificate",
    "open_released",
    "opener",
    "read_log",
    "tenant_key_id",
    "unwrap_data_key",
]
