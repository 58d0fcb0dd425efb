"""`vrep key`: tenant keys, without which nothing that was replicated can be read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vrep.app.cli_common import Directory, Json, parse_duration, site_of
from vrep.app.cli_output import emit, table
from vrep.errors import UsageError

if TYPE_CHECKING:
    from vrep.rotate import Rotation

app = typer.Typer()
key = typer.Typer(no_args_is_help=True, help="Tenant keys: they open what was replicated.")
app.add_typer(key, name="key")

Name = Annotated[str, typer.Argument(metavar="NAME", help="A tenant key.")]
PassphraseFile = Annotated[
    Path | None,
    typer.Option("--passphrase-file", metavar="FILE", help="Its first line is the passphrase."),
]
Ask = Annotated[bool, typer.Option("--passphrase", help="Ask for a passphrase.")]


def _passphrase(ask: bool, file: Path | None, *, confirm: bool) -> str | None:
    if file is not None:
        try:
            lines = file.read_text("utf-8").splitlines()
        except UnicodeError:
            raise UsageError(f"{file}: a passphrase is UTF-8 text") from None
        if not lines or not lines[0]:
            raise UsageError(f"{file}: its first line, the passphrase, is empty")
        return lines[0]
    if ask:
        entered: str = typer.prompt(
            "Passphrase", hide_input=True, confirmation_prompt=confirm, err=True
        )
        return entered
    return None


@key.command("create")
def create(name: Name, directory: Directory = None, as_json: Json = False) -> None:
    """Make a tenant key. Export it, and verify the export, before disks depend on it."""
    info = site_of(directory).key_create(name)
    hint = f"now keep a copy elsewhere: vrep key export {name} --out FILE; vrep key verify"
    emit(info, as_json, f"key {info.name} ({info.key_id})\n{hint} {name} FILE")


@key.command("list")
def list_(directory: Directory = None, as_json: Json = False) -> None:
    """The keys that this site holds."""
    keys = site_of(directory).keys.list()
    rows = [
        (
            k.name,
            k.key_id,
            str(k.generation) if k.state == "current" else f"{k.generation} ({k.state})",
            k.origin,
            k.verified.isoformat(timespec="seconds") if k.verified else "no",
        )
        for k in keys
    ]
    text = table(
        ("KEY", "ID", "GENERATION", "ORIGIN", "EXPORT VERIFIED"), rows, "no key is held here"
    )
    emit({"keys": keys}, as_json, text)


@key.command("export")
def export(
    name: Name,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="A new file.")],
    passphrase: Ask = False,
    passphrase_file: PassphraseFile = None,
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Write a key to a file. Without a passphrase the file itself opens everything."""
    secret = _passphrase(passphrase, passphrase_file, confirm=True)
    site_of(directory).key_export(name, out, secret)
    emit({"name": name, "file": str(out), "sealed": secret is not None}, as_json, str(out))


@key.command("verify")
def verify(
    name: Name,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `vrep key export` wrote.")],
    passphrase: Ask = False,
    passphrase_file: PassphraseFile = None,
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Read an export back and compare it with the key held here."""
    secret = _passphrase(passphrase, passphrase_file, confirm=False)
    info = site_of(directory).key_verify(name, file, secret)
    emit(info, as_json, f"{file} holds key {info.name} ({info.key_id})")


@key.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An export or a release.")],
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Keep it under another name.")
    ] = None,
    passphrase: Ask = False,
    passphrase_file: PassphraseFile = None,
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Take in a key: exported, or released to this site."""
    secret = _passphrase(passphrase, passphrase_file, confirm=False)
    info = site_of(directory).key_import(file, name=name, passphrase=secret)
    emit(info, as_json, f"key {info.name} ({info.key_id})")


@key.command("release")
def release(
    name: Name,
    to: Annotated[str, typer.Option("--to", metavar="SITE", help="Only this site can open it.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to write it.")],
    reason: Annotated[str, typer.Option("--reason", help="For the log of releases.")] = "",
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Wrap a key for a site that recovers; the release is logged."""
    site_of(directory).key_release(name, to, out, reason=reason)
    emit({"name": name, "to": to, "file": str(out)}, as_json, str(out))


@key.command("releases")
def releases(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Only of this key.")] = None,
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """The log of releases of this site: which key went to whom, when and why. A line that was
    changed or taken away is an error."""
    entries = site_of(directory).key_releases(name)
    rows = [
        (
            e.time.isoformat(timespec="seconds"),
            e.key_name,
            e.key_id,
            e.recipient,
            e.recipient_fingerprint[:16],
            e.reason or "-",
        )
        for e in entries
    ]
    headings = ("TIME", "KEY", "ID", "TO", "FINGERPRINT", "REASON")
    emit({"releases": entries}, as_json, table(headings, rows, "no key was released here"))


@key.command("rotate")
def rotate(
    name: Name,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Make the new generation, export it there."),
    ] = None,
    passphrase: Ask = False,
    passphrase_file: PassphraseFile = None,
    accept_key_loss: Annotated[
        bool,
        typer.Option("--accept-key-loss", help="Do not ask for a verified export of the new one."),
    ] = False,
    wait: Annotated[
        str, typer.Option("--wait", metavar="TIME", help="For the targets to be told.")
    ] = "30s",
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Wrap the data keys of all groups under a new generation of a key; nothing is sent again.
    First with --out; then `vrep key verify NAME FILE`; then without --out. What was cut off goes on
    when the command is given again. Exits with 1 while a target was not told."""
    secret = _passphrase(passphrase, passphrase_file, confirm=True)
    rotation = site_of(directory).key_rotate(
        name,
        out=out,
        passphrase=secret,
        accept_key_loss=accept_key_loss,
        wait_s=parse_duration(wait),
    )
    emit(rotation, as_json, lambda: rotation_text(rotation, out))
    raise typer.Exit(1 if rotation.state == "unfinished" else 0)


def rotation_text(rotation: Rotation, out: Path | None) -> str:
    """Where it stands, and what comes next."""
    key_ = rotation.key
    head = f"key {key_.name}, generation {key_.generation} ({key_.key_id})"
    if rotation.state == "exported":
        return (
            f"{head}: {out}\nnothing uses it yet. Keep the file elsewhere, read it back with\n"
            f"  vrep key verify {key_.name} FILE\nthen: vrep key rotate {key_.name}"
        )
    rows = [
        (each.group, "yes" if each.wrapped else "no", "yes" if each.at_target else "no", each.text)
        for each in rotation.groups
    ]
    headings = ("GROUP", "WRAPPED", "AT ITS TARGET", "")
    return f"{head}: {rotation.state}\n{table(headings, rows, 'no group here is sealed under it')}"


__all__ = ["app"]
