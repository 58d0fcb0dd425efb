"""The filter goes under the disks of a running VM, and away again: every topology, under load."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sites import GROUP, MIB, WAIT_S, Pair, wait_until
from vm import BLOCK, DeviceLoad, Vm, Writer

from vrep import errors
from vrep.hypervisor import attach as attaching

pytestmark = pytest.mark.e2e
Made = Callable[..., Pair]

SIZE = 16 * MIB
BLOCKS = SIZE // BLOCK


def blockdev(**options: Any) -> list[str]:
    return ["-blockdev", json.dumps(options)]


def raw_over_file(image: Path, device: str) -> list[str]:
    """Topology `format`, as `-blockdev` builds it by hand."""
    return [
        *blockdev(
            driver="file", **{"node-name": "image-file"}, filename=str(image), discard="unmap"
        ),
        *blockdev(driver="raw", **{"node-name": "araw"}, file="image-file", discard="unmap"),
        *shlex.split(device),
    ]


def proxmox(image: Path) -> list[str]:
    """As `qm showcmd` prints it in Proxmox VE 9 for a disk of a `virtio-scsi-single` controller
    without an I/O thread, but for the image's path and driver, `io_uring` and O_DIRECT, which a
    test host may not have, and `share-rw`, by which the test writes beside the device."""
    return [
        "-object", '{"id":"throttle-drive-scsi0","limits":{},"qom-type":"throttle-group"}',
        "-device", "virtio-scsi-pci,id=virtioscsi0",
        "-blockdev", json.dumps({
            "detect-zeroes": "on", "discard": "ignore", "driver": "throttle",
            "file": {
                "cache": {"direct": False, "no-flush": False}, "detect-zeroes": "on",
                "discard": "ignore", "driver": "raw",
                "file": {
                    "aio": "threads", "cache": {"direct": False, "no-flush": False},
                    "detect-zeroes": "on", "discard": "ignore", "driver": "file",
                    "filename": str(image), "node-name": "e72b86ca87ba6bc7e90fffd586061fc",
                    "read-only": False,
                },
                "node-name": "f72b86ca87ba6bc7e90fffd586061fc", "read-only": False,
            },
            "node-name": "drive-scsi0", "read-only": False,
            "throttle-group": "throttle-drive-scsi0",
        }),
        "-device", "scsi-hd,bus=virtioscsi0.0,channel=0,scsi-id=0,lun=0,drive=drive-scsi0,id=scsi0,"
        "device_id=drive-scsi0,bootindex=100,write-cache=on,share-rw=on",
    ]  # fmt: skip


def libvirt_storage(image: Path) -> list[str]:
    """As libvirts newer than 9.0 build a raw disk: the device stands on the storage node."""
    return [
        *blockdev(
            driver="file", filename=str(image), **{"node-name": "libvirt-1-storage"},
            **{"auto-read-only": True}, discard="unmap",
        ),
        "-device",
        "virtio-blk-pci,drive=libvirt-1-storage,id=virtio-disk0,bootindex=1,write-cache=on",
    ]  # fmt: skip


def plain_drive(image: Path) -> list[str]:
    """`-drive`: QEMU makes the names of its nodes up."""
    return [
        "-drive", f"file={image},if=none,id=drive-d,format=raw,discard=unmap",
        "-device", "virtio-blk-pci,drive=drive-d,id=d",
    ]  # fmt: skip


def attach(pair: Pair, vm: Vm) -> Any:
    result = pair.a.attach(GROUP, vm.vm)
    assert result is not None
    return result


def stopped_and_whole(pair: Pair, writers: dict[str, list[Writer]]) -> None:
    """What was written is in the images, and recovered from the target."""
    for writer in [w for ws in writers.values() for w in ws]:
        writer.stop()
    pair.settle()
    recovered = pair.read_view()
    for name, image in pair.images.items():
        held = image.read_bytes()
        for writer in writers[name]:
            writer.check(held)
            writer.check(recovered[name])
        assert recovered[name] == held


@pytest.mark.parametrize(
    ("build", "node"),
    [
        (
            lambda image: raw_over_file(
                image, "-device virtio-blk-pci,drive=araw,id=a,share-rw=on"
            ),
            "araw",
        ),
        (proxmox, "drive-scsi0"),
    ],
    ids=["format", "proxmox"],
)
def test_no_write_is_missed_at_the_start_of_an_attach_under_load(
    make_pair: Made, build: Callable[[Path], list[str]], node: str
) -> None:
    """And none at its end, nor when it is begun again; and the graph is as it was."""
    pair = make_pair(disks={"root": SIZE})
    with Vm(*build(pair.images["root"])) as vm:
        pair.up_beside()
        uri = vm.export(node, "load")
        writers = [Writer(uri, i * BLOCKS // 4, BLOCKS // 4, i + 1) for i in range(4)]
        before = vm.graph()
        for _round in range(2):
            for writer in writers:
                writer.goes_on()
                writer.latest_ms = 0.0
            result = attach(pair, vm)
            for writer in writers:
                writer.goes_on()
            print(f"attach: {result.switch_ms} ms, slowest write {slowest(writers):.1f} ms")
            assert pair.status()["clients"] == 1
            wait_until("the sync ends", lambda: pair.status()["state"] == "replicating")
            for writer in writers:
                writer.goes_on()
                writer.latest_ms = 0.0
            if _round == 0:
                result = pair.a.detach(GROUP)
                for writer in writers:
                    writer.goes_on()
                print(f"detach: {result.switch_ms} ms, slowest write {slowest(writers):.1f} ms")
                assert vm.graph() == before
                assert pair.status()["conditions"].count("detached") == 1
        stopped_and_whole(pair, {"root": writers})
        pair.a.detach(GROUP)
        assert vm.graph() == before
        assert vm.alive()


@pytest.mark.parametrize(
    ("build", "device"),
    [
        (libvirt_storage, "/machine/peripheral/virtio-disk0/virtio-backend"),
        (plain_drive, "drive-d"),
    ],
    ids=["libvirt", "drive"],
)
def test_a_node_is_inserted_where_none_can_be_reopened(
    make_pair: Made, build: Callable[[Path], list[str]], device: str
) -> None:
    """The device writes through QEMU's main loop, some writes under way at each step."""
    pair = make_pair(disks={"root": SIZE})
    with Vm(*build(pair.images["root"])) as vm:
        pair.up_beside()
        load = DeviceLoad(vm, device)
        before = vm.graph()
        for _round in range(2):
            load.goes_on()
            attach(pair, vm)
            load.goes_on()
            wait_until("the sync ends", lambda: pair.status()["state"] == "replicating")
            assert vm.qemu_io(device, "discard 8M 1M") == ""
            load.goes_on()
            if _round == 0:
                pair.a.detach(GROUP)
                load.goes_on()
                assert vm.graph() == before
        load.stop()
        pair.settle()
        held = pair.images["root"].read_bytes()
        load.check(held)
        assert pair.read_view()["root"] == held
        assert pair.status()["filter"]["zeroes"] > 0  # a discard comes through
        pair.a.detach(GROUP)
        assert vm.graph() == before


def slowest(writers: list[Writer]) -> float:
    return max(writer.latest_ms for writer in writers)


def two_disks(pair: Pair) -> list[str]:
    root, data = pair.images["root"], pair.images["data"]
    return [
        *raw_over_file(root, "-device virtio-blk-pci,drive=araw,id=a,share-rw=on"),
        *blockdev(driver="raw", **{"node-name": "braw"}, file={
            "driver": "file", "filename": str(data), "node-name": "bfile",
        }),
        "-device", "virtio-scsi-pci,id=s",
        "-device", "scsi-hd,bus=s.0,drive=braw,id=b,share-rw=on",
    ]  # fmt: skip


DISKS = {"root": SIZE, "data": SIZE}


def test_all_disks_of_a_group_switch_by_one_command(make_pair: Made) -> None:
    """And a filter that is killed and restarted afterwards is a pause to the VM, no error."""
    pair = make_pair(disks=DISKS)
    with Vm(*two_disks(pair)) as vm:
        pair.up_beside()
        before = vm.graph()
        planned = pair.a.attach(GROUP, vm.vm, dry_run=True)
        assert planned is not None
        switches = [c for c in planned.commands if c.execute == "blockdev-reopen"]
        assert len(switches) == 1
        assert {o["node-name"] for o in switches[0].arguments["options"]} >= {"araw", "braw"}
        assert vm.graph() == before
        assert pair.status()["clients"] == 0
        writers = {
            name: [Writer(uri, i * 2000, 2000, i + 1) for i in range(2)]
            for name, uri in (
                ("root", vm.export("araw", "root")),
                ("data", vm.export("braw", "data")),
            )
        }
        every = [w for ws in writers.values() for w in ws]
        before = vm.graph()
        done = attach(pair, vm)
        assert done.commands == planned.commands
        for writer in every:
            writer.goes_on()
        pair.kill("filter")
        pair.start("filter")
        for writer in every:
            writer.goes_on()
        stopped_and_whole(pair, writers)
        pair.a.detach(GROUP)
        assert vm.graph() == before


class Cut(Exception):
    """The process that attaches ends here."""


@pytest.mark.parametrize("way", ["attach", "detach"])
def test_what_is_cut_off_at_any_command_is_put_right(
    make_pair: Made, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """By the same command, and by `detach`, with the VM writing; nothing is lost."""
    pair = make_pair(disks={"root": SIZE})
    run = attaching._run
    with Vm(*libvirt_storage(pair.images["root"])) as vm:
        pair.up_beside()
        load = DeviceLoad(vm, "/machine/peripheral/virtio-disk0/virtio-backend")
        before = vm.graph()
        cuts = 0
        while True:
            left = cuts

            def run_or_cut(monitor: Any, command: Any) -> None:
                nonlocal left
                if left == 0:
                    raise Cut
                left -= 1
                run(monitor, command)

            if way == "detach":
                attach(pair, vm)
            monkeypatch.setattr(attaching, "_run", run_or_cut)
            try:
                if way == "attach":
                    attach(pair, vm)
                else:
                    pair.a.detach(GROUP)
                cut = False
            except Cut:
                cut = True
            monkeypatch.setattr(attaching, "_run", run)
            load.goes_on(3)
            if way == "attach" and cut and cuts % 2:
                attach(pair, vm)
                load.goes_on(3)
            pair.a.detach(GROUP)
            load.goes_on(3)
            assert vm.graph() == before, cuts
            if not cut:
                break
            cuts += 1
        assert cuts >= 5
        attach(pair, vm)
        load.goes_on()
        load.stop()
        pair.settle()
        held = pair.images["root"].read_bytes()
        load.check(held)
        assert pair.read_view()["root"] == held


def refused(pair: Pair, vm: Vm, kind: type[errors.VrepError], match: str) -> None:
    before = vm.graph()
    for dry_run in (True, False):
        with pytest.raises(kind, match=match):
            pair.a.attach(GROUP, vm.vm, dry_run=dry_run)
    assert vm.graph() == before
    assert vm.alive()
    assert not (pair.a.groups.path(GROUP) / "attached.json").exists()


def test_an_unknown_block_graph_is_refused_and_left_as_it_is(make_pair: Made) -> None:
    pair = make_pair(disks={"root": SIZE})
    image = pair.images["root"]
    file = {"driver": "file", "filename": str(image), "node-name": "f"}
    device = ["-device", "virtio-blk-pci,drive=top,id=d"]
    top = {"node-name": "top"}
    pair.up_beside()
    graphs: list[tuple[list[str], type[errors.VrepError], str]] = [
        ([], errors.NotFoundError, "does not have .* open"),
        (
            [*blockdev(driver="copy-on-read", **top, file={"driver": "raw", "file": file,
              "node-name": "r"}), *device],
            errors.UnsupportedError, "copy-on-read",
        ),
        (
            [*blockdev(driver="raw", **top, file=file, size=SIZE // 2), *device],
            errors.UnsupportedError, "a part of its file",
        ),
        (
            [*blockdev(driver="raw", **top, file=file, **{"read-only": True}), *device],
            errors.UnsupportedError, "read only",
        ),
        (
            [*blockdev(driver="raw", **top, file=file),
             "-object", "iothread,id=io", "-device", "virtio-blk-pci,drive=top,id=d,iothread=io"],
            errors.UnsupportedError, "I/O threads",
        ),
        (
            [*blockdev(**file), *blockdev(driver="raw", **top, file="f"),
             *blockdev(driver="raw", **{"node-name": "other"}, file="f"), *device],
            errors.UnsupportedError, "2 users of one node",
        ),
        (
            [*blockdev(**{**file, "locking": "off"}), *blockdev(driver="raw", **top, file="f"),
             *device],
            errors.BusyError, "is served",
        ),
    ]  # fmt: skip
    for arguments, kind, match in graphs:
        # While no VM runs, the filter takes the disk.
        pair.a.detach(GROUP)
        if match == "is served":
            pair.a.attach(GROUP)
            pair.a.wait_served(GROUP, WAIT_S)
        with Vm(*arguments) as vm:
            if match == "is served":
                with pytest.raises(kind, match=match):
                    attach(pair, vm)
            else:
                refused(pair, vm, kind, match)


def test_a_vm_without_locks_is_refused(make_pair: Made) -> None:
    """The filter could not know when it lets go of its disk."""
    pair = make_pair(disks={"root": SIZE})
    pair.up_beside()
    pair.a.detach(GROUP)
    file = {"driver": "file", "filename": str(pair.images["root"]), "locking": "off"}
    with Vm(
        *blockdev(driver="raw", file={**file, "node-name": "f"}, **{"node-name": "top"}),
        "-device", "virtio-blk-pci,drive=top,id=d",
    ) as vm:  # fmt: skip
        before = vm.graph()
        with pytest.raises(errors.StateError, match="no VM holds the image locks"):
            attach(pair, vm)
        assert vm.graph() == before
        assert "detached" in pair.status()["conditions"]


def test_a_switch_that_qemu_refuses_leaves_all_as_it_was(make_pair: Made) -> None:
    pair = make_pair(disks=DISKS)
    with Vm(*two_disks(pair)) as vm:
        pair.up_beside()
        writer = Writer(vm.export("araw", "root"), 0, 1000, 1)
        before = vm.graph()
        switch = attaching.recipe.switch

        def broken(disks: Any, *, on: bool) -> Any:
            command = switch(disks, on=on)
            command.arguments["options"][1]["file"] = "nobody"
            return command

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attaching.recipe, "switch", broken)
            with pytest.raises(errors.HypervisorError, match="nobody"):
                attach(pair, vm)
        writer.goes_on()
        assert vm.graph() == before
        attach(pair, vm)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attaching.recipe, "switch", broken)
            with pytest.raises(errors.HypervisorError, match="nobody"):
                pair.a.detach(GROUP)
        writer.goes_on()
        assert pair.status()["clients"] == 2
        assert pair.status()["conditions"].count("handing-over") == 0
        stopped_and_whole(pair, {"root": [writer], "data": []})
        pair.a.detach(GROUP)
        assert vm.graph() == before


def test_a_detached_group_leaves_its_disks_alone(make_pair: Made) -> None:
    """A VM that was detached stops and starts on its own disk; one that is off can be detached
    too; then the socket serves it again, and all of it is compared."""
    pair = make_pair(disks={"root": SIZE})
    build = raw_over_file(pair.images["root"], "-device virtio-blk-pci,drive=araw,id=a")
    pair.up_beside()
    pair.served()
    with pair.client() as client:
        client.write(0, b"served" * 100)
        with pytest.raises(errors.StateError, match="was not attached"):
            pair.a.detach(GROUP)
    pair.unused()
    pair.a.detach(GROUP)
    for _time in range(2):
        with Vm(*build) as vm:
            load = DeviceLoad(vm, "/machine/peripheral/a/virtio-backend")
            load.goes_on()
            load.stop()
            with pytest.raises(errors.DetachedError):
                pair.a.wait_served(GROUP, 0.1)
    pair.kill("filter")  # and a filter that starts later knows
    pair.start("filter")
    wait_until("the filter runs", lambda: pair.a.running("filter"))
    assert pair.status()["state"] == "offline"
    assert pair.status()["conditions"].count("detached") == 1
    pair.a.attach(GROUP)
    pair.served()
    assert pair.status()["filter"]["opened_as"] == "unexplained"
    pair.settle()
    pair.same_as_source()


def test_the_page_on_attaching_does_what_it_says(make_pair: Made) -> None:
    """Its commands, as they stand there, in one shell."""
    page = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "attach.md"
    script = "\n".join(
        re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    )
    assert script.count("vrep ") > 5
    pair = make_pair(disks={"root": SIZE})
    build = raw_over_file(pair.images["root"], "-device virtio-blk-pci,drive=araw,id=a")
    pair.start("target")
    pair.join()
    pair.make_key()
    pair.start("filter", "source")
    wait_until("the filter runs", lambda: pair.a.running("filter"))
    with Vm(*build) as vm:
        before = vm.graph()
        (pair.root / "vm.sock").symlink_to(vm.qmp)
        shell = subprocess.run(
            ["bash", "-ec", script],
            cwd=pair.root,
            env={
                **os.environ,
                "VREP_DIR": str(pair.a.paths.root),
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        print(shell.stdout)
        assert shell.returncode == 0
        assert '"execute":"blockdev-reopen"' in shell.stdout
        assert "web: attached to qmp:" in shell.stdout
        assert "web: detached in" in shell.stdout
        assert vm.graph() == before
