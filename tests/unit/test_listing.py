"""Listing: names and files as pathlib sees them, and nothing where nothing is."""

from __future__ import annotations

from pathlib import Path

import pytest

from vrep.listing import is_file, names_in


def test_names_are_those_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "one").touch()
    (tmp_path / ".two").mkdir()
    (tmp_path / "three").symlink_to(tmp_path / "gone")
    assert sorted(names_in(tmp_path)) == sorted(path.name for path in tmp_path.iterdir())


def test_where_nothing_is_no_names_are(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert names_in(tmp_path / "gone") == []
    assert names_in(tmp_path / "file") == []


def test_a_directory_that_cannot_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else every group would seem to be gone."""

    def refuse(_path: Path) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("vrep.listing.os.listdir", refuse)
    with pytest.raises(PermissionError):
        names_in(tmp_path)


@pytest.mark.parametrize(
    "name", ["file", "directory", "link", "broken", "loop", "gone", "file/below"]
)
def test_a_file_is_what_pathlib_says(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "broken").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert is_file(f"{tmp_path}/{name}") == (tmp_path / name).is_file()
