"""What the documents name must exist: tests by id, mutants, and the pages they link."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
TEST_ID = re.compile(r"`(tests/[\w/.-]+\.(?:py|c))::(\w+)`")
MUTANT = re.compile(r"`(tests/mutants/[\w.-]+\.patch)`")
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)[^)]*\)")
LESSONS = 25
# Written by docs/generate.py when the documents are built.
GENERATED = {ROOT / "docs" / "reference" / name for name in ("cli.md", "config.md")}


def ids(page: Path) -> set[tuple[str, str]]:
    return set(TEST_ID.findall(page.read_text()))


def exists(path: str, name: str) -> bool:
    file = ROOT / path
    if not file.is_file():
        return False
    definition = rf"^def {name}\(" if file.suffix == ".py" else rf"^\s*RUN\({name}\);"
    text = file.read_text()
    return re.search(definition, text, re.MULTILINE) is not None


def is_page(path: Path) -> bool:
    return path.exists() or path.resolve() in GENERATED


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_tests_and_pages_exist(page: Path) -> None:
    text = page.read_text()
    missing = [f"{path}::{name}" for path, name in sorted(ids(page)) if not exists(path, name)]
    missing += [path for path in MUTANT.findall(text) if not (ROOT / path).is_file()]
    missing += [link for link in LINK.findall(text) if not is_page(page.parent / link)]
    assert missing == []


def test_every_lesson_has_a_test() -> None:
    rows = [
        line.split("|")
        for line in (ROOT / "docs" / "internals" / "lessons.md").read_text().splitlines()
        if line.startswith("| ") and not line.startswith("| lesson")
    ]
    assert len(rows) == LESSONS
    assert [row[1] for row in rows if not TEST_ID.search(row[3])] == []


def test_the_failure_model_names_a_test_in_every_row() -> None:
    text = (ROOT / "docs" / "internals" / "failure-model.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    claims = [row for row in rows if not row.startswith("| what fails")]
    assert len(claims) > 25
    assert [row for row in claims if not TEST_ID.search(row)] == []


def test_a_wrong_id_is_found() -> None:
    assert exists("tests/unit/test_docs.py", "test_a_wrong_id_is_found")
    assert not exists("tests/unit/test_docs.py", "test_that_nobody_wrote")
    assert not exists("tests/native/test_none.c", "main")
