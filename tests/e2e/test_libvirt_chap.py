"""A guest of libvirt on an iSCSI disk that asks for CHAP, by the XML of the how-to: libvirt keeps
the secret. With another one the domain does not start; with the right one it writes, and what it
wrote is at the other site."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import libvirt
import msgspec
import pytest
from sites import GROUP, Pair, wait_until
from test_libvirt_fronts import BOOT_S, DOMAIN, HOW_TO, NOBODY, SMALL, xml_of

from vrep.app.demo.guest import GuestTask
from vrep.app.demo.guest_check import check_disk
from vrep.app.demo.guest_disk import build_disk
from vrep.app.demo.guest_image import GuestImage

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
Make = Callable[..., Pair]

USER, SECRET = "user", "initiator-secret"


def how_to(word: str) -> str:
    """The one XML of the how-to that begins with an element."""
    blocks = re.findall(r"```xml\n(.*?)```", HOW_TO.read_text(), re.DOTALL)
    (found,) = [block for block in blocks if block.startswith(f"<{word} ")]
    return str(found)


def test_a_domain_proves_itself_by_its_secret(
    make_pair: Make, libvirtd: str, tmp_path: Path
) -> None:
    image = GuestImage.build(Path(__file__).parents[2] / "build" / "guest")
    pair = make_pair(disks={"root": SMALL.size}, front="iscsi")
    proof = pair.root / "chap"
    proof.touch(0o600)
    proof.write_text(f"{USER} {SECRET}\n")
    pair.options = msgspec.structs.replace(pair.options, iscsi_auth=str(proof))
    pair.root.chmod(0o711)
    manifest = build_disk(pair.images["root"], SMALL)
    # Its disk asks for a proof, which the clients of `up` do not give.
    pair.start("target")
    pair.join()
    pair.make_key()
    pair.protect()
    pair.start("filter", "source")
    pair.served()
    pair.b.key_import(pair.exported_key)
    root = pair.root / "domain"
    root.mkdir()
    os.chown(root, NOBODY, NOBODY)
    shutil.copyfile(image.kernel, root / "kernel")
    shutil.copyfile(image.initramfs, root / "initrd")
    memory, devices = xml_of(pair)
    assert f'username="{USER}"' in how_to("auth")
    devices = devices.replace("</source>", how_to("auth") + "</source>")
    task = GuestTask(pause_s=0.02).kernel_options()
    domain_xml = DOMAIN.format(memory=memory, devices=devices, root=root, task=task)
    connection = libvirt.open(libvirtd)
    secret = connection.secretDefineXML(how_to("secret"))
    secret.setValue(b"another-secret-of-it")
    with pytest.raises(libvirt.libvirtError, match=r"(?i)iscsi|authentication|login"):
        connection.createXML(domain_xml, 0)
    secret.setValue(SECRET.encode())
    domain = connection.createXML(domain_xml, 0)

    def lines() -> int:
        return (root / "console").read_text(errors="replace").count("LINE ")

    try:
        wait_until("it writes", lambda: lines() > 20, BOOT_S)
        before = lines()
        pair.kill("filter")
        pair.start("filter")
        wait_until("it writes on", lambda: lines() > before + 20)
        assert "FAILED" not in (root / "console").read_text(errors="replace")
        assert SECRET not in domain.XMLDesc(libvirt.VIR_DOMAIN_XML_SECURE)
    finally:
        domain.destroy()
        secret.undefine()
        connection.close()
    pair.settle()
    pair.same_as_source()
    result = pair.b.export(GROUP, tmp_path / "recovered")
    verdict = check_disk(Path(result.disks[0].path), manifest)
    assert verdict.violations() == []
    assert verdict.log.last is not None
    assert verdict.log.last.number >= 20
