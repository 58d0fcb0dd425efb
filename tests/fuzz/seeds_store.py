"""Writes the seeds of the fuzz targets `segment` and `manifest`: lawful files of a store."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path

from vrep.target.store import GroupStore, StoreOptions

HERE = Path(__file__).resolve().parent
REPAIR = b"\1"


def main() -> None:
    path = HERE.parent / "oracle" / "store_records.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    records = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = records
    spec.loader.exec_module(records)
    with tempfile.TemporaryDirectory() as scratch:
        group = bytes(16)
        options = StoreOptions(segment_bytes=1 << 12, reserve_bytes=0, merge=False)
        with GroupStore.open(scratch, group, create=records.spec(), options=options) as store:
            feed = records.Feed()
            for batch in (feed.stream(), feed.zeroes(0, 4096)):
                store.append(batch)
                store.commit()
            keep(HERE / "corpus/segment/two_commits", store.directory / "seg-00000001")
            store.append(feed.writes(2, 512) + feed.tally())
            store.commit()
            store.append(feed.writes(9, 512))
            store.commit()
            store.append(feed.writes(1))
            store.commit()
            newest = max(store.directory.glob("manifest-*"))
            keep(HERE / "corpus/manifest/one_epoch", newest)


def keep(to: Path, what: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(REPAIR + what.read_bytes())


if __name__ == "__main__":
    main()
