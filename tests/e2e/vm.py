"""A stock QEMU with disks, and writes that never stop: for tests of attaching to it.

No guest runs in it. What writes is an NBD export of QEMU on the node of a device, as a guest's
driver would, and (where a device may stand alone on its node) QEMU's own `qemu-io` through the
device.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from sites import Client

from vrep.hypervisor.monitor import SocketMonitor

BLOCK = 4096


class Vm:
    """A QEMU that runs until closed; `arguments` are its disks and devices."""

    def __init__(self, *arguments: str) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="vrep-vm-"))
        self.qmp = self.root / "qmp"
        self.vm = f"qmp:{self.qmp}"
        command = [
            "qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-m", "64", "-nodefaults",
            "-display", "none", "-qmp", f"unix:{self.qmp},server=on,wait=off",
            "-qmp", f"unix:{self.root}/qmp2,server=on,wait=off",
            "-qmp", f"unix:{self.root}/qmp3,server=on,wait=off", *arguments,
        ]  # fmt: skip
        self._log = (self.root / "log").open("wb")
        self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        deadline = time.monotonic() + 30
        while not (self.root / "qmp3").exists() or not self.qmp.exists():
            assert self.process.poll() is None, (self.root / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        self.monitor = SocketMonitor(self.root / "qmp2")
        """of the test: the other one is vrep's"""
        self._serving = False

    def export(self, node: str, name: str) -> str:
        """Serve a node by QEMU's own NBD server; its URI."""
        address = self.root / "nbd"
        if not self._serving:
            where = {"type": "unix", "data": {"path": str(address)}}
            self.monitor.execute("nbd-server-start", {"addr": where, "max-connections": 32})
            self._serving = True
        self.monitor.execute(
            "block-export-add",
            {"type": "nbd", "id": name, "node-name": node, "name": name, "writable": True},
        )
        return f"nbd+unix:///{name}?socket={address}"

    def qemu_io(self, device: str, command: str) -> str:
        """A command of `qemu-io` through a device."""
        line = f'qemu-io {"-d " if device.startswith("/") else ""}{device} "{command}"'
        return str(self.monitor.execute("human-monitor-command", {"command-line": line}))

    def graph(self) -> dict[str, Any]:
        """All of the block graph that must be as before: nodes with their facts, what stands on
        what, devices. Numbers that QEMU gives anew are left out."""
        nodes = self.monitor.execute("query-named-block-nodes")
        shape = self.monitor.execute("x-debug-query-block-graph")
        names = {node["id"]: (node["type"], node["name"]) for node in shape["nodes"]}
        edges = [
            (names[e["parent"]], names[e["child"]], e["name"], sorted(e["perm"]),
             sorted(e["shared-perm"]))
            for e in shape["edges"]
        ]  # fmt: skip
        for node in nodes:
            for image in (node["image"], node["image"].get("backing-image", {})):
                image.pop("actual-size", None)
        blocks = [
            (block["device"], block.get("qdev"), block.get("inserted", {}).get("node-name"))
            for block in self.monitor.execute("query-block")
        ]
        return {
            "nodes": sorted(nodes, key=json.dumps),
            "edges": sorted(edges),
            "devices": sorted(blocks, key=str),
        }

    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        self.monitor.close()
        self.process.kill()
        self.process.wait()
        self._log.close()
        print((self.root / "log").read_text())
        shutil.rmtree(self.root)

    def __enter__(self) -> Vm:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Writer(threading.Thread):
    """Writes numbered blocks one after another, each again and again, until stopped. One owner for
    each range of blocks: `held` says what each must hold."""

    def __init__(self, uri: str, first: int, count: int, mark: int) -> None:
        super().__init__(daemon=True)
        self._client = Client(uri, 120.0)
        self._first = first
        self._count = count
        self._mark = mark
        self._ending = threading.Event()
        self.held: dict[int, bytes] = {}
        self.writes = 0
        self.latest_ms = 0.0
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            while not self._ending.is_set():
                block = self._first + (self.writes * 7) % self._count
                data = (self._mark << 48 | self.writes).to_bytes(8, "little") * (BLOCK // 8)
                begun = time.monotonic()
                if self.writes % 64 == 63:
                    self._client.flush()
                self._client.write(block * BLOCK, data)
                self.latest_ms = max(self.latest_ms, (time.monotonic() - begun) * 1000)
                self.held[block] = data
                self.writes += 1
            self._client.flush()
        except BaseException as error:  # noqa: BLE001 - the test asks for it
            self.error = error
        finally:
            self._client.close()

    def goes_on(self, more: int = 200, timeout_s: float = 60.0) -> None:
        """So many more writes are done."""
        wanted = self.writes + more
        deadline = time.monotonic() + timeout_s
        while self.writes < wanted:
            assert self.error is None, self.error
            assert time.monotonic() < deadline, "the writer stands still"
            time.sleep(0.01)

    def stop(self) -> None:
        self._ending.set()
        self.join(120)
        assert not self.is_alive()
        assert self.error is None, self.error

    def check(self, content: bytes) -> None:
        """Every block holds what was written to it last."""
        assert self.held
        wrong = [b for b, data in self.held.items() if content[b * BLOCK :][:BLOCK] != data]
        assert not wrong, f"{len(wrong)} of {len(self.held)} blocks, the first is {wrong[0]}"


class DeviceLoad(threading.Thread):
    """Writes through a device by `qemu-io`: some at a time, not waited for; then a flush."""

    def __init__(self, vm: Vm, device: str) -> None:
        super().__init__(daemon=True)
        self._vm = vm
        self._device = device
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._error: BaseException | None = None
        self.rounds = 0
        self.held: dict[int, int] = {}
        self.start()

    def run(self) -> None:
        try:
            with contextlib.closing(SocketMonitor(self._vm.root / "qmp3")) as monitor:
                while not self._ending.is_set():
                    for slot in range(8):
                        block = (self.rounds * 8 + slot) * 5 % 2000
                        pattern = (self.rounds + slot) % 255 + 1
                        self._io(monitor, f"aio_write -q -P {pattern} {block * 4}k 4k")
                        self.held[block] = pattern
                    self._io(monitor, "aio_flush")
                    self.rounds += 1
        except BaseException as error:  # noqa: BLE001 - the test asks for it
            self._error = error

    def _io(self, monitor: SocketMonitor, command: str) -> None:
        line = f'qemu-io {"-d " if self._device.startswith("/") else ""}{self._device} "{command}"'
        answer = str(monitor.execute("human-monitor-command", {"command-line": line}))
        assert not answer.strip(), answer

    def goes_on(self, more: int = 30) -> None:
        wanted = self.rounds + more
        deadline = time.monotonic() + 60
        while self.rounds < wanted:
            assert self._error is None, self._error
            assert time.monotonic() < deadline, "the device stands still"
            time.sleep(0.01)

    def stop(self) -> None:
        self._ending.set()
        self.join(60)
        assert self._error is None, self._error

    def check(self, content: bytes) -> None:
        assert self.held
        for block, pattern in self.held.items():
            assert content[block * 4096 :][:4096] == bytes([pattern]) * 4096, block
