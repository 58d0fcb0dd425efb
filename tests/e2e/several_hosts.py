"""A group of several hosts: sites of one tenant, each with its processes, a disk and a lane."""

from __future__ import annotations

import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

from life import Place
from sites import GROUP, KEY, MIB, WAIT_S, Client, wait_until

from vrep import errors
from vrep.recovery.cuts import Cut, LaneSet, find_lanes
from vrep.recovery.fetch import Fetcher

NUMBER = struct.Struct("<Q")
DISK = 4 * MIB
SETTINGS = "[source]\ncut_every_s = 0.1\nlane_gone_s = 2.0\n"


class Hosts:
    """`north` and `south` each protect a disk of one group to `vault`."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="vrep-hosts-"))
        self.places = {n: Place(self.root, n) for n in ("north", "south", "vault")}
        self.north, self.south, self.vault = self.places.values()
        self.images = {name: self.root / f"{name}.raw" for name in ("north", "south")}
        for image in self.images.values():
            with image.open("wb") as file:
                file.truncate(DISK)
        for place in self.places.values():
            with place.site.paths.config.open("a") as config:
                config.write(SETTINGS)

    def up(self) -> Hosts:
        for place in self.places.values():
            place.start()
        key = self.root / "acme.key"
        self.north.site.key_create(KEY)
        self.north.site.key_export(KEY, key)
        for place in self.places.values():
            if place is not self.north:
                place.site.key_import(key)
            place.site.key_verify(KEY, key)
        self.north.site.join(self.vault.site.invite())
        self.south.site.join(self.vault.site.invite())
        self.south.site.join(self.north.site.invite())
        self.protect(self.north, lanes=1)
        self.protect(self.south, beside="north")
        self.settle()
        return self

    def protect(self, at: Place, **how: Any) -> None:
        options = at.site.group_options(ring_bytes=8 * MIB)
        disks = {at.name: f"file:{self.images[at.name]}"}
        at.site.protect(GROUP, disks, to="vault", key=KEY, options=options, **how)

    def settle(self, *places: Place) -> None:
        """All is durable, and who came is known to all."""

        def settled() -> bool:
            joining = [
                one.name
                for place in places or (self.north, self.south)
                for one in place.site.groups.readable()
                if one.joining
            ]
            return not joining and all(
                one["state"] == "replicating"
                and one["targets"][0]["seq"] == one["targets"][0]["durable_seq"]
                for place in places or (self.north, self.south)
                for one in place.site.status(GROUP)["groups"].values()
            )

        wait_until("all is durable", settled, every_s=0.05)

    def lane(self, at: Place) -> dict[str, Any]:
        (found,) = at.site.status(GROUP)["groups"].values()
        return dict(found)

    def client(self, at: Place) -> Client:
        return Client(at.site.disk_uri(GROUP, at.name), WAIT_S)

    def checkpoint(self, at: Place, label: str) -> dict[str, Any]:
        """One that stands. A cut over several hosts holds for 10 ms, and is void if that was not
        enough: on processors that others keep busy it may be so for longer than one is tried."""

        def made() -> dict[str, Any] | None:
            try:
                return at.site.checkpoint(GROUP, label, wait_s=WAIT_S)
            except errors.AgainError:
                return None  # none of this label was made

        found: dict[str, Any] = wait_until(f"a cut {label!r} stands", made)
        return found

    def cuts(self) -> list[Cut]:
        held = find_lanes(self.vault.site.paths, GROUP)
        assert held is not None
        with LaneSet(self.vault.site.paths, held) as lanes:
            return lanes.cuts()

    def numbers(self) -> list[tuple[Cut, dict[int, int]]]:
        """The first eight bytes of each lane's disk, at every cut."""
        held = find_lanes(self.vault.site.paths, GROUP)
        assert held is not None
        found = []
        with LaneSet(self.vault.site.paths, held) as lanes:
            for cut in lanes.cuts():
                values = {}
                for at in cut.at:
                    lane = lanes.lane(at.lane)
                    assert lane is not None
                    extents = lane.reader.extent_map(at)
                    data = Fetcher(lane.reader, extents, lane.access).read(0, 0, 8)
                    values[at.lane] = NUMBER.unpack(data)[0] if data is not None else 0
                found.append((cut, values))
        return found

    def close(self) -> None:
        for place in self.places.values():
            place.close()
        shutil.rmtree(self.root, ignore_errors=True)
