"""Runs the demonstration guest in QEMU and listens to its console.

The console is the outside witness: what it said, and when it arrived here, is
kept by this process, which none of the kills of a demonstration touches.

One thread reads the console; everything else may be called from any thread.
"""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from vrep.app.demo.guest_image import GuestError, GuestImage

_LINE = re.compile(r"LINE (\d+) (\d+)$")
_CONSOLE_LINE_MAX = 4096
_ERRORS_S = 5.0


@dataclass(frozen=True)
class GuestDisk:
    """A disk as QEMU opens it: an NBD URI, ``vhost-user-blk:`` and a socket, or a raw file."""

    location: str
    #: False is QEMU's cache=writeback, True its cache=none. The guest's flushes
    #: are passed on in both.
    direct: bool = False
    #: How long QEMU holds the guest's commands while an NBD server is away.
    reconnect_delay_s: int = 60

    @property
    def vhost_socket(self) -> str | None:
        """Of a disk that its server serves from the guest's own memory."""
        scheme, _, path = self.location.partition(":")
        return path if scheme == "vhost-user-blk" else None

    def words(self, name: str, number: int) -> list[str]:
        """What QEMU's command line says of it."""
        if self.vhost_socket is not None:
            # `reconnect`: seconds between two attempts while the server is away; the guest's
            # commands wait in its memory.
            return [
                *("-chardev", f"socket,id={name},path={self.vhost_socket},reconnect=1"),
                *("-device", f"vhost-user-blk-pci,chardev={name},num-queues=2,id=dev-{name}"),
            ]
        device = f"scsi-hd,bus=scsi0.0,scsi-id={number},drive={name},id=dev-{name},write-cache=on"
        return ["-blockdev", json.dumps(self.blockdev(name)), "-device", device]

    def blockdev(self, name: str) -> dict[str, Any]:
        """The argument of QEMU's -blockdev."""
        common = {
            "cache": {"direct": self.direct, "no-flush": False},
            "discard": "unmap",
        }
        return {
            "driver": "raw",
            "node-name": name,
            "file": {**self._protocol(), **common, "node-name": f"{name}-store"},
            **common,
        }

    def _protocol(self) -> dict[str, Any]:
        uri = urlsplit(self.location)
        if not uri.scheme.startswith("nbd"):
            path = uri.path if uri.scheme == "file" else self.location
            return {"driver": "file", "filename": str(Path(path).absolute())}
        return {
            "driver": "nbd",
            "server": self._nbd_server(),
            "export": unquote(uri.path.removeprefix("/")),
            "reconnect-delay": self.reconnect_delay_s,
        }

    def _nbd_server(self) -> dict[str, str]:
        uri = urlsplit(self.location)
        if uri.scheme == "nbd+unix":
            sockets = parse_qs(uri.query).get("socket", [])
            if len(sockets) != 1:
                raise GuestError(f"NBD URI needs one ?socket=PATH: {self.location}")
            return {"type": "unix", "path": sockets[0]}
        if uri.scheme == "nbd" and uri.hostname:
            return {"type": "inet", "host": uri.hostname, "port": str(uri.port or 10809)}
        raise GuestError(f"not an NBD URI that the guest can use: {self.location}")


@dataclass(frozen=True)
class GuestTask:
    """What the guest does after boot; see guest_init.sh."""

    mode: str = "workload"
    #: Pause after each line, and after each copied file.
    pause_s: float = 0.05
    churn_pause_s: float = 0.2
    churn: bool = True
    #: Every file is read again and again from the disk and compared, beside the writes.
    reread: bool = False
    #: Lines that mode `continue` adds.
    lines: int = 20
    mount_options: str = "discard"
    #: Stands in each line, so that two runs can be told apart.
    run: str = field(default_factory=lambda: secrets.token_hex(4))

    def kernel_options(self) -> str:
        """The task as options on the kernel's command line."""
        if re.fullmatch(r"[0-9a-f]{8}", self.run) is None:
            raise GuestError(f"run id is not eight hexadecimal digits: {self.run!r}")
        options = {
            "mode": self.mode,
            "run": self.run,
            # A pause of zero would never listen to the host.
            "pause": f"{max(self.pause_s, 0.001):.3f}",
            "churn": f"{self.churn:d}",
            "reread": f"{self.reread:d}",
            "churn_pause": f"{self.churn_pause_s:.3f}",
            "lines": str(self.lines),
            "mount": self.mount_options,
        }
        return " ".join(f"vrep.{name}={value}" for name, value in options.items())


@dataclass(frozen=True)
class ConsoleLine:
    """One line of the console and when it reached this process."""

    text: str
    arrived_ms: int
    arrived_monotonic_s: float


@dataclass(frozen=True)
class WitnessedLine:
    """A numbered line that the guest says is fsynced."""

    number: int
    #: Stamped by the guest before it wrote; never ahead of the host's clock.
    stamped_ms: int
    #: Host clock when the console said so; the line was durable before.
    arrived_ms: int
    arrived_monotonic_s: float


class Guest:
    """One run of the guest, from `start` to its end; a context manager that kills it."""

    def __init__(
        self,
        image: GuestImage,
        disks: Sequence[GuestDisk],
        task: GuestTask | None = None,
        *,
        qmp_socket: Path | None = None,
        memory_mib: int = 256,
        command_prefix: Sequence[str] = (),
        more_words: Sequence[str] = (),
        qemu: str = "qemu-system-x86_64",
    ) -> None:
        """Describe the run; `command_prefix` puts QEMU elsewhere (a network namespace), and
        `more_words` end its command line (a network, a migration that comes in)."""
        self.image = image
        self.disks = tuple(disks)
        self.task = task if task is not None else GuestTask()
        self.qmp_socket = qmp_socket
        self.memory_mib = memory_mib
        self._prefix = tuple(command_prefix)
        self._more = tuple(more_words)
        self._qemu = qemu
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._errors: threading.Thread | None = None
        self._changed = threading.Condition()
        self._console: list[ConsoleLine] = []
        self._witness: list[WitnessedLine] = []
        self._stderr: deque[str] = deque(maxlen=50)
        self._ended = False
        self.started_monotonic_s = 0.0

    def command(self) -> list[str]:
        """The QEMU command line."""
        shared = any(disk.vhost_socket is not None for disk in self.disks)
        words = [
            *self._prefix, self._qemu,
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-machine", "q35,memory-backend=memory", "-accel", "tcg", "-cpu", "max",
            "-object", f"memory-backend-memfd,id=memory,size={self.memory_mib}M,share="
            + ("on" if shared else "off"),
            "-m", f"{self.memory_mib}M", "-smp", "1",
            "-kernel", str(self.image.kernel), "-initrd", str(self.image.initramfs),
            # The time counter of the emulated CPU is calibrated against a busy
            # host and then drifts; the HPET is exact. The kernel's own check of the
            # timer interrupt fails now and then on a busy host; at worst it panics.
            "-append", "console=ttyS0 quiet panic=-1 no_timer_check "
            "clocksource=hpet tsc=unstable mitigations=off "
            + self.task.kernel_options(),
            "-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
            "-device", "virtio-scsi-pci,id=scsi0",
        ]  # fmt: skip
        for index, disk in enumerate(self.disks):
            words += disk.words(f"disk{index}", index)
        if self.qmp_socket is not None:
            words += ["-qmp", f"unix:{self.qmp_socket},server=on,wait=off"]
        return [*words, *self._more]

    def start(self) -> None:
        """Start QEMU and listen to its console."""
        if self._process is not None:
            raise GuestError("the guest was already started")
        try:
            self._process = subprocess.Popen(
                self.command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
            )
        except FileNotFoundError as error:
            raise GuestError(f"{error.filename} is not installed on this machine") from error
        self.started_monotonic_s = time.monotonic()
        self._reader = threading.Thread(
            target=self._read_console, name="guest-console", daemon=True
        )
        self._errors = threading.Thread(target=self._read_errors, name="guest-stderr", daemon=True)
        self._errors.start()
        self._reader.start()

    def __enter__(self) -> Guest:
        if self._process is None:
            self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill9()

    @property
    def pid(self) -> int:
        """The process id of QEMU (of the prefix command, if there is one)."""
        return self._running().pid

    @property
    def console(self) -> list[ConsoleLine]:
        """A copy of what the console has said so far."""
        with self._changed:
            return list(self._console)

    @property
    def witness(self) -> list[WitnessedLine]:
        """A copy of the lines that the console has reported as fsynced."""
        with self._changed:
            return list(self._witness)

    def wait_for(self, pattern: str, timeout_s: float) -> ConsoleLine:
        """The first console line, past ones included, in which `pattern` is found.

        Fails at once when the guest reports a failure or ends without saying it.
        """
        wanted = re.compile(pattern)
        deadline = time.monotonic() + timeout_s
        seen = 0
        with self._changed:
            while True:
                for line in self._console[seen:]:
                    if wanted.search(line.text):
                        return line
                    if line.text.startswith("FAILED "):
                        raise GuestError(f"the guest {line.text.lower()}; {self._account()}")
                seen = len(self._console)
                if self._ended:
                    raise GuestError(f"the guest ended before {pattern!r}; {self._account()}")
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise GuestError(
                        f"the guest did not say {pattern!r} in {timeout_s:g} s; {self._account()}"
                    )
                self._changed.wait(left_s)

    def wait_for_lines(self, count: int, timeout_s: float) -> WitnessedLine:
        """The `count`-th line witnessed in this run."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while len(self._witness) < count:
                left_s = deadline - time.monotonic()
                if self._ended or left_s <= 0:
                    raise GuestError(
                        f"the guest wrote {len(self._witness)} of {count} lines; {self._account()}"
                    )
                self._changed.wait(left_s)
            return self._witness[count - 1]

    def request_stop(self) -> None:
        """Ask the workload to end, unmount and power off."""
        # The guest's shell reads with a short limit, and loses the part of a word that it had read
        # when that ends; the next one is whole then.
        self._say("stop\nstop\nstop")

    def kill9(self) -> None:
        """Kill QEMU as a crash would, and wait until it is gone. Harmless afterwards."""
        process = self._running()
        if process.poll() is None:
            process.kill()
        self._join()

    def wait_exit(self, timeout_s: float) -> int:
        """Wait until QEMU ends by itself and return its status."""
        try:
            status = self._running().wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            with self._changed:
                account = self._account()
            raise GuestError(f"the guest still runs after {timeout_s:g} s; {account}") from error
        self._join()
        return status

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise GuestError("the guest was not started")
        return self._process

    def _join(self) -> None:
        process = self._running()
        process.wait()
        for thread in (self._reader, self._errors):
            if thread is not None and thread is not threading.current_thread():
                thread.join()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()

    def _say(self, text: str) -> None:
        pipe = self._running().stdin
        if pipe is None or pipe.closed:
            raise GuestError("the guest's console is closed")
        try:
            pipe.write(text.encode() + b"\n")
        except BrokenPipeError as error:
            raise GuestError("the guest's console is closed") from error

    def _account(self) -> str:
        # Called with the lock held.
        tail = [line.text for line in self._console[-15:]]
        said = "".join(f"\n  {text}" for text in (*tail, *self._stderr))
        return f"its last words:{said}" if said else "it said nothing"

    def _read_console(self) -> None:
        stream = self._running().stdout
        assert stream is not None
        pending = b""
        while chunk := stream.read(65536):
            arrived_ms, arrived_s = time.time_ns() // 1_000_000, time.monotonic()
            *whole, pending = (pending + chunk).split(b"\n")
            pending = pending[-_CONSOLE_LINE_MAX:]
            for raw in whole:
                text = raw.decode(errors="replace").strip("\r")
                self._hear(ConsoleLine(text, arrived_ms, arrived_s))
        if self._errors is not None:  # why it ended, if QEMU says so, is told with the end
            self._errors.join(_ERRORS_S)
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _hear(self, line: ConsoleLine) -> None:
        if line.text == "CLOCK?":
            self._answer_clock()
        match = _LINE.match(line.text)
        with self._changed:
            self._console.append(line)
            if match is not None:
                self._witness.append(
                    WitnessedLine(
                        int(match.group(1)),
                        int(match.group(2)),
                        line.arrived_ms,
                        line.arrived_monotonic_s,
                    )
                )
            self._changed.notify_all()

    def _answer_clock(self) -> None:
        try:
            self._say(str(time.time_ns() // 1_000_000))
        except GuestError as error:
            # The guest was killed while it asked: there is nobody to answer.
            self._stderr.append(f"clock not answered: {error}")

    def _read_errors(self) -> None:
        stream = self._running().stderr
        assert stream is not None
        for raw in stream:
            self._stderr.append(raw.decode(errors="replace").rstrip())
