"""Move: this site takes a group over from a source that lives, and nothing is lost.

1. The history up to now is checked, with the key: order, digests, and the source's sealed tallies.
2. The source halts its guest and names the position of the last change (`vrep.source.halt`).
3. That position is the last durable one here, no gap is open, and a tally of the source covers it:
   every change up to it is here, in its order, as it was sealed. The point is that position.
4. The epoch is raised behind it, by the target process, which compares once more while nothing can
   come in: from here on the old source is refused, and its guest stays halted.
5. The view is served and kept, as of a failover that was committed.

Whatever fails before 4 lets the guest go on; cut off there or later, the same command goes on. A
command that dies before 4 lets the guest go on as well, when its halt lapses.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Final

from vrep import errors
from vrep.paths import SitePaths
from vrep.recovery import failover as failovers
from vrep.recovery.access import KeyAccess
from vrep.recovery.check import check_history
from vrep.recovery.failover import Failover
from vrep.recovery.history import History
from vrep.recovery.view import ViewDirectory, ViewInfo, ViewProcess, discard
from vrep.target.manifest import EpochState, Position
from vrep.target.reader import StoreReader

__all__ = ["MOVED", "move"]

MOVED: Final = "move"
"""what was asked for, in the record of a view that a move made"""
ASK_EVERY_S: Final = 0.02
WAIT_S: Final = 120.0

Progress = Callable[[int, int], None]


def move(
    paths: SitePaths,
    group: str,
    *,
    pause: bool = False,
    wait_s: float = WAIT_S,
    onto: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> ViewInfo:
    """Take a group over from its source, without a loss. BusyError while clients use the disks
    there, unless `pause` cuts them off. `onto`: disks that are filled in place. `progress` hears
    the bytes of history that are checked; `wait_s` bounds how long the guest waits for its last
    change to become durable here."""
    failover = Failover(paths, group)
    view = failover.view()
    if view is not None and view.load().asked != MOVED:
        raise errors.StateError(
            f"a failover of {failover.held.name!r} is under way: commit it or roll it back first"
        )
    if view is not None and failover.provisional() is None:
        if view.load().state == "committed":
            return failovers.commit(paths, group)
        if view.load().state == "starting":
            discard(view)  # nothing had happened yet
            view = None
    paths.make_run()
    if view is None:
        view = _take_over(failover, onto or {}, pause=pause, wait_s=wait_s, progress=progress)
    record = view.load()
    if record.state == "starting":
        entry = failover.provisional()
        assert entry is not None
        view.change(epoch=entry.epoch, epoch_id=entry.epoch_id.hex())
    failovers.serve(view, ViewProcess(paths))
    return failovers.commit(paths, group)


def _take_over(
    failover: Failover,
    onto: Mapping[str, str],
    *,
    pause: bool,
    wait_s: float,
    progress: Progress | None,
) -> ViewDirectory:
    """Steps 1 to 4."""
    failover.require_other_writer()
    if not failover.door.state()["source"]["connected"]:
        raise errors.UnreachableError(
            f"the source of {failover.held.name!r} is not connected: a move needs it, "
            "'vrep failover start' does not"
        )
    _check(failover, progress)
    last = failover.door.halt(pause=pause)
    view = None
    try:
        _wait_durable(failover, last, wait_s)
        tallied = _check(failover, None)
        if tallied != last:
            raise errors.OmittedError(
                f"the source's last change is {last}, but its tallies cover {tallied}"
            )
        view = failovers.choose(failover, f"pos:{last}", asked=MOVED, onto=onto)
        failover.door.keep_halted()
        entry = failover.door.raise_moved(failover.site_id)
    except BaseException:
        with contextlib.suppress(errors.VrepError):
            # An answer that was lost does not undo what the target did.
            raised = failover.provisional()
            if raised is not None and view is not None and raised.parent == last:
                return view
            failover.door.go_on()
        if view is not None:
            discard(view)
        raise
    assert entry.parent == last
    assert entry.state is EpochState.PROVISIONAL
    return view


def _check(failover: Failover, progress: Progress | None) -> Position:
    """The position up to which the source's tallies agree with what is here. What is wrong with
    the history, or keeps it from being checked, is raised."""
    paths, held = failover.paths, failover.held
    with StoreReader(paths.store, held.group_id) as reader:
        access = KeyAccess.open(paths, held.group_id, reader.wrapped_keys)
        verdict = check_history(paths, reader, access, progress=progress)
        if not verdict.sealed or not verdict.tallied_to:
            raise errors.IntegrityError(f"the tallies of {held.name!r} could not be checked")
        return Position(*(int(n) for n in verdict.tallied_to.removeprefix("pos:").split("/")))


def _wait_durable(failover: Failover, last: Position, wait_s: float) -> None:
    """Until the last change is the last durable position here, and a recovery point."""
    deadline = time.monotonic() + wait_s
    while (durable := failover.door.keep_halted()) < last:
        if time.monotonic() > deadline:
            raise errors.TimeLimitError(
                f"{durable} is durable here after {wait_s:g} s, the last change is {last}: the "
                "guest goes on"
            )
        time.sleep(ASK_EVERY_S)
    with StoreReader(failover.paths.store, failover.held.group_id) as reader:
        newest = History(reader).newest
    if newest != last:
        raise errors.GapError(f"the newest recovery point is {newest}, the last change {last}")
