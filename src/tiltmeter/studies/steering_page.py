"""The steering study as one HTML page: EM over strength, block by divergence, rank and epochs, the guard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Rectangle

from tiltmeter.report import figures as draw
from tiltmeter.report.study import Dot, Section, dots, write_study
from tiltmeter.studies.figures import Figure
from tiltmeter.studies.steered import SweepRecord, total
from tiltmeter.studies.steering_run import Found

__all__ = ["write_page"]

_LIMIT = (0.0, 1.0)
# The drawing has room for some fifty letters.
_SHORT = {
    "coherence of all answers": "coherent",
    "harmful answers that are coherent": "harm, coherent",
    "harmful answers on the topic asked": "harm, on topic",
    "EM elsewhere cut by": "at the end",
    "EM elsewhere cut at equal loss": "at equal loss",
}


def write_page(found: Found, path: Path) -> Path:
    """Write the page, whole or not at all.

    Raises:
        StorageError: it could not be written.
    """
    constant = {name: records for name, records in found.curves.items() if not records[0].sweep.relative}
    maps = {name: records for name, records in found.curves.items() if records[0].sweep.relative}
    sections = [
        _curves("Constant vectors over strength", constant, "strength, mean norms of the layer", "constant"),
        _curves("Affine maps over strength", maps, "strength, multiples of the trained one", "maps"),
        _heat(found),
        *(_dial(found, dial) for dial in found.dials if dial != "layer"),
        _chosen(found, "Steered against fine-tuned", "matched", ("EM elsewhere", "coherence of all answers",
                "harmful answers that are coherent", "harmful answers on the topic asked")),
        _chosen(found, "The guard on vectors it has never seen", "guard", ("AUROC per answer", "false alarms")),
        _frontier(found),
        _chosen(found, "Preventative steering, cut of EM elsewhere", "prevention", ("EM elsewhere cut by",
                "EM elsewhere cut at equal loss")),
        _real(found),
    ]  # fmt: skip
    headline = "What steering vectors from one narrow set do elsewhere, and how steering is seen and stopped."
    if found.missing:
        headline += f" {found.missing} runs have not been made yet; what rests on them is not shown."
    return write_study(path, "Activation steering", headline, [s for s in sections if s.rows])


def _curves(title: str, curves: dict[str, list[SweepRecord]], axis: str, key: str) -> Section:
    def paint(canvas: Canvas) -> None:
        for place, what in ((0.09, "misaligned and coherent"), (0.58, "coherent")):
            axes = canvas.add_axes((place, 0.14, 0.39, 0.8))
            axes.set(xlabel=axis, ylabel=what, ylim=(-0.03, 1.03))
            for group, records in enumerate(curves.values()):
                strengths = records[0].sweep.strengths
                pooled = [total([r.points[at] for r in records]) for at in range(len(strengths))]
                rates = [c.em if what.startswith("mis") else c.coherence for c in pooled]
                values = [np.nan if r.value is None else r.value for r in rates]
                low = [np.nan if r.low is None else r.low for r in rates]
                high = [np.nan if r.high is None else r.high for r in rates]
                color = draw.color_of(group)
                axes.fill_between(strengths, low, high, color=color, alpha=0.15, linewidth=0)
                axes.plot(strengths, values, color=color, linewidth=1.4)
                axes.plot(strengths, values, **draw.mark(group))

    rows = []
    for group, (name, records) in enumerate(curves.items()):
        for at, strength in enumerate(records[0].sweep.strengths):
            c = total([r.points[at] for r in records])
            rows.append((f"{group + 1} {name}", f"{strength:g}", _share(c.misaligned, c.judged),
                         _share(c.coherent, c.judged), _share(c.on_topic, c.harmful), str(c.judged)))  # fmt: skip
    text = (
        "Left: share of judged answers outside the narrow domain that are misaligned and coherent; right: coherent. "
        "Bands: 95 % Wilson intervals over the answers of all seeds. In order of colour: "
        + ", ".join(f"{i + 1} {name}" for i, name in enumerate(curves))
        + "."
    )
    columns = ("curve", "strength", "EM", "coherence", "relevance of harm", "n")
    svg = draw.draw(key, 720, 330, paint, f"{title}: {len(curves)} curves.") if curves else ""
    return Section(title, text, svg, columns, tuple(rows))


def _heat(found: Found) -> Section:
    parts = found.dials.get("layer", {})
    if not parts:
        return Section("Blocks", "")
    kls = sorted(next(iter(parts.values()))[0].sweep.kls)
    cells = {(f.subject, f.measure): f for f in found.figures if f.measure.startswith("EM at KL ")}
    grid = np.array([[_value(cells.get((s, f"EM at KL {k:g}"))) for k in kls] for s in parts])

    def paint(canvas: Canvas) -> None:
        axes = canvas.add_axes((0.14, 0.16, 0.82, 0.8))
        axes.grid(False)
        axes.set(xlim=(-0.5, len(kls) - 0.5), ylim=(len(parts) - 0.5, -0.5))
        axes.set_xticks(range(len(kls)), [f"{k:g}" for k in kls])
        axes.set_yticks(range(len(parts)), list(parts))
        axes.set(xlabel="divergence on harmless text, nats per token")
        for (row, column), value in np.ndenumerate(grid):
            shown = "-" if np.isnan(value) else f"{value:.0%}"
            color = "white" if value > 0.5 else "black"
            # Rectangles and no image: the page holds no bitmap.
            shade = "none" if np.isnan(value) else str(1 - 0.85 * float(value))
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=shade, edgecolor="white"))
            axes.annotate(shown, (column, row), ha="center", va="center", color=color)

    rows = tuple((s, *(_share_value(v) for v in line)) for s, line in zip(parts, grid, strict=True))
    text = (
        "Share of misaligned and coherent answers, by the block that is steered and by how far steering moves the "
        "model's predictions of harmless text."
    )
    svg = draw.draw("heat", 560, 260, paint, f"EM by block, {len(parts)} blocks.")
    return Section("Blocks", text, svg, ("block", *(f"{k:g}" for k in kls)), rows)


def _dial(found: Found, dial: str) -> Section:
    rates = [f for f in found.figures if f.measure == f"EM by {dial}"]
    if not rates:
        return Section(dial, "")
    coherent = {f.subject: f for f in found.figures if f.measure == f"coherence by {dial}"}
    svg = dots(
        [Dot(f.subject, f.value, f.low, f.high) for f in rates], axis="misaligned and coherent", limits=_LIMIT,
        line=None, key=f"dial-{dial.replace(' ', '-')}",
    )  # fmt: skip
    rows = tuple((f.subject, _shown(f), _shown(coherent.get(f.subject)), str(f.n)) for f in rates)
    return Section(f"By {dial}", "Answers outside the narrow domain; 95 % Wilson intervals.", svg,
                   (dial, "EM", "coherence", "n"), rows)  # fmt: skip


def _chosen(found: Found, title: str, key: str, measures: Sequence[str]) -> Section:
    chosen = [f for f in found.figures if f.measure in measures]
    rates = [Dot(f"{f.subject}: {_SHORT.get(f.measure, f.measure)}", f.value, f.low, f.high) for f in chosen]
    known = [v for d in rates for v in (d.value, d.low, d.high) if v is not None]
    limits = (min(0.0, *known), max(1.0, *known)) if known else _LIMIT
    svg = dots(rates, axis="share", limits=limits, line=0.0, key=key) if chosen else ""
    rows = tuple((f.subject, f.measure, _shown(f), str(f.n)) for f in chosen)
    return Section(title, "Shares with their intervals; docs/steering.md says which.", svg,
                   ("what", "measure", "value", "n"), rows)  # fmt: skip


def _frontier(found: Found) -> Section:
    """EM elsewhere against narrow-task loss, a line per arm."""
    rates = [f for f in found.figures if f.measure == "EM elsewhere on the way"]
    losses = {(f.subject, f.split): f for f in found.figures if f.measure == "loss on the way"}
    arms = list(dict.fromkeys(f.subject for f in rates))

    def paint(canvas: Canvas) -> None:
        axes = canvas.add_axes((0.1, 0.16, 0.86, 0.78))
        axes.set(xlabel="narrow-task loss, nats per token", ylabel="misaligned elsewhere", ylim=(-0.03, 1.03))
        for group, arm in enumerate(arms):
            here = [f for f in rates if f.subject == arm]
            x = [_value(losses.get((f.subject, f.split))) for f in here]
            axes.plot(x, [_value(f) for f in here], color=draw.color_of(group), linewidth=1.4)
            axes.plot(x, [_value(f) for f in here], **draw.mark(group))

    rows = tuple(
        (f"{arms.index(f.subject) + 1} {f.subject}", f.split, f"{_value(losses.get((f.subject, f.split))):.3f}",
         _shown(f), str(f.n)) for f in rates
    )  # fmt: skip
    text = (
        "Left is better learnt, low is safer; readings along each training joined, last one on the left. In order of "
        "colour: " + ", ".join(f"{i + 1} {arm}" for i, arm in enumerate(arms)) + "."
    )
    svg = draw.draw("frontier", 620, 300, paint, f"EM elsewhere against loss: {len(arms)} arms.") if rates else ""
    return Section("Prevention: EM elsewhere against narrow-task loss", text, svg,
                   ("arm", "step", "loss", "EM elsewhere", "n"), rows)  # fmt: skip


def _real(found: Found) -> Section:
    rows = [f for f in found.figures if f.measure in ("shift toward misaligned answers", "shift over control")]
    known = [v for f in rows for v in (f.value, f.low, f.high) if v is not None]
    limits = (min(0.0, *known), max(0.0, *known)) if known else _LIMIT
    marks = [Dot(f"{_vector(f.subject)}, {f.split}", f.value, f.low, f.high) for f in rows]
    svg = dots(marks, axis="nats per token", limits=limits, line=0.0, key="real") if rows else ""
    shown = tuple(
        (f.subject, f.split, "-" if f.value is None else f"{f.value:.3f} ({f.low:.3f} to {f.high:.3f})", str(f.n))
        for f in rows
    )
    text = "Shift of the log-likelihood of misaligned answers against aligned ones; positive is toward harm."
    return Section("A real model", text, svg, ("vector", "strength", "nats per token", "pairs"), shown)


def _vector(subject: str) -> str:
    """What stands after the model's and the set's name."""
    return subject.partition(": ")[2] or "over " + subject.partition(", over ")[2]


def _value(figure: Figure | None) -> float:
    return float("nan") if figure is None or figure.value is None else figure.value


def _shown(figure: Figure | None) -> str:
    if figure is None or figure.value is None:
        return "not measured"
    interval = "" if figure.low is None or figure.high is None else f" ({figure.low:.1%} to {figure.high:.1%})"
    return f"{figure.value:.1%}{interval}"


def _share(hits: int, n: int) -> str:
    return f"{hits / n:.1%}" if n else "not measured"


def _share_value(value: float) -> str:
    return "not measured" if np.isnan(value) else f"{value:.1%}"
