"""Attach through libvirt, which holds the VM's monitor itself: a session daemon of an unprivileged
user, with QEMU under TCG."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import libvirt
import libvirt_qemu
import msgspec
import pytest
from sites import GROUP, MIB, Pair, wait_until
from test_mirror import kept, replicates

pytestmark = pytest.mark.e2e
Made = Callable[..., Pair]

SIZE = 16 * MIB
DOMAIN = """
<domain type="qemu">
  <name>web</name>
  <memory unit="MiB">64</memory>
  <os><type arch="x86_64" machine="q35">hvm</type></os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type="file" device="disk">
      <driver name="qemu" type="{form}" discard="unmap"/>
      <source file="{image}"/>
      <target dev="vda" bus="virtio"/>
    </disk>
    <controller type="usb" model="none"/>
    <memballoon model="none"/>
  </devices>
</domain>
"""
DEVICE = "/machine/peripheral/virtio-disk0/virtio-backend"


class Domain:
    """A domain of libvirt on an image, and what it writes."""

    def __init__(self, uri: str, image: Path, form: str = "raw") -> None:
        self.connection = libvirt.open(uri)
        self._xml = DOMAIN.format(image=image, form=form)
        self.start()

    def start(self) -> None:
        self.domain = self.connection.createXML(self._xml, 0)

    def stop(self) -> None:
        self.domain.destroy()

    def monitor(self, command: str, **arguments: Any) -> Any:
        request = json.dumps({"execute": command, "arguments": arguments})
        return json.loads(libvirt_qemu.qemuMonitorCommand(self.domain, request, 0))["return"]

    def write(self, pattern: int, megabyte: int) -> None:
        for io in (f"write -q -P {pattern} {megabyte}M 256k", "flush"):
            line = f'qemu-io -d {DEVICE} "{io}"'
            assert not self.monitor("human-monitor-command", **{"command-line": line}).strip()

    def nodes(self) -> list[Any]:
        """All that must be as before."""
        nodes = self.monitor("query-named-block-nodes")
        for node in nodes:
            node["image"].pop("actual-size", None)
            if node["drv"] == "file":  # of a qcow2 image it grows
                del node["image"]["virtual-size"]
        return sorted(nodes, key=json.dumps)


def objects_held(pair: Pair) -> bool:
    """Whether the target is known to hold every object, which is looked at once a second."""
    return all(one["durable"] for one in pair.a.objects(GROUP))


def mirrors(pair: Pair) -> bool:
    """Whether a VM sends its writes now: it is neither missed, nor off."""
    status = pair.status()["filter"]
    return status["handover"] == "" and not status["mirror_rests"]


@pytest.fixture
def pair(make_pair: Made, libvirtd: str, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """Its sockets and image are open to the user that the domains run as."""
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", libvirtd)
    pair = make_pair(disks={"root": SIZE})
    pair.options = msgspec.structs.replace(pair.options, socket_mode=0o666)
    pair.root.chmod(0o711)
    pair.images["root"].chmod(0o666)
    return pair


def test_a_domain_is_attached_and_detached(pair: Pair, libvirtd: str) -> None:
    domain = Domain(libvirtd, pair.images["root"])
    try:
        domain.write(1, 1)
        before = domain.nodes()
        pair.up_beside()
        result = pair.a.attach(GROUP, "libvirt:web")
        assert result is not None
        assert result.disks[0].topology in ("format", "storage")  # libvirt 9; later ones
        assert (result.objects, result.objects_missing) == (("domain.xml",), "")
        domain.write(2, 2)
        wait_until("the sync ends", lambda: pair.status()["state"] == "replicating")
        pair.settle()
        held = pair.images["root"].read_bytes()
        assert held[MIB : MIB + 4] == bytes([1] * 4)
        assert held[2 * MIB : 2 * MIB + 4] == bytes([2] * 4)
        assert pair.read_view()["root"] == held
        wait_until("the target holds the object", lambda: objects_held(pair))
        assert b"<name>web</name>" in pair.b.object_get(GROUP, "domain.xml")
        pair.a.detach(GROUP)
        assert domain.nodes() == before
        domain.write(3, 3)
        assert pair.images["root"].read_bytes()[3 * MIB : 3 * MIB + 4] == bytes([3] * 4)
        assert pair.read_view()["root"] == held
    finally:
        domain.stop()
        domain.connection.close()


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_a_domain_mirrors_its_writes(pair: Pair, libvirtd: str, form: str) -> None:
    """Also to a filter that was killed meanwhile, and when it is reset, or started anew."""
    image = pair.images["root"]
    if form == "qcow2":
        pair.scheme = form
        subprocess.run(["qemu-img", "create", "-q", "-f", form, image, str(SIZE)], check=True)
    domain = Domain(libvirtd, image, form)
    try:
        domain.write(1, 1)
        before = domain.nodes()
        pair.up_beside()
        with kept(pair):
            result = pair.a.attach(GROUP, "libvirt:web", mode="mirror")
            assert result is not None
            assert (result.objects, result.objects_missing) == (("domain.xml",), "")
            domain.write(2, 2)
            replicates(pair)
            assert pair.status()["conditions"] == []
            domain.domain.reset()
            domain.write(3, 3)
            pair.kill("filter")
            domain.write(4, 4)
            pair.start("filter")
            replicates(pair)
            status = pair.status()["filter"]
            assert status["opened_as"] == "killed"
            assert 0 < status["resync_bytes"] <= SIZE // 4
            losses = status["mirror_losses"]
            domain.stop()
            # Its condition goes again when the image of a VM that is off rests.
            wait_until("it is missed", lambda: pair.status()["filter"]["mirror_losses"] > losses)
            domain.start()
            domain.write(5, 5)
            wait_until("it is found", lambda: mirrors(pair))
            replicates(pair)
            pair.settle()
            recovered = pair.read_view()["root"]
            pair.a.detach(GROUP)
        assert domain.nodes() == before
        for number in range(1, 6):
            at = number * MIB
            assert recovered[at : at + 256 * 1024] == bytes([number]) * 256 * 1024
        domain.write(6, 6)
        domain.stop()
        command = ["qemu-img", "convert", "-f", form, "-O", "raw", image, pair.root / "plain"]
        subprocess.run(command, check=True)
        held = (pair.root / "plain").read_bytes()
        assert held[6 * MIB] == 6
        assert recovered[: 6 * MIB] == held[: 6 * MIB]
        assert recovered[7 * MIB :] == held[7 * MIB :]
    finally:
        with contextlib.suppress(libvirt.libvirtError):  # it has ended
            domain.stop()
        domain.connection.close()
