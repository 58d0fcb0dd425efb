"""What is recovered, at the site that holds the history."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vrep import errors
from vrep.groups import GroupDefinition
from vrep.lanes import group_of, is_lane
from vrep.site.base import SiteBase

if TYPE_CHECKING:
    from vrep.recovery.changes import ChangeList
    from vrep.recovery.cuts import HeldLanes
    from vrep.recovery.export import ExportResult
    from vrep.recovery.fold import FoldResult
    from vrep.recovery.points import PointList
    from vrep.recovery.repair import RepairReport
    from vrep.recovery.untaken import Untaken
    from vrep.recovery.verify import VerifyOptions, VerifyReport
    from vrep.recovery.view import ViewInfo

__all__ = ["Recovery"]


class Recovery(SiteBase):
    """See `vrep.Site`."""

    def _require_group(self, group: str) -> None:
        """InvalidError for one of the lanes of a group that is taken as a whole."""
        if is_lane(group):
            raise errors.InvalidError(
                f"{group!r} is a lane: all lanes of {group_of(group)!r} go together"
            )

    def _lanes_held(self, group: str) -> HeldLanes | None:
        """The lanes of a group whose history this site holds, if it is one of several."""
        from vrep.recovery.cuts import find_lanes

        return find_lanes(self.paths, group)

    @contextlib.contextmanager
    def _locked(self, group: str) -> Iterator[HeldLanes | None]:
        """The lanes of a group that is taken over or given back as a whole, as in `_lanes_held`.
        LockedError while another command does so."""
        from vrep.recovery.held import find_group
        from vrep.recovery.lock import group_lock

        self._require_group(group)
        lanes = self._lanes_held(group)
        held = lanes.lanes[0] if lanes is not None else find_group(self.paths, group)
        if lanes is None:
            self._require_group(held.name)  # it was named by its id
        with group_lock(self.paths, held.group_id, group_of(held.name)):
            yield self._lanes_held(group)

    def points(
        self, group: str, *, progress: Callable[[int, int], None] | None = None
    ) -> PointList:
        """What can be recovered, and what cannot: points, gaps, marks, verdicts. `progress`
        hears the bytes of history that were checked, so far and in all."""
        from vrep.recovery.points import list_points

        if lanes := self._lanes_held(group):
            from vrep.recovery import joined

            return joined.points(self.paths, lanes, progress=progress)
        return list_points(self.paths, group, progress=progress)

    def changes(
        self, group: str, since: str, at: str = "latest", *, disk: str | None = None
    ) -> ChangeList:
        """Which bytes of the group's disks (or of one) may differ between two points, in blocks
        of 4 KiB, from the indexes alone. What is not in the list is equal at both. The order of
        the points does not matter, and they may lie on different branches of the history."""
        from vrep.recovery.changes import list_changes

        if lanes := self._lanes_held(group):
            from vrep.recovery import joined

            return joined.changes(self.paths, lanes, since, at, disk)
        return list_changes(self.paths, group, since, at, disk)

    def test_start(self, group: str, at: str = "latest", *, since: str | None = None) -> ViewInfo:
        """Serve the group's disks as they were, to try them; replication goes on. With `since`,
        another point, the NBD server offers what may differ from it as a dirty bitmap: see
        `ViewInfo.bitmap`."""
        from vrep.recovery.view import start_test

        if lanes := self._lanes_held(group):
            from vrep.recovery import joined

            return joined.serve(self.paths, lanes, at, since)
        return start_test(self.paths, group, at, since)

    def tests(self) -> list[ViewInfo]:
        """Views that are served here."""
        from vrep.recovery.view import list_views

        return list_views(self.paths)

    def test_stop(self, group: str) -> None:
        """End a test and delete what it wrote."""
        from vrep.recovery.view import stop_test

        stop_test(self.paths, group)

    def failover_start(
        self,
        group: str,
        at: str = "latest",
        *,
        force: bool = False,
        since: str | None = None,
        onto: Mapping[str, str] | None = None,
    ) -> ViewInfo:
        """Take the group over at a point: the old writer is refused from here on. Undo by
        `failover_rollback`, keep by `failover_commit`. `since`: as for `test_start`. `onto` maps
        names of disks to ``file:`` or ``block:`` URIs that are filled in place, over what they
        hold, while the VM runs."""
        from vrep.recovery.failover import start

        with self._locked(group) as lanes:
            if lanes is None:
                return start(self.paths, group, at, force=force, since=since, onto=onto)
            from vrep.recovery import joined_failover

            return joined_failover.failover_start(
                self.paths, lanes, at, force=force, since=since, onto=onto
            )

    def failover_commit(self, group: str) -> ViewInfo:
        from vrep.recovery.failover import commit

        with self._locked(group) as lanes:
            if lanes is None:
                return commit(self.paths, group)
            from vrep.recovery import joined_failover

            return joined_failover.failover_commit(self.paths, lanes)

    def failover_rollback(self, group: str) -> None:
        from vrep.recovery.failover import rollback

        with self._locked(group) as lanes:
            if lanes is None:
                rollback(self.paths, group)
                return
            from vrep.recovery import joined_failover

            joined_failover.failover_rollback(self.paths, lanes)

    def move(
        self,
        group: str,
        *,
        pause: bool = False,
        wait_s: float = 120.0,
        onto: Mapping[str, str] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> ViewInfo:
        """At the site that holds the history: take a group over from its source, which lives, and
        lose nothing; the source stays halted. Refused while a VM uses its disks there, unless
        `pause` cuts it off. `wait_s` bounds how long the last changes may take; `onto`: as for
        `failover_start`."""
        from vrep.recovery.move import move

        with self._locked(group) as lanes:
            if lanes is None:
                return move(
                    self.paths, group, pause=pause, wait_s=wait_s, onto=onto, progress=progress
                )
            from vrep.recovery import joined_failover

            return joined_failover.move(
                self.paths, lanes, pause=pause, wait_s=wait_s, onto=onto, progress=progress
            )

    def failback(
        self,
        group: str,
        *,
        pause: bool = False,
        wait_s: float = 120.0,
        discard_untaken: bool = False,
        moved: Callable[[ViewInfo], None] | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> GroupDefinition:
        """At the old site, once the group is protected back to it: return the group to it, onto
        the disks that it had here, and protect it to the other site again. `moved` hears of the
        view as soon as its VM may run here: the disks are filled meanwhile. Refused when those
        disks hold writes that were not taken over and not exported, unless `discard_untaken`."""
        from vrep.recovery.failback import failback
        from vrep.recovery.left import require_history

        if not self._lanes_held(group):
            require_history(self.paths, group)
        with self._locked(group) as lanes:
            if lanes is None:
                return failback(
                    self.paths, group, self.group_options(), pause=pause, wait_s=wait_s,
                    discard_untaken=discard_untaken, moved=moved, progress=progress,
                )  # fmt: skip
            from vrep.recovery import joined_failover

            return joined_failover.failback(
                self.paths, lanes, self.group_options(), pause=pause, wait_s=wait_s,
                discard_untaken=discard_untaken, moved=moved, progress=progress,
            )[0]  # fmt: skip

    def untaken(self, group: str) -> Untaken:
        """What this site wrote of a group that the site which took it over does not have."""
        from vrep.recovery.untaken import find_untaken, joined_untaken

        lanes = self._of_group(group)
        if lanes != [group]:
            return joined_untaken([find_untaken(self.paths, lane) for lane in lanes])
        return find_untaken(self.paths, group)

    def export_untaken(
        self,
        group: str,
        out: str | os.PathLike[str],
        *,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Untaken:
        """Write the disks of a group that was taken over as they are here, and the list of extents
        that were not taken, into new files of a directory. Refused while a VM uses them."""
        from vrep.recovery.untaken import export_untaken, joined_untaken

        lanes = self._of_group(group)
        if lanes != [group]:
            return joined_untaken(
                [export_untaken(self.paths, lane, Path(out), progress=progress) for lane in lanes]
            )
        return export_untaken(self.paths, group, Path(out), progress=progress)

    def reverse(
        self,
        group: str,
        *,
        to: str = "",
        progress: Callable[[int, int], None] | None = None,
    ) -> GroupDefinition:
        """Protect a recovered VM back to its old site, once its failover is committed: its disks
        become those of a protected group of this site. Its VM sees a pause, and finds its disks on
        the same sockets. Lanes of a group that came from several sites go back to them, each to its
        own, and none of those sites has points of all disks then; with `to`, the name of a site
        that joined, all go there. `progress` hears the bytes of its disks that are here, so far and
        in all: they must all be."""
        from vrep.recovery.reverse import reverse

        with self._locked(group) as lanes:
            if lanes is None:
                return reverse(self.paths, group, self.group_options(), to=to, progress=progress)
            from vrep.recovery import joined_failover

            return joined_failover.reverse(
                self.paths, lanes, self.group_options(), to=to, progress=progress
            )[0]

    def export(
        self,
        group: str,
        out: str | os.PathLike[str],
        *,
        at: str = "latest",
        format: str = "raw",
        sha256: bool = False,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> ExportResult:
        """Write the group's disks at a point into files of a directory. `progress` hears what
        is done ("check", then each disk's name), bytes so far, bytes in all."""
        from vrep.recovery.export import export

        if lanes := self._lanes_held(group):
            from vrep.recovery import joined

            return joined.export(
                self.paths, lanes, at, Path(out), format, progress=progress, sha256=sha256
            )
        return export(self.paths, group, at, Path(out), format, progress=progress, sha256=sha256)

    def verify(
        self,
        group: str,
        at: str = "latest",
        *,
        options: VerifyOptions | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> VerifyReport:
        """Prove that a point recovers: every object of the store, the point itself and a sample
        of others, the file systems on a view. The signed verdicts are kept and shown by `points`
        and `status`. What is wrong is in the report; `LockedError` while another one runs."""
        from vrep.recovery.verify import verify

        if lanes := self._lanes_held(group):
            from vrep.recovery import joined

            return joined.verify(self.paths, lanes, at, options=options, progress=progress)
        return verify(self.paths, group, at, options=options, progress=progress)

    def repair(self, group: str, *, resend: bool = False, start_over: bool = False) -> RepairReport:
        """At the site that holds a group's history, while its target process does not have it
        open: make indexes, and a damaged manifest, again from records that are whole. What is lost
        is in the report, and then nothing was changed. With `resend` what is sound before the
        first loss is kept, and the source sends again what differs from it; with `start_over` the
        damaged store is set aside, and the source sends everything again."""
        from vrep.recovery.repair import repair

        return repair(self.paths, group, resend=resend, start_over=start_over)

    def fold(self, group: str, at: str) -> FoldResult:
        """At the site that holds its history: keep the recovery points of a group from one on.
        Those before it cannot be had any more. Not of one lane of several: the points of a group
        begin where those of all its lanes do."""
        from vrep.recovery.fold import fold
        from vrep.recovery.held import find_group

        if lanes := self._lanes_held(group):
            from vrep.recovery import joined

            return joined.fold(self.paths, lanes, at)
        self._require_group(find_group(self.paths, group).name)
        return fold(self.paths, group, at)
