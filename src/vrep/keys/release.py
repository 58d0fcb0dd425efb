"""Releasing a tenant key: wrapped for one recovery host, and logged.

The wrap is ECIES over P-256: an ephemeral key agrees with the key of the
recipient's certificate, HKDF-SHA256 of the shared secret (bound to both public
keys) gives an AES-256-GCM key, and the headers are associated data.  Only the
holder of the certificate's private key can open it.

The log is append-only JSON lines.  Each line carries the SHA-256 of the line
before it, so a line that was changed, removed or moved is noticed; beside it
release.head says how many lines there are and what the last one is, so that
lines that were cut off are, too; `read_log` names it.  A line is durable, then
the head, then the key is handed out.
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

from vrep.durable import append_durable, make_private_directory, write_atomic
from vrep.keys import armor
from vrep.keys.errors import IdentityError, KeyFileError, TenantKeyError
from vrep.keys.identity import SiteIdentity, certificate_fingerprint, check_name, load_certificate
from vrep.keys.tenant import (
    KEY_BYTES,
    TenantKey,
    generation_headers,
    read_generation,
    tenant_key_id,
)

__all__ = ["ReleaseEntry", "is_release", "open_released", "opener", "read_log", "release_key"]

HEAD_VERSION = 1
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


class _Head(msgspec.Struct, frozen=True):
    """release.head: how far the log was when a key was handed out last."""

    version: int
    lines: int
    last: str
    """SHA-256 of that line, hex"""


def _read_head(log: Path) -> _Head | None:
    """None beside a log of an older release, or none."""
    try:
        head = msgspec.json.decode(log.with_suffix(".head").read_bytes(), type=_Head)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise TenantKeyError(f"the head of the release log is damaged: {error}") from None
    if head.version != HEAD_VERSION:
        raise TenantKeyError(f"the head of the release log has version {head.version}")
    return head


def _append(log: Path, entry: ReleaseEntry) -> None:
    """Append a line, durably, and then move the head."""
    append_durable(log, msgspec.json.encode(entry) + b"\n")
    lines = _lines(log)
    head = _Head(HEAD_VERSION, len(lines), hashlib.sha256(lines[-1]).hexdigest())
    write_atomic(log.with_suffix(".head"), msgspec.json.encode(head))


def _end_line(log: Path) -> None:
    """A crash cut the last line. Behind the head it belongs to no key that was handed out, and
    goes; else it is somebody's doing, stays, and is named by `read_log`."""
    head, lines = _read_head(log), _lines(log)
    if head is None or len(lines) <= head.lines:
        append_durable(log, b"\n")
        return
    with log.open("r+b") as file:
        file.truncate(log.stat().st_size - len(lines[-1]))
        os.fsync(file.fileno())


def read_log(log: str | os.PathLike[str]) -> list[ReleaseEntry]:
    """All releases, oldest first. TenantKeyError names the first line that
    was changed, cut or taken away."""
    path = Path(log)
    entries: list[ReleaseEntry] = []
    digests = ["0" * 64]
    for number, line in enumerate(_lines(path), 1):
        try:
            entry = msgspec.json.decode(line, type=ReleaseEntry)
        except msgspec.MsgspecError as error:
            raise TenantKeyError(f"line {number} of the release log is damaged: {error}") from None
        if entry.previous != digests[-1]:
            raise TenantKeyError(f"the release log was changed before its line {number}")
        digests.append(hashlib.sha256(line).hexdigest())
        entries.append(entry)
    head = _read_head(path)
    if head is not None and (head.lines > len(entries) or digests[head.lines] != head.last):
        raise TenantKeyError(
            f"the release log has {len(entries)} lines, and not those that it had when it had "
            f"{head.lines}: some were taken away at its end, or written anew"
        )
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
        **generation_headers(key),
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
        if log.exists() and not log.read_bytes().endswith(b"\n") and lines:
            _end_line(log)
            lines = _lines(log)
        previous = hashlib.sha256(lines[-1]).hexdigest() if lines else "0" * 64
        entry = ReleaseEntry(now, key.name, key.key_id, recipient, fingerprint, reason, previous)
        _append(log, entry)
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
    return TenantKey(name, secret, created, *read_generation(block))


def opener(identity: SiteIdentity) -> Callable[[str], TenantKey]:
    """`open_released` for one identity, as `TenantKeyring.import_released` takes it."""
    return lambda text: open_released(text, identity)
