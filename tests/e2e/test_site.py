"""Two sites on one host, through the command line only: protect, recover, fail over."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sites import free_port

pytestmark = pytest.mark.e2e

LIMIT_S = 120.0
DISK_BYTES = 64 << 20
MIB = 1 << 20
F_OFD_SETLK = 37


class CommandError(AssertionError):
    """A command that failed, with what it said."""

    def __init__(self, code: int, error: dict[str, Any]) -> None:
        super().__init__(f"exit code {code}: {error}")
        self.code = code
        self.error = error


class OneSite:
    """A site, driven as an operator would."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log_path = root.with_suffix(".log")
        self.process: subprocess.Popen[bytes] | None = None

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "vrep.app.cli", *arguments, "--dir", str(self.root)]

    def vrep(self, *arguments: str) -> Any:
        """The JSON answer of a command."""
        done = subprocess.run(
            self.command(*arguments, "--json"), capture_output=True, timeout=LIMIT_S, check=False
        )
        if done.returncode != 0:
            text = done.stderr.decode().strip().splitlines()
            assert "Traceback" not in done.stderr.decode()
            raise CommandError(done.returncode, json.loads(text[-1])["error"])
        return json.loads(done.stdout)

    def start(self, *, wait: bool = True) -> None:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.command("run"), stdin=subprocess.DEVNULL, stderr=log, start_new_session=True
            )
        if wait:
            wait_for(lambda: all(self.vrep("status")["roles"].values()), "all roles answer")

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(LIMIT_S)
        self.process = None
        return status

    def pids(self) -> list[int]:
        """Every process that names this site's directory."""
        name, found = os.fsencode(self.root), []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if name in (entry / "cmdline").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found

    def kill(self) -> None:
        """kill -9 of everything."""
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        if self.process is not None:
            self.process.wait()
            self.process = None

    def group(self, name: str = "web") -> dict[str, Any]:
        found = self.vrep("status", name)["groups"]
        assert isinstance(found, dict)
        return dict(found[name])


def wait_for(test: Any, what: str, limit_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    last = "never true"
    while True:
        try:
            if test():
                return
        except CommandError as error:
            last = str(error)
        assert time.monotonic() < deadline, f"{what}: {last}"
        time.sleep(0.1)


def io(uri: str, *commands: str) -> str:
    """Run qemu-io commands on an NBD export."""
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(
        ["qemu-io", "-f", "raw", *words, uri],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verification failed" not in done.stdout
    return done.stdout


def content(uri: str, where: Path) -> bytes:
    """Everything on an NBD export."""
    where.unlink(missing_ok=True)
    subprocess.run(["nbdcopy", uri, str(where)], check=True, timeout=120)
    return where.read_bytes()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Pair:
    """A source and a target, and a disk that is protected from one to the other."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.west, self.east = OneSite(base / "west"), OneSite(base / "east")
        self.disk = base / "disk.raw"
        self.port = free_port()
        self.key_file = base / "acme.key"

    def set_up(self) -> None:
        self.east.vrep("site", "init", "--name", "east", "--listen", f"127.0.0.1:{self.port}")
        self.west.vrep("site", "init", "--name", "west")
        config = self.west.root / "config.toml"
        self.metrics_port = free_port()
        config.write_text(f'[metrics]\nlisten = "127.0.0.1:{self.metrics_port}"\n')
        self.east.start()
        token = self.east.vrep("site", "invite")["token"]
        assert self.west.vrep("site", "join", token)["name"] == "east"
        self.west.vrep("key", "create", "acme")
        self.west.vrep("key", "export", "acme", "--out", str(self.key_file))
        self.west.vrep("key", "verify", "acme", str(self.key_file))
        with self.disk.open("wb") as file:
            file.write(os.urandom(3 * MIB))
            file.truncate(DISK_BYTES)
        self.west.start()

    def protect(self) -> str:
        """Protect the disk and wait for the first sync; its NBD address."""
        answer = self.west.vrep(
            "protect", "web", "--disk", f"root=file:{self.disk}", "--to", "east", "--key", "acme",
            "--ring", "32M", "--wait",
        )  # fmt: skip
        return str(answer["disks"]["root"])

    def settle(self) -> None:
        """Until everything that was written is durable at the target."""

        def settled() -> bool:
            group = self.west.group()
            target = group["targets"][0]
            return (
                group["state"] == "replicating"
                and target["rpo_ms"] == 0
                and target["durable_seq"] == target["seq"]
            )

        wait_for(settled, "everything is durable at the target")

    def close(self) -> None:
        for site in (self.west, self.east):
            site.kill()


@pytest.fixture
def pair() -> Iterator[Pair]:
    with tempfile.TemporaryDirectory(prefix="vrep-e2e-") as name:
        pair = Pair(Path(name))
        try:
            pair.set_up()
            yield pair
        except BaseException:
            for site in (pair.west, pair.east):
                if site.log_path.exists():
                    print(f"--- {site.log_path.name}\n{site.log_path.read_text()}")
            raise
        finally:
            pair.close()


def test_a_disk_is_recovered_at_a_checkpoint_while_replication_goes_on(pair: Pair) -> None:
    uri = pair.protect()
    io(uri, "write -P 0x11 1M 1M", "write -z 2M 64k", "write -P 0x12 40000000 12345", "flush")
    assert pair.west.vrep("checkpoint", "web", "before", "--wait")["durable"]
    before = pair.disk.read_bytes()
    io(uri, "write -P 0x22 1M 2M", "discard 8M 1M", "flush")
    pair.settle()
    after = pair.disk.read_bytes()
    assert digest(before) != digest(after)

    blind = pair.east.vrep("points", "web")
    assert not blind["key_held"]
    assert [mark["label"] for mark in blind["marks"]] == [None]
    with pytest.raises(CommandError) as refused:
        pair.east.vrep("test", "start", "web")
    assert refused.value.code == 46

    pair.east.vrep("key", "import", str(pair.key_file))
    points = pair.east.vrep("points", "web")
    assert points["verdict"]["whole"]
    assert [mark["label"] for mark in points["marks"]] == ["before"]

    view = pair.east.vrep("test", "start", "web", "--at", "before")
    served = view["disks"][0]["uri"]
    assert digest(content(served, pair.base / "view.raw")) == digest(before)
    io(served, "write -P 0x77 0 1M", "flush", "read -P 0x77 0 1M")
    assert [one["id"] for one in pair.east.vrep("test", "list")["views"]] == [view["id"]]
    # A source that was not heard for a moment is another condition.
    wait_for(lambda: pair.east.group()["conditions"] == ["testing"], "only a test is shown")
    wait_for(lambda: pair.east.vrep("status", "--check")["verdict"] == "well", "all is well")

    io(uri, "write -P 0x33 5M 256k", "flush")  # replication has not been touched
    pair.settle()
    newest = pair.disk.read_bytes()
    pair.east.vrep("test", "stop", "web")
    assert pair.east.vrep("test", "list")["views"] == []
    wait_for(lambda: pair.east.group()["conditions"] == [], "the test is over")

    for point, expected in (("before", before), ("latest", newest)):
        for format_ in ("raw", "qcow2"):
            out = pair.base / f"{point}-{format_}"
            result = pair.east.vrep(
                "export", "web", "--at", point, "--out", str(out), "--format", format_
            )
            path = Path(result["disks"][0]["path"])
            raw = path
            if format_ == "qcow2":
                raw = out / "back.raw"
                subprocess.run(["qemu-img", "convert", "-O", "raw", path, raw], check=True)
            assert digest(raw.read_bytes()) == digest(expected)
    assert pair.west.stop() == 0
    assert pair.east.stop() == 0


def test_a_failover_serves_the_disk_and_fences_the_old_source(pair: Pair) -> None:
    uri = pair.protect()
    io(uri, "write -P 0x41 0 4M", "flush")
    pair.settle()
    expected = pair.disk.read_bytes()
    pair.east.vrep("key", "import", str(pair.key_file))

    with qemu_holds(uri):
        # A report that there is none may be under way when it connects.
        wait_for(
            lambda: pair.east.group().get("source", {}).get("guest_clients"),
            "the target heard of a VM",
        )
        with pytest.raises(CommandError) as refused:
            pair.east.vrep("failover", "start", "web")
        assert refused.value.code == 27
        # With its VM: where the last report says that there is none, the command waits for another
        # one, and on a slow host until the source counts as gone.
        pair.west.kill()
    with pytest.raises(CommandError) as refused:  # it may only be cut off
        pair.east.vrep("failover", "start", "web")
    assert refused.value.code == 27
    assert "--force" in refused.value.error["text"]
    views: list[Any] = []
    wait_for(
        lambda: views.append(pair.east.vrep("failover", "start", "web")) or views,
        "the source was silent for long",
    )
    [view] = views
    served = view["disks"][0]["uri"]
    assert digest(content(served, pair.base / "view.raw")) == digest(expected)
    io(served, "write -P 0x42 0 1M", "flush")
    assert pair.east.vrep("failover", "commit", "web")["state"] == "committed"

    pair.west.start()
    wait_for(lambda: "fenced" in pair.west.group()["conditions"], "the old source is fenced")
    assert pair.west.group()["state"] == "failed-over"
    io(uri, "write -P 0x43 0 64k", "flush")  # its VM's I/O goes on
    io(served, "read -P 0x42 0 1M")

    dead = pair.east.vrep("test", "list")["views"][0]["pid"]
    os.kill(dead, signal.SIGKILL)  # the process of the recovered disk alone

    def answers(but: int | None = None) -> bool:
        """By a process that says how far it has filled: one that runs may not listen yet."""
        one = pair.east.vrep("test", "list")["views"][0]
        return bool(one["running"] and one["fill"]) and one["pid"] != but

    wait_for(lambda: answers(dead), "vrep run serves it again")
    io(served, "read -P 0x42 0 1M")

    pair.east.kill()  # the host of the recovered disk goes down and comes back
    pair.east.start()
    wait_for(answers, "the view is back")
    io(served, "read -P 0x42 0 1M", "read -P 0x41 1M 3M")


def test_a_rolled_back_failover_lets_the_source_go_on(pair: Pair) -> None:
    uri = pair.protect()
    io(uri, "write -P 0x51 0 1M", "flush")
    pair.settle()
    pair.east.vrep("key", "import", str(pair.key_file))
    view = pair.east.vrep("failover", "start", "web", "--force")
    io(view["disks"][0]["uri"], "write -P 0x52 0 1M", "flush")
    pair.east.vrep("failover", "rollback", "web")
    assert pair.east.vrep("test", "list")["views"] == []
    io(uri, "write -P 0x53 1M 1M", "flush")
    pair.settle()
    out = pair.base / "out"
    result = pair.east.vrep("export", "web", "--out", str(out))
    assert digest(Path(result["disks"][0]["path"]).read_bytes()) == digest(pair.disk.read_bytes())


def test_a_killed_appliance_and_a_killed_target_cost_nothing(pair: Pair) -> None:
    uri = pair.protect()
    for number, (site, role) in enumerate(
        ((pair.west, "source"), (pair.east, "target"), (pair.west, "filter"))
    ):
        io(uri, f"write -P {0x61 + number} {number}M 1M")
        victims = [pid for pid in site.pids() if is_role(pid, role)]
        assert victims
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        if role == "filter":
            wait_for(lambda: is_served(pair.west), "the filter is back")
        io(uri, f"write -P {0x71 + number} {number + 8}M 1M", "flush")
        pair.settle()
    pair.east.vrep("key", "import", str(pair.key_file))
    result = pair.east.vrep("export", "web", "--out", str(pair.base / "out"))
    assert digest(Path(result["disks"][0]["path"]).read_bytes()) == digest(pair.disk.read_bytes())
    assert result["verdict"]["whole"]


def test_a_killed_supervisor_leaves_its_roles_to_the_next(pair: Pair) -> None:
    uri = pair.protect()
    assert pair.west.process is not None
    second = subprocess.run(
        pair.west.command("run"), capture_output=True, timeout=LIMIT_S, check=False
    )
    assert second.returncode == 23  # one supervisor a site
    roles = set(pair.west.pids()) - {pair.west.process.pid}
    assert len(roles) == 3
    pair.west.process.kill()
    pair.west.process.wait()
    io(uri, "write -P 0x21 0 1M", "flush")
    pair.settle()
    pair.west.start()
    assert set(pair.west.pids()) - {pair.west.process.pid} == roles
    victim = next(pid for pid in roles if is_role(pid, "source"))
    os.kill(victim, signal.SIGKILL)
    io(uri, "write -P 0x22 1M 1M", "flush")
    pair.settle()
    replaced = set(pair.west.pids()) - {pair.west.process.pid}
    assert len(replaced) == 3
    assert victim not in replaced
    assert pair.west.stop() == 0
    assert pair.west.pids() == []


def test_status_and_metrics_say_how_a_group_is(pair: Pair) -> None:
    uri = pair.protect()
    io(uri, "write -P 0x31 0 1M", "flush")
    pair.settle()
    check = pair.west.vrep("status", "--check")
    assert (check["verdict"], check["reasons"]) == ("well", [])
    text = metrics(pair)
    assert 'vrep_group_state{group="web",role="source",state="replicating"} 1.0' in text
    assert 'vrep_target_rpo_seconds{group="web",target="east"} 0.0' in text
    sent = re.search(r"vrep_target_sent_bytes_total\{[^}]*\} (\S+)", text)
    assert sent is not None
    assert float(sent[1]) > 3 * MIB  # the random start of the disk does not compress

    pair.west.vrep("pause", "web")
    wait_for(lambda: pair.west.group()["state"] == "paused", "paused")
    paused = subprocess.run(
        pair.west.command("status", "--check"), capture_output=True, check=False
    )
    assert paused.returncode in (1, 2)
    assert b"paused" in paused.stdout
    io(uri, "write -P 0x32 0 1M", "flush")
    assert pair.west.group()["targets"][0]["dirty_bytes"] >= MIB
    pair.west.vrep("resume", "web")
    pair.settle()

    assert pair.west.vrep("unprotect", "web")["target_not_told"] == ""
    assert pair.west.vrep("status")["groups"] == {}
    assert pair.east.group()["conditions"] == ["unprotected"]
    pair.east.vrep("status", "--check")
    pair.east.vrep("key", "import", str(pair.key_file))
    assert pair.east.vrep("points", "web")["newest"] is not None
    pair.east.vrep("unprotect", "web", "--delete-history")
    assert pair.east.vrep("status")["groups"] == {}
    assert not list((pair.east.root / "store").iterdir())


def test_a_group_that_never_reached_the_target_is_removed_with_its_history(pair: Pair) -> None:
    with pair.disk.open("r+b") as held:
        # As QEMU holds an image: the filter cannot serve it, so the target never hears of it.
        fcntl.fcntl(held, F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 100, 101, 0))
        pair.west.vrep(
            "protect", "web", "--disk", f"root=file:{pair.disk}", "--to", "east", "--key", "acme"
        )
        wait_for(lambda: str(pair.disk) in (pair.west.group()["error"] or ""), "the disk is named")
        pair.west.vrep("unprotect", "web", "--delete-history")
    assert pair.west.vrep("status")["groups"] == {}


def metrics(pair: Pair) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{pair.metrics_port}/metrics") as answer:
        text = answer.read().decode()
    assert isinstance(text, str)
    return text


def is_role(pid: int, role: str) -> bool:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return b"vrep.app.daemon" in words and role.encode() in words
    return False


def is_served(site: OneSite) -> bool:
    group = site.group()
    return group["filter"] is not None


@contextlib.contextmanager
def qemu_holds(uri: str) -> Iterator[None]:
    """A client that stays connected, as a running VM's disk does."""
    client = subprocess.Popen(
        ["qemu-io", "-f", "raw", uri], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        client.communicate(b"quit\n", timeout=LIMIT_S)
