"""The programs of bench/ are compiled when they are measured, by whoever measures: that they still
fit the tree is seen here."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted(path.relative_to(ROOT) for path in (ROOT / "bench").rglob("*.c"))
WITHIN = (("bench_ring", "PROGRAM"), ("bench_seal", "RAW"), ("bench_hash", "RAW"))
"""those that are text in a module"""


def compiles(source: Path) -> None:
    done = subprocess.run(
        [
            *("gcc", "-fsyntax-only", "-std=gnu11", "-Wall", "-Werror", "-D_GNU_SOURCE="),
            *(f"-I{ROOT / 'src/_native'}", f"-I{ROOT / 'tests/native'}", str(source)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", PROGRAMS, ids=str)
def test_a_program_compiles(path: Path) -> None:
    compiles(ROOT / path)


def micro(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench/micro" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "text"), WITHIN)
def test_a_program_within_a_module_compiles(name: str, text: str, tmp_path: Path) -> None:
    source = tmp_path / "program.c"
    source.write_text(getattr(micro(name), text))
    compiles(source)


def test_the_program_that_takes_the_whole_library_is_linked(tmp_path: Path) -> None:
    """A library that a room of src/_native needs is named there too."""
    assert micro("bench_filter").compile_program(tmp_path).exists()


def test_programs_that_take_some_rooms_are_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What such a room needs beyond them, or a limit beyond its own file, is named as well."""
    assert micro("bench_ring").build(tmp_path).exists()
    monkeypatch.syspath_prepend(ROOT)
    limits = importlib.import_module("bench.pipeline.limits")
    assert importlib.import_module("bench.pipeline.tap").follower(tmp_path).exists()
    assert limits.program("pipeline_limit", tmp_path, "-lcrypto").exists()
    assert limits.program("least_pipeline", tmp_path, "-lssl", "-lcrypto", "-lpthread").exists()
    assert limits.program("least_tap", tmp_path, "-lxxhash").exists()
    assert limits.program("null_nbd", tmp_path).exists()
