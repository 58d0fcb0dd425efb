"""A protected group as its source knows it, for tests that need no disk."""

from __future__ import annotations

from typing import Any

from vrep.groups import VERSION, DiskDefinition, GroupDefinition

__all__ = ["definition"]


def definition(**changes: Any) -> GroupDefinition:
    fields: dict[str, Any] = {
        "version": VERSION,
        "group_id": "11" * 16,
        "name": "web",
        "disks": (DiskDefinition("root", "file:/nowhere", 1 << 20, 0),),
        "to_site": "22" * 16,
        "key": "acme",
        "tenant_key_id": "k",
        "epoch": 1,
        "epoch_id": "33" * 16,
        "wrapped_keys": (),
        "created": 0.0,
    }
    return GroupDefinition(**{**fields, **changes})
