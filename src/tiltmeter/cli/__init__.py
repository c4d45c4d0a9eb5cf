"""The command line: noun, then verb; data on stdout, progress and log on stderr.

Each command is a thin layer over one library call, which is imported when the command runs, so that help is instant.
What may fail on import is not imported here: `__main__.run` does it where a failure still gets its exit code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiltmeter.cli.commands import main

__all__ = ["main"]


def __getattr__(name: str) -> object:
    if name != "main":
        raise AttributeError(f"module 'tiltmeter.cli' has no attribute '{name}'")
    from tiltmeter.cli.commands import main

    return main
