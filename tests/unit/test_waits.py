"""Waiting: a checkpoint that is said to be durable is, and nothing waits for what cannot come."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vrep import errors
from vrep.app import cli
from vrep.control import ControlServer
from vrep.groups import DiskDefinition, GroupDefinition
from vrep.site import Site

SEQ = 7


class Rig:
    """A site that protects `web`, and a filter that answers what comes next in `answers`."""

    def __init__(self, root: Path) -> None:
        self.site = Site.init(root, name="west")
        self.site.groups.store(
            GroupDefinition(
                version=1,
                group_id="22" * 16,
                name="web",
                disks=(DiskDefinition("root", "file:/web.raw", 4096, 0),),
                to_site="11" * 16,
                key="acme",
                tenant_key_id="",
                epoch=1,
                epoch_id="33" * 16,
                wrapped_keys=(),
                created=0.0,
            )
        )
        self.marks: list[str] = []
        self.answers: list[dict[str, Any]] = [{"durable": 0, "gap_last": 1}]
        self.before: Callable[[], None] = lambda: None
        run = self.site.paths.make_run()
        methods = {"status": self._status, "mark": self._mark}
        self.server = ControlServer(run / "filter.sock", methods)

    def _status(self, _params: Mapping[str, Any]) -> dict[str, Any]:
        self.before()
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def _mark(self, params: Mapping[str, Any]) -> dict[str, Any]:
        self.marks.append(params["label"])
        return {"seq": SEQ, "wall_ns": 1}

    def change(self, **changes: Any) -> None:
        groups = self.site.groups
        groups.store(msgspec.structs.replace(groups.load("web"), **changes))


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path / "site")
    with rig.server:
        yield rig


def test_a_checkpoint_says_whether_it_is_durable(
    rig: Rig, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["checkpoint", "web", "nightly", "--dir", str(rig.site.paths.root)]
    assert cli.run(line) == 0
    assert capsys.readouterr().out.endswith("; not durable at the target yet\n")
    assert cli.run([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "group": "web", "label": "nightly", "seq": SEQ, "wall_ns": 1, "durable": False,
        "quiesced": False,
    }  # fmt: skip
    rig.answers = [{"durable": SEQ, "gap_last": 1}]
    assert cli.run(line) == 0
    assert "durable" not in capsys.readouterr().out


def test_it_is_waited_for(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    durable = [0, 0, SEQ - 1, SEQ]
    rig.answers = [{"durable": seq, "gap_last": 1} for seq in durable]
    line = ["checkpoint", "web", "nightly", "--wait", "--json", "--dir", str(rig.site.paths.root)]
    assert cli.run(line) == 0
    assert json.loads(capsys.readouterr().out)["durable"] is True
    assert rig.marks == ["nightly"]


def test_the_wait_ends(rig: Rig) -> None:
    with pytest.raises(errors.TimeLimitError, match=r"'nightly' \(position 7\) is not durable"):
        rig.site.checkpoint("web", "nightly", wait_s=0.05)


def test_a_gap_behind_the_mark_may_have_taken_it(rig: Rig) -> None:
    """What is durable past a lost ring says nothing about what was in it."""
    lost = [{"durable": 99, "gap_last": 8}]
    rig.answers = list(lost)
    assert not rig.site.checkpoint("web", "nightly")["durable"]
    rig.answers = list(lost)
    with pytest.raises(errors.GapError, match="vrep points"):
        rig.site.checkpoint("web", "nightly", wait_s=5)


def test_a_group_that_was_taken_over_has_no_checkpoint(rig: Rig) -> None:
    rig.change(fenced=True)
    with pytest.raises(errors.FencedError, match="'web'"):
        rig.site.checkpoint("web", "nightly")
    assert rig.marks == []
    rig.change(fenced=False)
    rig.before = lambda: rig.change(fenced=bool(rig.marks))  # it happens while it waits
    with pytest.raises(errors.FencedError, match="'web'"):
        rig.site.checkpoint("web", "nightly", wait_s=5)


def test_a_paused_group_is_not_waited_for(rig: Rig) -> None:
    rig.change(paused=True)
    with pytest.raises(errors.StateError, match="paused"):
        rig.site.checkpoint("web", "nightly", wait_s=5)
    assert rig.marks == []
    assert not rig.site.checkpoint("web", "nightly")["durable"]


def states(rig: Rig, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    left = list(names)

    def status(_site: Site, _group: str) -> dict[str, Any]:
        state = left.pop(0) if len(left) > 1 else left[0]
        target = {"total_bytes": 100, "unshipped_bytes": 100 - len(names) + len(left)}
        return {"groups": {"web": {"state": state, "error": "", "targets": [target]}}}

    monkeypatch.setattr(Site, "status", status)
    monkeypatch.setattr("vrep.waits.ASK_EVERY_S", 0)


def test_the_end_of_a_sync_is_waited_for(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    states(rig, monkeypatch, "initial-sync", "offline", "resync", "replicating")
    heard: list[tuple[int, int]] = []
    rig.site.wait_replicating("web", progress=lambda done, total: heard.append((done, total)))
    assert heard == [(1, 100), (2, 100), (3, 100)]


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ("paused", errors.StateError),
        ("failed-over", errors.StateError),
        ("error", errors.VrepError),
        ("offline", errors.TimeLimitError),
    ],
)
def test_what_does_not_end_is_not_waited_for(
    rig: Rig, state: str, kind: type[errors.VrepError], monkeypatch: pytest.MonkeyPatch
) -> None:
    states(rig, monkeypatch, "resync", state)
    # Only that which may yet come is waited for: no other answer is late on a slow machine.
    limit_s = 0.05 if kind is errors.TimeLimitError else 60.0
    with pytest.raises(kind):
        rig.site.wait_replicating("web", timeout_s=limit_s)
