"""The last sync of a recovered disk, which `reverse` takes from its view (invariant 6): what fails
there was told nobody, and a filter would call it stable."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from life import Life
from sites import GROUP, Client, wait_until

from vrep import errors
from vrep.recovery import reverse as reversing

pytestmark = pytest.mark.e2e


def taken_over(life: Life, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """East runs the VM from a view that is whole, whose syncs go wrong from a point on."""
    west, east = life.west, life.east
    with life.client(west) as client:
        life.write(client)
    life.settle(west)
    west.unused()
    monkeypatch.setenv("VREP_FAULT", fault)
    view = east.site.move(GROUP)
    monkeypatch.delenv("VREP_FAULT")
    with life.client(east, view) as client:
        life.check(client)
        life.write(client)
    wait_until("all is there", lambda: east.site.tests()[0].fill.get("done"))


def test_a_last_sync_that_fails_leaves_the_disks_with_their_view(
    make_life: Callable[..., Life], monkeypatch: pytest.MonkeyPatch
) -> None:
    life = make_life().up()
    west, east = life.west, life.east
    taken_over(life, monkeypatch, "view.sync:2:io")  # the first one is of the filling
    (before,) = east.site.tests()
    with pytest.raises(errors.StorageError, match=f"stay with their view.*{before.pid}"):
        east.site.reverse(GROUP)
    assert GROUP not in set(east.site.groups.names())
    (view,) = east.site.tests()
    assert (view.state, view.running, view.pid) == ("committed", True, before.pid)
    assert "storage" in view.conditions[0]
    with life.client(east, view) as client:
        life.check(client)
        life.write(client)
    east.site.reverse(GROUP)  # this one does not fail
    with life.client(east, view) as client:
        life.check(client)
        life.write(client)
    life.settle(east)
    life.check_view(west, "latest", bytes(life.oracle))


def test_a_view_that_is_held_serves_again_when_its_command_fails(
    make_life: Callable[..., Life], monkeypatch: pytest.MonkeyPatch
) -> None:
    life = make_life().up()
    east = life.east
    taken_over(life, monkeypatch, "")
    (view,) = east.site.tests()

    def fail(*_args: object) -> None:
        with pytest.raises((OSError, errors.VrepError)):
            Client(view.disks[0].uri, 2.0).read(0, 512)  # nobody is answered
        raise errors.RecoveryError("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(reversing, "_define", fail)
        with pytest.raises(errors.RecoveryError, match="on purpose"):
            east.site.reverse(GROUP)
    (view,) = east.site.tests()
    assert (view.state, view.running) == ("committed", True)
    with life.client(east, view) as client:
        life.check(client)
        life.write(client)
    east.site.reverse(GROUP)
    with life.client(east, view) as client:
        life.check(client)
