"""Releasing a tenant key: wrapped for one recovery host, and logged.

The wrap is ECIES over P-256: an ephemeral key agrees with the key of the
recipient's certificate, HKDF-SHA256 of the shared secret (bound to both public
keys) gives an AES-256-GCM key, and the headers are associated data.  Only the
holder of the certificate's private key can open it.

The log is append-only JSON lines.  Each line carries the SHA-256 of the line
before it, so a line that was changed, removed or moved is noticed; `read_log`
names it.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import NameOID

from vrep.durable import append_durable, make_private_directory
from vrep.keys import armor
from vrep.keys.errors import IdentityError, KeyFileError, TenantKeyError
from vrep.keys.identity import SiteIdentity, certificate_fingerprint, check_name, load_certificate
from vrep.keys.tenant import KEY_BYTES, TenantKey, tenant_key_id

__all__ = ["ReleaseEntry", "is_release", "open_released", "opener", "read_log", "release_key"]

RELEASE_KIND = "VREP RELEASED TENANT KEY"
_POINT_BYTES = 65  # uncompressed P-256 point
_NONCE_BYTES = 12


class ReleaseEntry(msgspec.Struct, frozen=True):
    """One line of the log."""

    time: datetime.datetime
    key_name: str
    key_id: str
    recipient: str
    recipient_fingerprint: str
    reason: str
    previous: str
    """SHA-256 of the line before, hex; 64 zeroes in the first"""


def _wrapping_key(shared: bytes, ephemeral: bytes, recipient: bytes) -> bytes:
    info = b"vrep tenant key release v1" + ephemeral + recipient
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=info).derive(shared)


def _point(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(
        serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
    )


def _lines(log: Path) -> list[bytes]:
    try:
        return log.read_bytes().splitlines()
    except FileNotFoundError:
        return []


def _append(log: Path, entry: ReleaseEntry) -> None:
    # A crash may have cut the last line: the new one must not continue it.
    torn = log.exists() and not log.read_bytes().endswith(b"\n") and log.stat().st_size > 0
    append_durable(log, (b"\n" if torn else b"") + msgspec.json.encode(entry) + b"\n")


def read_log(log: str | os.PathLike[str]) -> list[ReleaseEntry]:
    """All releases, oldest first. TenantKeyError names the first line that
    was changed, cut or taken away."""
    entries: list[ReleaseEntry] = []
    previous = "0" * 64
    for number, line in enumerate(_lines(Path(log)), 1):
        try:
            entry = msgspec.json.decode(line, type=ReleaseEntry)
        except msgspec.MsgspecError as error:
            raise TenantKeyError(f"line {number} of the release log is damaged: {error}") from None
        if entry.previous != previous:
            raise TenantKeyError(f"the release log was changed before its line {number}")
        previous = hashlib.sha256(line).hexdigest()
        entries.append(entry)
    return entries


def release_key(
    key: TenantKey, recipient_pem: str, *, log: Path, now: datetime.datetime, reason: str = ""
) -> str:
    """The armored text that hands `key` to the holder of `recipient_pem`."""
    try:
        certificate = load_certificate(recipient_pem)
    except IdentityError as error:
        raise TenantKeyError(f"the key cannot be released for this recipient: {error}") from None
    public = certificate.public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)  # load_certificate refuses others
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    recipient = str(names[0].value) if names else ""
    fingerprint = certificate_fingerprint(certificate)
    headers = {
        "Version": str(armor.ARMOR_VERSION),
        "Name": key.name,
        "Key-Id": key.key_id,
        "Created": key.created.isoformat(),
        "Released": now.isoformat(),
        "Recipient": fingerprint,
    }
    ephemeral = ec.generate_private_key(ec.SECP256R1())
    point = _point(ephemeral.public_key())
    nonce = secrets.token_bytes(_NONCE_BYTES)
    wrapping = _wrapping_key(ephemeral.exchange(ec.ECDH(), public), point, _point(public))
    sealed = AESGCM(wrapping).encrypt(nonce, key.secret, armor.headers_bytes(RELEASE_KIND, headers))
    text = armor.encode(RELEASE_KIND, headers, point + nonce + sealed)
    make_private_directory(log.parent)
    # Two releases at once must not both follow the same line.
    with log.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lines = _lines(log)
        previous = hashlib.sha256(lines[-1]).hexdigest() if lines else "0" * 64
        _append(
            log, ReleaseEntry(now, key.name, key.key_id, recipient, fingerprint, reason, previous)
        )
    return text


def is_release(text: str) -> bool:
    """Whether a file holds a released key, and not an exported one."""
    return f"-----BEGIN {RELEASE_KIND}-----" in text


def open_released(text: str, identity: SiteIdentity) -> TenantKey:
    """Open a key that was released for this identity."""
    block = armor.decode(text, RELEASE_KIND)
    if block.header("Version") != str(armor.ARMOR_VERSION):
        raise KeyFileError(
            f"the released key has version {block.header('Version')}; "
            f"this release reads {armor.ARMOR_VERSION}"
        )
    if block.header("Recipient") != identity.fingerprint:
        raise TenantKeyError(
            f"the key was released for the host with certificate {block.header('Recipient')}, "
            f"not for this one ({identity.fingerprint})"
        )
    if len(block.body) != _POINT_BYTES + _NONCE_BYTES + KEY_BYTES + 16:
        raise KeyFileError("the released key is cut short")
    point = block.body[:_POINT_BYTES]
    nonce = block.body[_POINT_BYTES : _POINT_BYTES + _NONCE_BYTES]
    private = identity.private_key()
    try:
        ephemeral = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
        wrapping = _wrapping_key(
            private.exchange(ec.ECDH(), ephemeral), point, _point(private.public_key())
        )
        secret = AESGCM(wrapping).decrypt(
            nonce,
            block.body[_POINT_BYTES + _NONCE_BYTES :],
            armor.headers_bytes(RELEASE_KIND, block.headers),
        )
        name = check_name("key", block.header("Name"))
        created = datetime.datetime.fromisoformat(block.header("Created"))
    except InvalidTag:
        raise KeyFileError("the released key was changed on its way") from None
    except (IdentityError, ValueError) as error:
        raise KeyFileError(f"the released key is damaged: {error}") from None
    if tenant_key_id(secret) != block.header("Key-Id"):
        raise KeyFileError("the released key is not the one that its Key-Id names")
    return TenantKey(name, secret, created)


def opener(identity: SiteIdentity) -> Callable[[str], TenantKey]:
    """`open_released` for one identity, as `TenantKeyring.import_released` takes it."""
    return lambda text: open_released(text, identity)
