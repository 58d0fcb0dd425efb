"""The groups that a target knows: one `GroupHost` each, while there is something to know of it.

A peer may name any id. One of which nothing is stored is forgotten when the last of those who use
its host leaves; whoever uses it meanwhile, or comes while it is known, has the same host, so that
a store is never opened through two. Any thread; the lock is held for no I/O.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

from vrep.errors import InvalidError, NotFoundError
from vrep.target.receive import GroupHost

__all__ = ["GROUP_ID", "GroupHosts"]

GROUP_ID: Final = re.compile(r"[0-9a-f]{32}")


class GroupHosts:
    """The hosts of a target by the ids of their groups."""

    def __init__(self, make: Callable[[bytes], GroupHost]) -> None:
        self._make = make
        self._known: dict[bytes, GroupHost] = {}
        self._users: Counter[GroupHost] = Counter()
        self._lock = threading.Lock()

    def get(self, group_id: bytes) -> GroupHost | None:
        """To look at; it may be forgotten at any moment."""
        with self._lock:
            return self._known.get(group_id)

    def all(self) -> list[GroupHost]:
        """To look at, as they are now."""
        with self._lock:
            return list(self._known.values())

    @contextlib.contextmanager
    def use(self, group_id: bytes) -> Iterator[GroupHost]:
        """The host of a group, made if it is not known."""
        with self._lock:
            host = self._known.get(group_id)
            if host is None:
                host = self._known[group_id] = self._make(group_id)
            self._users[host] += 1
        with self._left(host):
            yield host

    @contextlib.contextmanager
    def find(self, wanted: str) -> Iterator[GroupHost]:
        """The host of a group named by its id, or by its name if that is unique."""
        with self._lock:
            host = self._known.get(bytes.fromhex(wanted)) if GROUP_ID.fullmatch(wanted) else None
            found = [host] if host else [one for one in self._known.values() if one.name == wanted]
            if len(found) > 1:
                raise InvalidError(f"several groups are named {wanted!r}: use the group's id")
            if not found:
                raise NotFoundError(f"no group {wanted!r} is stored here")
            self._users[found[0]] += 1
        with self._left(found[0]):
            yield found[0]

    @contextlib.contextmanager
    def _left(self, host: GroupHost) -> Iterator[None]:
        """Uncount a user at the end; nobody can begin to use the host in that moment."""
        try:
            yield
        finally:
            with self._lock:
                self._users[host] -= 1
                if not self._users[host]:
                    del self._users[host]
                    if host.vacant:
                        self._drop(host)

    def forget(self, host: GroupHost) -> None:
        """Its store was removed: who still uses it is refused."""
        with self._lock:
            self._drop(host)

    def _drop(self, host: GroupHost) -> None:
        if self._known.get(host.group_id) is host:
            del self._known[host.group_id]

    def clear(self) -> list[GroupHost]:
        """Forget all; those that were known, for who closes them."""
        with self._lock:
            hosts = list(self._known.values())
            self._known.clear()
            return hosts
