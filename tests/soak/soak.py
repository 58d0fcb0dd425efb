"""Hours of load with faults: `make soak MINUTES=60`.

Two sites on this host run as real processes, with a link between them that is spoilt. Two clients
write two disks of a group all the while; where QEMU runs, a Linux guest writes a third. The history
is folded to a window of `WINDOW_S`. Faults come at random, by a printed seed:

- the first two thirds: kill -9 of each process, of a site, of both; a full disk at the target; a
  load that overflows ring and spill; and all that a link can do;
- then only what restarts no process, so that memory, descriptors and threads of one life are seen;
- clocks are left alone.

Meanwhile marks that were kept are recovered and compared with what the clients know, and `verify`
reads the whole store. Zero violations are allowed. `build/soak.json` has the figures; the exit
status is 1 when anything is not as it must be.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "e2e"), str(Path(__file__).resolve().parent)]

from sites import GROUP, MIB, Pair, wait_until  # noqa: E402
from soak_gauges import Gauges, Row  # noqa: E402
from soak_load import Mark, Marks, Writer, hashes  # noqa: E402

from vrep import errors  # noqa: E402
from vrep.app.demo.guest import Guest, GuestDisk, GuestTask  # noqa: E402
from vrep.app.demo.guest_check import check_disk, judge_lines  # noqa: E402
from vrep.app.demo.guest_disk import DiskContent, build_disk  # noqa: E402
from vrep.app.demo.guest_image import GuestImage  # noqa: E402
from vrep.recovery.verify import VerifyOptions  # noqa: E402

RESULTS: Final = ROOT / "build" / "soak.json"
DISKS: Final = {"root": 16 * MIB, "data": 8 * MIB}
GUEST: Final = DiskContent(
    size=96 << 20,
    small_files=20,
    small_size_max=16 << 10,
    text_files=5,
    text_size_max=32 << 10,
    big_files=1,
    big_size=1 << 20,
)
WINDOW_S: Final = 60
STORE_BYTES: Final = 2048 * MIB
WAITED_S_MAX: Final = 10.0
"""of a client whose connection stayed: the guest never waits for a target or a link"""
WARM: Final = 0.2
STORM: Final = 0.65
CALM: Final = (0.7, 0.97)
"""parts of the run: the history's window fills; everything happens; nothing is restarted"""
SETTLE_S: Final = 900.0


class Soak:
    """One run."""

    def __init__(self, minutes: float, seed: int, guest: bool) -> None:
        self.seconds, self.seed = minutes * 60, seed
        self.rng = random.Random(seed)
        self.violations: list[str] = []
        self.faults: Counter[str] = Counter()
        self.looks: Counter[str] = Counter()
        self.verified: Counter[str] = Counter()
        sizes = dict(DISKS) | ({"guest": GUEST.size} if guest else {})
        self.pair = Pair(
            disks=sizes,
            ring_bytes=64 * MIB,
            target_settings=f"segment_bytes = {8 * MIB}\nreserve_bytes = {16 * MIB}",
            source_settings=f"spill_bytes = {64 * MIB}\nspill_reserve_bytes = 0",
            seed=seed,
        )
        self.writers = [
            Writer(self.pair, disk, size, f"{seed}/{disk}", pause_s=0.02)
            for disk, size in DISKS.items()
        ]
        self.marks = Marks(self.pair, self.writers)
        self.gauges = Gauges(self.pair)
        self.begin_s = 0.0
        self.resize: Callable[[int], None] | None = None

    # ---- what happens ----------------------------------------------------------------

    @property
    def at(self) -> float:
        """Where the run is, from 0 to 1."""
        return (time.monotonic() - self.begin_s) / self.seconds

    def violation(self, text: str) -> None:
        print(f"VIOLATION at {self.at:.3f}: {text}", flush=True)
        self.violations.append(text)

    def run(self) -> None:
        self.begin_s = time.monotonic()
        next_verify = self.begin_s + 30
        while self.at < 1:
            if self.at < CALM[1]:
                self.fault()
            end = time.monotonic() + self.rng.uniform(1.0, 5.0)
            while time.monotonic() < end:
                self.marks.make()
                time.sleep(0.7)
            self.look_at_one()
            if time.monotonic() > next_verify:
                self.verify()
                next_verify = time.monotonic() + min(120.0, self.seconds / 8)
            self.watch()
            print(self.line(), flush=True)
        self.pair.cable.repair()

    def watch(self) -> None:
        try:
            self.pair.alive()
        except AssertionError as error:
            self.violation(str(error))
        for writer in self.writers:
            if writer.failure is not None:
                self.violation(f"the client of {writer.disk}: {writer.failure!r}")
                writer.failure = None

    def fault(self) -> None:
        link = ["cut", "reset", "half", "hang", "corrupt", "slow", "late", "down", "pause"]
        restarting = ["filter", "source", "target", "site", "both", "overflow"]
        if self.resize is not None:
            restarting.append("full")
        storm = self.at < STORM
        kind = self.rng.choice(link + 2 * restarting if storm else link)
        self.faults[kind] += 1
        getattr(self, f"_{kind}")()

    def _kill(self, *roles: str) -> None:
        self.pair.kill(*roles)
        time.sleep(self.rng.uniform(0, 1.0))
        self.pair.start(*roles)

    def _filter(self) -> None:
        self._kill("filter")

    def _source(self) -> None:
        self._kill("source")

    def _target(self) -> None:
        self._kill("target")

    def _site(self) -> None:
        self._kill("filter", "source")

    def _both(self) -> None:
        self._kill("filter", "source", "target")

    def _cut(self) -> None:
        self.pair.cable.cut()

    def _reset(self) -> None:
        self.pair.cable.cut(how="reset")

    def _half(self) -> None:
        self.pair.cable.cut(how="half")

    def _corrupt(self) -> None:
        self.pair.cable.corrupt(self.rng.random() < 0.5)

    def _hang(self) -> None:
        directions = self.rng.choice(((True,), (False,), (True, False)))
        self.pair.cable.hang(*directions, swallow=self.rng.random() < 0.5)
        time.sleep(self.rng.uniform(0.5, 8.0))
        self.pair.cable.repair()

    def _down(self) -> None:
        self.pair.cable.cut(down=True)
        time.sleep(self.rng.uniform(0.5, 10.0))
        self.pair.cable.repair()

    def _slow(self) -> None:
        self.pair.cable.bytes_per_s = self.rng.choice((200_000, 1_000_000))
        time.sleep(self.rng.uniform(1.0, 6.0))
        self.pair.cable.bytes_per_s = 0

    def _late(self) -> None:
        self.pair.cable.delay_s, self.pair.cable.jitter_s = 0.1, 0.2
        time.sleep(self.rng.uniform(1.0, 6.0))
        self.pair.cable.delay_s = self.pair.cable.jitter_s = 0.0

    def _pause(self) -> None:
        with contextlib.suppress(errors.VrepError):  # a site that was just killed may refuse
            self.pair.a.pause(GROUP)
        time.sleep(self.rng.uniform(0.2, 2.0))
        wait_until("it is resumed", lambda: self.pair.a.resume(GROUP) or True)

    def _overflow(self) -> None:
        """More than ring and spill hold while the target is away: a gap, then a resync."""
        self.pair.cable.cut(down=True)
        self.writers[0].burst = 200
        deadline = time.monotonic() + 60
        while self.writers[0].burst and time.monotonic() < deadline:
            time.sleep(0.2)
        self.writers[0].burst = 0
        self.pair.cable.repair()

    def _full(self) -> None:
        """The target's disk takes nothing for a while."""
        assert self.resize is not None
        used = sum(value for _, value in self.gauges.samples["store"][-1:])
        with contextlib.suppress(subprocess.CalledProcessError):  # it grew past that meanwhile
            self.resize(used + 4 * MIB)
        time.sleep(self.rng.uniform(2.0, 8.0))
        self.resize(STORE_BYTES)

    # ---- what must hold --------------------------------------------------------------

    def look_at_one(self) -> None:
        """Mostly a mark that the window still holds; now and then any, which may be folded."""
        young_s = time.monotonic() - 0.8 * WINDOW_S
        young = [mark for mark in self.marks.kept if mark.made_s > young_s]
        chosen = young if young and self.rng.random() < 0.8 else self.marks.kept
        if chosen:
            self.look_at(self.rng.choice(chosen))

    def look_at(self, mark: Mark) -> None:
        """A mark recovers to what the clients had written, or is not offered."""
        try:
            content = self.pair.read_view(mark.label)
        except (errors.VrepError, OSError) as error:
            self._judge_refusal(mark, error)
            return
        for disk, wanted in mark.content.items():
            found = hashes(content[disk])
            wrong = [
                n for n, pair in enumerate(zip(found, wanted, strict=True)) if len({*pair}) > 1
            ]
            if wrong:
                self.violation(f"{mark.label} (seq {mark.seq}): chunks {wrong[:8]} of {disk}")
        self.looks["right"] += 1

    def _judge_refusal(self, mark: Mark, error: Exception) -> None:
        if isinstance(error, errors.IntegrityError):
            self.violation(f"{mark.label}: {error}")
            return
        try:
            listed = self.pair.b.points(GROUP)
        except errors.IntegrityError as damage:
            self.violation(f"points: {damage}")
            return
        except errors.VrepError as failed:
            self.looks[f"no points: {type(failed).__name__}"] += 1
            return
        offered = [m.label for m in listed.marks if m.recoverable]
        if mark.label not in offered:
            self.looks["not offered"] += 1  # folded, in a gap, or not durable yet
        elif mark.label == offered[0]:
            self.looks["just folded"] += 1
        else:
            self.violation(f"{mark.label} is offered and does not recover: {error}")

    def verify(self) -> None:
        try:
            report = self.pair.b.verify(GROUP, options=VerifyOptions(samples=1))
        except errors.IntegrityError as error:
            self.violation(f"verify: {error}")
        except errors.VrepError as error:
            self.verified[f"refused: {type(error).__name__}"] += 1
        else:
            self.verified[report.result] += 1
            if report.result != "good":
                self.violation(f"verify: {[v.text for v in report.verdicts if v.text]}")

    def line(self) -> str:
        last = {name: found[-1][1] for name, found in self.gauges.samples.items() if found}
        sizes = " ".join(
            f"{name} {last.get(name, 0) >> 20}"
            for name in ("filter.rss", "source.rss", "target.rss", "store", "spill", "shm")
        )
        return (
            f"{self.at:5.1%} faults {sum(self.faults.values())} marks {self.marks.made} "
            f"looks {self.looks.total()} verified {self.verified.total()} MiB: {sizes}"
        )

    # ---- beginning and end -----------------------------------------------------------

    def finish(self) -> None:
        """Everything becomes durable; the end is right at both sites."""
        for writer in self.writers:
            writer.stop()
        self.watch()
        self.pair.settle(SETTLE_S)
        for writer in self.writers:
            if self.pair.images[writer.disk].read_bytes() != writer.model:
                self.violation(f"the source's own disk {writer.disk} is not what was written")
        last = wait_until("the last mark", lambda: self.marks.make("end"))
        self.pair.settle(SETTLE_S)
        before = self.looks["right"]
        self.look_at(last)
        for mark in self.marks.kept[-40:-1:8]:
            self.look_at(mark)
        if self.looks["right"] == before:
            self.violation("not even the last mark recovers")
        self.verify()
        spilled = self.pair.status()["targets"][0]["spill_bytes"]
        if spilled:
            self.violation(f"{spilled} bytes stay in the spill")

    def rows(self) -> list[Row]:
        calm = tuple(self.begin_s + part * self.seconds for part in CALM)
        settled = (self.begin_s + max(WARM, 0.4) * self.seconds, calm[1])
        wait_s = max(writer.longest_wait_s for writer in self.writers)
        stored = self.pair.stored()
        return [
            *self.gauges.rows((calm[0], calm[1]), settled),
            Row("longest wait of a client", wait_s, "s", WAITED_S_MAX),
            Row("violations", len(self.violations), "violations", 0),
            Row("commands answered", sum(w.commands for w in self.writers), "commands"),
            Row("commands sent again", sum(w.repeated for w in self.writers), "commands"),
            Row("bytes written", sum(w.bytes for w in self.writers), "bytes"),
            Row("marks", self.marks.made, "marks"),
            Row("marks refused", self.marks.refused, "marks"),
            Row("marks recovered and right", self.looks["right"], "marks"),
            Row("verifications that were good", self.verified["good"], "verifications"),
            Row("bytes folded away", int(stored["folded_bytes"]), "bytes"),
            Row("window that is held", float(stored["real_window_s"] or 0), "s"),
        ]


@contextlib.contextmanager
def own_disk(path: Path) -> Iterator[Callable[[int], None] | None]:
    """A file system of its own for the store, whose size can be changed; None where none can be
    mounted."""
    path.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={STORE_BYTES}", "vrep-soak", str(path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None
        return

    def resize(size: int) -> None:
        subprocess.run(
            ["mount", "-o", f"remount,size={size}", str(path)], check=True, capture_output=True
        )

    try:
        yield resize
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def guest_image() -> GuestImage | str:
    """What a guest boots, or why none can."""
    try:
        return GuestImage.build(ROOT / "build" / "guest")
    except (errors.VrepError, OSError, subprocess.SubprocessError) as error:
        return str(error)


def check_guest(soak: Soak, guest: Guest, manifest: Any) -> Row:
    """The guest is killed; what it was told to be durable is at the other site."""
    killed_ms = time.time_ns() // 1_000_000
    guest.kill9()
    soak.pair.settle(SETTLE_S)
    result = soak.pair.b.export(GROUP, soak.pair.root / "recovered")
    path = next(Path(disk.path) for disk in result.disks if disk.name == "guest")
    verdict = check_disk(path, manifest)
    lines = judge_lines(verdict.log, guest.witness, point_ms=killed_ms)
    for each in (*verdict.violations(), *lines.violations()):
        soak.violation(f"guest: {each}")
    return Row("lines that the guest wrote durably", len(guest.witness), "lines")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--guest", choices=("auto", "none"), default="auto")
    arguments = parser.parse_args()
    image = guest_image() if arguments.guest == "auto" else "not asked for"
    with_guest = isinstance(image, GuestImage)
    load = "a QEMU guest and two NBD clients" if with_guest else f"two NBD clients ({image})"
    print(f"seed {arguments.seed}, load: {load}", flush=True)
    soak = Soak(arguments.minutes, arguments.seed, with_guest)
    rows: list[Row] = []
    started = time.time()
    try:
        with own_disk(soak.pair.b.paths.store) as resize, contextlib.ExitStack() as stack:
            stack.callback(soak.pair.close)
            soak.resize = resize
            if resize is None:
                print("no file system can be mounted here: the target's disk is never full")
            manifest = build_disk(soak.pair.images["guest"], GUEST) if with_guest else None
            soak.pair.up()
            soak.pair.a.keep(GROUP, window_s=WINDOW_S)
            guest = None
            if isinstance(image, GuestImage):
                disk = GuestDisk(soak.pair.a.disk_uri(GROUP, "guest"))
                task = GuestTask(pause_s=0.2, churn_pause_s=1.0)
                guest = stack.enter_context(Guest(image, [disk], task))
                wait_until("the guest writes", lambda: guest is not None and guest.witness)
            for writer in soak.writers:
                writer.start()
            soak.gauges.start()
            soak.run()
            soak.gauges.stop()
            soak.finish()
            rows = soak.rows()
            if guest is not None:
                rows.append(check_guest(soak, guest, manifest))
    except Exception as error:
        soak.violation(f"the run ended: {type(error).__name__}: {error}")
        raise
    finally:
        failed = [row.name for row in rows if not row.met]
        report = {
            "minutes": arguments.minutes,
            "seconds": time.time() - started,
            "seed": arguments.seed,
            "load": load,
            "faults": dict(soak.faults),
            "looks": dict(soak.looks),
            "verified": dict(soak.verified),
            "violations": soak.violations,
            "not_met": failed,
            "rows": [{**asdict(row), "met": row.met} for row in rows],
        }
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(report, indent=2) + "\n")
        for row in rows:
            limit = f" (at most {row.limit:,.0f})" if row.limit is not None else ""
            print(f"{'  ' if row.met else '! '}{row.name}: {row.value:,.1f} {row.unit}{limit}")
        print(f"{dict(soak.faults)}\n{dict(soak.looks)}\n{dict(soak.verified)}")
    return 1 if soak.violations or failed else 0


if __name__ == "__main__":
    sys.exit(main())
