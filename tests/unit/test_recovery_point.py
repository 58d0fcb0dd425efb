"""The texts of points: what each is read as, and which may name a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrep.errors import InvalidError, NotFoundError
from vrep.recovery.point import check_label, kind_of, parse_ago, parse_position, parse_time
from vrep.site import Site

NS = 1_000_000_000
NOW_NS = 1_800_000_000 * NS

NO_LABELS = (
    "",
    "latest",
    " nightly",
    "nightly ",
    "\u00a0nightly",
    "-5m",
    "-",
    "-nightly",
    "pos:1/0/7",
    "pos:nightly",
    "2026-01-31T12:00:00Z",
    "2026-01-31 12:00 before the upgrade",
    "2026-01-31t12:00",
    "two\nlines",
    "\udcff\udcfe",
    "x" * 256,
    "ä" * 128,
)


@pytest.mark.parametrize("label", NO_LABELS, ids=ascii)
def test_a_label_that_would_be_read_as_something_else_is_refused(
    label: str, tmp_path: Path
) -> None:
    site = Site.init(tmp_path / "site", name="a")
    with pytest.raises(InvalidError):
        site.checkpoint("web", label)


@pytest.mark.parametrize(
    "label", ["nightly", "before upgrade", "2026-01-31", "5m", "Latest", "ä" * 127, "12:00"]
)
def test_a_label_is_a_name(label: str, tmp_path: Path) -> None:
    site = Site.init(tmp_path / "site", name="a")
    with pytest.raises(NotFoundError, match="'web'"):  # only the group is missing
        site.checkpoint("web", label)


@given(st.text(max_size=40) | st.from_regex(r"[ -]?(latest|pos:|[0-9]{4}-[0-9]{2}.{0,12})"))
def test_every_label_that_is_taken_is_looked_up_as_it_was_given(label: str) -> None:
    try:
        check_label(label)
    except InvalidError:
        return
    # As `resolve` reads a point.
    assert label.strip() == label
    assert kind_of(label) == "label"


def test_points_are_parsed() -> None:
    assert parse_position("pos:3/0/4711") == (3, 0, 4711)
    assert parse_ago("-1.5h", NOW_NS) == NOW_NS - 5400 * NS
    assert parse_time("1970-01-01T02:00:00.25+02:00") == NS // 4
    assert parse_time("2026-01-31 12:00:00z") == 1_769_860_800 * NS


@pytest.mark.parametrize("text", ["-999999999w", "-5 minutes", "-", "-5", "-5M"])
def test_a_time_ago_that_is_none_is_refused(text: str) -> None:
    assert kind_of(text) == "ago"
    with pytest.raises(InvalidError, match=text):
        parse_ago(text, NOW_NS)


@pytest.mark.parametrize(
    "text",
    [
        "0001-01-01T00:00:00+14:00",
        "1969-12-31T23:59:59Z",
        "9999-12-31T23:59:59-14:00",
        "2026-13-31T12:00:00Z",
        "2026-01-31T12:00:00",
        "2026-01-31T12:00 before the upgrade",
    ],
)
def test_a_time_that_is_none_is_refused(text: str) -> None:
    assert kind_of(text) == "time"
    with pytest.raises(InvalidError, match=text.replace("+", r"\+")):
        parse_time(text)
