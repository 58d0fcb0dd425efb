"""Move: this site takes a group over from a source that lives, and nothing is lost.

1. The history up to now is checked, with the key: order, digests, and the source's sealed tallies.
2. The source halts its guest and names the position of the last change (`vrep.source.halt`).
3. That position is the last durable one here, no gap is open, and a tally of the source covers it:
   every change up to it is here, in its order, as it was sealed. The point is that position.
4. The epoch is raised behind it, by the target process, which compares once more while nothing can
   come in: from here on the old source is refused, and its guest stays halted.
5. The view is served and kept, as of a failover that was committed.

A group of several lanes takes each step with all of them before the next: no lane is taken before
all are halted, so what is taken is all that any of them wrote. That holds as well when a lane that
was not taken yet went on, and is halted again: the last position of each lane is the point.

Whatever fails before 4 lets the guest go on; cut off there or later, the same command goes on. A
command that dies before 4 lets the guest go on as well, when its halt lapses.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from vrep import errors
from vrep.paths import SitePaths
from vrep.recovery import failover as failovers
from vrep.recovery.access import KeyAccess
from vrep.recovery.check import check_history
from vrep.recovery.failover import MOVED, Failover
from vrep.recovery.history import History
from vrep.recovery.view import ViewDirectory, ViewInfo, ViewProcess, discard
from vrep.target.manifest import EpochState, Position
from vrep.target.reader import StoreReader

__all__ = ["MOVED", "move", "move_all"]

ASK_EVERY_S: Final = 0.02
WAIT_S: Final = 120.0

Progress = Callable[[int, int], None]


class _Lane:
    """A group with one lane, or a lane, on its way."""

    def __init__(self, failover: Failover, onto: Mapping[str, str]) -> None:
        self.failover = failover
        self.onto = onto
        self.view: ViewDirectory | None = failover.view()
        self.claimed = False
        """whether this command made the view"""
        self.last: Position | None = None
        """its last change, once it is halted"""

    @property
    def name(self) -> str:
        return self.failover.held.name

    @property
    def point(self) -> Position:
        """Of its view, which there is."""
        assert self.view is not None
        return Position(*self.view.load().point)

    def taken(self) -> bool:
        """Whether the old source is refused."""
        if self.view is None:
            return False
        return self.view.load().state != "starting" or self.failover.provisional() is not None


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
    (view,) = move_all(paths, {group: onto or {}}, pause=pause, wait_s=wait_s, progress=progress)
    return view


def move_all(
    paths: SitePaths,
    groups: Mapping[str, Mapping[str, str]],
    *,
    pause: bool = False,
    wait_s: float = WAIT_S,
    progress: Progress | None = None,
) -> list[ViewInfo]:
    """`move` of all lanes of a group, by their ids or names, each with its disks that are filled
    in place; `wait_s` is for all of them."""
    lanes = [_Lane(Failover(paths, group), onto) for group, onto in groups.items()]
    for lane in lanes:
        _require_move(lane)
    if not any(lane.taken() for lane in lanes):
        for lane in lanes:
            if lane.view is not None:
                discard(lane.view)  # nothing had happened yet
                lane.view = None
    for lane in lanes:
        if lane.view is not None:
            lane.failover.require_of_now(lane.view.load())
    paths.make_run()
    left = [lane for lane in lanes if not lane.taken()]
    if left:
        _take_over(lanes, left, pause=pause, wait_s=wait_s, progress=progress)
    for lane in lanes:
        _serve(paths, lane)
    return [failovers.commit(paths, lane.failover.held.hex) for lane in lanes]


def _require_move(lane: _Lane) -> None:
    record = lane.view.load() if lane.view is not None else None
    if record is not None and (record.asked != MOVED or record.state == "rolling-back"):
        raise errors.StateError(
            f"a failover of {lane.name!r} is under way: commit it or roll it back first"
        )


def _serve(paths: SitePaths, lane: _Lane) -> None:
    """Step 5."""
    view = lane.view
    assert view is not None
    record = view.load()
    if record.state == "committed":
        return
    if record.state == "starting":
        entry = lane.failover.provisional()
        assert entry is not None
        view.change(epoch=entry.epoch, epoch_id=entry.epoch_id.hex())
    failovers.serve(view, ViewProcess(paths))


def _take_over(
    lanes: Sequence[_Lane],
    left: Sequence[_Lane],
    *,
    pause: bool,
    wait_s: float,
    progress: Progress | None,
) -> None:
    """Steps 1 to 4, of those lanes that are `left`."""
    for lane in left:
        lane.failover.require_other_writer()
        if not lane.failover.door.state()["source"]["connected"]:
            raise errors.UnreachableError(
                f"the source of {lane.name!r} is not connected: a move needs it, "
                "'vrep failover start' does not"
            )
    for lane in left:
        _check(lane.failover, progress)
    try:
        for lane in left:
            _keep_halted(left)
            lane.last = lane.failover.door.halt(pause=pause)
        _wait_durable(left, wait_s)
        for lane in left:
            _keep_halted(left)
            tallied = _check(lane.failover, None)
            if tallied != lane.last:
                raise errors.OmittedError(
                    f"the source's last change is {lane.last}, but its tallies cover {tallied}"
                )
        halt = secrets.token_hex(8)
        for lane in left:
            _choose(lane, halt)
        for lane in left:
            _keep_halted(left)
            assert lane.last is not None
            entry = lane.failover.door.raise_moved(lane.failover.site_id, lane.last)
            if entry.parent != lane.last or entry.state is not EpochState.PROVISIONAL:
                raise errors.StateError(
                    f"epoch {entry.epoch} of {lane.name!r} begins at {entry.parent}, but the "
                    f"source's last change is {lane.last}"
                )
            lane.last = None  # its halt is over
    except BaseException as error:
        if not _undo(lanes, left, error):
            raise


def _choose(lane: _Lane, halt: str) -> None:
    """The lane's view, at its last change in this halt. One that an earlier command made stays:
    the other lanes that were taken count on it."""
    assert lane.last is not None
    if lane.view is None:
        at = f"pos:{lane.last}"
        lane.view = failovers.choose(lane.failover, at, asked=MOVED, onto=lane.onto, halt=halt)
        lane.claimed = True
        return
    record = lane.view.load()
    failovers.check_onto(record, lane.onto)
    failovers.retarget(lane.failover, lane.view, record, lane.last, halt)


def _undo(lanes: Sequence[_Lane], left: Sequence[_Lane], error: BaseException) -> bool:
    """Let the guests of those lanes go on that were not taken; whether all were taken after all."""
    taken, unknown = len(lanes) - len(left), False
    for lane in left:
        try:
            raised = lane.failover.provisional()
            if raised is not None:
                # An answer that was lost does not undo what the target did. One that was raised
                # elsewhere is not this move's.
                taken += int(lane.view is not None and raised.parent == lane.point)
            elif lane.last is not None:
                lane.failover.door.go_on()
        except errors.VrepError:
            unknown = True
    if taken == len(lanes):
        return True
    if taken:
        names = ", ".join(lane.name for lane in lanes)
        raise errors.StateError(
            f"some of {names} were taken over, and not all: give 'vrep move' again, or "
            f"'vrep failover start' if the source is gone: {error}"
        ) from error
    for lane in left:
        if lane.claimed and lane.view is not None and not unknown:
            discard(lane.view)
    return False


def _keep_halted(lanes: Sequence[_Lane]) -> None:
    """The move is under way still, for those that were halted."""
    for lane in lanes:
        if lane.last is not None:
            lane.failover.door.keep_halted()


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


def _wait_durable(lanes: Sequence[_Lane], wait_s: float) -> None:
    """Until the last change of each is its last durable position here, and a recovery point."""
    deadline = time.monotonic() + wait_s
    while True:
        durable = [(lane, lane.failover.door.keep_halted()) for lane in lanes]
        late = [(lane, at) for lane, at in durable if lane.last is not None and at < lane.last]
        if not late:
            break
        if time.monotonic() > deadline:
            lane, at = late[0]
            raise errors.TimeLimitError(
                f"{at} is durable here after {wait_s:g} s, the last change is {lane.last}: the "
                "guest goes on"
            )
        time.sleep(ASK_EVERY_S)
    for lane in lanes:
        with StoreReader(lane.failover.paths.store, lane.failover.held.group_id) as reader:
            newest = History(reader).newest
        if newest != lane.last:
            raise errors.GapError(
                f"the newest recovery point is {newest}, the last change {lane.last}"
            )
