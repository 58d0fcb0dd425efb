"""What commands print: for people or for programs, and while something long runs."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from vrep.errors import VrepError


def report(error: VrepError, as_json: bool, trace: str = "") -> None:
    """The error, on standard error, behind the traceback of one that nobody foresaw."""
    if as_json:
        shown = {"type": type(error).__name__, "text": str(error), "exit_code": error.exit_code}
        if trace:
            shown["traceback"] = trace
        print(json.dumps({"error": shown}), file=sys.stderr)
    else:
        print(f"{trace}vrep: {error}", file=sys.stderr)


def size_text(count: float) -> str:
    """A size for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def time_text(wall_ns: int | None) -> str:
    """A time for people: UTC, milliseconds."""
    if not wall_ns:
        return "-"
    moment = datetime.datetime.fromtimestamp(wall_ns / 1e9, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def age_text(milliseconds: float) -> str:
    """An age for people."""
    if milliseconds < 1000:
        return f"{milliseconds:.0f} ms"
    seconds = milliseconds / 1000
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def plain(value: Any) -> Any:
    """A result of the API as what JSON knows."""
    import msgspec

    def other(unknown: Any) -> Any:
        fields = getattr(unknown, "_asdict", None)
        if fields is not None:
            return fields()
        return str(unknown)

    return msgspec.to_builtins(value, enc_hook=other)


def print_json(value: Any) -> None:
    import msgspec

    text = msgspec.json.format(msgspec.json.encode(plain(value)), indent=2)
    sys.stdout.write(text.decode() + "\n")


def emit(value: Any, as_json: bool, text: str | Callable[[], str]) -> None:
    """The answer of a command: `value` for programs, `text` for people."""
    if as_json:
        print_json(value)
        return
    shown = text() if callable(text) else text
    if shown:
        print(shown)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], empty: str = "") -> str:
    """Aligned columns, for a terminal or a pipe."""
    cells = [list(headings), *([*row] for row in rows)]
    if len(cells) == 1 and empty:
        return empty
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


class Progress:
    """A bar on standard error while something long runs; silent when nobody looks."""

    def __init__(self, what: str, as_json: bool) -> None:
        self._what = what
        self._bar: Any = None
        self._task: Any = None
        self._shown = not as_json and sys.stderr.isatty()

    def __enter__(self) -> Progress:
        if self._shown:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(self._what, total=None)
            self._bar.start()
        return self

    def __call__(self, done: int, total: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total or None)

    def step(self, what: str, done: int, total: int) -> None:
        """Progress of one of several parts."""
        if self._bar is not None:
            self._bar.update(self._task, description=what)
        self(done, total)

    def __exit__(self, *_exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()


__all__ = [
    "Progress",
    "age_text",
    "emit",
    "plain",
    "print_json",
    "report",
    "size_text",
    "table",
    "time_text",
]
