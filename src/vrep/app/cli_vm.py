"""Running VMs: the filter is put under their disks, and taken away; disks get another size."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from vrep.app.cli_common import Directory, Group, Json, parse_size, site_of
from vrep.app.cli_output import emit
from vrep.errors import UsageError

if TYPE_CHECKING:
    from vrep.hypervisor.attach import Result

app = typer.Typer()


class AttachMode(enum.Enum):
    """How a filter comes to a VM's writes."""

    INLINE = "inline"
    MIRROR = "mirror"


DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the commands for the VM's QEMU; change nothing.")
]


@app.command("attach")
def attach(
    group: Group,
    vm: Annotated[
        str | None,
        typer.Option(
            "--vm",
            metavar="VM",
            help="qmp:SOCKET or libvirt:NAME; without it a detached group is served again.",
        ),
    ] = None,
    dry_run: DryRun = False,
    reconnect_delay: Annotated[
        int,
        typer.Option(
            "--reconnect-delay",
            metavar="SECONDS",
            min=0,
            max=86400,
            help="The VM waits so long for a filter that restarts.",
        ),
    ] = 60,
    mode: Annotated[
        AttachMode,
        typer.Option(
            "--mode",
            help="inline: the VM's disks are the filter's; mirror: the VM sends a copy of each "
            "write, and goes on whatever becomes of the filter.",
        ),
    ] = AttachMode.INLINE,
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Put the filter under the disks of a running VM, all in one step; or have the VM mirror its
    writes to it. A block graph that has no recipe is refused, and left as it is."""
    site = site_of(directory)
    result = site.attach(group, vm, dry_run=dry_run, reconnect_s=reconnect_delay, mode=mode.value)
    if result is None:
        emit({"group": group, "detached": False}, as_json, f"{group}: served again")
        return
    already = "" if result.commands else " already"
    _show(group, result, as_json, f"{group}: attached to {result.vm}{already}")


@app.command("detach")
def detach(
    group: Group, dry_run: DryRun = False, directory: Directory = None, as_json: Json = False
) -> None:
    """Put the disks of an attached VM back as they were. Its history stays; what it writes from
    then on is not replicated."""
    result = site_of(directory).detach(group, dry_run=dry_run)
    _show(group, result, as_json, f"{group}: detached")


@app.command("resize")
def resize(
    group: Group,
    disk: Annotated[str, typer.Argument(metavar="DISK", help="A disk of the group.")],
    size: Annotated[
        str | None,
        typer.Argument(metavar="SIZE", help="Its new size; left out: what its backing has now."),
    ] = None,
    shrink: Annotated[
        bool, typer.Option("--shrink", help="A smaller size, too: what is cut off is gone.")
    ] = False,
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Give a disk another size, in the order of its writes. Earlier points keep theirs. The VM
    learns it when it connects again, and by its monitor's block_resize."""
    wanted = None if size is None else parse_size(size)
    if wanted == 0:
        raise UsageError("resize: a disk has a size above 0")
    answer = site_of(directory).resize(group, disk, wanted, shrink=shrink)
    text = f"{group}: {disk} has {answer['bytes']} bytes"
    text += "" if answer["changed"] else ", as before"
    emit({"group": group, "disk": disk, **answer}, as_json, text)


def _show(group: str, result: Result, as_json: bool, done: str) -> None:
    answer = {"group": group, **msgspec.to_builtins(result)}
    lines = []
    if result.dry_run:
        for disk in result.disks:
            lines.append(f"# {disk.name}: {disk.topology}, {disk.below} under {disk.top}")
        for copy in result.mirrors:
            lines.append(f"# {copy.name}: mirror of {copy.node}")
        lines += [msgspec.json.encode(command).decode() for command in result.commands]
        lines += [] if result.commands else ["# nothing is to be done"]
    else:
        if result.objects:
            lines.append(f"kept beside its disks: {', '.join(result.objects)}")
        if result.objects_missing:
            lines.append(f"not kept: {result.objects_missing}")
        took = f" in {result.switch_ms:.1f} ms" if result.switch_ms else ""
        lines.insert(0, done + took)
    emit(answer, as_json, "\n".join(lines))


__all__ = ["app"]
