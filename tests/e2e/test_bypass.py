"""A filter that cannot start is passed through: the VM has its disk, and nothing is lost."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from sites import GROUP, MIB, WAIT_S, Client, Pair, wait_until

from vrep import errors

pytestmark = pytest.mark.e2e

DISK = 16 * MIB


def write_until_it_dies(pair: Pair, rng: random.Random) -> threading.Thread:
    """Writes that are in flight when their filter is killed."""
    client = pair.client()

    def work() -> None:
        with contextlib.suppress(OSError, EOFError, errors.VrepError), client:
            while True:
                client.write(rng.randrange(DISK // 4096 - 4) * 4096, rng.randbytes(4 * 4096))

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def passed_through(pair: Pair) -> dict[str, Any] | None:
    status = pair.status()
    return status if "bypass" in status["conditions"] else None


def write_some(client: Client, rng: random.Random) -> None:
    for _ in range(50):
        length = rng.randrange(1, 128) * 512
        client.write(rng.randrange((DISK - length) // 512) * 512, rng.randbytes(length))
    client.trim(2 * MIB, MIB)
    client.zeroes(5 * MIB + 512, 300 * 1024)
    client.flush()


def test_what_a_pass_through_writes_is_resynced(
    make_pair: Callable[..., Pair], rng: random.Random
) -> None:
    pair = make_pair(disks={"root": DISK}).up()
    intent = pair.a.paths.groups / GROUP / "intent"
    aside = intent.with_name("aside")
    writer = write_until_it_dies(pair, rng)
    wait_until("something is written", lambda: pair.status()["filter"]["writes"] > 50)
    pair.kill("filter")
    writer.join()
    intent.rename(aside)
    intent.mkdir()  # no filter starts on this; a pass-through has no use for it
    pair.start("filter")
    status = wait_until("the group is passed through", lambda: passed_through(pair))
    assert status["state"] == "error"
    assert status["error"]
    assert pair.a.verdict(pair.a.status())[0] == 2
    with pytest.raises(errors.VrepError):
        pair.a.checkpoint(GROUP, "not now")
    with pair.client() as client:
        write_some(client, rng)
        assert wait_until("the client is seen", lambda: pair.status()["clients"]) == 1
        pair.kill("filter")  # and it comes again
    pair.start("filter")
    wait_until("the group is passed through", lambda: passed_through(pair))
    with pair.client() as client:
        write_some(client, rng)
        client.write(0, b"the last word")
    intent.rmdir()
    aside.rename(intent)
    pair.stop("filter")
    pair.start("filter")
    pair.served()
    status = pair.status()
    assert status["filter"]["opened_as"] == "killed"
    assert status["filter"]["unverified"] == ""
    pair.settle()
    pair.same_as_source()


def test_a_pass_through_gives_way_when_nobody_uses_it(
    make_pair: Callable[..., Pair], rng: random.Random
) -> None:
    pair = make_pair(disks={"root": DISK}).up()
    intent = pair.a.paths.groups / GROUP / "intent"
    pair.kill("filter")
    intent.unlink()
    intent.mkdir()
    pair.start("filter")
    wait_until("the group is passed through", lambda: passed_through(pair))
    with pair.client() as client:
        write_some(client, rng)
        intent.rmdir()
        pair.a._tell("filter", "reload")
        client.write(0, b"still connected")
        assert passed_through(pair)
    pair.served()
    pair.settle()
    pair.same_as_source()


def run_filter(pair: Pair) -> subprocess.Popen[bytes]:
    with (pair.root / "run.log").open("ab") as log:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "vrep.app.cli", "run"),
                *("--role", "filter", "--dir", pair.a.paths.root),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def end(run: subprocess.Popen[bytes]) -> None:
    run.terminate()
    assert run.wait(WAIT_S) == 0


def test_a_filter_that_does_not_start_is_replaced(
    make_pair: Callable[..., Pair], rng: random.Random
) -> None:
    pair = make_pair(disks={"root": DISK}).up()
    pair.kill("filter")
    settings = pair.a.paths.config.read_text()
    pair.a.paths.config.write_text("[filter\n")
    run = run_filter(pair)
    try:
        wait_until(
            "the group is passed through",
            lambda: pair.a._filter().call("status").get(GROUP, {}).get("bypass"),
        )
        with pair.client() as client:
            write_some(client, rng)
    finally:
        end(run)
    pair.a.paths.config.write_text(settings)
    assert not pair.a.running()
    pair.cable.cut(down=True)  # nothing is compared before it was seen that all is to be
    run = run_filter(pair)
    try:
        pair.a.wait_served(GROUP, WAIT_S)
        # Without settings nobody knew where the change map is: all of it was marked instead.
        assert pair.status()["filter"]["unverified"] == "bypass"
        pair.cable.repair()
        pair.settle()
        pair.same_as_source()
        assert pair.status()["unverified"] == ""
    finally:
        end(run)
