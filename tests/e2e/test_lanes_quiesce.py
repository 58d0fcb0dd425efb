"""A checkpoint of a group with several lanes while a real guest is frozen by its own agent."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path
from typing import Any

import pytest
from sites import GROUP, MIB, WAIT_S, wait_until
from test_lanes import Lanes
from test_quiesce import CACHE, CONTENT, AgentGuest, needs_recovery, with_agent

from vrep import errors
from vrep.app.demo.guest import GuestDisk, GuestTask
from vrep.app.demo.guest_disk import build_disk
from vrep.app.demo.guest_image import GuestImage

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]


def test_all_lanes_are_cut_while_the_guest_is_frozen(tmp_path: Path) -> None:
    pair = Lanes(
        disks={"first": CONTENT.size, "second": 4 * MIB}, source_settings="cut_every_s = 0.5"
    )
    try:
        build_disk(pair.images["first"], CONTENT)
        with pair.a.paths.config.open("a") as config:
            config.write(f'[quiesce]\nagent = "unix:{tmp_path}/{{group}}.qga"\nlimit_s = 30.0\n')
        pair.up(settle=False)
        pair.settle()
        guest = AgentGuest(
            with_agent(GuestImage.build(CACHE), tmp_path),
            [GuestDisk(pair.a.disk_uri(GROUP, "first"))],
            GuestTask(pause_s=0.02),
        )
        guest.agent = tmp_path / f"{GROUP}.qga"
        with guest:
            guest.wait_for_lines(5, 300.0)
            with pair.client("second") as client:
                client.write(0, b"before" + bytes(506))
            tries = itertools.count()

            def made() -> tuple[str, dict[str, Any]]:
                label = f"frozen-{next(tries)}"  # a try that fails may leave its cut behind
                return label, pair.a.checkpoint(GROUP, label, quiesce=True, wait_s=60.0)

            quiet, frozen = wait_until(
                "the guest is frozen, and all lanes are cut", made, timeout_s=300.0
            )
            assert frozen["quiesced"]
            assert frozen["absent"] == []
            with pair.client("second") as client:
                client.write(0, b"behind" + bytes(506))
            guest.wait_for_lines(len(guest.witness) + 5, 300.0)  # it thawed
            assert not pair.a.checkpoint(GROUP, "plain", wait_s=WAIT_S)["quiesced"]
            guest.kill9()
        unclean = {}
        for label in (quiet, "plain"):
            files = pair.b.export(GROUP, tmp_path / label, at=label)
            disks = {disk.name: Path(disk.path) for disk in files.disks}
            unclean[label] = needs_recovery(disks["first"])
            wanted = b"before" if label == quiet else b"behind"
            assert disks["second"].read_bytes()[:6] == wanted
            if not unclean[label]:
                check = ["/sbin/e2fsck", "-fn", disks["first"]]
                subprocess.run(check, check=True, stdout=subprocess.DEVNULL)
        assert unclean == {quiet: False, "plain": True}
        with pytest.raises(errors.VrepError):
            pair.a.checkpoint(GROUP, "gone", quiesce=True)
        assert "gone" not in [cut.label for cut in pair.cuts()]
    finally:
        pair.close()
