"""Byte credits: what bounds the memory of both ends of a channel.

Credits are cumulative bytes of DATA payload since the channel was opened, so a
lost or repeated grant does no harm.  The receiver grants; the sender never has
sent more than was granted.  Not thread-safe: each object belongs to one lock
(the connection's).
"""

from __future__ import annotations

from vrep.errors import ProtocolError

__all__ = ["CreditGranter", "CreditWindow"]


class CreditWindow:
    """The sender's side."""

    __slots__ = ("_granted", "_sent")

    def __init__(self, granted: int = 0) -> None:
        self._granted = granted
        self._sent = 0

    @property
    def granted(self) -> int:
        return self._granted

    @property
    def sent(self) -> int:
        return self._sent

    @property
    def available(self) -> int:
        """Bytes that may be sent now."""
        return self._granted - self._sent

    def consume(self, count: int) -> None:
        """Account for bytes that are about to be sent."""
        if count > self.available:
            raise ProtocolError(f"{count} bytes with {self.available} bytes of credit")
        self._sent += count

    def grant(self, granted: int) -> None:
        """Take in a cumulative grant. Credit that was given is never taken back."""
        if granted < self._granted:
            raise ProtocolError(f"a grant went back from {self._granted} to {granted} bytes")
        self._granted = granted


class CreditGranter:
    """The receiver's side: `window` bytes may be on their way or unreleased."""

    __slots__ = ("_granted", "_received", "_released", "_window")

    def __init__(self, window: int) -> None:
        if window <= 0:
            raise ValueError(f"a window has at least one byte, not {window}")
        self._window = window
        self._granted = window
        self._received = 0
        self._released = 0

    @property
    def granted(self) -> int:
        """The cumulative grant that the peer was told last."""
        return self._granted

    @property
    def received(self) -> int:
        return self._received

    @property
    def held(self) -> int:
        """Bytes received and not released."""
        return self._received - self._released

    @property
    def grantable(self) -> int:
        """The cumulative grant that may be told now."""
        return self._released + self._window

    @property
    def due(self) -> bool:
        """Whether enough became free (a quarter of the window) to be worth a message."""
        return self.grantable - self._granted >= max(1, self._window // 4)

    def receive(self, count: int) -> None:
        """Account for a payload before it is accepted."""
        if self._received + count > self._granted:
            raise ProtocolError(
                f"the peer sent {count} bytes with {self._granted - self._received} bytes of credit"
            )
        self._received += count

    def release(self, count: int) -> None:
        """Bytes whose memory is free again."""
        if count < 0 or self._released + count > self._received:
            raise ValueError(f"cannot release {count} of {self.held} held bytes")
        self._released += count

    def tell(self, granted: int) -> None:
        """Remember what the peer is being told; never above what is grantable."""
        if not self._granted <= granted <= self.grantable:
            raise ValueError(
                f"cannot grant {granted} bytes: not within {self._granted}..{self.grantable}"
            )
        self._granted = granted
