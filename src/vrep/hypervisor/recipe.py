"""What is done to a VM's block graph to put the filter under a disk, and to take it away.

A recipe is made for a graph that was read, and knows these topologies; any other is refused:

    format    device → [throttle →] raw → file   the raw node is reopened
    storage   device → file                      a raw node is inserted, and is reopened
    unnamed   device → raw (no name) → file      the same: QEMU reopens no node that it named

``file`` is ``file`` or ``host_device``. One command switches all disks of a group from what their
raw node stands on to an NBD node on the filter's socket. What it stood on stays open in QEMU,
without locks: the same command gives it to a node that nobody uses. So going back needs no name,
option or descriptor that QEMU has and vrep has not.

A VM with I/O threads is refused: QEMU 7.2 aborts when a node is reopened, or another is put above
it, while an I/O thread works on it (it lets go of a lock that it does not hold). QEMU 7.2 aborts,
too, when a device is given the node that it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from vrep import errors
from vrep.hypervisor.graph import Device, Graph, Node

PASSED: Final = frozenset({"throttle"})
"""drivers of nodes between a device and its raw node that change no data"""
Topology = Literal["format", "storage", "unnamed"]


class Command(msgspec.Struct, frozen=True):
    """One command of QMP."""

    execute: str
    arguments: dict[str, Any]


class Step(msgspec.Struct, frozen=True):
    """A command, and what undoes it."""

    do: Command
    undo: tuple[Command, ...]


class DiskPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One disk of a group in a VM's graph, with all that going back needs."""

    name: str
    """of the group's disk"""
    topology: Topology
    device: str
    """in QOM; empty where it is not touched"""
    root: str
    """the node under the device"""
    top: str
    """the raw node that is reopened"""
    below: str
    """what it stands on without the filter"""
    keep: str
    """the node that keeps `below` open meanwhile"""
    nothing: str
    """what that stands on without it"""
    nbd: str
    detect_zeroes: str = "off"
    direct: bool = False
    no_flush: bool = False

    @property
    def inserted(self) -> bool:
        return self.topology != "format"


def plan(graph: Graph, tag: str, index: int, name: str, path: Path, size: int) -> DiskPlan:
    """The recipe of one disk. `tag` makes the names of new nodes those of one group.
    NotFoundError: the VM has no such disk. UnsupportedError: a topology that is not known."""
    if graph.io_threads:
        raise unknown(
            name,
            "the VM has I/O threads, and reopening a node that one works on ends some QEMUs: "
            "--mode mirror takes it",
        )
    found = graph.storage_of(path)
    if not found:
        raise errors.NotFoundError(f"disk {name!r}: the VM does not have {path} open")
    if len(found) > 1:
        names = ", ".join(node.name for node in found)
        raise unknown(name, f"the VM has {path} open more than once ({names})")
    storage = found[0]
    if storage.read_only:
        raise unknown(name, f"the VM has {path} open to be read only")
    if storage.bytes != size:
        raise errors.StateError(
            f"disk {name!r} has {storage.bytes} bytes in the VM, and {size} in the group"
        )
    parents = graph.parents(storage.name)
    if len(parents) != 1:
        raise unknown(name, f"{chain(graph, storage)}: {len(parents)} users of one node")
    parent = parents[0]
    nodes = {part: f"vrep-{part}-{tag}-{index}" for part in ("keep", "nothing", "nbd")}
    inserted = f"vrep-top-{tag}-{index}"
    if parent.kind == "block-backend":
        device = _device(graph, name, storage)
        return _plan(name, "storage", device, storage, inserted, storage.name, nodes)
    raw = graph.nodes.get(parent.name) if parent.kind == "block-driver" else None
    if raw is None or raw.driver != "raw":
        raise unknown(name, chain(graph, storage))
    if raw.bytes != storage.bytes or raw.filename.startswith("json:"):
        raise unknown(name, f"{chain(graph, storage)}: {raw.name} shows a part of its file")
    if raw.unnamed:
        device = _device(graph, name, raw)
        return _plan(name, "unnamed", device, raw, inserted, raw.name, nodes)
    _check_above(graph, name, raw)
    return _plan(name, "format", None, raw, raw.name, storage.name, nodes)


def _plan(
    name: str,
    topology: Topology,
    device: Device | None,
    like: Node,
    top: str,
    below: str,
    nodes: dict[str, str],
) -> DiskPlan:
    return DiskPlan(
        name=name,
        topology=topology,
        device=device.path if device else "",
        root=device.root if device else "",
        top=top,
        below=below,
        detect_zeroes=like.detect_zeroes,
        direct=like.direct,
        no_flush=like.no_flush,
        **nodes,
    )


def _device(graph: Graph, name: str, root: Node) -> Device:
    """The device that stands on a node, and nothing else does."""
    device = graph.device_of(root.name)
    if device is None or len(graph.parents(root.name)) != 1:
        raise unknown(name, f"{root.name} is not the node of one device")
    return device


def _check_above(graph: Graph, name: str, raw: Node) -> None:
    """Every way from a raw node up ends at a device or an export, through nothing but throttles:
    what copies, mirrors or keeps old blocks would go on with what it knows of the old child."""
    waiting = [raw.name]
    ends = 0
    while waiting:
        for parent in graph.parents(waiting.pop()):
            if parent.kind == "block-backend":
                ends += 1
            elif parent.kind == "block-driver" and graph.nodes[parent.name].driver in PASSED:
                waiting.append(parent.name)
            else:
                raise unknown(name, f"{chain(graph, raw)}: a {parent.kind}, {parent.name}")
    if ends == 0:
        raise unknown(name, f"{chain(graph, raw)}: no device uses it")


def unknown(name: str, what: str) -> errors.UnsupportedError:
    """A graph that there is no recipe for."""
    return errors.UnsupportedError(f"disk {name!r}: no recipe for its block graph: {what}")


def chain(graph: Graph, node: Node) -> str:
    """From a node up, as far as there is one way: for an error's text."""
    words = [f"{node.driver} ({node.name})"]
    name = node.name
    while len(parents := graph.parents(name)) == 1 and len(words) < 8:
        name = parents[0].name
        above = graph.nodes.get(name) if parents[0].kind == "block-driver" else None
        words.insert(0, f"{above.driver if above else parents[0].kind} ({name})")
        if above is None:
            break
    return " → ".join(words)


# ---- commands -----------------------------------------------------------------------


def prepare(disk: DiskPlan, socket: Path, reconnect_s: int) -> list[Step]:
    """What is added before the switch; each can be undone as long as nobody switched."""
    steps = [
        _added(
            disk,
            {
                "driver": "nbd",
                "node-name": disk.nbd,
                "server": {"type": "unix", "path": str(socket)},
                "export": disk.name,
                "reconnect-delay": reconnect_s,
                "discard": "unmap",
            },
        ),
        _added(disk, {"driver": "null-co", "node-name": disk.nothing, "size": 0}),
        _added(disk, {**_keeper(disk), "file": disk.nothing}),
    ]
    if disk.inserted:
        top = {**_options(disk), "file": disk.below, "discard": "unmap"}
        moved = Step(do=_root(disk, disk.top), undo=(_root(disk, disk.root),))
        steps += [_added(disk, top), moved]
    return steps


def switch(disks: Sequence[DiskPlan], *, on: bool) -> Command:
    """All disks at once: their raw nodes onto the filter, or back to what they stood on. What is
    not said of a node falls back to its default, but for `discard`, which stays. A node is let go
    of before another takes it."""
    tops = [{**_options(d), "file": d.nbd if on else d.below} for d in disks]
    keepers = [{**_keeper(d), "file": d.below if on else d.nothing} for d in disks]
    return Command("blockdev-reopen", {"options": tops + keepers if on else keepers + tops})


def remove(disk: DiskPlan, graph: Graph) -> list[Command]:
    """What is left to do for a disk that does not stand on the filter any more, by the graph as it
    is now: done twice, the second time does nothing."""
    commands = []
    if disk.inserted:
        device = graph.device(disk.device)
        if device is not None and device.root == disk.top:
            commands.append(_root(disk, disk.root))
    for name in _added_nodes(disk):
        if name in graph.nodes:
            commands += _deleted(disk, name)
    return commands


def remove_all(disk: DiskPlan) -> list[Command]:
    """What `remove` is right after a switch back."""
    commands = [_root(disk, disk.root)] if disk.inserted else []
    for name in _added_nodes(disk):
        commands += _deleted(disk, name)
    return commands


def _added_nodes(disk: DiskPlan) -> tuple[str, ...]:
    """Names of the nodes that are not the VM's, in the order in which they go."""
    own = (disk.keep, disk.nothing, disk.nbd)
    return (disk.top, *own) if disk.inserted else own


def stands_on(disk: DiskPlan, graph: Graph) -> Literal["filter", "image", "neither"]:
    """Where a disk's data go now."""
    if graph.child(disk.top) == disk.nbd:
        return "filter"
    if disk.below not in graph.nodes:
        return "neither"
    if disk.inserted:
        device = graph.device(disk.device)
        if device is not None and device.root == disk.root:
            return "image"
    return "image" if graph.child(disk.top) == disk.below else "neither"


def _options(disk: DiskPlan) -> dict[str, Any]:
    """Of the raw node: those that `blockdev-reopen` would reset."""
    return {
        "driver": "raw",
        "node-name": disk.top,
        "read-only": False,
        "cache": {"direct": disk.direct, "no-flush": disk.no_flush},
        "detect-zeroes": disk.detect_zeroes,
    }


def _keeper(disk: DiskPlan) -> dict[str, Any]:
    return {"driver": "raw", "node-name": disk.keep, "read-only": True}


def _added(disk: DiskPlan, options: dict[str, Any]) -> Step:
    return Step(
        do=Command("blockdev-add", options), undo=tuple(_deleted(disk, options["node-name"]))
    )


def _deleted(disk: DiskPlan, name: str) -> list[Command]:
    """QEMU flushes a node that it deletes, and a VM stands still while a server that is gone, or
    waits, does not answer: the connection is cut before."""
    deleted = Command("blockdev-del", {"node-name": name})
    if name != disk.nbd:
        return [deleted]
    instance = {"type": "block-node", "node-name": name}
    return [Command("yank", {"instances": [instance]}), deleted]


def _root(disk: DiskPlan, node: str) -> Command:
    return Command("qom-set", {"path": disk.device, "property": "drive", "value": node})


__all__ = [
    "PASSED",
    "Command",
    "DiskPlan",
    "Step",
    "chain",
    "plan",
    "prepare",
    "remove",
    "remove_all",
    "stands_on",
    "switch",
    "unknown",
]
