"""Repair of a damaged store."""

from __future__ import annotations

from typing import Annotated

import typer

from vrep.app.cli_common import Directory, Group, Json, site_of
from vrep.app.cli_output import emit, size_text
from vrep.errors import CorruptError

app = typer.Typer()


@app.command("repair")
def repair(
    group: Group,
    resend: Annotated[
        bool,
        typer.Option(
            "--resend",
            help="Keep what is sound before and behind a loss: the source sends what differs.",
        ),
    ] = False,
    start_over: Annotated[
        bool,
        typer.Option(
            "--start-over",
            help="Set a store whose records are lost aside: the source sends everything again.",
        ),
    ] = False,
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Make indexes and manifest of a damaged history again, while the target does not run; names
    what is lost."""
    report = site_of(directory).repair(group, resend=resend, start_over=start_over)
    lines = [f"repaired: {name}" for name in report.repaired]
    lines += [
        f"lost: {each.object}"
        + (f", {each.first or '?'} to {each.last or '?'}" if each.first or each.last else "")
        + f": {each.text}"
        for each in report.lost
    ]
    if report.kept_to or report.salvaged_bytes:
        points = f"all points up to {report.kept_to}" if report.kept_to else "no point"
        lines += [
            f"kept: {points}, and {size_text(report.salvaged_bytes)} behind the loss to compare "
            f"with; the damaged files are at {report.set_aside}",
            "no later point recovers before the source has sent again what differs; it compares "
            + ("all of its disks" if (size := report.compared_bytes) is None else size_text(size)),
        ]
    elif report.set_aside:
        lines.append(f"the store is at {report.set_aside}; the source sends everything again")
    emit(report, as_json, "\n".join(lines) or f"{group}: nothing is damaged")
    if report.lost and not report.set_aside:
        # Without a manifest nothing tells what is sound.
        keeps = "--resend keeps what is sound, and the source sends what differs; "
        keeps = "" if any(each.object == "manifest" for each in report.lost) else keeps
        raise CorruptError(
            f"{len(report.lost)} file(s) of {group!r} are lost, and nothing was changed: {keeps}"
            "--start-over sets the store aside, and the source sends everything again"
        )


__all__ = ["app"]
