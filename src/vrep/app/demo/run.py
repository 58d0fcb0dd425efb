"""The main job on real input: protect, kill the whole source site, recover at the other.

What is claimed is judged from outside: a guest prints each line on its console once the line
is fsynced, and the recovered disks are held against what the console said. Anything that is
not as it must be is a violation; violations end in exit code 1.
"""

from __future__ import annotations

import datetime
import json
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from vrep.app.demo.guest import Guest, GuestDisk, GuestTask, WitnessedLine
from vrep.app.demo.guest_check import check_disk, judge_lines
from vrep.app.demo.guest_disk import DiskContent, Manifest, build_disk
from vrep.app.demo.guest_image import GuestImage
from vrep.app.demo.nbd_client import NbdClient
from vrep.app.demo.sites import DemoError, DemoSite, Network
from vrep.recovery.history import format_time
from vrep.site import Site

GROUP: Final = "web"
DISK: Final = "root"
LABEL: Final = "before-upgrade"
LINES_BEFORE_CHECKPOINT: Final = 40
LOST_MS: Final = 1000
"""lines reported longer than this before the kill must be in the latest point"""
BLOCK: Final = 4096
SYNC_LIMIT_S: Final = 120.0
BOOT_LIMIT_S: Final = 300.0


@dataclass
class Recovery:
    """One recovered point and its verdict."""

    name: str
    point: str
    rto_ms: float
    lines: int
    lines_missing: int
    newest_line_age_ms: int
    """age, at the point, of the newest line that is there"""
    violations: list[str] = field(default_factory=list)


@dataclass
class Report:
    """Everything that the demonstration measured; becomes build/demo.json."""

    guest: str
    namespaces: bool = False
    kill_ms: int = 0
    processes_killed: int = 0
    lines_witnessed: int = 0
    first_sync_bytes_sent: int = 0
    bytes_written: int = 0
    """by the guest, once the first sync had ended"""
    bytes_sent: int = 0
    """from site to site for those"""
    first_sync_s: float = 0.0
    rpo_ms_seen: list[int] = field(default_factory=list)
    recoveries: list[Recovery] = field(default_factory=list)
    continued: str = ""
    seconds: float = 0.0
    violations: list[str] = field(default_factory=list)

    def all_violations(self) -> list[str]:
        found = list(self.violations)
        for recovery in self.recoveries:
            found += [f"{recovery.name}: {text}" for text in recovery.violations]
        return found


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


class Writer:
    """`--guest none`: numbered blocks written with FUA by an NBD client of ours, each noted
    here once it was acknowledged. It proves less than a guest: no filesystem, no QEMU."""

    def __init__(self, uri: str) -> None:
        self.witness: list[WitnessedLine] = []
        self._client = NbdClient(uri)

    def write(self, count: int, pause_s: float = 0.02) -> None:
        for _ in range(count):
            number = len(self.witness) + 1
            stamped_ms = time.time_ns() // 1_000_000
            text = f"L {number:010d} {stamped_ms:013d} ".encode()
            self._client.write(number * BLOCK, text.ljust(BLOCK, b"."), fua=True)
            now_ms = time.time_ns() // 1_000_000
            self.witness.append(WitnessedLine(number, stamped_ms, now_ms, time.monotonic()))
            time.sleep(pause_s)

    def close(self) -> None:
        self._client.close()


class Demo:
    """One run, step by step."""

    def __init__(self, guest: str, work: Path) -> None:
        self.report = Report(guest)
        self.work = work
        self.with_guest = guest == "qemu"
        self.network = Network()
        self.report.namespaces = self.network.isolated
        self.disk = work / "source-host" / "disk.raw"
        self.key_file = work / "safe" / "acme.key"
        self.guest: Guest | None = None
        self.writer: Writer | None = None
        self.kept: list[WitnessedLine] = []
        self.synced_written = 0
        self.manifest: Manifest | None = None
        self.image: GuestImage | None = None
        self.checkpoint_before_ms = 0
        self.checkpoint_after_ms = 0
        self.chosen_ms = 0
        self.a: DemoSite | None = None
        self.b: DemoSite | None = None

    def run(self) -> None:
        self.prepare()
        self.make_sites()
        self.first_sync()
        self.work_and_watch()
        self.disaster()
        self.recover()

    def close(self) -> None:
        if self.guest is not None:
            self.guest.kill9()
        for side in (self.a, self.b):
            if side is not None:
                side.stop()
        self.network.close()

    # ---- before ------------------------------------------------------------------

    def prepare(self) -> None:
        self.disk.parent.mkdir(parents=True)
        self.key_file.parent.mkdir()
        if self.with_guest:
            say("building the guest: Debian's cloud kernel, busybox, an ext4 disk with files")
            self.image = GuestImage.build()
            self.manifest = build_disk(self.disk, DiskContent(size=512 << 20))
        else:
            with self.disk.open("wb") as file:
                file.truncate(256 << 20)

    def make_sites(self) -> None:
        where = "two network namespaces" if self.network.isolated else "one host (loopback)"
        say(f"starting two sites in {where}")
        sites = {}
        for side, name in (("a", "paris"), ("b", "lyon")):
            root = self.work / ("source-host" if side == "a" else "target-host") / "site"
            root.parent.mkdir(exist_ok=True)
            site = Site.init(root, name=name, listen=self.network.listen(side))
            sites[side] = DemoSite(side, site, self.network)
            sites[side].start()
        self.a, self.b = sites["a"], sites["b"]
        self.wait("the target answers", lambda: self._served(self.require_b()), 30)
        token = self.b.call("site", "invite")["token"]
        self.a.call("site", "join", token)
        self.a.call("key", "create", "acme")
        self.a.call("key", "export", "acme", "--out", str(self.key_file))
        self.a.call("key", "verify", "acme", str(self.key_file))
        say("protecting the disk")
        disk = f"{DISK}=file:{self.disk}"
        self.a.call("protect", GROUP, "--disk", disk, "--to", "lyon", "--key", "acme")
        self.a.site.wait_served(GROUP)

    @staticmethod
    def _served(side: DemoSite) -> bool:
        roles = side.site.status()["roles"]
        return bool(roles["target"] and roles["filter"])

    def require_a(self) -> DemoSite:
        if self.a is None:
            raise DemoError("the source site was not made")
        return self.a

    def require_b(self) -> DemoSite:
        if self.b is None:
            raise DemoError("the target site was not made")
        return self.b

    def wait(self, what: str, test: Callable[[], bool], limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while not test():
            if time.monotonic() > deadline:
                raise DemoError(f"{what}: not within {limit_s:.0f} s")
            time.sleep(0.1)

    # ---- the guest works -------------------------------------------------------------

    def first_sync(self) -> None:
        """The guest boots at once: the first sync runs under its writes."""
        a = self.require_a()
        began = time.monotonic()
        uri = a.site.disk_uri(GROUP, DISK)
        if self.with_guest:
            assert self.image is not None
            say("booting the guest on the filter's disk, through virtio-scsi")
            disk = GuestDisk(uri)
            self.guest = Guest(self.image, [disk], GuestTask("workload"))
            self.guest.start()
            self.guest.wait_for_lines(3, BOOT_LIMIT_S)
        else:
            self.writer = Writer(uri)
            self.writer.write(10)

        def replicating() -> bool:
            self.show()
            status = a.group_status(GROUP)
            return status is not None and status["state"] == "replicating"

        self.wait("the first sync ends", replicating, SYNC_LIMIT_S)
        self.report.first_sync_s = round(time.monotonic() - began, 1)
        written, sent = self.traffic()
        self.synced_written, self.report.first_sync_bytes_sent = written, sent
        say(f"first sync done in {self.report.first_sync_s} s, under the guest's writes")

    def traffic(self) -> tuple[int, int]:
        """Bytes that the guest wrote, and bytes that the source sent, so far."""
        status = self.require_a().group_status(GROUP)
        if status is None:
            raise DemoError("the source site does not answer")
        return int(status["filter"]["write_bytes"]), int(status["targets"][0]["bytes_sent"])

    def witness(self) -> Sequence[WitnessedLine]:
        if self.guest is not None:
            return self.guest.witness
        assert self.writer is not None
        return self.writer.witness

    def more_lines(self, count: int) -> None:
        target = len(self.witness()) + count
        if self.guest is None:
            assert self.writer is not None
            self.writer.write(count)
            self.show()
            return
        deadline = time.monotonic() + 60
        while len(self.witness()) < target:
            self.show()
            if time.monotonic() > deadline:
                raise DemoError("the guest stopped writing lines")
            time.sleep(1.0)

    def show(self) -> None:
        """State, RPO and lag, live."""
        status = self.require_a().group_status(GROUP)
        if status is None:
            return
        target = status["targets"][0]
        if status["filter"] is None:  # nobody knows more
            say(f"{status['state']:<13} lines {len(self.witness())}")
            return
        if status["state"] == "replicating":
            self.report.rpo_ms_seen.append(int(target["rpo_ms"]))
        say(
            f"{status['state']:<13} RPO {target['rpo_ms']:>5} ms   "
            f"lag {(target['lag_bytes'] or 0) / 1024:>8.0f} KiB   "
            f"dirty {target['dirty_bytes'] / 1048576:>6.1f} MiB   lines {len(self.witness())}"
        )

    def work_and_watch(self) -> None:
        self.more_lines(LINES_BEFORE_CHECKPOINT)
        a = self.require_a()
        self.checkpoint_before_ms = time.time_ns() // 1_000_000
        a.call("checkpoint", GROUP, LABEL)
        self.checkpoint_after_ms = time.time_ns() // 1_000_000
        say(f"checkpoint {LABEL!r} taken at line {len(self.witness())}")
        self.more_lines(LINES_BEFORE_CHECKPOINT)
        self.chosen_ms = time.time_ns() // 1_000_000
        say(f"a moment to come back to: {format_time(self.chosen_ms * 1_000_000)}")
        self.more_lines(LINES_BEFORE_CHECKPOINT)
        time.sleep(random.uniform(0.0, 2.0))
        if self.guest is None:
            self.more_lines(random.randint(1, 30))

    # ---- the disaster ------------------------------------------------------------------

    def disaster(self) -> None:
        a = self.require_a()
        written, sent = self.traffic()
        self.report.bytes_written = written - self.synced_written
        self.report.bytes_sent = sent - self.report.first_sync_bytes_sent
        victims = "QEMU and of every process" if self.with_guest else "every process"
        say(f"kill -9 of {victims} of the source site")
        if self.guest is not None:
            self.guest.kill9()
        self.report.kill_ms = time.time_ns() // 1_000_000
        self.report.processes_killed = a.kill9()
        if self.writer is not None:
            self.writer.close()
        self.kept = list(self.witness())
        self.report.lines_witnessed = len(self.kept)
        shutil.rmtree(a.site.paths.run, ignore_errors=True)
        shutil.rmtree(a.site.paths.shm())
        shutil.rmtree(self.disk.parent)
        say(f"the source is gone ({self.disk.parent.name} deleted); left is {self.key_file.name}")
        self.guest = None

    # ---- recovery ----------------------------------------------------------------------

    def recover(self) -> None:
        b = self.require_b()
        witness = self.kept
        b.call("key", "import", str(self.key_file))
        points = b.call("points", GROUP)
        say(f"recovery points: {points['oldest']['time']} to {points['newest']['time']}")
        self.recover_test("checkpoint", LABEL, witness)
        self.recover_test("chosen second", format_time(self.chosen_ms * 1_000_000), witness)
        self.recover_latest(witness)

    def start_view(self, *command: str) -> tuple[str, float]:
        """Run a recovery command; the disk's URI and ms from exec to the first mapped block."""
        b = self.require_b()
        began = time.monotonic()
        answer = b.call(*command)
        uri = str(answer["disks"][0]["uri"])
        with NbdClient(uri) as client:
            first = client.read(BLOCK if not self.with_guest else 1024, BLOCK)
        rto_ms = (time.monotonic() - began) * 1000
        if not any(first):
            self.report.violations.append(f"{command[0]}: the first mapped block reads as zeroes")
        return uri, round(rto_ms, 1)

    def recover_test(self, name: str, at: str, witness: Sequence[WitnessedLine]) -> None:
        uri, rto_ms = self.start_view("test", "start", GROUP, "--at", at)
        before_ms, limit_ms = self.chosen_ms, self.chosen_ms
        if name == "checkpoint":
            before_ms, limit_ms = self.checkpoint_before_ms, self.checkpoint_after_ms
        # Times are cut to whole ms: of a line in the same ms nobody knows the side.
        demanded_ms = before_ms - 1
        self.judge(name, at, uri, rto_ms, witness, demanded_ms, limit_ms, tolerance_ms=0)
        self.require_b().call("test", "stop", GROUP)

    def recover_latest(self, witness: Sequence[WitnessedLine]) -> None:
        # The demonstration knows that the site is dead: it need not wait for its silence.
        uri, rto_ms = self.start_view("failover", "start", GROUP, "--force")
        kill_ms = self.report.kill_ms
        recovery = self.judge(
            "latest", "latest", uri, rto_ms, witness, kill_ms, kill_ms, tolerance_ms=LOST_MS
        )
        if not self.with_guest:
            return
        assert self.image is not None
        say("booting a second guest from the recovered disk")
        task = GuestTask("verify,continue", lines=20)
        with Guest(self.image, [GuestDisk(uri)], task) as guest:
            verified = guest.wait_for(r"^VERIFY ", BOOT_LIMIT_S)
            continued = guest.wait_for(r"^CONTINUED from ", BOOT_LIMIT_S)
            guest.wait_for(r"^POWEROFF", BOOT_LIMIT_S)
            guest.wait_exit(30)
        self.report.continued = continued.text
        if not verified.text.startswith("VERIFY ok"):
            recovery.violations.append(f"the second guest says: {verified.text}")
        if continued.text != f"CONTINUED from {recovery.lines}":
            recovery.violations.append(f"{continued.text}, but the disk holds {recovery.lines}")
        self.require_b().call("failover", "commit", GROUP)
        say(f"the second guest {continued.text.lower()} and went on; failover committed")

    def judge(
        self,
        name: str,
        point: str,
        uri: str,
        rto_ms: float,
        witness: Sequence[WitnessedLine],
        demanded_ms: int,
        limit_ms: int,
        *,
        tolerance_ms: int,
    ) -> Recovery:
        judge = self.judge_guest if self.with_guest else self.judge_blocks
        numbers, violations = judge(uri, witness, demanded_ms, limit_ms, tolerance_ms)
        reported = [line for line in witness if line.arrived_ms <= demanded_ms]
        missing = [line for line in reported if line.number not in numbers]
        present = [line for line in reported if line.number in numbers]
        newest = max((line.arrived_ms for line in present), default=0)
        age_ms = demanded_ms - newest if missing and newest else 0
        recovery = Recovery(name, point, rto_ms, len(numbers), len(missing), age_ms, violations)
        self.report.recoveries.append(recovery)
        verdict = "; ".join(violations) if violations else "as it must be"
        say(f"{name}: first block after {rto_ms:.0f} ms, {len(numbers)} lines, {verdict}")
        return recovery

    def judge_guest(
        self,
        uri: str,
        witness: Sequence[WitnessedLine],
        demanded_ms: int,
        limit_ms: int,
        tolerance_ms: int,
    ) -> tuple[frozenset[int], list[str]]:
        assert self.manifest is not None
        check = check_disk(uri, self.manifest)
        must = judge_lines(check.log, witness, point_ms=demanded_ms, tolerance_ms=tolerance_ms)
        must_not = judge_lines(check.log, witness, point_ms=limit_ms, tolerance_ms=tolerance_ms)
        violations = check.violations()
        if must.missing:
            violations.append(f"{len(must.missing)} lines lost, first {must.missing[0]}")
        if must_not.beyond:
            violations.append(f"{len(must_not.beyond)} lines from after the point")
        if must.contradicted:
            violations.append(f"{len(must.contradicted)} lines differ from the witnessed")
        return check.log.numbers, violations

    def judge_blocks(
        self,
        uri: str,
        witness: Sequence[WitnessedLine],
        demanded_ms: int,
        limit_ms: int,
        tolerance_ms: int,
    ) -> tuple[frozenset[int], list[str]]:
        numbers, violations = set(), []
        with NbdClient(uri) as client:
            for line in witness:
                block = client.read(line.number * BLOCK, BLOCK)
                text = f"L {line.number:010d} {line.stamped_ms:013d} ".encode()
                if block == text.ljust(BLOCK, b"."):
                    numbers.add(line.number)
                    if line.stamped_ms > limit_ms:
                        violations.append(f"block {line.number} is from after the point")
                elif any(block):
                    violations.append(f"block {line.number} has another content")
                elif line.arrived_ms <= demanded_ms - tolerance_ms:
                    violations.append(f"block {line.number} is lost")
        return frozenset(numbers), violations


def table(report: Report) -> str:
    """The closing table, as text."""
    rows = [("point", "RTO ms", "lines", "lines lost", "RPO ms", "verdict")]
    for one in report.recoveries:
        verdict = "good" if not one.violations else f"{len(one.violations)} violations"
        rows.append(
            (
                one.name,
                f"{one.rto_ms:.0f}",
                str(one.lines),
                str(one.lines_missing),
                str(one.newest_line_age_ms),
                verdict,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    if report.bytes_written:
        ratio = report.bytes_sent / report.bytes_written
        lines.append(
            f"bytes sent / bytes written: {ratio:.3f} "
            f"({report.bytes_sent / 1048576:.1f} / {report.bytes_written / 1048576:.1f} MiB), "
            f"after a first sync of {report.first_sync_bytes_sent / 1048576:.1f} MiB"
        )
    if report.rpo_ms_seen:
        seen = sorted(report.rpo_ms_seen)
        lines.append(
            f"RPO seen while replicating: median {seen[len(seen) // 2]} ms, max {seen[-1]} ms"
        )
    return "\n".join(lines)


def as_json(report: Report) -> dict[str, Any]:
    from dataclasses import asdict

    answer = asdict(report)
    answer["violations"] = report.all_violations()
    answer["finished"] = datetime.datetime.now(datetime.UTC).isoformat()
    return answer


def run_demo(guest: str, *, out: str, keep: bool) -> int:
    """The whole demonstration; its exit code."""
    began = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="vrep-demo-"))
    demo = Demo(guest, work)
    report = demo.report
    try:
        demo.run()
    except (DemoError, subprocess.SubprocessError) as error:
        report.violations.append(f"the demonstration broke off: {error}")
    finally:
        demo.close()
        if not keep:
            shutil.rmtree(work, ignore_errors=True)
    report.seconds = round(time.monotonic() - began, 1)
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(as_json(report), indent=2) + "\n")
    print()
    print(table(report))
    violations = report.all_violations()
    for text in violations:
        print(f"VIOLATION: {text}")
    print(f"{report.seconds} s; details in {path}" + (f"; files kept in {work}" if keep else ""))
    if violations or len(report.recoveries) < 3:
        return 1
    return 0 if guest == "qemu" else 3


__all__ = ["Demo", "Report", "run_demo"]
