"""Rotation of a tenant key: at every moment each copy of the wrapped keys opens with the old
generation or the new one, and what was cut off goes on."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vrep import errors, groups, rotate
from vrep.app import cli
from vrep.control import ControlServer
from vrep.groups import DiskDefinition, GroupDefinition
from vrep.keys import tenant
from vrep.keys.datakey import DataKey, inspect_wrapped, unwrap_data_key
from vrep.keys.errors import KeyNotVerifiedError, TenantKeyError
from vrep.keys.tenant import TenantKeyring
from vrep.site import Site
from vrep.status import collect

NAMES = ("mail", "web")


class Rig:
    """A site with two groups, a source process that tells their targets, and those targets: what
    wrapped keys each of them holds."""

    def __init__(self, root: Path) -> None:
        self.site = Site.init(root, name="west")
        self.site.key_create("acme")
        self.export = root / "acme.key"
        self.site.key_export("acme", self.export)
        self.site.key_verify("acme", self.export)
        self.secrets: dict[str, DataKey] = {}
        self.targets: dict[str, tuple[str, ...]] = {}
        for name in NAMES:
            group_id = name.encode().ljust(16, b".")
            keys = [DataKey.create(group_id, generation) for generation in (1, 2)]
            self.secrets |= {f"{name}{key.generation}": key for key in keys}
            held = self.site.keys.get("acme")
            self.site.groups.store(
                GroupDefinition(
                    version=1,
                    group_id=group_id.hex(),
                    name=name,
                    disks=(DiskDefinition("root", f"file:/{name}.raw", 4096, 0),),
                    to_site="11" * 16,
                    key="acme",
                    tenant_key_id=held.key_id,
                    epoch=1,
                    epoch_id="22" * 16,
                    wrapped_keys=tuple(base64.b64encode(key.wrap(held)).decode() for key in keys),
                    created=0.0,
                )
            )
            self.tell(name)

    def tell(self, name: str) -> None:
        """What a session does that opens."""
        definition = self.site.groups.load(name)
        self.targets[name] = definition.wrapped_keys
        self.site.groups.update(name, keys_at_target=definition.keys_digest)

    def reload(self, params: Any) -> dict[str, Any]:
        if not self.site.groups.load(params["group"]).paused:
            self.tell(params["group"])
        return {}

    def serve(self) -> ControlServer:
        run = self.site.paths.make_run()
        methods = {"reload": self.reload, "status": lambda _params: {}}
        return ControlServer(run / "source.sock", methods)

    def begin(self, out: Path) -> None:
        """The new generation, read back."""
        assert self.site.key_rotate("acme", out=out).state == "exported"
        assert self.site.key_verify("acme", out).generation == 2

    def recoverable(self, *exports: Path) -> set[str]:
        """With which of the exports, alone, every copy of the wrapped keys opens: each copy must
        open with one of them, whole."""
        found = set()
        for name in NAMES:
            for copy in (self.site.groups.load(name).wrapped_keys, self.targets[name]):
                opened = [path.name for path in exports if self._opens(name, copy, path)]
                assert opened, f"{name}: no export opens {copy}"
                found |= set(opened)
        return found

    def _opens(self, name: str, copy: tuple[str, ...], path: Path) -> bool:
        key = tenant.import_text(path.read_text())
        blobs = [base64.b64decode(text) for text in copy]
        if {inspect_wrapped(blob).tenant_key_id for blob in blobs} != {key.key_id}:
            return False
        opened = [unwrap_data_key(blob, key) for blob in blobs]
        assert opened == [self.secrets[f"{name}1"], self.secrets[f"{name}2"]]
        return True


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path / "site")
    with rig.serve():
        yield rig


def test_a_rotation_wraps_every_group_and_tells_every_target(rig: Rig, tmp_path: Path) -> None:
    out = tmp_path / "new.key"
    first = rig.site.key_rotate("acme", out=out)
    assert (first.state, first.key.state, first.key.generation) == ("exported", "pending", 2)
    assert rig.recoverable(rig.export) == {"acme.key"}  # nothing was touched
    with pytest.raises(KeyNotVerifiedError, match="generation 2"):
        rig.site.key_rotate("acme")
    assert rig.recoverable(rig.export) == {"acme.key"}
    rig.site.key_verify("acme", out)
    done = rig.site.key_rotate("acme")
    assert done.state == "done"
    assert [(g.group, g.wrapped, g.at_target) for g in done.groups] == [
        ("mail", True, True),
        ("web", True, True),
    ]
    assert rig.recoverable(out) == {"new.key"}
    assert rig.site.keys.info("acme").generation == 2
    for name in NAMES:
        definition = rig.site.groups.load(name)
        assert definition.tenant_key_id == done.key.key_id
        assert targets_of(definition) == {done.key.key_id}
    # Again, as who lost the answer gives it: nothing is made without being asked for.
    again = rig.site.key_rotate("acme")
    assert (again.state, again.key.key_id, again.groups) == ("done", done.key.key_id, done.groups)
    assert rig.site.keys.pending("acme") is None
    assert rig.recoverable(out) == {"new.key"}


def targets_of(definition: GroupDefinition) -> set[str]:
    return {
        inspect_wrapped(base64.b64decode(text)).tenant_key_id for text in definition.wrapped_keys
    }


def test_the_loss_of_the_new_key_can_be_accepted(rig: Rig) -> None:
    done = rig.site.key_rotate("acme", accept_key_loss=True)
    assert (done.state, done.key.verified) == ("done", None)
    again = rig.site.key_rotate("acme", accept_key_loss=True)
    assert again.key.generation == 3


def test_an_export_that_was_lost_is_written_again(rig: Rig, tmp_path: Path) -> None:
    lost, out = tmp_path / "lost.key", tmp_path / "new.key"
    one = rig.site.key_rotate("acme", out=lost)
    lost.unlink()
    two = rig.site.key_rotate("acme", out=out)
    assert one.key.key_id == two.key.key_id
    with pytest.raises(errors.ExistsError):
        rig.site.key_rotate("acme", out=out)
    with pytest.raises(TenantKeyError):
        rig.site.key_verify("acme", other_key(tmp_path))
    with pytest.raises(KeyNotVerifiedError):
        rig.site.key_rotate("acme")
    # The old generation read back again is not the new one.
    rig.site.key_verify("acme", rig.export)
    with pytest.raises(KeyNotVerifiedError):
        rig.site.key_rotate("acme")


def other_key(tmp_path: Path) -> Path:
    ring = TenantKeyring(tmp_path / "other")
    ring.create("acme")
    path = tmp_path / "other.key"
    path.write_text(ring.export("acme"))
    return path


class Crash(BaseException):
    """The power went."""


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_crash_at_any_step_leaves_every_group_recoverable(
    tmp_path: Path, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off before and after each durable write in turn; the same commands then end it."""
    write, step = groups.write_atomic, 0
    while True:
        step += 1
        rig = Rig(tmp_path / f"{after}{step}")
        out = tmp_path / f"{after}{step}.key"
        left = step

        def fails(*arguments: Any, **options: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0 and not after:
                raise Crash
            write(*arguments, **options)
            if left == 0:
                raise Crash

        crashed = False
        with rig.serve(), monkeypatch.context() as patch:
            patch.setattr(groups, "write_atomic", fails)
            patch.setattr(tenant, "write_atomic", fails)
            patch.setattr(rig, "tell", lambda _name: None)  # nor does a target hear in time
            try:
                rig.begin(out)
                rig.site.key_rotate("acme", wait_s=0.0)
            except Crash:
                crashed = True
        exports = [rig.export, *([out] if out.exists() else [])]
        assert rig.recoverable(*exports)
        with rig.serve():
            if (
                rig.site.keys.pending("acme") is not None
                or rig.site.keys.info("acme").generation == 1
            ):
                out.unlink(missing_ok=True)
                rig.begin(out)
            done = (
                rig.site.key_rotate("acme")
                if crashed or rotate._unfinished(rig.site, rig.site.keys, "acme")
                else None
            )
        assert done is None or done.state == "done"
        assert rig.recoverable(out) == {out.name}
        assert rig.site.keys.info("acme").generation == 2
        if not crashed:
            assert step > 4
            return


def test_a_target_that_cannot_be_told_is_told_later(rig: Rig, tmp_path: Path) -> None:
    out = tmp_path / "new.key"
    rig.begin(out)
    rig.site.groups.update("web", paused=True)
    rotation = rig.site.key_rotate("acme", wait_s=60.0)
    assert rotation.state == "unfinished"
    assert [(g.group, g.wrapped, g.at_target) for g in rotation.groups] == [
        ("mail", True, True),
        ("web", True, False),
    ]
    assert "paused" in rotation.groups[1].text
    assert rig.recoverable(rig.export, out) == {"acme.key", "new.key"}
    assert "keys-unsent" in collect(rig.site)["groups"]["web"]["conditions"]
    assert "keys-unsent" not in collect(rig.site)["groups"]["mail"]["conditions"]
    with pytest.raises(errors.StateError, match="not over"):
        rig.site.key_rotate("acme", out=tmp_path / "third.key")
    assert rig.site.key_rotate("acme", accept_key_loss=True, wait_s=0.0).key.generation == 2
    rig.site.groups.update("web", paused=False)
    assert rig.site.key_rotate("acme").state == "done"
    assert rig.recoverable(out) == {"new.key"}


def test_a_group_that_was_given_up_stops_no_rotation(rig: Rig, tmp_path: Path) -> None:
    """After a move or a failover another site writes it: nobody hears of keys from here, neither
    now nor later. It is wrapped here all the same, since it may come back."""
    rig.site.groups.update("web", fenced=True, yielded=True)
    rig.tell = lambda name: None if name == "web" else Rig.tell(rig, name)  # type: ignore[method-assign]
    before = rig.targets["web"]
    for number in (2, 3):
        out = tmp_path / f"{number}.key"
        assert rig.site.key_rotate("acme", out=out).state == "exported"
        rig.site.key_verify("acme", out)
        done = rig.site.key_rotate("acme", wait_s=60.0)
        assert (done.state, done.key.generation) == ("done", number)
        assert [(g.group, g.wrapped, g.at_target) for g in done.groups] == [
            ("mail", True, True),
            ("web", True, False),
        ]
        assert "given up" in done.groups[1].text
        assert targets_of(rig.site.groups.load("web")) == {done.key.key_id}
    assert rig.targets["web"] == before
    # It comes back: a rotation is not over before its target was told.
    rig.site.groups.update("web", fenced=False, yielded=False)
    assert rotate._unfinished(rig.site, rig.site.keys, "acme")
    assert rig.site.key_rotate("acme", wait_s=0.0).state == "unfinished"


def test_a_group_that_is_only_fenced_is_told_later(rig: Rig, tmp_path: Path) -> None:
    """A failover that may be rolled back."""
    rig.begin(tmp_path / "new.key")
    rig.site.groups.update("web", fenced=True)
    rig.tell = lambda name: None if name == "web" else Rig.tell(rig, name)  # type: ignore[method-assign]
    assert rig.site.key_rotate("acme", wait_s=60.0).state == "unfinished"
    del rig.tell
    rig.site.groups.update("web", fenced=False)
    assert rig.site.key_rotate("acme").state == "done"


def test_without_its_source_process_a_rotation_waits_for_nobody(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "site")
    rotation = rig.site.key_rotate("acme", accept_key_loss=True, wait_s=60.0)
    assert rotation.state == "unfinished"
    assert {g.text.split(":")[0] for g in rotation.groups} == {"the source process does not run"}
    with rig.serve():
        assert rig.site.key_rotate("acme").state == "done"


def test_a_group_that_cannot_be_wrapped_is_named_and_the_others_are(
    rig: Rig, tmp_path: Path
) -> None:
    rig.begin(tmp_path / "new.key")
    broken = rig.site.groups.path("mail") / "group.json"
    broken.write_text("{")
    rotation = rig.site.key_rotate("acme")
    assert rotation.state == "unfinished"
    assert [(g.group, g.wrapped) for g in rotation.groups] == [("web", True), ("mail", False)]
    assert "cannot be read" in rotation.groups[1].text


def test_two_rotations_never_run_at_once(rig: Rig, tmp_path: Path) -> None:
    rig.begin(tmp_path / "new.key")
    entered, leave = threading.Event(), threading.Event()
    tell = rig.tell

    def slow(name: str) -> None:
        entered.set()
        assert leave.wait(30)
        tell(name)

    rig.tell = slow  # type: ignore[method-assign]
    thread = threading.Thread(target=lambda: rig.site.key_rotate("acme"))
    thread.start()
    assert entered.wait(30)
    with pytest.raises(errors.LockedError, match="another rotation"):
        rig.site.key_rotate("acme")
    leave.set()
    thread.join()


def test_a_key_that_is_not_held_is_not_rotated(rig: Rig) -> None:
    with pytest.raises(TenantKeyError, match="beta"):
        rig.site.key_rotate("beta", accept_key_loss=True)


def test_the_command_says_what_comes_next(
    rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--dir", str(rig.site.paths.root)]
    out = tmp_path / "new.key"
    assert cli.run(["key", "rotate", "acme", *place]) == TenantKeyError.exit_code
    assert "--out FILE" in capsys.readouterr().err
    assert cli.run(["key", "rotate", "acme", "--out", str(out), *place]) == 0
    assert "vrep key verify acme FILE" in capsys.readouterr().out
    assert cli.run(["key", "verify", "acme", str(out), *place]) == 0
    rig.site.groups.update("web", paused=True)
    assert cli.run(["key", "rotate", "acme", "--wait", "1s", *place]) == 1
    assert "paused" in capsys.readouterr().out
    rig.site.groups.update("web", paused=False)
    assert cli.run(["key", "rotate", "acme", *place]) == 0
    assert "generation 2" in capsys.readouterr().out
    assert cli.run(["key", "list", *place]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines[1:]] == ["1", "2"]
    assert "(old)" in lines[1]
    assert cli.run(["key", "releases", *place]) == 0
    assert "no key was released" in capsys.readouterr().out
