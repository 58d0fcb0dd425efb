"""SCSI conformance: libiscsi's suites against vrep and Debian's tgt, in one run.

    python tests/conformance/run.py [--only SUITE]... [--out build/conformance.json]

Each suite runs alone, with a time limit; tests about ejecting and write protection run on other
units of each target, whose medium is removable, or cannot be written. Rows are
``{target, suite, test, result}`` with the result ``pass``, ``fail``, ``skip`` or ``timeout``. Ends
with 1 when vrep passes fewer tests than tgt, fails more, or fails one that
docs/reference/scsi.md does not explain. tgt needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vrep._core.filter import Disk, Group
from vrep._core.serve import Iscsi, Server

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "docs" / "reference" / "scsi.md"
NAME = "iqn.2026-01.invalid.vrep:conformance"
GROUP_ID = bytes(range(16))
DISK_BYTES = 256 << 20
SUITE_S = 120
TGT_CONTROL = "79"
ELSEWHERE = {
    "NoMedia": ("removable", "NoMedia"),
    "PreventAllow": ("removable", "PreventAllow"),
    "ReadOnly": ("protected", "ReadOnly"),
    "StartStopUnit": ("removable", "StartStopUnit.Simple"),
}
"""of a suite: what is run on another unit than the usual one"""
TEST = re.compile(r"^  Test: (\S+) \.\.\.", re.MULTILINE)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_image(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(DISK_BYTES)
    return path


@contextmanager
def vrep_group(folder: Path, names: tuple[str, ...], *, writable: bool) -> Iterator[str]:
    """Disks as in production, replicated if they can be written; the target's URL."""
    shm, state = folder / "shm", folder / "state"
    shm.mkdir(parents=True)
    state.mkdir()
    group = Group(
        [Disk(name, f"file:{make_image(folder / name)}") for name in names],
        group_id=GROUP_ID, shm_dir=shm, state_dir=state, tap=writable, read_only=not writable,
    )  # fmt: skip
    iscsi = Iscsi(
        group_id=GROUP_ID, disks=names, host="127.0.0.1", port=0, target=NAME,
        reservations=str(state), removable=tuple(name for name in names if name == "removable"),
    )  # fmt: skip
    server = Server(group, iscsi=iscsi)
    server.start()
    try:
        yield f"iscsi://127.0.0.1:{server.iscsi_port}/{NAME}"
    finally:
        server.stop()
        group.close()


@contextmanager
def vrep_target(folder: Path) -> Iterator[dict[str, str]]:
    """The URLs of its units."""
    with (
        vrep_group(folder / "a", ("usual", "removable"), writable=True) as url,
        vrep_group(folder / "b", ("protected",), writable=False) as protected,
    ):
        yield {"usual": f"{url}/0", "removable": f"{url}/1", "protected": f"{protected}/0"}


def tgtadm(*arguments: str) -> None:
    command = ["tgtadm", "-C", TGT_CONTROL, "--lld", "iscsi", *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True)


@contextmanager
def tgt_target(folder: Path) -> Iterator[dict[str, str]]:
    """Debian's tgt as it is installed, over files; the URLs of its units."""
    port = free_port()
    daemon = subprocess.Popen(
        ["tgtd", "-f", "-C", TGT_CONTROL, "--iscsi", f"portal=127.0.0.1:{port}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                tgtadm("--op", "new", "--mode", "target", "--tid", "1", "-T", NAME)
                break
            except subprocess.CalledProcessError:
                if time.monotonic() > deadline or daemon.poll() is not None:
                    raise
                time.sleep(0.2)
        unit = ["--mode", "logicalunit", "--tid", "1", "--lun"]
        for lun in ("1", "2", "3"):
            tgtadm("--op", "new", *unit, lun, "-b", str(make_image(folder / f"tgt.{lun}")))
        tgtadm("--op", "update", *unit, "2", "--params", "removable=1")
        tgtadm("--op", "update", *unit, "3", "--params", "readonly=1")
        tgtadm("--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL")
        url = f"iscsi://127.0.0.1:{port}/{NAME}"
        yield {"usual": f"{url}/1", "removable": f"{url}/2", "protected": f"{url}/3"}
    finally:
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def suites() -> list[str]:
    done = subprocess.run(["iscsi-test-cu", "--list"], capture_output=True, text=True, check=True)
    return re.findall(r"^ALL\.(\w+)$", done.stdout, re.MULTILINE)


def tests_of(suite: str) -> list[str]:
    done = subprocess.run(["iscsi-test-cu", "--list"], capture_output=True, text=True, check=True)
    return re.findall(rf"^ALL\.{suite}\.(\S+)$", done.stdout, re.MULTILINE)


def verdicts(log: str) -> dict[str, str]:
    """What the log of a suite says of each test."""
    found = {}
    marks = list(TEST.finditer(log))
    for mark, after in zip(marks, [*marks[1:], None], strict=True):
        text = log[mark.end() : after.start() if after is not None else None]
        end = re.search(r"^(passed|FAILED)\b", text, re.MULTILINE)
        if end is None:
            found[mark[1]] = "timeout"
        elif end[1] == "FAILED":
            found[mark[1]] = "fail"
        else:
            found[mark[1]] = "skip" if "[SKIPPED]" in text[: end.end()] else "pass"
    return found


def run_tests(url: str, which: str) -> str:
    """What iscsi-test-cu says of a suite, or of one test."""
    command = ["iscsi-test-cu", "--dataloss", "--allow-sanitize", "-v", "-t", f"ALL.{which}", url]
    if which == "MultipathIO":
        command.append(url)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=SUITE_S, check=False
        )
        return done.stdout
    except subprocess.TimeoutExpired as error:
        out = error.stdout or b""
        return out if isinstance(out, str) else out.decode(errors="replace")


def run_suite(units: dict[str, str], suite: str) -> tuple[dict[str, str], str]:
    log = run_tests(units["usual"], suite)
    found = verdicts(log)
    if suite in ELSEWHERE:
        unit, which = ELSEWHERE[suite]
        more = run_tests(units[unit], which)
        found |= verdicts(more)
        log += more
    return {test: found.get(test, "timeout") for test in tests_of(suite)}, log


def explained(suite: str, test: str) -> bool:
    return f"`{suite}.{test}`" in REFERENCE.read_text()


def judge(rows: list[dict[str, str]]) -> list[str]:
    """What is not as it must be."""
    counts = {
        target: Counter(row["result"] for row in rows if row["target"] == target)
        for target in ("vrep", "tgt")
    }
    bad = [
        f"vrep: {row['suite']}.{row['test']} is {row['result']}, and nobody says why"
        for row in rows
        if row["target"] == "vrep"
        and row["result"] in {"fail", "timeout"}
        and not explained(row["suite"], row["test"])
    ]
    if counts["tgt"]:
        if counts["vrep"]["pass"] <= counts["tgt"]["pass"]:
            bad.append("vrep passes no more tests than tgt")
        ours, theirs = (counts[t]["fail"] + counts[t]["timeout"] for t in ("vrep", "tgt"))
        if ours >= theirs:
            bad.append("vrep fails no fewer tests than tgt")
    for target, count in counts.items():
        print(
            f"{target:5} "
            + ", ".join(f"{count[k]} {k}" for k in ("pass", "fail", "timeout", "skip"))
        )
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", metavar="SUITE")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "conformance.json")
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "conformance")
    options = parser.parse_args()
    missing = [tool for tool in ("iscsi-test-cu", "tgtd") if shutil.which(tool) is None]
    if missing:
        print(f"{' and '.join(missing)} missing: install the [test] packages")
        return 2
    rows = []
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="vrep-conformance-", dir=base) as name:
        folder = Path(name)
        for target, serve in (("vrep", vrep_target), ("tgt", tgt_target)):
            logs = options.logs / target
            logs.mkdir(parents=True, exist_ok=True)
            with serve(folder) as units:
                for suite in options.only or suites():
                    found, log = run_suite(units, suite)
                    (logs / f"{suite}.log").write_text(log)
                    for test, result in found.items():
                        rows.append(
                            {"target": target, "suite": suite, "test": test, "result": result}
                        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=1) + "\n")
    bad = judge(rows)
    print("\n".join(bad) or f"conformance: as it must be; {options.out}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
