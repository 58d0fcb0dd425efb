"""Disks that are to be filled in place: what somebody has is refused, whatever it is called."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from vrep import errors
from vrep.groups import VERSION, DiskDefinition, GroupDefinition, GroupDirectory
from vrep.paths import SitePaths
from vrep.recovery.onto import place_onto
from vrep.recovery.view import RecordedDisk

SIZE = 1 << 20
OTHER = "44" * 16


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disks" / "root.raw"
    path.parent.mkdir()
    path.write_bytes(bytes(SIZE))
    return path


@pytest.fixture
def paths(tmp_path: Path, image: Path) -> SitePaths:
    """A site that protects the image."""
    paths = SitePaths(tmp_path / "site")
    paths.root.mkdir()
    GroupDirectory(paths.root).store(
        GroupDefinition(
            version=VERSION,
            group_id="33" * 16,
            name="mail",
            disks=(DiskDefinition("root", f"file:{image}", SIZE, 0),),
            to_site="22" * 16,
            key="acme",
            tenant_key_id="11" * 16,
            epoch=1,
            epoch_id="55" * 16,
            wrapped_keys=(),
            created=time.time(),
        )
    )
    return paths


@pytest.mark.parametrize("name", ["own", "symlink", "directory", "hard link"])
def test_the_disk_of_a_group_is_refused_under_any_name(
    paths: SitePaths, image: Path, tmp_path: Path, name: str
) -> None:
    other = {
        "own": image,
        "symlink": tmp_path / "by-id",
        "directory": tmp_path / "pool" / image.name,
        "hard link": tmp_path / "linked",
    }[name]
    if name == "symlink":
        other.symlink_to(image)
    if name == "directory":
        other.parent.symlink_to(image.parent)
    if name == "hard link":
        os.link(image, other)
    disks = [RecordedDisk("root", SIZE, 0)]
    with pytest.raises(errors.BusyError, match="a disk of group 'mail'"):
        place_onto(paths, OTHER, disks, {"root": f"file:{other}"})


def test_two_disks_are_not_filled_into_one(paths: SitePaths, tmp_path: Path) -> None:
    (tmp_path / "pool").symlink_to(tmp_path)
    disks = [RecordedDisk("root", SIZE, 0), RecordedDisk("data", SIZE, 1)]
    onto = {"root": f"file:{tmp_path}/new", "data": f"file:{tmp_path}/pool/new"}
    with pytest.raises(errors.BusyError, match="filled by disk 'root'"):
        place_onto(paths, OTHER, disks, onto)
    assert not (tmp_path / "new").exists()
    onto["data"] = f"file:{tmp_path}/second"
    found = place_onto(paths, OTHER, disks, onto)
    assert [disk.onto for disk in found] == list(onto.values())
    assert (tmp_path / "second").stat().st_size == SIZE
