"""Fold by hand: keep the recovery points of a group from one on, and give back the rest.

With a target process it is that one which folds, in the background; without one it is done here
and now. Points that views read are not taken away, whatever the horizon is. Sizes are bytes.
"""

from __future__ import annotations

import time

import msgspec

from vrep.control import ControlClient
from vrep.errors import InvalidError, TenantKeyError, UnreachableError
from vrep.paths import SitePaths
from vrep.recovery.access import KeyAccess
from vrep.recovery.held import find_group
from vrep.recovery.history import format_time, needs_key, resolve
from vrep.recovery.view import points_in_use
from vrep.settings import load_config
from vrep.target.reader import StoreReader
from vrep.target.store import GroupStore, StoreOptions

__all__ = ["FoldResult", "fold"]


class FoldResult(msgspec.Struct, frozen=True):
    """What a fold did."""

    group: str
    group_id: str
    horizon: str
    """the oldest point that is kept"""
    time: str
    background: bool
    """the target process folds; the sizes are zero then"""
    input_bytes: int
    output_bytes: int


def fold(paths: SitePaths, group: str, at: str) -> FoldResult:
    """Keep recovery points from `at` on. Points before it cannot be had any more from now on."""
    held = find_group(paths, group)
    with StoreReader(paths.store, held.group_id) as reader:
        access: KeyAccess | None = None
        if needs_key(at):
            try:
                access = KeyAccess.open(paths, held.group_id, reader.wrapped_keys)
            except TenantKeyError as error:
                raise InvalidError(
                    f"the label {at!r} cannot be looked up: {error.detail}"
                ) from None
        point = resolve(reader, at, access, time.time_ns())
    horizon, background, read, written = point.position, True, 0, 0
    try:
        client = ControlClient(paths.socket("target"), timeout=30.0)
        client.call("fold", group_id=held.hex, horizon=list(horizon))
    except UnreachableError:
        background = False
        options = StoreOptions(
            segment_bytes=load_config(paths.config).target.segment_bytes,
            merge=False,
            held=lambda group_id: points_in_use(paths, group_id),
        )
        with GroupStore.open(paths.store, held.group_id, options=options) as store:
            for step in store.fold(horizon):
                read, written = read + step.input_bytes, written + step.output_bytes
    return FoldResult(
        group=held.name,
        group_id=held.hex,
        horizon=f"pos:{horizon}",
        time=format_time(point.wall_ns),
        background=background,
        input_bytes=read,
        output_bytes=written,
    )
