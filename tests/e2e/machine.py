"""A Debian host of its own for a test: a clean root, with systemd as the first process of new
namespaces. Needs root, mmdebstrap and a Debian mirror."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

START_S = 60.0
DEVICES = ("null", "zero", "full", "random", "urandom")
BOOT = """
set -e
cd "$1"
mount --make-rprivate /
mount --bind "$1" "$1"
cd "$1"
mount -t proc proc proc
mount --rbind /sys sys
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs dev
for name in {devices}; do touch dev/$name; mount --bind /dev/$name dev/$name; done
mkdir dev/shm dev/pts
mount -t tmpfs -o mode=1777 tmpfs dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mkdir -p old
pivot_root . old
umount -l old
exec env -i container=lxc PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --system --unit=multi-user.target --log-target=null --show-status=0
"""


def debootstrap(root: Path, packages: Sequence[str]) -> None:
    """A minimal Debian 12 in a directory."""
    include = ",".join(("systemd", "systemd-sysv", *packages))
    subprocess.run(
        ["mmdebstrap", "--variant=minbase", f"--include={include}", "bookworm", str(root)],
        check=True,
        capture_output=True,
        timeout=900,
    )


class Machine:
    """The running host. Commands are run in it as root, or as a user."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._boot = subprocess.Popen(
            [
                *("unshare", "--mount", "--pid", "--fork", "--uts", "--ipc", "--cgroup"),
                *("--kill-child", "sh", "-c", BOOT.format(devices=" ".join(DEVICES)), "boot"),
                str(root),
            ],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._enter = ["nsenter", "-t", str(self._init()), "-m", "-p", "-u", "-i", "-C", "-r", "-w"]
        deadline = time.monotonic() + START_S
        while self.run("systemctl", "is-system-running", check=False).strip() not in (
            *("running", "degraded"),
        ):
            assert time.monotonic() < deadline, "systemd does not come up"
            time.sleep(0.2)

    def _init(self) -> int:
        """systemd's process, as this host numbers it."""
        children = Path(f"/proc/{self._boot.pid}/task/{self._boot.pid}/children")
        deadline = time.monotonic() + START_S
        while True:
            assert self._boot.poll() is None, "no namespaces"
            for child in children.read_text().split():
                if b"systemd" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return int(child)
            assert time.monotonic() < deadline, "systemd does not start"
            time.sleep(0.1)

    def command(self, *command: str, user: str = "") -> list[str]:
        """The command line that runs a command in the machine."""
        inside = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/", *command]
        return [*self._enter, *(["runuser", "-u", user, "--"] if user else []), *inside]

    def run(self, *command: str, user: str = "", check: bool = True) -> str:
        """What a command prints, errors too."""
        done = subprocess.run(
            self.command(*command, user=user),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.returncode}\n{done.stdout}")
        return done.stdout

    def status(self, *command: str, user: str = "") -> int:
        done = subprocess.run(
            self.command(*command, user=user), capture_output=True, timeout=300, check=False
        )
        return done.returncode

    def close(self) -> None:
        """End every process of it, and delete it."""
        os.killpg(self._boot.pid, signal.SIGKILL)
        self._boot.wait()
        shutil.rmtree(self.root, ignore_errors=True)


__all__ = ["Machine", "debootstrap"]
