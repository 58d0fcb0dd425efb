"""Guest: the VM. It writes, zeroes, discards, flushes and reads, and knows what it was answered.

Commands overlap as a guest's may, but none changes what another one in flight reads or discards:
its result would not be known. When the filter ends, what was in flight is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from events import EVENTS_MIN
from facts import Flight
from kernel import NS, Kernel, Violation
from oracle import Oracle
from plan import Plan

from vrep.errors import AgainError

if TYPE_CHECKING:
    from lives import Place
    from sites import SourceSite

GUEST_S: Final = 30.0
"""the longest that a command may take while its filter runs: invariant 5"""


class Guest:
    """One VM on the disks of a source site."""

    def __init__(
        self,
        kernel: Kernel,
        plan: Plan,
        oracle: Oracle,
        west: SourceSite | Place,
        done: Callable[[], bool],
    ) -> None:
        """It works at a site, or wherever its place is, until `done`."""
        self._kernel = kernel
        self._rng = kernel.rng
        self._plan = plan
        self._oracle = oracle
        self._west = west
        self._done = done
        self.written = 0
        self.finished = False
        self.check_map: Callable[[], None] = lambda: None
        self.reads_beside = False
        """it reads what a write under way changes, now and then"""

    def run(self, writes: int | None) -> None:
        """The guest's thread. It writes so much at least, and more until its world has seen enough;
        None: as much as comes."""
        kernel, rng, plan = self._kernel, self._rng, self._plan
        while not self._done() or (
            writes is not None and (self.written < writes or self._is_small())
        ):
            # Only something to be broken is left to do; when that is done as well, it hurries.
            late = self.written >= plan.writes and not self._done()
            kernel.sleep(rng.expovariate(1 / plan.write_s) + late * rng.random())
            if rng.random() < 0.02:
                kernel.sleep(rng.random() * 3)
            for _ in range(rng.choice((1, 1, 2, 4))):
                self.command()
        self.finished = True

    def _is_small(self) -> bool:
        events = self._kernel.events
        return events.total() - events["turn"] < EVENTS_MIN

    def command(self) -> None:
        """One of its commands, any."""
        group, gate = self._west.group, self._west.gate
        if group is None or gate is None or not gate.open:
            return
        rng, oracle = self._rng, self._oracle
        disk = 0 if rng.random() < 0.8 else 1
        size = oracle.sizes[disk]
        op = rng.choices(
            ("write", "zero", "discard", "flush", "read"),
            (40, 4, 2, 6, 12 if self.reads_beside else 5),
        )[0]
        length = rng.choice((512, 1024, 4096, 4096, 4096, 8192, 512 * rng.randrange(1, 30)))
        offset = rng.randrange((size - length) // 512 + 1) * 512
        if rng.random() < 0.5:
            offset -= offset % 4096
        if rng.random() < 0.3:  # the same few blocks again and again
            offset = min(offset, 8192) // 4096 * 4096
        data, fua = b"", False
        if op == "flush":
            offset = length = 0
        elif op == "write":
            data = (
                rng.randbytes(16) * (length // 16) if rng.random() < 0.7 else rng.randbytes(length)
            )
            fua = rng.random() < 0.15
        elif op == "zero":
            data = bytes(length)
        elif op in ("discard", "read") and oracle.busy(disk, offset, length):
            return
        beside = None
        if op == "read" and self.reads_beside:
            beside = self._write_under_way()
            if beside is not None:
                disk, offset, length = beside.disk, beside.offset, beside.length
        if op == "discard" and not oracle.recorded:
            return  # what a view shows then is for its own tests
        if op != "read" and any(
            flight.op in ("read", "discard") and flight.disk == disk for flight in oracle.flights
        ):
            return
        flight = Flight(op, disk, offset, length, data, fua, None, 0, oracle.stamp)
        flight.after, flight.beside = oracle.head, beside
        try:
            if op == "write":
                flight.pending = group.submit(op, disk, offset, data=data, fua=fua)
            elif op == "zero":
                hole = rng.random() < 0.5
                flight.pending = group.submit(op, disk, offset, length, no_hole=hole, fua=fua)
            else:
                flight.pending = group.submit(op, disk, offset, length)
        except AgainError:
            self._west.kick()
            return
        flight.sent_ns = self._kernel.now_ns
        self._kernel.event(f"guest {op}")
        self.written += op in ("write", "zero")
        oracle.sent(flight)
        if rng.random() < 0.7:
            self._west.kick()

    def _write_under_way(self) -> Flight | None:
        """One that nothing else in flight overlaps, and whose result shows that it is done."""
        oracle = self._oracle
        for flight in oracle.flights:
            if flight.op != "write" or flight.lost or flight.unsure:
                continue
            at, end = flight.offset, flight.offset + flight.length
            others = (
                one is not flight
                and one.disk == flight.disk
                and one.op != "flush"
                and one.offset < end
                and at < one.offset + one.length
                for one in oracle.flights
            )
            if not any(others) and oracle.model[flight.disk][at:end] != flight.data:
                return flight
        return None

    def answers(self) -> None:
        """What was answered since the filter's last turn, in the order of sending."""
        oracle, group = self._oracle, self._west.group
        for flight in list(oracle.flights):
            if not flight.lost and flight.pending.done:
                oracle.answered(flight, group, self._west.content)
                self._kernel.event("guest answer")
            elif not flight.lost and self._kernel.now_ns - flight.sent_ns > GUEST_S * NS:
                raise Violation(f"5: a {flight.op} of the guest waits for {GUEST_S:g} s")
        if self._rng.random() < 0.04 or oracle.check_due:
            oracle.check_due = False
            self.check_map()
