"""What can go wrong with keys and identities, as users read it."""

from __future__ import annotations

from typing import ClassVar

from vrep.errors import StateError, TenantKeyError

__all__ = [
    "IdentityError",
    "KeyExistsError",
    "KeyFileError",
    "KeyNotVerifiedError",
    "TenantKeyError",
    "UnknownKeyError",
]


class UnknownKeyError(TenantKeyError):
    """The tenant key is not held here."""


class KeyExistsError(TenantKeyError):
    """A tenant key of that name is held here already."""

    exit_code: ClassVar[int] = 21


class KeyFileError(TenantKeyError):
    """The key file cannot be read back."""


class KeyNotVerifiedError(TenantKeyError):
    """The tenant key has no export that was read back."""


class IdentityError(StateError):
    """The site's identity or certificate cannot be used."""
