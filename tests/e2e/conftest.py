"""Two sites on one host, for every end-to-end test of the pipeline."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

NOBODY = 65534


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test marked `every_front` runs over each front-end; those beside NBD that the mark does
    not name as `quick` are slow, and those in `but` are left out."""
    from fronts import FRONTS

    marker = metafunc.definition.get_closest_marker("every_front")
    if marker is not None and "front" in metafunc.fixturenames:
        quick = ("nbd", *marker.kwargs.get("quick", ()))
        fronts = [
            pytest.param(front, marks=[] if front in quick else [pytest.mark.slow])
            for front in FRONTS
            if front not in marker.kwargs.get("but", ())
        ]
        metafunc.parametrize("front", fronts, indirect=True)


@pytest.fixture
def front(request: pytest.FixtureRequest) -> str:
    """How the pair's disks are served: over NBD, unless the test is marked `every_front`."""
    return str(getattr(request, "param", "nbd"))


@pytest.fixture
def make_pair(front: str) -> Iterator[Callable[..., Any]]:
    """Makes pairs of sites (`sites.Pair`), and leaves nothing of them behind. Their logs are
    printed at the end: pytest shows them when the test failed."""
    from sites import Pair

    made: list[Pair] = []

    def make(**options: Any) -> Pair:
        pair = Pair(**{"front": front, **options})
        made.append(pair)
        return pair

    try:
        yield make
    finally:
        for pair in made:
            pair.close()


@pytest.fixture
def libvirtd(tmp_path: Path) -> Iterator[str]:
    """A libvirt daemon in session mode; its URI."""
    if os.geteuid() != 0:
        pytest.skip("to run the daemon as another user needs root")
    root = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
    root.chmod(0o755)
    for name in ("run", "home"):
        (root / name).mkdir()
        os.chown(root / name, NOBODY, NOBODY)
    with (tmp_path / "libvirtd.log").open("wb") as log:
        daemon = subprocess.Popen(
            [
                "setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups",
                "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", f"HOME={root}/home",
                f"XDG_RUNTIME_DIR={root}/run", "libvirtd",
            ],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        socket = root / "run" / "libvirt" / "libvirt-sock"
        deadline = time.monotonic() + 30
        while not socket.exists():
            assert daemon.poll() is None, (tmp_path / "libvirtd.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield f"qemu+unix:///session?socket={socket}"
    finally:
        daemon.terminate()
        daemon.wait(30)
        subprocess.run(["rm", "-rf", root], check=True)


@pytest.fixture
def make_life(seed: int) -> Iterator[Callable[..., Any]]:
    """Makes worlds of sites between which a VM moves (`life.Life`)."""
    from life import Life

    made: list[Life] = []

    def make(**options: Any) -> Life:
        made.append(Life(seed, **options))
        return made[-1]

    yield make
    for life in made:
        life.close()
