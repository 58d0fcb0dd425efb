"""What of a view may differ from a base point: what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from vrep import errors
from vrep._core.changes import CHANGED
from vrep._core.filter import Disk, Group
from vrep._core.serve import Server

NONE = np.zeros(0, CHANGED)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    disk = Disk("root", f"view:{tmp_path / 'root.overlay'}", 1 << 20)
    with Group([disk], group_id=bytes(16), tap=False) as group:
        yield group


def test_there_is_one_base(group: Group) -> None:
    group.since("vrep-since-1-0-1", [NONE])
    with pytest.raises(errors.ExistsError):
        group.since("vrep-since-1-0-2", [NONE])


@pytest.mark.parametrize("name", ["", "x" * 96])
def test_a_name_fits(group: Group, name: str) -> None:
    with pytest.raises(errors.InvalidError):
        group.since(name, [NONE])
    group.since("x" * 95, [NONE])


@pytest.mark.parametrize("rows", [[NONE, NONE], [bytes(15)]])
def test_there_are_rows_for_disks_that_are_there(group: Group, rows: list[bytes]) -> None:
    with pytest.raises(errors.InvalidError):
        group.since("vrep-since-1-0-1", rows)


def test_it_comes_before_serving(group: Group, tmp_path: Path) -> None:
    with (
        Server(group, unix_path=tmp_path / "socket"),
        pytest.raises(errors.BusyError, match="served"),
    ):
        group.since("vrep-since-1-0-1", [NONE])


def test_a_tapped_group_has_its_change_map(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    for name in ("shm", "state"):
        (tmp_path / name).mkdir()
    with (
        Group(
            [Disk("root", f"file:{tmp_path / 'disk'}")],
            group_id=bytes(16),
            shm_dir=tmp_path / "shm",
            state_dir=tmp_path / "state",
            ring_bytes=4 << 20,
            ring_descriptors=1024,
        ) as group,
        pytest.raises(errors.InvalidError),
    ):
        group.since("vrep-since-1-0-1", [NONE])
