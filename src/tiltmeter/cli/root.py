"""The root command, and the boundary at which everything that can happen becomes an exit code.

Exit codes: 0 clear (or done), 1 alarm, 2 wrong usage or failure, 3 inconclusive. A command that judges returns an
`Outcome`, and 1 and 3 come from there alone; every exception, of whatever type, is 2 with one sentence on stderr.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import click

from tiltmeter.cli.terminal import clean_streams, error_line, say

__all__ = ["Group", "Outcome", "main"]

STORY = (
    "demo",
    "basis",
    "measure",
    "watch",
    "scan",
    "detector",
    "likelihood",
    "eval",
    "steer",
    "judge",
    "organism",
    "study",
    "report",
)
"""The commands as help lists them."""
DEBUG = "TILTMETER_DEBUG"
_INTERRUPTED = "interrupted; what was measured is kept, and the same command goes on from there"


@dataclass(frozen=True)
class Outcome:
    """What a command that judges has found: the states of its verdicts, None for a model that was not judged."""

    states: tuple[str | None, ...]

    @property
    def exit_code(self) -> int:
        """1 if there is an ALARM; else 0 if all are CLEAR and there is one; else 3."""
        names = {None if state is None else str(state) for state in self.states}
        if "ALARM" in names:
            return 1
        return 0 if names == {"CLEAR"} else 3


class _Settings:
    """Of one call."""

    debug = False


class _Stopped(Exception):
    """Carries what was raised in a command past click, which has exit codes of its own for some of it."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


def _debug_option(*, hidden: bool) -> click.Option:
    def note(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            ctx.ensure_object(_Settings).debug = True

    text = f"With an error, show the traceback too ({DEBUG}=1 does the same)."
    return click.Option(
        ["--debug"], is_flag=True, expose_value=False, is_eager=True, hidden=hidden, callback=note, help=text
    )


class Command(click.Command):
    """A command that takes the options of all commands too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_debug_option(hidden=True))

    def invoke(self, ctx: click.Context) -> Any:
        """Run it; click's own way to exit has no verdict behind it."""
        try:
            return super().invoke(ctx)
        except click.exceptions.Exit as error:
            raise SystemExit(error.exit_code) from error


class Group(click.Group):
    """Commands in the order of the story, within the boundary."""

    command_class = Command
    group_class = type  # groups of this class in it

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_debug_option(hidden=self.name != "tiltmeter"))

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names in that order."""
        return sorted(self.commands, key=lambda name: STORY.index(name) if name in STORY else len(STORY))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was named."""
        if ctx.parent is not None:
            return super().invoke(ctx)
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except BaseException as error:
            raise _Stopped(error) from error

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run, and end the process with the exit code."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        settings = _Settings()
        settings.debug = os.environ.get(DEBUG, "0") not in ("", "0")
        with clean_streams():
            code = self._code(
                lambda: click.Group.main(self, args, "tiltmeter", complete_var, False, obj=settings, **extra), settings
            )
        sys.exit(code)

    def _code(self, run: Callable[[], Any], settings: _Settings) -> int:
        try:
            found = run()
            _flush()
            if isinstance(found, Outcome):
                return found.exit_code
            return 0 if found is None or found == 0 else 2  # 0 after --help and --version
        except BaseException as caught:  # noqa: BLE001 - the process boundary
            error = caught.error if isinstance(caught, _Stopped) else caught
            if isinstance(caught, SystemExit) and caught.code in (0, None) and "_TILTMETER_COMPLETE" in os.environ:
                return 0  # click has answered a shell that completes words
            with suppress(BaseException):  # stderr may be what is broken
                _report(error, settings.debug)
            return 2


def _report(error: BaseException, debug: bool) -> None:
    if debug:
        with suppress(Exception):  # an exception that cannot be shown
            say(*"".join(traceback.format_exception(error)).rstrip("\n").split("\n"), err=True)
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        say(*error.message.split("\n"), err=True)
    else:
        say(error_line(_sentence(error)), err=True)


def _sentence(error: BaseException) -> str:
    """What happened and what to do, in one sentence."""
    from tiltmeter.errors import TiltmeterError

    if isinstance(error, TiltmeterError):
        return str(error)
    if isinstance(error, click.UsageError):
        asked = error.ctx.command_path if error.ctx is not None else "tiltmeter"
        if isinstance(error, click.BadParameter) and error.param is not None and "; " in error.message:
            return f"{error.param.get_error_hint(error.ctx).strip(chr(39))}: {error.message}"  # says what to do
        text = error.format_message().strip().rstrip(".")
        return f"{text[:1].lower()}{text[1:]}; see: {asked} --help"
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return _INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return "whatever read the output has ended before all of it was written"
    if isinstance(error, MemoryError):
        return "out of memory, so nothing was judged; use a smaller model or dtype, or a machine with more memory"
    if isinstance(error, OSError):  # whatever a module did not foresee of paths, permissions and full disks
        where = f" '{error.filename}'" if error.filename else ""
        return f"{error.strerror or _words(error)}:{where}; check the path, its permissions and the space left"
    return (
        f"unexpected {type(error).__name__}{_words(error, ': ')}; nothing was judged; --debug shows where it came from"
    )


def _words(error: BaseException, before: str = "") -> str:
    """The first line of what an exception of any kind says of itself."""
    try:
        lines = str(error).strip().splitlines()
    except BaseException:  # noqa: BLE001 - it may not even be able to
        return ""
    return before + lines[0].rstrip(".") if lines else ""


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


@click.group("tiltmeter", cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="tiltmeter")
def main() -> None:
    """Reads a model while it is fine-tuned and says whether it tilts toward misalignment.

    Exit codes: 0 clear, 1 alarm, 2 usage or failure, 3 inconclusive. Of several models the worst counts: an alarm, else
    one that is inconclusive.
    """
