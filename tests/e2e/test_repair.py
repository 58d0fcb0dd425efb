"""A target of which files are lost is repaired as documented, and its source sends what
differs from what is left."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sites import GROUP, MIB, Pair, compare, wait_until

from vrep import errors
from vrep.target.manifest import Position, load_newest, manifest_numbers, manifest_path
from vrep.target.segment import entry_path

pytestmark = pytest.mark.e2e

SIZE = 8 * MIB


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair(disks={"root": SIZE}, compression=0, target_settings=f"segment_bytes = {MIB}")
    try:
        yield pair
    finally:
        pair.close()


def write_some(pair: Pair, rng: random.Random, count: int) -> None:
    with pair.client() as client:
        for _ in range(count):
            client.write(rng.randrange(SIZE // 65536) * 65536, rng.randbytes(65536))
    pair.settle()


def damaged(pair: Pair) -> bool:
    group = pair.b.status()["groups"].values()
    return any("damaged" in each["conditions"] for each in group)


def sent(pair: Pair) -> int:
    return int(pair.status()["targets"][0]["bytes_sent"])


def gap_last(pair: Pair) -> int:
    """Where the newest gap of the source began."""
    return int(pair.status()["filter"]["gap_last"])


def is_told(pair: Pair, before: int) -> bool:
    """The source knows of the loss. It says so only until the gap behind `before`, which stands for
    what was lost, has ended: that may be soon."""
    status = pair.status()
    return "history-lost" in status["conditions"] or status["filter"]["gap_last"] > before


def goes_on(pair: Pair, rng: random.Random) -> None:
    """The target has what the disks hold, the point before the loss is gone, and new ones come."""
    pair.same_as_source()
    points = pair.b.points(GROUP)
    assert (points.verdict.whole, points.verdict.sealed) == (True, True)
    assert not points.gaps[-1].open
    with pytest.raises(errors.VrepError):
        _export(pair, "early")
    write_some(pair, rng, 5)
    pair.a.checkpoint(GROUP, "late")
    pair.settle()
    compare("root", _export(pair, "late"), pair.images["root"].read_bytes())
    pair.alive()


def test_lost_segments_cost_what_stood_behind_them(pair: Pair, rng: random.Random) -> None:
    """Two segments and an index of a store are gone: points before stay, the span that does not
    recover is a gap, only what differs is sent, and later points recover."""
    pair.images["root"].write_bytes(rng.randbytes(SIZE))
    pair.up()
    write_some(pair, rng, 20)
    pair.a.checkpoint(GROUP, "early")
    early = pair.images["root"].read_bytes()
    pair.settle()
    for _ in range(5):  # each in segments of its own
        write_some(pair, rng, 20)
    pair.stop("target")
    manifest = load_newest(pair.store, pair.group_id)
    rows = manifest.segments
    for row in rows[-2:]:
        entry_path(pair.store, row).unlink()
    behind = sum(int(row["data_bytes"]) for row in rows[-2:]) + 2 * MIB
    pair.start("target")
    wait_until("it is named", lambda: damaged(pair))
    pair.stop("target")
    lost = pair.b.repair(GROUP).lost
    assert [each.object for each in lost] == [entry_path(pair.store, row).name for row in rows[-2:]]
    report = pair.b.repair(GROUP, resend=True)
    assert report.kept_to == f"pos:{Position.of(rows[-3]['last'])}"
    compare("root", _export(pair, "early"), early)
    before = sent(pair)
    pair.start("target")
    wait_until("it is compared", lambda: pair.status()["targets"][0]["compared_bytes"] > 0)
    pair.settle()
    assert sent(pair) - before <= behind * 1.1
    pair.same_as_source()
    points = pair.b.points(GROUP)
    assert (points.verdict.whole, points.verdict.sealed) == (True, True)
    assert [gap.open for gap in points.gaps] == [False, False]
    for each in lost:
        with pytest.raises(errors.VrepError):
            pair.b.export(GROUP, pair.root / "no", at=each.last)
    compare("root", _export(pair, "early"), early)
    write_some(pair, rng, 5)
    pair.a.checkpoint(GROUP, "late")
    pair.settle()
    compare("root", _export(pair, "late"), pair.images["root"].read_bytes())
    pair.alive()


@pytest.mark.parametrize(
    ("place", "killed"), [("middle", ("target",)), ("first", ("target", "source"))]
)
def test_what_is_sound_behind_a_loss_is_not_sent_again(
    pair: Pair, rng: random.Random, place: str, killed: tuple[str, ...]
) -> None:
    """One segment is gone, of the first sync or of later writes, with its index: nobody knows what
    it covered. The source compares all, and sends what that segment held; it may be killed
    meanwhile, as may the target."""
    pair.images["root"].write_bytes(rng.randbytes(SIZE))
    pair.up()
    pair.settle()
    for _ in range(8):  # each durable before the next: no commit has more, nor much of a segment
        write_some(pair, rng, 10)
    pair.a.checkpoint(GROUP, "early")
    pair.settle()
    pair.stop("target")
    rows = load_newest(pair.store, pair.group_id).segments
    # How large those of the first sync are is this host's business: one commit may have it all.
    # The last one is not lost: of the open segment it alone says which stream that begins in.
    row = rows[0] if place == "first" else min(rows[1:-1], key=lambda one: int(one["data_bytes"]))
    entry_path(pair.store, row).unlink()
    report = pair.b.repair(GROUP, resend=True)
    behind = rows["data_end"][rows["segment"] > row["segment"]].sum()
    assert report.salvaged_bytes > int(behind) // 2
    assert report.compared_bytes is None
    if place == "first":
        assert pair.b.points(GROUP).ranges == []
    before, gap = sent(pair), gap_last(pair)
    pair.start("target")
    wait_until("it is told", lambda: is_told(pair, gap))
    pair.kill(*killed)
    pair.start(*killed)
    if "source" not in killed:  # it counts from its start
        wait_until("it is compared", lambda: pair.status()["targets"][0]["compared_bytes"] > 0)
    pair.settle()
    if "source" not in killed:
        # What was under way to the target that was killed is sent once more.
        once = int(row["data_bytes"]) * 1.05 + 65536
        assert sent(pair) - before <= 2 * once < SIZE / 2
    goes_on(pair, rng)


@pytest.mark.parametrize("killed", [(), ("target", "source"), ("filter",)])
def test_a_source_reads_what_was_lost_and_no_more(
    pair: Pair, rng: random.Random, killed: tuple[str, ...]
) -> None:
    """A byte of a record flipped: its segment's index still says what the damaged commits covered.
    Whoever is killed meanwhile, in the end the target has what the disks hold."""
    pair.images["root"].write_bytes(rng.randbytes(SIZE))
    pair.up()
    pair.settle()
    with pair.client() as client:
        for unit in rng.sample(range(SIZE // 65536), 60):  # each once: none is superseded
            client.write(unit * 65536, rng.randbytes(65536))
    pair.a.checkpoint(GROUP, "early")
    pair.settle()
    pair.stop("target")
    rows = load_newest(pair.store, pair.group_id).segments
    row = rows[-1]
    path = entry_path(pair.store, row)
    data = bytearray(path.read_bytes())
    data[int(row["data_end"]) // 2] ^= 1
    path.write_bytes(data)
    report = pair.b.repair(GROUP, resend=True)
    lost = report.compared_bytes
    assert lost is not None
    assert 0 < lost <= int(row["data_end"]) * 1.05
    before, gap = sent(pair), gap_last(pair)
    if killed == ("filter",):
        pair.kill(*killed)
        pair.start(*killed)
    pair.start("target")
    if killed and killed != ("filter",):
        wait_until("it is told", lambda: is_told(pair, gap))
        pair.kill(*killed)
        pair.start(*killed)

    def read() -> int:
        return int(pair.status()["targets"][0]["resync_bytes"])

    if not killed:  # before the target is back, the first sync stands there
        wait_until("it is compared", lambda: 0 < read() < SIZE)
    pair.settle()
    if not killed:
        assert 0 < read() <= lost * 1.05
        assert sent(pair) - before <= lost * 1.05 + 65536
    goes_on(pair, rng)


def _export(pair: Pair, at: str) -> bytes:
    out = pair.root / f"out-{at}-{time.monotonic_ns()}"
    return Path(pair.b.export(GROUP, out, at=at).disks[0].path).read_bytes()


def test_a_lost_manifest_costs_nothing(pair: Pair, rng: random.Random) -> None:
    pair.up()
    write_some(pair, rng, 40)
    pair.a.checkpoint(GROUP, "early")
    early = pair.images["root"].read_bytes()
    pair.settle()
    pair.kill("target")
    write_without_target(pair, rng)
    newest = manifest_path(pair.store, manifest_numbers(pair.store)[-1])
    newest.write_bytes(newest.read_bytes()[:-1])
    pair.start("target")
    wait_until("it is named", lambda: damaged(pair))
    pair.stop("target")
    report: Any = pair.b.repair(pair.group_id.hex())
    assert (report.repaired, report.lost) == ([newest.name], [])
    before = pair.status()["targets"][0]
    pair.start("target")
    pair.settle()
    after = pair.status()["targets"][0]
    assert after["bytes_sent"] - before["bytes_sent"] < MIB  # what was written meanwhile
    pair.same_as_source()
    compare("root", _export(pair, "early"), early)
    assert pair.b.points(GROUP).verdict.sealed


def write_without_target(pair: Pair, rng: random.Random) -> None:
    with pair.client() as client:
        for _ in range(4):
            client.write(rng.randrange(SIZE // 65536) * 65536, rng.randbytes(65536))
