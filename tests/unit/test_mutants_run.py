"""The runner of the mutants: what counts as killed, and what proves nothing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

MUTANTS = Path(__file__).parents[1] / "mutants"
TEST = "tests/unit/test_x.py::test_y"


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The runner over a tree of one file, where nothing is built and no test is run."""
    path = MUTANTS / "run.py"
    spec = importlib.util.spec_from_file_location("mutants_run", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    (tmp_path / "code.py").write_text("right\n")

    def apply(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        (tmp_path / "code.py").write_text("wrong\n")
        return subprocess.CompletedProcess(command, 0, "")

    monkeypatch.setattr(module, "TREE", tmp_path)
    monkeypatch.setattr(module, "run", apply)
    monkeypatch.setattr(module, "build", lambda _tests: None)
    return module


def mutant(runner: ModuleType, where: Path, *lines: str) -> Any:
    path = where / "1-some-mutant.patch"
    head = "".join(f"# {line}\n" for line in (f"test: {TEST}", *lines))
    path.write_text(f"{head}--- a/code.py\n+++ b/code.py\n")
    return runner.read(path)


def test_each_invariant_has_mutants_that_apply_and_tests_that_exist() -> None:
    """`make mutants` takes hours: what it would find at once is found here."""
    spec = importlib.util.spec_from_file_location("mutants_list", MUTANTS / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks there
    spec.loader.exec_module(module)
    repository = MUTANTS.parents[1]
    counts = dict.fromkeys(module.GUARDED, 0)
    wrong = []
    for path in sorted(MUTANTS.glob("*.patch")):
        mutant = module.read(path)
        counts[mutant.invariant] += 1
        applied = subprocess.run(
            ["git", "apply", "--check", str(path)], cwd=repository, capture_output=True, check=False
        )
        if applied.returncode:
            wrong.append(f"{path.name} does not apply")
        for test in [*mutant.tests, *mutant.also]:
            file, _, name = test.partition("::")
            at = repository / (file if file.endswith(".py") else f"tests/native/{file}.c")
            definition = f"def {name.partition('[')[0]}(" if name else ""
            if not at.is_file() or definition not in at.read_text():
                wrong.append(f"{path.name}: there is no {test}")
    assert wrong == []
    assert {number for number, count in counts.items() if count < 2} == set()


def test_what_is_red_without_a_mutant_as_well_proves_nothing(
    runner: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def red_with_the_last(test: str, seed: str) -> None:
        if seed == runner.SEEDS[-1]:
            raise runner.Red(test, seed)

    monkeypatch.setattr(runner, "test_once", red_with_the_last)
    first, last = (TEST, runner.SEEDS[0]), (TEST, runner.SEEDS[-1])
    said = runner.without_mutants([first, last])
    assert said[first] == ""
    assert TEST in said[last]


@pytest.mark.parametrize(
    ("lines", "verdict"),
    [((), "timeout"), (("timeout: kills",), "killed"), (("hangs",), "timeout")],
)
def test_a_timeout_kills_only_where_that_is_said(
    runner: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: tuple[str, ...],
    verdict: str,
) -> None:
    def late(test: str, _seed: str) -> None:
        raise runner.Late(test)

    monkeypatch.setattr(runner, "test_once", late)
    judged = runner.judge(mutant(runner, tmp_path, *lines))
    assert judged.what == verdict
    assert judged.runs == ([(TEST, runner.SEEDS[0])] if verdict == "killed" else [])
    assert (tmp_path / "code.py").read_text() == "right\n"


def test_red_kills_and_green_survives(
    runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def red(test: str, seed: str) -> None:
        if seed != runner.SEEDS[0]:
            raise runner.Red(test, seed)

    one = mutant(runner, tmp_path, "it is wrong")
    monkeypatch.setattr(runner, "test_once", red)
    judged = runner.judge(one)
    assert (judged.what, judged.runs) == ("killed", [(TEST, runner.SEEDS[1])])
    monkeypatch.setattr(runner, "test_once", lambda _test, _seed: None)
    assert runner.judge(one).what == "survived"


def test_what_must_turn_red_as_well_does(
    runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = "tests/sim/test_x.py::test_z"
    one = mutant(runner, tmp_path, f"also: {other}", "it is wrong")
    assert (one.tests, one.also, one.breaks) == ([TEST], [other], "it is wrong")

    def red(*names: str) -> None:
        def test_once(test: str, seed: str) -> None:
            if test in names:
                raise runner.Red(test, seed)

        monkeypatch.setattr(runner, "test_once", test_once)

    red(TEST, other)
    judged, seed = runner.judge(one), runner.SEEDS[0]
    assert (judged.what, set(judged.runs)) == ("killed", {(TEST, seed), (other, seed)})
    red(TEST)
    assert runner.judge(one) == runner.Verdict("survived", other)
    red(other)
    assert runner.judge(one).what == "survived"


def test_the_end_takes_back_what_was_red_anyway(
    runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def red(test: str, seed: str) -> None:
        raise runner.Red(test, seed)

    mutant(runner, tmp_path, "it is wrong")
    monkeypatch.setattr(runner, "test_once", red)
    monkeypatch.setattr(runner, "prepare", lambda: None)
    monkeypatch.setattr(runner, "HERE", tmp_path)
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(sys, "argv", ["run.py", "--only", "1-*"])
    assert runner.main() == 1
    assert json.loads((tmp_path / "results.json").read_text())[0]["verdict"] == "red without it"
