"""Who may write: the rule by which a source is heard, and the one door to change it.

A source is heard when its epoch is the current one (the newest that was not abandoned) and
names its site as the writer. A source with an older epoch is fenced, unless the current one
is accepted, names it as the writer and begins inside what that source wrote: then it is told
the new epoch and goes on (so ends a failover that was rolled back).

`EpochDoor` changes epochs through the target process when it runs, else in the store itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vrep.control import ControlClient
from vrep.errors import LockedError, UnreachableError
from vrep.target.manifest import EpochEntry, EpochState, Manifest, Position
from vrep.target.store import GroupStore, StoreOptions
from vrep.wire import messages as m

HALT_S: Final = 60.0
"""longer than the target waits for the source's answer"""

__all__ = ["EpochDoor", "Verdict", "entry_of", "judge", "plain", "wire_epoch"]


@dataclass(frozen=True)
class Verdict:
    """What a source is told. `code` is empty when it is heard."""

    epoch: EpochEntry
    code: m.RefusalCode | None = None
    text: str = ""


def judge(manifest: Manifest, offer: m.EpochInfo, newest_seq: int, site_id: bytes) -> Verdict:
    """May the site write the group, with the epoch that it offers?"""
    current = manifest.current_epoch
    if not any(entry.writer == site_id for entry in manifest.epochs):
        return Verdict(current, "not-allowed", "the group belongs to another site")
    if offer.counter > current.epoch and offer.counter > manifest.epochs[-1].epoch:
        return Verdict(
            current,
            "invalid",
            f"epoch {offer.counter} is not known here: {manifest.epochs[-1].epoch} is the newest",
        )
    known = next((e for e in manifest.epochs if e.epoch == offer.counter), None)
    if known is None or known.epoch_id != offer.id:
        return Verdict(current, "fenced", f"epoch {offer.counter} is another one here")
    if current.writer != site_id or current.state is not EpochState.ACCEPTED:
        return Verdict(current, "fenced", f"epoch {current.epoch} took the group over")
    if known.epoch == current.epoch:
        return Verdict(current)
    if _parting(manifest, current, known.epoch) > newest_seq:
        return Verdict(
            current,
            "fenced",
            f"epoch {current.epoch} begins at {current.parent}, which this site did not write",
        )
    return Verdict(current)


def _parting(manifest: Manifest, current: EpochEntry, epoch: int) -> float:
    """The seq at which the current epoch's line left an older epoch of the same writer; past
    all when it did not, or when something was written between. Epochs between in which
    nothing was written are those of a writer that never learnt of them."""
    by_number = {entry.epoch: entry for entry in manifest.epochs}
    at = current.parent
    while at.epoch != epoch:
        between = by_number.get(at.epoch)
        if between is None or between.writer != current.writer or at.seq != between.parent.seq:
            return math.inf
        at = between.parent
    return at.seq


def wire_epoch(manifest: Manifest, entry: EpochEntry) -> m.EpochInfo:
    """An epoch as it is sent."""
    parent = next((e for e in manifest.epochs if e.epoch == entry.parent.epoch), None)
    at = entry.parent
    return m.EpochInfo(
        counter=entry.epoch,
        id=entry.epoch_id,
        parent=m.Position(epoch=at.epoch, lane=at.lane, seq=at.seq) if at.epoch else None,
        parent_id=parent.epoch_id if parent else None,
    )


def plain(entry: EpochEntry) -> dict[str, Any]:
    """An epoch as JSON."""
    return {
        "epoch": entry.epoch,
        "state": entry.state.name.lower(),
        "epoch_id": entry.epoch_id.hex(),
        "writer": entry.writer.hex(),
        "parent": list(entry.parent),
        "wall_ns": entry.wall_ns,
    }


def entry_of(raw: Mapping[str, Any]) -> EpochEntry:
    """An epoch from JSON."""
    return EpochEntry(
        epoch=int(raw["epoch"]),
        state=EpochState[str(raw["state"]).upper()],
        epoch_id=bytes.fromhex(raw["epoch_id"]),
        writer=bytes.fromhex(raw["writer"]),
        parent=Position(*(int(n) for n in raw["parent"])),
        wall_ns=int(raw["wall_ns"]),
    )


class EpochDoor:
    """Changes of a group's epochs, from any process of the target's site."""

    def __init__(self, stores: Path, target_socket: Path, group_id: bytes) -> None:
        """`stores` is the site's ``store``, `target_socket` the target's control socket."""
        self._stores = stores
        self._client = ControlClient(target_socket, timeout=30.0)
        self._group_id = group_id

    def _call(self, method: str, **params: Any) -> dict[str, Any] | None:
        """The target's answer; None when it does not run, or ended before it answered: it may
        have done what it was asked for, so whatever changes an epoch can be asked twice."""
        try:
            answer = self._client.call(method, group_id=self._group_id.hex(), **params)
        except UnreachableError:
            return None
        return dict(answer)

    def _store(self) -> GroupStore:
        try:
            return GroupStore.open(self._stores, self._group_id, options=StoreOptions(merge=False))
        except LockedError:
            raise LockedError("the store is written by a process that does not answer") from None

    def state(self) -> dict[str, Any]:
        """``epoch_state`` of the target process; the bare figures when it does not run."""
        answer = self._call("epoch_state")
        if answer is not None:
            return answer
        with self._store() as store:
            return epoch_state(store)

    def raise_epoch(
        self,
        *,
        writer: bytes,
        parent: Position | None = None,
        state: EpochState = EpochState.PROVISIONAL,
    ) -> EpochEntry:
        """Append an epoch that leaves its parent at `parent` (default: the last durable
        position). When it returns, no older writer is heard any more."""
        where = None if parent is None else list(parent)
        answer = self._call(
            "epoch_raise", writer=writer.hex(), parent=where, state=state.name.lower()
        )
        if answer is not None:
            return entry_of(answer)
        with self._store() as store:
            return store.raise_epoch(writer=writer, parent=parent, state=state)

    def halt(self, *, pause: bool) -> Position:
        """Let the source halt its guest, for a move; the position of its last change."""
        found = self._client.call(
            "halt", timeout=HALT_S, group_id=self._group_id.hex(), pause=pause
        )
        return Position(*(int(n) for n in found))

    def keep_halted(self) -> Position:
        """The move is under way still; the last durable position."""
        found = self._client.call("halted", group_id=self._group_id.hex())
        return Position(*(int(n) for n in found["durable"]))

    def go_on(self) -> None:
        """The move does not happen."""
        self._client.call("go_on", group_id=self._group_id.hex())

    def raise_moved(self, writer: bytes, last: Position) -> EpochEntry:
        """The epoch of a move: it begins behind the last change of the halted guest, which is
        `last`, or not at all."""
        answer = self._client.call(
            "epoch_raise",
            group_id=self._group_id.hex(),
            writer=writer.hex(),
            parent=list(last),
            halted=True,
        )
        return entry_of(answer)

    def accept(self, epoch: int) -> EpochEntry:
        """Commit a provisional epoch."""
        answer = self._call("epoch_accept", epoch=epoch)
        if answer is not None:
            return entry_of(answer)
        with self._store() as store:
            return store.accept_epoch(epoch)

    def roll_back(self, epoch: int) -> EpochEntry:
        """Abandon a provisional epoch; the new epoch of the writer before it."""
        answer = self._call("epoch_roll_back", epoch=epoch)
        if answer is not None:
            return entry_of(answer)
        with self._store() as store:
            return store.roll_back_epoch(epoch)


def epoch_state(store: GroupStore) -> dict[str, Any]:
    """Epochs and positions of a store. Of the source nothing is known: without a target process
    nobody hears it."""
    manifest = store.manifest
    return {
        "epochs": [plain(entry) for entry in manifest.epochs],
        "current": manifest.current_epoch.epoch,
        "received": list(store.received),
        "durable": list(store.durable),
        "source": {
            "connected": False,
            "site": "",
            "silent_s": None,
            "gone_in_s": None,
            "guest_clients": None,
            "seen_ns": 0,
            "state": "",
        },
    }
