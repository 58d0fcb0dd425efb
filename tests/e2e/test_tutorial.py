"""The tutorial's commands, as they stand on the page, in one shell."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from sites import free_port

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorial" / "two-sites.md"
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.e2e
def test_the_tutorial_does_what_it_says() -> None:
    script = "\n".join(BLOCK.findall(PAGE.read_text()))
    assert script.count("vrep ") > 15
    script = script.replace("127.0.0.1:9440", f"127.0.0.1:{free_port()}")
    assert "9440" not in script
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory(prefix="vrep-tutorial-") as work:
        shell = subprocess.Popen(
            ["bash", "-c", "set -em\n" + script],
            cwd=work,
            env={**os.environ, "PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = shell.communicate(timeout=300)
        finally:
            shell.kill()
            end_all(Path(work))
    print(output)
    assert shell.returncode == 0
    assert "checkpoint good" in output
    assert "verification failed" not in output
    assert "committed" in output
    assert "root.raw" in output


def end_all(work: Path) -> None:
    """Kill what the page left running, the failed-over disk among it, until it is gone."""
    while left := left_of(work):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def left_of(work: Path) -> list[int]:
    """The processes of vrep that name a directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes()
                if os.fsencode(work) in words and b"vrep" in words:
                    found.append(int(entry.name))
    return found
