"""`vrep run`, the site's processes in the foreground, and `vrep demo`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from vrep.app.cli_common import Directory, Json, site_of
from vrep.errors import ConfigError, UsageError, VrepError

if TYPE_CHECKING:
    from vrep.paths import SitePaths
    from vrep.settings import VerifyConfig

app = typer.Typer()

VIEWS_EVERY_S: Final = 2.0


@app.command("run")
def run(
    role: Annotated[
        str, typer.Option("--role", metavar="ROLE", help="all, filter, source or target.")
    ] = "all",
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Everything that the site runs, until SIGTERM or Ctrl-C."""
    import structlog

    from vrep.app.log import setup_logs
    from vrep.app.run import ROLES, Supervisor
    from vrep.hypervisor.keeper import Keeper
    from vrep.settings import Config

    if role != "all" and role not in ROLES:
        raise UsageError(f"--role {role}: write all, {', '.join(ROLES[:-1])} or {ROLES[-1]}")
    site = site_of(directory)
    roles = ROLES if role == "all" else (role,)
    identity = site.identity  # a directory that is no site is refused before anything starts
    problem = ""
    try:
        config = site.config
    except ConfigError as error:
        if "filter" not in roles or not list(site.groups.names()):
            raise
        # VMs need their disks: the roles say that they cannot start, and the filter's is replaced.
        config, problem = Config(), str(error)
    setup_logs(config.log, "site")
    if problem:
        structlog.get_logger("vrep.run").error("settings cannot be read", error=problem)

    stopping = threading.Event()
    verifier: threading.Thread | None = None
    if "target" in roles and config.verify.every_h:
        verifier = threading.Thread(
            target=_keep_verifying, args=(site.paths, config.verify, stopping)
        )

    @contextlib.contextmanager
    def beside() -> Iterator[None]:
        structlog.get_logger("vrep.run").info("site runs", name=identity.name, roles=role)
        if "target" in roles:
            # A recovered VM's disk waits for nothing that replicates.
            threading.Thread(target=_keep_views, args=(site.paths, stopping), daemon=True).start()
        if "filter" in roles:
            threading.Thread(target=Keeper(site.paths).run, args=(stopping,), daemon=True).start()
        if verifier is not None:
            verifier.start()
        if not config.metrics.listen or roles == ("filter",):
            yield  # the filter talks to no network
            return
        from vrep.app.metrics import MetricsServer, serve_when_free

        if role != "all":  # source and target run apart: whoever comes first serves
            serve = partial(serve_when_free, site, config.metrics.listen, stopping)
            threading.Thread(target=serve, daemon=True).start()
            yield
            return
        with MetricsServer(site, config.metrics.listen):
            yield

    try:
        raise typer.Exit(Supervisor(site.paths, roles).run(beside))
    finally:
        stopping.set()
        if verifier is not None and verifier.is_alive():
            verifier.join()  # a verification that runs takes its view down


def _keep_views(paths: SitePaths, stopping: threading.Event) -> None:
    """Serve recovered disks again after their processes, or this host, went down."""
    import structlog

    from vrep.recovery.keeper import ViewKeeper

    log = structlog.get_logger("vrep.run")
    keeper = ViewKeeper(paths)
    while True:
        try:
            for problem in keeper.tend():
                log.error("view not served again", reason=problem)
        except (VrepError, OSError) as error:
            log.error("views not served again", error=str(error))
        if stopping.wait(VIEWS_EVERY_S):
            return


def _keep_verifying(paths: SitePaths, config: VerifyConfig, stopping: threading.Event) -> None:
    """Verify the groups that are held here on a schedule."""
    from vrep.recovery.schedule import VerifySchedule

    VerifySchedule(paths, config).run(stopping)


@app.command("demo")
def demo(
    guest: Annotated[
        str, typer.Option("--guest", metavar="qemu|none", help="none: an NBD client instead.")
    ] = "qemu",
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="Where the figures go (JSON).")
    ] = Path("build/demo.json"),
    keep: Annotated[bool, typer.Option("--keep", help="Keep the sites and the disks.")] = False,
) -> None:
    """Replicate a real guest, kill its site, recover it at the other."""
    if guest not in ("qemu", "none"):
        raise UsageError(f"--guest {guest}: write qemu or none")
    from vrep.app.demo import main

    raise typer.Exit(main(guest, out=str(out), keep=keep))


__all__ = ["app"]
