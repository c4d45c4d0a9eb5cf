"""The command line: noun, then verb; data on stdout, progress and log on stderr.

Each command is a thin layer over one library call, which is imported when the command runs, so that help is instant.
"""

from tiltmeter.cli import behavior, demo, judge, likelihood, organism, read, report, steer, studies, trait_space  # noqa: F401 - each adds its commands to main
from tiltmeter.cli.main import main

__all__ = ["main"]
