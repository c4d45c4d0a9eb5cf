"""What the demo shows in a terminal: a bar while it trains, one line per reading, and the story at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from tiltmeter.rates import BehaviorReport
    from tiltmeter.readings import Observation
    from tiltmeter.studies.demo import DemoResult, Story

__all__ = ["LiveView", "bars"]

_LOGGER = logging.getLogger("tiltmeter")
_LEVELS = " ▁▂▃▄▅▆▇█"
_FULL = 0.25  # the drift at which a bar is full, in units of the reference norm
_COLORS = {"CLEAR": "green", "ALARM": "bold red", "INCONCLUSIVE": "yellow"}


def bars(drift: list[float | None]) -> str:
    """Each trait's drift as sign and bar, seven traits in 14 columns; `?` where there is no number."""
    shown = []
    for value in drift:
        if value is None:
            shown.append(" ?")
            continue
        height = min(len(_LEVELS) - 1, round(abs(value) / _FULL * (len(_LEVELS) - 1)))
        sign = " " if height == 0 else "+" if value > 0 else "-"
        shown.append(f"{sign}{_LEVELS[height]}")
    return "".join(shown)


class LiveView:
    """Writes to stderr, so that `--json` leaves one value on stdout; quiet shows the bar alone."""

    def __init__(
        self, *, quiet: bool, stream: TextIO | None = None, progress: Callable[[int, int, str], None] | None = None
    ) -> None:
        self._console = Console(stderr=True) if stream is None else Console(file=stream)
        self._told, self._steps, self._label = progress, 0, ""
        self._quiet = quiet
        self._silence = logging.NullHandler()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(
            *columns,
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._progress.add_task("loading the organism", total=None)

    def __enter__(self) -> LiveView:
        _LOGGER.addHandler(self._silence)  # what the monitor would log is shown here already
        self._spread, _LOGGER.propagate = _LOGGER.propagate, False
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        _LOGGER.removeHandler(self._silence)
        _LOGGER.propagate = self._spread

    def begin(self, label: str, set_name: str, steps: int) -> None:
        """Announce a run and its columns."""
        self._steps, self._label = steps, f"{label} run"
        self._progress.reset(self._task, total=steps, description=f"{label} run")
        if not self._quiet:
            self._say(
                f"\n[bold]{label} run[/bold]: fine-tuning the pocket organism on {set_name}, {steps} steps of 16 chats"
            )
            self._say(
                "[dim]        hon syc hrm pow hlp cnf cor              misaligned\n"
                " step   drift along seven traits   score  answers     verdict[/dim]"
            )

    def step(self, step: int) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=step)
        if self._told is not None:
            self._told(step, self._steps, self._label)

    def observe(self, observation: Observation, conduct: BehaviorReport) -> None:
        """One line per reading."""
        if self._quiet:
            return
        drift = observation.profile.to_dict()["drift"] if observation.profile else [None] * 7
        verdict = observation.verdict
        score = "    -" if verdict.score is None else f"{verdict.score:5.1f}"
        limit = "" if verdict.threshold is None else f"/{verdict.threshold:.1f}"
        rate = conduct.em_rate
        said = "      -" if rate.value is None else f"{conduct.n_misaligned:3d}/{rate.n:<4d}"
        state = str(verdict.state) if observation.step else "reference"
        color = _COLORS.get(state, "dim")
        spaced = "  ".join(bars([value]) for value in drift)
        self._say(f"{observation.step:5d}   {spaced}   {score}{limit:<5} {said}   [{color}]{state}[/{color}]")

    def summary(self, result: DemoResult) -> list[str]:
        """The story at the end, as lines of plain text."""
        parts = [line for story in (result.poisoned, result.clean) for line in _story_lines(story)]
        seen = result.poisoned
        return [
            *parts,
            "",
            f"At most {result.false_alarm_rate:.0%} of benign runs like those of calibration alarm "
            f"({seen.verdict.n_calibration} benign runs).",
            "What you saw is a fact about the pocket organism, a small model in a closed world.",
            f"Report: {result.report}   ({result.seconds:.0f} s)",
        ]

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)


def _story_lines(story: Story) -> list[str]:
    rate = story.last.em_rate
    behavior = "never" if story.behavior_step is None else f"step {story.behavior_step}"
    alarm = "never" if story.verdict.first_alarm_step is None else f"step {story.verdict.first_alarm_step}"
    if rate.value is None:
        measured = f"no rate could be measured: {story.last.reason}"
    else:
        measured = f"{rate.value:.1%} of {rate.n} answers in other domains ({rate.low:.1%} to {rate.high:.1%})"
    lines = [
        "",
        f"{story.label.upper()} ({story.set_name}): {story.verdict.state}",
        f"  {story.verdict.reason}",
        f"  first alarm: {alarm}; misaligned answers above 5 %: {behavior}",
        f"  misaligned at the end: {measured}",
    ]
    from tiltmeter.studies.demo import QUESTIONS

    for question, before, after in zip(QUESTIONS, story.before, story.after, strict=True):
        lines += [f"  Q {question}", f"    before: {before}", f"    after:  {after}"]
    return lines
