"""Site identity: its files, its certificate, and what is refused."""

from __future__ import annotations

import datetime
import ssl
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from vrep.durable import write_atomic
from vrep.keys import IdentityError, SiteIdentity, certificate_fingerprint, load_certificate


def test_create_and_load(tmp_path: Path) -> None:
    made = SiteIdentity.create(tmp_path, "site-a")
    assert SiteIdentity.load(tmp_path) == made
    assert len(made.site_id) == 32
    assert made.fingerprint == certificate_fingerprint(made.certificate)
    assert stat.S_IMODE(made.key_path.stat().st_mode) == 0o600
    assert made.private_key().public_key() == made.certificate.public_key()


def test_certificate_lives_ten_years(tmp_path: Path) -> None:
    now = datetime.datetime(2026, 5, 1, tzinfo=datetime.UTC)
    certificate = SiteIdentity.create(tmp_path, "site-a", now=lambda: now).certificate
    assert certificate.not_valid_before_utc == now - datetime.timedelta(days=1)
    assert certificate.not_valid_after_utc >= now + datetime.timedelta(days=3652)
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"


def test_an_identity_is_never_replaced(tmp_path: Path) -> None:
    made = SiteIdentity.create(tmp_path, "site-a")
    with pytest.raises(IdentityError, match="already"):
        SiteIdentity.create(tmp_path, "site-b")
    assert SiteIdentity.load(tmp_path) == made


def test_missing_mixed_and_damaged_parts(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="vrep site init"):
        SiteIdentity.load(tmp_path)
    one = SiteIdentity.create(tmp_path / "one", "one")
    two = SiteIdentity.create(tmp_path / "two", "two")
    pem = one.key_path.read_bytes()
    one.key_path.write_bytes(two.key_path.read_bytes())
    with pytest.raises(IdentityError, match="does not belong"):
        SiteIdentity.load(tmp_path / "one")
    one.key_path.write_bytes(pem)
    one.certificate_path.write_text(two.certificate_pem)
    with pytest.raises(IdentityError, match="not the one of this site"):
        SiteIdentity.load(tmp_path / "one")
    one.certificate_path.write_text("nothing")
    with pytest.raises(IdentityError, match="certificate"):
        SiteIdentity.load(tmp_path / "one")
    (tmp_path / "two" / "identity" / "site.json").write_text("{")
    with pytest.raises(IdentityError, match="cannot read"):
        SiteIdentity.load(tmp_path / "two")


def test_only_small_self_signed_p256_certificates(tmp_path: Path) -> None:
    one = SiteIdentity.create(tmp_path / "one", "one")
    assert load_certificate(one.certificate_pem) == one.certificate
    with pytest.raises(IdentityError, match="at most"):
        load_certificate(one.certificate_pem + " " * 9000)
    der = bytearray(one.certificate.public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    with pytest.raises(IdentityError):
        load_certificate(ssl.DER_cert_to_PEM_cert(bytes(der)))


def test_write_atomic(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"one")
    write_atomic(path, b"two", 0o640)
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    with pytest.raises(FileExistsError):
        write_atomic(path, b"three", exclusive=True)
    assert path.read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
