"""The short way into a recovery: `test start` and `failover start` in their plain form.

Their time counts from exec, and building the parser of the whole command line costs more than
what it parses. Anything but the plain form is left to that parser, which means the same by it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from vrep.app.cli_output import emit
from vrep.app.cli_view import view_text
from vrep.errors import NotFoundError

if TYPE_CHECKING:
    from vrep.recovery.view import ViewInfo


@dataclass
class Start:
    """What was asked for."""

    verb: str
    group: str = ""
    at: str = "latest"
    directory: str | None = None
    as_json: bool = False
    force: bool = False
    since: str | None = None

    def run(self, *, fresh: bool = False) -> None:
        """Start the view, print it. `fresh`: this process was made for nothing else."""
        from vrep.paths import SitePaths

        SitePaths.of(self.directory).check_user()
        if fresh and self.verb == "test":
            from vrep.recovery import launch

            if launch.can_fork():
                try:
                    self._show(launch.fork_test(self.directory, self.group, self.at, self.since))
                    return
                except NotFoundError:
                    pass  # a group of several lanes is not one history: below
        from vrep.site import Site

        site = Site(self.directory)
        if self.verb == "test":
            view = site.test_start(self.group, self.at, since=self.since)
        else:
            view = site.failover_start(self.group, self.at, force=self.force, since=self.since)
        emit(view, self.as_json, lambda: view_text(view))

    def _show(self, view: dict[str, Any]) -> None:
        if self.as_json:
            print(json.dumps(view, indent=2, ensure_ascii=False))
            return
        shown = dict(view, disks=[SimpleNamespace(**disk) for disk in view["disks"]])
        print(view_text(cast("ViewInfo", SimpleNamespace(**shown))))


def parse(arguments: Sequence[str]) -> Start | None:
    """The request, when it has the plain form."""
    if len(arguments) < 3 or arguments[0] not in ("test", "failover") or arguments[1] != "start":
        return None
    start = Start(arguments[0])
    words = iter(arguments[2:])
    for word in words:
        name, equals, value = word.partition("=")
        if word == "--json":
            start.as_json = True
        elif word == "--force" and start.verb == "failover":
            start.force = True
        elif name in ("--at", "--dir", "--since"):
            given = value if equals else next(words, "")
            if not given:
                return None
            if name == "--at":
                start.at = given
            elif name == "--since":
                start.since = given
            else:
                start.directory = given
        elif word.startswith("-") or start.group:
            return None
        else:
            start.group = word
    return start if start.group else None


__all__ = ["Start", "parse"]
