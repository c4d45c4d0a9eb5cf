"""The report's figures: arrays in, an inline SVG string out.

What it is: four plots drawn with matplotlib's Figure objects (no pyplot) and turned into SVG that lives
inside an HTML page: text stays text, every colour becomes a CSS variable of the page (so that one drawing
serves light, dark and print), identifiers are unique per figure and nothing refers to anything outside.

What it does not know: the page. Titles, captions, legends and the tables of the same numbers are HTML.

Not finite means not drawn: a line breaks there and a question mark stands at the top edge of the frame, so a
missing value can be mistaken neither for zero nor for a good one.
"""

from __future__ import annotations

import io
import re
import textwrap
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tiltmeter.report import FloatArray, IntArray, RunSection

__all__ = [
    "MARKERS",
    "MIN_SCALE",
    "N_RUN_COLORS",
    "PlanePath",
    "color_of",
    "cosine_map",
    "draw",
    "drift_limits",
    "drift_panel",
    "mark",
    "marker_of",
    "plain_line",
    "plane",
    "score_and_behavior",
]

FONT = 11.0
"""Smallest text, in SVG units."""
MIN_SCALE = 0.82
"""The page never shrinks a figure below this scale (it scrolls instead): 11 x 0.82 is 9 px."""

# One stand-in colour per CSS variable: matplotlib needs a colour, the page decides which one it is.
_STAND_INS = {
    "ink": "#010203",
    "muted": "#020304",
    "grid": "#030405",
    "band": "#040506",
    "paper": "#050607",
    "positive": "#060708",
    "negative": "#070809",
    "run-0": "#0a0b01",
    "run-1": "#0a0b02",
    "run-2": "#0a0b03",
    "run-3": "#0a0b04",
    "run-4": "#0a0b05",
    "run-5": "#0a0b06",
}
_VARIABLES = {color: f"var(--{name})" for name, color in _STAND_INS.items()}
N_RUN_COLORS = 6
MARKERS = ("o", "s", "^", "D", "v", "P")  # with the colours: two ways to tell runs apart
_DOTTED = (0, (1.5, 1.8))
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.image_inline": True,
    "font.family": ["DejaVu Sans"],  # comes with matplotlib: the same layout on every machine
    "font.size": FONT,
    "text.parse_math": False,  # a dollar sign in a run's name is a dollar sign
    "text.color": _STAND_INS["ink"],
    "axes.edgecolor": _STAND_INS["muted"],
    "axes.labelcolor": _STAND_INS["muted"],
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.labelsize": FONT,
    "grid.color": _STAND_INS["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": _STAND_INS["muted"],
    "ytick.color": _STAND_INS["muted"],
    "xtick.labelsize": FONT,
    "ytick.labelsize": FONT,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "path.simplify": False,
}

# matplotlib's settings are one per process: two reports built in two threads must take turns.
_SETTINGS = threading.Lock()


class PlanePath(NamedTuple):
    """One run in the direction-magnitude plane; arrays of shape (steps,), NaN where undefined."""

    steps: IntArray
    cosine: FloatArray
    magnitude: FloatArray
    alarm_step: int | None


def draw(key: str, width: float, height: float, paint: Callable[[Figure], None], label: str) -> str:
    """A figure of another module of this package as inline SVG: its size in SVG units, and what paints it."""
    return _draw(key, width, height, paint, label)


def color_of(group: int) -> str:
    """The colour of a group, to be used inside `draw`."""
    return _run_color(group)


def mark(group: int, *, filled: bool = True) -> dict[str, Any]:
    """How a point of a group looks, inside `draw`."""
    return _marker(group, filled=filled, size=5.5)


def plain_line() -> dict[str, Any]:
    """How a line that is no data looks, inside `draw`."""
    return {"color": _STAND_INS["ink"], "linewidth": 1.0, "linestyle": (0, (5, 3))}


def _run_color(index: int) -> str:
    return _STAND_INS[f"run-{index % N_RUN_COLORS}"]


def marker_of(index: int) -> int:
    """Which of `MARKERS` a run gets: shifted by one each time the colours start again."""
    return (index + index // N_RUN_COLORS) % len(MARKERS)


def _run_line(index: int) -> dict[str, Any]:
    turn = index // N_RUN_COLORS
    return {"color": _run_color(index), "linestyle": _DASHES[min(turn, len(_DASHES) - 1)], "linewidth": 1.8}


def _marker(index: int, *, filled: bool = True, size: float = 4.5) -> dict[str, Any]:
    color = _run_color(index)
    return {
        "linestyle": "none",
        "marker": MARKERS[marker_of(index)],
        "markersize": size,
        "markeredgecolor": color,
        "markeredgewidth": 1.4,
        "markerfacecolor": color if filled else _STAND_INS["paper"],
    }


def _signed(value: float, _position: int | None = None) -> str:
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}")


def _finite(values: FloatArray) -> FloatArray:
    array = np.asarray(values, dtype=float)
    return np.where(np.isfinite(array), array, np.nan)


def _draw(key: str, width: float, height: float, paint: Callable[[Figure], None], label: str) -> str:
    """Paint a figure of the given size (SVG units) and return it as inline SVG under the name `key`."""
    buffer = io.StringIO()
    with _SETTINGS, matplotlib.style.context([{**_STYLE, "svg.hashsalt": key}], after_reset=True):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        FigureCanvasSVG(figure)
        paint(figure)
        figure.savefig(buffer, format="svg")
    return _inline(buffer.getvalue(), key=key, width=width, height=height, label=label)


def _inline(document: str, *, key: str, width: float, height: float, label: str) -> str:
    """Turn matplotlib's SVG document into an element for an HTML page."""
    root = ElementTree.fromstring(document)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in {"metadata", "title", "style"}:
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        # HTML knows no namespaces: xlink:href becomes href
        plain = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        element.attrib.clear()
        for name, value in plain.items():
            if name == "id":
                value = f"{key}-{value}"
            elif name == "href":
                value = value.replace("#", f"#{key}-", 1)
            value = value.replace("url(#", f"url(#{key}-")
            if name in {"style", "fill", "stroke"}:
                value = re.sub(r"#[0-9a-f]{6}\b", lambda found: _VARIABLES.get(found[0], found[0]), value)
            if name == "style":
                value = re.sub(r"\s*font-family:[^;]*;?|(?<=px) '[^;]*", "", value)
            element.set(name, value)
    root.attrib.clear()
    root.attrib.update(
        {
            "class": "plot",
            "viewBox": f"0 0 {width:g} {height:g}",
            "role": "img",
            "aria-label": label,
            "style": f"min-width: {width * MIN_SCALE:.0f}px; max-width: {width * 1.45:.0f}px",
        }
    )
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _mark_missing(axes: Axes, series: Sequence[tuple[int, IntArray, FloatArray]]) -> None:
    """A question mark at the top edge for each missing value of the (run, steps, values); a row per run."""
    holes = [(index, np.asarray(steps)[~np.isfinite(values)]) for index, steps, values in series]
    for row, (index, steps) in enumerate((index, steps) for index, steps in holes if steps.size):
        for step in steps:
            axes.annotate(
                "?",
                (step, 1),
                xycoords=axes.get_xaxis_transform(),
                xytext=(0, -2 - 14 * (row % 4)),
                textcoords="offset points",
                color=_run_color(index),
                ha="center",
                va="top",
                fontweight="bold",
                bbox={"facecolor": _STAND_INS["paper"], "edgecolor": "none", "pad": 0.5},
            )


def _step_axis(axes: Axes, runs: Sequence[RunSection]) -> None:
    steps = [step for run in runs for step in np.asarray(run.steps).tolist()]
    steps += [s for run in runs if run.behavior is not None for s in np.asarray(run.behavior.steps).tolist()]
    low, high = (min(steps), max(steps)) if steps else (0, 1)
    pad = (high - low) * 0.04 or 1.0
    axes.set_xlim(low - pad, high + pad)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def drift_limits(runs: Sequence[RunSection]) -> tuple[float, float]:
    """The one vertical scale of all drift panels: it holds every reading, whisker and null band."""
    edges = [0.0]
    for run in runs:
        drift, se = _finite(run.drift), np.nan_to_num(_finite(run.se))
        parts: list[FloatArray] = [drift - se, drift + se]
        if run.null_band is not None:
            parts += [_finite(run.null_band.low), _finite(run.null_band.high)]
        edges += [float(edge) for part in parts for edge in part[np.isfinite(part)].ravel()]
    low, high = min(edges), max(edges)
    pad = (high - low) * 0.06 or 0.01
    return low - pad, high + pad


def drift_panel(runs: Sequence[RunSection], trait: str, *, limits: tuple[float, float], key: str, label: str) -> str:
    """Drift of one trait over the steps of all runs, with standard errors and the null band."""

    def paint(figure: Figure) -> None:
        axes = figure.add_axes((0.225, 0.19, 0.75, 0.775))
        _step_axis(axes, runs)
        axes.set_ylim(*limits)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(_signed))
        axes.set_xlabel("training step", labelpad=2)
        axes.set_ylabel("drift (of reference norm)", labelpad=2)
        _shade_null_bands(axes, runs, trait)
        axes.axhline(0, color=_STAND_INS["muted"], linewidth=0.8)
        series = []
        for index, run in enumerate(runs):
            if trait not in run.traits:
                continue
            column = run.traits.index(trait)
            values, se = _finite(run.drift)[:, column], _finite(run.se)[:, column]
            axes.vlines(run.steps, values - se, values + se, color=_run_color(index), linewidth=1.2)
            axes.plot(run.steps, values, **_run_line(index))
            axes.plot(run.steps, values, **_marker(index, size=3.5))
            series.append((index, run.steps, values))
        _mark_missing(axes, series)

    return _draw(key, 270, 200, paint, label)


def _shade_null_bands(axes: Axes, runs: Sequence[RunSection], trait: str) -> None:
    drawn: list[tuple[FloatArray, FloatArray]] = []
    for index, run in enumerate(runs):
        if run.null_band is None or trait not in run.traits or len(run.steps) == 0:
            continue
        column = run.traits.index(trait)
        shape = np.shape(run.drift)
        low = np.broadcast_to(_finite(run.null_band.low), shape)[:, column]
        high = np.broadcast_to(_finite(run.null_band.high), shape)[:, column]
        constant = bool(np.ptp(low) == 0 and np.ptp(high) == 0)
        edges = (low[:1], high[:1]) if constant else (low, high)
        if any(_same(edges[0], seen[0]) and _same(edges[1], seen[1]) for seen in drawn):
            continue  # runs that share a band get it once, in a neutral colour
        color = _STAND_INS["band"] if not drawn else _run_color(index)
        alpha = 1.0 if not drawn else 0.15
        if constant:
            axes.axhspan(low[0], high[0], color=color, alpha=alpha, linewidth=0)
        else:
            axes.fill_between(run.steps, low, high, color=color, alpha=alpha, linewidth=0)
        drawn.append(edges)


def _same(a: FloatArray, b: FloatArray) -> bool:
    return bool(np.array_equal(a, b, equal_nan=True))


def score_and_behavior(runs: Sequence[RunSection], *, narrow: bool, key: str, label: str) -> str:
    """Alarm score against its threshold; where it was measured, the EM rate below it on the same steps."""
    has_behavior = any(run.behavior is not None for run in runs)
    width = 400.0 if narrow else 720.0
    alarms = [run.first_alarm_step for run in runs]
    turns = [run.behavior_step if run.behavior is not None else None for run in runs]
    top = max(24.0, 10.0 + 15.0 * _label_rows(alarms))  # room for a label of the axis that is longer than it
    gap = 22.0 + 15.0 * _label_rows(turns)
    score, rate, bottom = 190.0, 120.0, 42.0
    height = top + score + bottom + (gap + rate if has_behavior else 0)
    left = 72.0 / width

    def paint(figure: Figure) -> None:
        upper = figure.add_axes((left, 1 - (top + score) / height, 1 - left - 12 / width, score / height))
        _step_axis(upper, runs)
        upper.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        upper.yaxis.set_major_formatter(FuncFormatter(_signed))
        units = {run.score_unit for run in runs}
        unit = units.pop() if len(units) == 1 else "units differ, see table"
        upper.set_ylabel("\n".join(["alarm score", *textwrap.wrap(f"({unit})", 38)[:2]]), labelpad=4)
        _paint_scores(upper, runs)
        _paint_events(upper, alarms, "first alarm", "-")
        _paint_events(upper, turns, "", _DOTTED)
        if has_behavior:
            lower = figure.add_axes((left, bottom / height, 1 - left - 12 / width, rate / height))
            _step_axis(lower, runs)
            _paint_behavior(lower, runs)
            _paint_events(lower, alarms, "", "-")
            _paint_events(lower, turns, "EM rate passes its limit", _DOTTED)
            upper.tick_params(labelbottom=False)
        (lower if has_behavior else upper).set_xlabel("training step", labelpad=2)

    return _draw(key, width, height, paint, label)


def _paint_scores(axes: Axes, runs: Sequence[RunSection]) -> None:
    bands = {
        (run.null_band.score_low, run.null_band.score_high)
        for run in runs
        if run.null_band is not None and run.null_band.score_low is not None and run.null_band.score_high is not None
    }
    for low, high in sorted(bands, key=str):
        axes.axhspan(low, high, color=_STAND_INS["band"], linewidth=0)
    thresholds: list[FloatArray] = []
    for index, run in enumerate(runs):
        values = _finite(run.score)
        axes.plot(run.steps, values, **_run_line(index))
        for position, (step, value) in enumerate(zip(run.steps, values, strict=True)):
            state = run.verdicts[position].state if run.verdicts else "INCONCLUSIVE"
            look = _marker(index, filled=state == "ALARM", size=6)
            if state == "INCONCLUSIVE":
                look |= {"marker": "x", "markersize": 7.0, "markeredgewidth": 2.0, "markerfacecolor": "none"}
            axes.plot([step], [value], **look)
        if run.threshold is None or len(run.steps) == 0:
            continue
        line = np.broadcast_to(_finite(np.asarray(run.threshold)), (len(run.steps),))
        if any(_same(line, seen) for seen in thresholds):
            continue
        first = not thresholds
        thresholds.append(line)
        color = _STAND_INS["ink"] if first else _run_color(index)
        if np.ptp(line) == 0:
            axes.axhline(line[0], color=color, linewidth=1.2, linestyle=(0, (5, 3)))
        else:
            axes.plot(run.steps, line, color=color, linewidth=1.2, linestyle=(0, (5, 3)))
        finite = line[np.isfinite(line)]
        if first and finite.size:
            axes.annotate(
                f"threshold {_signed(float(finite[0]))}",
                (0, finite[0]),
                xycoords=axes.get_yaxis_transform(),
                xytext=(4, 3),
                textcoords="offset points",
                color=color,
                va="bottom",
            )
    _mark_missing(axes, [(index, run.steps, _finite(run.score)) for index, run in enumerate(runs)])
    holes = any(not np.isfinite(run.score).all() for run in runs)
    axes.margins(y=0.18 if holes else 0.1)
    if not any(np.isfinite(run.score).any() for run in runs):
        axes.set_yticks([])  # nothing is drawn here but question marks: no scale may suggest a value


def _label_rows(events: Sequence[int | None]) -> int:
    return min(sum(step is not None for step in events), 3)


def _paint_events(axes: Axes, events: Sequence[int | None], what: str, line: object) -> None:
    """A vertical line at each run's event; `what` labels the first three above the frame, one row each."""
    row = 0
    low, high = axes.get_xlim()
    for index, step in enumerate(events):
        if step is None:
            continue
        axes.axvline(step, color=_run_color(index), linewidth=1.1, linestyle=line, alpha=1.0 if what else 0.45)
        if what and row < _label_rows(events):
            right = step > low + 0.5 * (high - low)
            axes.annotate(
                f"{what}: step {step}",
                (step, 1),
                xycoords=axes.get_xaxis_transform(),
                xytext=(3 if right else -3, 4 + 15 * row),
                textcoords="offset points",
                color=_run_color(index),
                ha="right" if right else "left",
                va="bottom",
                fontweight="bold",
            )
        row += 1


def _paint_behavior(axes: Axes, runs: Sequence[RunSection]) -> None:
    tops, series = [0.1], []
    for index, run in enumerate(runs):
        curve = run.behavior
        if curve is None:
            continue
        rate, low, high = (100 * _finite(part) for part in (curve.em_rate, curve.low, curve.high))
        tops += [float(np.nanmax(part)) / 100 for part in (rate, high) if np.isfinite(part).any()]
        low, high = (np.where(np.isfinite(rate), part, np.nan) for part in (low, high))
        axes.vlines(curve.steps, low, high, color=_run_color(index), linewidth=1.2)
        axes.plot(curve.steps, rate, **_run_line(index))
        axes.plot(curve.steps, rate, **_marker(index, size=4.5))
        series.append((index, curve.steps, rate))
    for limit in sorted({run.behavior_threshold for run in runs if run.behavior is not None}):
        axes.axhline(100 * limit, color=_STAND_INS["ink"], linewidth=1.2, linestyle=(0, (5, 3)))
        axes.annotate(
            f"{_signed(100 * limit)} %",
            (0, 100 * limit),
            xycoords=axes.get_yaxis_transform(),
            xytext=(4, 3),
            textcoords="offset points",
            va="bottom",
        )
    top = min(max(tops) * 108, 104)
    axes.set_ylim(-0.03 * top, top)
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    _mark_missing(axes, series)
    axes.set_ylabel("EM rate\n(% of scored)", labelpad=4)


def plane(paths: Sequence[PlanePath], *, colors: Sequence[int], axis_name: str, key: str, label: str) -> str:
    """Where each run's drift points (cosine to the axis) and how long it is (magnitude), in step order."""

    def paint(figure: Figure) -> None:
        axes = figure.add_axes((0.15, 0.135, 0.82, 0.835))
        axes.grid(True, axis="both")
        axes.axvline(0, color=_STAND_INS["muted"], linewidth=0.8)
        axes.set_xlim(-1.1, 1.1)
        axes.set_xticks([-1, -0.5, 0, 0.5, 1])
        axes.xaxis.set_major_formatter(FuncFormatter(_signed))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.set_xlabel(f"direction: cosine of drift to the {axis_name}", labelpad=2)
        axes.set_ylabel("magnitude of drift (of reference norm)", labelpad=4)
        finite = [m for path in paths for m in _finite(path.magnitude) if np.isfinite(m)]
        axes.set_ylim(0, (max(finite, default=0) or 1) * 1.14)
        for index, path in zip(colors, paths, strict=True):
            _paint_path(axes, path, index)

    return _draw(key, 400, 340, paint, label)


def _paint_path(axes: Axes, path: PlanePath, index: int) -> None:
    x, y = _finite(path.cosine), _finite(path.magnitude)
    drawn = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    axes.plot(x, y, **_run_line(index), alpha=0.55)
    for position in drawn:
        last = position == drawn[-1]
        alarmed = path.alarm_step is not None and path.steps[position] >= path.alarm_step
        axes.plot([x[position]], [y[position]], **_marker(index, filled=alarmed, size=8 if last else 5))
        if last:
            right = x[position] > 0.55
            axes.annotate(
                f"step {path.steps[position]}",
                (x[position], y[position]),
                xytext=(-8 if right else 8, 4),
                textcoords="offset points",
                ha="right" if right else "left",
                color=_run_color(index),
                fontweight="bold",
            )


def cosine_map(traits: Sequence[str], cosines: FloatArray, *, key: str, label: str) -> str:
    """Cosine between every two trait directions: colour for sign and size, the number in each cell."""
    count = len(traits)
    names = [name.replace("_", " ") for name in traits]
    margin = 14.0 + 6.4 * max(map(len, names), default=0)
    cell = max(38.0, (400.0 - 1.42 * margin) / max(count, 1))
    overhang = 0.42 * margin  # the last slanted column name leans out to the right
    width, height = margin + cell * count + overhang, margin * 0.72 + 36 * count + 4

    def paint(figure: Figure) -> None:
        axes = figure.add_axes((margin / width, 2 / height, cell * count / width, 36 * count / height))
        axes.set(xlim=(0, count), ylim=(count, 0))
        axes.grid(False)
        for row in range(count):
            for column in range(count):
                value = float(cosines[row, column])
                name = "positive" if value > 0 else "negative"
                strength = 0.62 * min(abs(value), 1.0) if np.isfinite(value) and row != column else 0.0
                axes.add_patch(
                    Rectangle(
                        (column + 0.03, row + 0.03),
                        0.94,
                        0.94,
                        facecolor=_STAND_INS[name],
                        alpha=strength,
                        linewidth=0,
                    )
                )
                text = f"{value:.2f}".replace("-", "\N{MINUS SIGN}") if np.isfinite(value) else "?"
                axes.text(
                    column + 0.5,
                    row + 0.52,
                    "1" if row == column and text == "1.00" else text,
                    ha="center",
                    va="center",
                    color=_STAND_INS["muted" if row == column else "ink"],
                )
        axes.set_yticks(np.arange(count) + 0.5, names)
        axes.set_xticks(np.arange(count) + 0.5, names, rotation=40, ha="left", rotation_mode="anchor")
        axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False, colors=_STAND_INS["ink"])
        for spine in axes.spines.values():
            spine.set_visible(False)

    return _draw(key, width, height, paint, label)
