"""Who a site is: a random id, a name, and a certificate with its key.

The certificate is self-signed (EC P-256, ten years).  Nobody vouches for it:
peers pin its fingerprint, the SHA-256 of its DER bytes, when they join.  Lives
in DIR/identity; the private key has mode 0600 and never leaves the directory.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from vrep.durable import make_private_directory, write_atomic
from vrep.keys.errors import IdentityError

__all__ = [
    "CERTIFICATE_YEARS",
    "SiteIdentity",
    "certificate_fingerprint",
    "check_name",
    "load_certificate",
    "utc_now",
]

CERTIFICATE_YEARS = 10
CERTIFICATE_PEM_BYTES_MAX = 8192
IDENTITY_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def check_name(what: str, name: str) -> str:
    """Names of sites and keys are file names too: letters, digits, `._-`,
    at most 63, beginning with a letter or digit. Returns the name."""
    if not _NAME.fullmatch(name):
        raise IdentityError(
            f"{name!r} is no name of a {what}: 1 to 63 letters, digits, '.', '_' or '-', "
            "the first a letter or digit"
        )
    return name


def load_certificate(pem: str | bytes) -> x509.Certificate:
    """Parse one PEM certificate of bounded size, with an EC P-256 key that
    signed it. IdentityError for anything else."""
    data = pem.encode("ascii", "replace") if isinstance(pem, str) else pem
    if len(data) > CERTIFICATE_PEM_BYTES_MAX:
        raise IdentityError(f"a site's certificate has at most {CERTIFICATE_PEM_BYTES_MAX} bytes")
    try:
        certificate = x509.load_pem_x509_certificate(data)
        key = certificate.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(
            key.curve, ec.SECP256R1
        ):
            raise IdentityError("a site's certificate must hold an EC P-256 key")
        certificate.verify_directly_issued_by(certificate)
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise IdentityError(f"not a self-signed certificate of a site: {error}") from None
    return certificate


def certificate_fingerprint(certificate: x509.Certificate | bytes) -> str:
    """SHA-256 of the DER bytes, 64 hex digits."""
    der = (
        certificate
        if isinstance(certificate, bytes)
        else certificate.public_bytes(serialization.Encoding.DER)
    )
    return hashlib.sha256(der).hexdigest()


class _SiteFile(msgspec.Struct, frozen=True):
    version: int
    site_id: str
    name: str
    fingerprint: str
    created: datetime.datetime


@dataclass(frozen=True)
class SiteIdentity:
    """A site's identity, loaded. The private key does not show in its repr."""

    site_id: str
    name: str
    fingerprint: str
    created: datetime.datetime
    directory: Path
    certificate_pem: str = field(repr=False)

    @property
    def certificate_path(self) -> Path:
        return self.directory / "cert.pem"

    @property
    def key_path(self) -> Path:
        return self.directory / "key.pem"

    @property
    def certificate(self) -> x509.Certificate:
        return load_certificate(self.certificate_pem)

    def private_key(self) -> ec.EllipticCurvePrivateKey:
        """The key, read from its file each time so that it is not kept in memory."""
        try:
            key = serialization.load_pem_private_key(self.key_path.read_bytes(), password=None)
        except (OSError, ValueError, TypeError) as error:
            raise IdentityError(f"cannot read the site's private key: {error}") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise IdentityError(f"{self.key_path} does not hold an EC key")
        return key

    @classmethod
    def create(
        cls,
        directory: str | os.PathLike[str],
        name: str,
        now: Callable[[], datetime.datetime] = utc_now,
    ) -> SiteIdentity:
        """Make a new identity under DIRECTORY/identity; refuse when one is there."""
        check_name("site", name)
        where = make_private_directory(Path(directory) / "identity")
        if (where / "site.json").exists():
            raise IdentityError(f"{directory} holds a site's identity already")
        moment = now()
        site_id = uuid.uuid4().hex
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.COMMON_NAME, name),
                x509.NameAttribute(NameOID.SERIAL_NUMBER, site_id),
            ]
        )
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            # Clocks of two sites may differ: valid a day before it was made.
            .not_valid_before(moment - datetime.timedelta(days=1))
            .not_valid_after(moment + datetime.timedelta(days=365 * CERTIFICATE_YEARS + 3))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage(
                    [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
                ),
                critical=False,
            )
            .sign(key, hashes.SHA256())
        )
        fingerprint = certificate_fingerprint(certificate)
        write_atomic(
            where / "key.pem",
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
            0o600,
        )
        write_atomic(
            where / "cert.pem", certificate.public_bytes(serialization.Encoding.PEM), 0o644
        )
        # site.json comes last: an identity exists when all of it does.
        record = _SiteFile(IDENTITY_VERSION, site_id, name, fingerprint, moment)
        try:
            write_atomic(where / "site.json", msgspec.json.encode(record), 0o644, exclusive=True)
        except FileExistsError:
            raise IdentityError(f"{directory} holds a site's identity already") from None
        return cls.load(directory)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> SiteIdentity:
        """Read the identity back, and check that its parts belong together."""
        where = Path(directory) / "identity"
        try:
            record = msgspec.json.decode((where / "site.json").read_bytes(), type=_SiteFile)
            pem = (where / "cert.pem").read_text("ascii")
        except FileNotFoundError:
            raise IdentityError(f"{directory} holds no site: 'vrep site init' makes one") from None
        except (OSError, UnicodeError, msgspec.MsgspecError) as error:
            raise IdentityError(f"cannot read the site's identity in {where}: {error}") from None
        if record.version != IDENTITY_VERSION:
            raise IdentityError(
                f"the site's identity in {where} has version {record.version}; "
                f"this release reads {IDENTITY_VERSION}"
            )
        certificate = load_certificate(pem)
        if certificate_fingerprint(certificate) != record.fingerprint:
            raise IdentityError(f"the certificate in {where} is not the one of this site")
        identity = cls(record.site_id, record.name, record.fingerprint, record.created, where, pem)
        if identity.private_key().public_key() != certificate.public_key():
            raise IdentityError(f"the private key in {where} does not belong to the certificate")
        return identity
