"""A view of recovered disks, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vrep.recovery.view import ViewInfo


def view_text(view: ViewInfo) -> str:
    """What it is, and where a VM finds its disks."""
    lines = [f"{view.group}: {view.kind} {view.id}, {view.state}, as of {view.time} ({view.point})"]
    if view.conditions:
        lines.append(f"  conditions: {', '.join(view.conditions)}")
    lines += [f"  {disk.name}: {disk.uri}" for disk in view.disks]
    return "\n".join(lines)


__all__ = ["view_text"]
