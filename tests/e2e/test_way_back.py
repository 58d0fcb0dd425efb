"""What is said to who gives the commands of the way back in another order, and of what stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from life import Life
from sites import GROUP, wait_until

from vrep import errors
from vrep.app.cli_view import view_text

pytestmark = pytest.mark.e2e


def test_a_group_that_is_given_back_too_early_says_what_comes_first(
    make_life: Callable[..., Life],
) -> None:
    life = make_life().up()
    west, east = life.west, life.east
    with pytest.raises(errors.NotFoundError, match="no history of a group 'web2'"):
        west.site.failback("web2")
    with pytest.raises(errors.StateError, match="is written at this site"):
        west.site.failback(GROUP)
    with life.client(west) as client:
        life.write(client)
        with pytest.raises(errors.BusyError, match=r"1 client.*--pause"):
            east.site.move(GROUP)
    west.unused()
    view = east.site.move(GROUP)
    wait_until("west knows", lambda: west.site.groups.load(GROUP).fenced)
    with pytest.raises(errors.StateError, match=f"'vrep reverse {GROUP}' there first"):
        west.site.failback(GROUP)
    east.site.reverse(GROUP)
    (info,) = east.site.tests()
    assert (info.state, info.disks[0].uri) == ("protected", view.disks[0].uri)
    with life.client(east, info) as client:
        life.write(client)
    life.settle(east)
    east.unused()
    west.site.failback(GROUP)
    life.settle(west)
    # What is left there is served by nobody.
    (info,) = east.site.tests()
    assert (info.state, info.socket, info.disks[0].uri) == ("left", "", "")
    assert view_text(info).splitlines()[-1] == "  root: not served: the group is at another site"
    with life.client(west) as client:
        life.check(client)
    # Again, now that this site has a history of its own, which ends before that.
    west.unused()
    east.site.move(GROUP)
    wait_until("west knows", lambda: west.site.groups.load(GROUP).fenced)
    with pytest.raises(errors.StateError, match=f"'vrep reverse {GROUP}' there first"):
        west.site.failback(GROUP)
    east.site.reverse(GROUP)
    life.settle(east)
    west.site.failback(GROUP)
    with life.client(west) as client:
        life.check(client)
