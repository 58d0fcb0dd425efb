"""Untaken: no block that may hold what no other site has is left out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vrep import Site
from vrep._core.filter import Disk, Group
from vrep._core.ring import RingReader
from vrep._core.serve import Server
from vrep.groups import VERSION, DiskDefinition, GroupDefinition
from vrep.recovery.untaken import find_untaken

BYTES = 1 << 20
GROUP, TARGET, EPOCH = "11" * 16, "22" * 16, "33" * 16


class Given:
    """A group of a site, all of which was taken when its filter ended."""

    def __init__(self, root: Path) -> None:
        self.paths = Site.init(root, name="west").paths
        self.image = root / "web.raw"
        self.image.write_bytes(bytes(BYTES))
        self.groups = Site(root).groups
        self.groups.store(
            GroupDefinition(
                version=VERSION, group_id=GROUP, name="web",
                disks=(DiskDefinition("root", f"file:{self.image}", BYTES, 0),),
                to_site=TARGET, key="acme", tenant_key_id="", epoch=1, epoch_id=EPOCH,
                wrapped_keys=(), created=0.0, fenced=True,
            )
        )  # fmt: skip
        self.paths.config.write_text(f'[filter]\nshm_dir = "{root / "shm"}"\n')
        (root / "shm").mkdir()
        self.shm = self.paths.make_shm("web", str(root / "shm"))

    def open(self, *, bypass: bool = False) -> Group:
        return Group(
            [Disk("root", f"file:{self.image}", BYTES)], tap=not bypass, bypass=bypass,
            group_id=bytes.fromhex(GROUP), target_id=bytes.fromhex(TARGET),
            epoch_id=bytes.fromhex(EPOCH), epoch=1, shm_dir=self.shm,
            state_dir=self.groups.path("web"), ring_bytes=4 << 20, ring_descriptors=256, slots=16,
        )  # fmt: skip

    def taken(self, then: Callable[[Group], None] = lambda _group: None) -> None:
        """Everything is acknowledged; then something happens, and the group is closed."""
        group = self.open()
        server = Server(group, unix_path=self.paths.root / "web.sock")
        server.start()
        fds = group.consumer_attach("target", bytes.fromhex(TARGET), 0)
        reader = RingReader(self.shm / "ring", *fds)
        group.resync(True)
        deadline = time.monotonic() + 30
        while (status := group.status())["gap"] or status["dirty_bytes"]:
            head = status["head"]
            reader.set(received=head, durable=head, spilled=head)
            assert time.monotonic() < deadline
            time.sleep(0.01)
        then(group)
        server.stop()
        reader.close()
        for fd in fds:
            os.close(fd)
        group.close()

    def left(self) -> int:
        found = find_untaken(self.paths, "web")
        assert found.known is (found.bytes < BYTES)
        return found.bytes

    def write(self) -> None:
        with self.image.open("r+b") as file:
            file.seek(BYTES // 2)
            file.write(b"x")


@pytest.fixture
def given(tmp_path: Path) -> Given:
    return Given(tmp_path / "site")


def test_what_was_taken_is_not_named(given: Given) -> None:
    given.taken()
    assert given.left() == 0


def test_a_disk_that_was_written_after_its_filter_ended(given: Given) -> None:
    given.taken()
    given.write()
    assert given.left() == BYTES


def test_a_disk_that_was_let_go_of_to_its_vm(given: Given) -> None:
    given.taken(lambda group: group.let_go())
    assert given.left() == BYTES


def test_a_vm_that_runs_without_the_filter(given: Given) -> None:
    given.taken()
    given.groups.update("web", detached=True)
    assert given.left() == BYTES


def test_a_pass_through_that_marked_nothing(given: Given) -> None:
    given.taken()
    given.write()
    with given.open(bypass=True):  # it cannot explain the disk, and leaves the map as it is
        assert given.left() == BYTES


def test_a_state_that_is_gone_or_damaged(given: Given) -> None:
    given.taken()
    state = given.groups.path("web") / "state"
    state.write_bytes(bytes(len(state.read_bytes())))
    assert given.left() == BYTES
    state.unlink()
    assert given.left() == BYTES
