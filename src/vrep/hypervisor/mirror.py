"""What is done to a VM's block graph so that it sends a copy of each write: QEMU's mirror job.

The job's filter node goes between a device and its root node, whatever that is; the disk stays the
VM's own. A write reaches the image, then its copy is sent, then the guest is told (copy-mode
write-blocking). Overlapping writes go one after another through all three, by units of 512 bytes.
When the copy cannot be sent the job ends, and the guest is told all the same.

The target is not a node of its own but part of the job (``drive-mirror``), so that its connection
closes before the first write of which no copy is sent: the filter relies on that.

Each disk has a dirty bitmap in QEMU's memory from before the job on: what the guest wrote since. It
tells what was not sent when a job ended. Facts of QEMU 7.2, and measured there: the job passes on
neither flushes nor discards (a discard does not reach the image either), refuses to resize, and
with it the guest waits for as long as a server does not answer, until `yank`.

Of a qcow2 image the filter cannot read what the guest sees from the file, of which QEMU alone knows
the state. QEMU exports that node over NBD, to be read only, on a socket that is made for the filter
and passed to QEMU open: the user that QEMU runs as needs no access to a directory of ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import msgspec

from vrep import errors
from vrep.hypervisor.graph import Graph, Node
from vrep.hypervisor.recipe import PASSED, Command, chain, unknown

GRANULARITY: Final = 512
"""bytes; with more a write of less could be missed"""
BITMAP_BYTES: Final = 65536
"""a bit of the dirty bitmap"""
STORED: Final = "written"
"""the name of a bitmap in an image by which it is read"""


class MirrorPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One disk of a group in a VM's graph."""

    name: str
    """of the group's disk"""
    index: int
    node: str
    """the root node: a device stands on it, and no other node does"""
    device: str
    """in QOM; empty when none is told"""
    tag: str
    """makes the names of what is added those of one group"""
    image: bool = False
    """its file is not what the guest sees: the filter reads it through the VM"""

    @property
    def export(self) -> str:
        return export_name(self.tag, self.index)

    @property
    def job(self) -> str:
        return f"vrep-mirror-{self.tag}-{self.index}"

    @property
    def nbd(self) -> str:
        return f"vrep-copy-{self.tag}-{self.index}"

    @property
    def bitmaps(self) -> str:
        """What the names of its bitmaps begin with."""
        return f"vrep-{self.tag}-{self.index}-"

    @property
    def reader(self) -> str:
        """A node of an image that a bitmap is stored in, to be read."""
        return f"vrep-read-{self.tag}-{self.index}"


def export_name(tag: str, index: int) -> str:
    """Of the export of a disk that the filter reads through its VM."""
    return f"vrep-image-{tag}-{index}"


def plan(graph: Graph, tag: str, index: int, name: str, uri: str, size: int) -> MirrorPlan:
    """NotFoundError: the VM has no such disk. UnsupportedError: a topology that is not known."""
    scheme, _, where = uri.partition(":")
    path, image = Path(where), scheme == "qcow2"
    found = graph.storage_of(path)
    if not found:
        raise errors.NotFoundError(f"disk {name!r}: the VM does not have {path} open")
    if len(found) > 1:
        names = ", ".join(node.name for node in found)
        raise unknown(name, f"the VM has {path} open more than once ({names})")
    if image and graph.io_threads:
        raise unknown(
            name, "the VM has I/O threads, and exporting a node that one works on ends some QEMUs"
        )
    root = _root(graph, name, found[0], image)
    if root.read_only:
        raise unknown(name, f"the VM has {path} open to be read only")
    if root.bytes != size:
        raise errors.StateError(
            f"disk {name!r} has {root.bytes} bytes in the VM, and {size} in the group"
        )
    device = graph.device_of(root.name)
    return MirrorPlan(name, index, root.name, device.path if device else "", tag, image)


def _root(graph: Graph, name: str, storage: Node, image: bool) -> Node:
    """From the storage node up to where a device stands. Each node on the way shows all of the one
    below, as it is: what the filter reads is the storage itself. Of an `image` one of them is its
    format, and the filter reads what stands at the top."""
    node = storage
    while True:
        parents = graph.parents(node.name)
        if not parents:
            raise unknown(name, f"{chain(graph, storage)}: no device uses it")
        if all(parent.kind == "block-backend" for parent in parents):
            if image:
                raise unknown(name, f"{chain(graph, storage)}: it is not open as qcow2")
            return node
        above = graph.nodes.get(parents[0].name)
        if len(parents) != 1 or parents[0].kind != "block-driver" or above is None:
            raise unknown(name, f"{chain(graph, storage)}: {len(parents)} users of one node")
        if image and above.driver == "qcow2" and graph.child(above.name) == node.name:
            image, node = False, above
            continue
        part = above.bytes != node.bytes or above.filename.startswith("json:")
        if above.driver not in PASSED and (above.driver != "raw" or part):
            raise unknown(name, f"{chain(graph, storage)}: {above.driver} is not read as it stands")
        node = above


# ---- commands -----------------------------------------------------------------------


def add_bitmap(disk: MirrorPlan, number: int) -> Command:
    return Command(
        "block-dirty-bitmap-add",
        {
            "node": disk.node,
            "name": f"{disk.bitmaps}{number}",
            "granularity": BITMAP_BYTES,
        },
    )


def remove_bitmap(disk: MirrorPlan, name: str) -> Command:
    return Command("block-dirty-bitmap-remove", {"node": disk.node, "name": name})


def read(disk: MirrorPlan, bitmap: str, image: Path) -> tuple[Command, ...]:
    """Store what a bitmap has now in an image (qcow2), once its node is deleted."""
    file = {"driver": "file", "filename": str(image)}
    merged = {"node": disk.reader, "target": STORED}
    return (
        Command("blockdev-add", {"driver": "qcow2", "node-name": disk.reader, "file": file}),
        Command(
            "block-dirty-bitmap-add",
            {
                "node": disk.reader,
                "name": STORED,
                "granularity": BITMAP_BYTES,
                "persistent": True,
            },
        ),
        Command(
            "block-dirty-bitmap-merge",
            {**merged, "bitmaps": [{"node": disk.node, "name": bitmap}]},
        ),
    )


def listen(fd: str) -> Command:
    """QEMU's NBD server, of which it has one, on a socket that it was given under this name."""
    return Command("nbd-server-start", {"addr": {"type": "fd", "data": {"str": fd}}})


def export(disk: MirrorPlan) -> Command:
    return Command(
        "block-export-add",
        {
            "type": "nbd",
            "id": disk.export,
            "node-name": disk.node,
            "name": disk.export,
            "writable": False,
        },
    )


def unexport(disk: MirrorPlan) -> Command:
    return Command("block-export-del", {"id": disk.export, "mode": "hard"})


def start(disk: MirrorPlan, socket: Path) -> Command:
    target = {
        "driver": "raw",
        "file": {
            "driver": "nbd",
            "node-name": disk.nbd,
            "server": {"type": "unix", "path": str(socket)},
            "export": disk.name,
        },
    }
    return Command(
        "drive-mirror",
        {
            "job-id": disk.job,
            "device": disk.node,
            "target": f"json:{json.dumps(target)}",
            "format": "raw",
            "mode": "existing",
            "sync": "none",
            "granularity": GRANULARITY,
            "copy-mode": "write-blocking",
            "on-source-error": "report",
            "on-target-error": "report",
        },
    )


def cut(disk: MirrorPlan) -> Command:
    """Ends a job's connection at once, whatever hangs."""
    return Command("yank", {"instances": [{"type": "block-node", "node-name": disk.nbd}]})


def stop(disk: MirrorPlan, *, force: bool) -> Command:
    """Without `force` what is on its way is sent before."""
    return Command("block-job-cancel", {"device": disk.job, "force": force})


def bitmaps_of(disk: MirrorPlan, nodes: list[dict[str, Any]]) -> list[str]:
    """Names of its bitmaps, oldest first, as ``query-named-block-nodes`` tells."""
    names = [
        str(bitmap["name"])
        for node in nodes
        if node["node-name"] == disk.node
        for bitmap in node.get("dirty-bitmaps", ())
        if str(bitmap.get("name", "")).startswith(disk.bitmaps)
    ]
    return sorted(names, key=lambda name: int(name.removeprefix(disk.bitmaps)))


__all__ = [
    "GRANULARITY",
    "STORED",
    "MirrorPlan",
    "add_bitmap",
    "bitmaps_of",
    "cut",
    "export",
    "export_name",
    "listen",
    "plan",
    "read",
    "remove_bitmap",
    "start",
    "stop",
    "unexport",
]
