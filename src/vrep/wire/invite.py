"""Invitations: how a site that nobody knows becomes a peer, once.

A token is base64url text that a person carries from one site to the other: the
inviting site's name, address and certificate fingerprint, a 16-byte secret,
an expiry, and a checksum.  The joining site pins the fingerprint, so nobody
between them can pose as the inviting site; it proves itself by the secret.
The inviting site keeps, in DIR/invites, only the secret's SHA-256.  Spending
a token renames its file, so of two attempts at once one wins.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from vrep.durable import make_private_directory, sync_directory, write_atomic
from vrep.errors import CorruptError, InvalidError, PeerError, VersionError
from vrep.wire.address import parse_address
from vrep.wire.stream import Clock, SystemClock

__all__ = ["Invite", "InviteBook", "InviteError", "decode_invite", "encode_invite"]

TOKEN_VERSION = 1
TOKEN_LETTERS_MAX = 1024
LIFETIME_S_DEFAULT = 24 * 3600
LIFETIME_S_MAX = 366 * 24 * 3600
_MAGIC = b"VRI"
_CHECK_BYTES = 4


class InviteError(PeerError):
    """The invitation cannot be used."""


class _Token(msgspec.Struct, frozen=True, array_like=True):
    name: Annotated[str, Meta(min_length=1, max_length=63)]
    address: Annotated[str, Meta(min_length=1, max_length=270)]
    fingerprint: Annotated[bytes, Meta(min_length=32, max_length=32)]
    secret: Annotated[bytes, Meta(min_length=16, max_length=16)]
    expires: Annotated[int, Meta(ge=0, le=(1 << 40))]


class _InviteFile(msgspec.Struct, frozen=True):
    version: int
    created: int
    expires: int


@dataclass(frozen=True)
class Invite:
    """What a token says. `expires` is seconds since 1970."""

    name: str
    address: str
    fingerprint: str
    secret: bytes = field(repr=False)
    expires: int


def encode_invite(invite: Invite) -> str:
    """The printable token."""
    body = msgspec.msgpack.encode(
        _Token(
            invite.name,
            invite.address,
            bytes.fromhex(invite.fingerprint),
            invite.secret,
            invite.expires,
        )
    )
    data = _MAGIC + bytes([TOKEN_VERSION]) + body
    data += hashlib.sha256(b"vrep invite" + data).digest()[:_CHECK_BYTES]
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def decode_invite(text: str) -> Invite:
    """Read a token. InviteError when it is mistyped, VersionError when it is
    of another release."""
    text = "".join(text.split())
    if len(text) > TOKEN_LETTERS_MAX:
        raise InviteError(f"a token has at most {TOKEN_LETTERS_MAX} letters")
    try:
        data = base64.b64decode(
            text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True
        )
    except (binascii.Error, ValueError):
        raise InviteError("it is not a token, or letters are missing") from None
    if len(data) < len(_MAGIC) + 1 + _CHECK_BYTES or not data.startswith(_MAGIC):
        raise InviteError("it is not a token of vrep")
    content, check = data[:-_CHECK_BYTES], data[-_CHECK_BYTES:]
    if hashlib.sha256(b"vrep invite" + content).digest()[:_CHECK_BYTES] != check:
        raise InviteError("it is mistyped or cut short")
    if content[3] != TOKEN_VERSION:
        raise VersionError(
            f"the token has version {content[3]}; this release reads {TOKEN_VERSION}"
        )
    try:
        token = msgspec.msgpack.decode(content[4:], type=_Token)
        parse_address(token.address)
    except (msgspec.MsgspecError, RecursionError, UnicodeError, InvalidError) as error:
        raise InviteError(f"it is damaged: {error}") from None
    return Invite(token.name, token.address, token.fingerprint.hex(), token.secret, token.expires)


class InviteBook:
    """The invitations that a site gave out, in DIR/invites."""

    def __init__(self, directory: str | os.PathLike[str], clock: Clock | None = None) -> None:
        self._where = Path(directory) / "invites"
        self._clock = clock or SystemClock()

    def _now(self) -> int:
        return self._clock.time_ns() // 1_000_000_000

    @staticmethod
    def _stem(secret: bytes) -> str:
        return hashlib.sha256(b"vrep invite secret" + secret).hexdigest()

    def create(
        self,
        *,
        name: str,
        address: str,
        fingerprint: str,
        lifetime_s: int = LIFETIME_S_DEFAULT,
    ) -> Invite:
        """A new invitation to the site of that name, address and certificate."""
        parse_address(address)
        if not 1 <= lifetime_s <= LIFETIME_S_MAX:
            raise InvalidError(
                f"an invitation lives 1 second to {LIFETIME_S_MAX // 86400} days, "
                f"not {lifetime_s} seconds"
            )
        self._purge()
        now = self._now()
        invite = Invite(name, address, fingerprint, secrets.token_bytes(16), now + lifetime_s)
        make_private_directory(self._where)
        record = _InviteFile(TOKEN_VERSION, now, invite.expires)
        path = self._where / f"{self._stem(invite.secret)}.open"
        write_atomic(path, msgspec.json.encode(record), 0o600, exclusive=True)
        return invite

    def _files(self) -> Iterator[tuple[Path, _InviteFile]]:
        for path in self._where.glob("[!.]*"):
            if path.suffix not in (".open", ".used"):
                continue
            try:
                yield path, self._read(path)
            except FileNotFoundError:
                continue  # spent or purged meanwhile

    @staticmethod
    def _read(path: Path) -> _InviteFile:
        try:
            record = msgspec.json.decode(path.read_bytes(), type=_InviteFile)
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise CorruptError(f"the invitation file {path.name}: {error}") from None
        if record.version != TOKEN_VERSION:
            raise VersionError(f"the invitation file {path.name} has version {record.version}")
        return record

    def pending(self) -> int:
        """How many invitations could still be used."""
        now = self._now()
        return sum(
            1 for path, file in self._files() if path.suffix == ".open" and file.expires > now
        )

    def _purge(self) -> None:
        now = self._now()
        for path, record in list(self._files()):
            # Kept for a while after its end, so that "expired" and "used" can be told apart.
            if record.expires + LIFETIME_S_DEFAULT < now:
                path.unlink(missing_ok=True)

    def redeem(self, secret: bytes) -> None:
        """Spend an invitation, durably, or say why not."""
        stem = self._stem(secret)
        path, used = self._where / f"{stem}.open", self._where / f"{stem}.used"
        try:
            record = self._read(path)
            if record.expires <= self._now():
                raise InviteError("it has expired: ask for a new one")
            path.rename(used)
        except FileNotFoundError:
            if used.exists():
                raise InviteError("it was used already: ask for a new one") from None
            raise InviteError("it is not known here: it was never given out, or long ago") from None
        sync_directory(self._where)
