"""Settings of a site: ``config.toml`` in its directory. Every setting has a default.

Sizes are bytes, rates bytes a second, times seconds. The docstring under a field is its
documentation; the reference is generated from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from vrep.durable import write_atomic
from vrep.errors import ConfigError

Port = Annotated[str, Meta(max_length=270)]
Count = Annotated[int, Meta(ge=1, le=64)]
Size = Annotated[int, Meta(ge=0, le=1 << 50)]
Seconds = Annotated[float, Meta(gt=0, le=3600)]
Age = Annotated[float, Meta(gt=0, le=30 * 86400)]
Mode = Annotated[str, Meta(pattern=r"^0?[0-7]{3}$")]


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the file."""


class NetworkConfig(_Section, frozen=True, kw_only=True):
    """How this site meets others."""

    listen: Port = ""
    """host:port where other sites connect; empty: what `site init --listen` said"""
    advertise: Port = ""
    """host:port that invitations name, when it differs from `listen`"""
    connect_s: Seconds = 10.0
    """limit of a connection attempt"""
    ping_after_s: Seconds = 5.0
    """silence after which the peer is asked for a sign of life"""
    dead_after_s: Seconds = 20.0
    """silence after which the peer counts as dead"""


class FilterConfig(_Section, frozen=True, kw_only=True):
    """The process in the guests' I/O path."""

    shm_dir: str = "/dev/shm"
    """memory-backed directory of rings and change maps"""
    ring_bytes: Size = 256 << 20
    """ring of a new group: what it buffers before writes go unrecorded"""
    io_threads: Count = 2
    """threads of a group for I/O that blocks"""
    socket_mode: Mode = "0600"
    """of NBD sockets of new groups"""
    socket_group: str = ""
    """Unix group that owns NBD sockets of new groups; empty: the user's"""


class SourceConfig(_Section, frozen=True, kw_only=True):
    """The appliance that ships."""

    resync_rate: Size = 0
    """bytes a second that a first sync or resync may read; 0: unlimited"""
    bandwidth: Size = 0
    """bytes a second that all groups together may send, first syncs too; 0: unlimited"""
    compression: Annotated[int, Meta(ge=0, le=19)] = 1
    """zstd level of new groups; 0: off. Less is used while sealing is what holds shipping up"""
    spill_bytes: Size = 10 << 30
    """disk that each group may take for what its ring cannot keep while the target is slow or
    gone; 0: none, and a full ring is a gap at once"""
    spill_reserve_bytes: Size = 1 << 30
    """space that spilling leaves free on that disk"""
    cut_every_s: Annotated[float, Meta(ge=0, le=3600)] = 1.0
    """seconds between two cuts over the lanes of a group with several, which are its recovery
    points; 0: checkpoints only"""
    lane_gone_s: Annotated[float, Meta(ge=0, le=3600)] = 10.0
    """how long such cuts wait for a lane that is not served, before they are made without it"""
    spill_dir: str = ""
    """directory of the spills, each group's in one of its own; empty: in the site's directory"""


class TargetConfig(_Section, frozen=True, kw_only=True):
    """The appliance that receives and stores."""

    commit_s: Annotated[float, Meta(gt=0, le=1)] = 0.02
    """longest time that received records wait for their sync"""
    segment_bytes: Annotated[int, Meta(ge=1 << 20, le=1 << 30)] = 64 << 20
    """size at which a segment is closed and indexed"""
    window_bytes: Annotated[int, Meta(ge=1 << 20, le=1 << 30)] = 64 << 20
    """bytes of one group that may be on their way or not yet synced"""
    reserve_bytes: Size = 64 << 20
    """space kept back, so that recovery and folding work on a full disk"""
    group_reserve_bytes: Size = 64 << 20
    """of each group: space that the others leave to it when the disk becomes full"""
    fold_rate: Size = 64 << 20
    """bytes a second that folding old history may read and write; 0: unlimited"""
    source_gone_s: Annotated[float, Meta(ge=20, le=3600)] = 20.0
    """silence of a source after which a failover needs no --force; its own pauses last up to 15"""


class RecoveryConfig(_Section, frozen=True, kw_only=True):
    """Views of recovered disks."""

    fill_rate: Size = 0
    """bytes a second of background filling; 0: unlimited"""
    socket_mode: Mode = "0600"
    """of NBD sockets of views"""
    socket_group: str = ""
    """Unix group of NBD sockets of views, by name; empty: of the process"""


class VerifyConfig(_Section, frozen=True, kw_only=True):
    """Verifying the newest points of the groups that are held here, one at a time, at low priority,
    while the site runs. Off unless set: each verification reads a group's whole history."""

    every_h: Annotated[float, Meta(ge=0, le=8760)] = 0.0
    """hours after which a group is verified again; 24: daily; 0: off"""
    samples: Annotated[int, Meta(ge=0, le=100)] = 1
    """other points that are rebuilt as well"""
    file_systems: bool = True
    """e2fsck on every ext file system of the newest point"""
    command: str = ""
    """run by the shell on a view of the newest point; an exit status of 0 is good"""
    limit_s: Annotated[float, Meta(gt=0, le=7 * 86400)] = 3600.0
    """of each e2fsck, and of the command"""


class QuiesceConfig(_Section, frozen=True, kw_only=True):
    """`vrep checkpoint --quiesce`."""

    agent: str = ""
    """guest agent where neither the command nor an attached libvirt domain names one:
    unix:SOCKET or libvirt:NAME; `{group}` in it stands for the group's name"""
    limit_s: Annotated[float, Meta(ge=0.1, le=600)] = 10.0
    """how long a guest may be frozen; Windows thaws by itself after 10 seconds"""
    before: str = ""
    """run by the shell before the guest is frozen, with VREP_GROUP and VREP_LABEL; when it fails,
    nothing is marked"""
    after: str = ""
    """the same after the guest was thawed, also when something failed"""
    hook_limit_s: Seconds = 60.0
    """of each of these commands"""


class StatusConfig(_Section, frozen=True, kw_only=True):
    """When `vrep status --check` and `vrep_verdict` find that a target is too late."""

    rpo_warning_s: Age = 5.0
    """age of the oldest write not durable at a target from which it is a warning"""
    rpo_critical_s: Age = 30.0
    """age from which it is critical"""


class MetricsConfig(_Section, frozen=True, kw_only=True):
    """Prometheus."""

    listen: Port = ""
    """host:port of /metrics; empty: off"""


class LogConfig(_Section, frozen=True, kw_only=True):
    """Logs go to standard error."""

    format: Literal["auto", "json", "text"] = "auto"
    """auto: text on a terminal, JSON lines elsewhere"""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """lines below it are dropped"""


class Config(_Section, frozen=True, kw_only=True):
    """All settings."""

    network: NetworkConfig = NetworkConfig()
    filter: FilterConfig = FilterConfig()
    source: SourceConfig = SourceConfig()
    target: TargetConfig = TargetConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    verify: VerifyConfig = VerifyConfig()
    quiesce: QuiesceConfig = QuiesceConfig()
    status: StatusConfig = StatusConfig()
    metrics: MetricsConfig = MetricsConfig()
    log: LogConfig = LogConfig()


def load_config(path: Path) -> Config:
    """The settings of a file; all defaults when there is none."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Config()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    try:
        return msgspec.toml.decode(data, type=Config)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise ConfigError(f"{path}: {error}") from None


def set_listen(path: Path, listen: str) -> None:
    """Write a new settings file that says where the site listens; an existing one is kept."""
    if path.exists():
        raise ConfigError(f"{path} exists: set network.listen there")
    text = f"[network]\nlisten = {msgspec.json.encode(listen).decode()}\n"
    write_atomic(path, text.encode(), 0o600)


__all__ = ["Config", "LogConfig", "StatusConfig", "VerifyConfig", "load_config", "set_listen"]
