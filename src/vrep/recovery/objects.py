"""Objects: every file of a group's store, read and held against what names it.

`check_runs` and `check_manifests` look at what the check of a history (see `check`) does not need:
merged runs, which views read instead of the segments' own indexes, and the manifests that are
kept. A run must be, byte for byte, what a merge of its segments' indexes gives. `survey` is asked
when something is damaged: it names each damaged segment, with its positions, not only the first.
"""

from __future__ import annotations

import mmap
import os
import re
import tempfile
from pathlib import Path
from typing import Any, Final

from vrep._core import layout
from vrep._core import segment as native
from vrep._core.index import Index, merge
from vrep.errors import CorruptError, IntegrityError, StorageError
from vrep.recovery.verdict import DAMAGES_MAX, TEXT_LETTERS_MAX, Damage
from vrep.target.manifest import Manifest, Position, manifest_numbers, manifest_path
from vrep.target.reader import StoreReader
from vrep.target.runs import check_file
from vrep.target.segment import entry_path, run_path, scan_tail, segment_path

__all__ = ["ReadFirst", "check_manifests", "check_runs", "damage_of", "survey"]

MERGED_AT_ONCE: Final = 512
READ_BYTES: Final = 1 << 20
_NAMED: Final = re.compile(r"(seg|run|manifest)-([0-9a-f]{8,16})|segment ([0-9a-f]{8})")
_TRAILER_BYTES: Final = layout.INDEX_TRAILER.itemsize


def _damage(name: str, first: Position | None, last: Position | None, text: str) -> Damage:
    return Damage(
        object=name,
        first=f"pos:{first}" if first is not None else "",
        last=f"pos:{last}" if last is not None else "",
        text=text[:TEXT_LETTERS_MAX],
    )


class ReadFirst(StoreReader):
    """Reads the file of each segment before it maps it: what a disk cannot read is named. Through
    a mapping the kernel would kill the process. The check that follows finds it in memory."""

    def _map(self, segment: int) -> memoryview:
        _read_through(self.path(segment))
        return super()._map(segment)


def _read_through(path: Path) -> None:
    """Read a whole file."""
    try:
        with path.open("rb", buffering=0) as file:
            room = bytearray(READ_BYTES)
            while file.readinto(room):
                continue
    except FileNotFoundError:
        raise CorruptError(f"{path} is missing") from None
    except OSError as error:
        raise CorruptError(f"{path}: it cannot be read: {error.strerror or error}") from None


def check_manifests(directory: Path, group_id: bytes) -> tuple[int, list[Damage]]:
    """Read every manifest that is kept: how many there are, and those that are damaged."""
    count, found = 0, []
    for number in manifest_numbers(directory):
        path = manifest_path(directory, number)
        try:
            manifest = Manifest.decode(path.read_bytes())
            if manifest.number != number or manifest.group_id != group_id:
                raise CorruptError("its content is another manifest's or another group's")
        except FileNotFoundError:
            continue  # a newer one took its place since the listing
        except IntegrityError as error:
            found.append(_damage(path.name, None, None, error.detail))
        count += 1
    return count, found


# ---- runs -------------------------------------------------------------------------------------


def check_runs(reader: StoreReader, scratch: Path) -> tuple[int, list[Damage]]:
    """Compare every merged run with the indexes of its segments, which must have been checked.
    What is merged for it goes to a nameless file in the directory `scratch`."""
    manifest, found = reader.manifest, []
    for entry in manifest.runs:
        path = run_path(reader.directory, int(entry["run"]))
        try:
            _check_run(reader, entry, path, scratch)
        except IntegrityError as error:
            inside = manifest.segments[
                (manifest.segments["segment"] >= entry["first_segment"])
                & (manifest.segments["segment"] <= entry["last_segment"])
            ]
            first = Position.of(inside[0]["first"]) if len(inside) else None
            last = Position.of(inside[-1]["last"]) if len(inside) else None
            text = error.detail.removeprefix(f"{path}").lstrip(": ")
            found.append(_damage(path.name, first, last, text))
    return len(manifest.runs), found


def _check_run(reader: StoreReader, entry: Any, path: Path, scratch: Path) -> None:
    check_file(path, int(entry["file_bytes"]))
    _read_through(path)
    run = Index.open(path, verify=True)
    if run.digest != entry["index_digest"].tobytes():
        raise CorruptError("it is not the one that the manifest names")
    numbers = reader.manifest.segments["segment"]
    inside = numbers[(numbers >= entry["first_segment"]) & (numbers <= entry["last_segment"])]
    indexes = [Index.open(reader.path(int(n))) for n in inside]
    level = int(entry["level"])
    with _Scratch(scratch) as files:
        while len(indexes) > MERGED_AT_ONCE:
            parts = [
                indexes[i : i + MERGED_AT_ONCE] for i in range(0, len(indexes), MERGED_AT_ONCE)
            ]
            indexes = [files.merged(part, level) for part in parts]
        merged = files.merged(indexes, level)
        if merged.digest != run.digest:
            raise CorruptError("it does not say what the indexes of its segments say")


class _Scratch:
    """Files without names, for as long as their indexes are used."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._fds: list[int] = []

    def __enter__(self) -> _Scratch:
        return self

    def __exit__(self, *_exc: object) -> None:
        for fd in self._fds:
            os.close(fd)

    def merged(self, indexes: list[Index], level: int) -> Index:
        """The merge of indexes, opened."""
        try:
            fd, name = tempfile.mkstemp(dir=self._directory, prefix=".merged-")
            self._fds.append(fd)
            Path(name).unlink()
            merge(indexes, fd, level)
        except OSError as error:
            raise StorageError(f"{self._directory}: {error.strerror or error}") from None
        return Index.open(f"/proc/self/fd/{fd}")


# ---- segments ---------------------------------------------------------------------------------


def survey(directory: Path, group_id: bytes, manifest: Manifest) -> list[Damage]:
    """Every segment that is damaged or missing: its file, its positions and where it is wrong."""
    found = []
    for entry in manifest.segments:
        first, last = Position.of(entry["first"]), Position.of(entry["last"])
        path = entry_path(directory, entry)
        try:
            _read_segment(path, group_id, entry)
        except (IntegrityError, StorageError, OSError) as error:
            found.append(_damage(path.name, first, last, _text(path, error)))
    if manifest.active_segment:
        path = segment_path(directory, manifest.active_segment)
        after = Position.of(manifest.segments[-1]["last"]) if len(manifest.segments) else None
        try:
            scan_tail(memoryview(path.read_bytes()), group_id, manifest.active_segment)
        except (IntegrityError, OSError) as error:
            found.append(_damage(path.name, after, None, _text(path, error)))
    return found[:DAMAGES_MAX]


def _text(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "it is missing"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = error.detail if isinstance(error, IntegrityError | StorageError) else str(error)
    text = text.removeprefix(f"{path}").lstrip(": ")
    return "it is missing" if text == "is missing" else text


def _read_segment(path: Path, group_id: bytes, entry: Any) -> None:
    check_file(path, int(entry["file_bytes"]))
    _read_through(path)
    index = Index.open(path, verify=True)
    if index.digest != entry["index_digest"].tobytes():
        raise CorruptError("its index is not the one that the manifest names")
    end = int(entry["data_end"])
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as room:
        data = memoryview(room)[:end]
        try:
            result, _commits = native.scan(data, group_id, int(entry["segment"]))
        finally:
            data.release()
    if result["end"] != end:
        raise CorruptError(
            f"damaged at byte {result['wrong_at']} of {end}, after position "
            f"{result['last'][0]}/{result['lane']}/{result['last'][1]}"
        )


def damage_of(error: IntegrityError, manifest: Manifest) -> Damage:
    """What an error of a check names, with the positions that its object holds."""
    named = _NAMED.search(error.detail)
    if named is None:
        return _damage("history", None, None, str(error))
    kind, number = named[1] or "seg", int(named[2] or named[3], 16)
    name = f"{kind}-{number:08x}"
    segments = manifest.segments
    if kind == "manifest":
        return _damage(named[0], None, None, str(error))
    if kind == "run":
        rows = [run for run in manifest.runs if int(run["run"]) == number]
        low, high = (
            (int(rows[0]["first_segment"]), int(rows[0]["last_segment"])) if rows else (0, 0)
        )
    else:
        low = high = number
    inside = segments[(segments["segment"] >= low) & (segments["segment"] <= high)]
    if len(inside):
        if kind == "seg":
            name = entry_path(Path(), inside[0]).name
        first, last = Position.of(inside[0]["first"]), Position.of(inside[-1]["last"])
        return _damage(name, first, last, str(error))
    # The segment that is being appended begins behind the last that was closed.
    after = Position.of(segments[-1]["last"]) if len(segments) and kind == "seg" else None
    return _damage(name, after, None, str(error))
