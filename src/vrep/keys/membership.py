"""Membership: the proof that a site may bring lanes into a group, since it holds the tenant's key.

HMAC-SHA256 under the tenant key over a label, the group's name, who asks and who is asked; each
with its length before it. It is sent over a connection that is authenticated as the asking site's,
and proves nothing for another site, group or peer.
"""

from __future__ import annotations

import hashlib
import hmac

from vrep.keys.tenant import TenantKey

__all__ = ["membership_proof"]

_LABEL = b"vrep lane membership v1"


def membership_proof(key: TenantKey, group: str, asking: str, asked: str) -> bytes:
    """32 bytes; `asking` and `asked` are the ids of two sites."""
    parts = [_LABEL, *(text.encode() for text in (group, asking, asked))]
    message = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return hmac.digest(key.secret, message, hashlib.sha256)
