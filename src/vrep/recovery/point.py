"""POINT: the ways to name a recovery point, told apart by their text alone.

Nothing here reads a history: what a text means in one is for `vrep.recovery.history`. Times are
nanoseconds since 1970, as records have them: 64 bits without a sign, so until 2554.
"""

from __future__ import annotations

import datetime
import re
from typing import Final, Literal

from vrep.errors import InvalidError

__all__ = ["Kind", "check_label", "kind_of", "parse_ago", "parse_position", "parse_time"]

Kind = Literal["latest", "position", "ago", "time", "label"]

NS: Final = 1_000_000_000
TIME_NS_MAX: Final = (1 << 64) - 1
LABEL_BYTES_MAX: Final = 255
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_AGO: Final = re.compile(r"-([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhdw])")
_POSITION: Final = re.compile(r"pos:([0-9]{1,10})/([0-9]{1,5})/([0-9]{1,20})")
_TIME: Final = re.compile(r"[0-9]{4}-[0-9][0-9]-[0-9][0-9][Tt ][0-9][0-9]:[0-9][0-9]")
_EPOCH: Final = datetime.datetime.fromtimestamp(0, datetime.UTC)


def kind_of(text: str) -> Kind:
    """What a POINT (without blanks around it) is meant to be, by how it begins; whether it is
    one is found when it is parsed."""
    if text == "latest":
        return "latest"
    if text.startswith("pos:"):
        return "position"
    if text.startswith("-"):
        return "ago"
    return "time" if _TIME.match(text) else "label"


def parse_position(text: str) -> tuple[int, int, int]:
    """Epoch, lane and seq of ``pos:EPOCH/LANE/SEQ``."""
    match = _POSITION.fullmatch(text)
    if match is None:
        raise _wrong(text)
    epoch, lane, seq = (int(part) for part in match.groups())
    return epoch, lane, seq


def parse_ago(text: str, now_ns: int) -> int:
    """The time that ``-5m`` means now."""
    match = _AGO.fullmatch(text)
    if match is None:
        raise _wrong(text)
    return _bounded(text, now_ns - int(float(match[1]) * _UNITS[match[2]] * NS))


def parse_time(text: str) -> int:
    """An RFC 3339 time."""
    try:
        moment = datetime.datetime.fromisoformat(text.upper())
    except ValueError:
        raise InvalidError(f"{text!r} is not an RFC 3339 time") from None
    if moment.tzinfo is None:
        raise InvalidError(f"the time {text!r} names no zone: add Z, or an offset like +02:00")
    since = moment - _EPOCH
    return _bounded(text, (since.days * 86400 + since.seconds) * NS + since.microseconds * 1000)


def check_label(label: str) -> str:
    """The label, when it can name a checkpoint: what is read as another kind of point, or
    without its blanks as another label, would recover something else, or nothing."""
    # Printable text holds no half of a surrogate pair, so it has bytes.
    if not label.isprintable() or not 0 < len(label.encode()) <= LABEL_BYTES_MAX:
        raise InvalidError(f"a label has 1 to {LABEL_BYTES_MAX} bytes of printable text")
    if label != label.strip():
        raise InvalidError(f"the label {label!r} begins or ends with a blank")
    if kind_of(label) != "label":
        raise InvalidError(f"the label {label!r} would read as another kind of point")
    return label


def _bounded(text: str, wall_ns: int) -> int:
    if not 0 <= wall_ns <= TIME_NS_MAX:
        raise InvalidError(f"the point {text!r}: a time lies between 1970 and 2554")
    return wall_ns


def _wrong(text: str) -> InvalidError:
    return InvalidError(
        f"the point {text!r}: use latest, a label, a time like 2026-01-31T12:00:00Z, "
        "-5m, or pos:EPOCH/LANE/SEQ"
    )
