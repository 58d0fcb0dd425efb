"""What a source site does with its groups: protect, pause, resync, checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from vrep.app.cli_common import Directory, Group, Json, parse_duration, parse_size, site_of
from vrep.app.cli_output import Progress, emit, size_text, time_text
from vrep.errors import UsageError

if TYPE_CHECKING:
    from vrep.groups import GroupDefinition
    from vrep.site import Site

app = typer.Typer()

CHECKPOINT_WAIT_S: Final = 60.0


def parse_disks(texts: list[str]) -> dict[str, str]:
    """NAME=URI of each --disk."""
    disks: dict[str, str] = {}
    for text in texts:
        name, equals, uri = text.partition("=")
        if not equals or not name or not uri:
            raise UsageError(f"--disk {text}: write NAME=URI, as in root=file:/srv/web.raw")
        if name in disks:
            raise UsageError(f"--disk {name} is given twice")
        disks[name] = uri
    return disks


def parse_fronts(texts: list[str]) -> dict[str, str]:
    """NAME=FRONT of each --front."""
    fronts: dict[str, str] = {}
    for text in texts:
        name, equals, front = text.partition("=")
        if not equals or name in fronts:
            raise UsageError(f"--front {text}: write NAME=nbd, vhost-user-blk or iscsi, once each")
        fronts[name] = front
    return fronts


@app.command("protect")
def protect(
    group: Annotated[str, typer.Argument(metavar="GROUP", help="A new name.")],
    disk: Annotated[
        list[str] | None,
        typer.Option(
            "--disk", metavar="NAME=URI", help="file:PATH, block:PATH or qcow2:PATH; repeat it."
        ),
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="SITE", help="A site that joined.")
    ] = None,
    key: Annotated[
        str | None, typer.Option("--key", metavar="NAME", help="The tenant key that seals.")
    ] = None,
    accept_key_loss: Annotated[
        bool,
        typer.Option("--accept-key-loss", help="Do not ask for a verified export of the key."),
    ] = False,
    ring: Annotated[
        str | None, typer.Option("--ring", metavar="SIZE", help="What the ring buffers.")
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option("--rate", metavar="SIZE", help="Limit of a sync, bytes a second."),
    ] = None,
    compression: Annotated[
        int | None, typer.Option("--compression", min=0, max=19, help="zstd level; 0: off.")
    ] = None,
    direct: Annotated[
        bool, typer.Option("--direct", help="Open disks without the page cache (O_DIRECT).")
    ] = False,
    tcp: Annotated[
        str | None,
        typer.Option("--tcp", metavar="HOST:PORT", help="Serve NBD on loopback TCP as well."),
    ] = None,
    socket_mode: Annotated[
        str | None, typer.Option("--socket-mode", metavar="MODE", help="Of the NBD socket.")
    ] = None,
    socket_group: Annotated[
        str | None, typer.Option("--socket-group", metavar="GROUP", help="Of the NBD socket.")
    ] = None,
    on_fence: Annotated[
        str | None,
        typer.Option(
            "--on-fence",
            metavar="go-on|pause",
            help="The VM's I/O once another site took the group over.",
        ),
    ] = None,
    front: Annotated[
        list[str] | None,
        typer.Option(
            "--front",
            metavar="NAME=FRONT",
            help="How the VM reaches a disk: nbd (default), vhost-user-blk or iscsi; repeat it.",
        ),
    ] = None,
    iscsi_listen: Annotated[
        str | None,
        typer.Option("--iscsi-listen", metavar="HOST:PORT", help="Where iSCSI disks are served."),
    ] = None,
    iscsi_block: Annotated[
        int | None, typer.Option("--iscsi-block", metavar="512|4096", help="Their blocks.")
    ] = None,
    iscsi_admit: Annotated[
        list[str] | None,
        typer.Option(
            "--iscsi-admit",
            metavar="NAME[@ADDRESS]",
            help="An initiator that may log in; @ADDRESS: any from there. Repeat it.",
        ),
    ] = None,
    iscsi_auth: Annotated[
        str | None,
        typer.Option("--iscsi-auth", metavar="FILE", help="CHAP: a name and a secret a line."),
    ] = None,
    vhost_block: Annotated[
        int | None,
        typer.Option(
            "--vhost-block", metavar="512|4096", help="Blocks of the disks on vhost-user-blk."
        ),
    ] = None,
    lanes: Annotated[
        int,
        typer.Option(
            "--lanes", metavar="N", help="Filter threads that the disks are dealt out to, in turn."
        ),
    ] = 0,
    beside: Annotated[
        str,
        typer.Option(
            "--beside",
            metavar="SITE",
            help="The disks become further lanes of the group that this site protects.",
        ),
    ] = "",
    wait: Annotated[bool, typer.Option("--wait", help="Until the first sync has ended.")] = False,
    window: Annotated[
        str | None,
        typer.Option("--window", metavar="TIME", help="History that the target keeps; 0: all."),
    ] = None,
    quota: Annotated[
        str | None,
        typer.Option("--quota", metavar="SIZE", help="Room of the history there; 0: no limit."),
    ] = None,
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Replicate disks to another site, as one group recovered to one instant. For a group that is
    protected, --disk alone adds disks to it if it has lanes, --window and --quota alone change what
    the target keeps of it, and --front alone how its VM, which must be off, reaches its disks."""
    site = site_of(directory)
    fronts = parse_fronts(front or [])
    window_s = None if window is None else int(parse_duration(window))
    quota_bytes = None if quota is None else parse_size(quota)
    serving: dict[str, Any] = {
        "iscsi_listen": iscsi_listen,
        "iscsi_block_bytes": iscsi_block,
        "iscsi_admit": None if iscsi_admit is None else tuple(iscsi_admit),
        "iscsi_auth": None if iscsi_auth is None else str(Path(iscsi_auth).absolute()),
        "vhost_block_bytes": vhost_block,
    }
    served = {name: value for name, value in serving.items() if value is not None}
    if not (disk or to or key) and (window_s, quota_bytes) != (None, None):
        _keep(site, group, window_s, quota_bytes, as_json)
        return
    if not (disk or to or key) and fronts:
        definition = site.set_fronts(group, fronts, **served)
        _emit_disks(site, group, definition, f"{group}: a VM finds its disks at", as_json)
        return
    if disk and not (to or key or beside) and site.lanes_of(group):
        definition = site.add_disks(group, parse_disks(disk), fronts=fronts, lanes=max(1, lanes))
        if wait:
            _wait(site, group, as_json)
        text = f"{group} has further disks; a VM finds its disks at"
        _emit_disks(site, group, definition, text, as_json)
        return
    if not (disk and to and key):
        raise UsageError("protect: a new group needs --disk, --to and --key")
    changes: dict[str, Any] = {
        "window_s": window_s,
        "quota_bytes": quota_bytes,
        "ring_bytes": None if ring is None else parse_size(ring),
        "rate_bytes_per_s": None if rate is None else parse_size(rate),
        "compression": compression,
        "direct": direct or None,
        "tcp": tcp,
        "socket_mode": None if socket_mode is None else _mode(socket_mode),
        "socket_group": socket_group,
        "on_fence": on_fence,
    }
    options = site.group_options(**served, **{k: v for k, v in changes.items() if v is not None})
    definition = site.protect(
        group,
        parse_disks(disk),
        to=to,
        key=key,
        accept_key_loss=accept_key_loss,
        options=options,
        fronts=fronts,
        lanes=lanes,
        beside=beside,
    )
    if wait:
        _wait(site, group, as_json)
    last = "" if wait or site.running() else "nothing is replicated until 'vrep run' runs here"
    text = f"{group} is protected; a VM finds its disks at"
    _emit_disks(site, group, definition, text, as_json, last)


def _emit_disks(
    site: Site,
    group: str,
    definition: GroupDefinition,
    text: str,
    as_json: bool,
    last: str = "",
) -> None:
    """Say where a VM finds the disks of a group."""
    names = [disk.name for lane in site.lanes_of(group) for disk in site.groups.load(lane).disks]
    uris = {name: site.disk_uri(group, name) for name in names}
    lines = [text, *(f"  {name}: {uri}" for name, uri in uris.items()), *([last] if last else [])]
    answer = {"group": group, "group_id": definition.group_id, "disks": uris}
    emit(answer, as_json, "\n".join(lines))


def _keep(
    site: Site, group: str, window_s: int | None, quota_bytes: int | None, as_json: bool
) -> None:
    """Change what the target keeps of a group."""
    problem = site.keep(group, window_s=window_s, quota_bytes=quota_bytes)
    options = site.options_of(group)
    text = f"{group}: the target keeps "
    text += f"{options.window_s} s of history" if options.window_s else "all history"
    text += f" in at most {size_text(options.quota_bytes)}" if options.quota_bytes else ""
    if problem:
        text += f"\nthe target was not told, and learns it with what is shipped next: {problem}"
    answer = {
        "group": group,
        "window_s": options.window_s,
        "quota_bytes": options.quota_bytes,
        "target_not_told": problem,
    }
    emit(answer, as_json, text)


def _mode(text: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise UsageError(f"--socket-mode {text}: write three octal digits, as in 0660")
    return mode


def _wait(site: Site, group: str, as_json: bool) -> None:
    """Until a sync has ended; shows its progress."""
    with Progress(f"sync of {group}", as_json) as progress:
        site.wait_replicating(group, progress=progress)


@app.command("unprotect")
def unprotect(
    group: Group,
    delete_history: Annotated[
        bool, typer.Option("--delete-history", help="What the target holds is deleted as well.")
    ] = False,
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Stop replicating a group. Its disks, and its history at the target, stay; with
    --delete-history at the target's site, the history of a group that was given up goes."""
    problem = site_of(directory).unprotect(group, delete_history=delete_history)
    text = f"{group}: not protected"
    if problem:
        text += f"\nthe target was not told, and goes on to miss this site: {problem}"
    answer = {"group": group, "history_deleted": delete_history, "target_not_told": problem}
    emit(answer, as_json, text)


@app.command("pause")
def pause(group: Group, directory: Directory = None, as_json: Json = False) -> None:
    """Stop shipping; changes stay marked, and the ring may overflow into a gap."""
    site_of(directory).pause(group)
    emit({"group": group, "paused": True}, as_json, f"{group}: paused")


@app.command("resume")
def resume(
    group: Group,
    force: Annotated[
        bool,
        typer.Option("--force", help="Let a guest go on that a move has halted and left so."),
    ] = False,
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Ship again."""
    site_of(directory).resume(group, force=force)
    emit({"group": group, "paused": False}, as_json, f"{group}: ships again")


@app.command("resync")
def resync(
    group: Group,
    wait: Annotated[bool, typer.Option("--wait", help="Until it has ended.")] = False,
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Copy every block again. Points before stay; none is offered while it runs. A paused group
    is copied once it is resumed."""
    site = site_of(directory)
    site.resync(group)
    if wait:
        _wait(site, group, as_json)
    emit({"group": group}, as_json, f"{group}: {'copied again' if wait else 'to be copied again'}")


@app.command("checkpoint")
def checkpoint(
    group: Group,
    label: Annotated[str, typer.Argument(metavar="LABEL", help="Name of the point.")],
    wait: Annotated[
        bool, typer.Option("--wait", help="Until it is durable at the target, at most a minute.")
    ] = False,
    quiesce: Annotated[
        bool,
        typer.Option("--quiesce", help="Freeze the guest's file systems meanwhile, by its agent."),
    ] = False,
    agent: Annotated[
        str,
        typer.Option(
            "--agent",
            metavar="AGENT",
            help="unix:SOCKET or libvirt:NAME; else the attached domain's, or quiesce.agent.",
        ),
    ] = "",
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Name the present instant: after every write that the VM knows to be done. It can be
    recovered once it is durable at the target."""
    wait_s = CHECKPOINT_WAIT_S if wait else 0.0
    mark = site_of(directory).checkpoint(group, label, wait_s=wait_s, quiesce=quiesce, agent=agent)
    where = mark.get("point") or f"position {mark['seq']}"
    text = f"{label}: {where}, {time_text(mark['wall_ns'])}"
    if mark.get("absent"):
        text += f"; without lane {', '.join(map(str, mark['absent']))}"
    if not mark["durable"]:
        text += "; not durable at the target yet"
    if quiesce:
        text += "; the guest's file systems were frozen"
    emit({"group": group, "label": label, **mark}, as_json, text)


__all__ = ["app", "parse_disks"]
