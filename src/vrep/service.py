"""systemd units for what a site runs, and what belongs to them on a host.

`plan` works out every file and step without touching anything; `install` and `uninstall` do it, as
root. One site of a host runs as a service. Its directory and its sockets in /run/vrep belong to an
unprivileged user; QEMU reaches the NBD sockets as a member of their group, and past AppArmor by
rules for libvirt's profiles. Files are written whole. A unit that a package already brought with
the same text is not written again.

Specifications: systemd.unit(5), systemd.exec(5), sysusers.d(5), tmpfiles.d(5), apparmor.d(5).
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from vrep import errors
from vrep.control import ControlClient
from vrep.durable import write_atomic
from vrep.paths import SOCKET_BYTES_MAX, SOCKET_NAME_BYTES, SitePaths
from vrep.service_units import RUN_DIR, SERVICES, UnitOptions, apparmor, sysusers, tmpfiles, units
from vrep.settings import Config, load_config

SYSTEM_DIR: Final = Path("etc/systemd/system")
PACKAGED_DIRS: Final = ("usr/lib/systemd/system", "lib/systemd/system")
ABSTRACTION: Final = Path("etc/apparmor.d/abstractions/libvirt-qemu")
APPARMOR_OWN: Final = Path("etc/apparmor.d/abstractions/libvirt-qemu.d/vrep")
APPARMOR_SHARED: Final = Path("etc/apparmor.d/local/abstractions/libvirt-qemu")
OTHERS: Final = ("etc/sysusers.d/vrep.conf", "etc/tmpfiles.d/vrep.conf")
BLOCK_BEGIN: Final = "# vrep: begin\n"
BLOCK_END: Final = "# vrep: end\n"
QEMU_GROUPS: Final = ("libvirt-qemu", "kvm")
NAME: Final = re.compile(r"[a-z_][a-z0-9_-]{0,30}")
UNIT: Final = re.compile(r"[A-Za-z0-9:_.\\@-]{1,200}\.(service|target|slice)")
COMMAND_S: Final = 300


class ServicePlan(msgspec.Struct, frozen=True):
    """What an installation writes and runs."""

    files: dict[str, str]
    """whole text, by absolute path"""
    commands: list[list[str]]
    """in their order, after the files"""
    notes: list[str]
    """what is left to do by hand"""


@dataclass(frozen=True)
class ServiceOptions:
    """How a site runs as a service. `groups` are Unix groups whose members may open the VMs'
    disks, `before` further units that are started after the filter."""

    roles: tuple[str, ...] = tuple(SERVICES)
    user: str = "vrep"
    socket_group: str | None = None
    """of NBD sockets; None: the first of `QEMU_GROUPS` that the host has, empty: none"""
    groups: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    start: bool = True


@dataclass
class _Host:
    """The host, or a directory that stands for one in which nothing is run."""

    root: Path = Path("/")
    run: Callable[[Sequence[str]], None] = field(default=lambda command: _run(command))

    def at(self, path: Path | str) -> Path:
        return self.root / str(path).lstrip("/")

    @property
    def booted(self) -> bool:
        """Whether systemd runs here, sd_booted(3)."""
        return self.at("run/systemd/system").is_dir()

    def text(self, path: Path | str) -> str | None:
        try:
            return self.at(path).read_text()
        except (FileNotFoundError, NotADirectoryError):
            return None


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=COMMAND_S
        )
    except FileNotFoundError:
        raise errors.UnsupportedError(
            f"{command[0]} is not installed: this needs systemd"
        ) from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise errors.StateError(f"{' '.join(command)}: {lines[-1] if lines else done.returncode}")


# ---- what is to be done ------------------------------------------------------------


def program() -> Path:
    """The `vrep` command of this installation."""
    beside = Path(sys.executable).with_name("vrep")
    found = beside if beside.exists() else shutil.which("vrep")
    if found is None:
        raise errors.NotFoundError("the vrep command of this Python: install vrep into it")
    return Path(found)


def plan(
    paths: SitePaths, options: ServiceOptions | None = None, *, root: Path = Path("/")
) -> ServicePlan:
    """What `install` would do; refuses what cannot work."""
    options = options or ServiceOptions()
    host = _Host(root)
    _check(paths, options)
    unit = UnitOptions(
        program=str(program()),
        directory=str(paths.root),
        user=options.user,
        groups=tuple(dict.fromkeys((*_socket_groups(options), *options.groups))),
        before=options.before,
        shm_dir=_config(paths).filter.shm_dir,
        spill_dir=_config(paths).source.spill_dir,
    )
    wanted = {str(SYSTEM_DIR / name): text for name, text in units(unit, options.roles).items()}
    wanted["etc/sysusers.d/vrep.conf"] = sysusers(unit)
    wanted["etc/tmpfiles.d/vrep.conf"] = tmpfiles(unit)
    files = {
        path: text
        for path, text in wanted.items()
        if not any(host.text(twin) == text for twin in _packaged(path))
    }
    files.update(_apparmor_files(host))
    notes = [f"add to {paths.config}: {line}" for line in _missing_settings(paths, options)]
    if any("apparmor.d" in path for path in files):
        notes.append("VMs that run already reach the sockets after their next start")
    commands = [
        ["systemd-sysusers"],
        ["systemd-tmpfiles", "--create", "vrep.conf"],
        ["systemctl", "daemon-reload"],
        ["systemctl", "enable", "vrep.target", *(f"vrep-{role}.service" for role in options.roles)],
    ]
    if options.start:
        commands.append(["systemctl", "start", "vrep.target"])
    if not host.booted:
        notes.append("systemd does not run here: what was enabled starts at the next boot")
        commands = [
            c for c in commands if c[1:] not in (["daemon-reload"], ["start", "vrep.target"])
        ]
    return ServicePlan({f"/{path}": text for path, text in files.items()}, commands, notes)


def _packaged(path: str) -> Iterable[str]:
    """Where a package puts its twin of a file in /etc."""
    name = Path(path).name
    if path.startswith(str(SYSTEM_DIR)):
        return [f"{directory}/{name}" for directory in PACKAGED_DIRS]
    return [path.replace("etc/", "usr/lib/", 1)]


def _check(paths: SitePaths, options: ServiceOptions) -> None:
    unknown = set(options.roles) - set(SERVICES)
    if unknown or not options.roles:
        raise errors.UsageError(f"roles are {', '.join(SERVICES)}")
    for name in (options.user, options.socket_group or "vrep", *options.groups):
        if not NAME.fullmatch(name):
            raise errors.InvalidError(f"{name!r} is no name of a user or group")
    if options.user == "root":
        raise errors.InvalidError("a service user is unprivileged: not root")
    for unit in options.before:
        if not UNIT.fullmatch(unit):
            raise errors.InvalidError(f"{unit!r} is no name of a unit, as in qemu@web.service")
    config = _config(paths)
    for directory in (str(paths.root), config.filter.shm_dir, config.source.spill_dir):
        if re.search(r"[\s%\"'\\$;]", directory):
            raise errors.InvalidError(f"the directory {directory}: a unit cannot name it")
    for place in (program(), Path(sys.prefix)):
        _check_reach(place)


def _check_reach(path: Path) -> None:
    """Whether a user who is nobody in particular gets there."""
    for part in (path.resolve(), *path.resolve().parents):
        if not part.stat().st_mode & 0o001:
            raise errors.AccessError(
                f"{part} is closed to the service's user: install vrep elsewhere, as in /opt/vrep"
            )


def _socket_groups(options: ServiceOptions) -> tuple[str, ...]:
    wanted = options.socket_group
    if wanted is None:
        wanted = next((name for name in QEMU_GROUPS if _group_exists(name)), "")
    elif wanted and not _group_exists(wanted):
        raise errors.NotFoundError(f"the Unix group {wanted!r}")
    for name in options.groups:
        if not _group_exists(name):
            raise errors.NotFoundError(f"the Unix group {name!r}")
    return (wanted,) if wanted else ()


def _group_exists(name: str) -> bool:
    try:
        grp.getgrnam(name)
    except KeyError:
        return False
    return True


def _config(paths: SitePaths) -> Config:
    try:
        return load_config(paths.config)
    except PermissionError:
        return Config()


def _settings(options: ServiceOptions) -> dict[str, str]:
    """What new groups and views need, so that QEMU may connect."""
    groups = _socket_groups(options)
    return {"socket_mode": "0660", "socket_group": groups[0]} if groups else {}


def _missing_settings(paths: SitePaths, options: ServiceOptions) -> list[str]:
    """Lines for the settings that `_write_settings` does not write, as they have other values."""
    config = _config(paths)
    return [
        f'{section}.{key} = "{value}"'
        for section, have in (("filter", config.filter), ("recovery", config.recovery))
        for key, value in _settings(options).items()
        if getattr(have, key) != value and section in _sections(paths)
    ]


def _sections(paths: SitePaths) -> set[str]:
    """Tables that the settings have."""
    try:
        found = msgspec.toml.decode(paths.config.read_bytes())
    except FileNotFoundError:
        return set()
    return set(found)


def _apparmor_files(host: _Host) -> dict[str, str]:
    """Rules for libvirt's profiles, where they are, in the way that they include others'."""
    abstraction = host.text(ABSTRACTION)
    if abstraction is None:
        return {}
    if "abstractions/libvirt-qemu.d" in abstraction:
        return {str(APPARMOR_OWN): apparmor()}
    rest = _without_block(host.text(APPARMOR_SHARED) or "")
    if rest and not rest.endswith("\n"):
        rest += "\n"
    return {str(APPARMOR_SHARED): f"{rest}{BLOCK_BEGIN}{apparmor()}{BLOCK_END}"}


def _without_block(text: str) -> str:
    before, begin, rest = text.partition(BLOCK_BEGIN)
    _block, end, after = rest.partition(BLOCK_END)
    return before + after if begin and end else text


# ---- doing it ----------------------------------------------------------------------


def install(
    paths: SitePaths, options: ServiceOptions | None = None, *, root: Path = Path("/")
) -> ServicePlan:
    """Write the units and what they need, give the site to its user, enable and start them. Can
    be given again; units that run are not restarted."""
    options = options or ServiceOptions()
    _need_root()
    if not (paths.root / "identity").is_dir():
        raise errors.NotFoundError(f"a site in {paths.root}: make one with 'vrep site init'")
    host = _Host(root)
    made = plan(paths, options, root=root)
    _check_stopped(paths, options)
    for role in set(SERVICES) - set(options.roles):  # of an earlier installation
        stale = host.at(SYSTEM_DIR / f"vrep-{role}.service")
        if stale.exists():
            _disable(host, [stale.name])
            stale.unlink()
    for path, text in made.files.items():
        target = host.at(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, text.encode(), 0o644)
    if root != Path("/"):
        return made
    account, rest = made.commands[:2], made.commands[2:]
    for command in account:
        host.run(command)
    _write_settings(paths, options)
    _hand_over(paths, options.user)
    for command in rest:
        host.run(command)
    return made


def installed_files(*, root: Path = Path("/")) -> list[str]:
    """What `uninstall` would remove, or cut its block out of."""
    host = _Host(root)
    places = (*(str(SYSTEM_DIR / name) for name in _unit_names()), *OTHERS, str(APPARMOR_OWN))
    found = [f"/{path}" for path in places if host.at(path).exists()]
    if BLOCK_BEGIN in (host.text(APPARMOR_SHARED) or ""):
        found.append(f"/{APPARMOR_SHARED}")
    return found


def _unit_names() -> list[str]:
    return ["vrep.target", *(f"vrep-{role}.service" for role in SERVICES)]


def uninstall(paths: SitePaths, *, force: bool = False, root: Path = Path("/")) -> list[str]:
    """Stop and remove what `install` wrote; the site, its data and its user stay. The removed
    files. Refused while a VM uses a disk, unless forced."""
    _need_root()
    host = _Host(root)
    if not force:
        _check_unused(paths)
    found = installed_files(root=root)
    _disable(host, [name for name in _unit_names() if _unit_exists(host, name)])
    for path in found:
        text = host.text(path) or ""
        if BLOCK_BEGIN in text:
            write_atomic(host.at(path), _without_block(text).encode(), 0o644)
        else:
            host.at(path).unlink()
    if root == Path("/") and host.booted:
        host.run(["systemctl", "daemon-reload"])
    return found


def _unit_exists(host: _Host, name: str) -> bool:
    places = (str(SYSTEM_DIR), *PACKAGED_DIRS)
    return any(host.at(f"{directory}/{name}").exists() for directory in places)


def _disable(host: _Host, names: Sequence[str]) -> None:
    if names and host.root == Path("/"):
        host.run(["systemctl", "disable", *(["--now"] if host.booted else []), *names])


def _need_root() -> None:
    if os.geteuid() != 0:
        raise errors.AccessError("units and users are made by root: use sudo, or --dry-run")


def _check_stopped(paths: SitePaths, options: ServiceOptions) -> None:
    """What another user started would go on with files that are given away."""
    with contextlib.suppress(KeyError):
        if paths.root.stat().st_uid == pwd.getpwnam(options.user).pw_uid:
            return
    for role in SERVICES:
        if ControlClient(paths.socket(role)).alive():
            raise errors.BusyError(f"the site's {role} runs: stop 'vrep run' first")


def _check_unused(paths: SitePaths) -> None:
    try:
        groups = ControlClient(paths.socket("filter")).call("status")
    except errors.UnreachableError:
        return
    used = sorted(name for name, group in groups.items() if group.get("clients"))
    if used:
        raise errors.BusyError(
            f"VMs use the disks of {', '.join(used)}: stop them first, or --force"
        )


def _write_settings(paths: SitePaths, options: ServiceOptions) -> None:
    """Let QEMU's group connect, in tables that the settings do not have yet."""
    have, wanted = _sections(paths), _settings(options)
    text = paths.config.read_text() if paths.config.exists() else ""
    for section in ("filter", "recovery"):
        if section not in have and wanted:
            lines = "".join(f'{key} = "{value}"\n' for key, value in wanted.items())
            text += f"\n[{section}]\n{lines}"
    if text:
        msgspec.toml.decode(text.encode(), type=Config)
        write_atomic(paths.config, text.encode(), 0o600)


def _hand_over(paths: SitePaths, user: str) -> None:
    """The site's files to its user, and its sockets to /run/vrep."""
    entry = pwd.getpwnam(user)
    run = paths.root / "run"
    if not run.is_symlink() or run.readlink() != Path(RUN_DIR):
        if run.is_symlink():
            run.unlink()
        elif run.exists():
            shutil.rmtree(run)  # sockets of processes that have ended
        run.symlink_to(RUN_DIR)
    shm = paths.shm(_config(paths).filter.shm_dir)
    for place in (paths.root, shm):
        if place.is_dir():
            _own(place, entry.pw_uid, entry.pw_gid)
    paths.root.chmod(0o711)


def _own(top: Path, uid: int, gid: int) -> None:
    os.chown(top, uid, gid, follow_symlinks=False)
    for directory, names, files in os.walk(top):
        for name in (*names, *files):
            os.chown(Path(directory) / name, uid, gid, follow_symlinks=False)


assert len(RUN_DIR) + 1 + SOCKET_NAME_BYTES <= SOCKET_BYTES_MAX

__all__ = [
    "SERVICES",
    "ServiceOptions",
    "ServicePlan",
    "install",
    "installed_files",
    "plan",
    "program",
    "uninstall",
]
