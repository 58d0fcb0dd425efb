"""What runs out, or is taken away, in the middle of a session: descriptors, memory, trust; and both
sites at once."""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sites import GROUP, MIB, Pair, journal, wait_until
from test_faults import gaps, writing

from vrep import errors

pytestmark = pytest.mark.e2e

Make = Callable[..., Pair]


@contextmanager
def limited(pid: int, what: int, value: int) -> Iterator[None]:
    """A limit of a process that runs, for a while."""
    before = resource.prlimit(pid, what)
    resource.prlimit(pid, what, (value, before[1]))
    try:
        yield
    finally:
        try:
            resource.prlimit(pid, what, before)
        except ProcessLookupError:
            return  # it ended


def descriptors(pid: int) -> int:
    return max(int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()) + 1


def address_space(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()


def test_processes_without_a_free_descriptor_go_on_when_there_are_some(
    make_pair: Make, rng: random.Random
) -> None:
    """Who is served is served on meanwhile, and nothing ends."""
    pair = make_pair().up()
    with writing(pair, rng) as count:
        for role in ("source", "target", "filter"):
            wait_until("it is connected", lambda: pair.status()["targets"][0]["connected"])
            so_far, pid = count[0], pair.processes[role].pid
            with limited(pid, resource.RLIMIT_NOFILE, descriptors(pid)):
                pair.cable.cut()  # so that each end wants a descriptor
                time.sleep(1.5)
                pair.alive()
            wait_until("the client went on", lambda n=so_far: count[0] > n + 20)
            wait_until("it answers again", lambda role=role: pair._site(role).running(role))
    pair.settle()
    pair.alive()
    assert gaps(pair) == 1
    pair.same_as_source()


def test_appliances_without_memory_lose_nothing(make_pair: Make, rng: random.Random) -> None:
    """They may end, once, and are begun again as a supervisor does: the guest does not notice."""
    pair = make_pair().up()
    ended: list[str] = []

    def supervised(probe: Callable[[], Any]) -> Any:
        """One that found no memory may take its time to end, until there is some again."""
        for role in ("source", "target"):
            if (process := pair.processes[role]).poll() is not None:
                print(f"the {role} process ended: {process.returncode}")
                assert role not in ended
                ended.append(role)
                pair.processes.pop(role)
                pair.start(role)
        return probe()

    def connected() -> bool:
        return bool(pair.status()["targets"][0]["connected"])

    with writing(pair, rng) as count:
        for role in ("source", "target"):
            wait_until("it is connected", lambda: supervised(connected))
            so_far, process = count[0], pair.processes[role]
            with limited(process.pid, resource.RLIMIT_AS, address_space(process.pid)):
                pair.cable.cut()
                end = time.monotonic() + 3
                while time.monotonic() < end and process.poll() is None:
                    time.sleep(0.1)
            wait_until("the client went on", lambda n=so_far: count[0] > n + 20)
            wait_until(
                "it answers again",
                lambda role=role: supervised(lambda: pair._site(role).running(role)),
            )
    wait_until("all is durable", lambda: supervised(pair.settled))
    assert gaps(pair) == 1
    assert pair.b.points(GROUP).verdict.sealed
    pair.same_as_source()


def test_a_site_that_is_removed_in_the_middle_of_a_session_is_cut_off(
    make_pair: Make, rng: random.Random
) -> None:
    """At once, and its VM runs on; trusted again, it goes on where it was."""
    pair = make_pair().up()
    with writing(pair, rng) as count:
        wait_until("the client goes on", lambda: count[0] > 50)
        pair.b.remove_peer("alpha")
        wait_until("it is cut off", lambda: not pair.status()["targets"][0]["connected"])
        wait_until("it says why", lambda: "removed it" in pair.status()["error"])

        def at_rest() -> str:
            found = pair.stored()
            rests = not found["sessions"] and found["durable"] == found["received"]
            return str(found["durable"]) if rests else ""

        # What it had received before is taken, and committed, a moment later.
        stored, so_far = wait_until("what came is durable", at_rest), count[0]
        wait_until("the client goes on", lambda: count[0] > so_far + 100)
        assert pair.stored()["durable"] == stored
        with pytest.raises(errors.BusyError):
            pair.a.remove_peer("beta")  # a group is protected to it
        pair.b.peers.add(
            pair.b.peers.check(
                name="alpha",
                site_id=pair.a.identity.site_id,
                certificate=pair.a.identity.certificate_pem,
                address="",
                joined=pair.a.identity.created,
            )
        )
    pair.settle()
    assert gaps(pair) == 1
    pair.same_as_source()


def test_both_sites_killed_at_once(make_pair: Make, rng: random.Random) -> None:
    """Again and again, in the middle of a load: what was acknowledged is there, nothing is there
    twice, and the source's disk and what recovers are one."""
    pair = make_pair(disks={"root": 16 * MIB}).up()
    roles = ["filter", "source", "target"]
    for _ in range(4):
        with pair.client() as client:
            try:
                for _ in range(rng.randrange(1, 60)):
                    client.write(rng.randrange(client.bytes - 65536), rng.randbytes(65536))
                acknowledged = pair.status()["targets"][0]["durable_seq"] or 0
            finally:
                rng.shuffle(roles)
                pair.kill(*roles)
        for role in rng.sample(roles, 3):
            pair.start(role)
            time.sleep(rng.uniform(0, 0.3))
        pair.served()
        wait_until("the target holds no less", lambda n=acknowledged: _durable_seq(pair) >= n)
    pair.settle()
    seqs = [entry.seq for entry in journal(pair)]
    assert seqs == list(range(1, len(seqs) + 1))
    assert gaps(pair) == 1
    assert pair.b.points(GROUP).verdict.sealed
    pair.same_as_source()


def _durable_seq(pair: Pair) -> int:
    """At the target; nothing while it opens its stores."""
    return int(str(pair.stored().get("durable", "0")).rsplit("/", 1)[-1])
