"""What a failback costs: of the old disks only what differs is fetched and written, and a process
that is killed at any point of that loses nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from life import Life, Place
from sites import GROUP, Client, compare, wait_until

from vrep import errors
from vrep.recovery.view import ViewInfo

pytestmark = pytest.mark.e2e

UNIT = 4096
MIB = 1 << 20
FAILBACK_S = 300.0


def rewrite(life: Life, client: Client, at: int, data: bytes) -> None:
    client.write(at, data)
    life.oracle[at : at + len(data)] = data
    client.flush()


def change_units(life: Life, client: Client, count: int) -> int:
    """So many whole units get other bytes, in writes of their own; how many bytes."""
    for number in life.rng.sample(range(len(life.oracle) // UNIT), count):
        at = number * UNIT
        data = life.rng.randbytes(UNIT)
        client.write(at, data)
        life.oracle[at : at + UNIT] = data
    client.flush()
    return count * UNIT


def written_by(pid: int) -> int:
    """Bytes that a process wrote to files, as its kernel counts them."""
    lines = Path(f"/proc/{pid}/io").read_text().split()
    return int(lines[lines.index("wchar:") + 1])


def is_doomed(pid: int | None) -> bool:
    """Whether a process runs that is to be killed at a point. The one that the site began in the
    place of a killed one is not, and may be there before anybody looks."""
    try:
        return b"VREP_FAULT=" in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def filled(place: Place) -> dict[str, Any] | None:
    """What the fill of its only view cost, once it has ended. A process that is busy says nothing
    of it."""
    fill = place.site.tests()[0].fill
    return fill if fill.get("done") else None


def go_away(life: Life) -> None:
    """The group is moved to the other site and protected back."""
    view = life.east.site.move(GROUP, pause=True)
    with life.client(life.east, view) as client:
        life.check(client)
    life.east.site.reverse(GROUP)


def full_disk(life: Life) -> None:
    with life.client(life.west) as client:
        for at in range(0, len(life.oracle) - 2 * MIB, MIB):
            rewrite(life, client, at, life.rng.randbytes(MIB))
    life.settle(life.west)


def test_only_what_differs_is_fetched_and_written(make_life: Callable[..., Life]) -> None:
    life = make_life(disk_bytes=16 * MIB).up()
    west, east = life.west, life.east
    full_disk(life)
    go_away(life)
    with life.client(east) as client:
        changed = change_units(life, client, 200)
    life.settle(east)
    before = life.image.read_bytes()
    differing = sum(
        before[at : at + UNIT] != life.oracle[at : at + UNIT] for at in range(0, len(before), UNIT)
    )
    assert differing * UNIT == changed
    seen: list[tuple[dict[str, Any], int]] = []

    def moved(view: ViewInfo) -> None:
        assert view.pid is not None
        fill = wait_until("all is there", lambda: filled(west))
        seen.append((fill, written_by(view.pid)))
        with life.client(west, view) as client:
            life.check(client)

    west.site.failback(GROUP, pause=True, moved=moved)
    fill, wchar = seen[0]
    assert fill["fetched_bytes"] == fill["written_bytes"] == changed, fill
    assert fill["right_bytes"] == len(before) - changed, fill
    assert fill["read_bytes"] <= 1.05 * changed, fill
    assert fill["hash_bytes"] <= len(before) // 64, fill
    assert wchar <= 1.05 * changed + 16 * UNIT, (wchar, changed)  # beside which blocks are present
    compare("the old disk", life.image.read_bytes(), bytes(life.oracle))
    life.settle(west)
    with life.client(west) as client:
        life.check(client)
    life.check_view(east, "latest", bytes(life.oracle))


@pytest.mark.parametrize(
    "point", ["fill.before_part:5", "fill.before_present:3", "fill.after_present:3"]
)
def test_a_view_that_is_killed_while_it_fills_goes_on(
    make_life: Callable[..., Life], monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    life = make_life().up()
    west, east = life.west, life.east
    full_disk(life)
    with life.client(west) as client:
        life.write(client)
    go_away(life)
    with life.client(east) as client:
        change_units(life, client, 100)
        life.write(client)
    life.settle(east)
    killed = 0

    def moved(view: ViewInfo) -> None:
        nonlocal killed
        if not killed:
            wait_until("the view is killed", lambda: not is_doomed(view.pid))
            killed += 1
            monkeypatch.delenv("VREP_FAULT")
        with life.client(west, view) as client:  # the site serves it again
            life.check(client)
            life.write(client)

    monkeypatch.setenv("VREP_FAULT", f"{point}:kill")
    deadline = time.monotonic() + FAILBACK_S
    while True:
        try:
            west.site.failback(GROUP, pause=True, moved=moved)
            break
        except errors.VrepError:  # killed before the move was done, or while it is waited for
            killed += 1
            monkeypatch.delenv("VREP_FAULT", raising=False)
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    assert killed
    with life.client(west) as client:
        life.check(client)
        life.write(client)
    life.settle(west)
    life.check_view(east, "latest", bytes(life.oracle))
    for place in (west, east):
        assert place.site.points(GROUP).verdict.whole
    west.kill()
    compare("the old disk", life.image.read_bytes(), bytes(life.oracle))
