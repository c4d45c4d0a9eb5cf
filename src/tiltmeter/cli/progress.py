"""Progress on stderr: a bar in a terminal, and elsewhere a plain line now and then that a log can keep."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from tiltmeter.cli.terminal import live, raw_stderr, say, visible

__all__ = ["Progress", "in_lines", "progress", "progress_line"]

Progress = Callable[[int, int, str], None]
FIRST_SECONDS = 5.0
EVERY_SECONDS = 30.0


@contextmanager
def progress(label: str) -> Iterator[Progress]:
    """A function to be called as (done, total, what is done); it may never be called, and then time alone is shown."""
    if sys.stderr is not None and sys.stderr.isatty():
        with _bar(label) as update:
            yield update
    else:
        with in_lines(label) as update:
            yield update


@contextmanager
def in_lines(
    label: str,
    *,
    first: float = FIRST_SECONDS,
    every: float = EVERY_SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Progress]:
    """A line after `first` seconds, and one after every `every` seconds more; a short task leaves none."""
    state = _Lines(label, clock)
    ended = threading.Event()

    def speak() -> None:
        wait = first
        while not ended.wait(wait):
            with suppress(OSError, ValueError, AttributeError):  # nobody listens any more
                say(f"tiltmeter: {state.line()}", err=True)
            wait = every

    thread = threading.Thread(target=speak, name="tiltmeter-progress", daemon=True)
    thread.start()
    try:
        yield state.update
    finally:
        ended.set()
        thread.join(timeout=5.0)


class _Lines:
    """Where a task stands. A new total, or a step back, begins a new phase with a pace of its own."""

    def __init__(self, label: str, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began = self._phase = clock()
        self._label, self._done, self._total, self._first = label, 0, 0, 0

    def update(self, done: int, total: int, what: str) -> None:
        if total != self._total or done < self._done:
            self._phase, self._first, self._total = self._clock(), done, total
        self._done, self._label = done, what

    def line(self) -> str:
        now = self._clock()
        if self._total <= 0:
            return f"{self._label}: {duration(now - self._began)} so far"
        return progress_line(self._label, self._done, self._total, self._done - self._first, now - self._phase)


def progress_line(label: str, done: int, total: int, steps: int, seconds: float) -> str:
    """How far, and how long it takes if it goes on as it did.

    Args:
        label: what is done.
        done, total: steps that are done, and all.
        steps, seconds: how many of them were done in this phase, in how long; a resumed task begins above 0.
    """
    left = f"{duration(seconds / steps * (total - done))} left" if steps > 0 else f"{duration(seconds)} so far"
    return f"{label}: {done} of {total} ({100 * done // total} %), {left}"


def duration(seconds: float) -> str:
    """Seconds in words, to the two largest units."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@contextmanager
def _bar(label: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    # Names are no markup; and what else is written pauses the bar, see `say`, so that rich need not catch it.
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(file=raw_stderr())
    with (
        Bar(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as bar,
        live(bar),
    ):
        task = bar.add_task(visible(label), total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=visible(what))
