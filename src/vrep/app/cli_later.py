"""Verbs that are not built in this release: each says so and why, with its own exit code."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from vrep.errors import NotYetError

app = typer.Typer()

ANY: Final = {"allow_extra_args": True, "ignore_unknown_options": True}
Rest = Annotated[list[str] | None, typer.Argument(metavar="...")]

REVERSE: Final = "protection in the opposite direction is not built in this release"


@app.command("move", context_settings=ANY)
def move(rest: Rest = None) -> None:
    """Planned failover: nothing lost (not yet)."""
    raise NotYetError(
        "move: stopping the VM and its last write in step is not built in this release; "
        "stop the VM, wait for an RPO of 0, then use failover start"
    )


@app.command("failback", context_settings=ANY)
def failback(rest: Rest = None) -> None:
    """Return to the old site (not yet)."""
    raise NotYetError(f"failback: {REVERSE}")
