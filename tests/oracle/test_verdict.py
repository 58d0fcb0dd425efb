"""Verdicts: none is believed that does not speak of the history that is there. And how
verifications are run: one at a time, by a command, by a schedule, leaving nothing behind."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import recovery_lab as lab_module
import verify_rig as rig

from vrep import errors
from vrep.app import cli
from vrep.recovery import alone, verdict, view
from vrep.recovery import schedule as schedule_module
from vrep.recovery.points import list_points
from vrep.recovery.schedule import AGAIN_S, VerifySchedule
from vrep.recovery.verdict import VerdictBook, decode, newest
from vrep.recovery.verify import verify
from vrep.recovery.view import list_views, restart_views, start_test
from vrep.settings import VerifyConfig, load_config
from vrep.target.manifest import DiskEntry, EpochState, Position, load_newest
from vrep.target.segment import entry_path

DISK, QUICK = rig.DISK, rig.QUICK
IDLE_LIMIT_S = 180.0
"""for a process that has only what every other one leaves it of the machine"""
fill, flip, image, no_view, shown, wait = (
    rig.fill,
    rig.flip,
    rig.image,
    rig.no_view,
    rig.shown,
    rig.wait,
)


@pytest.fixture
def lab(tmp_path: Path, rng: random.Random) -> Iterator[Any]:
    lab = lab_module.Lab(tmp_path / "site", [DiskEntry("root", DISK, 0)], rng, level=0)
    yield lab
    lab.close()


# ---- verdicts ----------------------------------------------------------------------------------


def made(lab: Any) -> tuple[Position, Path]:
    """A good verdict and its file."""
    point = fill(lab, b"x" * 65536)
    assert verify(lab.paths, "web", options=QUICK).result == "good"
    return point, VerdictBook(lab.paths, lab.group_id).path(point)


def test_every_changed_byte_of_a_verdict_is_noticed(lab: Any) -> None:
    point, path = made(lab)
    data = path.read_bytes()
    key = lab.identity.certificate.public_key()
    assert decode(data, key).position == point
    for at in range(len(data)):
        bad = bytearray(data)
        bad[at] ^= 1 << (at % 8)
        with pytest.raises(errors.IntegrityError):
            decode(bytes(bad), key)
    for end in (0, 1, 127, 128, 200, len(data) - 1):
        with pytest.raises(errors.IntegrityError):
            decode(data[:end], key)
    with pytest.raises(errors.IntegrityError):
        decode(data + b"\0", key)
    flip(path, len(data) - 5)
    assert shown(lab) == {f"pos:{point}": "damaged"}
    assert path.name in list_points(lab.paths, "web").verdicts[0].text
    told = rig.site_of(lab).status("web")["groups"]["web"]
    assert told["verdict"]["state"] == "damaged"
    assert "verify-failed" in told["conditions"]


def resigned(lab: Any, path: Path, **changes: Any) -> None:
    """The same verdict with other words, signed: to test what follows the signature."""
    key = lab.identity.certificate.public_key()
    found = decode(path.read_bytes(), key)
    finding = msgspec.structs.replace(found.finding, **changes)
    replaced = verdict.SignedVerdict(
        found.group_id, found.store_id, found.position, found.wall_ns, finding
    )
    path.write_bytes(verdict.encode(replaced, lab.identity.private_key()))


def test_a_verdict_that_another_key_signed_is_not_believed(lab: Any, tmp_path: Path) -> None:
    point, path = made(lab)
    from vrep.keys.identity import SiteIdentity

    other = SiteIdentity.create(tmp_path / "other", "other")
    found = decode(path.read_bytes(), lab.identity.certificate.public_key())
    path.write_bytes(verdict.encode(found, other.private_key()))
    assert shown(lab) == {f"pos:{point}": "damaged"}
    assert "did not sign" in list_points(lab.paths, "web").verdicts[0].text


def test_a_verdict_under_another_name_is_not_believed(lab: Any) -> None:
    _point, path = made(lab)
    later = lab.write(0, 0, b"y" * 4096)
    lab.commit()
    shutil.copy(path, VerdictBook(lab.paths, lab.group_id).path(later))
    assert shown(lab)[f"pos:{later}"] == "damaged"


def test_a_verdict_on_a_rolled_back_epoch_is_void(lab: Any) -> None:
    lab.sync()
    kept = lab.write(0, 0, b"a" * 4096)
    lost = lab.write(0, 0, b"b" * 4096)
    lab.commit()
    assert verify(lab.paths, "web", options=QUICK).result == "good"
    assert verify(lab.paths, "web", f"pos:{kept}", options=QUICK).result == "good"
    assert shown(lab) == {f"pos:{kept}": "good", f"pos:{lost}": "good"}
    entry = lab.store.add_epoch(writer=bytes(16), parent=kept)
    assert shown(lab) == {f"pos:{kept}": "good", f"pos:{lost}": "void"}
    manifest = load_newest(lab.store.directory, lab.group_id)
    told = newest(lab.paths, manifest, None)
    assert told is not None
    assert told["state"] == "good"
    # The writer of the new epoch comes to the same place with other bytes.
    lab.new_epoch(entry)
    here = lab.write(0, 0, b"c" * 4096)
    lab.commit()
    assert here.seq == lost.seq
    assert shown(lab) == {f"pos:{kept}": "good", f"pos:{lost}": "void"}
    # A provisional epoch that is abandoned takes its points with it.
    trial = lab.store.raise_epoch(writer=b"f" * 16, parent=here, state=EpochState.PROVISIONAL)
    assert verify(lab.paths, "web", options=QUICK).result == "good"
    lab.store.roll_back_epoch(trial.epoch)
    assert shown(lab)[f"pos:{here}"] == "good"


def test_a_verdict_on_another_store_is_void(lab: Any, rng: random.Random, tmp_path: Path) -> None:
    _point, path = made(lab)
    name = path.name
    kept = path.read_bytes()
    lab.close()
    shutil.rmtree(lab.paths.store)
    other = lab_module.Lab(
        lab.root, lab.disks, rng, level=0, group_id=lab.group_id, source_id=lab.source_id
    )
    try:
        point = fill(other, b"x" * 65536)
        assert VerdictBook(lab.paths, lab.group_id).path(point).name == name
        assert path.read_bytes() == kept
        assert shown(other) == {f"pos:{point}": "void"}
        manifest = load_newest(other.store.directory, lab.group_id)
        told = newest(other.paths, manifest, None)
        assert told is not None
        assert told["state"] == "void"
        assert "another store" in told["text"]
    finally:
        other.close()


def test_a_verdict_on_a_store_that_was_taken_back_is_void(lab: Any, tmp_path: Path) -> None:
    fill(lab, b"x" * 65536)
    lab.close()
    shutil.copytree(lab.paths.store, tmp_path / "old")
    lab.open()
    lab.start_stream()
    point = lab.write(0, 0, b"y" * 4096)
    lab.close()
    lab.open()
    assert verify(lab.paths, "web", options=QUICK).result == "good"
    lab.close()
    shutil.rmtree(lab.paths.store)
    shutil.copytree(tmp_path / "old", lab.paths.store)
    assert shown(lab) == {f"pos:{point}": "void"}
    manifest = load_newest(lab.paths.store / lab.group_id.hex(), lab.group_id)
    told = newest(lab.paths, manifest, None)
    assert told is not None
    assert told["state"] == "void"


def test_a_verdict_whose_record_is_another_is_void(lab: Any) -> None:
    point, path = made(lab)
    resigned(lab, path, anchor="0" * 64)
    assert shown(lab) == {f"pos:{point}": "void"}


def test_other_bytes_at_a_verified_point_are_noticed(lab: Any) -> None:
    _point, path = made(lab)
    disks = decode(path.read_bytes(), None).finding.disks
    resigned(lab, path, disks=[msgspec.structs.replace(disks[0], sha256="0" * 64)])
    report = verify(lab.paths, "web", options=QUICK)
    assert report.result == "bad"
    assert "other bytes" in report.verdicts[0].text


def test_only_so_many_verdicts_are_kept(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.sync()
    monkeypatch.setattr(verdict, "KEPT", 3)
    for _ in range(5):
        last = lab.write(0, 0, b"x" * 4096)
        lab.commit()
        verify(lab.paths, "web", options=QUICK)
    positions = VerdictBook(lab.paths, lab.group_id).positions()
    assert [p.seq for p in positions] == [last.seq - 2, last.seq - 1, last.seq]


# ---- one at a time, and nothing left -----------------------------------------------------------


def test_two_verifications_never_run_at_once(lab: Any) -> None:
    fill(lab, b"x" * 65536)
    assert not alone.under_way(lab.paths)
    with alone.alone(lab.paths):
        assert alone.under_way(lab.paths)
        with pytest.raises(errors.LockedError, match="another verification"):
            verify(lab.paths, "web", options=QUICK)
    assert not alone.under_way(lab.paths)
    assert verify(lab.paths, "web", options=QUICK).result == "good"


def test_the_view_of_a_verification_that_died_is_removed(lab: Any) -> None:
    fill(lab, b"x" * 65536)
    with alone.alone(lab.paths):
        left = start_test(lab.paths, "web", kind="verify")
        assert restart_views(lab.paths) == []
        assert [each.id for each in list_views(lab.paths)] == [left.id]
        with pytest.raises(errors.StateError):
            view.stop_test(lab.paths, "web")
    assert restart_views(lab.paths) == []
    no_view(lab)
    start_test(lab.paths, "web", kind="verify")
    assert verify(lab.paths, "web", options=QUICK).result == "good"
    no_view(lab)


AT_ONCE = """
import sys
from vrep.recovery import schedule
schedule.give_way = lambda: None  # at its low priority it may wait for minutes on a busy machine
sys.exit(schedule.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL], ids=["term", "kill"])
def test_a_verification_that_is_ended_leaves_no_view(lab: Any, tmp_path: Path, kill: int) -> None:
    fill(lab, image(tmp_path))
    marker = tmp_path / "marker"
    config = f'[verify]\ncommand = "touch {marker}; sleep 60"\n'
    lab.paths.config.write_text(config)
    process = subprocess.Popen([sys.executable, "-c", AT_ONCE, str(lab.root), lab.group_id.hex()])
    wait(marker.exists)
    assert [each.kind for each in list_views(lab.paths)] == ["verify"]
    process.send_signal(kill)
    process.wait(60)
    if kill == signal.SIGKILL:
        wait(lambda: not alone.under_way(lab.paths))
        restart_views(lab.paths)
    no_view(lab)
    assert shown(lab) == {}


# ---- the command, and the schedule -------------------------------------------------------------


def run_cli(
    lab: Any, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, dict[str, Any]]:
    code = cli.run(["verify", "web", *words, "--dir", str(lab.root), "--json"])
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return code, answer


def test_the_command_tells_its_verdict_by_its_exit_code(
    lab: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    point = fill(lab, b"x" * 65536)
    code, answer = run_cli(lab, capsys, "--samples", "0")
    assert (code, answer["result"]) == (0, "good")
    assert answer["verdicts"][0]["point"] == f"pos:{point}"
    code, answer = run_cli(lab, capsys, "--command", "exit 7", "--limit", "30s", "--no-fsck")
    assert (code, answer["result"]) == (2, "bad")
    assert cli.run(["verify", "web", "--dir", str(lab.root), "--command", "exit 7"]) == 2
    out = capsys.readouterr().out
    assert f"pos:{point}: command: bad: exit status 7" in out
    assert "no ext2, ext3 or ext4" in out
    (lab.root / "keys" / "acme.key").unlink()
    code, answer = run_cli(lab, capsys)
    assert (code, answer["result"]) == (1, "intact")
    assert cli.run(["verify", "mail", "--dir", str(lab.root)]) == errors.NotFoundError.exit_code
    capsys.readouterr()
    wrong = cli.run(["verify", "web", "--dir", str(lab.root), "--at", "pos:1/0/999"])
    assert wrong == errors.PointNotFoundError.exit_code


def test_what_is_due_is_the_group_that_waited_longest(lab: Any, rng: random.Random) -> None:
    other = lab_module.Lab(lab.root, lab.disks, rng, name="mail")
    other.sync()
    other.close()
    fill(lab, b"x" * 65536)
    began = lab_module.START_NS / 1e9
    clock = [began]
    config = VerifyConfig(every_h=24)
    schedule = VerifySchedule(lab.paths, config, lambda: clock[0])
    assert schedule.due() is None
    clock[0] = began + 24 * 3600 - 1
    assert schedule.due() is None
    clock[0] = began + 24 * 3600
    assert schedule.due() in (lab.group_id, other.group_id)
    assert VerifySchedule(lab.paths, VerifyConfig(), lambda: clock[0]).due() is None
    verify(lab.paths, lab.group_id.hex(), options=QUICK)
    path = VerdictBook(lab.paths, lab.group_id).path(Position(1, 0, lab.seq))
    os.utime(path, (clock[0], clock[0]))
    assert schedule.due() == other.group_id
    schedule._tried[other.group_id] = clock[0]  # an attempt that left no verdict
    assert schedule.due() is None
    clock[0] += AGAIN_S
    assert schedule.due() == other.group_id
    clock[0] += 24 * 3600
    assert schedule.due() == other.group_id


def test_a_running_site_verifies_by_itself_and_stops_at_once(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule_module, "STOP_S", IDLE_LIMIT_S)
    point = fill(lab, image(tmp_path))
    nice = tmp_path / "nice"
    lab.paths.config.write_text(
        f"[verify]\nevery_h = 24.0\nsamples = 0\ncommand = 'nice > {nice}; ionice > {nice}.io'\n"
    )
    clock, began = [lab_module.START_NS / 1e9 + 25 * 3600], time.monotonic()

    def now() -> float:
        """An hour in half a minute: an attempt that a busy machine ended is made again."""
        return clock[0] + 120 * (time.monotonic() - began)

    stopping = threading.Event()
    schedule = VerifySchedule(lab.paths, load_config(lab.paths.config).verify, now)
    book = VerdictBook(lab.paths, lab.group_id)
    thread = threading.Thread(target=schedule.run, args=(stopping, 0.05))
    thread.start()
    try:
        wait(book.positions, IDLE_LIMIT_S)
        assert shown(lab) == {f"pos:{point}": "good"}
        assert nice.read_text().strip() == "19"
        assert Path(f"{nice}.io").read_text().strip() == "idle"
        # The next one hangs in its command; the site stops, and it goes with its view.
        marker = tmp_path / "marker"
        lab.paths.config.write_text(f'[verify]\ncommand = "touch {marker}; sleep 60"\n')
        clock[0] += 10 * 365 * 24 * 3600
        wait(marker.exists, IDLE_LIMIT_S)
    finally:
        stopping.set()
        thread.join(IDLE_LIMIT_S)
    assert not thread.is_alive()
    no_view(lab)


def test_vrep_run_verifies_on_its_schedule(
    tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab_module, "START_NS", 1)
    lab = lab_module.Lab(tmp_path / "site", [DiskEntry("root", DISK, 0)], rng, level=0)
    point = fill(lab, b"x" * 65536)
    lab.close()
    lab.paths.config.write_text("[verify]\nevery_h = 0.0003\nsamples = 0\n")
    command = [sys.executable, "-m", "vrep.app.cli", "run", "--role", "target", "--dir", lab.root]
    process = subprocess.Popen(command)
    try:
        site = rig.site_of(lab)
        wait(lambda: site.status("web")["groups"]["web"]["verdict"], IDLE_LIMIT_S)
        told = site.status("web")["groups"]["web"]
        assert (told["verdict"]["state"], told["verdict"]["point"]) == ("good", f"pos:{point}")
        process.send_signal(signal.SIGTERM)
        assert process.wait(IDLE_LIMIT_S) == 0
    finally:
        process.kill()
        process.wait()
    no_view(lab)
    assert not alone.under_way(lab.paths)


# ---- folds -------------------------------------------------------------------------------------


def test_a_fold_takes_verdicts_on_what_it_dropped_and_no_others(
    tmp_path: Path, rng: random.Random
) -> None:
    lab = lab_module.Lab(
        tmp_path, [DiskEntry("root", DISK, 0)], rng, level=0, segment_bytes=1 << 14, merge=False
    )
    try:
        lab.sync()
        points = []
        for number in range(40):
            points.append(lab.write(0, number % 4 * 65536, rng.randbytes(8192)))
            lab.commit()
        early, horizon, late = points[5], points[20], points[30]
        for point in (early, horizon, late):
            assert verify(lab.paths, "web", f"pos:{point}", options=QUICK).result == "good"
        before = shown(lab)
        assert set(before.values()) == {"good"}
        assert lab.store.fold(horizon)
        assert shown(lab) == {**before, f"pos:{early}": "void"}
        manifest = load_newest(lab.store.directory, lab.group_id)
        states = {
            v.point: v.state
            for v in verdict.judge(list(VerdictBook(lab.paths, lab.group_id).all()), manifest, None)
        }
        assert states == shown(lab)
        # The same bytes come back from what the fold left.
        for point in (horizon, late):
            report = verify(lab.paths, "web", f"pos:{point}", options=QUICK)
            assert report.result == "good"
            assert report.folded_to
            assert report.tallies
        entry = next(s for s in manifest.segments if s["generation"])
        path = entry_path(lab.store.directory, entry)
        flip(path, path.stat().st_size // 3)
        report = verify(lab.paths, "web", options=QUICK)
        assert [d.object for d in report.verdicts[0].damages] == [path.name]
    finally:
        lab.close()
