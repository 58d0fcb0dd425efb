"""Rest: the images of a VM that mirrors and is off are looked at (filter/rest.c)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

from vrep.app.hosted import Hosted
from vrep.errors import (
    AgainError,
    BusyError,
    GoneError,
    LockedError,
    TimeLimitError,
    UnsupportedError,
    VrepError,
)

ANSWER_S: Final = 1.0
"""less than the keeper waits for the filter"""
WHY: Final[dict[type[VrepError], str]] = {
    AgainError: "one was written in the last seconds, or is looked at again",
    GoneError: "one was removed, replaced or resized",
    LockedError: "somebody has one open: a VM that runs, a mount, another device on it",
    UnsupportedError: "the kernel does not count what is written to one, so it cannot be told",
}
"""of the images, why they are not at rest"""
ASK_EVERY_S: Final = 0.02

__all__ = ["rest"]


def rest(hosted: Hosted, params: Mapping[str, Any]) -> dict[str, Any]:
    """Have a group's images looked at, and with ``begin`` compared if nobody has one open; see
    `Group.mirror_looked` for what is refused. TimeLimitError: their storage does not answer."""
    group = hosted.group
    images = [(int(index), str(path)) for index, path in params["images"]]
    deadline = time.monotonic() + ANSWER_S
    begun = False
    while True:
        try:
            if not begun:
                group.mirror_rest(images, bool(params["begin"]))
                begun = True
            group.mirror_looked()
            return {}
        except BusyError:
            if not begun and group.status()["handover"] == "":
                raise  # it is live
            if time.monotonic() > deadline:
                raise TimeLimitError("the storage of the VM's images does not answer") from None
        except VrepError as error:
            error.detail = WHY.get(type(error), error.detail)
            raise
        time.sleep(ASK_EVERY_S)
