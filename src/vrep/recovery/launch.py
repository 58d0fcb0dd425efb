"""Launch: a test's process, forked from a command that has done nothing else yet.

What a recovery costs counts from exec, and a second interpreter costs as much as all the rest.
So ``vrep test start`` forks before it has imported anything that is heavy: the child goes to
the background, finds the point, serves it and says so; the parent waits for that, and in the
meantime has the disk begin to read what the child will want first. Nothing but the command
line's own process may do this: it has one thread, and nothing open that matters.

`start_test` of `vrep.recovery.view` is the same for everybody else.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from vrep.paths import SitePaths

__all__ = ["can_fork", "fork_test"]

START_S: Final = 60.0
GROUPS_MAX: Final = 8
_MANIFEST_BYTES: Final = 512


def can_fork() -> bool:
    """Whether this process has one thread, of Python's or any other."""
    threads = sum(1 for _task in Path("/proc/self/task").iterdir())
    return threading.active_count() == 1 and threads == 1


def fork_test(
    directory: str | None, group: str, at: str, since: str | None = None
) -> dict[str, Any]:
    """Serve a group as it was at a point; the `ViewInfo`, as JSON has it."""
    view_id = os.urandom(6).hex()
    request = {"view": view_id, "group": group, "at": at}
    if since is not None:
        request["since"] = since
    sys.stdout.flush()
    sys.stderr.flush()
    answers, answer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(answers)
        _serve(directory, request, answer)
    os.close(answer)
    try:
        os.waitpid(child, 0)  # it has moved to the background
        paths = _paths(directory)
        with contextlib.suppress(OSError):
            _read_ahead(paths.store, group)
        line = _line(answers)
        if line is not None and "view" in (found := json.loads(line or b"{}")):
            view: dict[str, Any] = found["view"]
            return view
        from vrep.recovery.view import ViewDirectory, failure

        raise failure(ViewDirectory(paths, view_id), line, START_S)
    except BaseException:
        from vrep.recovery.view import ViewDirectory, discard

        discard(ViewDirectory(_paths(directory), view_id))
        raise
    finally:
        os.close(answers)


def _paths(directory: str | None) -> SitePaths:
    from vrep.paths import SitePaths

    return SitePaths.of(directory)


def _line(fd: int) -> bytes | None:
    """The answer; None when there was none in time, empty when its writer ended."""
    data = b""
    while not data.endswith(b"\n"):
        ready, _, _ = select.select([fd], [], [], START_S)
        if not ready:
            return None
        part = os.read(fd, 65536)
        if not part:
            return b""
        data += part
    return data


def _serve(directory: str | None, request: dict[str, str], answer: int) -> None:
    """The child: never returns."""
    code = 70
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        paths = _paths(directory)
        os.chdir("/")
        os.dup2(answer, 1)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        from vrep.durable import make_private_directory

        make_private_directory(paths.log)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
        os.dup2(os.open(paths.log / f"view-{request['view']}.log", flags, 0o600), 2)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        # Nothing of ours multiplies matrices: no threads for it.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        from vrep.recovery.process import serve

        code = serve(paths, request)
    finally:
        # Never back into the command; what went wrong is the log's last line.
        if sys.exc_info()[1] is not None:
            import traceback

            traceback.print_exc()
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(code)


def _read_ahead(store: Path, group: str) -> None:
    """Have the disk begin to read the open segment of a group: advice, so nothing is checked
    and what does not look as it should is passed over."""
    homes = sorted(store.iterdir())[:GROUPS_MAX]
    for home in homes:
        manifests, segments = sorted(home.glob("manifest-*")), sorted(home.glob("seg-*"))
        if not manifests or not segments:
            continue
        with manifests[-1].open("rb") as file:
            known = file.read(_MANIFEST_BYTES)
        if len(homes) > 1 and home.name != group and group.encode() not in known:
            continue
        fd = os.open(segments[-1], os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(fd)
