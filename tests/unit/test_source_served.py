"""A group that its filter serves again is tried at once, not after its session's long wait."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from group_definition import definition

from vrep.control import ControlClient
from vrep.errors import UnreachableError
from vrep.groups import GroupDirectory
from vrep.keys.identity import SiteIdentity
from vrep.paths import SitePaths
from vrep.source import daemon
from vrep.source.session import GroupSession
from vrep.source.transitions import Transitions

SERVED: dict[str, Any] = {"web": {"clients": 0}}
REFUSED: dict[str, Any] = {"web": {"error": "Another process holds the lock"}}


def test_a_group_that_is_served_again_is_tried_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = SitePaths(tmp_path / "a")
    SiteIdentity.create(paths.root, "a")
    GroupDirectory(paths.root).store(definition())
    answer: dict[str, Any] | None = SERVED
    tried: list[str] = []

    def call(_client: ControlClient, _method: str, **_params: Any) -> Any:
        if answer is None:
            raise UnreachableError("the filter")
        return answer

    monkeypatch.setattr(ControlClient, "call", call)
    monkeypatch.setattr(GroupSession, "_loop", lambda self: self._stopping.wait())
    monkeypatch.setattr(Transitions, "look", lambda *_args: None)
    source = daemon.Source(paths)
    source._scan()
    reload = GroupSession.reload

    def noted(session: GroupSession) -> None:
        tried.append(session.name)
        reload(session)

    monkeypatch.setattr(GroupSession, "reload", noted)
    try:
        for answer, wanted in (
            *((SERVED, []), (REFUSED, []), (REFUSED, []), (SERVED, ["web"]), (SERVED, [])),
            *((None, []), (SERVED, ["web"]), ({}, []), (SERVED, ["web"]), (SERVED, [])),
        ):
            tried.clear()
            source._look()
            assert tried == wanted, answer
    finally:
        source.close()
