"""`vrep site`: this site and those it trusts."""

from __future__ import annotations

from typing import Annotated

import typer

from vrep.app.cli_common import Directory, Json, parse_duration, site_of
from vrep.app.cli_output import emit, plain, table

app = typer.Typer()
site = typer.Typer(no_args_is_help=True, help="This site, and the sites that it trusts.")
app.add_typer(site, name="site")


@site.command("init")
def init(
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="How other sites call it.")],
    listen: Annotated[
        str,
        typer.Option(
            "--listen",
            metavar="HOST:PORT",
            help="Where other sites connect; without it this site receives nothing.",
        ),
    ] = "",
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Make a new site: its directory and its identity."""
    from vrep.paths import SitePaths
    from vrep.site import Site

    SitePaths.of(directory).check_user()
    made = Site.init(directory, name=name, listen=listen)
    identity = made.identity
    answer = {
        "name": identity.name,
        "site_id": identity.site_id,
        "fingerprint": identity.fingerprint,
        "dir": str(made.paths.root),
        "listen": listen,
    }
    emit(answer, as_json, f"site {identity.name} in {made.paths.root}")


@site.command("invite")
def invite(
    lifetime: Annotated[
        str, typer.Option("--lifetime", metavar="TIME", help="How long the token is good.")
    ] = "24h",
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Print a token with which one other site may join, once."""
    seconds = int(parse_duration(lifetime))
    token = site_of(directory).invite(lifetime_s=seconds)
    emit({"token": token, "lifetime_s": seconds}, as_json, token)


@site.command("join")
def join(
    token: Annotated[str, typer.Argument(metavar="TOKEN", help="What `vrep site invite` said.")],
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Join the site that gave an invitation; both trust each other from then on."""
    peer = site_of(directory).join(token)
    emit(_shown(peer), as_json, f"joined {peer.name} at {peer.address}")


@site.command("list")
def list_(directory: Directory = None, as_json: Json = False) -> None:
    """The sites that this one trusts."""
    here = site_of(directory)
    identity = here.identity
    peers = here.peers.list()
    answer = {
        "site": {
            "name": identity.name,
            "site_id": identity.site_id,
            "fingerprint": identity.fingerprint,
        },
        "peers": [_shown(peer) for peer in peers],
    }
    rows = [(f"{identity.name} (this site)", "", identity.fingerprint[:16])]
    rows += [(peer.name, peer.address or "-", peer.fingerprint[:16]) for peer in peers]
    emit(answer, as_json, table(("SITE", "ADDRESS", "FINGERPRINT"), rows))


@site.command("remove")
def remove(
    name: Annotated[str, typer.Argument(metavar="SITE", help="Its name or id.")],
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Stop trusting a site."""
    peer = site_of(directory).remove_peer(name)
    emit(_shown(peer), as_json, f"{peer.name} is not trusted any more")


def _shown(peer: object) -> dict[str, object]:
    return {k: v for k, v in plain(peer).items() if k not in ("version", "certificate")}
