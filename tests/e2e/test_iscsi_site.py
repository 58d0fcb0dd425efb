"""A protected group over iSCSI: chosen in `protect`, replicated, through a killed filter."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from sites import GROUP, Pair, free_port, wait_until

from vrep.errors import BusyError, InvalidError

Make = Callable[..., Pair]
MIB = 1 << 20


def io(uri: str, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "raw", *words, uri], check=True, timeout=120)


def test_what_is_written_over_iscsi_is_at_the_other_site(make_pair: Make) -> None:
    pair = make_pair(disks={"root": 16 * MIB, "data": 8 * MIB})
    pair.up()
    with pytest.raises(InvalidError, match="--iscsi-listen"):
        pair.a.set_fronts(GROUP, {"root": "iscsi"})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(BusyError):
            pair.a.set_fronts(GROUP, {"root": "iscsi"}, iscsi_listen=where)
    # It is served as it was.
    assert pair.a.disk_uri(GROUP).startswith("nbd+unix:")
    with pair.client("root") as client:
        client.write(0, b"n" * 4096)
    pair.unused()
    pair.a.set_fronts(GROUP, {"root": "iscsi"}, iscsi_listen=f"127.0.0.1:{free_port()}")
    uri = pair.a.disk_uri(GROUP, "root")
    assert uri.startswith("iscsi://127.0.0.1:")
    io(uri, "read -P 110 0 4k", "write -P 5 1M 2M", "discard 1M 64k", "write -P 6 8M 1M", "flush")
    pair.kill("filter")
    pair.start("filter")
    pair.served()
    io(
        uri,
        "read -P 0 1M 64k",
        "read -P 5 1088k 1M",
        "read -P 6 8M 1M",
        "write -P 7 0 64k",
        "flush",
    )
    with pair.client("data") as client:  # the other disk stays with NBD
        client.write(0, b"d" * 4096)
    listed = subprocess.run(
        ["nbdinfo", "--list", "--json", f"nbd+unix:///?socket={pair.a.paths.nbd_socket(GROUP)}"],
        check=True,
        capture_output=True,
    )
    assert [one["export-name"] for one in json.loads(listed.stdout)["exports"]] == ["data"]
    pair.settle()
    pair.same_as_source()
    pair.unused()
    pair.a.set_fronts(GROUP, {"root": "nbd"})
    assert pair.a.disk_uri(GROUP, "root").startswith("nbd+unix:")
    with pair.client("root") as client:
        assert client.read(0, 65536) == b"\7" * 65536


class Console:
    """A qemu-io that stays: QEMU's own initiator, with a session that must outlive what happens."""

    def __init__(self, uri: str, folder: Path) -> None:
        # Read by another descriptor: to seek in this one would move where it writes.
        self._said = folder / "qemu-io.txt"
        with self._said.open("w") as output:
            self._process = subprocess.Popen(
                ["qemu-io", "-f", "raw", uri], stdin=subprocess.PIPE, stdout=output,
                stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
        self._seen = 0
        self._answer()

    def _answer(self) -> str:
        """What it says until it asks for the next command: it must not find two of them."""

        def text() -> str:
            return self._said.read_text()[self._seen :]

        def ready() -> bool:
            return text().endswith("qemu-io> ") or self._process.poll() is not None

        wait_until("qemu-io asks for a command", ready)
        answer = text()
        self._seen += len(answer)
        assert self._process.poll() is None, answer
        return answer

    def do(self, command: str, says: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        assert says in answer, answer
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def test_an_initiator_is_told_of_a_new_size(make_pair: Make, tmp_path: Path) -> None:
    pair = make_pair(disks={"root": 16 * MIB})
    pair.up()
    pair.a.set_fronts(GROUP, {"root": "iscsi"}, iscsi_listen=f"127.0.0.1:{free_port()}")
    uri = pair.a.disk_uri(GROUP, "root")
    console = Console(uri, tmp_path)
    try:
        console.do("write -P 1 0 64k", "wrote 65536/65536")
        for size, at in ((24 * MIB, 23 * MIB), (8 * MIB, 7 * MIB)):
            pair.a.resize(GROUP, "root", size, shrink=size < 16 * MIB)
            # It comes back by itself, is told, and asks again.
            told = console.do("read -P 1 0 64k", "read 65536/65536")
            assert "CAPACITY_DATA_HAS_CHANGED" in told
            console.do(f"truncate {size}", "")
            console.do("length", f"{size // MIB} MiB")
            console.do(f"write -P 2 {at} 64k", "wrote 65536/65536")
            again = console.do("read -P 1 0 64k", "read 65536/65536")
            assert "UNIT_ATTENTION" not in again
            capacity = subprocess.run(
                ["iscsi-readcapacity16", uri], check=True, capture_output=True, text=True
            )
            assert f"RETURNED LOGICAL BLOCK ADDRESS:{size // 512 - 1}" in capacity.stdout
    finally:
        console.close()
    pair.settle()
    pair.same_as_source()
