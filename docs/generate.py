"""Pages of the reference that are written by the code itself: commands, settings.

Run by Sphinx before it looks for pages. They are not kept in the repository.
"""

from __future__ import annotations

import ast
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import typer

from vrep import settings
from vrep.app import cli_tree

WIDTH = 92
CLI_HEAD = """\
# Commands

Every command takes `--dir DIR` (else `VREP_DIR`, else `/var/lib/vrep`) and `--json`: then its
answer on standard output, and an error on standard error, is one JSON document. Progress is
shown on a terminal only. What an exit code means stands in [errors](errors.md).

A POINT is `latest`, the label of a checkpoint, an RFC 3339 time, a time before now as in
`-5m`, or `pos:EPOCH/LANE/SEQ`. Times are those of the source's host; when its clock jumped
back, a time may fit several points, and they are listed. Sizes are bytes, or a number with K,
M, G, T (powers of 1024); times seconds, or a number with s, m, h, d, w.
"""
CONFIG_HEAD = """\
# Settings

`config.toml` in a site's directory, read when `vrep run` starts, and by the commands that a
setting concerns. Every setting has the default below; an unknown one is an error. Sizes are
bytes, rates bytes a second, times seconds.
"""


def leaves(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command of the tree with its words, in the order of the help."""
    below = getattr(command, "commands", None)
    if below is None:
        yield words, command
        return
    for name, child in below.items():
        yield from leaves(child, (*words, name))


def cli_page() -> str:
    """Help of every command."""
    lines = [CLI_HEAD]
    tree = typer.main.get_command(cli_tree.build())
    order = list(cli_tree.COMMANDS)
    for words, command in sorted(leaves(tree), key=lambda leaf: order.index(leaf[0][0])):
        name = " ".join(("vrep", *words))
        context = command.context_class(command, info_name=name, terminal_width=WIDTH)
        lines += [f"## {name}", "", "```text", command.get_help(context).rstrip(), "```", ""]
    return "\n".join(lines)


def documented_fields(source: ast.ClassDef) -> dict[str, str]:
    """The docstring under each field of a class."""
    found = {}
    for field, text in zip(source.body, source.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            found[field.target.id] = str(text.value.value)
    return found


def type_text(hint: Any) -> str:
    """A type for people, with its bounds."""
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(typing.get_args(hint))
    base, meta = hint, msgspec.Meta()
    if typing.get_origin(hint) is typing.Annotated:
        base, meta = typing.get_args(hint)
    name = {str: "text", int: "integer", float: "number", bool: "true or false"}[base]
    if meta.pattern is not None:
        return "octal text"
    if meta.ge is not None:
        name += f", at least {meta.ge}"
    if meta.gt is not None:
        name += f", above {meta.gt}"
    return name if meta.le is None else f"{name}, at most {meta.le}"


def config_page() -> str:
    """Every setting with its default."""
    module = ast.parse(Path(settings.__file__).read_text())
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
    defaults = settings.Config()
    lines = [CONFIG_HEAD]
    for section in msgspec.structs.fields(settings.Config):
        value = getattr(defaults, section.name)
        node = classes[type(value).__name__]
        lines += [f"## [{section.name}]", "", str(ast.get_docstring(node)), ""]
        lines += ["| setting | type | default | meaning |", "|---|---|---|---|"]
        documented = documented_fields(node)
        hints = typing.get_type_hints(type(value), include_extras=True)
        for field in msgspec.structs.fields(value):
            kind = type_text(hints[field.name])
            default = msgspec.json.encode(getattr(value, field.name)).decode()
            lines.append(f"| `{field.name}` | {kind} | `{default}` | {documented[field.name]} |")
        lines.append("")
    return "\n".join(lines)


def write_pages(docs: Path) -> None:
    """Write the pages, only when they changed: Sphinx goes by their times."""
    for name, text in (("cli", cli_page()), ("config", config_page())):
        path = docs / "reference" / f"{name}.md"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


__all__ = ["write_pages"]
