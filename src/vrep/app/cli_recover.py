"""What the site that holds the history does: points, changes, tests, failover, export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vrep.app.cli_common import At, Directory, Group, Json, Since, site_of
from vrep.app.cli_output import Progress, emit
from vrep.app.cli_view import changes_text, export_text, points_text, untaken_text, view_text
from vrep.errors import IntegrityError, UsageError
from vrep.lanes import group_of

if TYPE_CHECKING:
    from vrep.recovery.view import ViewInfo

Pause = Annotated[
    bool, typer.Option("--pause", help="Cut off a VM that uses the disks; its I/O waits.")
]
Wait = Annotated[
    float, typer.Option("--wait", metavar="SECONDS", help="For the last changes to be durable.")
]
Onto = Annotated[
    list[str] | None,
    typer.Option(
        "--onto",
        metavar="NAME=URI",
        help="Fill this file: or block: in place, over what it holds. May be given again.",
    ),
]

app = typer.Typer()
test = typer.Typer(no_args_is_help=True, help="Try a recovery; replication goes on.")
failover = typer.Typer(no_args_is_help=True, help="Take a group over.")
app.add_typer(test, name="test")
app.add_typer(failover, name="failover")


@app.command("points")
def points(group: Group, directory: Directory = None, as_json: Json = False) -> None:
    """What can be recovered, and the gaps where nothing can; checks the whole history."""
    with Progress("checking the history", as_json) as progress:
        found = site_of(directory).points(group, progress=progress)
    emit(found, as_json, lambda: points_text(found))
    if not found.verdict.whole:
        raise IntegrityError(found.verdict.error)


@app.command("changes")
def changes(
    group: Group,
    since: Annotated[
        str, typer.Option("--since", metavar="POINT", help="The one point; as for --at.")
    ],
    at: At = "latest",
    disk: Annotated[
        str | None, typer.Option("--disk", metavar="NAME", help="Of this disk only.")
    ] = None,
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Which bytes may differ between two points; all others are equal."""
    found = site_of(directory).changes(group, since, at, disk=disk)
    emit(found, as_json, lambda: changes_text(found))


@test.command("start")
def start_test(
    group: Group,
    at: At = "latest",
    since: Since = None,
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Serve the disks as they were, at once."""
    view = site_of(directory).test_start(group, at, since=since)
    emit(view, as_json, lambda: view_text(view))


@test.command("list")
def list_tests(directory: Directory = None, as_json: Json = False) -> None:
    """What is served here of recovered disks."""
    views = site_of(directory).tests()
    emit(
        {"views": views},
        as_json,
        lambda: "\n".join(view_text(view) for view in views) or "no view is served here",
    )


@test.command("stop")
def stop_test(group: Group, directory: Directory = None, as_json: Json = False) -> None:
    """End a test, and delete what it wrote."""
    site_of(directory).test_stop(group)
    emit({"group": group}, as_json, f"{group}: the test has ended")


@failover.command("start")
def failover_start(
    group: Group,
    at: At = "latest",
    force: Annotated[
        bool, typer.Option("--force", help="Even while the source is reachable and its VM runs.")
    ] = False,
    since: Since = None,
    onto: Onto = None,
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Serve the disks for good; the old source is refused from here on."""
    places = onto_of(onto)
    view = site_of(directory).failover_start(group, at, force=force, since=since, onto=places)
    emit(view, as_json, lambda: view_text(view))


@failover.command("commit")
def failover_commit(group: Group, directory: Directory = None, as_json: Json = False) -> None:
    """Keep the failover."""
    view = site_of(directory).failover_commit(group)
    emit(view, as_json, lambda: view_text(view))


@failover.command("rollback")
def failover_rollback(group: Group, directory: Directory = None, as_json: Json = False) -> None:
    """Undo the failover: the old source may write again."""
    site_of(directory).failover_rollback(group)
    emit({"group": group}, as_json, f"{group}: rolled back")


@app.command("move")
def move(
    group: Group,
    pause: Pause = False,
    wait: Wait = 120.0,
    onto: Onto = None,
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Take a group over from its source, which lives: nothing is lost."""
    places = onto_of(onto)
    with Progress("checking the history", as_json) as progress:
        view = site_of(directory).move(
            group, pause=pause, wait_s=wait, onto=places, progress=progress
        )
    emit(view, as_json, lambda: view_text(view))


@app.command("reverse")
def reverse(
    group: Group,
    to: Annotated[
        str,
        typer.Option("--to", metavar="SITE", help="To this site, instead of the old ones."),
    ] = "",
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Protect the recovered VM back to its old site, once its failover is committed."""
    site = site_of(directory)
    with Progress("protecting back", as_json) as progress:
        made = site.reverse(group, to=to, progress=progress)
    name = group_of(made.name)
    whole = {lane: site.groups.load(lane).to_site for lane in site.lanes_of(name)}
    text = f"{name}: protected back to {to or 'its old site'}, in epoch {made.epoch}"
    if len(set(whole.values())) > 1:
        text = f"{name}: each lane is protected back to its own site: none has points of all disks"
    emit(
        {"group": name, "epoch": made.epoch, "to_site": made.to_site, "targets": whole},
        as_json,
        text,
    )


@app.command("failback")
def failback(
    group: Group,
    pause: Pause = False,
    wait: Wait = 120.0,
    discard: Annotated[
        bool,
        typer.Option("--discard-untaken", help="Give up what was written here and not taken over."),
    ] = False,
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Return to the old site, here, onto the disks that the group had."""

    def moved(view: ViewInfo) -> None:
        if not as_json:
            print(view_text(view), flush=True)

    with Progress("failback", as_json) as progress:
        made = site_of(directory).failback(
            group,
            pause=pause,
            wait_s=wait,
            discard_untaken=discard,
            moved=moved,
            progress=progress.step,
        )
    emit(
        {"group": group_of(made.name), "epoch": made.epoch, "to_site": made.to_site},
        as_json,
        f"{group_of(made.name)}: is back on its own disks, and protected again, in epoch "
        f"{made.epoch}",
    )


@app.command("export")
def export(
    group: Group,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the files go.")],
    at: At = "latest",
    format_: Annotated[str, typer.Option("--format", metavar="raw|qcow2")] = "raw",
    sha256: Annotated[
        bool, typer.Option("--sha256", help="Hash each file and print the digests.")
    ] = False,
    untaken: Annotated[
        bool,
        typer.Option(
            "--untaken",
            help="At a site that was replaced: its disks as they are, and which extents of them "
            "hold writes that were not taken over.",
        ),
    ] = False,
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Write the disks as they were into files."""
    if untaken:
        if at != "latest" or format_ != "raw" or sha256:
            raise UsageError("--untaken: the disks as they are, raw; no other option goes with it")
        with Progress("export", as_json) as progress:
            left = site_of(directory).export_untaken(group, out, progress=progress.step)
        emit(left, as_json, lambda: untaken_text(left))
        return
    with Progress("export", as_json) as progress:
        result = site_of(directory).export(
            group, out, at=at, format=format_, sha256=sha256, progress=progress.step
        )
    emit(result, as_json, lambda: export_text(result))


def onto_of(words: list[str] | None) -> dict[str, str]:
    """The disks that are filled in place, by name."""
    from vrep.recovery.onto import parse_onto

    return parse_onto(words or [])


__all__ = ["app"]
