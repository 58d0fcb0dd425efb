"""What every test shares: a seed that replays, and a summary that hides no failed stage."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SEED = int(os.environ.get("VREP_TEST_SEED") or random.SystemRandom().randrange(1, 2**32))
os.environ["VREP_TEST_SEED"] = str(SEED)  # of all workers

# The machine may be busy: how long an example takes proves nothing.
hypothesis.settings.register_profile("vrep", deadline=None, print_blob=True)
hypothesis.settings.load_profile("vrep")


def pytest_report_header() -> str:
    return f"replay with: VREP_TEST_SEED={SEED}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    failed = os.environ.get("VREP_FAILED_STAGES", "").split()
    if failed:
        terminalreporter.section("failed before pytest", red=True)
        terminalreporter.line(", ".join(failed), red=True)


@pytest.fixture(scope="session", autouse=True)
def _short_directories() -> Iterator[None]:
    """Where sites with a long path have their sockets: killed ones leave theirs there. A short
    name, since those of sockets are limited."""
    with tempfile.TemporaryDirectory(prefix="v-") as name, pytest.MonkeyPatch.context() as patch:
        Path(name).chmod(0o711)  # sockets in it may be for other users
        patch.setenv("XDG_RUNTIME_DIR", name)
        yield


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A number that differs between runs and tests, and is the same in a replay."""
    return random.Random(f"{SEED}/{request.node.nodeid}").randrange(2**63)


@pytest.fixture
def rng(seed: int) -> random.Random:
    """Random choices of one test, replayed by VREP_TEST_SEED."""
    return random.Random(seed)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return REPOSITORY
