"""How the old site of a group gives way: to whom, when, and what it writes down."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vrep.control import ControlServer
from vrep.errors import BusyError, FencedError, InvalidError, StateError
from vrep.groups import DiskDefinition, GroupDefinition, GroupDirectory, ParentPosition
from vrep.keys.identity import SiteIdentity
from vrep.paths import SitePaths
from vrep.recovery.old_site import give_way
from vrep.target.epochs import plain
from vrep.target.manifest import DiskEntry, EpochEntry, EpochState, Position
from vrep.target.store import GroupStore, StoreOptions, StoreSpec

US, THEM, OTHER = b"w" * 16, b"e" * 16, b"o" * 16
GROUP = b"g" * 16
ONE = EpochEntry(1, EpochState.ACCEPTED, b"1" * 16, US)
TWO = EpochEntry(2, EpochState.ACCEPTED, b"2" * 16, THEM, Position(1, 0, 7))


def told(*epochs: EpochEntry) -> dict[str, Any]:
    return {"group_id": GROUP.hex(), "epochs": [plain(entry) for entry in epochs]}


class Old:
    """A site with a group, and a filter that counts its clients."""

    def __init__(self, root: Path) -> None:
        self.paths = SitePaths(root)
        self.groups = GroupDirectory(root)
        self.clients = 0
        self.released: list[str] = []
        self.groups.store(
            GroupDefinition(
                version=1,
                group_id=GROUP.hex(),
                name="web",
                disks=(DiskDefinition("root", "file:/srv/web.raw", 4096, 0),),
                to_site=THEM.hex(),
                key="acme",
                tenant_key_id="",
                epoch=1,
                epoch_id=ONE.epoch_id.hex(),
                wrapped_keys=(),
                created=0.0,
            )
        )
        self.server = ControlServer(
            self.paths.make_run() / "filter.sock",
            {
                "status": lambda _p: {"web": {"clients": self.clients}},
                "release": lambda p: self.released.append(p["group"]),
            },
        )

    @property
    def definition(self) -> GroupDefinition:
        return self.groups.load("web")


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Old]:
    old = Old(tmp_path)
    with old.server:
        yield old


def test_a_group_is_left_to_who_took_it_over(old: Old) -> None:
    for _ in range(2):  # asked again
        give_way(old.paths, THEM.hex(), told(ONE, TWO))
        after = old.definition
        assert (after.yielded, after.fenced) == (True, True)
        assert after.left == ParentPosition(1, 0, 7)
    assert old.released == ["web", "web"]


def test_a_vm_keeps_the_old_disks(old: Old) -> None:
    old.clients = 1
    with pytest.raises(BusyError, match="1 client"):
        give_way(old.paths, THEM.hex(), told(ONE, TWO))
    assert not old.definition.yielded
    assert old.released == []


def test_only_the_target_may_take_over(old: Old) -> None:
    stolen = EpochEntry(2, EpochState.ACCEPTED, b"2" * 16, OTHER, Position(1, 0, 7))
    with pytest.raises(FencedError):
        give_way(old.paths, OTHER.hex(), told(ONE, stolen))
    with pytest.raises(InvalidError):  # who asks is not who took over
        give_way(old.paths, THEM.hex(), told(ONE, stolen))
    with pytest.raises(InvalidError):
        give_way(old.paths, THEM.hex(), told())
    assert not old.definition.yielded


def test_another_history_is_not_given_way_to(old: Old) -> None:
    another = EpochEntry(1, EpochState.ACCEPTED, secrets.token_bytes(16), US)
    later = EpochEntry(3, EpochState.ACCEPTED, b"3" * 16, THEM, Position(2, 0, 9))
    for epochs in ([TWO], [another, TWO], [later]):
        with pytest.raises(StateError):
            give_way(old.paths, THEM.hex(), told(*epochs))
    old.groups.update("web", epoch=2, epoch_id=TWO.epoch_id.hex())
    with pytest.raises(StateError, match="nobody took it over"):
        give_way(old.paths, THEM.hex(), told(ONE, TWO))
    assert not old.definition.yielded


def test_a_store_without_a_definition_knows_its_writers(old: Old) -> None:
    give_way(old.paths, THEM.hex(), {**told(ONE, TWO), "group_id": "ab" * 16})  # never seen
    old.groups.forget("web")
    spec = StoreSpec("web", [DiskEntry("root", 4096, 0)], ONE, [b"wrapped"])
    options = StoreOptions(reserve_bytes=0, merge=False)
    GroupStore.open(old.paths.store, GROUP, create=spec, options=options).close()
    SiteIdentity.create(old.paths.root, "old")
    with pytest.raises(FencedError):
        give_way(old.paths, THEM.hex(), told(ONE, TWO))
    give_way(old.paths, US.hex(), told(ONE))


def test_a_store_that_a_base_made_knows_nobody_else(old: Old) -> None:
    """The group was unprotected here while its base was made."""
    old.groups.forget("web")
    us = bytes.fromhex(SiteIdentity.create(old.paths.root, "old").site_id)
    one = EpochEntry(1, EpochState.ACCEPTED, b"1" * 16, us)
    spec = StoreSpec("web", [DiskEntry("root", 4096, 0)], one, [b"wrapped"])
    options = StoreOptions(reserve_bytes=0, merge=False)
    GroupStore.open(old.paths.store, GROUP, create=spec, options=options).close()
    assert give_way(old.paths, THEM.hex(), told(one, TWO)) is None
    another = EpochEntry(1, EpochState.ACCEPTED, b"x" * 16, us)
    for epochs in ((another, TWO), (TWO,)):  # who was never sent the group does not know its id
        with pytest.raises(FencedError):
            give_way(old.paths, THEM.hex(), told(*epochs))
    elsewhere = EpochEntry(3, EpochState.ACCEPTED, b"3" * 16, THEM, Position(2, 0, 9))
    with pytest.raises(StateError, match="does not go on"):
        give_way(old.paths, THEM.hex(), told(one, elsewhere))
