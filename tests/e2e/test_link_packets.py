"""The bad link of test_link.py, of packets: each site in a network namespace of its own, the
kernel's TCP between them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import pytest
from packets import PacketLink, why_not
from sites import MIB, Pair, wait_until
from test_link import DISKS, SLACK_S, connected, durable, under_load

from vrep.source.session import STATUS_EVERY_S

pytestmark = pytest.mark.e2e

Make = Callable[..., Pair]


@pytest.fixture
def link(seed: int) -> Iterator[PacketLink]:
    if reason := why_not():
        pytest.skip(reason)
    with contextlib.closing(PacketLink(seed)) as found:
        yield found


def apart(make_pair: Make, link: PacketLink) -> Pair:
    return make_pair(disks=DISKS, ring_bytes=40 * MIB, dead_after_s=3.0, packets=link).up()


def test_packets_that_are_lost_late_and_queued(
    make_pair: Make, link: PacketLink, seed: int
) -> None:
    pair = apart(make_pair, link)
    with under_load(pair, seed) as lab:
        link.loss, link.delay_s, link.jitter_s = 0.02, 0.02, 0.02
        link.bytes_per_s = 4 * MIB
        lost, least = link.lost, durable(pair)
        for _ in range(3):
            wait_until("it replicates", lambda least=least: durable(pair) > least + 10)
            least = durable(pair)
            lab.mark()
        wait_until("a packet is lost", lambda: link.lost > lost)
        link.clear()


def test_a_link_that_goes_down_and_comes_back(make_pair: Make, link: PacketLink, seed: int) -> None:
    """Silent for moments, which TCP bridges; with a device that is down, which it is told; and
    for so long that both ends give the connection up, within the time that they promise."""
    pair = apart(make_pair, link)
    with under_load(pair, seed) as lab:
        for _ in range(4):
            link.up = False
            time.sleep(lab.rng.uniform(0.1, 0.6))
            link.up = True
            time.sleep(lab.rng.uniform(0.1, 0.6))
        for side in link.sides:
            side.link("down")
            time.sleep(lab.rng.uniform(0.1, 1.0))
            side.link("up")
        least = durable(pair)
        wait_until("it goes on", lambda: durable(pair) > least)
        link.up, down_s = False, time.monotonic()
        wait_until("it is noticed", lambda: not connected(pair), every_s=0.02)
        noticed_s = time.monotonic() - down_s
        print(f"noticed after {noticed_s:.2f} s")
        assert noticed_s < pair.dead_after_s + STATUS_EVERY_S + SLACK_S
        wait_until("the target gave it up", lambda: "source-silent" in pair.stored()["conditions"])
        link.up = True
        least = durable(pair)
        wait_until("it goes on", lambda: durable(pair) > least)
