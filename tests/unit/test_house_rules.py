"""Rules of CONTRIBUTING.md that no linter knows: directions, memory ordering, stubs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src"
NATIVE = SOURCE / "_native"
PYTHON = SOURCE / "vrep"

# What the C of a room may include, besides its own headers.
CORE = {"format", "base"}
ROOMS = {
    "base": set(),
    "format": {"base"},
    "ring": CORE,
    "track": CORE,
    "disk": CORE,
    "crypto": set(),  # over libraries only
    "seal": CORE | {"ring", "crypto"},  # seals records straight out of the ring, without a copy
    "map": CORE,
    "tls": {"base", "crypto"},
    "filter": CORE | {"ring", "track", "disk"},
    "scsi": CORE | {"ring", "track", "disk", "filter"},
    "serve": CORE | {"ring", "track", "disk", "filter", "scsi"},
}

# What a stage must not import: the edge, and the stages it is kept apart from.
STAGES = {
    "_core": {"app", "source", "target", "recovery", "wire", "keys", "hypervisor"},
    "wire": {"app", "source", "target", "recovery"},
    "keys": {"app", "source", "target", "recovery"},
    "source": {"app", "target"},
    "target": {"app", "source"},
    "recovery": {"app", "source"},
    "hypervisor": {"app"},
}


def native_files() -> Iterator[Path]:
    for path in sorted(NATIVE.rglob("*")):
        if path.suffix in {".c", ".h"}:
            yield path


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_native_rooms_include_downwards_only() -> None:
    wrong = []
    for path in native_files():
        room = path.relative_to(NATIVE).parts[0]
        assert room in ROOMS, f"unknown room {room}"
        for included in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE):
            if Path(included).parts[0] not in ROOMS[room] | {room}:
                wrong.append(f"{path.relative_to(SOURCE)} includes {included}")
    assert not wrong


def test_memory_ordering_is_spelled_in_one_header() -> None:
    spelling = re.compile(r"__atomic_|__sync_|\bmemory_order|\b_Atomic\b|stdatomic\.h")
    found = [path for path in native_files() if spelling.search(path.read_text())]
    assert found == [NATIVE / "base" / "atomic.h"]


@pytest.mark.parametrize("stage", STAGES)
def test_stages_do_not_import_upwards_or_sideways(stage: str) -> None:
    wrong = [
        f"{path.relative_to(SOURCE)} imports {module}"
        for path in sorted((PYTHON / stage).rglob("*.py"))
        for module in imported_modules(path)
        if module.startswith("vrep.") and module.split(".")[1] in STAGES[stage]
    ]
    assert not wrong


def test_every_extension_module_has_a_stub() -> None:
    modules = sorted((PYTHON / "_core").glob("*.pyx"))
    assert modules
    assert [path for path in modules if not path.with_suffix(".pyi").exists()] == []


def test_a_status_becomes_an_exception_in_one_module_only() -> None:
    found = [
        path.name
        for path in sorted((PYTHON / "_core").glob("*.pyx"))
        if "vrep_status_name" in path.read_text()
    ]
    assert found == ["_status.pyx"]


def test_no_work_is_left_as_a_note() -> None:
    note = re.compile(r"\b(TODO|FIXME|XXX)\b")
    suffixes = {".c", ".h", ".py", ".pyx", ".pxd", ".pyi"}
    files = (path for path in sorted(SOURCE.rglob("*")) if path.suffix in suffixes)
    assert [path for path in files if note.search(path.read_text())] == []


def test_every_fault_point_is_passed_in_a_test() -> None:
    """A place at which nobody kills the process or fails the call proves nothing."""
    named = re.compile(r'vrep_fault\("([a-z_.]+)"\)')
    points = {name for path in native_files() for name in named.findall(path.read_text())}
    assert len(points) > 30
    tests = Path(__file__).resolve().parents[1]
    armed = "".join(
        path.read_text()
        for room in ("native", "e2e", "crash")
        for path in sorted((tests / room).iterdir())
        if path.suffix in {".c", ".h", ".py"}
    )
    assert [
        name for name in sorted(points) if not re.search(rf'[",]{re.escape(name)}[:"]', armed)
    ] == []
