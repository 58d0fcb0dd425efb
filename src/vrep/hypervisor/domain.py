"""What is kept of a libvirt domain beside its disks: its definition, and its NVRAM if it has
one."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from vrep import errors
from vrep.hypervisor.monitor import libvirt_modules, open_domain

__all__ = ["DOMAIN_XML", "NVRAM", "describe"]

DOMAIN_XML: Final = "domain.xml"
NVRAM: Final = "nvram"


def describe(name: str) -> tuple[dict[str, bytes], str]:
    """The objects of a running domain, and why one is missing: its NVRAM is a file that only the
    hypervisor may be able to read."""
    libvirt, _ = libvirt_modules()
    connection, domain = open_domain(name)
    with contextlib.closing(connection):
        try:
            # As it is defined, which is how it is started again; of a transient one, as it runs.
            flags = libvirt.VIR_DOMAIN_XML_INACTIVE if domain.isPersistent() else 0
            xml = str(domain.XMLDesc(flags))
        except libvirt.libvirtError as error:
            raise errors.UnreachableError(f"libvirt domain {name!r}: {error}") from None
    found = {DOMAIN_XML: xml.encode()}
    nvram = ElementTree.fromstring(xml).findtext("./os/nvram")
    if not nvram:
        return found, ""
    try:
        found[NVRAM] = Path(nvram).read_bytes()
    except OSError as error:
        return found, f"its NVRAM is not kept: {nvram}: {error.strerror or error}"
    return found, ""
