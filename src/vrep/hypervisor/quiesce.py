"""A guest whose file systems are frozen for the moment of a mark, and thawed whatever happens.

The agent freezes; the caller marks; the agent thaws. A frozen guest waits with each write, so a
time limit holds for all of it, and a second process stands by: when this one ends without a thaw,
however it ends, that one thaws. Commands before and after are the site's settings. Times in
seconds.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeVar

from vrep import errors
from vrep.control import ControlClient
from vrep.groups import GroupDirectory
from vrep.hypervisor.agent import Agent, check_agent, open_agent
from vrep.hypervisor.record import attached_vm
from vrep.lanes import group_of
from vrep.settings import QuiesceConfig

Marked = TypeVar("Marked")

THAW_S: Final = 30.0
"""how long a thaw is tried again"""
READY_S: Final = 20.0
FREEZE: Final = "guest-fsfreeze-freeze"
STATUS: Final = "guest-fsfreeze-status"
THAW: Final = "guest-fsfreeze-thaw"


class Hooks:
    """Commands for the shell, before a guest is frozen and after it was thawed; empty: none."""

    def __init__(self, before: str, after: str, limit_s: float, environment: dict[str, str]):
        self._before = before
        self._after = after
        self._limit_s = limit_s
        self._environment = {**os.environ, **environment}

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """The one after is run whatever happened, if the one before was begun."""
        try:
            self._run("before", self._before)
            yield
        finally:
            self._run("after", self._after)

    def _run(self, when: str, command: str) -> None:
        if not command:
            return
        try:
            ended = subprocess.run(
                ["/bin/sh", "-c", command],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=self._limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise errors.TimeLimitError(f"the command {when} a checkpoint: {command}") from None
        if ended.returncode != 0:
            said = ended.stderr.decode(errors="replace").strip()[-200:]
            raise errors.StateError(
                f"the command {when} a checkpoint ended with {ended.returncode}: {command}"
                + (f": {said}" if said else "")
            )


def mark_quiesced(
    settings: QuiesceConfig,
    agent: str,
    groups: GroupDirectory,
    control: ControlClient,
    lanes: Sequence[str],
    label: str,
    mark: Callable[[float], Marked],
) -> Marked:
    """What `mark` returns, with the guest frozen, between the commands of the settings. `lanes`: a
    group, or the lanes of one. `agent`: its address; empty: of the libvirt domains that these are
    attached to, or the settings'."""
    group = group_of(lanes[0])
    addresses = _agents(settings, agent, groups, lanes)
    for address in addresses:
        check_agent(address)
    for lane in lanes:
        control.call("status", group=lane)  # no guest is frozen for nothing
    names = {"VREP_GROUP": group, "VREP_LABEL": label}
    with Hooks(settings.before, settings.after, settings.hook_limit_s, names).around():
        return all_quiesced(addresses, settings.limit_s, mark)


def _agents(
    settings: QuiesceConfig, agent: str, groups: GroupDirectory, lanes: Sequence[str]
) -> list[str]:
    """The agents of the guests that use some lanes, each once."""
    if agent:
        return [agent]
    usual = settings.agent.replace("{group}", group_of(lanes[0]))
    vms = [attached_vm(groups, lane) for lane in lanes]
    addresses = [vm if vm.startswith("libvirt:") else usual for vm in vms]
    if not all(addresses):
        raise errors.ConfigError(
            "the guest agent is not known: give --agent, or set quiesce.agent in config.toml"
        )
    return list(dict.fromkeys(addresses))


def all_quiesced(
    addresses: Sequence[str], limit_s: float, mark: Callable[[float], Marked]
) -> Marked:
    """`quiesced`, of several guests: each is frozen before the next, and for at most `limit_s`."""
    first, *rest = addresses
    if not rest:
        return quiesced(first, limit_s, mark)
    return quiesced(first, limit_s, lambda left_s: all_quiesced(rest, left_s, mark))


def quiesced(address: str, limit_s: float, mark: Callable[[float], Marked]) -> Marked:
    """What `mark` returns, called with the time that it has while the guest is frozen.
    TimeLimitError, StateError: the guest was not frozen all the time; what was marked then is as
    good as a mark without this, no better."""
    with _stand_by(address):
        agent = open_agent(address, limit_s)
        try:
            if agent.call(STATUS, limit_s) != "thawed":
                raise errors.BusyError("the guest's file systems are frozen by somebody else")
            deadline = time.monotonic() + limit_s
            try:
                if not int(agent.call(FREEZE, limit_s)):
                    raise errors.StateError("the guest froze no file system")
                marked = mark(_left(deadline))
                held = agent.call(STATUS, _left(deadline)) == "frozen"
            finally:
                agent = _thaw(agent, address)
        finally:
            agent.close()
    if not held:
        raise errors.StateError("the guest thawed by itself before the mark: it is as any other")
    return marked


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise errors.TimeLimitError("the guest was frozen for longer than it may be")
    return left


def _thaw(agent: Agent, address: str) -> Agent:
    """Until the guest says that it is thawed, by new connections if need be; the agent that is
    open then."""
    deadline = time.monotonic() + THAW_S
    while True:
        try:
            agent.call(THAW, THAW_S / 3)
            if agent.call(STATUS, THAW_S / 3) == "thawed":
                return agent
            problem: errors.VrepError = errors.StateError("it says that it is still frozen")
        except errors.VrepError as error:
            problem = error
        agent.close()
        if time.monotonic() > deadline:
            raise errors.HypervisorError(
                f"THE GUEST MAY STILL BE FROZEN, it could not be thawed: {problem}"
            )
        time.sleep(0.1)
        with contextlib.suppress(errors.VrepError):
            agent = open_agent(address, THAW_S / 3)


@contextlib.contextmanager
def _stand_by(address: str) -> Iterator[None]:
    """A process that thaws the guest if this one ends inside."""
    guard = subprocess.Popen(
        [sys.executable, "-m", "vrep.hypervisor.quiesce", address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert guard.stdin is not None
    assert guard.stdout is not None
    try:
        if guard.stdout.read(1) != b"+":
            raise errors.VrepError("the process that stands by to thaw the guest did not start")
        yield
    finally:  # whatever went wrong inside, this process has dealt with it
        with contextlib.suppress(OSError):
            guard.stdin.write(b"+")
            guard.stdin.close()
        guard.stdout.close()
        guard.wait()


def _guard(address: str) -> int:
    """Wait for the word that all is well, or for the end of who should say it."""
    sys.stdout.write("+")
    sys.stdout.flush()
    if sys.stdin.read(1):
        return 0
    agent = open_agent(address, THAW_S / 3)
    try:
        _thaw(agent, address).close()
    except errors.VrepError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


__all__ = ["Hooks", "all_quiesced", "mark_quiesced", "quiesced"]

if __name__ == "__main__":
    sys.exit(_guard(sys.argv[1]))
