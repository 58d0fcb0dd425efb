"""`vrep.Site`: what it refuses, and what it leaves behind."""

from __future__ import annotations

import datetime
import stat
from pathlib import Path

import pytest

from vrep import errors
from vrep.keys.errors import TenantKeyError
from vrep.keys.release import read_log
from vrep.site import Site


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A site with a key and a peer, `east`."""
    site = Site.init(tmp_path / "site", name="west")
    site.key_create("acme")
    other = Site.init(tmp_path / "other", name="east").identity
    peer = site.peers.check(
        name=other.name,
        site_id=other.site_id,
        certificate=other.certificate_pem,
        address="",
        joined=datetime.datetime.now(datetime.UTC),
    )
    site.peers.add(peer)
    return site


# ---- keys ------------------------------------------------------------------------------


def test_a_key_replaces_no_file(site: Site, tmp_path: Path) -> None:
    out = tmp_path / "acme.release"
    site.key_release("acme", "east", out, reason="a drill")
    first = out.read_text()
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    with pytest.raises(errors.ExistsError, match=r"acme\.release"):
        site.key_release("acme", "east", out)
    with pytest.raises(errors.ExistsError, match=r"acme\.release"):
        site.key_export("acme", out)
    assert out.read_text() == first
    # What was not handed out is not in the log.
    assert [entry.reason for entry in read_log(site.keys.release_log_path)] == ["a drill"]


def test_nothing_stays_of_a_key_that_could_not_be_written(site: Site, tmp_path: Path) -> None:
    out = tmp_path / "none.key"
    with pytest.raises(TenantKeyError):
        site.key_export("none", out)
    with pytest.raises(TenantKeyError):
        site.key_release("none", "east", out)
    assert not out.exists()


@pytest.mark.parametrize("reason", ["\udcff", "two\nlines", "x" * 1001], ids=ascii)
def test_the_reason_of_a_release_is_a_line_of_text(site: Site, reason: str, tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidError, match="reason"):
        site.key_release("acme", "east", tmp_path / "acme.release", reason=reason)
    assert not (tmp_path / "acme.release").exists()
    assert not site.keys.release_log_path.exists()
