"""Build a wheel and a Debian package of this tree into dist/: what `make package` runs.

The package holds a virtual environment of its own in /usr/lib/vrep, with the wheel and the Python
packages that it needs, since Debian's are older. It is built with the Python that runs this, and
belongs to that Python's minor version. No file in it names where it was built.
"""

from __future__ import annotations

import compileall
import gzip
import os
import py_compile
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Final

from vrep.service_units import UnitOptions, sysusers, tmpfiles, units

ROOT: Final = Path(__file__).resolve().parents[1]
DIST: Final = ROOT / "dist"
STAGE: Final = ROOT / "build" / "deb"
TREE: Final = STAGE / "tree"
PREFIX: Final = "usr/lib/vrep"
SCRIPTS: Final = ROOT / "packaging" / "debian"
MAINTAINER: Final = "The vrep authors <vrep@localhost>"


def run(*command: object, **environment: str) -> str:
    """A command that must succeed; what it prints."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"package: {' '.join(words)} failed")
    return done.stdout


def build_wheel() -> Path:
    """The wheel in dist/, built by this environment's tools."""
    shutil.rmtree(DIST, ignore_errors=True)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", DIST, ROOT)
    (wheel,) = DIST.glob("*.whl")
    return wheel


def base_python() -> Path:
    """Debian's Python, on which the package's environment stands: of the version for which the
    wheel was built, wherever that was."""
    found = Path(f"/usr/bin/python{sys.version_info[0]}.{sys.version_info[1]}")
    if not found.exists():
        raise SystemExit(f"package: {found} is not there: build with this host's own Python")
    return found


def stage_environment(wheel: Path) -> None:
    """The virtual environment, as it will lie in the package."""
    home = TREE / PREFIX
    run(base_python(), "-m", "venv", "--without-pip", "--symlinks", home)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "--python", home / "bin" / "python", "install", "--no-compile", wheel)
    for name in ("Activate.ps1", "activate", "activate.csh", "activate.fish"):
        (home / "bin" / name).unlink(missing_ok=True)
    config = home / "pyvenv.cfg"
    lines = [line for line in config.read_text().splitlines() if not line.startswith("command")]
    config.write_text("\n".join(lines) + "\n")
    for script in (home / "bin").iterdir():
        if script.is_symlink():
            continue
        head, _, rest = script.read_text().partition("\n")
        assert head.startswith("#!"), script
        script.write_text(f"#!/{PREFIX}/bin/python\n{rest}")
        if script.name != "vrep":  # commands of other packages
            script.unlink()
    site = next(home.glob("lib/python*/site-packages"))
    for record in site.glob("*.dist-info/direct_url.json"):
        record.unlink()
    compileall.compile_dir(
        str(home),
        quiet=1,
        stripdir=str(TREE),
        prependdir="/",
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    for library in site.glob("vrep/_core/*.so"):
        run("strip", "--strip-unneeded", library)


def stage_files(version: str) -> None:
    """What lies beside the environment: the command, units, their user, documents."""
    options = UnitOptions(program=f"/{PREFIX}/bin/vrep", directory="/var/lib/vrep")
    texts = {f"usr/lib/systemd/system/{name}": text for name, text in units(options).items()}
    texts["usr/lib/sysusers.d/vrep.conf"] = sysusers(options)
    texts["usr/lib/tmpfiles.d/vrep.conf"] = tmpfiles(options)
    texts["usr/share/doc/vrep/copyright"] = (
        "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n"
        "Upstream-Name: vrep\n\nFiles: *\nCopyright: the vrep authors\nLicense: Apache-2.0\n"
        " On Debian systems the text is in /usr/share/common-licenses/Apache-2.0.\n\n"
        f"Files: {PREFIX}/lib/python*/site-packages/*\nCopyright: their authors\n"
        "License: see the *.dist-info directory of each\n"
    )
    for path, text in texts.items():
        target = TREE / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    (TREE / "usr/bin").mkdir()
    (TREE / "usr/bin/vrep").symlink_to(f"../../{PREFIX}/bin/vrep")
    changes = (ROOT / "CHANGELOG.md").read_bytes()
    (TREE / "usr/share/doc/vrep/changelog.gz").write_bytes(gzip.compress(changes, mtime=0))
    assert version


def libraries() -> str:
    """The Debian packages of the libraries that the native modules are linked with."""
    control = STAGE / "shlibs" / "debian"
    control.mkdir(parents=True)
    (control / "control").write_text("Source: vrep\n\nPackage: vrep\nArchitecture: any\n")
    modules = sorted(TREE.glob(f"{PREFIX}/lib/python*/site-packages/vrep/_core/*.so"))
    assert modules
    done = subprocess.run(
        ["dpkg-shlibdeps", "-O", "--ignore-missing-info", *map(str, modules)],
        cwd=control.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    return done.stdout.strip().removeprefix("shlibs:Depends=")


def control(version: str, architecture: str) -> str:
    major, minor = sys.version_info[:2]
    python = f"python3 (>= {major}.{minor}), python3 (<< {major}.{minor + 1})"
    kib = sum(path.lstat().st_size for path in TREE.rglob("*")) // 1024
    return textwrap.dedent(f"""\
        Package: vrep
        Version: {version}
        Architecture: {architecture}
        Maintainer: {MAINTAINER}
        Installed-Size: {kib}
        Section: admin
        Priority: optional
        Depends: {python}, systemd, {libraries()}
        Suggests: qemu-system-x86, libvirt-daemon-system
        Description: continuous replication of virtual machine disks
         Ships every write of a VM's disks, sealed, to a second site, and serves them there as
         they were after any of them.
        """)


def build_deb(wheel: Path) -> Path:
    version = re.fullmatch(r"vrep-([^-]+)-.*", wheel.name)[1]  # type: ignore[index]
    shutil.rmtree(STAGE, ignore_errors=True)
    TREE.mkdir(parents=True)
    architecture = run("dpkg", "--print-architecture").strip()
    stage_environment(wheel)
    stage_files(version)
    about = TREE / "DEBIAN"
    text = control(version, architecture)
    about.mkdir()
    (about / "control").write_text(text)
    for name in ("postinst", "prerm", "postrm"):
        shutil.copy(SCRIPTS / name, about / name)
        (about / name).chmod(0o755)
    for path in [TREE, *TREE.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
    found = DIST / f"vrep_{version}_{architecture}.deb"
    epoch = run("git", "log", "-1", "--format=%ct").strip()
    run(
        *("dpkg-deb", "--root-owner-group", "-Zxz", "-z1", "--build", TREE, found),
        SOURCE_DATE_EPOCH=epoch,
    )
    return found


def check_paths() -> None:
    """No text or compiled file of the package names the directory in which it was built."""
    here = {os.fsencode(ROOT), os.fsencode(sys.prefix)}
    for path in TREE.rglob("*"):
        if path.is_symlink():
            text = os.fsencode(path.readlink())
        elif path.is_file():
            text = path.read_bytes()
        else:
            continue
        if any(place in text for place in here):
            raise SystemExit(f"package: {path} names where it was built")


def main() -> None:
    wheel = build_wheel()
    deb = build_deb(wheel)
    check_paths()
    for path in (wheel, deb):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
