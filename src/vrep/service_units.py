"""The texts that a service is made of: units, users, directories, AppArmor rules.

What the sandbox of each process is made for stands beside it: the filter opens any disk that a
group names and talks to nobody but local clients; source and target keep to the site's directory
and talk to other sites.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

RUN_DIR: Final = "/run/vrep"
VM_UNITS: Final = (
    "libvirtd.service",
    "virtqemud.service",
    "libvirt-guests.service",
    "pve-guests.service",
    "machines.target",
)
HEADER: Final = "# Written by 'vrep service install'; changed by 'systemctl edit', not here.\n"


@dataclass(frozen=True)
class UnitOptions:
    program: str
    directory: str
    user: str = "vrep"
    groups: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    shm_dir: str = "/dev/shm"
    spill_dir: str = ""
    """of the source, where it is not in the directory"""


DESCRIPTIONS: Final = {
    "filter": "vrep filter, the disks of protected VMs",
    "source": "vrep source, ships what protected VMs write",
    "target": "vrep target, receives and keeps what other sites ship",
}
SERVICES: Final = tuple(DESCRIPTIONS)

COMMON: Final = """\
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
LockPersonality=yes
PrivateTmp=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RemoveIPC=no
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
"""

# Disks lie anywhere, and their devices are of any kind: all but the system's own files may be
# written, as far as the user may.
FILTER: Final = """\
ProtectSystem=full
DevicePolicy=closed
DeviceAllow=block-* rw
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
IPAddressDeny=any
IPAddressAllow=localhost
"""

APPLIANCE: Final = """\
ProtectSystem=strict
ReadWritePaths={writable}
ProtectHome={home}
PrivateDevices=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
"""


def units(options: UnitOptions, roles: tuple[str, ...] = SERVICES) -> dict[str, str]:
    """The text of each unit, by its name."""
    texts = {f"vrep-{role}.service": service(role, options) for role in roles}
    wants = " ".join(texts)
    texts["vrep.target"] = (
        f"{HEADER}[Unit]\nDescription=vrep, continuous replication of VM disks\n"
        f"Wants={wants}\n\n[Install]\nWantedBy=multi-user.target\n"
    )
    return texts


def service(role: str, options: UnitOptions) -> str:
    """One role. Its processes outlive a supervisor that dies (KillMode=process), and the next one
    takes them over: guests use them. A clean stop is the supervisor's own work."""
    guest = role == "filter"
    before = (*VM_UNITS, *options.before) if guest else ()
    spill = [options.spill_dir] if options.spill_dir and role == "source" else []
    places = [options.directory, *spill]
    after = ["local-fs.target", "remote-fs.target", "systemd-tmpfiles-setup.service"]
    if not guest:
        after += ["network-online.target", "vrep-filter.service"]
    lines = [
        f"{HEADER}[Unit]",
        f"Description={DESCRIPTIONS[role]}",
        f"RequiresMountsFor={' '.join(places)}",
        f"After={' '.join(after)}",
    ]
    if before:
        lines.append(f"Before={' '.join(before)}")
    if not guest:
        lines.append("Wants=network-online.target")
    lines += [
        "PartOf=vrep.target",
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        # VMs are started once their disks are served: by the filter, or passed through.
        f"Type={'notify' if guest else 'exec'}",
        f"ExecStart={options.program} run --role {role} --dir {options.directory}",
        f"User={options.user}",
        f"Group={options.user}",
    ]
    lines += [
        "UMask=0077",
        "Restart=always",
        "RestartSec=1",
        "KillMode=process",
        f"TimeoutStartSec={180 if guest else 60}",
        "TimeoutStopSec=120",
        f"OOMScoreAdjust={-900 if guest else -300}",
        "LimitNOFILE=65536",
    ]
    if role != "target":  # it runs what an administrator names to verify a recovered disk
        lines.append("MemoryDenyWriteExecute=yes")
    home = "no" if options.directory.startswith(("/home/", "/root/", "/run/user/")) else "yes"
    writable = " ".join([*places, f"-{RUN_DIR}", f"-{options.shm_dir}"])
    box = FILTER if guest else APPLIANCE.format(writable=writable, home=home)
    return "\n".join(lines) + f"\n{COMMON}{box}\n[Install]\nWantedBy=vrep.target\n"


def sysusers(options: UnitOptions) -> str:
    """The user, a member of the groups: it gives sockets to one, and opens disks of the others."""
    member = "".join(f"m {options.user} {group}\n" for group in options.groups)
    return (
        f'{HEADER}u {options.user} - "vrep, replication of VM disks" '
        f"{options.directory} /usr/sbin/nologin\n{member}"
    )


def tmpfiles(options: UnitOptions) -> str:
    """The sockets' directory: anybody passes through, the sockets' own modes decide."""
    return f"{HEADER}d {RUN_DIR} 0711 {options.user} {options.user} -\n"


def apparmor() -> str:
    """What libvirt's QEMU needs: the NBD sockets of groups and of recovered disks, and the image
    that it stores a bitmap in when a mirror is begun again."""
    return (
        f"# The disks that vrep serves.\n{RUN_DIR}/nbd-*.sock rw,\n{RUN_DIR}/view-*-nbd.sock rw,\n"
        f"{RUN_DIR}/bitmap-*/image rwk,\n"
    )


__all__ = [
    "RUN_DIR",
    "SERVICES",
    "UnitOptions",
    "apparmor",
    "service",
    "sysusers",
    "tmpfiles",
    "units",
]
