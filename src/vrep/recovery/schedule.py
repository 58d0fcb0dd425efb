"""Schedule: a running site verifies its groups' newest points by itself.

``[verify] every_h`` says how old the newest verdict of a group may become. One group at a time, the
one that waited longest, in a process of its own (``python -m vrep.recovery.schedule DIR GROUP_ID``)
that gives way to everything else: nice 19, and idle where the disk's scheduler knows that. When
somebody else verifies at this site, or an attempt fails, the next comes later. Times are seconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Final

from vrep import errors
from vrep.lanes import lane_of
from vrep.paths import SitePaths
from vrep.recovery import joined
from vrep.recovery.cuts import find_lanes
from vrep.recovery.held import held_groups
from vrep.recovery.verdict import VerdictBook
from vrep.recovery.verify import VerifyOptions, verify
from vrep.settings import VerifyConfig, load_config

__all__ = ["VerifySchedule"]

LOOK_EVERY_S: Final = 60.0
AGAIN_S: Final = 3600.0
"""after an attempt that left no verdict"""
STOP_S: Final = 60.0
_IOPRIO_SET: Final = {"x86_64": 251, "aarch64": 30, "riscv64": 30, "ppc64le": 273}
_IDLE: Final = 3 << 13

log = logging.getLogger("vrep.recovery")


class VerifySchedule:
    """What is to be verified when. Wall times, since verdicts outlive this process."""

    def __init__(
        self, paths: SitePaths, config: VerifyConfig, clock: Callable[[], float] = time.time
    ) -> None:
        self._paths = paths
        self._every_s = config.every_h * 3600
        self._clock = clock
        self._tried: dict[bytes, float] = {}
        self._process: subprocess.Popen[bytes] | None = None

    def due(self) -> bytes | None:
        """The group whose newest verdict is the oldest, when it is older than it may be. A new
        store counts from its beginning."""
        if not self._every_s:
            return None
        now, waiting = self._clock(), []
        for group_id, held in held_groups(self._paths):
            if isinstance(held, errors.VrepError):
                continue  # the status says so; a verification could not say more
            if lane_of(held.name):
                continue  # it is verified with lane 0 of its group
            book = VerdictBook(self._paths, group_id)
            times = [held.manifest.epochs[0].wall_ns / 1e9]
            for position in book.positions():
                with contextlib.suppress(FileNotFoundError):
                    times.append(book.path(position).stat().st_mtime)
            last = max((t for t in times if t <= now), default=0.0)  # a clock may have gone back
            tried = self._tried.get(group_id, float("-inf"))
            if now - last >= self._every_s and now - tried >= min(AGAIN_S, self._every_s):
                waiting.append((last, group_id))
        return min(waiting)[1] if waiting else None

    def run(self, stopping: threading.Event, every_s: float = LOOK_EVERY_S) -> None:
        """Verify what is due, one after another, until told to stop; then what runs is ended, and
        takes its view down."""
        every_s = min(every_s, max(self._every_s, 1.0))
        while not stopping.wait(every_s):
            try:
                group_id = self.due()
                if group_id is not None:
                    self._verify(group_id, stopping)
            except (errors.VrepError, OSError) as error:
                log.error("nothing is verified: %s", error)

    def _verify(self, group_id: bytes, stopping: threading.Event) -> None:
        self._tried[group_id] = self._clock()
        process = subprocess.Popen(
            [sys.executable, "-m", "vrep.recovery.schedule", self._paths.root, group_id.hex()],
            stdin=subprocess.DEVNULL,
            cwd="/",
        )
        while process.poll() is None:
            if stopping.wait(0.2):
                process.terminate()
                try:
                    process.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                return
        if process.returncode < 0:
            name = signal.Signals(-process.returncode).name
            log.error("the verification of group %s was ended by %s", group_id.hex(), name)


def give_way() -> None:
    """Let everything else on the host go first."""
    os.nice(19)
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        ctypes.CDLL(None).syscall(number, 1, 0, _IDLE)  # ioprio_set(2) of this process


def main(arguments: list[str]) -> int:
    """Verify one group as the settings say: 0 good, 1 intact, 2 bad."""
    paths = SitePaths.of(arguments[0])
    config = load_config(paths.config)
    give_way()

    def stop(*_arguments: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)  # what is open is closed on the way

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    options = VerifyOptions(
        samples=config.verify.samples,
        file_systems=config.verify.file_systems,
        command=config.verify.command,
        limit_s=config.verify.limit_s,
    )
    lanes = find_lanes(paths, arguments[1])
    if lanes is not None:
        report = joined.verify(paths, lanes, options=options)
    else:
        report = verify(paths, arguments[1], options=options)
    asked = report.verdicts[0]
    if report.result == "bad":
        text = next(v.text for v in report.verdicts if v.state not in ("good", "intact"))
        log.error("group %s does not verify at %s: %s", report.group, asked.point, text)
        return 2
    log.info("group %s is %s at %s", report.group, report.result, asked.point)
    return 0 if report.result == "good" else 1


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        sys.exit(main(sys.argv[1:]))
    except errors.VrepError as error:
        log.error("not verified: %s", error)
        sys.exit(error.exit_code)
