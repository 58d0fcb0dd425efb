"""A group whose guest is paused: what becomes durable of it is known all the same."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

from test_filterd import MIB, Rig, rig  # noqa: F401 - a fixture

from vrep.control import ControlClient
from vrep.source.attach import RingHold

LIMIT_S = 60.0


def until(hold: RingHold, holds: Callable[[Mapping[str, Any]], bool]) -> Mapping[str, Any]:
    """The filter's status, once it is as wanted."""
    deadline = time.monotonic() + LIMIT_S
    while not holds(status := hold.status()):
        assert time.monotonic() < deadline, status
        time.sleep(0.02)
    return status


def test_what_was_written_before_the_pause_is_acknowledged_in_it(rig: Rig) -> None:  # noqa: F811
    """As in a move: the last records are on their way when the guest is halted. Its status said
    for ever that they were nowhere else."""
    rig.add("web")
    rig.start()
    control = ControlClient(rig.paths.socket("filter"))
    hold = RingHold(control, "web", "11" * 16)

    def all_durable(status: Mapping[str, Any]) -> bool:
        head = status["head"]
        hold.reader.set(received=head, durable=head, spilled=head)
        return not status["gap"] and status["durable"] == head and not status["dirty_bytes"]

    try:
        hold.resync(True, 0)
        before = until(hold, all_durable)
        uri = f"nbd+unix:///root?socket={rig.paths.nbd_socket('web')}"
        write = ["qemu-io", "-f", "raw", "-c", f"write -P 7 {MIB // 2} 64k", uri]
        subprocess.run(write, check=True, capture_output=True)
        control.call("pause_guest", group="web", paused=True)
        paused = hold.status()
        assert (paused["guest_paused"], paused["head"]) == (True, before["head"] + 1)
        assert (paused["durable"], paused["dirty_bytes"]) == (before["head"], 65536)
        until(hold, all_durable)
        control.call("pause_guest", group="web", paused=False)
        subprocess.run(write, check=True, capture_output=True)
        until(hold, all_durable)
    finally:
        hold.close()
