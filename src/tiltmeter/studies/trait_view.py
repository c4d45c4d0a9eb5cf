"""The trait-space study as one HTML page: its figures in our own form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tiltmeter.report.study import Dot, Line, Point, Section, dots, lines, points, write_study
from tiltmeter.studies.figures import Figure
from tiltmeter.studies.geometry import component
from tiltmeter.studies.trait_run import Outcome

__all__ = ["sections", "write_page"]


def write_page(outcome: Outcome, path: Path) -> Path:
    """Write the page; see `sections`.

    Raises:
        StorageError: it could not be written.
    """
    n = len(outcome.runs.tracks)
    looked = "Held-out runs were scored." if outcome.looked else "Held-out runs were not scored."
    headline = (
        f"{n} of {outcome.runs.wanted} fine-tuning runs of pocket organisms. {looked} What is shown is a fact about "
        "these organisms; the published figures beside it are of other, larger models."
    )
    return write_study(path, "Trait-space monitoring", headline, sections(outcome))


def sections(outcome: Outcome) -> list[Section]:
    """Every section: the chosen design, behavior, geometry, designs, transfer, tests over a run, stress."""
    found = outcome.figures
    made = [
        _scores(outcome),
        _chosen(found),
        _behavior(outcome),
        _geometry(outcome),
        _over_steps(outcome),
        _table("Severity", "Do organisms agree on which sets are worse?", found,
               ("EM by set, Spearman", "size of drift by set, Spearman")),
        _dot_section("Loadings of the first component", "The pooled axis; intervals: bootstrap over runs.",
                     found, ("loading on PC1",), (-1.0, 1.0), 0.0, "loadings"),
        _dot_section("Trait drift and behavior",
                     "Correlation of each trait's drift with the EM rate over runs, and what is left of it without the "
                     "first component. Seven numbers are one profile, not seven diagnoses.", found,
                     ("correlation with EM", "correlation with EM, PC1 removed"), (-1.0, 1.0), 0.0, "correlations"),
    ]  # fmt: skip
    for split in dict.fromkeys(
        f.split for f in found if f.measure == "AUROC per settled reading" and " / " in f.subject
    ):
        rows = [f for f in found if f.split == split and " / " in f.subject and not f.subject.startswith("chosen")]
        made.append(
            _dot_section(f"Designs: {split}", "Readout / reference / scorer. Line: the bar of 0.995.", rows,
                         ("AUROC per settled reading",), (0.0, 1.0), 0.995, f"designs-{len(made)}")
        )  # fmt: skip
    transfer = [f for f in found if " from " in f.subject or "danger" in f.subject]
    made.append(_table("A new model and a misaligned start", "Benign readings alone of the new model.", transfer, ()))
    tests = ("largest score", "score over the benign envelope", "CUSUM over the benign envelope", "e-process")
    made.append(_table("Tests over the whole run", "", [f for f in found if f.subject in tests], ()))
    made.append(_table("Step-aware alarm", "", [f for f in found if f.subject.startswith("drift")], ()))
    stress = [f for f in found if f.split == "stress"]
    made.append(
        _dot_section("Stress: behavior", "Runs unlike those of calibration. Line: 5 %.", stress,
                     ("EM rate at the end",), (0.0, 1.0), 0.05, "stress")
    )  # fmt: skip
    rest = [f for f in stress if f.measure != "EM rate at the end"]
    made.append(_table("Stress: what detectors say", "", rest, ()))
    made.append(
        _table("Published figures", "Of other models.", [f for f in found if f.subject.startswith("paper")], ())
    )
    return [section for section in made if section.svg or section.rows]


def _cell(figure: Figure) -> str:
    if figure.value is None:
        return f"not measured, n {figure.n}"
    interval = ""
    if figure.low is not None or figure.high is not None:
        ends = ("..." if end is None else f"{end:.3g}" for end in (figure.low, figure.high))
        interval = f" ({' to '.join(ends)})"
    return f"{figure.value:.3g}{interval}, n {figure.n}"


def _table(title: str, text: str, found: Sequence[Figure], measures: tuple[str, ...]) -> Section:
    rows = tuple(
        (f.measure, f.subject, f.split, _cell(f)) for f in found if not measures or f.measure in measures
    )  # fmt: skip
    return Section(title, text, "", ("measure", "of", "on", "value (95 % interval)"), rows)


def _dot_section(
    title: str, text: str, found: Sequence[Figure], measures: tuple[str, ...], limits: tuple[float, float],
    line: float | None, key: str,
) -> Section:  # fmt: skip
    chosen = [f for f in found if f.measure in measures]
    if not chosen:
        return Section(title, text)
    rows = [Dot(f.subject, f.value, f.low, f.high, measures.index(f.measure)) for f in chosen]
    table = _table(title, text, chosen, measures)
    return Section(title, text, dots(rows, axis=" / ".join(measures), limits=limits, line=line, key=key),
                   table.columns, table.rows)  # fmt: skip


def _behavior(outcome: Outcome) -> Section:
    """EM rates at the end by set; an organism per colour. The benign calibration sets stand in the table alone."""
    organisms = list(outcome.runs.frames)
    found = [f for f in outcome.figures if f.measure == "EM rate at the end" and f.split != "stress"]
    drawn = sorted((f for f in found if f.split != "more benign"), key=lambda f: f.split)
    rows = []
    for figure in drawn:
        organism, _, name = figure.subject.partition(" ")
        if organism in organisms:
            rows.append(
                Dot(f"{name} ({figure.split})", figure.value, figure.low, figure.high, organisms.index(organism))
            )
    text = f"EM rate at the end of the runs, by set. Line: 5 %. Colours: {', '.join(organisms)}."
    table = _table("Behavior", text, found, ())
    svg = dots(rows, axis="EM rate at the end", limits=(0.0, 1.0), line=0.05, key="behavior") if rows else ""
    return Section("Behavior", text, svg, table.columns, table.rows)


def _geometry(outcome: Outcome) -> Section:
    """Direction (cosine to the pooled component) against magnitude, one point per calibration run."""
    runs = outcome.runs
    tracks = [t for t in runs.tracks if t.part == "calibration"]
    title = "Direction and magnitude of final drift"
    text = "One point per calibration run; filled: dangerous. Colour: the organism."
    if len(tracks) < 4:
        return Section(title, text)
    ends = np.stack([t.drift(runs.frames[t.cell.organism])[-1] for t in tracks])
    axis = component(ends, np.array([t.em[-1] for t in tracks]), draws=1).direction
    organisms = list(runs.frames)
    size = np.linalg.norm(ends, axis=1)
    shown = [
        Point(float(e @ axis / s), float(s), organisms.index(t.cell.organism), t.dangerous)
        for e, s, t in zip(ends, size, tracks, strict=True)
        if s > 0
    ]
    measures = ("variance on PC1", "cosine to the pooled PC1", "cosine of PC1 without it")
    table = _table(title, text, outcome.figures, measures)
    svg = points(shown, x="cosine to the pooled first component", y="magnitude (of reference norm)", key="plane",
                 lines_at=(0.0, None))  # fmt: skip
    return Section(title, text, svg, table.columns, table.rows)


def _over_steps(outcome: Outcome) -> Section:
    """Drift along the first component over the steps, for the first organism."""
    title = "Drift along the first component over a run"
    runs = outcome.runs
    tracks = [t for t in runs.tracks if t.part == "calibration"]
    if len(tracks) < 4:
        return Section(title, "")
    organism = tracks[0].cell.organism
    ends = np.stack([t.drift(runs.frames[t.cell.organism])[-1] for t in tracks])
    axis = component(ends, np.array([t.em[-1] for t in tracks]), draws=1).direction
    parts = ("calibration", "held out") if outcome.looked else ("calibration",)
    mine = [t for t in runs.tracks if t.cell.organism == organism and t.part in parts]
    found = [Line(t.steps, t.drift(runs.frames[organism]) @ axis, 0 if t.dangerous else 1) for t in mine]
    text = f"{organism}, {' and '.join(parts)} runs; first colour: dangerous, second: harmless."
    return Section(title, text, lines(found, y="drift along PC1 (of reference norm)", line=0.0, key="over-steps"))


def _scores(outcome: Outcome) -> Section:
    """Scores of the chosen design over the steps."""
    title = "Scores over a run, design chosen on calibration"
    entry = outcome.chosen.get("wide") or outcome.chosen.get("plain")
    if entry is None:
        return Section(title, "No design could be validated.")
    scored = entry.held or entry.validated
    limit = max(b.threshold for b in entry.boundaries.values())
    found = [Line(s.track.steps, s.scores, 0 if s.track.dangerous else 1) for s in scored]
    text = (
        f"{' / '.join(entry.design)}; {'held-out' if entry.held else 'calibration'} runs; first colour: dangerous, "
        "second: harmless. Line: the largest run threshold among the organisms."
    )
    return Section(title, text, lines(found, y="score", line=limit, key="scores"))


def _chosen(found: Sequence[Figure]) -> Section:
    rows = sorted(
        (f for f in found if f.subject.startswith("chosen")),
        key=lambda f: ("wide" not in f.split, not f.split.startswith("held out")),
    )
    return _table("The chosen design against the bars", "Chosen on calibration runs alone.", rows, ())
