"""A Linux guest on vhost-user-blk: its filter is killed under it, and nothing is lost."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sites import GROUP, Pair, compare

from vrep.app.demo.guest import Guest, GuestDisk, GuestTask
from vrep.app.demo.guest_check import check_disk, judge_lines
from vrep.app.demo.guest_disk import DiskContent, build_disk
from vrep.app.demo.guest_image import GuestImage
from vrep.control import ControlClient
from vrep.errors import BusyError, InvalidError, NotFoundError

Make = Callable[..., Pair]

BOOT_S = 300.0

SMALL = DiskContent(
    size=96 << 20,
    small_files=20,
    small_size_max=16 << 10,
    text_files=5,
    text_size_max=32 << 10,
    big_files=1,
    big_size=1 << 20,
)


def monitor_of(pair: Pair) -> dict[str, Any]:
    """What the filter says of the one that uses the disk."""
    control = ControlClient(pair.a.paths.socket("filter"))
    [client] = control.call("clients", group=GROUP)
    return dict(client)


def test_a_guest_rides_out_killed_filters(make_pair: Make, tmp_path: Path) -> None:
    image = GuestImage.build(Path(__file__).parents[2] / "build" / "guest")
    pair = make_pair(disks={"root": SMALL.size})
    manifest = build_disk(pair.images["root"], SMALL)
    pair.up()
    pair.a.set_fronts(GROUP, {"root": "vhost-user-blk"})
    uri = pair.a.disk_uri(GROUP)
    assert uri.startswith("vhost-user-blk:/")
    with Guest(image, [GuestDisk(uri)], GuestTask()) as guest:
        guest.wait_for_lines(21, BOOT_S)
        assert monitor_of(pair)["written_bytes"] > 0
        with pytest.raises(BusyError):  # while its VM runs
            pair.a.set_fronts(GROUP, {"root": "nbd"})
        for _ in range(3):
            said = len(guest.witness)
            pair.kill("filter")
            pair.start("filter")
            guest.wait_for_lines(said + 21, BOOT_S)
    killed_ms = time.time_ns() // 1_000_000
    # What it had asked for is done before the filter lets go of it.
    pair.unused()
    pair.settle()
    pair.same_as_source()
    result = pair.b.export(GROUP, tmp_path / "recovered")
    verdict = check_disk(Path(result.disks[0].path), manifest)
    assert verdict.violations() == []
    lines = judge_lines(verdict.log, guest.witness, point_ms=killed_ms)
    assert lines.violations() == []
    assert len(guest.witness) > 80


def test_fronts_take_turns(make_pair: Make) -> None:
    pair = make_pair(disks={"root": 16 << 20, "data": 8 << 20})
    pair.up()
    with pair.client("data") as client:
        client.write(4096, b"d" * 4096)
    with pytest.raises(InvalidError):
        pair.a.set_fronts(GROUP, {"root": "floppy"})
    with pytest.raises(NotFoundError):
        pair.a.set_fronts(GROUP, {"other": "nbd"})
    pair.unused()
    pair.a.set_fronts(GROUP, {"data": "vhost-user-blk"})
    # NBD shows the other disk alone.
    with pair.client("root") as client:
        client.write(0, b"r" * 4096)
    socket = pair.a.paths.nbd_socket(GROUP)
    listed = subprocess.run(
        ["nbdinfo", "--list", "--json", f"nbd+unix:///?socket={socket}"],
        check=True,
        capture_output=True,
    )
    assert [each["export-name"] for each in json.loads(listed.stdout)["exports"]] == ["root"]
    assert Path(pair.a.disk_uri(GROUP, "data").partition(":")[2]).is_socket()
    pair.stop("filter")
    pair.start("filter")  # the definition has it
    pair.served()
    assert Path(pair.a.disk_uri(GROUP, "data").partition(":")[2]).is_socket()
    pair.a.set_fronts(GROUP, {"data": "nbd"})
    with pair.client("data") as client:
        compare("data", client.read(4096, 4096), b"d" * 4096)
    pair.settle()
    pair.same_as_source()
