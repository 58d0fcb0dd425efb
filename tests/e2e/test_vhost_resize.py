"""A guest on vhost-user-blk hears that its disk was resized, and uses the new space."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sites import GROUP, MIB, Pair

from vrep.app.demo.guest import Guest, GuestDisk
from vrep.app.demo.guest_image import GuestImage, GuestRecipe

pytestmark = pytest.mark.e2e
Make = Callable[..., Pair]
BOOT_S = 300.0

# Says the size of its disk in sectors whenever it changes, reading from it all the while; and
# writes to the end of one that is larger than at first.
INIT = b"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t sysfs sys /sys
while read -r module; do insmod "/modules/$module"; done </modules/order
until [ -b /dev/vda ]; do sleep 0.1; done
first=$(cat /sys/block/vda/size) known=
while :; do
    dd if=/dev/vda of=/dev/null bs=4096 count=1 iflag=direct status=none || echo "FAILED read"
    size=$(cat /sys/block/vda/size)
    [ "$size" != "$known" ] || continue
    known=$size
    echo "SIZE $size"
    [ "$size" -gt "$first" ] || continue
    yes | dd of=/dev/vda bs=1M count=1 seek=$((size / 2048 - 1)) iflag=fullblock oflag=direct \
        conv=fsync status=none || echo "FAILED write"
    echo WROTE
done
"""


def test_a_guest_hears_of_a_new_size(make_pair: Make) -> None:
    cache = Path(__file__).parents[2] / "build" / "guest"
    image = GuestImage.build(cache, recipe=GuestRecipe(init=INIT))
    pair = make_pair(disks={"root": 16 * MIB}).up()
    pair.a.set_fronts(GROUP, {"root": "vhost-user-blk"})
    with Guest(image, [GuestDisk(pair.a.disk_uri(GROUP))]) as guest:
        guest.wait_for(f"^SIZE {16 * MIB // 512}$", BOOT_S)
        pair.a.resize(GROUP, "root", 24 * MIB)
        guest.wait_for(f"^SIZE {24 * MIB // 512}$", BOOT_S)
        guest.wait_for("^WROTE$", BOOT_S)
    pair.settle()
    held = pair.images["root"].read_bytes()
    assert held[23 * MIB :] == b"y\n" * (MIB // 2)
    assert held[: 23 * MIB] == bytes(23 * MIB)
    pair.same_as_source()
