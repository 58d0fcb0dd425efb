"""`vrep service`: what is written where, and what systemd and AppArmor make of it."""

from __future__ import annotations

import os
import pwd
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from vrep import errors, service
from vrep.control import ControlServer
from vrep.paths import SitePaths
from vrep.service import ServiceOptions
from vrep.service_units import UnitOptions, apparmor, units
from vrep.settings import load_config
from vrep.site import Site

UNITS = {"vrep-filter.service", "vrep-source.service", "vrep-target.service", "vrep.target"}
ETC = "/etc/systemd/system/"
DEBIAN_ABSTRACTION = "# Site-specific additions\n#include <local/abstractions/libvirt-qemu>\n"
NEWER_ABSTRACTION = "include if exists <abstractions/libvirt-qemu.d>\n"

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="units are installed by root")


@pytest.fixture
def site() -> Iterator[Site]:
    with tempfile.TemporaryDirectory(prefix="vrep-service-") as name:
        yield Site.init(Path(name) / "site", name="west")


@pytest.fixture
def host(tmp_path: Path) -> Path:
    return tmp_path / "host"


def put(host: Path, path: str, text: str) -> Path:
    target = host / path.lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    return target


def sections(text: str) -> dict[str, dict[str, list[str]]]:
    """A unit as systemd reads it, as far as these tests need it."""
    found: dict[str, dict[str, list[str]]] = {}
    for line in text.splitlines():
        if line.startswith("["):
            now = found.setdefault(line.strip("[]"), {})
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            now[key] = value.split()
    return found


def test_a_plan_touches_nothing(site: Site, host: Path) -> None:
    before = sorted(site.paths.root.rglob("*"))
    made = site.service_install(dry_run=True)
    assert {Path(path).name for path in made.files if path.startswith(ETC)} == UNITS
    assert sorted(site.paths.root.rglob("*")) == before
    assert not host.exists()


def verified(directory: Path, texts: Mapping[str, str]) -> str:
    for name, text in texts.items():
        (directory / name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", *(str(directory / name) for name in texts)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return f"{done.stdout}{done.stderr}{done.returncode or ''}"


def test_systemd_accepts_the_units(site: Site, tmp_path: Path) -> None:
    options = ServiceOptions(before=("qemu@web.service",), start=False)
    made = service.plan(site.paths, options)
    texts = {Path(path).name: text for path, text in made.files.items() if path.startswith(ETC)}
    assert verified(tmp_path, texts) == ""
    broken = {"vrep.target": texts["vrep.target"].replace("Wants=", "Want=")}
    assert "Want" in verified(tmp_path, broken)  # it would say so


def test_vms_start_after_their_disks_are_served(site: Site) -> None:
    texts = units(UnitOptions(program="/bin/true", directory="/srv/v", before=("qemu@a.service",)))
    unit = sections(texts["vrep-filter.service"])
    assert unit["Service"]["Type"] == ["notify"]
    assert {
        *("libvirtd.service", "virtqemud.service", "libvirt-guests.service"),
        *("pve-guests.service", "qemu@a.service"),
    } <= set(unit["Unit"]["Before"])
    for role in ("filter", "source", "target"):
        found = sections(texts[f"vrep-{role}.service"])["Service"]
        assert found["User"] == ["vrep"]
        assert found["NoNewPrivileges"] == ["yes"]
        assert found["CapabilityBoundingSet"] == []
        # Roles and recovered disks outlive the process that started them.
        assert found["KillMode"] == ["process"]
        assert found["Restart"] == ["always"]
        assert found["ExecStart"][1:] == ["run", "--role", role, "--dir", "/srv/v"]
    # The filter talks to no network.
    assert sections(texts["vrep-filter.service"])["Service"]["IPAddressDeny"] == ["any"]


@root_only
def test_it_is_installed_and_removed(site: Site, host: Path) -> None:
    put(host, "etc/systemd/system/other.service", "[Unit]\n")
    for _ in range(2):
        made = service.install(site.paths, root=host)
    for path, text in made.files.items():
        assert (host / path.lstrip("/")).read_text() == text
    service.install(site.paths, ServiceOptions(roles=("filter", "source")), root=host)
    left = {path.name for path in (host / "etc/systemd/system").iterdir()}
    assert left == UNITS - {"vrep-target.service"} | {"other.service"}
    removed = service.uninstall(site.paths, root=host)
    assert f"{ETC}vrep-filter.service" in removed
    assert [p.name for p in host.rglob("*") if p.is_file()] == ["other.service"]
    assert service.uninstall(site.paths, root=host) == []


@root_only
def test_what_a_package_brought_is_not_written_again(site: Site, host: Path) -> None:
    options = UnitOptions(program=str(service.program()), directory=str(site.paths.root))
    for name, text in units(options).items():
        put(host, f"usr/lib/systemd/system/{name}", text)
    assert not [path for path in service.install(site.paths, root=host).files if ETC in path]
    put(host, "usr/lib/systemd/system/vrep.target", "[Unit]\n")
    found = [path for path in service.install(site.paths, root=host).files if ETC in path]
    assert found == [f"{ETC}vrep.target"]


@root_only
@pytest.mark.parametrize("text", [DEBIAN_ABSTRACTION, NEWER_ABSTRACTION], ids=["debian", "newer"])
def test_libvirts_profiles_let_qemu_in(site: Site, host: Path, text: str) -> None:
    put(host, "etc/apparmor.d/abstractions/libvirt-qemu", text)
    mine = "  # the administrator's own\n  /srv/extra r,"
    local = put(host, "etc/apparmor.d/local/abstractions/libvirt-qemu", mine)
    for _ in range(2):
        made = service.install(site.paths, root=host)
    own = host / "etc/apparmor.d/abstractions/libvirt-qemu.d/vrep"
    shared = text == DEBIAN_ABSTRACTION
    assert own.exists() != shared
    assert local.read_text().count(apparmor()) == int(shared)
    assert local.read_text().startswith(mine)
    assert any("next start" in note for note in made.notes)
    service.uninstall(site.paths, root=host)
    assert local.read_text().rstrip("\n") == mine
    assert not own.exists()


def test_apparmor_accepts_its_rules() -> None:
    def parse(rules: str) -> int:
        return subprocess.run(
            ["/sbin/apparmor_parser", "--skip-kernel-load", "--skip-cache", "--stdout"],
            input=f"profile vrep_test {{\n{rules}}}\n".encode(),
            capture_output=True,
            timeout=60,
        ).returncode

    assert parse(apparmor()) == 0
    assert parse(apparmor().replace(" rw,", " rx,")) != 0


def test_without_libvirts_profiles_nothing_is_written_there(site: Site, host: Path) -> None:
    assert not [path for path in service.plan(site.paths, root=host).files if "apparmor" in path]


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"roles": ("filter", "views")}, errors.UsageError),
        ({"roles": ()}, errors.UsageError),
        ({"user": "root"}, errors.InvalidError),
        ({"user": "a b"}, errors.InvalidError),
        ({"user": "x\nExecStartPre=/bin/sh"}, errors.InvalidError),
        ({"groups": ("no-such-group-here",)}, errors.NotFoundError),
        ({"socket_group": "no-such-group-here"}, errors.NotFoundError),
        ({"before": ("qemu@web",)}, errors.InvalidError),
        ({"before": ("a.service b.service",)}, errors.InvalidError),
    ],
)
def test_what_cannot_work_is_refused(
    site: Site, host: Path, options: Any, kind: type[errors.VrepError]
) -> None:
    with pytest.raises(kind):
        service.plan(site.paths, ServiceOptions(**options), root=host)


def test_only_the_source_may_write_where_it_spills() -> None:
    options = UnitOptions(program="/bin/true", directory="/srv/v", spill_dir="/fast/spill")
    for role in ("source", "target"):
        unit = sections(units(options)[f"vrep-{role}.service"])
        for found in (unit["Service"]["ReadWritePaths"], unit["Unit"]["RequiresMountsFor"]):
            assert ("/fast/spill" in found) == (role == "source")


def test_a_directory_that_a_unit_cannot_name_is_refused(host: Path) -> None:
    for name in ("/srv/a b", "/srv/50%", "/srv/a'"):
        with pytest.raises(errors.InvalidError):
            service.plan(SitePaths(Path(name)), root=host)


def test_a_program_that_the_user_cannot_reach_is_refused(
    site: Site, host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o700)
    program = put(tmp_path, "bin/vrep", "#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(service, "program", lambda: program)
    with pytest.raises(errors.AccessError, match="closed to the service's user"):
        service.plan(site.paths, root=host)


@root_only
def test_there_must_be_a_site(host: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.NotFoundError, match="vrep site init"):
        service.install(SitePaths(tmp_path / "none"), root=host)
    assert not host.exists()


@root_only
def test_a_site_that_runs_already_is_not_given_away(site: Site, host: Path) -> None:
    with (
        ControlServer(site.paths.make_run() / "source.sock", {}),
        pytest.raises(errors.BusyError, match="source runs"),
    ):
        service.install(site.paths, root=host)
    assert not host.exists()


@root_only
def test_disks_in_use_are_not_taken_away(site: Site, host: Path) -> None:
    service.install(site.paths, root=host)
    status = {"web": {"clients": 1}, "mail": {"clients": 0}}
    with ControlServer(site.paths.make_run() / "filter.sock", {"status": lambda _p: status}):
        with pytest.raises(errors.BusyError, match="web:"):
            service.uninstall(site.paths, root=host)
        assert service.installed_files(root=host)
        assert service.uninstall(site.paths, root=host, force=True)


def test_settings_let_the_group_in(site: Site) -> None:
    options = ServiceOptions(socket_group="daemon")
    site.paths.config.write_text('[network]\nlisten = "127.0.0.1:1"\n')
    for _ in range(2):
        service._write_settings(site.paths, options)
    config = load_config(site.paths.config)
    assert config.network.listen == "127.0.0.1:1"
    assert (config.filter.socket_mode, config.filter.socket_group) == ("0660", "daemon")
    assert (config.recovery.socket_mode, config.recovery.socket_group) == ("0660", "daemon")
    # What the administrator wrote stays, and is named.
    site.paths.config.write_text('[filter]\nsocket_group = "sys"\n')
    service._write_settings(site.paths, options)
    assert load_config(site.paths.config).filter.socket_group == "sys"
    notes = service.plan(site.paths, options).notes
    assert any('filter.socket_group = "daemon"' in note for note in notes)


@root_only
def test_the_site_belongs_to_its_user_and_root_keeps_out(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    from vrep.app import cli

    nobody = pwd.getpwnam("nobody")
    site.paths.make_run()
    site.key_create("acme")
    service._hand_over(site.paths, "nobody")
    assert (site.paths.root / "run").readlink() == Path("/run/vrep")
    assert {path.lstat().st_uid for path in site.paths.root.rglob("*")} == {nobody.pw_uid}
    for command in (
        ["key", "list"],
        ["test", "start", "web"],
        ["site", "init", "--name", "other"],
    ):
        code = cli.run([*command, "--dir", str(site.paths.root)])
        assert code == errors.AccessError.exit_code
        assert "sudo -u nobody" in capsys.readouterr().err


def test_only_root_installs(site: Site, host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.os, "geteuid", lambda: 1000)
    for call in (service.install, service.uninstall):
        with pytest.raises(errors.AccessError, match="dry-run"):
            call(site.paths, root=host)
