"""The segment that was open when a store was left: cut behind its last whole commit, and closed."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vrep._core.index import Index
from vrep.errors import CorruptError
from vrep.target.files import Files
from vrep.target.manifest import Manifest, Position
from vrep.target.segment import entry_path, index_tail, scan_tail, segment_path, write_footer

__all__ = ["close_open_segment"]

log = logging.getLogger("vrep.target")

Structs = NDArray[np.void]


def close_open_segment(
    directory: Path, group_id: bytes, manifest: Manifest, files: Files, aged_ns: int
) -> tuple[Structs, Position, Any]:
    """Closed segments, last position and stream in force, after the open segment was scanned as
    the storage holds it, cut behind its last whole commit, and indexed."""
    sealed = manifest.segments
    last = Position.of(sealed[-1]["last"]) if len(sealed) else Position()
    if not manifest.active_segment:
        return sealed, last, _last_stream(directory, manifest)
    path = segment_path(directory, manifest.active_segment)
    try:
        fd = files.open(path)
    except FileNotFoundError:
        raise CorruptError(f"{path} is missing") from None
    try:
        files.sync(fd)
        data = files.read_stored(path)
        try:
            scan = scan_tail(data, group_id, manifest.active_segment)
        except CorruptError as error:
            raise CorruptError(f"{path}: {error.detail}") from None
        if not scan.records:
            return sealed, last, _last_stream(directory, manifest)
        stream_id = scan.header["stream_id"].tobytes()
        stream = _last_stream(directory, manifest) if any(stream_id) else None
        builder = index_tail(data, scan, group_id, stream)
        if scan.end < len(data):
            log.warning("%s: %d bytes of a torn tail are cut", path, len(data) - scan.end)
        files.truncate(fd, scan.end)
        builder.aged(aged_ns)
        entry = write_footer(files, fd, builder, scan.last, scan.end)
    finally:
        os.close(fd)
    return np.append(sealed, entry.reshape(1)), scan.last, builder.stream


def _last_stream(directory: Path, manifest: Manifest) -> Any:
    """The stream in force behind the last closed segment, None at the beginning."""
    if not len(manifest.segments):
        return None
    index = Index.open(entry_path(directory, manifest.segments[-1]))
    return index.streams[-1].copy() if len(index.streams) else None
