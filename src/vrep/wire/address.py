"""Addresses as people write them: HOST:PORT, [IPv6]:PORT."""

from __future__ import annotations

from vrep.errors import InvalidError

__all__ = ["format_address", "parse_address"]


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    valid = port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535
    if not colon or not host or len(host) > 253 or not valid:
        raise InvalidError(f"{text!r} is no address: HOST:PORT or [IPv6]:PORT is needed")
    return host, int(port)


def format_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
