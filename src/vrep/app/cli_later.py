"""Verbs that are not built in this release: each says so and why, with its own exit code."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from vrep.errors import NotYetError

app = typer.Typer()

ANY: Final = {"allow_extra_args": True, "ignore_unknown_options": True}
Rest = Annotated[list[str] | None, typer.Argument(metavar="...")]

REVERSE: Final = "protection in the opposite direction is not built in this release"


@app.command("failback", context_settings=ANY)
def failback(rest: Rest = None) -> None:
    """Return to the old site (not yet)."""
    raise NotYetError(f"failback: {REVERSE}")
