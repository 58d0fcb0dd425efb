"""Where a site keeps what: the one place that knows the names below its directory.

Unix socket names are limited to 107 bytes, so when the site's directory is deep its sockets
live in a short private directory, and ``run`` is a link to it. `vrep run` removes that one when
it ends and nobody else uses it.
"""

from __future__ import annotations

import contextlib
import grp
import hashlib
import os
import pwd
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vrep import errors

DEFAULT_DIR = "/var/lib/vrep"
SOCKET_BYTES_MAX = 107
SOCKET_NAME_BYTES = 78  # "nbd-<63 bytes of a group's name>.sock" and some room


@dataclass(frozen=True)
class SitePaths:
    """Paths of one site. Nothing is created but by `make_run` and `make_shm`."""

    root: Path

    @classmethod
    def of(cls, directory: str | os.PathLike[str] | None = None) -> SitePaths:
        """The site at a directory; default: ``VREP_DIR``, then /var/lib/vrep."""
        return cls(Path(directory or os.environ.get("VREP_DIR") or DEFAULT_DIR).absolute())

    def check_user(self) -> None:
        """Refuse that root acts in a site of a service: the files that it makes would be closed
        to the service."""
        if os.geteuid() == 0 and self.root.is_dir() and (uid := self.root.stat().st_uid) != 0:
            try:
                name = pwd.getpwuid(uid).pw_name
            except KeyError:
                name = f"#{uid}"
            raise errors.AccessError(
                f"the site in {self.root} belongs to {name}: sudo -u {name} vrep ..."
            )

    @property
    def config(self) -> Path:
        return self.root / "config.toml"

    @property
    def groups(self) -> Path:
        return self.root / "groups"

    @property
    def keys(self) -> Path:
        return self.root / "keys"

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def views(self) -> Path:
        return self.root / "views"

    @property
    def verdicts(self) -> Path:
        return self.root / "verdicts"

    @property
    def locks(self) -> Path:
        """Of groups, for who takes them over or gives them back."""
        return self.root / "locks"

    @property
    def log(self) -> Path:
        return self.root / "log"

    @property
    def run(self) -> Path:
        """Where the sockets are, short enough for their names."""
        run = self.root / "run"
        return run.resolve() if run.is_symlink() else run

    def socket(self, name: str) -> Path:
        return self.run / f"{name}.sock"

    def vhost_socket(self, group: str, disk: int) -> Path:
        """Of a disk, by its index, that is served over vhost-user-blk."""
        return self.socket(f"vhost-{group}-{disk}")

    def nbd_socket(self, group: str) -> Path:
        return self.socket(f"nbd-{group}")

    @property
    def tag(self) -> str:
        """A short name of this directory, unique on the host."""
        return hashlib.sha256(os.fsencode(self.root)).hexdigest()[:12]

    def spill(self, group: str, base: str = "") -> Path:
        """Where a group's source keeps what its ring cannot; `base` is `source.spill_dir`."""
        return Path(base) / self.tag / group if base else self.groups / group / "spill"

    def shm(self, base: str = "/dev/shm") -> Path:
        """Where rings and change maps live: memory that outlives a killed process."""
        return Path(base) / f"vrep-{self.tag}"

    def make_run(self) -> Path:
        """Create the directory of the sockets."""
        run = self.root / "run"
        if run.is_symlink():
            target = run.resolve()
            target.mkdir(mode=0o700, exist_ok=True)
            _require_owner(target)
            return target
        if len(os.fsencode(run)) + 1 + SOCKET_NAME_BYTES <= SOCKET_BYTES_MAX:
            run.mkdir(mode=0o700, parents=True, exist_ok=True)
            return run
        base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
        target = Path(base) / f"vrep-{self.tag}"
        target.mkdir(mode=0o700, exist_ok=True)
        _require_owner(target)
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        if run.is_dir():
            run.rmdir()
        run.symlink_to(target)
        return target

    def drop_run(self) -> None:
        """Remove the short directory that `make_run` made, once nothing is in it: whoever still
        runs has its socket there. The next `make_run` makes it again."""
        run = self.root / "run"
        if run.is_symlink() and run.readlink().name == f"vrep-{self.tag}":
            with contextlib.suppress(OSError):
                run.readlink().rmdir()

    def admit_users(self, mode: int) -> None:
        """Let those reach a socket of the site that its mode lets in: others may pass through
        the two directories above it, not list them. All else in there is private by itself."""
        if mode & 0o077:
            for directory in (self.root, self.run):
                directory.chmod(0o711)

    def make_shm(self, group: str, base: str = "/dev/shm") -> Path:
        """Create the directory of a group's ring and change map."""
        path = self.shm(base) / group
        path.parent.mkdir(mode=0o700, exist_ok=True)
        _require_owner(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
        return path


def socket_gid(name: str) -> int | None:
    """The id of the Unix group that an NBD socket is given to; None for no name."""
    if not name:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise errors.ConfigError(f"there is no Unix group {name!r} for the NBD socket") from None


def _require_owner(path: Path) -> None:
    """In a directory that all may write to, ours may have been made by somebody else."""
    status = path.lstat()  # a link would lead us where its maker wants
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise errors.AccessError(
            f"{path} is no directory, belongs to another user, or others may write to it"
        )


__all__ = ["SitePaths", "socket_gid"]
