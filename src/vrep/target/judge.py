"""Whether received records may stand in a store: rules over their headers, which store nothing."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from vrep._core import layout
from vrep.errors import CorruptError, FencedError
from vrep.target.manifest import Manifest

__all__ = ["judge_records"]

_PLACED: Final = np.zeros(256, np.bool_)
"""by kind: whether a record has a place on a disk; looked up, which for each batch that arrives is
many times faster than a search"""
_PLACED[
    [
        layout.KIND_WRITE,
        layout.KIND_ZEROES,
        layout.KIND_RESIZE,
        layout.KIND_SYNC,
        layout.KIND_SYNC_ZEROES,
    ]
] = True


def judge_records(
    manifest: Manifest, headers: NDArray[np.void], *, begun: bool, follows: bool = True
) -> None:
    """Raise what is wrong with records that come next. `begun`: the history has a stream. Unless
    it `follows`, an epoch begins whose parent position is not held here."""
    if not begun and headers[0]["kind"] != layout.KIND_STREAM:
        raise CorruptError("a history begins with a STREAM record")
    accepted = manifest.current_epoch
    wrong = np.flatnonzero(headers["epoch"] != accepted.epoch)
    if len(wrong):
        raise FencedError(
            f"records of epoch {int(headers[wrong[0]]['epoch'])}, but epoch {accepted.epoch} "
            "is the one that is accepted"
        )
    if (headers["lane"] != manifest.lane).any():
        raise CorruptError(f"records of another lane than {manifest.lane}")
    kinds = headers["kind"]
    if not follows:
        # What lies between was written to another site: nothing in it is a point here, and the
        # blocks that it changed come with the sync that this gap is for.
        first = headers[~np.isin(kinds, (layout.KIND_STREAM, layout.KIND_TALLY))][:1]
        if len(first) and first[0]["kind"] != layout.KIND_GAP_BEGIN:
            raise CorruptError(
                f"epoch {accepted.epoch} begins at {accepted.parent}, which is not held here: a "
                "gap comes first"
            )
    # What lies behind the end that a disk has at its place is never shown: zeroes for the space
    # that a disk gains stand before its new size.
    bad = _PLACED[kinds]
    for disk in manifest.disks:
        bad &= headers["disk"] != disk.index
    if bad.any():
        first = headers[np.flatnonzero(bad)[0]]
        raise CorruptError(f"record {int(first['seq'])} is of a disk that the group has not")
