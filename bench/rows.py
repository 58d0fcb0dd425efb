"""A row of ``build/bench.json``, and how alternating runs become one."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any


def reached(value: float, target: str) -> bool | None:
    """Whether a bound such as ">= 1.5" holds; None without one."""
    if not target:
        return None
    sign, bound = target.split()
    return value >= float(bound) if sign == ">=" else value <= float(bound)


@dataclass
class Row:
    """``ratio`` is ours over theirs run by run, its median; without a peer it is None and
    the target is a bound of the value. ``void`` says that a run was not as it must be."""

    name: str
    value: float
    unit: str
    against: str
    ratio: float | None
    spread: float  # of the ratio, or of the value: largest less smallest
    target: str  # ">= 1.5" or "<= 1.0"; empty: none
    met: bool | None
    void: bool
    against_value: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    runs: list[tuple[float, float]] = field(default_factory=list)
    """ours and theirs of each turn, in order: whether a median hides two states is seen there"""

    def __str__(self) -> str:
        verdict = "void" if self.void else {True: "met", False: "MISSED", None: "-"}[self.met]
        peer = "" if self.ratio is None else f"{self.ratio:6.2f} x {self.against}"
        notes = "".join(f" {name} {value}" for name, value in self.notes.items())
        return (
            f"{self.name:<48} {self.value:10.2f} {self.unit:<6} {peer:<20} "
            f"spread {self.spread:5.2f}  target {self.target or '-':<8} {verdict}{notes}"
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
    **notes: Any,
) -> Row:
    """Ours beside theirs, run by run."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    ratio, spread = statistics.median(ratios), max(ratios) - min(ratios)
    value, other = statistics.median(ours), statistics.median(theirs)
    met = reached(ratio, target)
    runs = list(zip(ours, theirs, strict=True))
    return Row(name, value, unit, against, ratio, spread, target, met, void, other, notes, runs)


def plain(
    name: str,
    unit: str,
    values: list[float],
    target: str = "",
    *,
    void: bool = False,
    **notes: Any,
) -> Row:
    """A value with an absolute bound, the median of the runs."""
    value, spread = statistics.median(values), max(values) - min(values)
    return Row(
        name, value, unit, "", None, spread, target, reached(value, target), void, None, notes
    )
