"""A row of ``build/bench.json``, and how alternating runs become one."""

from __future__ import annotations

import statistics
from dataclasses import dataclass


@dataclass
class Row:
    """``ratio`` is ours over theirs run by run, its median; a target is a bound of it."""

    name: str
    value: float
    unit: str
    against: str
    ratio: float
    spread: float  # of the ratio: largest less smallest
    target: str  # ">= 1.5" or "<= 1.0"; empty: none
    met: bool | None
    void: bool

    def __str__(self) -> str:
        verdict = "void" if self.void else {True: "met", False: "MISSED", None: "-"}[self.met]
        return (
            f"{self.name:<44} {self.value:10.1f} {self.unit:<6} {self.ratio:6.2f} x "
            f"{self.against:<12} spread {self.spread:5.2f}  "
            f"target {self.target or '-':<8} {verdict}"
        )


def row(
    name: str,
    unit: str,
    against: str,
    ours: list[float],
    theirs: list[float],
    target: str = "",
    *,
    void: bool = False,
) -> Row:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    ratio = statistics.median(ratios)
    met = None
    if target:
        sign, bound = target.split()
        met = ratio >= float(bound) if sign == ">=" else ratio <= float(bound)
    spread = max(ratios) - min(ratios)
    return Row(name, statistics.median(ours), unit, against, ratio, spread, target, met, void)
