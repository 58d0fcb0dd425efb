"""A tenant key is rotated while its group replicates: nothing is sent again, and the drills of
loss and of revocation, as docs/how-to/keys.md tells them."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable

import pytest
from sites import GROUP, KEY, MIB, WAIT_S, Pair, compare, wait_until

from vrep._core import layout
from vrep.keys.datakey import inspect_wrapped
from vrep.keys.errors import TenantKeyError
from vrep.recovery.verify import VerifyOptions
from vrep.target.manifest import load_newest
from vrep.target.reader import StoreReader

pytestmark = pytest.mark.e2e

QUICK = VerifyOptions(samples=1, file_systems=False)


def held_under(pair: Pair) -> set[str]:
    """Ids of the tenant keys that the target's wrapped keys are under."""
    manifest = load_newest(pair.store, pair.group_id)
    return {inspect_wrapped(blob).tenant_key_id for blob in manifest.wrapped_keys}


def gaps(pair: Pair) -> int:
    with StoreReader(pair.b.paths.store, pair.group_id) as reader:
        return sum(event.kind == layout.KIND_GAP_BEGIN for event in reader.events())


def forget_key(pair: Pair) -> None:
    """The target's site holds no key any more."""
    for path in pair.b.paths.keys.glob("*.key"):
        path.unlink()


def test_a_rotation_under_load_sends_nothing_again(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(disks={"root": 16 * MIB}).up()
    with pair.client() as client:
        for at in range(0, 12 * MIB, MIB):
            client.write(at, bytes([at // MIB + 1]) * MIB)
        client.flush()
    pair.settle()
    before, old = pair.stored(), pair.a.keys.info(KEY).key_id
    assert held_under(pair) == {old}
    stop, written = threading.Event(), 0

    def load() -> None:
        nonlocal written
        with pair.client() as client:
            while not stop.wait(0.01):
                client.write(14 * MIB + written % 64 * 4096, bytes([written % 251]) * 4096)
                written += 1
            client.flush()

    thread = threading.Thread(target=load)
    thread.start()
    new_file = pair.root / "acme-2.key"
    try:
        assert pair.a.key_rotate(KEY, out=new_file).state == "exported"
        with pytest.raises(TenantKeyError):
            pair.a.key_rotate(KEY)
        pair.a.key_verify(KEY, new_file)
        rotation = pair.a.key_rotate(KEY, wait_s=WAIT_S)
    finally:
        stop.set()
        thread.join()
    assert rotation.state == "done"
    assert held_under(pair) == {rotation.key.key_id} != {old}
    pair.settle()
    after = pair.stored()
    assert gaps(pair) == 1  # of the first sync
    assert after["bytes"] - before["bytes"] < 2 * MIB + written * 8192
    with pytest.raises(TenantKeyError, match=rotation.key.key_id):
        pair.b.test_start(GROUP)
    assert pair.b.verify(GROUP, options=QUICK).result == "intact"
    pair.b.key_import(new_file)
    assert pair.b.verify(GROUP, options=QUICK).result == "good"
    pair.same_as_source()
    # A session that opens later goes on under the new generation.
    pair.kill("source")
    pair.start("source")
    with pair.client() as client:
        client.write(15 * MIB, b"later".ljust(512, b"."))
        client.flush()
    pair.settle()
    pair.same_as_source()


def test_a_target_is_told_when_its_source_runs_again(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(disks={"root": 4 * MIB}).up()
    old = pair.a.keys.info(KEY).key_id
    pair.kill("source")
    rotation = pair.a.key_rotate(KEY, accept_key_loss=True, wait_s=5.0)
    assert rotation.state == "unfinished"
    assert "does not run" in rotation.groups[0].text
    # Killed between the two steps: the target's copy opens with the old one.
    assert held_under(pair) == {old}
    assert pair.b.verify(GROUP, options=QUICK).result == "good"
    pair.start("source")
    new = {rotation.key.key_id}
    wait_until("the target is told", lambda: held_under(pair) == new)
    wait_until("the source knows", lambda: "keys-unsent" not in pair.status()["conditions"])
    assert pair.a.key_rotate(KEY, accept_key_loss=True).key.generation == 3


def test_the_loss_drill(make_pair: Callable[..., Pair]) -> None:
    """The source's site is gone with its keys: the export alone brings the disk back."""
    pair = make_pair(disks={"root": 4 * MIB}).up(key_at_b=False)
    with pair.client() as client:
        client.write(0, b"kept".ljust(4096, b"."))
        client.flush()
    new_file = pair.root / "acme-2.key"
    pair.a.key_rotate(KEY, out=new_file)
    pair.a.key_verify(KEY, new_file)
    assert pair.a.key_rotate(KEY, wait_s=WAIT_S).state == "done"
    pair.settle()
    wanted = pair.images["root"].read_bytes()
    pair.kill("filter", "source")
    shutil.rmtree(pair.a.paths.root)
    pair.b.key_import(pair.exported_key)  # of before the rotation: it opens nothing any more
    with pytest.raises(TenantKeyError):
        pair.b.test_start(GROUP)
    pair.b.key_import(new_file)
    assert pair.b.verify(GROUP, options=QUICK).result == "good"
    compare("root", pair.read_view()["root"], wanted)


def test_the_revocation_drill(make_pair: Callable[..., Pair]) -> None:
    """A host that held the key is not trusted any more: it opens nothing of what is stored now."""
    pair = make_pair(disks={"root": 4 * MIB}).up(key_at_b=False)
    released = pair.root / "acme.release"
    pair.a.key_release(KEY, "beta", released, reason="drill of 12 March")
    pair.b.key_import(released)
    assert pair.b.verify(GROUP, options=QUICK).result == "good"
    (entry,) = pair.a.key_releases(KEY)
    assert (entry.recipient, entry.reason) == ("beta", "drill of 12 March")
    assert entry.recipient_fingerprint == pair.b.identity.fingerprint
    assert entry.key_id == pair.a.keys.info(KEY).key_id
    rotation = pair.a.key_rotate(KEY, accept_key_loss=True, wait_s=WAIT_S)
    assert rotation.state == "done"
    assert pair.b.verify(GROUP, options=QUICK).result == "intact"
    again = pair.root / "acme-2.release"
    pair.a.key_release(KEY, "beta", again, reason="trusted again")
    forget_key(pair)
    assert pair.b.key_import(again).generation == 2
    assert pair.b.verify(GROUP, options=QUICK).result == "good"
    assert [e.key_id for e in pair.a.key_releases()] == [entry.key_id, rotation.key.key_id]
    log = pair.a.keys.release_log_path
    log.write_bytes(log.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(TenantKeyError, match="taken away"):
        pair.a.key_releases()
