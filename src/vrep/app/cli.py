"""The `vrep` command.

Commands live in the `cli_*` modules, and only the one that holds the command at hand is
imported: a recovery's time counts from here. They call `vrep.Site` and print what it answers.
An error becomes one line on standard error (with ``--json`` one JSON object) and the exit code of
its class in `vrep.errors`; 0 to 9 are verdicts of commands. What nobody foresaw is an
`InternalError`: its traceback is logged before that line (with ``--json``, in that object).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Final, NoReturn

from vrep.app import cli_quick
from vrep.app.cli_output import report
from vrep.errors import InternalError, VrepError

INTERRUPTED: Final = 130


def run(arguments: Sequence[str], *, fresh: bool = False) -> int:
    """Run one command line; its exit code. `fresh`: in a process of its own."""
    as_json = "--json" in arguments
    try:
        quick = cli_quick.parse(arguments)
        if quick is not None:
            quick.run(fresh=fresh)
            return 0
        from vrep.app.cli_tree import invoke

        return invoke(arguments)
    except VrepError as error:
        report(error, as_json)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has left (`vrep points | head`): nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        report(VrepError(f"{where}{error.strerror or error}"), as_json)
        return VrepError.exit_code
    except Exception as error:  # noqa: BLE001 - the edge: a fault is told, not shown raw
        import traceback

        name = type(error).__name__
        fault = InternalError(f"{name}: {error}" if str(error) else name)
        report(fault, as_json, "".join(traceback.format_exception(error)))
        return InternalError.exit_code


def main() -> NoReturn:
    """Entry of the `vrep` script."""
    sys.exit(run(sys.argv[1:], fresh=True))


if __name__ == "__main__":
    main()


__all__ = ["main", "run"]
