"""A target that is gone for longer than the ring lasts: history stays whole."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from typing import Any

import pytest
from sites import GROUP, MIB, Pair, compare, journal, wait_until

from vrep._core import layout

pytestmark = pytest.mark.e2e

Make = Callable[..., Pair]
RING = 40 * MIB
"""the least that takes the largest write"""


def spill(pair: Pair) -> dict[str, Any]:
    found: dict[str, Any] = pair.a.status(GROUP)["groups"][GROUP]["targets"][0]
    return found


def gaps(pair: Pair) -> int:
    return sum(entry.kind == layout.KIND_GAP_BEGIN for entry in journal(pair))


def write_past_the_ring(
    pair: Pair, rng: random.Random, total: int = 3 * RING, label: str = "step"
) -> dict[str, bytes]:
    """Writes of `total` bytes, zeroes and marks, slower than the spiller; what the disk held at
    each of the checkpoints. Zeroes are not counted: they take no room in ring and spill."""
    labels: dict[str, bytes] = {}
    wrote = step = 0
    with pair.client() as client:
        while wrote < total:
            length = rng.choice((512, 4096, 65536, MIB, 4 * MIB))
            offset = rng.randrange(0, client.bytes - length + 1, 512)
            if rng.random() < 0.1:
                client.zeroes(offset, length)
            else:
                client.write(offset, rng.randbytes(length))
                wrote += length
            if wrote > (step + 1) * total / 4:
                step += 1
                pair.a.checkpoint(GROUP, f"{label}-{step}")
                labels[f"{label}-{step}"] = client.read_all()
            wait_until("the ring has room", lambda: ring_has_room(pair), every_s=0.02)
    return labels


def free_bytes(pair: Pair) -> int:
    status = pair.a.status(GROUP)["groups"][GROUP]["filter"] or {"ring_free_bytes": 0}
    return int(status["ring_free_bytes"])


def ring_has_room(pair: Pair) -> bool:
    status = pair.a.status(GROUP)["groups"][GROUP]["filter"] or {"ring_free_bytes": 0}
    return bool(status["ring_free_bytes"] > 0.3 * RING)


def whole(pair: Pair, labels: dict[str, bytes], before: int) -> None:
    """Everything arrived, without a gap, and each checkpoint recovers."""
    pair.settle()
    pair.same_as_source()
    assert gaps(pair) == before
    # Files go a moment after the target has what is in them.
    wait_until("nothing is spilled", lambda: spill(pair)["spill_bytes"] == 0)
    for label, content in labels.items():
        compare(label, pair.read_view(label)["root"], content)


def test_no_write_is_missing_after_a_long_cut(make_pair: Make, rng: random.Random) -> None:
    pair = make_pair(ring_bytes=RING).up()
    before = gaps(pair)
    pair.cable.cut(down=True)
    labels = write_past_the_ring(pair, rng)
    # Sealed; the ring keeps the newest. A source that is cut off shows it with its next attempt.
    during = wait_until(
        "it is spilled", lambda: (s := spill(pair))["spill_bytes"] > RING // 4 and s
    )
    assert during["rpo_ms"] > 0
    pair.cable.repair()
    whole(pair, labels, before)


@pytest.mark.parametrize("victims", [("source",), ("filter",), ("filter", "source")], ids="+".join)
def test_a_kill_in_the_middle_loses_nothing(
    make_pair: Make, rng: random.Random, victims: tuple[str, ...]
) -> None:
    pair = make_pair(ring_bytes=RING).up()
    before = gaps(pair)
    pair.cable.cut(down=True)
    first = write_past_the_ring(pair, rng, 2 * RING)
    pair.kill(*victims)
    pair.start(*victims)
    pair.served()
    wait_until("the source runs", lambda: pair.a.running("source"))
    second = write_past_the_ring(pair, rng, RING // 2, "later")
    # It spills at once, and shows it with its next attempt: one may have come before the filter.
    wait_until("it is spilled", lambda: spill(pair)["spill_bytes"] > 0)
    pair.kill("source")
    pair.start("source")
    pair.cable.repair()
    whole(pair, first | second, before)


def test_paused_groups_keep_their_history(make_pair: Make, rng: random.Random) -> None:
    pair = make_pair(ring_bytes=RING).up()
    before = gaps(pair)
    pair.a.pause(GROUP)
    labels = write_past_the_ring(pair, rng, 2 * RING)
    pair.a.resume(GROUP)
    whole(pair, labels, before)


def test_a_power_loss_keeps_what_was_spilled(make_pair: Make, rng: random.Random) -> None:
    """History is whole up to where the spill ends; a gap stands for the rest."""
    pair = make_pair(ring_bytes=RING).up()
    before = gaps(pair)
    pair.cable.cut(down=True)
    labels = write_past_the_ring(pair, rng, 2 * RING)
    pair.kill("filter", "source")
    shutil.rmtree(pair.a.paths.shm())
    pair.start("filter", "source")
    pair.served()
    pair.cable.repair()
    pair.settle()
    pair.same_as_source()
    assert gaps(pair) == before + 1
    compare("step-1", pair.read_view("step-1")["root"], labels["step-1"])


@pytest.mark.parametrize("loss", ["all", "first", "bit"])
def test_a_lost_spill_is_a_gap_and_no_lost_write(
    make_pair: Make, rng: random.Random, loss: str
) -> None:
    pair = make_pair(ring_bytes=RING).up()
    before = gaps(pair)
    pair.cable.cut(down=True)
    pair.a.object_put(GROUP, "nvram", b"n" * 500)  # spilled first
    write_past_the_ring(pair, rng, 3 * RING)
    pair.kill("source")
    files = sorted((pair.a.groups.path(GROUP) / "spill").glob("spill-*"))
    assert files
    if loss == "all":
        for file in files:
            file.unlink()
    elif loss == "first":
        files[0].unlink()
    else:
        data = bytearray(files[0].read_bytes())
        data[rng.randrange(200, len(data))] ^= 1
        files[0].write_bytes(data)
    pair.start("source")
    pair.cable.repair()
    pair.settle()
    pair.same_as_source()
    assert gaps(pair) == before + 1
    wait_until("the object is durable", lambda: all(o["durable"] for o in pair.a.objects(GROUP)))
    pair.settle()
    assert [(o["name"], o["bytes"]) for o in pair.b.objects(GROUP, "latest")] == [("nvram", 500)]


def test_a_full_quota_is_a_gap(make_pair: Make, rng: random.Random) -> None:
    pair = make_pair(ring_bytes=RING, source_settings=f"spill_bytes = {20 * MIB}").up()
    before = gaps(pair)
    pair.cable.cut(down=True)
    with pair.client() as client:
        for _ in range(100):
            client.write(rng.randrange(client.bytes - MIB), rng.randbytes(MIB))
    status = wait_until(
        "the spill is full", lambda: "spill-full" in pair.status()["conditions"] and pair.status()
    )
    assert status["filter"]["gap"]
    assert spill(pair)["spill_bytes"] <= 20 * MIB
    pair.cable.repair()
    pair.settle()
    pair.same_as_source()
    assert gaps(pair) == before + 1
    # Files go a moment after the target has what is in them.
    wait_until("there is room", lambda: "spill-full" not in pair.status()["conditions"])


def test_a_slow_target_makes_it_spill_and_catches_up(make_pair: Make, rng: random.Random) -> None:
    pair = make_pair(ring_bytes=RING).up()
    before = gaps(pair)
    pair.cable.bytes_per_s = 2 * MIB
    with pair.client() as client:
        # Much at a time: faster than the cable also where a look at the status takes long. The
        # spiller begins with 5 MiB that are free.
        for _ in range(RING // MIB):
            client.write(rng.randrange(0, client.bytes - 2 * MIB, 512), rng.randbytes(2 * MIB))
            wait_until("the ring has room", lambda: free_bytes(pair) > 4.5 * MIB, every_s=0.02)
    pair.a.checkpoint(GROUP, "slow")
    labels = {"slow": pair.images["root"].read_bytes()}
    status = wait_until(
        "it shows", lambda: s if (s := pair.status())["state"] == "spilling" else None
    )
    assert status["targets"][0]["lag_bytes"] >= status["targets"][0]["spill_bytes"] > 0
    pair.cable.bytes_per_s = 0
    whole(pair, labels, before)


def test_a_spill_without_its_front_does_not_stop_replication_after_a_power_loss(
    make_pair: Make, rng: random.Random
) -> None:
    pair = make_pair(ring_bytes=RING).up()
    before = gaps(pair)
    pair.cable.cut(down=True)
    write_past_the_ring(pair, rng, 3 * RING)
    pair.kill("filter", "source")
    shutil.rmtree(pair.a.paths.shm())
    files = sorted((pair.a.groups.path(GROUP) / "spill").glob("spill-*"))
    assert len(files) > 1
    files[0].unlink()
    pair.start("filter", "source")
    pair.served()
    pair.cable.repair()
    pair.settle()
    pair.same_as_source()
    assert gaps(pair) == before + 1


@pytest.mark.parametrize("loss", ["bit", "gone"])
def test_damage_of_a_spill_in_use_is_a_gap_and_no_lost_write(
    make_pair: Make, rng: random.Random, loss: str
) -> None:
    pair = make_pair(ring_bytes=RING).up()
    before = gaps(pair)
    pair.cable.cut(down=True)
    write_past_the_ring(pair, rng, 3 * RING)
    files = sorted((pair.a.groups.path(GROUP) / "spill").glob("spill-*"))
    if loss == "bit":
        with files[0].open("r+b") as file:
            file.seek(files[0].stat().st_size // 2)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))
    else:
        files[0].unlink()
    pair.cable.repair()
    pair.settle()
    pair.same_as_source()
    assert gaps(pair) == before + 1


def test_a_stale_spill_does_not_stop_the_next_one(make_pair: Make, rng: random.Random) -> None:
    """The source dies after the target took all, before it removed the files; then the target is
    gone again."""
    pair = make_pair(ring_bytes=RING).up()
    before = gaps(pair)
    directory = pair.a.groups.path(GROUP) / "spill"
    pair.cable.cut(down=True)
    write_past_the_ring(pair, rng, 2 * RING)
    shutil.copytree(directory, pair.root / "stale")
    pair.cable.repair()
    pair.settle()
    with pair.client() as client:
        client.write(0, rng.randbytes(MIB))
    pair.settle()
    wait_until("the files are removed", lambda: not list(directory.glob("spill-*")))
    pair.cable.cut(down=True)
    pair.stop("source")
    assert not list(directory.glob("spill-*"))
    shutil.copytree(pair.root / "stale", directory, dirs_exist_ok=True)
    pair.start("source")
    wait_until("the source runs", lambda: pair.a.running("source"))
    labels = write_past_the_ring(pair, rng, 2 * RING, "later")
    pair.cable.repair()
    whole(pair, labels, before)


def test_a_bandwidth_limit_holds_and_costs_no_history(make_pair: Make, rng: random.Random) -> None:
    """What the wire carries stays below the limit; the rest waits in ring and spill."""
    limit = 4 * MIB
    pair = make_pair(ring_bytes=RING, source_settings=f"bandwidth = {limit}").up()
    gap, began, before = gaps(pair), time.monotonic(), int(spill(pair)["bytes_sent"])
    labels = write_past_the_ring(pair, rng, RING)
    pair.settle()
    sent = int(spill(pair)["bytes_sent"]) - before
    assert sent > 20 * MIB
    assert sent <= limit * (time.monotonic() - began + 1.0)
    whole(pair, labels, gap)
