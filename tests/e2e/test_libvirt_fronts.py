"""A guest of libvirt on each front-end, by the XML of the how-to: it boots, writes, its filter is
killed where its libvirt can wait for it, and what it wrote is at the other site."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import libvirt
import msgspec
import pytest
from sites import GROUP, Pair, wait_until

from vrep.app.demo.guest import GuestTask
from vrep.app.demo.guest_check import check_disk
from vrep.app.demo.guest_disk import DiskContent, build_disk
from vrep.app.demo.guest_image import GuestImage

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(1200),
    pytest.mark.every_front(quick=("vhost-user-blk",)),
]
Make = Callable[..., Pair]

NOBODY = 65534
BOOT_S = 300.0
"""of an emulated guest, beside others, on two processors"""
HOW_TO = Path(__file__).parents[2] / "docs" / "how-to" / "run-a-vm.md"
DOMAIN = """
<domain type="qemu">
  <name>web</name>
  <memory unit="MiB">256</memory>
  {memory}
  <os>
    <type arch="x86_64" machine="q35">hvm</type>
    <kernel>{root}/kernel</kernel>
    <initrd>{root}/initrd</initrd>
    <cmdline>console=ttyS0 quiet no_timer_check clocksource=hpet tsc=unstable {task}</cmdline>
  </os>
  <cpu mode="maximum"/>
  <on_poweroff>destroy</on_poweroff>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    {devices}
    <serial type="file"><source path="{root}/console"/></serial>
    <controller type="usb" model="none"/>
    <memballoon model="none"/>
  </devices>
</domain>
"""
SMALL = DiskContent(
    size=64 << 20,
    small_files=10,
    small_size_max=16 << 10,
    text_files=2,
    text_size_max=32 << 10,
    big_files=1,
    big_size=1 << 20,
)


def xml_of(pair: Pair) -> tuple[str, str]:
    """The how-to's XML of a front-end, with the addresses of a pair: of memory, of devices."""
    word = {"nbd": 'protocol="nbd"', "iscsi": 'protocol="iscsi"'}.get(pair.front, '"vhostuser"')
    blocks = re.findall(r"```xml\n(.*?)```", HOW_TO.read_text(), re.DOTALL)
    (text,) = [block for block in blocks if word in block]
    memory = re.search(r"<memoryBacking>.*</memoryBacking>\n", text, re.DOTALL)
    devices = text.replace(memory[0], "") if memory else text
    uri = pair.a.disk_uri(GROUP)
    if pair.front == "iscsi":
        where, _, name = uri.removeprefix("iscsi://").partition("/")
        host, port = where.split(":")
        devices = re.sub(r'name="iqn[^"]*"', f'name="{name}"', devices)
        devices = re.sub(
            r'<host name="[^"]*" port="\d+"', f'<host name="{host}" port="{port}"', devices
        )
    else:
        path = uri.rpartition("socket=")[2] if pair.front == "nbd" else uri.partition(":")[2]
        devices, count = re.subn(r"/var/lib/vrep/run/[\w.-]+\.sock", path, devices)
        assert count == 1
    return (memory[0] if memory else ""), devices


def test_a_domain_boots_and_writes(make_pair: Make, libvirtd: str, tmp_path: Path) -> None:
    image = GuestImage.build(Path(__file__).parents[2] / "build" / "guest")
    pair = make_pair(disks={"root": SMALL.size})
    pair.options = msgspec.structs.replace(pair.options, socket_mode=0o666)
    pair.root.chmod(0o711)
    manifest = build_disk(pair.images["root"], SMALL)
    pair.up()
    root = pair.root / "domain"
    root.mkdir()
    os.chown(root, NOBODY, NOBODY)
    shutil.copyfile(image.kernel, root / "kernel")
    shutil.copyfile(image.initramfs, root / "initrd")
    memory, devices = xml_of(pair)
    task = GuestTask(pause_s=0.02).kernel_options()
    connection = libvirt.open(libvirtd)
    domain = connection.createXML(
        DOMAIN.format(memory=memory, devices=devices, root=root, task=task), 0
    )

    def lines() -> int:
        return (root / "console").read_text(errors="replace").count("LINE ")

    try:
        wait_until("it writes", lambda: lines() > 20, BOOT_S)
        kept = "<reconnect" in domain.XMLDesc(0)
        print(f"reconnect in the domain: {kept}")
        if pair.front != "nbd" or kept:
            before = lines()
            pair.kill("filter")
            pair.start("filter")
            wait_until("it writes on", lambda: lines() > before + 20, BOOT_S)
        assert "FAILED" not in (root / "console").read_text(errors="replace")
    finally:
        domain.destroy()
        connection.close()
    pair.settle()
    pair.same_as_source()
    result = pair.b.export(GROUP, tmp_path / "recovered")
    verdict = check_disk(Path(result.disks[0].path), manifest)
    assert verdict.violations() == []
    assert verdict.log.last is not None
    assert verdict.log.last.number >= 20
