"""What the commands share: the group, options, progress, and how things are shown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tiltmeter.detector import Detector, Verdict
    from tiltmeter.studies.figures import Figure

PATH = click.Path(path_type=Path)
STORY = (
    "demo", "basis", "measure", "watch", "scan", "detector", "likelihood", "eval", "steer", "judge", "organism",
    "study", "report",
)  # fmt: skip
"""The commands as help lists them."""


class Group(click.Group):
    """Commands in the order of the story, and every expected failure as one sentence with exit code 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names in that order."""
        return sorted(self.commands, key=lambda name: STORY.index(name) if name in STORY else len(STORY))

    def invoke(self, ctx: click.Context) -> Any:
        """Run, and turn expected failures into their sentence."""
        from tiltmeter.errors import TiltmeterError

        try:
            return super().invoke(ctx)
        except TiltmeterError as error:
            click.echo(f"tiltmeter: {error}", err=True)
            ctx.exit(2)
        except OSError as error:  # whatever a module did not foresee of paths, permissions and full disks
            where = f" '{error.filename}'" if error.filename else ""
            click.echo(
                f"tiltmeter: {error.strerror or error}:{where}; check the path, its permissions and the space left",
                err=True,
            )
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo(
                "tiltmeter: interrupted; what was measured is kept, and the same command goes on from there", err=True
            )
            ctx.exit(2)


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """The `--json` option, as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON value instead of text.")(function)


def out_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """The required `--out` folder."""
    return click.option("--out", type=PATH, required=True, help="Folder for the results.")(function)


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr, with the time left; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)


def show(value: Any, as_json: bool, text: str) -> None:
    """Print the value as JSON, or the text."""
    click.echo(json.dumps(value, allow_nan=False) if as_json else text)


def detector_for(path: Path | None, model: str) -> Detector | None:
    """The detector that was named, or the one that comes with the default organism."""
    from tiltmeter.detector import Detector

    if path is not None:
        return Detector.load(path)
    if model == "organism:pocket":
        from tiltmeter.organism import shipped_detector

        return Detector.load(shipped_detector())
    return None


def basis_for(path: Path | None, model: str) -> Any:
    """The basis that was named, or the one that comes with the default organism."""
    from tiltmeter.basis import TraitBasis
    from tiltmeter.errors import InputError

    if path is not None:
        return TraitBasis.load(path)
    if model == "organism:pocket":
        from tiltmeter.organism import shipped_basis

        return TraitBasis.load(shipped_basis())
    raise InputError(
        "no basis was given; fit one with: tiltmeter basis fit MODEL --out DIR, and pass it with --basis DIR"
    )


def say_promise(promised: float, asked: float) -> None:
    """On stderr, where the benign sets are too few for the false-alarm rate that was asked for."""
    if promised > asked:
        needed = math.ceil(1 / asked - 1e-9) - 1
        click.echo(
            f"tiltmeter: these benign sets can promise {promised:.1%}, not {asked:.1%}; that takes {needed} of them",
            err=True,
        )


def verdict_text(name: str, verdict: Verdict) -> str:
    """A verdict in three lines."""
    return f"{verdict.state}  {name}\n  {verdict.reason}\n  calibrated on {verdict.calibrated_on}"


def drift_text(drift: dict[str, float | None], se: dict[str, float | None]) -> str:
    """Drift by trait, a line each."""

    def number(value: float | None, form: str) -> str:
        return "      -" if value is None else format(value, form)

    return "\n".join(f"  {t:<14} {number(v, '+.4f')} ± {number(se[t], '.4f')}" for t, v in drift.items())


def figure_text(figure: Figure) -> str:
    """A figure in one line."""
    if figure.value is None:
        return f"not measured (n {figure.n})"
    interval = "" if figure.low is None else f" ({figure.low:.3g} to {figure.high:.3g})"
    return f"{figure.value:.3g}{interval} {figure.unit}, n {figure.n}"
