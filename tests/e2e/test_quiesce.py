"""A checkpoint with a real guest frozen by Debian's own guest agent: its file system is at rest."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from sites import GROUP, WAIT_S, Pair, wait_until

from vrep import errors
from vrep.app.demo.guest import Guest, GuestDisk, GuestTask
from vrep.app.demo.guest_disk import DiskContent, build_disk
from vrep.app.demo.guest_image import CpioWriter, GuestImage

pytestmark = pytest.mark.e2e
Made = Callable[..., Pair]

CACHE = Path(__file__).parents[2] / "build" / "guest"
CONTENT = DiskContent(
    size=64 << 20,
    small_files=10,
    small_size_max=16 << 10,
    text_files=4,
    text_size_max=32 << 10,
    big_files=1,
    big_size=1 << 20,
)
AGENT = Path("/usr/sbin/qemu-ga")
INIT = """#!/bin/busybox sh
PATH=/bin
(
    while [ ! -e /disk/log/lines.txt ]; do busybox sleep 0.1; done
    for port in /dev/vport*p*; do
        exec /bin/qemu-ga -m virtio-serial -p "$port" -t / </dev/null >/dev/null 2>&1
    done
) &
exec /bin/busybox sh /init.demo
"""


class AgentGuest(Guest):
    """The demonstration's guest with a guest agent."""

    agent: Path

    def command(self) -> list[str]:
        return [
            *super().command(),
            "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=qga,path={self.agent},server=on,wait=off",
            "-device", "virtserialport,chardev=qga,name=org.qemu.guest_agent.0",
        ]  # fmt: skip


def with_agent(image: GuestImage, work: Path) -> GuestImage:
    """The image with the agent of this host and what it is linked with, started beside `/init`."""
    import vrep.app.demo

    linked = subprocess.run(["ldd", AGENT], capture_output=True, text=True, check=True).stdout
    words = [line.split() for line in linked.splitlines()]
    libraries = [Path(next(w for w in ws if w.startswith("/"))) for ws in words if "/" in str(ws)]
    assert libraries
    archive = CpioWriter()
    made = {"."}
    for name, content in (
        [("init", INIT.encode()), ("bin/qemu-ga", AGENT.read_bytes())]
        + [("init.demo", (Path(vrep.app.demo.__path__[0]) / "guest_init.sh").read_bytes())]
        + [(str(path)[1:], path.read_bytes()) for path in libraries]
    ):
        for parent in reversed(Path(name).parents):
            if str(parent) not in made:
                made.add(str(parent))
                archive.add_directory(str(parent))
        archive.add_file(name, content, mode=0o755)
    archive.add_device("dev/null", major=1, minor=3)  # the shell asks for it
    whole = work / "initramfs"
    first = image.initramfs.read_bytes()
    whole.write_bytes(first + bytes(-len(first) % 512) + archive.finish())
    return GuestImage(kernel=image.kernel, initramfs=whole, packages=image.packages)


def needs_recovery(disk: Path) -> bool:
    """Whether ext4 would replay its journal at the next mount."""
    shown = subprocess.run(
        ["/sbin/dumpe2fs", "-h", disk], capture_output=True, text=True, check=True
    ).stdout
    features = next(line for line in shown.splitlines() if line.startswith("Filesystem features"))
    return "needs_recovery" in features


def test_a_frozen_guest_leaves_a_clean_file_system(make_pair: Made, tmp_path: Path) -> None:
    """And one that was not frozen leaves a journal to replay; hooks are run around it."""
    pair = make_pair(disks={"root": CONTENT.size})
    build_disk(pair.images["root"], CONTENT)
    hooks = tmp_path / "hooks"
    with pair.a.paths.config.open("a") as config:
        config.write(
            f'[quiesce]\nagent = "unix:{tmp_path}/{{group}}.qga"\nlimit_s = 30.0\n'
            f'before = "echo before >> {hooks}"\nafter = "echo after $VREP_LABEL >> {hooks}"\n'
        )
    pair.up()
    guest = AgentGuest(
        with_agent(GuestImage.build(CACHE), tmp_path),
        [GuestDisk(pair.a.disk_uri(GROUP))],
        GuestTask(pause_s=0.02),
    )
    guest.agent = tmp_path / f"{GROUP}.qga"
    with guest:
        guest.wait_for_lines(5, 300.0)
        tries = count(1)
        frozen = ""

        def freeze() -> Any:
            nonlocal frozen
            frozen = f"frozen-{next(tries)}"  # a label of two checkpoints would name none
            return pair.a.checkpoint(GROUP, frozen, quiesce=True)

        # The agent starts beside the workload.
        marked = wait_until("the guest is frozen and marked", freeze, 240.0)
        assert marked["quiesced"]
        at = len(guest.witness)
        guest.wait_for_lines(at + 5, 240.0)  # it thawed
        plain = pair.a.checkpoint(GROUP, "plain", wait_s=WAIT_S)
        assert not plain["quiesced"]
        pair.a.checkpoint(GROUP, "again", quiesce=True, wait_s=WAIT_S)
        guest.kill9()
    assert hooks.read_text().splitlines()[-2:] == ["before", "after again"]
    unclean = {}
    for label in (frozen, "plain", "again"):
        disk = tmp_path / label
        disk.write_bytes(pair.read_view(label)["root"])
        unclean[label] = needs_recovery(disk)
        if not unclean[label]:
            subprocess.run(["/sbin/e2fsck", "-fn", disk], check=True, stdout=subprocess.DEVNULL)
    assert unclean == {frozen: False, "plain": True, "again": False}
    with pytest.raises(errors.VrepError):
        pair.a.checkpoint(GROUP, "gone", quiesce=True)
    assert hooks.read_text().splitlines()[-1] == "after gone"
