"""Tenant keys."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from vrep import errors, keyfiles
from vrep.site.base import SiteBase

if TYPE_CHECKING:
    from vrep.keys.release import ReleaseEntry
    from vrep.keys.tenant import KeyInfo
    from vrep.rotate import Rotation

__all__ = ["Keys"]

REASON_LETTERS_MAX: Final = 1000


class Keys(SiteBase):
    """See `vrep.Site`."""

    def key_create(self, name: str) -> KeyInfo:
        return self.keys.create(name)

    def key_export(
        self, name: str, out: str | os.PathLike[str], passphrase: str | None = None
    ) -> None:
        """Write a key into a new file that only its owner can read."""
        keyfiles.write_new(out, lambda: self.keys.export(name, passphrase))

    def key_verify(
        self, name: str, file: str | os.PathLike[str], passphrase: str | None = None
    ) -> KeyInfo:
        """Read an export back and compare it with the key held here."""
        return self.keys.verify(name, keyfiles.read(file), passphrase)

    def key_import(
        self,
        file: str | os.PathLike[str],
        *,
        name: str | None = None,
        passphrase: str | None = None,
    ) -> KeyInfo:
        """Take in an exported key, or one that was released to this site."""
        from vrep.keys.release import is_release, opener

        text = keyfiles.read(file)
        if is_release(text):
            return self.keys.import_released(text, opener(self.identity))
        return self.keys.import_key(text, passphrase, name=name)

    def key_release(
        self, name: str, to: str, out: str | os.PathLike[str], *, reason: str = ""
    ) -> None:
        """Wrap a key for a peer that recovers, into a new file that only that site can open.
        The release is in the log, with its reason, before it is written."""
        if not reason.isprintable() or len(reason) > REASON_LETTERS_MAX:
            raise errors.InvalidError(
                f"a reason is one line of printable text, at most {REASON_LETTERS_MAX} letters"
            )
        recipient = self.peers.get(to).certificate
        keyfiles.write_new(out, lambda: self.keys.release(name, recipient, reason=reason))

    def key_releases(self, name: str | None = None) -> list[ReleaseEntry]:
        """Every release of a key (or of all), oldest first: to whom, when and why.
        TenantKeyError when a line of the log was changed or taken away."""
        from vrep.keys.release import read_log

        entries = read_log(self.keys.release_log_path)
        return [entry for entry in entries if name in (None, entry.key_name)]

    def key_rotate(
        self,
        name: str,
        *,
        out: str | os.PathLike[str] | None = None,
        passphrase: str | None = None,
        accept_key_loss: bool = False,
        wait_s: float = 30.0,
    ) -> Rotation:
        """Wrap the data keys of every group under a new generation of a tenant key; nothing is
        sent again. First with `out`: the new generation is made and exported there. Once that
        export was read back (`key_verify`), again without: the groups are wrapped anew, and their
        targets are told; `wait_s` bounds how long that is waited for. What was cut off, or a target
        that could not be told, goes on when it is called again."""
        from vrep.rotate import rotate

        return rotate(
            self, name, out=out, passphrase=passphrase, accept_key_loss=accept_key_loss,
            wait_s=wait_s,
        )  # fmt: skip
