"""`python -m tiltmeter.cli`, and what the installed command calls.

Exit code 1 means ALARM, so it may not be what Python gives for an exception that nobody caught: whatever comes this
far, on import too, ends with 2.
"""

from __future__ import annotations

import contextlib
import os
import sys

__all__ = ["run"]


def run() -> int:
    """Run the command line; the exit code of the process."""
    try:
        from tiltmeter.cli.commands import main
    except BaseException as error:  # noqa: BLE001 - the process boundary
        return _failed(error, "the command line cannot be loaded")
    try:
        main()
    except SystemExit as end:  # the root command has decided on it
        return end.code if isinstance(end.code, int) else 2
    except BaseException as error:  # noqa: BLE001 - the process boundary
        return _failed(error, "ended while it was ending")
    return 2  # it always raises SystemExit


def _failed(error: BaseException, what: str) -> int:
    with contextlib.suppress(BaseException):  # stderr may be what is broken
        if os.environ.get("TILTMETER_DEBUG"):
            import traceback

            traceback.print_exception(error)
        sys.stderr.write(f"tiltmeter: {what} ({ascii(error)[:180]}); nothing was judged; install it again\n")
    return 2


if __name__ == "__main__":
    sys.exit(run())
