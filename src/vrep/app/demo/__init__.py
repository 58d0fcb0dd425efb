"""The demonstration: a real guest, killed at one site, recovered at the other."""

from __future__ import annotations


def main(guest: str = "qemu", *, out: str = "build/demo.json", keep: bool = False) -> int:
    """Run it; 0 when every verdict is good, 1 on a violation, 3 without a real guest."""
    from vrep.app.demo.run import run_demo

    return run_demo(guest, out=out, keep=keep)


__all__ = ["main"]
