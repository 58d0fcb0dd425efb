"""The block graph of a running QEMU, read through its monitor.

Nodes come from ``query-named-block-nodes``, what stands on what from ``x-debug-query-block-graph``,
devices from ``query-block``; QEMU 6.1 and newer. Sizes in bytes. A graph is as it was when it was
read; nothing here changes one.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vrep import errors
from vrep.hypervisor.monitor import Monitor

STORAGE: Final = ("file", "host_device")
NEEDED: Final = frozenset(
    {
        "blockdev-add",
        "blockdev-del",
        "blockdev-reopen",
        "qom-set",
        "query-block",
        "query-iothreads",
        "query-named-block-nodes",
        "query-status",
        "x-debug-query-block-graph",
        "yank",
    }
)


@dataclass(frozen=True)
class Node:
    """A node: `driver` (``raw``, ``file``, ``nbd``, ...), and the file name as QEMU tells it."""

    name: str
    driver: str
    filename: str
    bytes: int
    read_only: bool
    detect_zeroes: str
    direct: bool
    no_flush: bool

    @property
    def unnamed(self) -> bool:
        """Whether QEMU made the name up: such a node cannot be reopened."""
        return self.name.startswith("#")


@dataclass(frozen=True)
class Parent:
    """What stands on a node: another node, a ``block-backend`` (a device, an export), a
    ``block-job``."""

    kind: str
    name: str


@dataclass(frozen=True)
class Device:
    """A guest's device and the node that it stands on."""

    path: str
    """in QOM"""
    root: str


class Graph:
    """Nodes by name, what stands on each, and the devices."""

    def __init__(
        self,
        nodes: Mapping[str, Node],
        parents: Mapping[str, list[Parent]],
        children: Mapping[str, Mapping[str, str]],
        devices: list[Device],
        io_threads: bool,
    ) -> None:
        self.nodes = nodes
        self.io_threads = io_threads
        self.devices = devices
        self._parents = parents
        self._children = children

    @classmethod
    def read(cls, monitor: Monitor) -> Graph:
        """UnsupportedError: a QEMU that cannot do what is needed."""
        known = {entry["name"] for entry in monitor.execute("query-commands")}
        if not known >= NEEDED:
            missing = ", ".join(sorted(NEEDED - known))
            raise errors.UnsupportedError(f"this QEMU has no {missing}: 6.1 or newer is needed")
        nodes = {
            node["node-name"]: _node(node) for node in monitor.execute("query-named-block-nodes")
        }
        graph = monitor.execute("x-debug-query-block-graph")
        kinds = {node["id"]: Parent(node["type"], node["name"]) for node in graph["nodes"]}
        parents: dict[str, list[Parent]] = {}
        children: dict[str, dict[str, str]] = {}
        for edge in graph["edges"]:
            parent, child = kinds[edge["parent"]], kinds[edge["child"]]
            parents.setdefault(child.name, []).append(parent)
            if parent.kind == "block-driver":
                children.setdefault(parent.name, {})[edge["name"]] = child.name
        devices = [
            Device(_qom_path(str(entry["qdev"])), str(entry["inserted"]["node-name"]))
            for entry in monitor.execute("query-block")
            if entry.get("qdev") and entry.get("inserted")
        ]
        return cls(nodes, parents, children, devices, bool(monitor.execute("query-iothreads")))

    def parents(self, name: str) -> list[Parent]:
        return list(self._parents.get(name, ()))

    def child(self, name: str) -> str | None:
        """The node that `name` keeps its data in."""
        return self._children.get(name, {}).get("file")

    def device_of(self, root: str) -> Device | None:
        """The one device on a node; None when there is none, or more than one."""
        found = [device for device in self.devices if device.root == root]
        return found[0] if len(found) == 1 else None

    def device(self, path: str) -> Device | None:
        return next((device for device in self.devices if device.path == path), None)

    def storage_of(self, path: Path) -> list[Node]:
        """Nodes whose data are in a file or block device of this host."""
        return [
            node
            for node in self.nodes.values()
            if node.driver in STORAGE and _same_file(Path(node.filename), path)
        ]


def _node(found: Mapping[str, Any]) -> Node:
    cache = found.get("cache", {})
    return Node(
        name=str(found["node-name"]),
        driver=str(found["drv"]),
        filename=str(found["file"]),
        bytes=int(found["image"]["virtual-size"]),
        read_only=bool(found["ro"]),
        detect_zeroes=str(found.get("detect_zeroes", "off")),
        direct=bool(cache.get("direct", False)),
        no_flush=bool(cache.get("no-flush", False)),
    )


def _qom_path(qdev: str) -> str:
    """``query-block`` gives the id of a device that has one and whose disk is its own."""
    return qdev if qdev.startswith("/") else f"/machine/peripheral/{qdev}"


def _same_file(one: Path, other: Path) -> bool:
    try:
        first, second = one.stat(), other.stat()
    except OSError:  # out of this process's sight: the names have to do
        return os.path.realpath(one) == os.path.realpath(other)
    if stat.S_ISBLK(first.st_mode) and stat.S_ISBLK(second.st_mode):
        return first.st_rdev == second.st_rdev
    return os.path.samestat(first, second)


__all__ = ["Device", "Graph", "Node", "Parent"]
