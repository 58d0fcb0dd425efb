"""Power: a host with all that runs there loses it, and has it again.

Every process ends at once: commands, views and their keeper, too. Of what was not synced, each part
is there or not: of the store, of the disks and the state of a source, of the files of views.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kernel import Kernel

if TYPE_CHECKING:
    from hosts import Host
    from oracle import Oracle
    from sites import SourceSite, TargetSite
    from views import Views


class HostPower:
    """Of one host, and what stands there: what is None does not."""

    def __init__(
        self,
        host: Host,
        views: Views,
        target: TargetSite | None = None,
        source: SourceSite | None = None,
    ) -> None:
        self._host = host
        self._kernel: Kernel = host.kernel
        self.views = views
        self.target = target
        self.source = source
        self.before: list[list[bytes]] = []
        """what the source's disks held for their guest before each loss"""
        self.failures = 0

    def fail(self) -> None:
        """It is lost, and comes back after a while."""
        kernel, source = self._kernel, self.source
        self.failures += 1
        served = source is not None and source.group is not None
        oracle: Oracle | None = source.oracle if source is not None and served else None
        if oracle is not None:
            self.before.append([bytes(model) for model in oracle.model])
        torn: list[bool] = []
        kernel.call(lambda: torn.append(self._lose()))
        kernel.event("crash")
        kernel.event("host power")
        if torn[0]:
            kernel.event("torn write")
        if oracle is not None and source is not None:
            oracle.source_came_back(True, source.content)
        kernel.sleep(kernel.rng.random() * 2)
        self._start(served)

    def _lose(self) -> bool:
        torn = False
        self.views.step_some()
        if self.source is not None:
            if self.source.group is None:  # what its disks hold is a view's, or was synced
                self.source.stable = [path.read_bytes() for path in self.source.disks]
            self.source._lose_power()
            torn |= self.source.torn
        for process in self._host.running():
            self._kernel._kill(process)
        torn |= self.views.lose_power()
        if self.target is not None:
            torn |= self.target.lose_power()
        return torn

    def _start(self, served: bool) -> None:
        starts: list[Callable[[], None]] = [self.views.keep_again]
        if self.target is not None:
            starts.append(self.target.start)
        if self.source is not None:
            starts += [self.source.start_filter, self.source.start_source]
        self._kernel.rng.shuffle(starts)
        for start in starts:
            start()
            self._kernel.sleep(self._kernel.rng.random() * 0.2)
        source = self.source
        if source is not None and served:
            self._kernel.wait_until(lambda: source.group is not None, 10.0)


__all__ = ["HostPower"]
