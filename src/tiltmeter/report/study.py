"""The page of a study: sections of a sentence, a figure and a table, in one HTML file that opens offline.

What it is: three plots (values with intervals, points in a plane, lines over steps) and a page around them, in the look
of the run report. What it does not know: what was studied. A value that is not there is named and not drawn.

    write_study("study.html", "Trait space", "What was found.", [Section("Geometry", "One axis ...", svg, table)])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tiltmeter.artifacts import write_file
from tiltmeter.report import figures

__all__ = ["Dot", "Line", "Point", "Section", "dots", "lines", "points", "study_html", "write_study"]

FloatArray = NDArray[np.floating]
_ROW = 19.0  # height of a row of a dot plot, in SVG units


class Dot(NamedTuple):
    """A value with an interval; `group` picks the colour, None for the value draws nothing but the name."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    group: int = 0


class Point(NamedTuple):
    """A point of a plane; filled or hollow, `group` picks the colour."""

    x: float
    y: float
    group: int
    filled: bool


class Line(NamedTuple):
    """A line over steps, (readings,) each; `group` picks the colour."""

    steps: FloatArray
    values: FloatArray
    group: int


@dataclass(frozen=True)
class Section:
    """One finding.

    Attributes:
        title: a heading.
        text: what it shows, in sentences.
        svg: a figure of this module; empty for none.
        columns: heads of the table.
        rows: its cells.
    """

    title: str
    text: str
    svg: str = ""
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def dots(rows: Sequence[Dot], *, axis: str, limits: tuple[float, float], line: float | None, key: str) -> str:
    """Named values with their intervals, one below the other; values of one name share a row.

    Args:
        rows: top to bottom, in the order in which names first come.
        axis: what the values are.
        limits: of the axis.
        line: where a vertical line stands (a bar to reach, chance), or None.
        key: unique on the page.
    """
    width, margin = 720.0, 300.0
    names = list(dict.fromkeys(row.name for row in rows))
    height = _ROW * len(names) + 50

    def paint(figure: Figure) -> None:
        axes = figure.add_axes((margin / width, 40 / height, 1 - (margin + 14) / width, _ROW * len(names) / height))
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        axes.set(xlim=limits, ylim=(len(names), 0), xlabel=axis)
        if line is not None:
            axes.axvline(line, **figures.plain_line())
        for row in rows:
            at = names.index(row.name)
            if row.value is None or not math.isfinite(row.value):
                axes.annotate(
                    "not measured", (limits[0], at + 0.5), xytext=(4, 0), textcoords="offset points", va="center"
                )
                continue
            if row.low is not None and row.high is not None:
                axes.hlines(at + 0.5, row.low, row.high, color=figures.color_of(row.group), linewidth=1.4)
            axes.plot([row.value], [at + 0.5], **figures.mark(row.group))
        axes.set_yticks(np.arange(len(names)) + 0.5, names)
        axes.tick_params(axis="y", length=0)

    return figures.draw(
        key, width, height, paint, f"{axis}: {len(rows)} values in {len(names)} rows; the numbers are below."
    )


def points(found: Sequence[Point], *, x: str, y: str, key: str, lines_at: tuple[float | None, float | None]) -> str:
    """Points in a plane; `lines_at` puts a vertical and a horizontal line."""

    def paint(figure: Figure) -> None:
        axes = figure.add_axes((0.13, 0.14, 0.84, 0.83))
        axes.grid(True, axis="both")
        axes.set(xlabel=x, ylabel=y)
        if lines_at[0] is not None:
            axes.axvline(lines_at[0], **figures.plain_line())
        if lines_at[1] is not None:
            axes.axhline(lines_at[1], **figures.plain_line())
        for point in found:
            if math.isfinite(point.x) and math.isfinite(point.y):
                axes.plot([point.x], [point.y], **figures.mark(point.group, filled=point.filled))

    return figures.draw(key, 520, 380, paint, f"{len(found)} points: {y} against {x}.")


def lines(found: Sequence[Line], *, y: str, line: float | None, key: str) -> str:
    """Values over training steps, a line per run."""

    def paint(figure: Figure) -> None:
        axes = figure.add_axes((0.1, 0.15, 0.88, 0.82))
        axes.set(xlabel="training step", ylabel=y)
        if line is not None:
            axes.axhline(line, **figures.plain_line())
        for one in found:
            axes.plot(one.steps, one.values, color=figures.color_of(one.group), linewidth=1.3, alpha=0.75)

    return figures.draw(key, 720, 330, paint, f"{len(found)} lines: {y} over training steps.")


def study_html(title: str, headline: str, sections: Sequence[Section]) -> str:
    """The page as text."""
    from importlib.resources import files

    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("tiltmeter.report", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    style = files("tiltmeter.report").joinpath("templates", "style.css").read_text(encoding="utf-8")
    shown = [(s, Markup(s.svg)) for s in sections]  # the drawing is ours; every text is escaped
    return environment.get_template("study.html.j2").render(
        title=title, headline=headline, sections=shown, style=Markup(style)
    )


def write_study(path: str | Path, title: str, headline: str, sections: Sequence[Section]) -> Path:
    """Write the page, whole or not at all.

    Raises:
        StorageError: it could not be written.
    """
    return write_file(path, study_html(title, headline, sections).encode("utf-8"))
