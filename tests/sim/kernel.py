"""Kernel: threads, locks and time that only a seed decides about.

Every simulated thread is a greenlet, and one runs at a time. It gives way where a real thread
could be made to: at locks, waits, sleeps and at all simulated input and output. Which one goes on
is drawn from the seed. Time stands still while anything can run, then jumps to the next deadline.

`Kernel.patch` gives the modules of vrep these threads and clocks in place of the real ones, so
their code runs as it is. A process is a set of threads that is killed as a whole: each is unwound
at once, and whatever its clean-up would do to the world outside raises `Killed` again.

Times are ns inside and seconds at the surface, as Python's are.
"""

from __future__ import annotations

import functools
import heapq
import random
import secrets
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Final

import greenlet

NS: Final = 1_000_000_000
WALL_NS: Final = 1_800_000_000 * NS
PREEMPT: Final = 0.03
"""of the uncontended locks at which another thread goes on first"""
SWITCHES_MAX: Final = 400_000
"""of one seed: more is a loop that waits for nothing"""


ATOMIC: Final = ("vrep.target.rooms",)
"""modules whose locks the collector takes: nothing waits inside of them, so theirs stay real"""


class Killed(BaseException):
    """The process of this thread was killed."""


class Violation(Exception):
    """An invariant does not hold. It is remembered: code under test may catch what it does not
    expect, and go on."""

    seen: ClassVar[list[Violation]] = []

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.seen.append(self)


class Process:
    """What is killed as a whole."""

    def __init__(self, kernel: Kernel, name: str) -> None:
        self.kernel = kernel
        self.name = name
        self.dead = False
        self.tasks: list[Task] = []
        self.at_kill: list[Callable[[], None]] = []
        """what the system does when a process ends: descriptors and connections are closed"""
        self.fuse = -1
        """after so many more operations it is killed; -1: never"""
        self.pid = 0
        self.names: dict[str, Any] = {}
        """what modules of vrep call by a name, in this process: see `hosts`"""

    def check(self) -> None:
        if self.dead:
            raise Killed

    def burn(self) -> None:
        """An operation of this process: the one that it does not survive, perhaps."""
        self.check()
        if self.fuse >= 0:
            self.fuse -= 1
            if self.fuse < 0:
                self.kernel.kill(self)


class Task:
    """A thread."""

    def __init__(self, process: Process, run: Callable[[], None], name: str) -> None:
        self.process = process
        self.name = name
        self.turn = 0
        """counts its waits: a timer of an earlier one is stale"""
        self.waiting = False
        self.notified = False
        self.done = False
        self.joiners: list[Task] = []
        self.greenlet = greenlet.greenlet(run)


class Kernel:
    """One simulated world's scheduler and clock."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now_ns = 1000 * NS
        self.wall_ahead_ns = WALL_NS
        self.events: Counter[str] = Counter()
        self.switches = 0
        self.trace: Callable[[str], None] | None = None
        self._random = self.rng.random
        self._runnable: list[Task] = []
        self._timers: list[tuple[int, int, Task, int]] = []
        self._order = self._ordered = 0
        self._calm = int(self.rng.expovariate(PREEMPT))
        """so many more times nobody is preempted"""
        self._hub: greenlet.greenlet = greenlet.getcurrent()
        self._calls: list[Callable[[], None]] = []
        self._failure: BaseException | None = None
        self._ended = False
        self.current: Task | None = None
        self.outside = Process(self, "world")
        self.processes: list[Process] = [self.outside]

    # ---- what happens ----------------------------------------------------------------

    def event(self, what: str) -> None:
        """Count something that happened in the world."""
        self.events[what] += 1

    def next_order(self) -> int:
        """A number for what happens now: later ones are larger."""
        self._ordered += 1
        return self._ordered

    def note(self, text: str) -> None:
        if self.trace is not None:
            name = self.current.name if self.current else "-"
            self.trace(f"{self.now_ns / NS:11.6f} {name:<14} {text}")

    # ---- processes and tasks -------------------------------------------------------------

    def process(self, name: str) -> Process:
        process = Process(self, name)
        self.processes.append(process)
        return process

    def spawn(self, process: Process, run: Callable[[], None], name: str) -> Task:
        process.check()

        def body() -> None:
            try:
                run()
            except Killed:
                if not process.dead:
                    raise
            except BaseException as error:  # noqa: BLE001 - handed to whoever runs the world
                if not process.dead and self._failure is None:
                    self._failure = error
            finally:
                task.done = True
                if task in process.tasks:
                    process.tasks.remove(task)
                for joiner in task.joiners:
                    self.wake(joiner)

        task = Task(process, body, name)
        task.greenlet.parent = self._hub
        process.tasks.append(task)
        self._runnable.append(task)
        return task

    def kill(self, process: Process) -> None:
        """End a process as SIGKILL does. From one of its own threads this does not return."""
        current = self.current
        self.call(lambda: self._kill(process))
        if current is not None and current.process is process:
            raise Killed

    def _kill(self, process: Process) -> None:
        if process.dead:
            return
        process.dead = True
        self.note(f"{process.name} is killed")
        for task in list(process.tasks):
            if not task.done and task.greenlet:
                self.current = task
                task.greenlet.throw(Killed)
            task.done = True
        process.tasks.clear()
        self.current = None
        for close in process.at_kill:
            close()
        self._runnable = [task for task in self._runnable if not task.process.dead]

    def call(self, run: Callable[[], None]) -> None:
        """Run something outside of every task."""
        if self.current is None:
            run()
            return
        self._calls.append(run)
        task = self.current
        if not task.process.dead:
            self._runnable.append(task)
        self._hub.switch()
        task.process.check()

    # ---- waiting ---------------------------------------------------------------------------

    def give_way(self) -> None:
        """Let others go on, perhaps."""
        task = self.current
        if task is None:
            return
        task.process.check()
        self._runnable.append(task)
        self._switch(task)
        task.process.check()

    def maybe(self) -> None:
        """Let others go on first, once in 1 / PREEMPT times."""
        if self.current is None:
            return
        self._calm -= 1
        if self._calm < 0:
            self._calm = int(self.rng.expovariate(PREEMPT))
            self.give_way()

    def deadline(self, timeout_s: float) -> int:
        """When a wait that begins now is over. Time passes in every wait, however short: floats
        of the code under test are not as exact as this clock."""
        return self.now_ns + (max(1000, int(timeout_s * NS)) if timeout_s > 0 else 0)

    def block(self, queue: list[Task] | None, timeout_s: float | None) -> bool:
        """Wait until somebody wakes this task, or the time is over; whether it was woken."""
        task = self.current
        assert task is not None, "the world outside cannot wait"
        process = task.process
        if process.dead:
            raise Killed
        if timeout_s is not None:
            if timeout_s <= 0:
                self.give_way()
                return False
            self._order += 1
            task.turn += 1
            deadline = self.now_ns + max(1000, int(timeout_s * NS))
            heapq.heappush(self._timers, (deadline, self._order, task, task.turn))
        else:
            task.turn += 1
        task.waiting, task.notified = True, False
        if queue is not None:
            queue.append(task)
        self._switch(task)
        if queue is not None and not task.notified and task in queue:
            queue.remove(task)
        if process.dead:
            raise Killed
        return task.notified

    def wake(self, task: Task) -> None:
        if task.waiting and not task.process.dead:
            task.waiting, task.notified = False, True
            self._runnable.append(task)

    def wake_all(self, queue: list[Task]) -> None:
        for task in queue:
            self.wake(task)
        queue.clear()

    def sleep(self, seconds: float) -> None:
        self.block(None, seconds)

    def wait_until(
        self,
        test: Callable[[], Any],
        timeout_s: float,
        queue: list[Task] | None = None,
        look_s: float = 0.05,
    ) -> bool:
        """Wait for a condition, looked at whenever `queue` is woken, and every `look_s`."""
        deadline = self.deadline(timeout_s)
        while not test():
            left_s = (deadline - self.now_ns) / NS
            if left_s <= 0:
                return False
            self.block(queue, min(left_s, look_s))
        return True

    # ---- running ------------------------------------------------------------------------------

    def run(self, until: Callable[[], bool]) -> None:
        """Run the world until a condition holds. Raises what a task raised."""
        self._hub = greenlet.getcurrent()
        seen = Violation.seen
        seen.clear()
        while self._failure is None and not seen and not until():
            task = self._next()
            if task is None:
                if self.switches <= SWITCHES_MAX:
                    raise Violation("nothing can go on any more")
                stuck = Counter(task.name for task in self._runnable)
                raise Violation(f"a loop that does not end: {dict(stuck)}")
            self.current = task
            task.greenlet.switch()
            self.current = None
            while self._calls:
                self._calls.pop(0)()
        if seen:
            raise seen[0]
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _switch(self, task: Task) -> None:
        """Let others go on until it is this task's turn. The hub has a look only when there is
        something for it."""
        following = None if self._calls or Violation.seen else self._next()
        if following is None:
            self._hub.switch()
        elif following is not task:
            self.current = following
            following.greenlet.switch()

    def _next(self) -> Task | None:
        """Who goes on; None when nobody can, or it went on for too long."""
        runnable = self._runnable
        while True:
            if not runnable:
                if not self._advance():
                    return None
                continue
            index = int(self._random() * len(runnable))
            task = runnable[index]
            runnable[index] = runnable[-1]
            runnable.pop()
            if task.done or task.process.dead:
                continue
            self.switches += 1
            return task if self.switches <= SWITCHES_MAX else None

    def _advance(self) -> bool:
        while self._timers:
            deadline, _order, task, turn = heapq.heappop(self._timers)
            if task.done or task.process.dead or not task.waiting or task.turn != turn:
                continue
            self.now_ns = max(self.now_ns, deadline)
            task.waiting = False
            self._runnable.append(task)
            return True
        return False

    def close(self) -> None:
        """Unwind everything."""
        self._hub = greenlet.getcurrent()
        self.current = None
        for process in reversed(self.processes):
            for task in process.tasks:
                task.greenlet.parent = self._hub
            self._kill(process)
        self._failure = None

    # ---- in the place of threading, time and secrets ---------------------------------------------

    def patch(self) -> Callable[[], None]:
        """Give every module of vrep this world's threads, clocks and random numbers; what is
        returned takes them away again."""
        fakes: dict[int, Any] = {
            id(threading): Threading(self),
            id(time): Time(self),
            id(secrets): Secrets(self),
            id(random): types.SimpleNamespace(uniform=self.rng.uniform),
        }
        done = _users(frozenset(fakes))
        for module, attribute, real in done:
            setattr(module, attribute, fakes[id(real)])

        def undo() -> None:
            for module, attribute, real in done:
                setattr(module, attribute, real)

        return undo


@functools.cache
def _users(wanted: frozenset[int]) -> list[tuple[types.ModuleType, str, types.ModuleType]]:
    """Modules of vrep and their names for some others, which are given by their ids. All are
    loaded when the first world begins; one that comes later is an error of this laboratory."""
    return [
        (module, name, real)
        for path, module in list(sys.modules.items())
        if path.startswith("vrep.") and path not in ATOMIC and isinstance(module, types.ModuleType)
        for name in ("threading", "time", "secrets", "random")
        if id(real := getattr(module, name, None)) in wanted
    ]


class Time:
    """In the place of the module time."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def monotonic(self) -> float:
        return self._kernel.now_ns / NS

    perf_counter = monotonic

    def monotonic_ns(self) -> int:
        return self._kernel.now_ns

    def time_ns(self) -> int:
        return self._kernel.now_ns + self._kernel.wall_ahead_ns

    def time(self) -> float:
        return self.time_ns() / NS

    def sleep(self, seconds: float) -> None:
        if self._kernel.current is None:
            return
        self._kernel.sleep(seconds)


class Secrets:
    """In the place of the module secrets."""

    def __init__(self, kernel: Kernel) -> None:
        self._rng = kernel.rng

    def token_bytes(self, count: int) -> bytes:
        return self._rng.randbytes(count)

    def token_hex(self, count: int) -> str:
        return self._rng.randbytes(count).hex()

    def randbelow(self, limit: int) -> int:
        return self._rng.randrange(limit)


class Threading:
    """In the place of the module threading."""

    local = threading.local

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.Lock = lambda: Lock(kernel)
        self.RLock = lambda: RLock(kernel)
        self.Event = lambda: Event(kernel)
        self.Condition = lambda lock=None: Condition(kernel, lock)
        self.Thread = lambda **options: Thread(kernel, **options)

    def current_thread(self) -> Any:
        return self.kernel.current

    def get_native_id(self) -> int:
        return 0


class Lock:
    """threading.Lock."""

    __slots__ = ("_kernel", "_taken", "_waiters")

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._taken = False
        self._waiters: list[Task] = []

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        kernel = self._kernel
        kernel.maybe()
        if not self._taken:
            self._taken = True
            return True
        return blocking and self._wait(timeout)

    def _wait(self, timeout: float) -> bool:
        kernel = self._kernel
        deadline = None if timeout < 0 else kernel.deadline(timeout)
        while self._taken:
            left_s = None if deadline is None else (deadline - kernel.now_ns) / NS
            if left_s is not None and left_s <= 0:
                return False
            kernel.block(self._waiters, left_s)
        self._taken = True
        return True

    def release(self) -> None:
        if not self._taken:
            raise RuntimeError("release unlocked lock")
        self._taken = False
        if self._waiters:
            self._kernel.wake(self._waiters.pop(0))

    def locked(self) -> bool:
        return self._taken

    def __enter__(self) -> bool:
        kernel = self._kernel
        kernel.maybe()
        if self._taken:
            return self._wait(-1)
        self._taken = True
        return True

    def __exit__(self, *_exc: object) -> None:
        if not self._taken:
            raise RuntimeError("release unlocked lock")
        self._taken = False
        if self._waiters:
            self._kernel.wake(self._waiters.pop(0))


class RLock:
    """threading.RLock."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._lock = Lock(kernel)
        self._owner: Task | None = None
        self._count = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        current = self._kernel.current
        if self._count and self._owner is current:
            self._count += 1
            return True
        if not self._lock.acquire(blocking, timeout):
            return False
        self._owner, self._count = current, 1
        return True

    def release(self) -> None:
        self._count -= 1
        if not self._count:
            self._owner = None
            self._lock.release()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_exc: object) -> None:
        self.release()


class Condition:
    """threading.Condition."""

    def __init__(self, kernel: Kernel, lock: Any = None) -> None:
        self._kernel = kernel
        self._lock = lock or RLock(kernel)
        self._waiters: list[Task] = []
        self.acquire, self.release = self._lock.acquire, self._lock.release

    def __enter__(self) -> bool:
        return self._lock.acquire()

    def __exit__(self, *_exc: object) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        self._lock.release()
        try:
            return self._kernel.block(self._waiters, timeout)
        finally:
            if not self._kernel.current.process.dead:  # type: ignore[union-attr]
                self._lock.acquire()
            else:
                self._lock = RLock(self._kernel)  # of a dead process: nobody else is there
                self._lock.acquire()

    def wait_for(self, test: Callable[[], Any], timeout: float | None = None) -> Any:
        deadline = None if timeout is None else self._kernel.deadline(timeout)
        while not (result := test()):
            left_s = None if deadline is None else (deadline - self._kernel.now_ns) / NS
            if left_s is not None and left_s <= 0:
                return result
            self.wait(left_s)
        return result

    def notify(self, count: int = 1) -> None:
        for _ in range(min(count, len(self._waiters))):
            self._kernel.wake(self._waiters.pop(0))

    def notify_all(self) -> None:
        self._kernel.wake_all(self._waiters)


class Event:
    """threading.Event."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._set = False
        self._waiters: list[Task] = []

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        self._kernel.wake_all(self._waiters)

    def clear(self) -> None:
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        deadline = None if timeout is None else self._kernel.deadline(timeout)
        while not self._set:
            left_s = None if deadline is None else (deadline - self._kernel.now_ns) / NS
            if left_s is not None and left_s <= 0:
                break
            self._kernel.block(self._waiters, left_s)
        return self._set


class Thread:
    """threading.Thread: of the process of the thread that makes it."""

    def __init__(
        self,
        kernel: Kernel,
        *,
        target: Callable[..., None],
        args: Iterable[Any] = (),
        name: str = "",
        daemon: bool = False,
    ) -> None:
        self._kernel = kernel
        self._run = lambda: target(*args)
        self.name = name
        self.daemon = daemon
        self._task: Task | None = None

    def start(self) -> None:
        current = self._kernel.current
        assert current is not None
        self._task = self._kernel.spawn(current.process, self._run, self.name)

    def is_alive(self) -> bool:
        return self._task is not None and not self._task.done

    @property
    def ident(self) -> int | None:
        return None if self._task is None else id(self._task)

    def join(self, timeout: float | None = None) -> None:
        task = self._task
        if task is not None and not task.done:
            self._kernel.block(task.joiners, timeout)


@contextmanager
def patched(module: Any, **changes: Any) -> Iterator[None]:
    """Other values of a module's names, for a while."""
    before = {name: getattr(module, name) for name in changes}
    for name, value in changes.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
