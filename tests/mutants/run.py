"""Break the code in one place at a time: the test that guards the place must turn red.

    python tests/mutants/run.py [--only PATTERN] [--list]

Each ``INVARIANT-NAME.patch`` here begins with lines ``# test: ID``, of which one at least must
turn red (``test_map`` is a native test, ``tests/unit/test_x.py::test_y`` one of pytest), and one
may say what it breaks. A line ``# also: ID`` names a test that must turn red as well, whatever
the others say. A mutant that makes its test hang says so by ``# timeout: kills``; any other
test that does not end in time proves nothing. The patches are applied one after another to a copy
of the work tree in ``build/mutants``, which is kept and built incrementally. In the end each test
that turned red runs once more without any patch, with the seed that it turned red with: one that
is red then as well proves nothing and is an error, and so are a patch that does not apply, one
that does not build and one that survives. Results: ``build/mutants.json``.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
TREE = REPOSITORY / "build" / "mutants"
BUILD = TREE / "build" / "mutants"
RESULTS = REPOSITORY / "build" / "mutants.json"
GUARDED = range(1, 12)  # invariants with two mutants at least; the twelfth is not built
TEST_S = 240
SEEDS = ("1", "2", "3")  # a random test may miss once


Run = tuple[str, str]
"""a test and a seed"""


@dataclass
class Mutant:
    path: Path
    tests: list[str] = field(default_factory=list)
    also: list[str] = field(default_factory=list)
    breaks: str = ""
    hangs: bool = False
    files: list[str] = field(default_factory=list)

    @property
    def invariant(self) -> int:
        return int(self.path.name.split("-")[0])

    @property
    def name(self) -> str:
        return self.path.stem


class Red(Exception):
    """A test failed."""

    def __init__(self, test: str, seed: str, said: str = "") -> None:
        super().__init__(f"{test} (seed {seed})\n{said}")
        self.run = (test, seed)


class Late(Exception):
    """A test did not end in time: the mutant hangs it, or the machine is slow."""


class Broken(Exception):
    """Nothing can be said: the machinery, the patch or the test is wrong."""


def read(path: Path) -> Mutant:
    mutant = Mutant(path)
    for line in path.read_text().splitlines():
        if line.startswith("# test:"):
            mutant.tests.append(line.removeprefix("# test:").strip().removeprefix("ctest:"))
        elif line.startswith("# also:"):
            mutant.also.append(line.removeprefix("# also:").strip())
        elif line.startswith("# timeout:"):
            mutant.hangs = line.removeprefix("# timeout:").strip() == "kills"
        elif line.startswith("# ") and not mutant.files:
            mutant.breaks = mutant.breaks or line[2:]
        elif line.startswith(("+++ b/", "--- a/")):
            mutant.files.append(line[6:])
    mutant.breaks = mutant.breaks or " ".join(mutant.name.split("-")[1:])
    if not mutant.tests or not mutant.files or not re.match(r"\d+-[a-z0-9-]+$", mutant.name):
        raise SystemExit(f"{path.name}: its name, a '# test:' line or its change is missing")
    return mutant


def run(
    command: list[str], *, seconds: float = 1800, **variables: str
) -> subprocess.CompletedProcess[str]:
    # git must not see the repository around the copy; a stale .pyc must not hide a change.
    environment = os.environ | {
        "GIT_CEILING_DIRECTORIES": str(TREE.parent),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    environment |= variables
    return subprocess.run(
        command,
        cwd=TREE,
        env=environment,
        timeout=seconds,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def copy_tree() -> None:
    """The work tree as it is now; what did not change keeps its time, and is not built again."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    )
    wanted = {name for name in listed.stdout.split("\0") if name}
    wanted = {name for name in wanted if (REPOSITORY / name).is_file()}
    for name in wanted:
        here, there = REPOSITORY / name, TREE / name
        if not there.is_file() or there.read_bytes() != here.read_bytes():
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(here, there)
            there.chmod(here.stat().st_mode)
    for top in ("src", "tests"):
        for path in (TREE / top).rglob("*"):
            name = str(path.relative_to(TREE))
            if path.is_file() and name not in wanted and path.suffix != ".so":
                path.unlink()


def python() -> str:
    return str(TREE / ".venv" / "bin" / "python")


def prepare() -> None:
    """The copy, an environment that imports vrep from it, and its build."""
    copy_tree()
    if not Path(python()).exists():
        venv.create(TREE / ".venv", with_pip=False)
    packages = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    ours = Path(sys.prefix) / packages
    # A path named in a .pth file is searched, but its own .pth files do not run: the editable
    # vrep of the work tree stays out.
    (TREE / ".venv" / packages / "mutants.pth").write_text(f"{TREE / 'src'}\n{ours}\n")
    configured = run(
        [
            *("cmake", "-G", "Ninja", "-S", ".", "-B", str(BUILD), "-Wno-dev"),
            "--log-level=WARNING",
            *("-DVREP_TESTS=ON", "-DVREP_PYTHON=ON", f"-DPython_EXECUTABLE={python()}"),
            "-DCMAKE_BUILD_TYPE=Release",
            "-DCMAKE_C_FLAGS_RELEASE=-O1",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={TREE / 'src' / 'vrep' / '_core'}",
        ]
    )
    if configured.returncode != 0:
        raise SystemExit(f"cmake: {configured.stdout}")


def is_native(test: str) -> bool:
    return not test.startswith("tests/")


def build(tests: list[str]) -> None:
    targets = {test for test in tests if is_native(test)}
    if any(not is_native(test) for test in tests):
        modules = (TREE / "src" / "vrep" / "_core").glob("*.pyx")
        targets |= {f"core_{path.stem}" for path in modules}
    command = ["cmake", "--build", str(BUILD), "--target", *sorted(targets)]
    done = run([*command, "--", "-j", str(os.cpu_count() or 1)])
    if done.returncode != 0:
        raise Broken(f"it does not build:\n{done.stdout[-2000:]}")


def test_once(test: str, seed: str) -> None:
    if is_native(test):
        command = [str(BUILD / test)]
    else:
        command = [python(), "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
    try:
        done = run(command, seconds=TEST_S, VREP_TEST_SEED=seed)
    except subprocess.TimeoutExpired:
        raise Late(f"{test} (seed {seed}): no end within {TEST_S} s") from None
    if done.returncode == 0:
        return
    if not is_native(test) and done.returncode != 1:
        raise Broken(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}")
    raise Red(test, seed, done.stdout[-2000:])


def turns_red(tests: list[str]) -> Red | None:
    """What the first of some tests said that is red with any of the seeds."""
    try:
        for seed in SEEDS:
            for test in tests:
                test_once(test, seed)
    except Red as red:
        return red
    return None


@dataclass
class Verdict:
    what: str
    evidence: str = ""
    """what speaks for it"""
    runs: list[Run] = field(default_factory=list)
    """that turned red"""


def judge(mutant: Mutant) -> Verdict:
    """The verdict on one mutant, if what turned red is green without it."""
    saved = {name: (TREE / name).read_bytes() for name in mutant.files if (TREE / name).exists()}
    try:
        applied = run(["git", "apply", "--whitespace=nowarn", str(mutant.path)])
        if applied.returncode != 0:
            return Verdict("does not apply", applied.stdout)
        if all((TREE / name).read_bytes() == data for name, data in saved.items()):
            return Verdict("does not apply", "it changes nothing")
        build([*mutant.tests, *mutant.also])
        runs = []
        for tests in [[test] for test in mutant.also] + [mutant.tests]:
            red = turns_red(tests)
            if red is None:
                return Verdict("survived", ", ".join(tests))
            runs.append(red.run)
        return Verdict("killed", str(red), runs)
    except Broken as error:
        return Verdict("error", str(error))
    except Late as error:
        late = [(test, SEEDS[0]) for test in mutant.tests]
        return (
            Verdict("killed", str(error), late) if mutant.hangs else Verdict("timeout", str(error))
        )
    finally:
        for name, data in saved.items():
            (TREE / name).write_bytes(data)


def without_mutants(runs: list[Run]) -> dict[Run, str]:
    """What tests say about the code as it is: nothing when they are green."""
    if not runs:
        return {}
    build([test for test, _seed in runs])
    said = {}
    for test, seed in runs:
        try:
            test_once(test, seed)
            said[test, seed] = ""
        except (Red, Late, Broken) as error:
            said[test, seed] = str(error) or "red"
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="*", help="names, with wildcards")
    parser.add_argument("--list", action="store_true", help="show the mutants, run nothing")
    arguments = parser.parse_args()
    pattern = arguments.only if "*" in arguments.only else f"*{arguments.only}*"
    mutants = sorted(
        (read(path) for path in HERE.glob("*.patch") if fnmatch.fnmatch(path.stem, pattern)),
        key=lambda mutant: (mutant.invariant, mutant.name),
    )
    if arguments.list:
        for mutant in mutants:
            print(f"{mutant.name:<44} {mutant.breaks}")
        return 0
    bare = [
        number
        for number in GUARDED
        if pattern == "*" and sum(mutant.invariant == number for mutant in mutants) < 2
    ]
    for number in bare:
        print(f"invariant {number} has fewer than two mutants")
    prepare()
    verdicts, rows = [], []
    for mutant in mutants:
        begun = time.monotonic()
        verdict = judge(mutant)
        verdicts.append(verdict)
        seconds = round(time.monotonic() - begun, 1)
        rows.append(
            {
                "patch": mutant.path.name,
                "invariant": mutant.invariant,
                "breaks": mutant.breaks,
                "test": ", ".join([*mutant.tests, *mutant.also]),
                "verdict": verdict.what,
                "seconds": seconds,
            }
        )
        print(f"{verdict.what:<15} {seconds:>6.1f} s  {mutant.name}: {mutant.breaks}", flush=True)
        if verdict.what != "killed":
            print(verdict.evidence, flush=True)
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    good = without_mutants(sorted({run for verdict in verdicts for run in verdict.runs}))
    for verdict, row in zip(verdicts, rows, strict=True):
        for red in [good[run] for run in verdict.runs if good[run]]:
            row["verdict"] = "red without it"
            print(f"{row['patch']}: red without it: {red}", flush=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    killed = sum(row["verdict"] == "killed" for row in rows)
    late = sum(row["verdict"] == "timeout" for row in rows)
    print(f"{killed} of {len(rows)} mutants killed" + (f", {late} timed out" if late else ""))
    return 0 if rows and killed == len(rows) and not bare else 1


if __name__ == "__main__":
    sys.exit(main())
