"""What reaches the terminal, a pipe or a log: the one place where the command line writes.

Names of files and models, words of a library and answers of a model come from outside. Written as they are, they could
move the cursor, rename the window, turn the direction of writing, or forge a line that says CLEAR. So all text is
cleaned here, whether it goes to a terminal or not: what is not printable is shown as an escape (`\\x1b`, `\\u202e`,
`\\n`) and does nothing. While a command runs, `sys.stdout` and `sys.stderr` clean too, for the libraries that write
there themselves; line breaks pass, since a stream cannot know whose they are.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

__all__ = ["CleanStream", "clean_streams", "error_line", "live", "raw_stderr", "say", "say_json", "visible"]

LONGEST_ERROR = 300
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_live: list[Any] = []  # the bar that owns the terminal, if there is one


def visible(text: object) -> str:
    """One line of harmless text: control characters, escapes, bidi marks and line breaks are spelt out."""
    plain = str(text)
    return plain if plain.isprintable() else "".join(_shown(letter) for letter in plain)


def _shown(letter: str) -> str:
    if letter.isprintable() or unicodedata.category(letter) == "Zs":  # spaces of any width are harmless
        return letter
    code = ord(letter)
    spelt = f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    return _SHORT.get(letter, spelt)


def error_line(message: object) -> str:
    """An error as one line of at most 300 characters; of a longer one the beginning and the end."""
    line = "tiltmeter: " + visible(str(message).strip())
    if len(line) <= LONGEST_ERROR:
        return line
    tail = 110  # what to do stands at the end
    return f"{line[: LONGEST_ERROR - tail - 3]} … {line[-tail:]}"


def say(*lines: object, err: bool = False) -> None:
    """Write lines to stdout or stderr. What stands in one line stays in one, whatever it holds.

    In a terminal long lines are broken between words; elsewhere they stay whole.
    """
    stream = sys.stderr if err else sys.stdout
    if stream is None and err:  # closed by who started this
        return
    width = shutil.get_terminal_size().columns if stream.isatty() else None
    _write(stream, "".join(f"{_broken(visible(line), width)}\n" for line in lines))


def say_json(value: Any) -> None:
    """Write one JSON value in one line to stdout; JSON spells out all that is not printable ASCII itself.

    Raises:
        ValueError: it holds a number that is not finite.
    """
    _write(sys.stdout, json.dumps(value, allow_nan=False) + "\n")


def _write(stream: TextIO, text: str) -> None:
    with _paused():
        stream.write(_encodable(text, stream))
        stream.flush()


def _encodable(text: str, stream: TextIO) -> str:
    """What the stream's encoding lacks is spelt out too."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _broken(line: str, width: int | None) -> str:
    if width is None or len(line) <= width:
        return line
    indent = " " * min(len(line) - len(line.lstrip()) + 2, width // 2)
    return "\n".join(
        textwrap.wrap(
            line,
            max(width, 20),
            subsequent_indent=indent,
            replace_whitespace=False,
            break_long_words=False,
            break_on_hyphens=False,
        )
    )


class CleanStream:
    """A text stream that cleans what is written to it; all else is the stream's own."""

    def __init__(self, raw: TextIO) -> None:
        self.raw = raw

    def write(self, text: str) -> int:
        """Write it cleaned, with its line breaks."""
        self.raw.write(_encodable("\n".join(visible(line) for line in text.split("\n")), self.raw))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


@contextmanager
def clean_streams() -> Iterator[None]:
    """`sys.stdout` and `sys.stderr` that clean, and a log handler for all that is logged at warning or above."""
    before = sys.stdout, sys.stderr
    handler = _Handler(logging.WARNING)
    root = logging.getLogger()
    root.addHandler(handler)
    sys.stdout, sys.stderr = (None if s is None else CleanStream(s) for s in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        root.removeHandler(handler)


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        who = "tiltmeter" if record.name.partition(".")[0] == "tiltmeter" else record.name
        try:
            message = record.getMessage()
            if record.exc_info and record.exc_info[1] is not None:
                message += f" ({type(record.exc_info[1]).__name__}: {record.exc_info[1]})"
            say(f"{who}: {message}", err=True)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):  # a closed stream, a format that fails
            self.handleError(record)


def raw_stderr() -> TextIO:
    """The stream below, for what draws with escapes of its own and cleans its texts itself."""
    return sys.stderr.raw if isinstance(sys.stderr, CleanStream) else sys.stderr


@contextmanager
def live(bar: Any) -> Iterator[None]:
    """While this bar (with `start` and `stop`) is drawn, lines are written above it."""
    _live.append(bar)
    try:
        yield
    finally:
        _live.remove(bar)


@contextmanager
def _paused() -> Iterator[None]:
    bar = _live[-1] if _live else None
    with contextlib.ExitStack() as stack:
        if bar is not None:
            bar.stop()
            stack.callback(bar.start)
        yield
