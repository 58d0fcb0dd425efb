"""`vrep service`: run the site under systemd."""

from __future__ import annotations

from typing import Annotated

import typer

from vrep.app.cli_common import Directory, Json
from vrep.app.cli_output import emit

app = typer.Typer()
service = typer.Typer(no_args_is_help=True, help="The site as services of systemd.")
app.add_typer(service, name="service")

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be written and run; change nothing.")
]


@service.command("install")
def install(
    role: Annotated[
        list[str] | None,
        typer.Option(
            "--role",
            metavar="ROLE",
            help="filter, source or target; may be repeated. Default: all.",
        ),
    ] = None,
    user: Annotated[
        str,
        typer.Option("--user", metavar="NAME", help="Whom the site belongs to; made if absent."),
    ] = "vrep",
    socket_group: Annotated[
        str | None,
        typer.Option(
            "--socket-group",
            metavar="GROUP",
            help="Who may use NBD sockets. Default: libvirt-qemu or kvm, where they exist.",
        ),
    ] = None,
    group: Annotated[
        list[str] | None,
        typer.Option(
            "--group",
            metavar="GROUP",
            help="Whose members may open the VMs' disks, as in disk; may be repeated.",
        ),
    ] = None,
    before: Annotated[
        list[str] | None,
        typer.Option(
            "--before",
            metavar="UNIT",
            help="A unit that starts VMs, as in qemu@web.service; may be repeated.",
        ),
    ] = None,
    no_start: Annotated[bool, typer.Option("--no-start", help="Enable, and start later.")] = False,
    dry_run: DryRun = False,
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Install, enable and start the units of a site, ordered before the VMs."""
    from vrep import service as units
    from vrep.paths import SitePaths

    paths = SitePaths.of(directory)
    options = units.ServiceOptions(
        roles=tuple(role or units.SERVICES),
        user=user,
        socket_group=socket_group,
        groups=tuple(group or ()),
        before=tuple(before or ()),
        start=not no_start,
    )
    made = units.plan(paths, options) if dry_run else units.install(paths, options)
    texts = [f"# {path}\n{text}" for path, text in made.files.items()] if dry_run else []
    done = [*made.files, *(" ".join(command) for command in made.commands)]
    shown = [*texts, *("run " + " ".join(c) for c in made.commands)] if dry_run else done
    emit(made, as_json, "\n".join([*shown, *(f"note: {note}" for note in made.notes)]))


@service.command("uninstall")
def uninstall(
    force: Annotated[
        bool, typer.Option("--force", help="Even while VMs use the disks, which then stall.")
    ] = False,
    dry_run: DryRun = False,
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Stop and remove the units; the site, its data and its user stay."""
    from vrep import service as units
    from vrep.paths import SitePaths

    paths = SitePaths.of(directory)
    removed = units.installed_files() if dry_run else units.uninstall(paths, force=force)
    emit({"removed": removed}, as_json, "\n".join(removed) or "nothing is installed")


__all__ = ["app"]
