"""The root command; each other module of this package adds commands to it.

Exit codes: 0 clear (or done), 1 alarm, 2 wrong usage or failure, 3 inconclusive.
"""

from __future__ import annotations

import click

from tiltmeter.cli.common import Group

__all__ = ["main"]


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="tiltmeter")
def main() -> None:
    """Reads a model while it is fine-tuned and says whether it tilts toward misalignment.

    Exit codes: 0 clear, 1 alarm, 2 usage or failure, 3 inconclusive.
    """
