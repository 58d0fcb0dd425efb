"""Groups whose history this site holds: found by name or id in DIR/store."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vrep.errors import IntegrityError, InvalidError, NotFoundError
from vrep.paths import SitePaths
from vrep.target.manifest import Manifest, load_newest

__all__ = ["HeldGroup", "find_group", "held_groups"]

_ID: Final = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class HeldGroup:
    """A group in the store of this site."""

    group_id: bytes
    name: str
    manifest: Manifest

    @property
    def hex(self) -> str:
        return self.group_id.hex()


def _load(store: Path, group_id: bytes) -> HeldGroup:
    manifest = load_newest(store / group_id.hex(), group_id)
    return HeldGroup(group_id, manifest.name, manifest)


def _ids(store: Path) -> list[bytes]:
    if not store.is_dir():
        return []
    return sorted(bytes.fromhex(e.name) for e in store.iterdir() if _ID.fullmatch(e.name))


def held_groups(paths: SitePaths) -> Iterator[tuple[bytes, HeldGroup | IntegrityError]]:
    """Every group by its id, as its newest manifest has it, or what is wrong with that."""
    for group_id in _ids(paths.store):
        try:
            yield group_id, _load(paths.store, group_id)
        except IntegrityError as error:
            yield group_id, error
        except NotFoundError:
            continue  # deleted since the listing, or never begun


def find_group(paths: SitePaths, text: str) -> HeldGroup:
    """The group of a name or id. Two sites may use one name: then the id is asked for."""
    if _ID.fullmatch(text):
        group_id = bytes.fromhex(text)
        if group_id in _ids(paths.store):
            return _load(paths.store, group_id)
    damaged: list[IntegrityError] = []
    matches: list[HeldGroup] = []
    for _, group in held_groups(paths):
        if isinstance(group, IntegrityError):
            damaged.append(group)
        elif group.name == text:
            matches.append(group)
    if len(matches) > 1:
        ids = ", ".join(group.hex for group in matches)
        raise InvalidError(f"{len(matches)} groups are called {text!r}: give an id: {ids}")
    if matches:
        return matches[0]
    if damaged:
        # It may be this one: its name cannot be read.
        raise damaged[0]
    raise NotFoundError(
        f"this site holds no history of a group {text!r}: it stands where the group is protected to"
    )
