"""Verdicts: what a verification of a recovery point found, signed and kept, one file a point.

``DIR/verdicts/<group id>/<epoch>-<lane>-<seq>`` (hexadecimal) holds the newest verdict on that
point: a header (struct vrep_verdict_header), a body of JSON (`Finding`), and a signature by the
identity key of the site that verified. A changed byte is noticed, and so is a verdict that was
copied to another name.

A verdict speaks of one history: of a store, of the epochs below its point, and of the record at
the point. `judge` holds it against the history that is there now: one that is of another, that
was signed elsewhere, or that a newer verdict contradicts, is `void`, whatever it says. Times are
nanoseconds of this host's clock, sizes bytes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import numpy as np
import xxhash
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)

from vrep._core import layout
from vrep.checksum import CHECKSUM_BYTES, checksum32
from vrep.durable import make_private_directory, write_atomic
from vrep.errors import AuthError, CorruptError, IntegrityError, StorageError, VersionError
from vrep.keys.identity import SiteIdentity
from vrep.paths import SitePaths
from vrep.recovery.history import History, format_time
from vrep.target.manifest import Manifest, Position

__all__ = [
    "Check",
    "Damage",
    "Finding",
    "RebuiltDisk",
    "SignedVerdict",
    "VerdictBook",
    "VerdictInfo",
    "anchor_of",
    "decode",
    "encode",
    "history_of",
    "judge",
    "newest",
]

KEPT: Final = 128
"""verdicts of one group; older ones make room"""
DAMAGES_MAX: Final = 64
CHECKS_MAX: Final = 256
TEXT_LETTERS_MAX: Final = 2000
_HEADER: Final = layout.VERDICT_HEADER
_SIGNATURE_BYTES: Final = 64
_LABEL: Final = b"vrep verdict v1\0"
_CHECKSUM_AT: Final = _HEADER.itemsize - CHECKSUM_BYTES
_NAME: Final = re.compile(r"([0-9a-f]{8})-([0-9a-f]{4})-([0-9a-f]{16})")
FILE_BYTES_MAX: Final = _HEADER.itemsize + layout.VERDICT_BODY_BYTES_MAX + _SIGNATURE_BYTES


class Damage(msgspec.Struct, frozen=True):
    """An object of the store that cannot be trusted."""

    object: str
    """its file, or `history` when no single one is to blame"""
    first: str
    """pos:EPOCH/LANE/SEQ of the first record that it touches; empty: all"""
    last: str
    text: str


class Check(msgspec.Struct, frozen=True):
    """What looked at a view of the point."""

    what: str
    """e2fsck or command"""
    disk: str
    """which disk, or disk and partition; empty: all"""
    result: Literal["good", "bad", "skipped"]
    text: str


class RebuiltDisk(msgspec.Struct, frozen=True):
    """A disk of which every written byte was opened at the point."""

    name: str
    bytes: int
    data_bytes: int
    """that were ever written"""
    sha256: str
    """over the written ranges, each behind its offset and length"""


class Finding(msgspec.Struct, frozen=True):
    """The body of a verdict."""

    group: str
    time_ns: int
    """of the point, by the source's clock"""
    result: Literal["good", "intact", "bad"]
    """good: all objects are whole and every byte of the point was opened. intact: the objects
    are whole, but the tenant's key was not held, so nothing was opened."""
    site: str
    site_id: str
    fingerprint: str
    """of the certificate whose key signed"""
    manifest: int
    """number of the store's manifest then"""
    history: list[tuple[int, str, int]]
    """(epoch, its id, highest seq), newest first: the ancestry of the point"""
    anchor: str
    """SHA-256 of the record at the point; empty when it could not be read"""
    records: int
    tallies: int
    tallied_to: str
    """pos:EPOCH/LANE/SEQ: covered by a tally that agrees"""
    objects: dict[str, int]
    """how many of each kind were checked"""
    disks: list[RebuiltDisk] = []
    checks: list[Check] = []
    damages: list[Damage] = []
    note: str = ""
    seconds: float = 0.0
    folded_to: str = ""
    """pos:EPOCH/LANE/SEQ: what the target left out of the history up to here is not proven"""


@dataclass(frozen=True)
class SignedVerdict:
    """A verdict as it is kept."""

    group_id: bytes
    store_id: bytes
    position: Position
    wall_ns: int
    finding: Finding


class VerdictInfo(msgspec.Struct, frozen=True):
    """A verdict as it stands now."""

    point: str
    time: str | None
    """of the point; None when the verdict cannot be read"""
    state: str
    """good, intact, bad; void: not about this history; damaged: it cannot be read"""
    text: str
    """why it is not good"""
    made: str | None
    site: str
    checks: list[Check] = []
    damages: list[Damage] = []
    disks: list[RebuiltDisk] = []


# ---- bytes ------------------------------------------------------------------------------------


def _digest(data: bytes) -> bytes:
    return xxhash.xxh3_128_intdigest(data).to_bytes(16, "little")


def encode(verdict: SignedVerdict, key: ec.EllipticCurvePrivateKey) -> bytes:
    """The bytes of a verdict, signed by a key."""
    body = msgspec.json.encode(verdict.finding)
    if len(body) > layout.VERDICT_BODY_BYTES_MAX:
        raise ValueError(f"the body of a verdict has {len(body)} bytes")
    header = np.zeros(1, _HEADER)
    header["magic"], header["version"] = layout.VERDICT_MAGIC, layout.VERDICT_VERSION
    header["header_bytes"], header["body_bytes"] = _HEADER.itemsize, len(body)
    header["group_id"] = np.frombuffer(verdict.group_id, np.uint8)
    header["store_id"] = np.frombuffer(verdict.store_id, np.uint8)
    header["at"] = verdict.position.raw
    header["wall_ns"], header["signature_bytes"] = verdict.wall_ns, _SIGNATURE_BYTES
    header["digest"] = np.frombuffer(_digest(body), np.uint8)
    header["checksum"] = checksum32(header.tobytes()[:_CHECKSUM_AT])
    signed = header.tobytes() + body
    r, s = decode_dss_signature(key.sign(_LABEL + signed, ec.ECDSA(hashes.SHA256())))
    return signed + r.to_bytes(32, "big") + s.to_bytes(32, "big")


def decode(data: bytes, key: ec.EllipticCurvePublicKey | None) -> SignedVerdict:
    """Read a verdict back. CorruptError for damage, VersionError, and AuthError when it was not
    signed by this key (None: whoever signed)."""
    if len(data) < _HEADER.itemsize:
        raise CorruptError(f"{len(data)} bytes are no verdict")
    header = np.frombuffer(data[: _HEADER.itemsize], _HEADER)[0]
    if header["magic"] != layout.VERDICT_MAGIC:
        raise CorruptError("it does not begin as a verdict")
    if int(header["checksum"]) != checksum32(data[:_CHECKSUM_AT]):
        raise CorruptError("the header's checksum is wrong")
    if header["version"] != layout.VERDICT_VERSION:
        raise VersionError(f"version {int(header['version'])} of a verdict is not known")
    end = _HEADER.itemsize + int(header["body_bytes"])
    if (
        header["header_bytes"] != _HEADER.itemsize
        or header["signature_bytes"] != _SIGNATURE_BYTES
        or header["body_bytes"] > layout.VERDICT_BODY_BYTES_MAX
        or header["reserved"].any()
        or header["at"]["reserved"]
        or end + _SIGNATURE_BYTES != len(data)
    ):
        raise CorruptError("the header does not fit what follows")
    body = data[_HEADER.itemsize : end]
    if _digest(body) != header["digest"].tobytes():
        raise CorruptError("the body's digest is wrong")
    if key is not None:
        _verify(key, data[:end], data[end:])
    try:
        finding = msgspec.json.decode(body, type=Finding)
    except msgspec.MsgspecError as error:
        raise CorruptError(f"the body is no verdict: {error}") from None
    return SignedVerdict(
        group_id=header["group_id"].tobytes(),
        store_id=header["store_id"].tobytes(),
        position=Position.of(header["at"]),
        wall_ns=int(header["wall_ns"]),
        finding=finding,
    )


def _verify(key: ec.EllipticCurvePublicKey, signed: bytes, signature: bytes) -> None:
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    try:
        key.verify(encode_dss_signature(r, s), _LABEL + signed, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise AuthError("this site did not sign it, or it was changed") from None


# ---- files ------------------------------------------------------------------------------------


class VerdictBook:
    """The verdicts of one group at this site."""

    def __init__(self, paths: SitePaths, group_id: bytes) -> None:
        self.directory = paths.verdicts / group_id.hex()
        self._root = paths.root

    def path(self, position: Position) -> Path:
        return self.directory / f"{position.epoch:08x}-{position.lane:04x}-{position.seq:016x}"

    def positions(self) -> list[Position]:
        """Points that have a verdict, in order."""
        if not self.directory.is_dir():
            return []
        names = (_NAME.fullmatch(entry.name) for entry in self.directory.iterdir())
        return sorted(Position(*(int(part, 16) for part in m.groups())) for m in names if m)

    def store(self, verdict: SignedVerdict, identity: SiteIdentity) -> None:
        """Keep a verdict, durably, in the place of an older one on its point."""
        data = encode(verdict, identity.private_key())
        try:
            make_private_directory(self.directory)
            write_atomic(self.path(verdict.position), data)
            self._make_room()
        except OSError as error:
            raise StorageError(
                f"{self.directory}: the verdict is not kept: {error.strerror or error}"
            ) from None

    def _make_room(self) -> None:
        known = [(self.path(p).stat().st_mtime_ns, p) for p in self.positions()]
        for _time, position in sorted(known)[:-KEPT]:
            self.path(position).unlink(missing_ok=True)

    def load(self, position: Position, key: ec.EllipticCurvePublicKey | None) -> SignedVerdict:
        """The verdict on a point; IntegrityError names the file and what is wrong with it."""
        path = self.path(position)
        try:
            with path.open("rb") as file:
                data = file.read(FILE_BYTES_MAX + 1)
            found = decode(data, key)
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror or error}") from None
        except IntegrityError as error:
            raise type(error)(f"{path}: {error.detail}") from None
        if found.position != position or found.group_id.hex() != self.directory.name:
            raise CorruptError(f"{path}: it is the verdict on another point")
        return found

    def all(self) -> Iterator[tuple[Position, SignedVerdict | IntegrityError | StorageError]]:
        """Every verdict, or what is wrong with it."""
        key = SiteIdentity.load(self._root).certificate.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        for position in self.positions():
            try:
                yield position, self.load(position, key)
            except (IntegrityError, StorageError) as error:
                yield position, error


# ---- judgement --------------------------------------------------------------------------------


def history_of(manifest: Manifest, position: Position) -> list[tuple[int, str, int]]:
    """The ancestry of a point, with the ids of its epochs."""
    return [
        (epoch, manifest.epoch(epoch).epoch_id.hex(), seq)
        for epoch, seq in manifest.ancestry(position)
    ]


def anchor_of(history: History, position: Position) -> str:
    """What stands for the bytes at a point: the SHA-256 of its record, tags and all."""
    found = history.locate(position)
    if found is None:
        raise CorruptError(f"no record stands at {position}")
    return hashlib.sha256(history.reader.record(found.segment, found.at)).hexdigest()


def _why_void(
    found: SignedVerdict, manifest: Manifest, durable: Position | None, history: History | None
) -> str:
    """Why a verdict is not about the history that is there now; empty when it is."""
    position, finding = found.position, found.finding
    if found.group_id != manifest.group_id or found.store_id != manifest.store_id:
        return "it is about another store"
    known = {entry.epoch for entry in manifest.epochs}
    if position.epoch not in known or history_of(manifest, position) != finding.history:
        return "the epochs below the point are not those that were verified"
    line = dict(manifest.ancestry(manifest.end_of(manifest.accepted_epoch.epoch)))
    if not manifest.keeps(position):
        return f"what was before {manifest.horizon} was folded away"
    if position.seq > line.get(position.epoch, 0):
        return f"epoch {position.epoch} was given up at this point: it is not in the history"
    if manifest.number < finding.manifest:
        return "the store is older than the verdict: it was taken back"
    if durable is not None and position > durable:
        return f"the history ends at {durable}"
    if history is None or finding.result == "bad":
        return ""
    if not any(r.first <= position <= r.last for r in history.ranges):
        return "the point cannot be recovered any more"
    try:
        anchor = anchor_of(history, position)
    except IntegrityError as error:
        return f"the record at the point cannot be read: {error.detail}"
    return "" if anchor == finding.anchor else "another record stands at the point"


def _touches(damage: Damage, position: Position) -> bool:
    first = damage.first.removeprefix("pos:")
    return not first or Position(*(int(part) for part in first.split("/"))) <= position


def _info(found: SignedVerdict, state: str, text: str) -> VerdictInfo:
    finding = found.finding
    return VerdictInfo(
        point=f"pos:{found.position}",
        time=format_time(finding.time_ns) if finding.time_ns else None,
        state=state,
        text=text,
        made=format_time(found.wall_ns),
        site=finding.site,
        checks=finding.checks,
        damages=finding.damages,
        disks=finding.disks,
    )


def explain(finding: Finding) -> str:
    """Why a finding is not good, in one line."""
    words = [f"{d.object}: {d.text}" for d in finding.damages]
    words += [
        f"{c.what}{' of ' if c.disk else ''}{c.disk}: {c.text}"
        for c in finding.checks
        if c.result == "bad"
    ]
    if finding.note:
        words.append(finding.note)
    return "; ".join(words)


def judge(
    verdicts: Sequence[tuple[Position, SignedVerdict | IntegrityError | StorageError]],
    manifest: Manifest,
    durable: Position | None,
    history: History | None = None,
) -> list[VerdictInfo]:
    """Verdicts as they stand, by position. `durable` is the last durable position where it is
    known; with a `history` the record at each point is compared as well."""
    void: dict[Position, str] = {}
    last: SignedVerdict | None = None
    for position, found in verdicts:
        if isinstance(found, SignedVerdict):
            void[position] = _why_void(found, manifest, durable, history)
            if not void[position] and (last is None or found.wall_ns > last.wall_ns):
                last = found
    out = []
    for position, found in verdicts:
        if not isinstance(found, SignedVerdict):
            out.append(_unreadable(position, found))
            continue
        finding, why = found.finding, void[position]
        if not why and last is not None and finding.result != "bad":
            later = [d for d in last.finding.damages if _touches(d, position)]
            why = f"damage was found later: {later[0].object}: {later[0].text}" if later else ""
        out.append(_info(found, "void" if why else finding.result, why or explain(finding)))
    return out


def _unreadable(position: Position, error: IntegrityError | StorageError) -> VerdictInfo:
    return VerdictInfo(
        point=f"pos:{position}", time=None, state="damaged", text=str(error), made=None, site=""
    )


def newest(paths: SitePaths, manifest: Manifest, durable: Position | None) -> dict[str, Any] | None:
    """The verdict of a group that was made last, for its status; one that cannot be read comes
    before all others. None when there is none."""
    found = judge(list(VerdictBook(paths, manifest.group_id).all()), manifest, durable)
    if not found:
        return None
    chosen = max(found, key=lambda info: (info.state == "damaged", info.made or ""))
    answer: dict[str, Any] = msgspec.to_builtins(chosen)
    return answer
