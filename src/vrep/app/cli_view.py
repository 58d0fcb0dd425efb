"""What recovery answers, for people: points, views, exports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vrep.app.cli_output import size_text, table

if TYPE_CHECKING:
    from vrep.recovery.changes import ChangeList
    from vrep.recovery.export import ExportResult
    from vrep.recovery.points import PointList
    from vrep.recovery.untaken import Untaken
    from vrep.recovery.verdict import VerdictInfo
    from vrep.recovery.view import ViewInfo


def view_text(view: ViewInfo) -> str:
    """What it is, and where a VM finds its disks."""
    lines = [f"{view.group}: {view.kind} {view.id}, {view.state}, as of {view.time} ({view.point})"]
    if view.conditions:
        lines.append(f"  conditions: {', '.join(view.conditions)}")
    gone = "not served: the group is at another site"
    lines += [f"  {disk.name}: {disk.uri or gone}" for disk in view.disks]
    if view.bitmap:
        lines.append(f"  what may differ from {view.since}: {view.bitmap}")
    if filled := _fill_text(view):
        lines.append(f"  {filled}")
    return "\n".join(lines)


def _fill_text(view: ViewInfo) -> str:
    """How far the disks of a failover are whole, which until then need the view."""
    fills = [view.fill] if "done" in view.fill else [part for part in view.fill.values() if part]
    if view.kind != "failover" or not fills:
        return ""
    if all(fill["done"] for fill in fills):
        return "filled: its disks are whole"
    reached = [at for fill in fills for at in fill["filled_to"].values()]
    return f"filling: {size_text(sum(reached))} of {size_text(sum(d.bytes for d in view.disks))}"


def untaken_text(left: Untaken) -> str:
    """How much was not taken over, and where it went."""
    count = sum(len(disk.extents) for disk in left.disks)
    behind = f" behind {left.after}" if left.after else ""
    lines = [f"{left.group}: {size_text(left.bytes)} in {count} extent(s) not taken over{behind}"]
    if not left.known:
        lines.append("  no change map was there: every block is named")
    lines.append(f"  exported to {left.exported}")
    return "\n".join(lines)


def points_text(found: PointList) -> str:
    """Ranges, gaps and checkpoints in the order of time, and whether they can be trusted."""
    rows = [(r.first.time, "any write from here", r.first.point) for r in found.ranges]
    rows += [(r.last.time, "to here", r.last.point) for r in found.ranges]
    for gap in found.gaps:
        what = "gap, still open" if gap.open else f"gap until {gap.end.time}"
        rows.append((gap.begin.time, what, gap.begin.point))
    for mark in found.marks:
        label = "(its label needs the key)" if mark.label is None else mark.label
        spoilt = "" if mark.recoverable else " (inside a gap)"
        rows.append((mark.time, f"checkpoint {label}{spoilt}", mark.point))
    rows += _cut_rows(found)
    states = {v.point: _verdict_text(v) for v in found.verdicts}
    listed = {point for _time, _what, point in rows}
    rows += [(v.time or "?", "verified", v.point) for v in found.verdicts if v.point not in listed]
    cells = [(time, what, point, states.get(point, "-")) for time, what, point in sorted(rows)]
    headings = ("TIME", "WHAT", "POINT", "VERDICT")
    lines = [table(headings, cells, "nothing can be recovered yet")]
    lines += [
        f"{v.point}: {v.state}: {v.text}" for v in found.verdicts if v.text and v.state != "good"
    ]
    lines += [
        f"object {each.name}: {size_text(each.bytes)}, of {each.time}" for each in found.objects
    ]
    verdict = found.verdict
    if verdict.whole:
        how = "with the tenant's key" if verdict.sealed else "without a key: order and digests only"
        lines.append(f"history is whole up to {verdict.checked_to or 'its start'}, checked {how}")
    if verdict.note:
        lines.append(verdict.note)
    return "\n".join(lines)


def _cut_rows(found: PointList) -> list[tuple[str, str, str]]:
    """The first and the last of the cuts of a group with several lanes, and those in which a lane
    has no part; checkpoints have lines of their own."""
    rows = []
    for i, cut in enumerate(found.cuts):
        without = f", without lane {', '.join(map(str, cut.absent))}" if cut.absent else ""
        begins = i == 0 or found.cuts[i - 1].absent != cut.absent
        if begins or i == len(found.cuts) - 1:
            which = f"cut {i + 1} of {len(found.cuts)}"
            rows.append((cut.time, f"{which}{without}", cut.point))
    return rows


def _verdict_text(verdict: VerdictInfo) -> str:
    """What a verification said of a point, and when."""
    return f"{verdict.state}, {verdict.made[:16]}Z" if verdict.made else verdict.state


def changes_text(found: ChangeList) -> str:
    """Every extent, and how much that is of each disk."""
    rows = [
        (disk.name, str(extent.offset), str(extent.length))
        for disk in found.disks
        for extent in disk.extents
    ]
    lines = [table(("DISK", "OFFSET", "LENGTH"), rows)] if rows else []
    lines += [
        f"{disk.name}: {size_text(disk.changed_bytes)} of {size_text(disk.bytes)} may differ, in "
        f"{len(disk.extents)} extents"
        for disk in found.disks
    ]
    lines.append(f"from {found.since.time} ({found.since.point})")
    lines.append(f"to   {found.at.time} ({found.at.point})")
    return "\n".join(lines)


def export_text(result: ExportResult) -> str:
    """The files that were written."""
    lines = [f"{result.group} as of {result.time} ({result.point})"]
    for disk in result.disks:
        digest = f"  sha256 {disk.sha256}" if disk.sha256 else ""
        lines.append(
            f"  {disk.path}: {size_text(disk.bytes)}, {size_text(disk.data_bytes)} of data{digest}"
        )
    lines += [f"  {each.path}: {size_text(each.bytes)}" for each in result.objects]
    return "\n".join(lines)


__all__ = ["changes_text", "export_text", "points_text", "view_text"]
