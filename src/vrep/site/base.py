"""A site's directory, and how its processes and targets are told."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec

from vrep import errors
from vrep.control import ControlClient
from vrep.groups import GroupDefinition, GroupDirectory, GroupOptions
from vrep.lanes import lanes_among
from vrep.paths import SitePaths
from vrep.settings import Config, load_config

if TYPE_CHECKING:
    from vrep.keys.identity import SiteIdentity
    from vrep.keys.tenant import TenantKeyring
    from vrep.wire.peers import PeerRegistry

__all__ = ["NOT_STORED", "SiteBase"]

NOT_STORED: Final = "not-found-error"
"""a target's answer about a group of which it holds nothing"""


class SiteBase:
    """See `vrep.Site`."""

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        self.paths = SitePaths.of(directory)

    @property
    def identity(self) -> SiteIdentity:
        from vrep.keys.identity import SiteIdentity

        return SiteIdentity.load(self.paths.root)

    @property
    def config(self) -> Config:
        return load_config(self.paths.config)

    @property
    def peers(self) -> PeerRegistry:
        from vrep.wire.peers import PeerRegistry

        return PeerRegistry(self.paths.root)

    @property
    def keys(self) -> TenantKeyring:
        from vrep.keys.tenant import TenantKeyring

        return TenantKeyring(self.paths.root)

    @property
    def groups(self) -> GroupDirectory:
        return GroupDirectory(self.paths.root)

    def lanes_of(self, group: str) -> list[str]:
        """What is protected here under a name: a group, a lane, or the lanes of a group."""
        names = list(self.groups.names())
        return [group] if group in names else lanes_among(group, names)

    def _of_group(self, group: str) -> list[str]:
        """`lanes_of`; NotFoundError when there are none."""
        found = self.lanes_of(group)
        if not found:
            raise errors.NotFoundError(f"no group {group!r} is protected here")
        return found

    def running(self, role: str = "filter") -> bool:
        """Whether a process of this site answers."""
        return ControlClient(self.paths.socket(role)).alive()

    def group_options(self, **changes: Any) -> GroupOptions:
        """The options of a new group as the settings have them, with changes."""
        config = self.config
        options = GroupOptions(
            ring_bytes=config.filter.ring_bytes,
            threads=config.filter.io_threads,
            rate_bytes_per_s=config.source.resync_rate,
            compression=config.source.compression,
            socket_mode=int(config.filter.socket_mode, 8),
            socket_group=config.filter.socket_group,
        )
        return msgspec.structs.replace(options, **changes)

    def options_of(self, group: str) -> GroupOptions:
        """The options of a protected group."""
        return self.groups.load(self._of_group(group)[0]).options

    def status(self, group: str | None = None) -> dict[str, Any]:
        """State, conditions, RPO and lag of all groups or one: what `vrep status --json` prints."""
        from vrep.status import collect

        return collect(self, group)

    def verdict(self, status: Mapping[str, Any]) -> tuple[int, list[str]]:
        """What `vrep status --check` makes of a status: 0 well, 1 warning, 2 critical, and why.
        The limits of the RPO are those of the settings."""
        from vrep.status import verdict

        return verdict(status, self.config.status)

    def _filter(self) -> ControlClient:
        return ControlClient(self.paths.socket("filter"))

    def _tell(self, role: str, method: str, **params: Any) -> bool:
        """Call a process of this site if it runs. False when it does not: then it reads the
        files when it starts."""
        try:
            ControlClient(self.paths.socket(role)).call(method, **params)
        except errors.UnreachableError:
            return False
        return True

    def _connected(self, group: str) -> bool:
        """Whether the group's session with its target stands."""
        try:
            found = ControlClient(self.paths.socket("source")).call("status", group=group)
        except (errors.UnreachableError, errors.NotFoundError):
            return False
        return bool(found[group]["connected"])

    def _clients(self, group: str) -> int:
        """NBD connections of a group; none when it is not served, whatever the reason."""
        try:
            return int(self._filter().call("status").get(group, {}).get("clients", 0))
        except errors.UnreachableError:
            return 0

    def _change(self, group: str, **changes: Any) -> None:
        self.groups.update(group, **changes)
        self._tell("source", "reload", group=group)

    def _tell_target(self, definition: GroupDefinition, method: str, params: dict[str, Any]) -> str:
        """Ask the target for something; why it could not be asked."""
        from vrep.wire.transport import PeerRefusedError

        try:
            self._ask_target(definition, method, params)
        except PeerRefusedError as error:
            return "" if error.code == NOT_STORED else str(error)
        except errors.VrepError as error:
            return str(error)
        return ""

    def _ask_target(self, definition: GroupDefinition, method: str, params: dict[str, Any]) -> Any:
        from vrep.wire.site import connect

        with connect(self.identity, self.peers.get(definition.to_site)) as transport:
            return transport.ask(method, {"group_id": definition.group_id, **params})
