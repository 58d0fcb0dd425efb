"""How the epochs of a group may change: rules over a manifest, which store nothing.

Whatever changes an epoch may be asked for twice: who did not hear the answer asks again.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from vrep.errors import InvalidError, StateError
from vrep.target.manifest import EpochEntry, EpochState, Manifest, Position

__all__ = ["check_horizon", "followed", "given_back", "left_at", "passes", "successor", "undecided"]

_ALL: Final = (1 << 64) - 1


def successor(
    manifest: Manifest,
    durable: Position,
    *,
    writer: bytes,
    parent: Position,
    state: EpochState,
    epoch_id: bytes | None,
    wall_ns: int,
) -> EpochEntry:
    """The next epoch, which leaves its parent at a durable position."""
    known = manifest.epoch(parent.epoch)
    if not manifest.keeps(parent):
        raise StateError(f"{parent} is not kept any more: the oldest point is {manifest.horizon}")
    if parent.epoch == durable.epoch and parent.seq > durable.seq:
        raise InvalidError(f"the parent {parent} is not durable: {durable} is")
    return EpochEntry(
        epoch=manifest.epochs[-1].epoch + 1,
        state=EpochState(state),
        epoch_id=epoch_id or secrets.token_bytes(16),
        writer=writer,
        parent=Position(known.epoch, manifest.lane, parent.seq),
        wall_ns=wall_ns,
    )


def undecided(
    manifest: Manifest, writer: bytes, parent: Position | None, state: EpochState
) -> EpochEntry | None:
    """The provisional epoch that a writer raised already, when it is the one that is asked for
    now. A writer has one at a time: StateError when it stands at another parent."""
    current = manifest.current_epoch
    if current.state is not EpochState.PROVISIONAL or current.writer != writer:
        return None
    if parent not in (None, current.parent) or state is not EpochState.PROVISIONAL:
        raise StateError(
            f"epoch {current.epoch} at {current.parent} is not decided yet: accept it or roll it "
            "back first"
        )
    return current


def given_back(
    manifest: Manifest, epoch: int, durable: Position, wall_ns: int
) -> tuple[EpochEntry, ...]:
    """The epochs after a provisional one is abandoned and the group goes back to the writer
    before it, in a new accepted epoch behind all that this writer has here. They are the same
    when that was done already."""
    given_up, current = manifest.epoch(epoch), manifest.current_epoch
    if given_up.state is EpochState.ABANDONED and current.epoch == epoch + 1:
        return manifest.epochs
    if given_up is not current:
        raise StateError(f"epoch {epoch} is not the current one")
    if given_up.state is not EpochState.PROVISIONAL:
        raise StateError(f"epoch {epoch} was committed")
    epochs = _without_trailing(manifest.epochs, given_up.writer)
    before = replace(manifest, epochs=epochs).current_epoch
    if durable.epoch > before.epoch:
        # Where its history would go on is not kept: no writer of a provisional epoch ships yet.
        raise StateError(f"epoch {durable.epoch} wrote records: it cannot be rolled back")
    own = durable.epoch == before.epoch
    entry = EpochEntry(
        epoch=epochs[-1].epoch + 1,
        state=EpochState.ACCEPTED,
        epoch_id=secrets.token_bytes(16),
        writer=before.writer,
        parent=Position(before.epoch, manifest.lane, durable.seq if own else before.parent.seq),
        wall_ns=wall_ns,
    )
    return (*epochs, entry)


def followed(known: tuple[EpochEntry, ...], told: Sequence[EpochEntry]) -> tuple[EpochEntry, ...]:
    """Epochs of a store with those that another site raised after them. What that site tells must
    go on from the newest that is known here, by number and id, and end with an accepted one:
    StateError else, since its history would be another one."""
    by_number = {entry.epoch: entry for entry in told}
    newest = known[-1]
    same = by_number.get(newest.epoch)
    if same is None or same.epoch_id != newest.epoch_id or same.writer != newest.writer:
        raise StateError(f"the other site's history does not go on from epoch {newest.epoch}")
    fresh = tuple(entry for entry in told if entry.epoch > newest.epoch)
    if [entry.epoch for entry in fresh] != sorted({entry.epoch for entry in fresh}):
        raise InvalidError("epochs rise")
    if any(entry.state is EpochState.PROVISIONAL for entry in told):
        raise StateError("the other site's failover is not committed")
    for entry in fresh:
        if not (entry.parent.epoch < entry.epoch and entry.parent.epoch in by_number):
            raise InvalidError(f"epoch {entry.epoch} begins at {entry.parent}, which is no parent")
    # What was provisional here was decided there.
    return (*known[:-1], replace(newest, state=same.state), *fresh)


def left_at(epochs: Sequence[EpochEntry], mine: int) -> Position:
    """Where the line of the newest of some epochs left that of an older one, of which it may be
    that nothing was written: the last position that both have. It lies before the older one's begin
    when a point of what stood before was taken, as after a failover that was rolled back.
    StateError when they have none."""
    newest, older = _positions(epochs, epochs[-1].epoch), _positions(epochs, mine)
    shared = newest.keys() & older.keys()
    if not shared:
        raise StateError(f"epoch {epochs[-1].epoch} does not go on from epoch {mine}")
    last = max(shared)
    return min(newest[last], older[last])


def _positions(epochs: Sequence[EpochEntry], number: int) -> dict[int, Position]:
    """The line of an epoch: the last position of each that it goes on from, and its own. Empty for
    one that is not among them."""
    by_number = {entry.epoch: entry for entry in epochs}
    if number not in by_number:
        return {}
    seq, at = _ALL, by_number[number].parent
    line = {number: Position(number, at.lane, seq)}
    while at.epoch:
        seq = min(seq, at.seq)
        line[at.epoch] = Position(at.epoch, at.lane, seq)
        if at.epoch not in by_number:
            break
        at = by_number[at.epoch].parent
    return line


def passes(epochs: Sequence[EpochEntry], mine: int) -> bool:
    """Whether the line of the newest of some epochs goes through another one of them."""
    return _line(epochs, mine).epoch == mine


def _line(epochs: Sequence[EpochEntry], mine: int) -> Position:
    """The first parent on the line of the newest epoch that is not behind `mine`, with the lowest
    seq on the way there."""
    by_number = {entry.epoch: entry for entry in epochs}
    at = epochs[-1].parent
    seq = at.seq
    while at.epoch > mine and at.epoch in by_number:
        at = by_number[at.epoch].parent
        seq = min(seq, at.seq)
    return Position(at.epoch, at.lane, seq)


def check_horizon(manifest: Manifest, horizon: Position) -> None:
    """StateError unless the horizon of a store may move there."""
    for entry in (manifest.accepted_epoch, manifest.current_epoch):
        line = dict(manifest.ancestry(manifest.end_of(entry.epoch)))
        if horizon.seq > line.get(horizon.epoch, 0):
            raise StateError(f"epoch {entry.epoch} left its parents before {horizon}")
    if not manifest.keeps(horizon):
        raise StateError(f"{horizon} is before the oldest point that is kept, {manifest.horizon}")


def _without_trailing(epochs: Sequence[EpochEntry], writer: bytes) -> tuple[EpochEntry, ...]:
    """Epochs, with those provisional ones of a writer abandoned behind which nothing stands: the
    group never goes back to the one who gives it up."""
    kept = list(epochs)
    for at in reversed(range(len(kept))):
        entry = kept[at]
        if entry.state is EpochState.PROVISIONAL and entry.writer == writer:
            kept[at] = replace(entry, state=EpochState.ABANDONED)
        elif entry.state is not EpochState.ABANDONED:
            break
    return tuple(kept)
