"""A role's process: ``python -m vrep.app.daemon ROLE DIR``. `vrep run` starts these."""

from __future__ import annotations

import ctypes
import signal
import sys
from pathlib import Path
from typing import Final, Protocol

import structlog

from vrep.app.log import setup_logs
from vrep.errors import UsageError, VrepError
from vrep.paths import SitePaths
from vrep.settings import Config, load_config
from vrep.wire.transport import Timeouts

M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3
KEPT_BYTES: Final = 128 << 20
"""of memory that a target received into: two windows of a group"""

log = structlog.get_logger("vrep.daemon")


class Role(Protocol):
    """What each role is to this process."""

    def start(self) -> None: ...

    def run(self) -> None: ...

    def request_stop(self) -> None: ...

    def close(self) -> None: ...


def timeouts(config: Config) -> Timeouts:
    """The limits of the network, from the settings."""
    network = config.network
    return Timeouts(
        connect_s=network.connect_s,
        handshake_s=network.connect_s,
        ping_after_s=network.ping_after_s,
        dead_after_s=network.dead_after_s,
    )


def keep_memory() -> None:
    """Let the C library use freed memory again instead of giving it back to the kernel: a fault
    for each page of each batch was a fifth of a target's work (mallopt(3); elsewhere nothing)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # larger ones are rare, and this is the most
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def build(role: str, paths: SitePaths, config: Config) -> Role:
    """The object that does a role's work; only that role's code is imported."""
    if role == "filter":
        from vrep.app.filterd import FilterHost

        return FilterHost(paths, config)
    if role == "bypass":
        from vrep.app.filterd import FilterHost

        return FilterHost(paths, _readable(paths), bypass_why="the filter does not start")
    if role == "source":
        from vrep.source.daemon import Source

        return Source(paths, config.source, timeouts=timeouts(config))
    if role == "target":
        from vrep.app.host_lanes import HostLanes
        from vrep.recovery.old_site import give_way
        from vrep.recovery.view import clients_here, points_in_use
        from vrep.target.daemon import Target

        keep_memory()
        return Target(
            paths,
            config,
            timeouts=timeouts(config),
            held=lambda group_id: points_in_use(paths, group_id),
            gives_way=lambda site_id, told: give_way(paths, site_id, told),
            clients=lambda group_id: clients_here(paths, group_id),
            lanes=HostLanes(paths).answer,
        )
    raise UsageError(f"no role {role!r}")


def _readable(paths: SitePaths) -> Config | None:
    try:
        return load_config(paths.config)
    except VrepError:
        return None


def main(arguments: list[str]) -> int:
    """Run one role until SIGTERM; its exit code. The role `bypass` is a filter that passes
    through, and needs no settings that can be read."""
    role, directory = arguments
    paths = SitePaths(Path(directory))
    config = (_readable(paths) or Config()) if role == "bypass" else load_config(paths.config)
    setup_logs(config.log, role)
    worker = build(role, paths, config)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.request_stop())
    try:
        worker.start()
        worker.run()
    finally:
        worker.close()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except VrepError as error:
        log.error("cannot run", error=str(error))
        sys.exit(error.exit_code)


__all__ = ["Role", "build", "main"]
