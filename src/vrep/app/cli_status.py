"""`vrep status`: how groups are, once, live, or as a verdict for a monitor."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from vrep.advice import advice
from vrep.app.cli_common import Directory, Json, site_of
from vrep.app.cli_output import age_text, emit, print_json, size_text, table

if TYPE_CHECKING:
    from vrep.site import Site

app = typer.Typer()

HEADINGS: Final = (
    "GROUP",
    "STATE",
    "CONDITIONS",
    "WITH",
    "RPO",
    "LAG",
    "DIRTY",
    "CLIENTS",
    "HELD",
    "NEWEST POINT",
    "VERIFIED",
)
WATCH_EVERY_S: Final = 0.5


def _newest(known: Mapping[str, Any]) -> str:
    """The newest recovery point: its time, which reads as a POINT, or its position."""
    point = known.get("newest_point")
    return str(point["time"] or point["point"]) if point else "-"


def _verified(group: Mapping[str, Any]) -> str:
    """The newest verdict of a verification, and when it was made."""
    found = group.get("verdict")
    if not found:
        return "-"
    return f"{found['state']}, {found['made'][:16]}Z" if found["made"] else str(found["state"])


def _known(value: int | None, text: Callable[[int], str]) -> str:
    """A figure; a dash when nobody knows it, since who would does not answer."""
    return "-" if value is None else text(value)


def row(name: str, group: Mapping[str, Any]) -> tuple[str, ...]:
    """One group as cells of a table."""
    conditions = ", ".join(group["conditions"]) or "-"
    state = str(group["state"])
    if group["role"] != "source":
        return (
            name,
            f"{state} (held here)",
            conditions,
            str(group.get("source", {}).get("site") or "-"),
            *("-",) * 4,
            f"to pos:{group['durable']}" if "durable" in group else "-",
            _newest(group),
            _verified(group),
        )
    clients = _known(group["clients"], str)
    if not group["targets"]:  # its definition cannot be read
        return (name, state, conditions, *("-",) * 4, clients, *("-",) * 3)
    target = group["targets"][0]
    if state in ("initial-sync", "resync") and target["total_bytes"]:
        done = 100 - 100 * target["unshipped_bytes"] / target["total_bytes"]
        state = f"{state} {done:.0f} %"
    if target.get("whole_in_s"):
        state = f"{state}, whole in {age_text(target['whole_in_s'] * 1000)}"
    return (
        name,
        state,
        conditions,
        str(target["site"]),
        _known(target["rpo_ms"], age_text),
        _known(target["lag_bytes"], size_text),
        _known(target["dirty_bytes"], size_text),
        clients,
        _known(target["durable_seq"], lambda seq: f"to seq {seq}"),
        _newest(target),
        "-",
    )


def text_of(status: Mapping[str, Any]) -> str:
    """The status for a terminal."""
    down = [role for role, runs in status["roles"].items() if not runs]
    rows = [row(name, group) for name, group in status["groups"].items()]
    lines = [f"site {status['site']['name']}"]
    if down:
        lines[0] += f"; not running here, or hanging: {', '.join(down)}"
    lines.append(table(HEADINGS, rows, "no group is protected or held here"))
    for name, group in status["groups"].items():
        if group.get("error"):
            lines.append(f"{name}: {group['error']}")
        verdict = group.get("verdict")
        if verdict and verdict["text"] and verdict["state"] != "good":
            lines.append(f"{name}: {verdict['point']}: {verdict['state']}: {verdict['text']}")
        if group.get("unverified"):
            lines.append(f"{name}: unverified: {group['unverified']}")
        lines += [f"{name}: {code}: {text}" for code, text in advice(name, group)]
    return "\n".join(lines)


def _watch(site: Site, group: str | None, as_json: bool) -> None:
    """Show the status until interrupted: a live table, or a JSON document a line."""
    if as_json:
        import msgspec

        while True:
            print(msgspec.json.encode(site.status(group)).decode(), flush=True)
            time.sleep(WATCH_EVERY_S)
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(), auto_refresh=False, transient=False) as live:
        while True:
            live.update(Text(text_of(site.status(group))), refresh=True)
            time.sleep(WATCH_EVERY_S)


@app.command("status")
def status(
    group: Annotated[str | None, typer.Argument(metavar="[GROUP]", help="Only this one.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Until interrupted.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 0 (well), 1 (warning) or 2 (critical).")
    ] = False,
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """State, conditions, RPO and lag of each group."""
    site = site_of(directory)
    if watch:
        _watch(site, group, as_json)
    answer = site.status(group)
    if not check:
        emit(answer, as_json, lambda: text_of(answer))
        return
    code, reasons = site.verdict(answer)
    word = ("well", "warning", "critical")[code]
    if as_json:
        print_json({"verdict": word, "exit_code": code, "reasons": reasons, "status": answer})
    else:
        print(f"{word}: {'; '.join(reasons)}" if reasons else word)
    raise typer.Exit(code)


__all__ = ["app", "row", "text_of"]
