"""A disk is served on one front-end at a time, on each in its turn, with the blocks asked for."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from fronts import client_of
from sites import GROUP, MIB, Pair, free_port

from vrep import errors

pytestmark = pytest.mark.e2e
Make = Callable[..., Pair]
BLOCKS = ("iscsi_block_bytes", "vhost_block_bytes")
TURNS = ("vhost-user-blk", "iscsi", "nbd", "iscsi", "vhost-user-blk", "nbd")


def test_fronts_in_turn_and_never_at_once(make_pair: Make) -> None:
    """What is written through one is read through the next; a disk that is in use stays where it
    is, and where it was it is not any more."""
    pair = make_pair(disks={"root": 8 * MIB, "data": 8 * MIB}).up()
    held = bytearray(8 * MIB)
    known = {"nbd": pair.a.disk_uri(GROUP, "root")}
    for turn, front in enumerate(TURNS):
        at = turn * 64 * 1024
        listen = f"127.0.0.1:{free_port()}"  # at once: what is free does not stay so for long
        with pair.client("root") as client:
            with pytest.raises(errors.BusyError, match="client"):
                pair.a.set_fronts(GROUP, {"root": front}, iscsi_listen=listen)
            # It is served on as it was.
            client.write(at, bytes([turn + 1]) * 65536)
            client.zeroes(at + 4096, 4096)
            client.trim(at + 16384, 4096)
            client.flush()
            held[at : at + 65536] = client.read(at, 65536)
        assert held[at : at + 4096] == bytes([turn + 1]) * 4096
        assert held[at + 4096 : at + 8192] == bytes(4096)
        pair.unused()
        pair.a.set_fronts(GROUP, {"root": front}, iscsi_listen=listen)
        known[front] = pair.a.disk_uri(GROUP, "root")
        assert known[front].partition(":")[0].removesuffix("+unix") == front
        for other, uri in known.items():
            if other != front:
                with pytest.raises(errors.VrepError):
                    client_of(uri, 5.0)
        with pair.client("root") as client:
            assert client.read_all() == held
        with pair.client("data") as client:  # nobody moved it
            client.write(turn * 4096, os.urandom(4096))
    pair.settle()
    pair.same_as_source()


@pytest.mark.parametrize("front", ["iscsi", "vhost-user-blk"])
def test_blocks_of_4096(make_pair: Make, front: str) -> None:
    pair = make_pair(disks={"root": 8 * MIB, "odd": 4 * MIB + 512}, front="nbd").up()
    blocks = {"iscsi_block_bytes": 4096, "vhost_block_bytes": 4096}
    blocks["iscsi_listen"] = f"127.0.0.1:{free_port()}"
    with pytest.raises(errors.InvalidError, match="'odd' has 4194816 bytes"):
        pair.a.set_fronts(GROUP, {"odd": front}, **blocks)
    with pytest.raises(errors.InvalidError, match="512 or 4096"):
        pair.a.set_fronts(GROUP, {"root": front}, **{**blocks, **dict.fromkeys(BLOCKS, 1024)})
    with pair.client("odd") as client:
        client.write(4 * MIB, b"o" * 512)
    pair.unused()
    pair.a.set_fronts(GROUP, {"root": front}, **blocks)
    with pytest.raises(errors.InvalidError, match="blocks of 4096"):
        pair.a.resize(GROUP, "root", 8 * MIB + 512)
    with pair.client("root") as client:
        assert (client.block, client.bytes) == (4096, 8 * MIB)
        client.write(0, b"a" * 3 * 4096)
        client.write(1000, b"b" * 5000)
        client.trim(4096, 4096)
        client.flush()
        assert client.read(0, 4096) == b"a" * 1000 + b"b" * 3096
        assert client.read(8192, 4096) == b"a" * 4096
    pair.a.resize(GROUP, "root", 12 * MIB)
    with pair.client("root") as client:
        assert client.bytes == 12 * MIB
        client.write(11 * MIB, b"c" * MIB)
    pair.stop("filter")
    pair.start("filter")  # the definition has it
    pair.served()
    with pair.client("root") as client:
        assert client.block == 4096
        assert client.read(11 * MIB, MIB) == b"c" * MIB
    pair.settle()
    pair.same_as_source()
