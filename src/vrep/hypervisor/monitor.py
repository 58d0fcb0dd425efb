"""A VM's monitor: QMP over a Unix socket, or through libvirt, as `execute`.

Addresses: ``qmp:SOCKET`` and ``libvirt:NAME`` (of the daemon that ``LIBVIRT_DEFAULT_URI`` names,
else of the system's). Times in seconds. A QMP socket serves one client at a time. A monitor
belongs to one thread.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import structlog

from vrep import errors

CONNECT_S: Final = 5.0
EXECUTE_S: Final = 30.0
SYSTEM_URI: Final = "qemu:///system"

log = structlog.get_logger("vrep.hypervisor")


class Monitor(Protocol):
    """What a running QEMU is asked through."""

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """The answer. `HypervisorError`: QEMU refused, and nothing was done. `TimeLimitError`,
        `UnreachableError`: whether it was done is not known."""

    def pass_file(self, name: str, fd: int) -> None:
        """Give an open file to QEMU, under a name by which the next command may use it."""

    def guarded(
        self,
        command: str,
        arguments: Mapping[str, Any] | None,
        limit_s: float,
        rescue: tuple[str, Mapping[str, Any]],
    ) -> bool:
        """Execute what may make QEMU wait for a server. When it has not ended in time, `rescue` is
        executed out of band (which QEMU does even then). Whether it ended in time."""

    def close(self) -> None: ...


class SocketMonitor:
    """QMP over the Unix socket of a QEMU (its ``-qmp unix:PATH,server=on,wait=off``)."""

    def __init__(self, path: Path, limit_s: float = EXECUTE_S) -> None:
        from qemu.qmp import QMPClient, QMPError

        self._path = path
        self._limit_s = limit_s
        self._loop = asyncio.new_event_loop()
        self._client = QMPClient("vrep")
        self._client.logger.setLevel("CRITICAL")  # what goes wrong is raised
        try:
            self._run(self._client.connect(str(path)), CONNECT_S)
        except (TimeoutError, asyncio.CancelledError):
            self._loop.close()
            raise errors.TimeLimitError(
                f"the monitor {path} does not greet: another program may be connected to it"
            ) from None
        except (QMPError, OSError) as error:
            self._loop.close()
            raise errors.UnreachableError(f"the monitor {path}: {error}") from None

    def _run(self, work: Coroutine[Any, Any, Any], limit_s: float) -> Any:
        return self._loop.run_until_complete(asyncio.wait_for(work, limit_s))

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        from qemu.qmp import ExecuteError, QMPError

        given = dict(arguments) if arguments else None
        try:
            return self._run(self._client.execute(command, given), self._limit_s)
        except ExecuteError as error:
            raise errors.HypervisorError(f"{command}: {error}") from None
        except TimeoutError:
            raise errors.TimeLimitError(f"{command} at {self._path}") from None
        except (QMPError, OSError, EOFError) as error:
            raise errors.UnreachableError(f"{command} at {self._path}: {error}") from None

    def pass_file(self, name: str, fd: int) -> None:
        self._client.send_fd_scm(fd)
        self.execute("getfd", {"fdname": name})

    def guarded(
        self,
        command: str,
        arguments: Mapping[str, Any] | None,
        limit_s: float,
        rescue: tuple[str, Mapping[str, Any]],
    ) -> bool:
        from qemu.qmp import ExecuteError, QMPError

        async def both() -> bool:
            given = dict(arguments) if arguments else None
            work = asyncio.ensure_future(self._client.execute(command, given))
            done, _ = await asyncio.wait({work}, timeout=limit_s)
            if not done:
                await self._client.execute(rescue[0], dict(rescue[1]), oob=True)
            await work
            return bool(done)

        try:
            return bool(self._run(both(), limit_s + self._limit_s))
        except ExecuteError as error:
            raise errors.HypervisorError(f"{command}: {error}") from None
        except TimeoutError:
            raise errors.TimeLimitError(f"{command} at {self._path}") from None
        except (QMPError, OSError, EOFError) as error:
            raise errors.UnreachableError(f"{command} at {self._path}: {error}") from None

    def close(self) -> None:
        if self._loop.is_closed():
            return
        from qemu.qmp import QMPError

        try:
            self._run(self._client.disconnect(), CONNECT_S)
        except (QMPError, OSError, EOFError, TimeoutError, asyncio.CancelledError) as error:
            log.debug("monitor not closed in order", path=str(self._path), error=str(error))
        finally:
            self._loop.close()


class LibvirtMonitor:
    """QMP through libvirt, which holds a domain's monitor itself. libvirt marks the domain as
    tainted (custom-monitor)."""

    def __init__(self, name: str) -> None:
        self._libvirt, self._qemu = libvirt_modules()
        self._connection, self._domain = open_domain(name)
        self._name = name

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        return self._execute(command, arguments, [])

    def pass_file(self, name: str, fd: int) -> None:
        self._execute("getfd", {"fdname": name}, [fd])

    def _execute(self, command: str, arguments: Mapping[str, Any] | None, files: list[int]) -> Any:
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = dict(arguments)
        line = json.dumps(request)
        try:
            if files:
                text, _ = self._qemu.qemuMonitorCommandWithFiles(self._domain, line, files, 0)
            else:
                text = self._qemu.qemuMonitorCommand(self._domain, line, 0)
        except self._libvirt.libvirtError as error:
            raise errors.UnreachableError(f"{command} at domain {self._name!r}: {error}") from None
        answer = json.loads(text)
        if "error" in answer:
            raise errors.HypervisorError(f"{command}: {answer['error'].get('desc', answer)}")
        return answer.get("return")

    def guarded(
        self,
        command: str,
        arguments: Mapping[str, Any] | None,
        limit_s: float,
        rescue: tuple[str, Mapping[str, Any]],
    ) -> bool:
        """libvirt sends nothing out of band: whoever uses this has asked the server just before
        whether it answers."""
        self.execute(command, arguments)
        return True

    def close(self) -> None:
        self._connection.close()


def libvirt_modules() -> tuple[Any, Any]:
    """libvirt-python; UnsupportedError where it is not installed."""
    try:
        import libvirt  # type: ignore[import-untyped, import-not-found, unused-ignore]
        import libvirt_qemu  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError as error:
        raise errors.UnsupportedError(
            f"libvirt-python is not installed ({error}): pip install 'vrep[libvirt]'"
        ) from None
    libvirt.registerErrorHandler(lambda _context, _error: None, None)  # they are raised as well
    return libvirt, libvirt_qemu


def open_domain(name: str) -> tuple[Any, Any]:
    """A connection to libvirt and a running domain of it."""
    libvirt, _ = libvirt_modules()
    uri = os.environ.get("LIBVIRT_DEFAULT_URI", SYSTEM_URI)
    try:
        connection = libvirt.open(uri)
    except libvirt.libvirtError as error:
        raise errors.UnreachableError(f"libvirt at {uri}: {error}") from None
    try:
        domain = connection.lookupByName(name)
        running = bool(domain.isActive())
    except libvirt.libvirtError as error:
        connection.close()
        raise errors.NotFoundError(f"libvirt domain {name!r} at {uri}: {error}") from None
    if not running:
        connection.close()
        raise errors.UnreachableError(f"libvirt domain {name!r} does not run")
    return connection, domain


def check_vm(vm: str) -> str:
    """The address of a VM, when it is one; a relative socket becomes absolute."""
    scheme, _, where = vm.partition(":")
    if not where or scheme not in ("qmp", "libvirt"):
        raise errors.UsageError(f"the VM {vm!r}: write qmp:SOCKET or libvirt:NAME")
    return f"qmp:{Path(where).absolute()}" if scheme == "qmp" else vm


def open_monitor(vm: str, limit_s: float = EXECUTE_S) -> Monitor:
    """The monitor of a running VM, which is waited for at each command for so long; libvirt has
    limits of its own. UnreachableError, NotFoundError: it does not run."""
    scheme, _, where = check_vm(vm).partition(":")
    return SocketMonitor(Path(where), limit_s) if scheme == "qmp" else LibvirtMonitor(where)


__all__ = ["LibvirtMonitor", "Monitor", "SocketMonitor", "check_vm", "open_domain", "open_monitor"]
