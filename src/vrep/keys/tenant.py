"""Tenant keys: the secrets that open everything a tenant replicated.

A tenant key is 32 random bytes with a name; its id is the first 8 bytes of
SHA-256(key || label) in hex.  It wraps data keys and nothing else.  The ring
of a site lives in DIR/keys, one 0600 file for each key.  A name may have
several keys, its generations: the newest is current, older ones stay, since
what they wrapped may still be about.  A new generation is pending until it is
activated (see `vrep.rotate`): nothing is wrapped under it before.  A key can be exported
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
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
from vrep.listing import names_in

__all__ = ["KEY_BYTES", "KeyInfo", "TenantKey", "TenantKeyring", "tenant_key_id"]

KEY_BYTES = 32
KEY_FILE_VERSION = 1
GENERATION_MAX = 9999
_FILE = re.compile(r"([^@]+?)(?:@([1-9][0-9]{0,3}))?\.key")
_KEY_ID = re.compile(r"[0-9a-f]{16}")
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
    generation: int = 1
    replaces: str = ""
    """id of the generation before; empty for the first"""

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
    generation: int = 1
    state: Literal["current", "old", "pending"] = "current"
    """old: another generation took its place. pending: it is not used yet"""


class _KeyFile(msgspec.Struct, frozen=True):
    version: int
    name: str
    key_id: str
    secret: Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
    created: datetime.datetime
    origin: Literal["created", "imported", "released"]
    verified: datetime.datetime | None = None
    generation: Annotated[int, msgspec.Meta(ge=1, le=GENERATION_MAX)] = 1
    replaces: str = ""
    pending: bool = False

    def __repr__(self) -> str:
        return f"_KeyFile(name={self.name!r}, key_id={self.key_id!r})"

    @property
    def key(self) -> TenantKey:
        return TenantKey(self.name, self.secret, self.created, self.generation, self.replaces)


def generation_headers(key: TenantKey) -> dict[str, str]:
    """What an armored key says of its generation; the first says nothing."""
    if key.generation == 1:
        return {}
    return {"Generation": str(key.generation), "Replaces": key.replaces}


def read_generation(block: armor.Armored) -> tuple[int, str]:
    """Generation of an armored key, and the id of the one that it replaces."""
    text, replaces = block.headers.get("Generation", "1"), block.headers.get("Replaces", "")
    number = int(text) if text.isascii() and text.isdigit() and len(text) <= 4 else 0
    if not 1 <= number <= GENERATION_MAX or (number > 1) != bool(_KEY_ID.fullmatch(replaces)):
        raise KeyFileError(f"the key file names an impossible generation: {text!r}")
    return number, replaces


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
        **generation_headers(key),
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
    return TenantKey(name, secret, created, *read_generation(block))


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

    def _path(self, name: str, generation: int = 1) -> Path:
        try:
            stem = check_name("key", name)
        except IdentityError as error:
            raise TenantKeyError(error.detail) from None
        # No name has an @ in it.
        return self._where / (f"{stem}.key" if generation == 1 else f"{stem}@{generation}.key")

    def _read(self, name: str, generation: int = 1) -> _KeyFile:
        path = self._path(name, generation)
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
        if (record.name, record.generation) != (name, generation) or tenant_key_id(
            record.secret
        ) != record.key_id:
            raise KeyFileError(f"the file of {name!r} is damaged: its id does not match")
        return record

    def _files(self) -> dict[str, list[int]]:
        """Names, and the generations of each, rising."""
        found: dict[str, list[int]] = {}
        for file in names_in(self._where):
            match = _FILE.fullmatch(file)
            if match is not None and not file.startswith("."):
                found.setdefault(match[1], []).append(int(match[2] or 1))
        return {name: sorted(found[name]) for name in sorted(found)}

    def _all(self, name: str) -> list[_KeyFile]:
        """Every generation of a key, oldest first."""
        self._path(name)  # what is no name is refused
        numbers = self._files().get(name, [])
        if not numbers:
            raise UnknownKeyError(f"{name!r}: create it, import it, or have it released")
        return [self._read(name, number) for number in numbers]

    def _current(self, name: str) -> _KeyFile:
        used = [record for record in self._all(name) if not record.pending]
        if not used:
            raise UnknownKeyError(f"{name!r} has no generation that is in use")
        return used[-1]

    def _store(
        self,
        key: TenantKey,
        origin: Literal["created", "imported", "released"],
        *,
        pending: bool = False,
    ) -> KeyInfo:
        path = self._path(key.name, key.generation)
        make_private_directory(self._where)
        record = _KeyFile(
            KEY_FILE_VERSION, key.name, key.key_id, key.secret, key.created, origin, None,
            key.generation, key.replaces, pending,
        )  # fmt: skip
        try:
            write_atomic(path, msgspec.json.encode(record), 0o600, exclusive=True)
        except FileExistsError:
            held = self._read(key.name, key.generation)
            if hmac.compare_digest(held.secret, key.secret) and origin != "created":
                return self.info(key.name, key.generation)
            raise KeyExistsError(f"{key.name!r} has the id {held.key_id}") from None
        return self.info(key.name, key.generation)

    def _import(self, key: TenantKey, origin: Literal["imported", "released"]) -> KeyInfo:
        """Another generation of a key that is held must say that it follows one of those."""
        held = [self._read(key.name, g) for g in self._files().get(key.name, [])]
        related = any(
            key.key_id in (record.key_id, record.replaces) or record.key_id == key.replaces
            for record in held
        )
        if held and not related:
            raise KeyExistsError(
                f"{key.name!r} has the id {held[-1].key_id}, this one {key.key_id}: "
                "'--name' keeps it under another name"
            )
        return self._store(key, origin)

    def create(self, name: str) -> KeyInfo:
        """Make a new random key. An existing one is never replaced."""
        if held := self._files().get(name):
            raise KeyExistsError(f"{name!r} has the id {self._read(name, held[-1]).key_id}")
        return self._store(TenantKey(name, secrets.token_bytes(KEY_BYTES), self._now()), "created")

    def names(self) -> list[str]:
        return list(self._files())

    def info(self, name: str, generation: int | None = None) -> KeyInfo:
        """What may be shown of a key (default: of its current generation)."""
        records = self._all(name)
        current = self._current(name)
        chosen = current
        if generation is not None:
            chosen = next((r for r in records if r.generation == generation), current)
            if chosen.generation != generation:
                raise UnknownKeyError(f"{name!r} has no generation {generation} here")
        state: Literal["current", "old", "pending"] = "old"
        if chosen.pending:
            state = "pending"
        elif chosen.generation == current.generation:
            state = "current"
        return KeyInfo(
            chosen.name, chosen.key_id, chosen.created, chosen.origin, chosen.verified,
            chosen.generation, state,
        )  # fmt: skip

    def list(self) -> list[KeyInfo]:
        return [
            self.info(name, number) for name, numbers in self._files().items() for number in numbers
        ]

    def get(self, name: str) -> TenantKey:
        """The current generation of a key."""
        return self._current(name).key

    def find(self, key_id: str) -> TenantKey:
        """The key of an id, of whatever generation; UnknownKeyError names the id when none has
        it."""
        for name, numbers in self._files().items():
            for number in numbers:
                record = self._read(name, number)
                if record.key_id == key_id:
                    return record.key
        raise UnknownKeyError(f"the key with id {key_id}: import it or have it released")

    def export(
        self,
        name: str,
        passphrase: str | None = None,
        *,
        generation: int | None = None,
        scrypt_n: int = _SCRYPT_N_DEFAULT,
    ) -> str:
        """Armored text of a key (default: its current generation), for a file outside this
        site."""
        number = self._current(name).generation if generation is None else generation
        return export_text(self._read(name, number).key, passphrase, scrypt_n)

    def import_key(
        self, text: str, passphrase: str | None = None, *, name: str | None = None
    ) -> KeyInfo:
        """Take in an exported key, under its own name or another."""
        key = import_text(text, passphrase)
        if name is not None:
            key = replace(key, name=name)
        return self._import(key, "imported")

    # ---- generations -----------------------------------------------------------------

    def pending(self, name: str) -> KeyInfo | None:
        """The generation that waits to be activated, if there is one."""
        newest = self._all(name)[-1]
        return self.info(name, newest.generation) if newest.pending else None

    def add_generation(self, name: str) -> KeyInfo:
        """Make a new random generation of a key: pending, so that nothing depends on it yet."""
        newest = self._all(name)[-1]
        if newest.pending:
            raise KeyExistsError(f"generation {newest.generation} of {name!r} is pending already")
        key = TenantKey(
            name, secrets.token_bytes(KEY_BYTES), self._now(), newest.generation + 1, newest.key_id
        )
        return self._store(key, "created", pending=True)

    def activate(self, name: str, generation: int) -> KeyInfo:
        """Make a pending generation the current one, durably."""
        record = self._read(name, generation)
        if record.pending:
            used = msgspec.structs.replace(record, pending=False)
            write_atomic(self._path(name, generation), msgspec.json.encode(used), 0o600)
        return self.info(name, generation)

    def verify(self, name: str, text: str, passphrase: str | None = None) -> KeyInfo:
        """Compare an export, read back from where it is kept, with the generation of the key
        held here that it is of; when they are equal, remember durably that and when it was."""
        records = self._all(name)
        read_back = import_text(text, passphrase)
        for record in records:
            if hmac.compare_digest(read_back.secret, record.secret):
                checked = msgspec.structs.replace(record, verified=self._now())
                path = self._path(name, record.generation)
                write_atomic(path, msgspec.json.encode(checked), 0o600)
                return self.info(name, record.generation)
        raise TenantKeyError(
            f"the file holds the key {read_back.key_id}, but {name!r} here is "
            f"{', '.join(record.key_id for record in records)}"
        )

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
        return self._import(open_released(text), "released")
