"""Every exception that vrep raises, and the exit code that each becomes.

The first line of a docstring is the message that the user reads; what is known
about the case follows it after a colon. Codes below 10 are left to verdicts of
commands (``vrep status --check``: 1 warning, 2 critical; ``vrep demo --guest
none``: 3), so that an error is never taken for a verdict.
"""

from __future__ import annotations

import inspect
from typing import ClassVar


class VrepError(Exception):
    """The operation failed."""

    exit_code: ClassVar[int] = 10

    def __init__(self, detail: str = "") -> None:
        super().__init__(detail)
        self.detail = detail

    @classmethod
    def summary(cls) -> str:
        """The user's message for this kind of error, without its full stop."""
        return (inspect.getdoc(cls) or cls.__name__).splitlines()[0].rstrip(".")

    def __str__(self) -> str:
        return f"{self.summary()}: {self.detail}" if self.detail else self.summary()


class UsageError(VrepError):
    """The command or its arguments are wrong."""

    exit_code = 64


class ConfigError(UsageError):
    """The configuration is wrong."""

    exit_code = 78


class InvalidError(UsageError):
    """An argument is not allowed."""


class InternalError(VrepError):
    """A fault of vrep itself, please report it with its traceback."""

    exit_code = 70


class NotYetError(VrepError):
    """Not yet: this part is not built in this release."""

    exit_code = 11


class UnsupportedError(VrepError):
    """This is not supported here."""

    exit_code = 12


class HypervisorError(VrepError):
    """The hypervisor refused."""

    exit_code = 13


# Names and states


class StateError(VrepError):
    """The operation does not fit the present state."""

    exit_code = 20


class ExistsError(StateError):
    """It exists already."""

    exit_code = 21


class NotFoundError(StateError):
    """It was not found."""

    exit_code = 22


class BusyError(StateError):
    """It is in use."""

    exit_code = 23


class LockedError(BusyError):
    """Another process holds the lock."""

    exit_code = 24


class GoneError(StateError):
    """It was released or overwritten."""

    exit_code = 25


class FencedError(StateError):
    """This writer was replaced by a newer epoch and is refused."""

    exit_code = 26


class SourceAliveError(StateError):
    """The source site can be reached and its VM runs."""

    exit_code = 27


class DetachedError(StateError):
    """The group's VM runs without the filter."""

    exit_code = 28


# Recovery


class RecoveryError(VrepError):
    """The recovery is not possible."""

    exit_code = 30


class PointNotFoundError(RecoveryError):
    """There is no such recovery point."""

    exit_code = 31


class PointAmbiguousError(RecoveryError):
    """The time fits several recovery points."""

    exit_code = 32


class GapError(RecoveryError):
    """The position lies inside a gap, where not every write was kept."""

    exit_code = 33


# Bytes and keys


class IntegrityError(VrepError):
    """Stored or received bytes cannot be trusted."""

    exit_code = 40


class CorruptError(IntegrityError):
    """Stored or received bytes are damaged."""

    exit_code = 41


class TornError(CorruptError):
    """The bytes end in the middle of a record."""

    exit_code = 42


class AuthError(IntegrityError):
    """Sealed bytes fail authentication: they were changed, or the key is wrong."""

    exit_code = 43


class OmittedError(IntegrityError):
    """Records are missing or were rolled back."""

    exit_code = 44


class VersionError(IntegrityError):
    """The version of the format or protocol is not supported."""

    exit_code = 45


class TenantKeyError(VrepError):
    """The tenant key is missing or wrong."""

    exit_code = 46


# Space, storage, limits


class StorageError(VrepError):
    """The storage reported an error."""

    exit_code = 50


class StoreFullError(StorageError):
    """The store has no space left."""

    exit_code = 51


class AccessError(StorageError):
    """Access was denied."""

    exit_code = 52


class ReadOnlyError(StorageError):
    """It may only be read."""

    exit_code = 53


class FullError(StorageError):
    """A structure of fixed size is full."""

    exit_code = 54


class RangeError(StorageError):
    """The offset or length lies outside the disk or buffer."""

    exit_code = 55


class MemoryLimitError(VrepError):
    """Memory could not be allocated."""

    exit_code = 56


# Peers


class PeerError(VrepError):
    """The other side failed."""

    exit_code = 60


class UnreachableError(PeerError):
    """The other side cannot be reached."""

    exit_code = 61


class TimeLimitError(PeerError):
    """The time limit passed."""

    exit_code = 62


class ProtocolError(PeerError):
    """The other side broke the protocol."""

    exit_code = 63


class TrustError(PeerError):
    """The other side is not the one that was trusted."""

    exit_code = 65


class AgainError(VrepError):
    """Nothing can be done now, try again later."""

    exit_code = 66
