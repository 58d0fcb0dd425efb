"""Real processes whose clocks jump: the wall clock by libfaketime, what passes since boot in a time
namespace. What the clocks are believed for is in `vrep.target.aging`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sites import GROUP, MIB, WAIT_S, Pair, compare, wait_until

pytestmark = pytest.mark.e2e
Make = Callable[..., Pair]

LIBRARY = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1"
WINDOW_S = 3600
DAYS = 400


class WallClock:
    """What some processes of a pair take for the time of day, from `jump` on."""

    def __init__(self, pair: Pair, *roles: str) -> None:
        self._file = pair.root / "clock"
        self.jump(0)
        for role in roles:
            pair.env[role] = {
                "LD_PRELOAD": LIBRARY,
                "FAKETIME_TIMESTAMP_FILE": str(self._file),
                "FAKETIME_NO_CACHE": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            }

    def jump(self, days: int) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(f"{days:+d}d\n")
        new.replace(self._file)


def write_some(pair: Pair, rng: random.Random, total: int = 2 * MIB) -> bytes:
    """So many bytes of answered writes, durable at the target; what the disk holds then."""
    with pair.client() as client:
        for _ in range(total // 65536):
            client.write(rng.randrange(client.bytes // 4096 - 16) * 4096, rng.randbytes(65536))
    pair.settle()
    return pair.images["root"].read_bytes()


@pytest.fixture(autouse=True)
def shared_memory() -> Iterator[None]:
    """What the library leaves behind of processes that were killed goes."""
    yield
    for path in [
        *Path("/dev/shm").glob("faketime_shm_*"),
        *Path("/dev/shm").glob("sem.faketime_*"),
    ]:
        if not Path(f"/proc/{path.name.rpartition('_')[2]}").exists():
            path.unlink(missing_ok=True)


@pytest.mark.parametrize("site", [pytest.param("source", marks=pytest.mark.slow), "target"])
def test_a_wall_clock_that_jumps_takes_no_history(
    make_pair: Make, rng: random.Random, site: str
) -> None:
    """By more than the window, ahead and back, while the site runs and while it is down."""
    pair = make_pair(disks={"root": 4 * MIB}, target_settings=f"segment_bytes = {MIB}")
    roles = ("target",) if site == "target" else ("filter", "source")
    clock = WallClock(pair, *roles)
    pair.up()
    assert pair.a.keep(GROUP, window_s=WINDOW_S) == ""
    points: dict[str, bytes] = {}

    def point(label: str) -> None:
        points[label] = write_some(pair, rng)
        pair.a.checkpoint(GROUP, label, wait_s=WAIT_S)
        pair.settle()

    def check(apart: bool) -> None:
        wait_until(
            "the clocks are seen", lambda: ("clocks-apart" in pair.stored()["conditions"]) is apart
        )
        write_some(pair, rng)  # fills segments: there is a reason to fold
        assert pair.stored()["folded_bytes"] == 0
        for label, content in points.items():
            compare("root", pair.read_view(label)["root"], content)
        found = pair.b.points(GROUP)
        assert found.verdict.whole
        assert [mark.label for mark in found.marks if mark.label] == list(points)

    point("before")
    check(apart=False)
    clock.jump(DAYS)
    point("ahead")
    check(apart=True)
    pair.kill(*roles)
    clock.jump(-DAYS)
    pair.start(*roles)
    pair.served()
    point("behind")
    check(apart=True)
    clock.jump(0)
    point("after")
    check(apart=False)
    pair.same_as_source()
    pair.alive()


def test_history_ages_by_what_passes_since_boot(make_pair: Make, rng: random.Random) -> None:
    """A target that finds two days passed since it was stopped lets go of what is older than its
    window, and one for which less has passed than was counted before loses nothing and goes on."""
    pair = make_pair(disks={"root": 4 * MIB}, target_settings=f"segment_bytes = {MIB}")
    pair.up()
    assert pair.a.keep(GROUP, window_s=WINDOW_S) == ""
    kept = write_some(pair, rng, 8 * MIB)
    pair.settle()  # what came after the two days would be young
    assert pair.stored()["folded_bytes"] == 0
    pair.stop("target")
    pair.enter["target"] = _later(2 * 86400)
    pair.start("target")
    pair.listening()
    wait_until("old history is gone", lambda: pair.stored().get("folded_bytes"))
    compare("root", pair.read_view()["root"], kept)
    kept = write_some(pair, rng)
    pair.a.checkpoint(GROUP, "later", wait_s=WAIT_S)
    pair.settle()
    pair.kill("target")
    del pair.enter["target"]
    pair.start("target")
    pair.listening()
    write_some(pair, rng)
    compare("root", pair.read_view("later")["root"], kept)
    assert pair.b.points(GROUP).verdict.whole
    pair.same_as_source()
    pair.alive()


def _later(seconds: int) -> list[str]:
    """Runs a program for which so much more has passed since boot."""
    return ["unshare", "--time", "--monotonic", str(seconds), "--boottime", str(seconds)]


def test_the_library_is_there() -> None:
    assert Path(LIBRARY).is_file(), "packaging/debian-packages.txt has libfaketime"
