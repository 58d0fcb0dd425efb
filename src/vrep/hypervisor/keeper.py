"""Keeper: watches the VMs that mirror their writes to this site's filter.

It runs beside the filter, in `vrep run`, and is what such a VM has instead of a path through the
filter: when the filter hangs it cuts the VM loose (until then the VM's writes wait); when a mirror
was interrupted it begins it again; when a gap could end it gives the barrier; when a write failed
at the VM's image it has it copied; when the VM is off it has the images compared. A filter that is
killed needs no keeper: its sockets close.

One thread. Times in seconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import msgspec
import structlog

from vrep import errors
from vrep.control import ControlClient
from vrep.groups import GroupDirectory
from vrep.hypervisor.mirrored import Mirrored
from vrep.hypervisor.monitor import EXECUTE_S, Monitor, open_monitor
from vrep.hypervisor.record import Attachment, AttachmentFile
from vrep.hypervisor.rest import Rest
from vrep.paths import SitePaths

EVERY_S: Final = 0.5
FILTER_S: Final = 1.5
"""a filter that does not answer for so long, twice, hangs"""
LATE_MAX: Final = 2
LOOK_S: Final = 2.0
"""how soon a write that failed at the VM's image is noticed"""
ASK_S: Final = 3.0
"""a VM that answers no question for so long may be waiting for a filter that hangs, which is found
by asking that one"""
SETTLE_S: Final = 300.0
"""a bitmap holds what was written for so long at least, and twice that at most"""
RETRY_MAX_S: Final = 5.0
OFF: Final = (errors.UnreachableError, errors.NotFoundError)
"""how a VM answers that is off, or whose monitor is elsewhere"""

log = structlog.get_logger("vrep.keeper")


@dataclass
class _Watch:
    """What is known of one group's mirror."""

    late: int = 0
    cut: bool = False
    """the VM was cut loose from a filter that hangs"""
    looked: float = 0.0
    settled: float = 0.0
    pause_s: float = 1.0
    not_before: float = 0.0
    told: str = ""
    rest: Rest | None = None
    """while its VM is off"""

    def wake(self) -> None:
        """The VM is back, or is not watched any more."""
        if self.rest is not None:
            self.rest.end()
        self.rest = None


class Keeper:
    """Of one site."""

    def __init__(self, paths: SitePaths) -> None:
        self._paths = paths
        self._groups = GroupDirectory(paths.root)
        self._filter = ControlClient(paths.socket("filter"), timeout=FILTER_S)
        self._watches: dict[str, _Watch] = {}
        self._process: tuple[int, int] | None = None
        """of the filter: its pid, and a descriptor of it"""

    def run(self, stopping: threading.Event) -> None:
        """Until `stopping`; nothing that goes wrong with one VM ends it."""
        try:
            while not stopping.wait(EVERY_S):
                self.tick()
        finally:
            for watch in self._watches.values():
                watch.wake()

    def tick(self) -> None:
        """Look once at each VM that mirrors."""
        names = [
            d.name for d in self._groups.readable() if d.mirrored and not (d.detached or d.fenced)
        ]
        for gone in set(self._watches) - set(names):
            self._watches[gone].wake()
        self._watches = {name: self._watches.get(name, _Watch()) for name in names}
        for name, watch in self._watches.items():
            try:
                self._look(name, watch)
            except Exception as error:  # noqa: BLE001 - the others are watched all the same
                text = str(error) if isinstance(error, errors.VrepError) else repr(error)
                if text != watch.told:
                    log.warning("a mirror is not as it should be", group=name, error=text)
                watch.told = text
                watch.not_before = time.monotonic() + watch.pause_s
                watch.pause_s = min(watch.pause_s * 2, RETRY_MAX_S)
            else:
                watch.pause_s, watch.told = 1.0, ""

    def _look(self, name: str, watch: _Watch) -> None:
        file = AttachmentFile(self._groups, name)
        with file.held(wait=False) as alone:
            record = file.load() if alone else None
            if record is not None and record.mode == "mirror":
                self._look_at(name, record, watch)

    def _look_at(self, name: str, record: Attachment, watch: _Watch) -> None:
        try:
            status = self._filter.call("status", group=name)
        except errors.TimeLimitError:
            watch.late += 1
            if watch.late >= LATE_MAX and not watch.cut:
                self._cut_loose(name, record)
                watch.cut = True
            return
        except errors.UnreachableError:
            return  # it is gone, and its sockets with it
        watch.late, watch.cut = 0, False
        self._know_filter()
        now = time.monotonic()
        if now < watch.not_before or not status["mirror"]:
            return
        if status["handover"] == "mirror":
            self._begin_or_rest(name, record, watch)
        elif status["mirror_rests"]:
            if now > watch.looked + LOOK_S:
                watch.looked = now
                try:
                    self._begin_again(name, record, watch)
                except OFF:
                    rest = self._rest(name, watch)
                    why = None if rest.reads() else rest.step()
                    if why is not None:
                        raise why from None
        elif status["mirror_waits"] or now > watch.settled + SETTLE_S:
            with self._mirrored(name, record) as mirrored:
                if mirrored.settle():
                    watch.settled = now
        elif now > watch.looked + LOOK_S:
            self._look_for_failures(name, record)
            watch.looked = now

    def _begin_or_rest(self, name: str, record: Attachment, watch: _Watch) -> None:
        """A VM that cannot be asked is off when nobody has its images open; the filter looks."""
        try:
            self._begin_again(name, record, watch)
        except OFF as error:
            why = self._rest(name, watch).step()
            if why is not None:
                error.detail += f"; and its disks are not compared as they are: {why}"
                raise error from None

    def _rest(self, name: str, watch: _Watch) -> Rest:
        if watch.rest is None:
            definition = self._groups.load(name)
            watch.rest = Rest(self._filter, definition, self._paths.nbd_socket(name))
        return watch.rest

    def _begin_again(self, name: str, record: Attachment, watch: _Watch) -> None:
        with self._mirrored(name, record) as mirrored:
            watch.wake()
            failures = mirrored.failures()
            told = mirrored.begin()
            self._remember(name, record, failures)
        log.info("a mirror goes on", group=name, copied="what was not sent" if told else "all")

    def _look_for_failures(self, name: str, record: Attachment) -> None:
        """Nothing of a write that failed is sent, and some of it may be on the image."""
        with self._mirrored(name, record, ASK_S) as mirrored:
            failures = mirrored.failures()
        if failures == record.failures:
            return
        # What changes the VM has the time that a monitor has: it may not be half done.
        log.warning("writes failed at the VM's image", group=name)
        with self._mirrored(name, record) as mirrored:
            if not mirrored.mark():
                self._filter.call("mirror_distrust", group=name)
            self._remember(name, record, failures)

    def _remember(self, name: str, record: Attachment, failures: int) -> None:
        if failures != record.failures:
            changed = msgspec.structs.replace(record, failures=failures)
            AttachmentFile(self._groups, name).store(changed)

    def _cut_loose(self, name: str, record: Attachment) -> None:
        """A QEMU that waits for its disks to be drained answers nobody: then the filter is ended,
        which hangs anyway, and its sockets close."""
        log.error("the filter hangs: a VM's mirror is cut, and it goes on", group=name)
        try:
            with self._mirrored(name, record, ASK_S) as mirrored:
                mirrored.cut()
        except errors.VrepError as error:
            log.error("the filter is killed: the VM cannot be asked", group=name, error=str(error))
            if self._process is not None:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._process[1], signal.SIGKILL)

    def _know_filter(self) -> None:
        """Which process the filter is, while it answers."""
        try:
            pid = int(self._filter.call("ping")["pid"])
            if self._process is not None and self._process[0] == pid:
                return
            fd = os.pidfd_open(pid)
        except (errors.VrepError, ProcessLookupError):
            return  # it is as it was
        if self._process is not None:
            os.close(self._process[1])
        self._process = (pid, fd)

    @contextlib.contextmanager
    def _mirrored(
        self, name: str, record: Attachment, limit_s: float = EXECUTE_S
    ) -> Iterator[Mirrored]:
        with contextlib.closing(open_monitor(record.vm, limit_s)) as monitor:
            yield self._of(monitor, name, record)

    def _of(self, monitor: Monitor, name: str, record: Attachment) -> Mirrored:
        socket = self._paths.nbd_socket(name)
        return Mirrored(monitor, self._filter, name, record.mirrors, socket)


__all__ = ["Keeper"]
