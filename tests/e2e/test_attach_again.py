"""`vrep attach` is given again: for a VM that is attached, and after an attach or a detach that was
cut off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sites import GROUP, MIB, Pair, wait_until
from test_attach import Cut, attach, proxmox
from test_mirror import kept, mirror, replicates
from vm import DeviceLoad, Vm

from vrep import errors
from vrep.hypervisor import attach as attaching
from vrep.site import Site

pytestmark = pytest.mark.e2e
Made = Callable[..., Pair]

SIZE = 16 * MIB


def handed_over(pair: Pair) -> bool:
    status = pair.status()
    return bool(status["filter"] and not status["filter"]["handover"])


def test_attach_can_be_given_again(make_pair: Made) -> None:
    """Who does not know whether it was done gives it again; a second path to the monitor of the
    same VM is the same VM."""
    pair = make_pair(disks={"root": SIZE})
    with Vm(*proxmox(pair.images["root"])) as vm:
        pair.up_beside()
        first = attach(pair, vm)
        graph = vm.graph()
        planned = pair.a.attach(GROUP, vm.vm, dry_run=True)
        assert planned is not None
        assert planned.commands == ()
        again = attach(pair, vm)
        assert (again.vm, again.disks, again.commands) == (first.vm, first.disks, ())
        assert again.switch_ms == 0
        assert vm.graph() == graph
        pair.settle()
        pair.same_as_source()
        with Vm() as other, pytest.raises(errors.NotFoundError, match="does not have"):
            attach(pair, other)
        assert attach(pair, vm).disks == first.disks


def test_a_mirror_can_be_begun_again(make_pair: Made) -> None:
    pair = make_pair(disks={"root": SIZE})
    with Vm(*proxmox(pair.images["root"])) as vm:
        pair.up_beside()
        with kept(pair):
            mirror(pair, vm)
            replicates(pair)
        # Only now: the keeper's first barrier puts another bitmap in the place of the first.
        graph = vm.graph()
        again = mirror(pair, vm)
        assert (again.commands, again.switch_ms, len(again.mirrors)) == ((), 0, 1)
        assert vm.graph() == graph


def test_attach_goes_on_where_a_detach_was_cut_off(
    make_pair: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any of its steps, under load."""
    pair = make_pair(disks={"root": SIZE})
    run, close = attaching._run, attaching.Attacher._close_group
    with Vm(*proxmox(pair.images["root"])) as vm:
        pair.up_beside()
        load = DeviceLoad(vm, "/machine/peripheral/scsi0")
        cuts = 0
        while True:
            left = cuts

            def step() -> None:
                nonlocal left
                if left == 0:
                    raise Cut
                left -= 1

            def run_or_cut(monitor: Any, command: Any) -> None:
                step()
                run(monitor, command)

            def close_or_cut(attacher: Any) -> None:
                step()
                close(attacher)
                step()

            attach(pair, vm)
            load.goes_on(3)
            monkeypatch.setattr(attaching, "_run", run_or_cut)
            monkeypatch.setattr(attaching.Attacher, "_close_group", close_or_cut)
            try:
                pair.a.detach(GROUP)
                cut = False
            except Cut:
                cut = True
            monkeypatch.setattr(attaching, "_run", run)
            monkeypatch.setattr(attaching.Attacher, "_close_group", close)
            load.goes_on(3)
            attach(pair, vm)
            load.goes_on(3)
            wait_until("the filter has the disks", lambda: handed_over(pair))
            wait_until("it replicates", lambda: pair.status()["state"] == "replicating")
            if not cut:
                break
            cuts += 1
        assert cuts >= 5
        load.stop()
        pair.settle()
        held = pair.images["root"].read_bytes()
        load.check(held)
        assert pair.read_view()["root"] == held


def test_replication_begins_with_the_attach(
    make_pair: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with the next try of a session that has waited for longer and longer meanwhile."""
    told: list[tuple[Any, ...]] = []
    tell = Site._tell

    def noted(site: Site, role: str, method: str, **params: Any) -> bool:
        told.append((role, method, params))
        return tell(site, role, method, **params)

    pair = make_pair(disks={"root": SIZE})
    with Vm(*proxmox(pair.images["root"])) as vm:
        pair.up_beside()
        monkeypatch.setattr(Site, "_tell", noted)
        pair.a.attach(GROUP, vm.vm, dry_run=True)
        assert told == []
        attach(pair, vm)
        assert told == [("source", "reload", {"group": GROUP})]
        wait_until("it replicates", lambda: pair.status()["state"] == "replicating")
