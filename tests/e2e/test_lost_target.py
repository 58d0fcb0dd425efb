"""A target that lost what it had acknowledged: no recovery point before all is there again."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
from sites import GROUP, MIB, Pair, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.every_front]


def lose(pair: Pair) -> None:
    """The target's store is gone; the site itself is not."""
    pair.kill("target")
    shutil.rmtree(pair.store)


def begun_again(pair: Pair) -> bool:
    found = pair.b.status(GROUP)["groups"].get(GROUP)
    return found is not None and int(found.get("durable_seq", 0)) > 0


@pytest.mark.parametrize("reboot", [False, True], ids=["source-runs-on", "source-rebooted"])
def test_a_lost_store_is_filled_anew(make_pair: Callable[..., Pair], reboot: bool) -> None:
    pair = make_pair(disks={"root": 18 * MIB})
    with pair.images["root"].open("r+b") as image:
        # In an extent that is never written: no map and no write-intent knows of it.
        image.seek(17 * MIB)
        image.write(b"\x44" * 4096)
    pair.up()
    with pair.client() as client:
        client.write(0, b"\x11" * MIB)
        client.write(5 * MIB, b"\x22" * MIB)
        client.flush()
    pair.settle()
    lose(pair)
    if reboot:
        # Power comes back: shared memory is gone, the state file and the disks are not.
        pair.kill("filter", "source")
        shutil.rmtree(pair.a.paths.shm())
        pair.start("filter", "source")
        pair.served()
    with pair.client() as client:
        client.write(2 * MIB, b"\x33" * 4096)
        client.flush()
    pair.start("target")
    wait_until("the target has records again", lambda: begun_again(pair))
    pair.settle()
    pair.same_as_source()
