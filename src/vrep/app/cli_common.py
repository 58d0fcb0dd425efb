"""What commands share: options, and arguments with units."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from vrep.errors import InvalidError

if TYPE_CHECKING:
    from vrep.site import Site

Directory = Annotated[
    Path | None,
    typer.Option("--dir", metavar="DIR", help="The site's directory (VREP_DIR, /var/lib/vrep)."),
]
Json = Annotated[bool, typer.Option("--json", help="Answer in JSON; errors as well.")]
Group = Annotated[str, typer.Argument(metavar="GROUP", help="A protection group.")]
At = Annotated[
    str,
    typer.Option(
        "--at",
        metavar="POINT",
        help="latest, a label, an RFC 3339 time, -5m, or pos:EPOCH/LANE/SEQ.",
    ),
]
Since = Annotated[
    str | None,
    typer.Option(
        "--since",
        metavar="POINT",
        help="Offer what may differ from this point as a dirty bitmap over NBD.",
    ),
]

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", re.IGNORECASE)
_SHIFTS: Final = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)([smhdw]?)")
_SECONDS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
SIZE_MAX: Final = 1 << 50
DURATION_S_MAX: Final = 100 * 365 * 86400


def site_of(directory: Path | None) -> Site:
    from vrep.site import Site

    site = Site(directory)
    site.paths.check_user()
    return site


def parse_size(text: str) -> int:
    """Bytes of a size like 512, 64K, 1.5G (powers of 1024)."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidError(f"the size {_short(text)}: write bytes, or a number and K, M, G or T")
    size = float(match[1]) * (1 << _SHIFTS[match[2].upper()])
    if size > SIZE_MAX:  # so many digits that they are infinite, too
        raise InvalidError(f"the size {_short(text)}: at most {SIZE_MAX >> 40}T")
    return int(size)


def parse_duration(text: str) -> float:
    """Seconds of a time like 90, 30s, 10m, 24h, 7d."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise InvalidError(
            f"the time {_short(text)}: write seconds, or a number and s, m, h, d or w"
        )
    seconds = float(match[1]) * _SECONDS[match[2]]
    if seconds > DURATION_S_MAX:
        raise InvalidError(f"the time {_short(text)}: at most {DURATION_S_MAX // 86400}d")
    return seconds


def _short(text: str) -> str:
    """What was given, quoted, and no longer than an error can bear."""
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


__all__ = [
    "At",
    "Directory",
    "Group",
    "Json",
    "Since",
    "parse_duration",
    "parse_size",
    "site_of",
]
