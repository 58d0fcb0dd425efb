"""Native lines in the log of a role: JSON like all others, whatever they say."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SERVE = """
import sys
from pathlib import Path
from vrep._core import log
from vrep._core.filter import Disk, Group
from vrep._core.serve import Server
from vrep.app.demo.nbd_client import NbdClient

log.setup("info", json=sys.argv[2] == "json")
place = Path(sys.argv[1])
(place / "disk").write_bytes(bytes(1 << 20))
name = 'a"b\\\\c'
with Group([Disk(name, f"file:{place / 'disk'}")], group_id=bytes(16), tap=False) as group:
    server = Server(group, unix_path=place / "nbd.sock")
    server.start()
    NbdClient(f"nbd+unix:///?socket={place / 'nbd.sock'}").close()
    server.stop()
"""


@pytest.mark.parametrize("form", ["json", "text"])
def test_native_lines_take_the_form_of_the_log(tmp_path: object, form: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SERVE, str(tmp_path), form],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in done.stderr.splitlines() if "serves disk" in line]
    assert lines, done.stderr
    if form == "text":
        assert lines[0].startswith("vrep info nbd: ")
        return
    record = json.loads(lines[0])
    assert record["logger"] == "vrep.native.nbd"
    assert record["level"] == "info"
    assert 'a"b\\c' in record["event"]
    assert record["timestamp"].endswith("Z")
