"""Objects travel with the disks: sealed, in the order of the writes, and not lost on the way."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from sites import GROUP, MIB, WAIT_S, Pair, wait_until

from vrep import errors
from vrep._core import layout
from vrep.app.demo.nbd_client import NbdClient
from vrep.target.reader import StoreReader

pytestmark = pytest.mark.e2e
Made = Callable[..., Pair]
SECRET = b"a-name-that-nobody-reads"


def names(pair: Pair, at: str = "latest") -> dict[str, int]:
    return {one["name"]: one["bytes"] for one in pair.b.objects(GROUP, at)}


def durable(pair: Pair) -> bool:
    return all(one["durable"] for one in pair.a.objects(GROUP))


def test_objects_come_back_as_they_were_at_each_point(make_pair: Made) -> None:
    pair = make_pair(disks={"root": 4 * MIB})
    pair.start("target")
    pair.join()
    pair.make_key()
    pair.protect()
    # Before the filter ran once, and so before the first sync.
    early = pair.a.object_put(GROUP, "domain.xml", b"<domain/>")
    assert early == {"name": "domain.xml", "bytes": 9, "durable": False}
    pair.start("filter", "source")
    pair.served()
    pair.b.key_import(pair.exported_key)
    pair.settle()
    wait_until("it is durable", lambda: durable(pair))
    pair.a.checkpoint(GROUP, "one", wait_s=WAIT_S)
    blob = os.urandom(3 * MIB + 17)
    assert pair.a.object_put(GROUP, "nvram", blob, wait_s=WAIT_S)["durable"]
    pair.a.object_put(GROUP, SECRET.decode(), SECRET * 100, wait_s=WAIT_S)
    with pair.client() as client:
        client.write(0, b"x" * 4096)
    pair.a.checkpoint(GROUP, "two", wait_s=WAIT_S)
    pair.a.object_put(GROUP, "domain.xml", b"<domain id='2'/>", wait_s=WAIT_S)
    pair.a.object_put(GROUP, "nvram", b"", wait_s=WAIT_S)
    pair.settle()

    assert names(pair, "one") == {"domain.xml": 9}
    assert names(pair, "two") == {SECRET.decode(): 2400, "domain.xml": 9, "nvram": len(blob)}
    assert names(pair) == {SECRET.decode(): 2400, "domain.xml": 16, "nvram": 0}
    assert pair.b.object_get(GROUP, "nvram", "two") == blob
    assert [o.name for o in pair.b.points(GROUP).objects] == sorted(names(pair))
    with pytest.raises(errors.NotFoundError, match="has no object"):
        pair.b.object_get(GROUP, "nvram", "one")
    result = pair.b.export(GROUP, pair.root / "out", at="two")
    assert {o.name: Path(o.path).read_bytes() for o in result.objects} == {
        "domain.xml": b"<domain/>", "nvram": blob, SECRET.decode(): SECRET * 100,
    }  # fmt: skip
    assert all(Path(o.path).stat().st_mode & 0o077 == 0 for o in result.objects)
    pair.stop("target")  # which replaces files of its store
    for path in pair.store.iterdir():  # what the target has says nothing of it
        assert SECRET not in path.read_bytes()
    for wrong, data in (("../up", b""), ("a/b", b""), ("", b""), ("large", bytes((4 << 20) + 1))):
        with pytest.raises(errors.InvalidError):
            pair.a.object_put(GROUP, wrong, data)


def test_an_object_in_a_gap_or_on_a_lost_ring_is_put_again(make_pair: Made) -> None:
    pair = make_pair(disks={"root": 4 * MIB}, ring_bytes=1 * MIB, source_settings="spill_bytes = 0")
    pair.up()
    pair.cable.cut(down=True)
    with pair.client() as client:  # the ring overflows: a gap
        fill(client)
    assert pair.status()["filter"]["gap"]
    pair.a.object_put(GROUP, "in-the-gap", b"1" * 200)
    pair.kill("filter", "source")
    for path in pair.a.paths.shm().glob("*/*"):
        path.unlink()  # as after a power loss
    pair.start("filter", "source")
    pair.served()
    pair.a.object_put(GROUP, "after-it", b"2" * 300)
    assert not durable(pair)
    pair.cable.repair()
    pair.settle()
    wait_until("all are durable", lambda: durable(pair))
    pair.settle()
    assert names(pair) == {"in-the-gap": 200, "after-it": 300}
    with StoreReader(pair.b.paths.store, pair.group_id) as reader:
        puts = sum(e.kind == layout.KIND_OBJECT for e in reader.events())
    assert puts < 10  # and not again and again

    # The target loses all that it had acknowledged: they come again with the blocks.
    pair.stop("target")
    wait_until("the target is missed", lambda: pair.status()["state"] != "replicating")
    for path in pair.store.iterdir():
        path.unlink()
    pair.store.rmdir()
    pair.start("target")
    pair.listening()
    pair.settle()
    wait_until("all are durable", lambda: durable(pair))
    pair.settle()
    assert names(pair) == {"in-the-gap": 200, "after-it": 300}


def fill(client: NbdClient) -> None:
    for number in range(80):
        client.write(number % 60 * 65536, os.urandom(65536))
