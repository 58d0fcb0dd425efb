"""What each cut, crash and lack does to the pipeline, and what it does not do."""

from __future__ import annotations

import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sites import GONE_S, GROUP, KEY, MIB, WAIT_S, Client, Pair, compare, journal, wait_until

from vrep import errors
from vrep._core import layout
from vrep.app.demo.guest import Guest, GuestDisk, GuestTask
from vrep.app.demo.guest_check import check_disk, judge_lines
from vrep.app.demo.guest_disk import DiskContent, build_disk
from vrep.app.demo.guest_image import GuestImage
from vrep.source.daemon import Source
from vrep.target.manifest import Position
from vrep.target.reader import StoreReader
from vrep.wire import transport

pytestmark = [pytest.mark.e2e, pytest.mark.every_front]

Make = Callable[..., Pair]


def write_some(pair: Pair, rng: random.Random, count: int = 50, length: int = 4096) -> None:
    """Answered writes to the first disk."""
    with pair.client() as client:
        for _ in range(count):
            client.write(rng.randrange(client.bytes - length), rng.randbytes(length))


@contextmanager
def writing(pair: Pair, rng: random.Random) -> Iterator[list[int]]:
    """A client that writes all the while, on one connection that must last; how often."""
    stop, count, failures = threading.Event(), [0], []

    def run() -> None:
        try:
            with pair.client() as client:
                while not stop.is_set():
                    client.write(rng.randrange(client.bytes - 4096), rng.randbytes(4096))
                    count[0] += 1
                    time.sleep(0.002)
        except BaseException as error:  # noqa: BLE001 - raised below, on the test's thread
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield count
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]


def gaps(pair: Pair) -> int:
    return sum(entry.kind == layout.KIND_GAP_BEGIN for entry in journal(pair))


# ---- the link ----------------------------------------------------------------------------------


def test_a_link_that_is_cut_again_and_again(make_pair: Make, rng: random.Random) -> None:
    """Each time the source goes on at the durable position: no gap, and nothing twice."""
    pair = make_pair().up()
    before = pair.cable.connections
    with writing(pair, rng) as count:
        for _ in range(5):
            so_far = count[0]
            wait_until("the client goes on", lambda least=so_far + 20: count[0] > least)
            least = pair.cable.connections + 1
            pair.cable.cut()
            wait_until("a new connection", lambda least=least: pair.cable.connections >= least)
            wait_until("replicates again", lambda: pair.status()["targets"][0]["connected"])
    pair.settle()
    assert pair.cable.connections >= before + 5
    seqs = [entry.seq for entry in journal(pair)]
    assert seqs == list(range(1, len(seqs) + 1))
    assert gaps(pair) == 1  # the first sync
    assert pair.b.points(GROUP).verdict.sealed
    pair.same_as_source()


def test_a_link_that_stays_down_is_shown_and_costs_the_guest_nothing(
    make_pair: Make, rng: random.Random
) -> None:
    pair = make_pair().up()
    durable = pair.settle()["targets"][0]["durable_seq"]

    def newest_at_both() -> bool:
        shown = pair.status()["targets"][0]["newest_point"]
        if shown is None:  # it is told a moment after the position
            return False
        assert shown["time"]
        return shown == pair.stored()["newest_point"] and shown["point"] == f"pos:1/0/{durable}"

    wait_until("its newest point is the last record", newest_at_both)
    pair.cable.cut(down=True)
    wait_until("it shows", lambda: pair.status()["state"] == "offline")
    write_some(pair, rng)
    target = pair.status()["targets"][0]
    assert target["newest_point"]["point"] == f"pos:1/0/{durable}"
    assert not target["connected"]
    assert target["durable_seq"] == durable
    assert target["seq"] >= durable + 50
    assert target["rpo_ms"] > 0
    assert target["dirty_bytes"] > 0
    assert pair.status()["error"]
    wait_until("the target shows it", lambda: "source-silent" in pair.stored()["conditions"])
    pair.cable.repair()
    pair.settle()
    assert pair.status()["error"] == ""
    pair.same_as_source()


def test_a_byte_that_changes_on_the_wire_ends_the_connection_only(
    make_pair: Make, rng: random.Random
) -> None:
    pair = make_pair().up()
    for turn in range(3):
        connections = pair.cable.connections
        pair.cable.corrupt()
        write_some(pair, rng, 20)
        wait_until("a byte was changed", lambda least=turn: pair.cable.corrupted > least)
        wait_until("a new connection", lambda least=connections: pair.cable.connections > least)
        pair.settle()
        pair.alive()
    assert gaps(pair) == 1
    assert pair.b.points(GROUP).verdict.sealed
    pair.same_as_source()


def test_a_connection_that_carried_much_is_renewed(
    make_pair: Make, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys of TLS wear out; nothing is lost and no gap begins when they are renewed."""
    monkeypatch.setattr(transport, "RENEW_AFTER_BYTES", 4 * MIB)
    pair = make_pair()
    pair.start("target")
    pair.join()
    pair.make_key()
    pair.protect()
    pair.start("filter")
    pair.served()
    pair.b.key_import(pair.exported_key)
    source = Source(pair.a.paths)  # in this process, for the small bound
    source.start()
    try:
        pair.settle()
        before, renewed = gaps(pair), pair.cable.connections
        write_some(pair, rng, count=200, length=100 * 1024)
        wait_until("it is renewed", lambda: pair.cable.connections > renewed)
        pair.settle()
        assert gaps(pair) == before
        pair.same_as_source()
    finally:
        source.close()


def test_a_slow_link_never_slows_the_guest(make_pair: Make, rng: random.Random) -> None:
    pair = make_pair().up()
    pair.cable.bytes_per_s = 200_000
    write_some(pair, rng, count=24, length=512 * 1024)
    behind = pair.status()["targets"][0]
    assert behind["durable_seq"] < behind["seq"], "the link was not slow at all"
    pair.cable.bytes_per_s = 0
    pair.settle()
    pair.same_as_source()


# ---- the target --------------------------------------------------------------------------------


def test_a_killed_target_recovers_what_it_acknowledged(make_pair: Make, rng: random.Random) -> None:
    """At least what the source was told, at most what it sent, and nothing with a hole."""
    pair = make_pair().up()
    for _ in range(3):
        with writing(pair, rng) as count:
            wait_until("the client goes on", lambda: count[0] > 100)
            pair.kill("target")
            pair.kill("source")  # so that nobody adds to what was recovered
        acknowledged = pair.status()["targets"][0]["durable_seq"]
        head = pair.status()["targets"][0]["seq"]
        pair.start("target")
        pair.listening()  # what it recovers of its store it has recovered then
        with StoreReader(pair.b.paths.store, pair.group_id) as reader:
            durable = reader.durable
            reader.verify()
        assert Position(1, 0, acknowledged) <= durable <= Position(1, 0, head)
        assert [entry.seq for entry in journal(pair)] == list(range(1, durable.seq + 1))
        pair.start("source")
        pair.settle()
    assert gaps(pair) == 1
    pair.same_as_source()


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[Callable[[int], None]]:
    """A file system of its own at a path; call what is yielded to change its size."""
    path.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "vrep-test", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")

    def resize(new: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={new}", str(path)], check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_target_says_so_still_recovers_and_goes_on(
    make_pair: Make, rng: random.Random
) -> None:
    pair = make_pair(target_settings=f"reserve_bytes = {8 * MIB}")
    with small_disk(pair.b.paths.store, 40 * MIB) as resize:
        pair.up()
        write_some(pair, rng, 20)
        pair.settle()
        kept = pair.images["root"].read_bytes()
        pair.a.checkpoint(GROUP, "before it was full")
        pair.settle()

        def full() -> bool:
            write_some(pair, rng, count=4, length=256 * 1024)
            return "target-full" in pair.status()["conditions"]

        wait_until("the source shows it", full)
        assert "target-full" in pair.stored()["conditions"]
        assert pair.status()["targets"][0]["durable_seq"] < pair.status()["targets"][0]["seq"]
        pair.alive()

        # Recovery needs no room there.
        assert pair.b.points(GROUP).verdict.sealed
        compare("root", pair.read_view("before it was full")["root"], kept)
        result = pair.b.export(GROUP, pair.root / "out", at="before it was full")
        compare("root", Path(result.disks[0].path).read_bytes(), kept)

        # A full target may also restart.
        pair.kill("target")
        pair.start("target")
        wait_until("it still shows", lambda: "target-full" in str(pair.status()))

        resize(400 * MIB)
        pair.settle()

        def shown() -> list[bool]:
            return ["target-full" in side["conditions"] for side in (pair.status(), pair.stored())]

        # It says so a moment after the first that it could store.
        wait_until("neither shows it", lambda: not any(shown()))
        pair.same_as_source()
        pair.close()  # before its store goes


# ---- two writers -------------------------------------------------------------------------------


def test_a_source_that_is_away_for_a_moment_keeps_its_group(
    make_pair: Make, rng: random.Random
) -> None:
    """Its VM runs on: whatever hides it from the target, a failover makes two writers."""
    pair = make_pair().up()

    def refused(words: str) -> None:
        with pytest.raises(errors.SourceAliveError, match=words):
            pair.b.failover_start(GROUP)

    def paused() -> bool:
        source = pair.stored()["source"]
        return source["state"] == "paused" and not source["connected"]

    with writing(pair, rng) as count:
        wait_until("the client goes on", lambda: count[0] > 50)
        wait_until("it was told", lambda: pair.stored()["source"]["guest_clients"])
        refused("serves 1 client.*vrep move")
        pair.kill("source")
        wait_until("its end is seen", lambda: not pair.stored()["source"]["connected"])
        refused("1 client.*s more.*--force")
        pair.start("source")
        wait_until("it is back", lambda: pair.stored()["source"]["connected"])
        pair.kill("target")
        refused("does not run here")
        pair.start("target")
        wait_until("it answers", lambda: pair.b.running("target"))
        refused("--force")
        wait_until("it is heard", lambda: pair.stored()["source"]["guest_clients"])
        pair.a.pause(GROUP)
        wait_until("the pause is told", paused)  # over another connection than the one that ends
        end = time.monotonic() + GONE_S + 1
        while time.monotonic() < end:
            refused("paused.*1 client")
            time.sleep(0.25)
        pair.a.resume(GROUP)
    pair.settle()
    assert [each["state"] for each in pair.stored()["epochs"]] == ["accepted"]


def take_over(pair: Pair) -> Any:
    """Failover at b, once it knows that the source is gone."""
    return wait_until("the failover starts", lambda: pair.b.failover_start(GROUP))


def test_an_isolated_source_that_returns_is_fenced_and_its_vm_runs_on(
    make_pair: Make, rng: random.Random
) -> None:
    pair = make_pair().up()
    with writing(pair, rng) as count:
        wait_until("the client goes on", lambda: count[0] > 50)
        pair.cable.cut(down=True)
        view = take_over(pair)
        recovered = count[0]
        with Client(view.disks[0].uri) as client:
            client.write(0, b"written at the other site")
        pair.cable.repair()
        wait_until("it is refused", lambda: pair.status()["state"] == "failed-over")
        assert "fenced" in pair.status()["conditions"]
        assert pair.status()["error"]
        # And the other site says that two VMs run.
        wait_until("it tells", lambda: pair.stored()["source"]["state"] == "fenced")
        assert "old-source-alive" in pair.stored()["conditions"]
        assert pair.stored()["source"]["guest_clients"] == 1
        pair.kill("source")  # and it knows it still
        pair.start("source")
        wait_until("it still is", lambda: "fenced" in pair.status()["conditions"])
        wait_until("its client goes on", lambda: count[0] > recovered + 50)
        epochs = pair.stored()["epochs"]
        assert [each["state"] for each in epochs] == ["accepted", "provisional"]
    assert pair.b.failover_commit(GROUP).state == "committed"
    last = int(view.point.rsplit("/", 1)[1])
    # Nothing of the old writer came after the point.
    assert max(entry.seq for entry in journal(pair) if entry.epoch == 1) == last
    with Client(view.disks[0].uri) as client:
        assert client.read(0, 25) == b"written at the other site"
    with pair.client() as client:
        assert client.read(0, 25) != b"written at the other site"


def test_an_old_source_that_returns_pauses_its_vm_when_asked_to(
    make_pair: Make, rng: random.Random
) -> None:
    pair = make_pair(on_fence="pause").up()
    write_some(pair, rng, 20)
    with pair.client() as guest:
        pair.cable.cut(down=True)
        take_over(pair)
        guest.write(0, b"nobody told it yet")
        pair.cable.repair()
        wait_until("it is refused", lambda: "guest-paused" in pair.status()["conditions"])
        assert pair.status()["state"] == "failed-over"
        # It is shown while the guest's connections are being ended, and told once they are.
        wait_until("it tells", lambda: pair.stored()["source"]["state"] == "fenced")
        with pytest.raises((OSError, errors.UnreachableError)):
            guest.write(0, b"two writers")
    with pytest.raises(errors.UnreachableError):
        pair.client()
    pair.kill("filter", "source")
    pair.start("filter", "source")
    wait_until("it still is", lambda: "guest-paused" in pair.status()["conditions"])
    pair.b.failover_rollback(GROUP)
    wait_until("it is served again", lambda: "guest-paused" not in pair.status()["conditions"])
    write_some(pair, rng, 20)
    pair.settle()
    with pair.client() as guest:
        assert guest.read(0, 11) != b"two writers"
    pair.same_as_source()


def test_a_rollback_gives_the_group_back_with_nothing_lost(
    make_pair: Make, rng: random.Random
) -> None:
    """What the source wrote while it was cut off and fenced is replicated afterwards."""
    pair = make_pair().up()
    with writing(pair, rng) as count:
        wait_until("the client goes on", lambda: count[0] > 50)
        pair.cable.cut(down=True)
        view = take_over(pair)
        with Client(view.disks[0].uri) as client:
            client.write(0, b"never to be seen again")
        pair.cable.repair()
        wait_until("it is refused", lambda: pair.status()["state"] == "failed-over")
        so_far = count[0]
        wait_until("its client goes on", lambda: count[0] > so_far + 50)
        pair.b.failover_rollback(GROUP)
        wait_until("it is heard again", lambda: pair.status()["targets"][0]["connected"])
    status = pair.settle()
    assert status["epoch"] == 3
    assert "fenced" not in status["conditions"]
    assert pair.a.groups.load(GROUP).epoch == 3
    states = [each["state"] for each in pair.stored()["epochs"]]
    assert states == ["accepted", "abandoned", "accepted"]
    assert b"never to be seen" not in pair.read_view()["root"]
    pair.same_as_source()
    # The filter keeps the new epoch: a restart goes on in it.
    pair.kill("filter", "source")
    pair.start("filter", "source")
    pair.served()
    write_some(pair, rng, 20)
    pair.settle()
    assert journal(pair)[-1].epoch == 3
    assert pair.b.points(GROUP).verdict.sealed
    pair.same_as_source()


# ---- keys and trust ----------------------------------------------------------------------------


def test_without_the_right_key_nothing_starts(make_pair: Make, rng: random.Random) -> None:
    pair = make_pair().up(key_at_b=False)
    write_some(pair, rng, 5)
    pair.settle()
    # Who has just left would be a reason of its own to refuse: until a report says that he did.
    pair.unused()
    since_ns = time.time_ns()

    def told() -> bool:
        source = pair.stored()["source"]
        return source["guest_clients"] == 0 and source["seen_ns"] > since_ns

    wait_until("the target was told", told)
    epochs = pair.stored()["epochs"]

    def refused() -> None:
        needed = pair.definition.tenant_key_id
        for start in (pair.b.test_start, pair.b.failover_start):
            with pytest.raises(errors.TenantKeyError, match=needed):
                start(GROUP)
        with pytest.raises(errors.TenantKeyError, match=needed):
            pair.b.export(GROUP, pair.root / "out")
        assert not (pair.root / "out").exists()
        assert pair.b.tests() == []
        assert pair.stored()["epochs"] == epochs

    refused()
    points = pair.b.points(GROUP)
    assert not points.key_held
    assert points.verdict.whole
    assert not points.verdict.sealed
    pair.b.key_create(KEY)  # another key of the same name
    refused()
    pair.b.key_import(pair.exported_key, name="theirs")
    pair.same_as_source()


def test_a_key_that_is_released_opens_at_that_site_only(
    make_pair: Make, rng: random.Random
) -> None:
    pair = make_pair().up(key_at_b=False)
    write_some(pair, rng, 5)
    pair.settle()
    released = pair.root / "released"
    pair.a.key_release(KEY, "beta", released, reason="a drill")
    assert pair.a.keys.get(KEY).secret.hex() not in released.read_text()
    with pytest.raises(errors.VrepError):
        pair.a.key_import(released, name="mine")
    pair.b.key_import(released)
    pair.same_as_source()


def test_an_invitation_serves_once_and_not_for_ever(make_pair: Make) -> None:
    pair = make_pair()
    pair.start("target")
    pair.listening()
    token = pair.b.invite()
    short = pair.b.invite(lifetime_s=1)
    pair.a.join(token)
    third = type(pair.a).init(pair.root / "c", name="gamma")
    with pytest.raises(errors.PeerError, match="used already"):
        third.join(token)
    deadline = time.time() + 1.5
    wait_until("the other one is over", lambda: time.time() > deadline)
    with pytest.raises(errors.PeerError, match="expired"):
        third.join(short)
    assert [peer.name for peer in pair.b.peers.list()] == ["alpha"]
    assert third.peers.list() == []


def test_a_site_that_is_gone_is_recovered_with_its_exported_key_alone(
    make_pair: Make, rng: random.Random
) -> None:
    """The source's processes are killed, its directory, memory and disks are deleted."""
    pair = make_pair(disks={"root": 16 * MIB, "data": 4 * MIB}).up(key_at_b=False)
    write_some(pair, rng, 30)
    with pair.client("data") as client:
        client.write(12345, rng.randbytes(70_000))
    pair.settle()
    wanted = {name: path.read_bytes() for name, path in pair.images.items()}
    pair.kill("filter", "source")
    shutil.rmtree(pair.a.paths.shm())
    shutil.rmtree(pair.a.paths.root)
    for image in pair.images.values():
        image.unlink()
    pair.b.key_import(pair.exported_key)
    view = take_over(pair)
    for disk in view.disks:
        with Client(disk.uri) as client:
            compare(disk.name, client.read_all(), wanted[disk.name])
            client.write(0, b"a new life")
            client.flush()
    pair.b.failover_commit(GROUP)


# ---- damage ------------------------------------------------------------------------------------


def test_a_damaged_store_never_shows_wrong_bytes(make_pair: Make, rng: random.Random) -> None:
    """One byte of the records, wherever it is: points name the damage, and what a view or an
    export still gives is right."""
    pair = make_pair().up()
    write_some(pair, rng, 40, length=20_000)
    pair.a.checkpoint(GROUP, "end")
    pair.settle()
    wanted = pair.images["root"].read_bytes()
    pair.stop("source", "filter", "target")
    (path,) = pair.store.glob("seg-*")
    with StoreReader(pair.b.paths.store, pair.group_id) as reader:
        places = [
            (span.start + int(each["position"]), int(each["header"]["body_bytes"]))
            for span in reader.records()
            for each in span.found
            if each["header"]["kind"] == layout.KIND_WRITE
        ]
    whole = path.read_bytes()
    header, named = layout.RECORD.itemsize, [True]
    for turn in range(12):
        start, body = rng.choice(places)
        # Some in the header, most in what is sealed.
        at = start + (rng.randrange(header) if turn % 3 == 0 else header + rng.randrange(body))
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            verdict = pair.b.points(GROUP).verdict
        except errors.IntegrityError as error:
            named.append(path.name in str(error))  # a store that cannot be read at all
            continue
        assert not verdict.whole, f"byte {at} of {path.name} was changed"
        with pytest.raises(errors.IntegrityError):
            pair.b.export(GROUP, pair.root / "out")
        try:
            found = pair.read_view()["root"]
        except (errors.VrepError, OSError):
            continue
        compare("root", found, wanted)
    assert all(named)
    path.write_bytes(whole)
    assert pair.b.points(GROUP).verdict.sealed


# ---- QEMU --------------------------------------------------------------------------------------


@pytest.mark.every_front(but=("iscsi", "vhost-user-blk"))
def test_qemu_rides_out_a_killed_filter(make_pair: Make, rng: random.Random) -> None:
    """reconnect-delay: the commands in flight are given again, and none fails."""
    pair = make_pair().up()
    options = (
        "driver=nbd,server.type=unix,reconnect-delay=60,export=root,"
        f"server.path={pair.a.paths.nbd_socket(GROUP)}"
    )
    begun = pair.status()["targets"][0]["seq"]
    model = bytearray(16 * MIB)
    script = []
    for turn in range(240):
        length = rng.choice([512, 4096, 65536])
        offset = rng.randrange(0, len(model) - length, 512)
        pattern = turn % 255 + 1
        model[offset : offset + length] = bytes([pattern]) * length
        script += ["-c", f"write -P {pattern} {offset} {length}"]
        if turn % 8 == 7:
            script += ["-c", "flush", "-c", "sleep 200"]  # milliseconds
    process = subprocess.Popen(
        ["qemu-io", "--image-opts", options, *script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        for kill_at in (50, 120, 190):
            wait_until(
                "it is about there",
                lambda least=begun + kill_at: (pair.status()["targets"][0]["seq"] or 0) >= least,
                every_s=0.01,
            )
            pair.kill("filter")
            pair.start("filter")
        output, _ = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, output
    assert output.count("wrote ") == 240, output
    assert "failed" not in output, output
    assert "rror" not in output, output
    compare("root", pair.images["root"].read_bytes(), bytes(model))
    pair.settle()
    pair.same_as_source()


GUEST_S = 300.0
"""for a guest without KVM to boot, or to write on, beside other tests"""
SMALL = DiskContent(
    size=96 << 20,
    small_files=20,
    small_size_max=16 << 10,
    text_files=5,
    text_size_max=32 << 10,
    big_files=1,
    big_size=1 << 20,
)


@pytest.mark.every_front(but=("iscsi", "vhost-user-blk"))
def test_a_guest_rides_out_killed_filters(make_pair: Make, tmp_path: Path) -> None:
    """A Linux guest on ext4 writes numbered, fsynced lines; its filter is killed under it, and
    at last the guest itself. Every line that it said was durable is at the other site."""
    image = GuestImage.build(Path(__file__).parents[2] / "build" / "guest")
    pair = make_pair(disks={"root": SMALL.size})
    manifest = build_disk(pair.images["root"], SMALL)
    pair.up()
    task = GuestTask()
    with Guest(image, [GuestDisk(pair.a.disk_uri(GROUP))], task) as guest:
        wait_until("it writes", lambda: len(guest.witness) > 20, GUEST_S)
        for _ in range(3):
            said = len(guest.witness)
            pair.kill("filter")
            pair.start("filter")
            wait_until("it writes on", lambda least=said + 20: len(guest.witness) > least, GUEST_S)
    killed_ms = time.time_ns() // 1_000_000
    pair.settle()
    pair.same_as_source()
    result = pair.b.export(GROUP, tmp_path / "recovered")
    verdict = check_disk(Path(result.disks[0].path), manifest)
    assert verdict.violations() == []
    lines = judge_lines(verdict.log, guest.witness, point_ms=killed_ms)
    assert lines.violations() == []
    assert len(guest.witness) > 80
