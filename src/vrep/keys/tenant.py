"""Tenant keys: the secrets that open everything a tenant replicated.

A tenant key is 32 random bytes with a name; its id is the first 8 bytes of
SHA-256(key || label) in hex.  It wraps data keys and nothing else.  The ring
of a site lives in DIR/keys, one 0600 file for each key.  A key can be exported
as armored text (with a passphrase: scrypt and AES-256-GCM), read back and
compared (`verify`: replication can then be trusted to be recoverable),
imported elsewhere, and released: wrapped for the certificate of a recovery
host, which is logged in DIR/keys/release.log.

Whoever holds a target's files and the tenant key reads the disks; whoever
loses all copies of the key has lost them.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from vrep.durable import make_private_directory, write_atomic
from vrep.keys import armor
from vrep.keys.errors import (
    IdentityError,
    KeyExistsError,
    KeyFileError,
    KeyNotVerifiedError,
    TenantKeyError,
    UnknownKeyError,
)
from vrep.keys.identity import check_name, utc_now

__all__ = ["KEY_BYTES", "KeyInfo", "TenantKey", "TenantKeyring", "tenant_key_id"]

KEY_BYTES = 32
KEY_FILE_VERSION = 1
EXPORT_KIND = "VREP TENANT KEY"
_ID_LABEL = b"vrep tenant key v1"
_SCRYPT_N_DEFAULT = 1 << 17  # 128 MiB and about half a second: for one human's passphrase
_SCRYPT_N_MAX = 1 << 20
_SALT_BYTES = 16
_NONCE_BYTES = 12


def tenant_key_id(secret: bytes) -> str:
    return hashlib.sha256(secret + _ID_LABEL).digest()[:8].hex()


@dataclass(frozen=True)
class TenantKey:
    """A tenant's secret, with its name. The secret never shows in a repr."""

    name: str
    secret: bytes = field(repr=False)
    created: datetime.datetime

    def __post_init__(self) -> None:
        if len(self.secret) != KEY_BYTES:
            raise TenantKeyError(f"a tenant key has {KEY_BYTES} bytes, not {len(self.secret)}")

    @property
    def key_id(self) -> str:
        return tenant_key_id(self.secret)


class KeyInfo(msgspec.Struct, frozen=True):
    """What may be shown of a key."""

    name: str
    key_id: str
    created: datetime.datetime
    origin: Literal["created", "imported", "released"]
    verified: datetime.datetime | None
    """when an export of this key was last read back, or None"""


class _KeyFile(msgspec.Struct, frozen=True):
    version: int
    name: str
    key_id: str
    secret: Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
    created: datetime.datetime
    origin: Literal["created", "imported", "released"]
    verified: datetime.datetime | None = None

    def __repr__(self) -> str:
        return f"_KeyFile(name={self.name!r}, key_id={self.key_id!r})"


def _scrypt(passphrase: str, salt: bytes, n: int) -> bytes:
    return Scrypt(salt=salt, length=32, n=n, r=8, p=1).derive(passphrase.encode())


def export_text(
    key: TenantKey, passphrase: str | None = None, scrypt_n: int = _SCRYPT_N_DEFAULT
) -> str:
    """The armored text of a key; sealed when there is a passphrase."""
    headers = {
        "Version": str(armor.ARMOR_VERSION),
        "Name": key.name,
        "Key-Id": key.key_id,
        "Created": key.created.isoformat(),
    }
    if passphrase is None:
        headers["Protection"] = "none"
        return armor.encode(EXPORT_KIND, headers, key.secret)
    headers["Protection"] = "scrypt aes-256-gcm"
    headers["Scrypt"] = f"n={scrypt_n} r=8 p=1"
    salt, nonce = secrets.token_bytes(_SALT_BYTES), secrets.token_bytes(_NONCE_BYTES)
    sealed = AESGCM(_scrypt(passphrase, salt, scrypt_n)).encrypt(
        nonce, key.secret, armor.headers_bytes(EXPORT_KIND, headers)
    )
    return armor.encode(EXPORT_KIND, headers, salt + nonce + sealed)


def _scrypt_cost(text: str) -> int:
    words = text.split()
    if len(words) != 3 or words[1:] != ["r=8", "p=1"] or not words[0].startswith("n="):
        raise KeyFileError(f"the key file asks for an unknown passphrase cost: {text!r}")
    digits = words[0][2:]
    cost = int(digits) if digits.isascii() and digits.isdigit() and len(digits) <= 8 else 0
    # A cost is memory (1 KiB each): a file must not make us allocate at its will.
    if cost < 2 or cost > _SCRYPT_N_MAX or cost & (cost - 1):
        raise KeyFileError(f"the key file asks for a passphrase cost out of range: {text!r}")
    return cost


def import_text(text: str, passphrase: str | None = None) -> TenantKey:
    """Read an exported key back. KeyFileError names what is wrong with it."""
    block = armor.decode(text, EXPORT_KIND)
    if block.header("Version") != str(armor.ARMOR_VERSION):
        raise KeyFileError(
            f"the key file has version {block.header('Version')}; "
            f"this release reads {armor.ARMOR_VERSION}"
        )
    protection = block.header("Protection")
    if protection == "none":
        secret = block.body
    elif protection == "scrypt aes-256-gcm":
        if passphrase is None:
            raise KeyFileError("the key file is protected by a passphrase: give it")
        if len(block.body) != _SALT_BYTES + _NONCE_BYTES + KEY_BYTES + 16:
            raise KeyFileError("the key file is cut short")
        cost = _scrypt_cost(block.header("Scrypt"))
        salt = block.body[:_SALT_BYTES]
        nonce = block.body[_SALT_BYTES : _SALT_BYTES + _NONCE_BYTES]
        try:
            secret = AESGCM(_scrypt(passphrase, salt, cost)).decrypt(
                nonce,
                block.body[_SALT_BYTES + _NONCE_BYTES :],
                armor.headers_bytes(EXPORT_KIND, block.headers),
            )
        except InvalidTag:
            raise KeyFileError("the passphrase is wrong") from None
    else:
        raise KeyFileError(f"the key file is protected in an unknown way: {protection!r}")
    if len(secret) != KEY_BYTES or tenant_key_id(secret) != block.header("Key-Id"):
        raise KeyFileError("the key file's key is not the one that its Key-Id names")
    try:
        name = check_name("key", block.header("Name"))
        created = datetime.datetime.fromisoformat(block.header("Created"))
    except (IdentityError, ValueError) as error:
        raise KeyFileError(f"the key file is damaged: {error}") from None
    return TenantKey(name, secret, created)


class TenantKeyring:
    """The tenant keys that a site holds, in DIR/keys."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        now: Callable[[], datetime.datetime] = utc_now,
    ) -> None:
        self._where = Path(directory) / "keys"
        self._now = now

    @property
    def release_log_path(self) -> Path:
        return self._where / "release.log"

    def _path(self, name: str) -> Path:
        try:
            return self._where / f"{check_name('key', name)}.key"
        except IdentityError as error:
            raise TenantKeyError(error.detail) from None

    def _read(self, name: str) -> _KeyFile:
        path = self._path(name)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise UnknownKeyError(f"{name!r}: create it, import it, or have it released") from None
        except OSError as error:
            raise TenantKeyError(f"cannot read the tenant key {name!r}: {error.strerror}") from None
        try:
            record = msgspec.json.decode(data, type=_KeyFile)
        except msgspec.MsgspecError as error:
            raise KeyFileError(f"the file of the tenant key {name!r} is damaged: {error}") from None
        if record.version != KEY_FILE_VERSION:
            raise KeyFileError(
                f"the file of the tenant key {name!r} has version {record.version}; "
                f"this release reads {KEY_FILE_VERSION}"
            )
        if record.name != name or tenant_key_id(record.secret) != record.key_id:
            raise KeyFileError(f"the file of {name!r} is damaged: its id does not match")
        return record

    def _store(self, key: TenantKey, origin: Literal["created", "imported", "released"]) -> KeyInfo:
        path = self._path(key.name)
        make_private_directory(self._where)
        record = _KeyFile(KEY_FILE_VERSION, key.name, key.key_id, key.secret, key.created, origin)
        try:
            write_atomic(path, msgspec.json.encode(record), 0o600, exclusive=True)
        except FileExistsError:
            held = self._read(key.name)
            if hmac.compare_digest(held.secret, key.secret) and origin != "created":
                return self.info(key.name)
            raise KeyExistsError(f"{key.name!r} has the id {held.key_id}") from None
        return self.info(key.name)

    def create(self, name: str) -> KeyInfo:
        """Make a new random key. An existing one is never replaced."""
        return self._store(TenantKey(name, secrets.token_bytes(KEY_BYTES), self._now()), "created")

    def names(self) -> list[str]:
        if not self._where.is_dir():
            return []
        return sorted(p.name[:-4] for p in self._where.glob("[!.]*.key"))

    def info(self, name: str) -> KeyInfo:
        record = self._read(name)
        return KeyInfo(record.name, record.key_id, record.created, record.origin, record.verified)

    def list(self) -> list[KeyInfo]:
        return [self.info(name) for name in self.names()]

    def get(self, name: str) -> TenantKey:
        record = self._read(name)
        return TenantKey(record.name, record.secret, record.created)

    def find(self, key_id: str) -> TenantKey:
        """The key of an id; UnknownKeyError names the id when none has it."""
        for name in self.names():
            record = self._read(name)
            if record.key_id == key_id:
                return TenantKey(record.name, record.secret, record.created)
        raise UnknownKeyError(f"the key with id {key_id}: import it or have it released")

    def export(
        self, name: str, passphrase: str | None = None, *, scrypt_n: int = _SCRYPT_N_DEFAULT
    ) -> str:
        """Armored text of a key, for a file outside this site."""
        return export_text(self.get(name), passphrase, scrypt_n)

    def import_key(
        self, text: str, passphrase: str | None = None, *, name: str | None = None
    ) -> KeyInfo:
        """Take in an exported key, under its own name or another."""
        key = import_text(text, passphrase)
        if name is not None:
            key = TenantKey(name, key.secret, key.created)
        return self._store(key, "imported")

    def verify(self, name: str, text: str, passphrase: str | None = None) -> KeyInfo:
        """Compare an export, read back from where it is kept, with the key
        held here; when they are equal, remember durably that and when it was."""
        record = self._read(name)
        read_back = import_text(text, passphrase)
        if not hmac.compare_digest(read_back.secret, record.secret):
            raise TenantKeyError(
                f"the file holds the key {read_back.key_id}, but {name!r} here is {record.key_id}"
            )
        checked = msgspec.structs.replace(record, verified=self._now())
        write_atomic(self._path(name), msgspec.json.encode(checked), 0o600)
        return self.info(name)

    def require_verified(self, name: str, *, accept_key_loss: bool = False) -> KeyInfo:
        """What `protect` asks before a disk depends on a key."""
        info = self.info(name)
        if info.verified is None and not accept_key_loss:
            raise KeyNotVerifiedError(
                f"{name!r}: without one, the loss of this site loses the data. Run "
                "'vrep key export' and 'vrep key verify', or accept it with --accept-key-loss"
            )
        return info

    def release(self, name: str, recipient_pem: str, *, reason: str = "") -> str:
        """Wrap a key for a recovery host's certificate; see `vrep.keys.release`.
        The release is in the log, durably, before the text is returned."""
        from vrep.keys import release

        return release.release_key(
            self.get(name), recipient_pem, log=self.release_log_path, now=self._now(), reason=reason
        )

    def import_released(self, text: str, open_released: Callable[[str], TenantKey]) -> KeyInfo:
        """Take in a key that was released for this host; `open_released` is
        `vrep.keys.release.opener(identity)`."""
        return self._store(open_released(text), "released")
