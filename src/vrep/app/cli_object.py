"""Objects: small blobs that travel with a group, such as its VM's definition."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from vrep.app.cli_common import At, Directory, Group, Json, site_of
from vrep.app.cli_output import emit
from vrep.errors import ExistsError, InvalidError, StorageError
from vrep.objects import OBJECT_BYTES_MAX

app = typer.Typer()
object_ = typer.Typer(no_args_is_help=True, help="Small blobs that travel with a group.")
app.add_typer(object_, name="object")

WAIT_S = 60.0
Name = Annotated[str, typer.Argument(metavar="NAME", help="Of the object.")]


@object_.command("put")
def put(
    group: Group,
    name: Name,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What it holds; -: the input.")],
    wait: Annotated[
        bool, typer.Option("--wait", help="Until the target holds it, at most a minute.")
    ] = False,
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Keep a blob beside the disks, as a new version from now on."""
    try:
        with sys.stdin.buffer if str(file) == "-" else file.open("rb") as source:
            data = source.read(OBJECT_BYTES_MAX + 1)
    except OSError as error:
        raise InvalidError(f"{file}: {error.strerror or error}") from None
    done = site_of(directory).object_put(group, name, data, wait_s=WAIT_S if wait else 0.0)
    text = f"{name}: {done['bytes']} bytes"
    text += "" if done["durable"] else "; not durable at the target yet"
    emit({"group": group, **done}, as_json, text)


@object_.command("list")
def list_(
    group: Group, at: At = "latest", directory: Directory = None, as_json: Json = False
) -> None:
    """What is kept, at a point; at the source, what was put last."""
    found = site_of(directory).objects(group, at)
    lines = [
        f"{one['name']}: {one['bytes']} bytes, {one['time']}"
        + ("" if one.get("durable", True) else ", not durable at the target yet")
        for one in found
    ]
    emit({"group": group, "objects": found}, as_json, "\n".join(lines) or "no objects")


@object_.command("get")
def get(
    group: Group,
    name: Name,
    at: At = "latest",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="A new file; else the output.")
    ] = None,
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """The blob as it was at a point, at the site that holds the history."""
    data = site_of(directory).object_get(group, name, at)
    if out is None and not as_json:
        sys.stdout.buffer.write(data)
        return
    path = out or Path(name)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
    except FileExistsError:
        raise ExistsError(f"{path} is there already") from None
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}") from None
    answer = {"group": group, "name": name, "bytes": len(data), "path": str(path)}
    emit(answer, as_json, f"{path}: {len(data)} bytes")


__all__ = ["app"]
