"""The guest's kernel and initramfs, made from two Debian packages and cached.

Nothing is installed and no root is needed: the packages are downloaded with
apt, unpacked beside the cache, and the initramfs is written byte by byte (a
cpio archive in the "newc" format), so the same packages give the same image.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import lzma
import os
import platform
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from vrep.errors import VrepError

KERNEL_META_PACKAGE = "linux-image-cloud-amd64"
BUSYBOX_PACKAGE = "busybox-static"

#: What the guest must be able to load; what these need is found by itself,
#: and what the kernel has built in (ext4 in Debian's cloud kernel) is left out.
WANTED_MODULES = (
    "virtio_pci",
    "scsi_mod",
    "virtio_scsi",
    "virtio_blk",
    "virtio_console",
    "sd_mod",
    "crc32c_generic",
    "ext4",
)

#: Raised when the layout of the cached files changes.
_CACHE_VERSION = 1


class GuestError(VrepError):
    """The demonstration guest could not be built, started or read."""

    exit_code = 70


def default_cache_dir() -> Path:
    """Where guest images are kept when the caller names no place."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vrep" / "guest"


def _init_script() -> bytes:
    return resources.files(__package__).joinpath("guest_init.sh").read_bytes()


@dataclass(frozen=True)
class GuestRecipe:
    """What an image is made of besides the kernel and busybox."""

    init: bytes = field(default_factory=_init_script)
    modules: tuple[str, ...] = WANTED_MODULES
    #: Programs and their like by their paths in the guest, all executable.
    files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Everything of ours that shapes the image."""
        digest = hashlib.sha256()
        digest.update(json.dumps([_CACHE_VERSION, self.modules]).encode())
        digest.update(self.init)
        for name, content in sorted(self.files.items()):
            digest.update(f"{name} {len(content)}\0".encode())
            digest.update(content)
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class GuestImage:
    """A kernel and an initramfs that QEMU boots directly."""

    kernel: Path
    initramfs: Path
    #: Package name to version, as downloaded.
    packages: dict[str, str]

    @classmethod
    def build(
        cls,
        cache_dir: Path | None = None,
        *,
        refresh: bool = False,
        recipe: GuestRecipe | None = None,
    ) -> GuestImage:
        """Return the cached image, or download and build it first.

        The key is everything of ours that shapes the image; a newer kernel
        package alone does not replace a cached one, `refresh` does.
        """
        if platform.machine() != "x86_64":
            raise GuestError(
                f"the demonstration guest needs an x86_64 host, not {platform.machine()}"
            )
        cache = cache_dir if cache_dir is not None else default_cache_dir()
        cache.mkdir(parents=True, exist_ok=True)
        recipe = recipe if recipe is not None else GuestRecipe()
        place = cache / f"image-{recipe.key}"
        with _locked(cache / "lock"):
            if refresh and place.exists():
                shutil.rmtree(place)
            if not (place / "image.json").exists():
                _build_into(place, cache, recipe)
        described = json.loads((place / "image.json").read_text())
        return cls(
            kernel=place / "vmlinuz",
            initramfs=place / "initramfs.cpio",
            packages=dict(described["packages"]),
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build_into(place: Path, cache: Path, recipe: GuestRecipe) -> None:
    with tempfile.TemporaryDirectory(dir=cache, prefix="unpack-") as work_name:
        work = Path(work_name)
        packages = _fetch_packages(work)
        root = work / "root"
        for archive in packages:
            run_tool(["dpkg-deb", "-x", str(archive), str(root)])
        image = work / "image"
        image.mkdir()
        kernel = _only(root.glob("boot/vmlinuz-*"), "kernel in the kernel package")
        shutil.copyfile(kernel, image / "vmlinuz")
        busybox = _only(
            (p for p in (root / "bin/busybox", root / "usr/bin/busybox") if p.exists()),
            "busybox in its package",
        )
        modules = _only(_module_trees(root), "module tree in the kernel package")
        (image / "initramfs.cpio").write_bytes(
            make_initramfs(
                recipe.init,
                busybox.read_bytes(),
                load_modules(modules, recipe.modules),
                recipe.files,
            )
        )
        versions = dict(_package_identity(archive) for archive in packages)
        (image / "image.json").write_text(json.dumps({"packages": versions}, indent=2))
        if place.exists():
            shutil.rmtree(place)
        image.rename(place)


def _module_trees(root: Path) -> Iterator[Path]:
    for parent in ("lib/modules", "usr/lib/modules"):
        yield from (root / parent).glob("*")


def _only(found: Iterable[Path], what: str) -> Path:
    paths = list(found)
    if len(paths) != 1:
        raise GuestError(f"expected one {what}, found {len(paths)}")
    return paths[0]


# Packages


def _fetch_packages(work: Path) -> list[Path]:
    """Download the packages; without lists, or with stale ones, fetch lists of our own first."""
    try:
        return _download_packages(work, [])
    except GuestError:
        # Lists of our own need no root. A failure here names the cause again.
        private = _private_apt_options(work / "apt")
        run_tool(["apt-get", *private, "-q", "update"])
        return _download_packages(work, private)


def _private_apt_options(place: Path) -> list[str]:
    lists, archives = (place / "lists").resolve(), (place / "archives").resolve()
    for directory in (lists, archives):
        (directory / "partial").mkdir(parents=True, exist_ok=True)
    settings = {
        "Dir::State::Lists": lists,
        "Dir::Cache": archives.parent,
        "Dir::Cache::archives": archives,
        "APT::Sandbox::User": "",
    }
    return [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]


def _download_packages(work: Path, apt_options: Sequence[str]) -> list[Path]:
    kernel = _kernel_package(apt_options)
    return [_download(package, work, apt_options) for package in (kernel, BUSYBOX_PACKAGE)]


def _kernel_package(apt_options: Sequence[str]) -> str:
    """The package that holds the newest cloud kernel, from the one that follows it."""
    shown = run_tool(["apt-cache", *apt_options, "show", "--no-all-versions", KERNEL_META_PACKAGE])
    match = re.search(r"^Depends:.*?(linux-image-\d\S+-cloud-amd64)\b", shown, re.MULTILINE)
    if match is None:
        raise GuestError(f"package {KERNEL_META_PACKAGE} names no kernel package")
    return match.group(1)


def _download(package: str, work: Path, apt_options: Sequence[str]) -> Path:
    place = work / package
    place.mkdir(exist_ok=True)
    options = [*apt_options, "-q", "-o", "APT::Sandbox::User="]
    run_tool(["apt-get", *options, "download", package], cwd=place)
    return _only(place.glob("*.deb"), f"downloaded file of {package}")


def _package_identity(archive: Path) -> tuple[str, str]:
    shown = run_tool(["dpkg-deb", "-W", "--showformat=${Package} ${Version}", str(archive)])
    name, version = shown.split()
    return name, version


def run_tool(command: Sequence[str], *, cwd: Path | None = None) -> str:
    """Run a program to its end and return its standard output; failure is an error."""
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise GuestError(f"{command[0]} is not installed on this machine") from error
    if done.returncode != 0:
        raise GuestError(
            f"{' '.join(command)} failed with status {done.returncode}: {done.stderr.strip()}"
        )
    return done.stdout


# Modules


def load_modules(tree: Path, wanted: Sequence[str] = WANTED_MODULES) -> list[tuple[str, bytes]]:
    """The wanted modules and those they need, unpacked, in the order of loading."""
    builtin = {_module_name(line) for line in (tree / "modules.builtin").read_text().split()}
    files = {_module_name(path.name): path for path in tree.rglob("*.ko*")}
    loaded: dict[str, bytes] = {}

    def load(name: str, needed_by: str) -> None:
        if name in builtin or name in loaded:
            return
        if name not in files:
            raise GuestError(f"the kernel has no module {name}, needed by {needed_by}")
        content = _read_module(files[name])
        for dependency in _module_dependencies(content):
            load(dependency, name)
        loaded[name] = content

    for name in wanted:
        load(name, "the guest")
    return [(f"{name}.ko", content) for name, content in loaded.items()]


def _module_name(path: str) -> str:
    return Path(path).name.partition(".ko")[0].replace("-", "_")


def _read_module(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(content)
    if path.suffix != ".ko":
        raise GuestError(f"module {path.name} is packed in a way that is not known")
    return content


def _module_dependencies(content: bytes) -> list[str]:
    # Section .modinfo is a row of NUL-terminated "key=value" strings.
    match = re.search(rb"\0depends=([\w,-]*)\0", content)
    if match is None or not match.group(1):
        return []
    return [name.replace("-", "_") for name in match.group(1).decode().split(",")]


# Initramfs


def make_initramfs(
    init: bytes,
    busybox: bytes,
    modules: Sequence[tuple[str, bytes]],
    files: Mapping[str, bytes] = MappingProxyType({}),
) -> bytes:
    """A cpio archive with the init script, busybox, the modules in loading order, and more files,
    by their paths."""
    archive = CpioWriter()
    directories = {"bin", "dev", "disk", "modules", "proc", "sys", "tmp"}
    for name in files:
        directories |= {str(parent) for parent in PurePosixPath(name).parents} - {"."}
    for directory in sorted(directories):
        archive.add_directory(directory)
    # The kernel opens this one for init before devtmpfs is mounted.
    archive.add_device("dev/console", major=5, minor=1)
    archive.add_file("init", init, mode=0o755)
    archive.add_file("bin/busybox", busybox, mode=0o755)
    archive.add_file("modules/order", "".join(f"{name}\n" for name, _ in modules).encode())
    for name, content in modules:
        archive.add_file(f"modules/{name}", content)
    for name, content in sorted(files.items()):
        archive.add_file(name, content, mode=0o755)
    return archive.finish()


class CpioWriter:
    """Writes a cpio archive ("newc"): owner root, time zero, nothing of the host in it."""

    def __init__(self) -> None:
        self._out = bytearray()
        self._inode = 0

    def add_directory(self, name: str) -> None:
        """Add an empty directory."""
        self._add(name, stat.S_IFDIR | 0o755, b"", links=2)

    def add_file(self, name: str, content: bytes, *, mode: int = 0o644) -> None:
        """Add a regular file."""
        self._add(name, stat.S_IFREG | mode, content)

    def add_device(self, name: str, *, major: int, minor: int) -> None:
        """Add a character device."""
        self._add(name, stat.S_IFCHR | 0o600, b"", device=(major, minor))

    def finish(self) -> bytes:
        """Close the archive and return it."""
        self._add("TRAILER!!!", 0, b"")
        return bytes(self._out)

    def _add(
        self,
        name: str,
        mode: int,
        content: bytes,
        *,
        links: int = 1,
        device: tuple[int, int] = (0, 0),
    ) -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device of the file (2),
        # device that it stands for (2), length of the name, unused checksum
        fields = (self._inode, mode, 0, 0, links, 0, len(content), 0, 0, *device, len(encoded), 0)
        self._out += b"070701" + b"".join(b"%08x" % field for field in fields)
        self._out += encoded
        self._pad()
        self._out += content
        self._pad()

    def _pad(self) -> None:
        self._out += bytes(-len(self._out) % 4)
