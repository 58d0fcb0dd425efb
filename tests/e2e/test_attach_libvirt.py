"""Attach through libvirt, which holds the VM's monitor itself: a session daemon of an unprivileged
user, with QEMU under TCG."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import libvirt_qemu
import msgspec
import pytest
from sites import GROUP, MIB, Pair, wait_until

pytestmark = pytest.mark.e2e
Made = Callable[..., Pair]

NOBODY = 65534
DOMAIN = """
<domain type="qemu">
  <name>web</name>
  <memory unit="MiB">64</memory>
  <os><type arch="x86_64" machine="q35">hvm</type></os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type="file" device="disk">
      <driver name="qemu" type="raw" discard="unmap"/>
      <source file="{image}"/>
      <target dev="vda" bus="virtio"/>
    </disk>
    <controller type="usb" model="none"/>
    <memballoon model="none"/>
  </devices>
</domain>
"""
DEVICE = "/machine/peripheral/virtio-disk0/virtio-backend"


@pytest.fixture
def libvirtd(tmp_path: Path) -> Iterator[str]:
    """A libvirt daemon in session mode; its URI."""
    if os.geteuid() != 0:
        pytest.skip("to run the daemon as another user needs root")
    root = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
    root.chmod(0o755)
    for name in ("run", "home"):
        (root / name).mkdir()
        os.chown(root / name, NOBODY, NOBODY)
    with (tmp_path / "libvirtd.log").open("wb") as log:
        daemon = subprocess.Popen(
            [
                "setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups",
                "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", f"HOME={root}/home",
                f"XDG_RUNTIME_DIR={root}/run", "libvirtd",
            ],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        socket = root / "run" / "libvirt" / "libvirt-sock"
        deadline = time.monotonic() + 30
        while not socket.exists():
            assert daemon.poll() is None, (tmp_path / "libvirtd.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield f"qemu+unix:///session?socket={socket}"
    finally:
        daemon.terminate()
        daemon.wait(30)
        subprocess.run(["rm", "-rf", root], check=True)


def test_a_domain_is_attached_and_detached(
    make_pair: Made, libvirtd: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", libvirtd)
    pair = make_pair(disks={"root": 16 * MIB})
    pair.options = msgspec.structs.replace(pair.options, socket_mode=0o666)
    pair.root.chmod(0o711)
    pair.images["root"].chmod(0o666)
    connection = libvirt.open(libvirtd)
    domain = connection.createXML(DOMAIN.format(image=pair.images["root"]), 0)

    def monitor(command: str, **arguments: Any) -> Any:
        request = json.dumps({"execute": command, "arguments": arguments})
        return json.loads(libvirt_qemu.qemuMonitorCommand(domain, request, 0))["return"]

    def write(pattern: int, megabyte: int) -> None:
        line = f'qemu-io -d {DEVICE} "write -q -P {pattern} {megabyte}M 256k"'
        assert not monitor("human-monitor-command", **{"command-line": line}).strip()

    try:
        write(1, 1)
        before = monitor("query-named-block-nodes")
        pair.up_beside()
        result = pair.a.attach(GROUP, "libvirt:web")
        assert result is not None
        assert result.disks[0].topology in ("format", "storage")  # libvirt 9; later ones
        assert (result.objects, result.objects_missing) == (("domain.xml",), "")
        write(2, 2)
        wait_until("the sync ends", lambda: pair.status()["state"] == "replicating")
        pair.settle()
        held = pair.images["root"].read_bytes()
        assert held[MIB : MIB + 4] == bytes([1] * 4)
        assert held[2 * MIB : 2 * MIB + 4] == bytes([2] * 4)
        assert pair.read_view()["root"] == held
        assert b"<name>web</name>" in pair.b.object_get(GROUP, "domain.xml")
        pair.a.detach(GROUP)
        after = monitor("query-named-block-nodes")
        for node in [*before, *after]:
            node["image"].pop("actual-size", None)
        assert sorted(after, key=json.dumps) == sorted(before, key=json.dumps)
        write(3, 3)
        assert pair.images["root"].read_bytes()[3 * MIB : 3 * MIB + 4] == bytes([3] * 4)
        assert pair.read_view()["root"] == held
    finally:
        domain.destroy()
        connection.close()
