"""Views that stay served: a view whose process died is started again while the site runs.

At once the first time, then after a growing pause. A site that starts takes up every view that
should be served, since its host may have been stopped in good order, and tries until it runs;
later a view whose process was told to end is left alone: a person, or a shutdown, meant it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from vrep.paths import SitePaths
from vrep.recovery.view import ViewDirectory, restart_views, view_directories

__all__ = ["ViewKeeper"]

PAUSE_FIRST_S: Final = 2.0
PAUSE_MAX_S: Final = 60.0
STEADY_S: Final = 120.0
"""who ran so long after a start is started again at once"""


class ViewKeeper:
    """Looks after the views of a site. Times are of a monotonic clock."""

    def __init__(self, paths: SitePaths, clock: Callable[[], float] = time.monotonic) -> None:
        self._paths = paths
        self._clock = clock
        self._to_take_up = {view.id for view in view_directories(paths)}
        """what this site found, until it ran once"""
        self._tried: dict[str, tuple[float, float]] = {}
        """of each view: when it was started last, and the pause after that"""

    def tend(self) -> list[str]:
        """Start again what is due; a line of text for each that could not be."""
        problems = restart_views(self._paths, self._due)
        running = {v.id for v in view_directories(self._paths) if v.holder() is not None}
        self._to_take_up -= running
        return problems

    def _due(self, view: ViewDirectory) -> bool:
        if view.was_told_to_end() and view.id not in self._to_take_up:
            return False
        now = self._clock()
        last, pause_s = self._tried.get(view.id, (float("-inf"), 0.0))
        if now - last < pause_s:
            return False
        steady = now - last > STEADY_S
        pause_s = PAUSE_FIRST_S if steady else min(pause_s * 2, PAUSE_MAX_S)
        self._tried[view.id] = (now, pause_s)
        return True
