"""The root command with all of its commands; importing this is what adds them."""

from tiltmeter.cli import behavior, demo, judge, likelihood, organism, read, report, steer, studies, trait_space  # noqa: F401 - each adds its commands to main
from tiltmeter.cli.root import main

__all__ = ["main"]
