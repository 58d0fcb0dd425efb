"""A source that is taken back to an earlier state, by a snapshot of its storage or a backup: its
target holds a future that is gone. Nothing is believed, all is compared, and points come again."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from sites import GROUP, MIB, WAIT_S, Pair, wait_until

pytestmark = pytest.mark.e2e

Make = Callable[..., Pair]


def load(pair: Pair, rng: random.Random, first: int) -> None:
    """Writes from a place on, all of them durable at the target."""
    with pair.client() as client:
        for _ in range(40):
            client.write(first + rng.randrange(64) * 65536, rng.randbytes(65536))
        client.flush()
    pair.settle()


def take_snapshot(pair: Pair, where: Path) -> None:
    def sockets(directory: str, names: list[str]) -> list[str]:
        return [name for name in names if (Path(directory) / name).is_socket()]

    shutil.copytree(pair.a.paths.root, where / "site", ignore=sockets)
    shutil.copyfile(pair.images["root"], where / "root.raw")


def take_back(pair: Pair, where: Path) -> None:
    """The host's storage is that of the snapshot, and it was started anew."""
    shutil.rmtree(pair.a.paths.shm(), ignore_errors=True)
    for path in (where / "site").rglob("*"):
        if path.is_file():
            shutil.copyfile(path, pair.a.paths.root / path.relative_to(where / "site"))
    shutil.copyfile(where / "root.raw", pair.images["root"])


def noted(pair: Pair) -> int:
    file = pair.a.groups.path(GROUP) / "shipped.json"
    return int(json.loads(file.read_text())["seq"])


@pytest.mark.parametrize("clean", [False, True], ids=["running", "stopped"])
def test_a_source_that_went_back_is_compared(
    make_pair: Make, rng: random.Random, tmp_path: Path, clean: bool
) -> None:
    """The snapshot is of a site that ran, or of one that was stopped."""
    pair = make_pair(disks={"root": 64 * MIB}).up()
    end = pair.stop if clean else pair.kill
    load(pair, rng, 0)
    wait_until("the mark is exact", lambda: noted(pair) == pair.status()["targets"][0]["seq"])
    end("source", "filter")
    take_snapshot(pair, tmp_path)
    pair.start("filter", "source")
    pair.served()
    pair.settle()
    load(pair, rng, 32 * MIB)  # where nothing was written before: no bit has it
    pair.a.checkpoint(GROUP, "gone")
    pair.settle()
    future = pair.images["root"].read_bytes()
    held = pair.status()["targets"][0]["durable_seq"]
    end("source", "filter")
    take_back(pair, tmp_path)

    pair.cable.cut(down=True)  # it is seen only when the target answers
    pair.start("filter", "source")
    pair.served()
    with pair.client() as client:
        client.write(5 * MIB, rng.randbytes(MIB))
        client.flush()
    assert pair.status()["targets"][0]["newest_point"] is None
    # It is said while all is compared: not over before this test, which may stall, has looked.
    pair.cable.bytes_per_s, pair.cable.delay_s = MIB // 4, 0.25
    pair.cable.repair()
    seen = wait_until("it is noticed", lambda: pair.status()["unverified"], WAIT_S, 0.02)
    assert seen == ("stamps" if clean else "rolled-back")
    pair.cable.bytes_per_s, pair.cable.delay_s = 0, 0.0
    pair.settle()
    wait_until("it is believed", lambda: not pair.status()["unverified"])
    status = pair.status()
    assert status["state"] == "replicating"
    assert status["targets"][0]["durable_seq"] > held
    assert status["targets"][0]["equal_bytes"] > 0  # compared
    pair.same_as_source()
    assert pair.read_view("gone")["root"] == future  # what was there is history
    pair.kill("source")
    pair.start("source")
    load(pair, rng, 0)
    assert pair.status()["unverified"] == ""  # once
    pair.same_as_source()


def test_a_source_that_went_back_before_a_failover_that_was_rolled_back_is_compared(
    make_pair: Make, rng: random.Random, tmp_path: Path
) -> None:
    """Its own epoch then is one that the target replaced, and gives it back in another."""
    pair = make_pair(disks={"root": 64 * MIB}).up()
    pair.stop("source", "filter")  # the next change map's checkpoint has no bit of the first sync
    pair.start("filter", "source")
    pair.served()
    load(pair, rng, 0)
    pair.kill("source", "filter")
    take_snapshot(pair, tmp_path)
    pair.start("filter", "source")
    pair.served()
    pair.settle()
    pair.b.failover_start(GROUP, force=True)
    wait_until("it is refused", lambda: pair.status()["state"] == "failed-over")
    pair.b.failover_rollback(GROUP)
    pair.settle()
    load(pair, rng, 32 * MIB)  # in the new epoch, where nothing was written before
    assert pair.a.groups.load(GROUP).epoch == 3
    pair.kill("source", "filter")
    take_back(pair, tmp_path)
    pair.start("filter", "source")
    pair.served()
    with pair.client() as client:
        client.write(5 * MIB, rng.randbytes(MIB))
        client.flush()
    status = pair.settle()
    assert pair.a.groups.load(GROUP).epoch == 3
    assert status["targets"][0]["equal_bytes"] > 0  # compared
    pair.same_as_source()


def test_a_source_that_stops_leaves_no_mark_ahead(make_pair: Make, rng: random.Random) -> None:
    """A snapshot of a host that is stopped, or cut off, is told from any future of it."""
    pair = make_pair(disks={"root": 64 * MIB}).up()
    with pair.client() as client:
        for _ in range(300):
            client.write(rng.randrange(64 * MIB // 4096) * 4096, rng.randbytes(4096))
        client.flush()
    sent = pair.settle()["targets"][0]["durable_seq"]
    pair.stop("source")
    assert noted(pair) == sent
