"""`vrep verify`: prove that a recovery point recovers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import typer

from vrep.app.cli_common import At, Directory, Group, Json, parse_duration, site_of
from vrep.app.cli_output import Progress, emit, size_text, table

if TYPE_CHECKING:
    from vrep.recovery.verify import VerifyReport

app = typer.Typer()

EXIT_CODES: Final = {"good": 0, "intact": 1, "bad": 2}


@app.command("verify")
def verify(
    group: Group,
    at: At = "latest",
    samples: Annotated[
        int, typer.Option("--samples", min=0, max=100, help="Other points to rebuild as well.")
    ] = 1,
    file_systems: Annotated[
        bool, typer.Option("--fsck/--no-fsck", help="e2fsck on every ext file system.")
    ] = True,
    command: Annotated[
        str,
        typer.Option("--command", metavar="COMMAND", help="Run by the shell on a view; 0 is good."),
    ] = "",
    limit: Annotated[
        str, typer.Option("--limit", metavar="TIME", help="Of each e2fsck, and of the command.")
    ] = "1h",
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Read the whole store, rebuild the point and samples, check its file systems on a view, and
    keep a signed verdict. Exits with 0 (good), 1 (intact: the objects are whole, but the key is not
    held here, so nothing was opened) or 2 (bad). The command finds VREP_GROUP, VREP_POINT,
    VREP_DISKS, and the NBD address of each disk in VREP_URI_NAME."""
    from vrep.recovery.verify import VerifyOptions

    options = VerifyOptions(
        samples=samples,
        file_systems=file_systems,
        command=command,
        limit_s=parse_duration(limit),
    )
    with Progress("verifying", as_json) as progress:
        report = site_of(directory).verify(group, at, options=options, progress=progress.step)
    emit(report, as_json, lambda: report_text(report))
    raise typer.Exit(EXIT_CODES[report.result])


def report_text(report: VerifyReport) -> str:
    """The verdicts, and what was looked at."""
    rows = [(v.time or "-", v.point, v.state) for v in report.verdicts]
    lines = [table(("TIME", "POINT", "VERDICT"), rows)]
    for verdict in report.verdicts:
        for check in verdict.checks:
            where = f" of {check.disk}" if check.disk else ""
            lines.append(f"{verdict.point}: {check.what}{where}: {check.result}: {check.text}")
        lines += [
            f"{verdict.point}: {d.object}{_extent(d.first, d.last)}: {d.text}"
            for d in verdict.damages
        ]
        if verdict.state in ("void", "damaged"):
            lines.append(f"{verdict.point}: {verdict.text}")
    counts = ", ".join(f"{count} {kind}" for kind, count in report.objects.items())
    lines.append(
        f"{report.group}: {counts}, {report.records} records, {report.tallies} tallies; "
        f"{size_text(report.bytes)} in {report.seconds:.1f} s"
    )
    if report.folded_to:
        lines.append(f"what was left out of the history up to {report.folded_to} is not proven")
    if report.note:
        lines.append(report.note)
    return "\n".join(lines)


def _extent(first: str, last: str) -> str:
    """The positions that a damaged object holds."""
    if not first and not last:
        return ""
    return f" ({first or 'the start'} to {last or 'the end'})"


__all__ = ["app", "report_text"]
