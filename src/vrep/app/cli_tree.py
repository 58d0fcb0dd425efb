"""The tree of commands, built as far as a command line needs it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Final

import typer
from typer.exceptions import TyperException

from vrep.errors import UsageError

INTERRUPTED: Final = 130

# Top-level command -> the module that registers it, in the order of the help.
COMMANDS: Final = {
    "site": "cli_site",
    "run": "cli_run",
    "service": "cli_service",
    "key": "cli_key",
    "protect": "cli_group",
    "unprotect": "cli_group",
    "attach": "cli_vm",
    "detach": "cli_vm",
    "pause": "cli_group",
    "resume": "cli_group",
    "resync": "cli_group",
    "resize": "cli_vm",
    "object": "cli_object",
    "status": "cli_status",
    "checkpoint": "cli_group",
    "points": "cli_recover",
    "changes": "cli_recover",
    "test": "cli_recover",
    "failover": "cli_recover",
    "move": "cli_recover",
    "reverse": "cli_recover",
    "failback": "cli_recover",
    "export": "cli_recover",
    "verify": "cli_verify",
    "repair": "cli_repair",
    "demo": "cli_run",
}


def _about(
    version: bool = typer.Option(False, "--version", help="Print the version and end."),
) -> None:
    if version:
        import vrep

        print(f"vrep {vrep.__version__}")
        raise typer.Exit


def build(only: str | None = None) -> typer.Typer:
    """The application with one top-level command, or (None) with all of them."""
    app = typer.Typer(
        name="vrep",
        help="Continuous replication of virtual machine disks, with recovery at any write.",
        add_completion=only is None,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback(invoke_without_command=True)(_about)
    order = list(COMMANDS)
    wanted = [only] if only is not None else order
    for module_name in dict.fromkeys(COMMANDS[name] for name in wanted):
        part: typer.Typer = importlib.import_module(f"vrep.app.{module_name}").app
        app.registered_commands += [c for c in part.registered_commands if c.name in wanted]
        app.registered_groups += [g for g in part.registered_groups if g.name in wanted]
    app.registered_commands.sort(key=lambda command: order.index(str(command.name)))
    app.registered_groups.sort(key=lambda group: order.index(str(group.name)))
    return app


def _usage(error: TyperException) -> UsageError:
    """What the parser refused, and where to read more."""
    text = error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)
    if context is not None:
        text += f". Try: {context.command_path} --help"
    return UsageError(text)


def invoke(arguments: Sequence[str]) -> int:
    """Run one command line; its exit code."""
    only = arguments[0] if arguments and arguments[0] in COMMANDS else None
    try:
        code = build(only)(list(arguments), prog_name="vrep", standalone_mode=False)
    except typer.Abort:
        return INTERRUPTED
    except TyperException as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # it carries the help itself
            print(error.format_message(), file=sys.stderr)
            return UsageError.exit_code
        raise _usage(error) from None
    return code if isinstance(code, int) else 0


__all__ = ["COMMANDS", "build", "invoke"]
