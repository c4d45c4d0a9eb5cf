"""The page: from `ReportData` to what the template shows, and to HTML.

What it is: one function per section of the page, each from the data to a small frozen view (titles, captions,
SVG, table rows, all as text), and `render`, which hands the views to the template. Titles say what there is
to see and are made from the numbers.

What it does not know: how a figure is drawn (`figures`) or a number is worded (`words`).
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tiltmeter.report import (
    BasisSection,
    BehaviorSection,
    FloatArray,
    NullBand,
    Rate,
    ReportData,
    RunSection,
    figures,
)
from tiltmeter.report.cards import verdict_cards
from tiltmeter.report.words import (
    behavior_verdict,
    count,
    events_title,
    fixed,
    flatten,
    is_known,
    known_or_none,
    listing,
    number,
    order_of_events,
    percent,
    percent_interval,
)

__all__ = ["render"]

# Characters that HTML cannot carry (C0 controls, lone surrogates) and that an SVG parser refuses.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Table:
    """Rows of text under column heads; every cell after the first `text_columns` is a number."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 1


@dataclass(frozen=True)
class LegendItem:
    """One run's colour, marker (an index of the shapes in the template) and what to see of it here."""

    label: str
    color: int
    marker: int
    text: str = ""


@dataclass(frozen=True)
class Panel:
    """One small plot with its own heading and the last values in words."""

    name: str
    svg: Markup
    finals: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Block:
    """A figure with its words: what to see, how to read it, what is not drawn, and the numbers."""

    title: str
    caption: str
    legend: tuple[LegendItem, ...] = ()
    panels: tuple[Panel, ...] = ()
    wide: Markup | None = None
    narrow: Markup | None = None
    notes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True)
class RateRow:
    """One rate: text cells and the positions of its interval bar in percent, None without a rate."""

    name: str
    value: str
    counts: str
    interval: str
    bar: tuple[float, float, float] | None  # start, width, point


@dataclass(frozen=True)
class AnswerView:
    """One answer: scores as text and as sort keys (empty where there is none)."""

    question: str
    answer: str
    category: str
    outcome: str
    reason: str
    alignment: str
    alignment_key: str
    coherence: str
    coherence_key: str


@dataclass(frozen=True)
class BehaviorView:
    """One judged set of answers."""

    name: str
    caption: str
    state: str
    reason: str
    threshold: float
    threshold_text: str
    rates: tuple[RateRow, ...]
    categories: tuple[RateRow, ...]
    excluded: Table | None
    excluded_text: str
    answers: tuple[AnswerView, ...]
    answer_categories: tuple[str, ...]
    answer_outcomes: tuple[str, ...]


def render(data: ReportData) -> str:
    """The page as text. See `tiltmeter.report.build_html`."""
    environment = Environment(
        loader=PackageLoader("tiltmeter.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = _asset("table.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template("report.html.j2").render(
        data=data,
        style=Markup(_asset("style.css")),
        script=Markup(script),
        script_digest=digest,
        cards=verdict_cards(data),
        drift=_drift_block(data.runs),
        score=_score_block(data.runs),
        plane=_plane_block(data.runs, data.basis),
        cosines=_cosine_block(data.basis),
        behavior=[_behavior_view(section) for section in data.behavior],
        provenance=flatten(data.provenance),
        profile_note=_profile_note(data),
        null_band=_null_band_in_words(data.runs),
    )
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", page)


def _asset(name: str) -> str:
    return (resources.files("tiltmeter.report") / "templates" / name).read_text(encoding="utf-8")


def _svg(text: str) -> Markup:
    return Markup(text)


def _clean(text: str) -> str:
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def _legend(runs: Sequence[RunSection], texts: Sequence[str]) -> tuple[LegendItem, ...]:
    return tuple(
        LegendItem(run.label, index % figures.N_RUN_COLORS, figures.marker_of(index), text)
        for index, (run, text) in enumerate(zip(runs, texts, strict=True))
    )


def _profile_note(data: ReportData) -> str:
    traits = {trait for run in data.runs for trait in run.traits}
    traits |= set(data.basis.traits) if data.basis is not None else set()
    if not traits:
        return "Drift numbers are a profile, not diagnoses: read them together, never one by one."
    amount = count(len(traits), "drift number").capitalize()
    example = next(trait for trait in ("honesty", *sorted(traits)) if trait in traits)
    return (
        f"{amount} are a profile, not {count(len(traits), 'diagnosis', 'diagnoses')}. Drift along "
        f"“{example}” says that activations moved along that direction. It does not say that the "
        "model lost or gained the trait: read the numbers together, never one by one."
    )


# --- drift -----------------------------------------------------------------------------------------------


def _all_traits(runs: Sequence[RunSection]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(trait for run in runs for trait in run.traits))


def _models(runs: Sequence[RunSection]) -> str:
    return listing(sorted({run.model for run in runs}), 3)


def _bands(runs: Sequence[RunSection]) -> list[NullBand]:
    return [run.null_band for run in runs if run.null_band is not None]


def _null_band_in_words(runs: Sequence[RunSection]) -> str:
    said = dict.fromkeys(f"{band.source} (n = {band.n})" for band in _bands(runs))
    return "; ".join(said)


def _band_edges(run: RunSection, position: int, column: int) -> tuple[float, float] | None:
    if run.null_band is None:
        return None
    shape = np.shape(run.drift)
    low = float(np.broadcast_to(run.null_band.low, shape)[position, column])
    high = float(np.broadcast_to(run.null_band.high, shape)[position, column])
    return (low, high) if np.isfinite(low) and np.isfinite(high) else None


def _outside(run: RunSection) -> int | None:
    """In how many traits the last reading lies outside the null band; None where that cannot be said."""
    if run.null_band is None or len(run.steps) == 0 or not np.isfinite(run.drift[-1]).all():
        return None
    edges = [_band_edges(run, -1, column) for column in range(len(run.traits))]
    pairs = zip(run.drift[-1], edges, strict=True)
    return sum(edge is not None and not edge[0] <= value <= edge[1] for value, edge in pairs)


def _drift_title(runs: Sequence[RunSection]) -> str:
    if not _bands(runs):
        return "Drift by trait, without a null band: how much movement is normal is not known here"
    parts = []
    for run in runs:
        outside = _outside(run)
        if outside is None:
            parts.append(f"{run.name} cannot be placed")
        else:
            what = "" if any(" in " in part for part in parts) else " ends outside the null band"
            noun = "" if any(" traits" in part for part in parts) else " traits"
            parts.append(f"{run.name}{what} in {outside} of {len(run.traits)}{noun}")
    return listing(parts, 3)


def _final_in_words(run: RunSection, column: int) -> str:
    if len(run.steps) == 0:
        return "no reading"
    value, se = float(run.drift[-1, column]), float(run.se[-1, column])
    if not np.isfinite(value):
        return f"no value at step {run.steps[-1]}"
    error = f" ± {fixed(se)}" if np.isfinite(se) else ", error unknown"
    return f"{fixed(value, sign=True)}{error}"


def _panel(runs: Sequence[RunSection], trait: str, position: int, limits: tuple[float, float]) -> Panel:
    finals, spoken = [], []
    for index, run in enumerate(runs):
        if trait not in run.traits:
            continue
        column = run.traits.index(trait)
        text = _final_in_words(run, column)
        finals.append((index % figures.N_RUN_COLORS, text))
        edges = _band_edges(run, -1, column) if len(run.steps) else None
        band = f" (null band {fixed(edges[0])} to {fixed(edges[1])})" if edges else ""
        spoken.append(f"{run.label} ends at {text}{band}")
    label = f"Drift along {trait} over training steps: {'; '.join(spoken)}."
    svg = figures.drift_panel(runs, trait, limits=limits, key=f"drift-{position}", label=_clean(label))
    few = len(runs) <= 4  # beyond that, the last values are easier to read in the table
    return Panel(trait, _svg(svg), tuple(finals) if few else ())


def _missing_drift(runs: Sequence[RunSection]) -> tuple[str, ...]:
    lines = []
    for run in runs:
        if len(run.steps) == 0:
            lines.append(f"{run.label}: it holds no reading")
        for what, values in (("drift", run.drift), ("standard error", run.se)):
            for column, trait in enumerate(run.traits):
                steps = np.asarray(run.steps)[~np.isfinite(values[:, column])].tolist()
                if steps:
                    lines.append(f"{run.label}, {what} of {trait}: step {listing(list(map(str, steps)))}")
    return tuple(lines)


def _drift_block(runs: Sequence[RunSection]) -> Block:
    readings = [run for run in runs if len(run.steps) and run.traits]
    if not readings:
        return Block("Drift over training", "", notes=("No reading was given, so there is no drift to show.",))
    limits = figures.drift_limits(runs)
    traits = _all_traits(runs)
    prompts = listing([str(n) for n in sorted({run.n_prompts for run in readings})])
    references = listing(sorted({run.reference for run in readings}))
    notes = () if _bands(runs) else ("No null band was given: no movement can be called large or small.",)
    rows = []
    for run in readings:
        for position, step in enumerate(run.steps):
            cells = [_cell(run, trait, position) for trait in traits]
            rows.append((run.label, str(step), *cells))
    return Block(
        title=_drift_title(runs),
        caption=(
            f"Drift is the change of the mean projection since {references}, in units of the reference's "
            f"mean prompt norm. Whiskers: ± 1 standard error over n = {prompts} prompts. All panels share "
            f"one scale. Model: {_models(readings)}."
        ),
        legend=_legend(runs, [""] * len(runs)),
        panels=tuple(_panel(runs, trait, position, limits) for position, trait in enumerate(traits)),
        notes=notes,
        missing=_missing_drift(runs),
        tables=(Table("Drift ± standard error per reading", ("run", "step", *traits), tuple(rows)),),
    )


def _cell(run: RunSection, trait: str, position: int) -> str:
    if trait not in run.traits:
        return "not measured"
    column = run.traits.index(trait)
    value, se = float(run.drift[position, column]), float(run.se[position, column])
    return f"{fixed(value, 4, sign=True)} ± {fixed(se, 4)}" if np.isfinite(value) else fixed(value)


# --- score and behavior over steps -----------------------------------------------------------------------


def _threshold_at(run: RunSection, position: int) -> float | None:
    if run.threshold is None:
        return None
    return known_or_none(float(np.broadcast_to(run.threshold, (len(run.steps),))[position]))


def _score_table(runs: Sequence[RunSection]) -> Table:
    rows = []
    for run in runs:
        for position, step in enumerate(run.steps):
            verdict = run.verdicts[position] if run.verdicts else None
            rows.append(
                (
                    run.label,
                    verdict.state if verdict else "not judged",
                    verdict.reason if verdict else "no detector was used",
                    str(step),
                    number(float(run.score[position]), 4),
                    number(_threshold_at(run, position), 4),
                    number(verdict.p_value if verdict else None, 3),
                )
            )
    columns = ("run", "verdict", "reason", "step", "score", "threshold", "p-value")
    return Table("Score, threshold and verdict per reading", columns, tuple(rows), text_columns=3)


def _behavior_table(runs: Sequence[RunSection]) -> Table | None:
    rows = []
    for run in runs:
        curve = run.behavior
        if curve is None:
            continue
        for step, value, low, high, n in zip(curve.steps, curve.em_rate, curve.low, curve.high, curve.n, strict=True):
            interval = percent_interval(known_or_none(low), known_or_none(high)) if np.isfinite(value) else "no value"
            rows.append((run.label, str(step), percent(float(value)), interval, str(n)))
    columns = ("run", "step", "EM rate", "95\N{NO-BREAK SPACE}% Wilson interval", "scored answers")
    return Table("EM rate over training", columns, tuple(rows)) if rows else None


def _missing_scores(runs: Sequence[RunSection]) -> tuple[str, ...]:
    lines = []
    for run in runs:
        steps = np.asarray(run.steps)[~np.isfinite(run.score)].tolist()
        if steps:
            lines.append(f"{run.label}, score: step {listing(list(map(str, steps)))}")
        if run.behavior is not None:
            steps = np.asarray(run.behavior.steps)[~np.isfinite(run.behavior.em_rate)].tolist()
            if steps:
                lines.append(f"{run.label}, EM rate: step {listing(list(map(str, steps)))}")
    return tuple(lines)


def _score_block(runs: Sequence[RunSection]) -> Block:
    if not any(len(run.steps) for run in runs):
        return Block("Score and behavior", "", notes=("No reading was given, so there is no score to show.",))
    order = listing([f"{run.label}: {order_of_events(run)}" for run in runs])
    notes = []
    if not any(np.isfinite(run.score).any() for run in runs):
        notes.append("No reading has a score: nothing could be compared with a threshold.")
    if all(run.threshold is None for run in runs):
        notes.append("No threshold was given: no detector was used.")
    unmeasured = [run.label for run in runs if run.behavior is None]
    if unmeasured:
        notes.append(f"Behavior over steps was not measured for {listing(unmeasured, 6)}.")
    sizes = [int(n) for run in runs if run.behavior is not None for n in run.behavior.n]
    answers = f" n = {min(sizes)} to {max(sizes)} scored answers per checkpoint." if sizes else ""
    if sizes and min(sizes) == max(sizes):
        answers = f" n = {sizes[0]} scored answers per checkpoint."
    if not any(np.isfinite(run.score).any() or run.behavior is not None for run in runs):
        return Block(
            "Score and behavior",
            "",
            notes=tuple(notes),
            missing=_missing_scores(runs),
            tables=(_score_table(runs),),
        )
    below = (
        f" Below: the EM rate, the share of misaligned and coherent answers, with 95\N{NO-BREAK SPACE}% "
        f"Wilson intervals.{answers}"
    )
    label = _clean(f"Alarm score and EM rate over training steps. {order}.")
    table = _behavior_table(runs)
    return Block(
        title=listing([events_title(run) for run in runs], 3),
        legend=_legend(runs, [order_of_events(run) for run in runs]),
        caption=(f"Above: the alarm score against its threshold.{below if sizes else ''} Model: {_models(runs)}."),
        wide=_svg(figures.score_and_behavior(runs, narrow=False, key="score-wide", label=label)),
        narrow=_svg(figures.score_and_behavior(runs, narrow=True, key="score-narrow", label=label)),
        notes=tuple(notes),
        missing=_missing_scores(runs),
        tables=(_score_table(runs), *([table] if table else [])),
    )


# --- geometry --------------------------------------------------------------------------------------------


def _path(run: RunSection, basis: BasisSection, axis: FloatArray) -> figures.PlanePath:
    order = [run.traits.index(trait) for trait in basis.traits]
    drift = np.asarray(run.drift, dtype=float)[:, order]
    magnitude = np.linalg.norm(drift, axis=1)
    length = magnitude * float(np.linalg.norm(axis))
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = np.where(length > 0, drift @ np.asarray(axis, dtype=float) / length, np.nan)
    return figures.PlanePath(np.asarray(run.steps), cosine, magnitude, run.first_alarm_step)


def _plane_block(runs: Sequence[RunSection], basis: BasisSection | None) -> Block:
    title = "Direction and magnitude"
    if basis is None or basis.axis is None:
        return Block(title, "", notes=("No danger axis and no PC1 was given, so there is no plane to draw.",))
    able = [run for run in runs if set(basis.traits) <= set(run.traits) and len(run.steps)]
    if not able:
        return Block(title, "", notes=("No run has readings of the basis's traits, so nothing is drawn.",))
    paths = [_path(run, basis, basis.axis) for run in able]
    ends, rows, missing = [], [], []
    for run, path in zip(able, paths, strict=True):
        drawn = np.flatnonzero(np.isfinite(path.cosine))
        end = f"{fixed(float(path.cosine[drawn[-1]]), 2)}" if drawn.size else "undefined"
        ends.append(f"{end} for {run.name}")
        for step, cosine, magnitude in zip(path.steps, path.cosine, path.magnitude, strict=True):
            rows.append((run.label, str(step), fixed(float(cosine)), fixed(float(magnitude), 4)))
            if not np.isfinite(cosine):
                why = "no drift, so no direction" if magnitude == 0 else "a trait has no value"
                missing.append(f"{run.label}, step {step}: {why}")
    missing += [f"{run.label}: its traits are not those of the basis" for run in runs if run not in able]
    source = f" found on {basis.axis_source}" if basis.axis_source else ", source not stated"
    label = f"Cosine of drift to the {basis.axis_name} at the last reading: {listing(ends)}."
    if not any(np.isfinite(path.cosine).any() for path in paths):
        return Block(title, "", notes=("No reading has a direction, so nothing is drawn.",), missing=tuple(missing))
    colors = [list(runs).index(run) for run in able]
    svg = figures.plane(paths, colors=colors, axis_name=basis.axis_name, key="plane", label=_clean(label))
    return Block(
        title=f"Last cosine to the {basis.axis_name}: {listing(ends, 4)}",
        legend=tuple(item for item, run in zip(_legend(runs, [""] * len(runs)), runs, strict=True) if run in able),
        caption=(
            "Each point is a reading, joined in step order; the largest is the last. Filled from the first "
            f"alarm on. Right: drift points along the {basis.axis_name}{source}. Up: more drift, of whatever "
            f"kind; magnitude alone says nothing about danger, and near zero the "
            f"direction is mostly noise. Model: {_models(able)}."
        ),
        wide=_svg(svg),
        missing=tuple(missing),
        tables=(Table("Direction and magnitude per reading", ("run", "step", "cosine", "magnitude"), tuple(rows)),),
    )


def _cosine_block(basis: BasisSection | None) -> Block:
    title = "Trait directions"
    if basis is None or not basis.traits:
        return Block(title, "", notes=("No trait basis was given, so there are no directions to compare.",))
    cosines = np.asarray(basis.cosines, dtype=float)
    pairs = [
        (cosines[a, b], basis.traits[a], basis.traits[b])
        for a in range(len(basis.traits))
        for b in range(a)
        if np.isfinite(cosines[a, b])
    ]
    if pairs:
        value, one, other = max(pairs, key=lambda pair: abs(pair[0]))
        share = f"the closest pair, {other} and {one}, has cosine {fixed(value, 2)}"
        title = f"The trait directions overlap: {share}" if abs(value) > 0.3 else f"Little overlap: {share}"
    label = f"Cosine between {count(len(basis.traits), 'trait direction')}. {title}."
    missing = tuple(f"{basis.traits[a]} and {basis.traits[b]}" for a, b in np.argwhere(~np.isfinite(cosines)) if b <= a)
    rows = tuple(
        (trait, *(fixed(float(value)) for value in row)) for trait, row in zip(basis.traits, cosines, strict=True)
    )
    tables = [Table("Cosine between trait directions", ("trait", *basis.traits), rows)]
    if basis.axis is not None:
        weights = tuple((t, fixed(float(w), sign=True)) for t, w in zip(basis.traits, basis.axis, strict=True))
        tables.append(Table(f"Weights of the {basis.axis_name}", ("trait", "weight"), weights))
    if basis.layers:
        choice = tuple(
            (
                f"{row.layer}{' (chosen)' if row.layer == basis.layer else ''}",
                fixed(row.divergence),
                fixed(row.probe_accuracy),
            )
            for row in basis.layers
        )
        heads = ("after block", "steering divergence", "probe accuracy")
        tables.append(Table("Choice of the layer", heads, choice))
    how = ", ".join(part for part in (basis.method, basis.pooling) if part) or "method not stated"
    return Block(
        title=title,
        caption=(
            f"Cosine between the directions after block {basis.layer} ({how}). Overlapping directions move "
            f"together, which is one reason to read drift as a profile. Model: {basis.model}."
        ),
        wide=_svg(figures.cosine_map([_clean(t) for t in basis.traits], cosines, key="cosines", label=_clean(label))),
        missing=missing,
        tables=tuple(tables),
    )


# --- behavior --------------------------------------------------------------------------------------------


def _rate_row(name: str, rate: Rate, reason: str) -> RateRow:
    if not is_known(rate.value):
        why = rate.reason or reason
        return RateRow(name, f"no rate: {why}" if why else "no rate", f"{rate.n} scored", "none", None)
    bar = None
    if is_known(rate.low) and is_known(rate.high):
        bar = (round(100 * rate.low, 2), round(100 * (rate.high - rate.low), 2), round(100 * rate.value, 2))
    counts = f"{round(rate.value * rate.n)} of {rate.n}"
    return RateRow(name, percent(rate.value), counts, percent_interval(rate.low, rate.high), bar)


def _behavior_view(section: BehaviorSection) -> BehaviorView:
    verdict = behavior_verdict(section) if section.verdict or not is_known(section.em_rate.value) else None
    rates = (
        _rate_row("misaligned and coherent, of all with both scores", section.em_rate, section.reason),
        _rate_row("misaligned, of the coherent ones", section.em_rate_coherent, section.reason),
    )
    excluded = sum(section.excluded.values())
    rows = tuple((name, str(n)) for name, n in section.excluded.items())
    answers = sorted(section.answers, key=lambda row: (not is_known(row.alignment), row.alignment or 0.0, row.question))
    agreement = f" Agreement: {section.agreement}." if section.agreement else ""
    return BehaviorView(
        name=section.name,
        caption=f"Model: {section.model}. Judge: {section.judge or 'not stated'}.{agreement}",
        state=verdict.state if verdict else "",
        reason=verdict.reason if verdict else "",
        threshold=round(100 * section.threshold, 2),
        threshold_text=percent(section.threshold),
        rates=rates,
        categories=tuple(_rate_row(name, rate, "") for name, rate in section.categories.items()),
        excluded=Table("Excluded answers by reason", ("reason", "answers"), rows) if rows else None,
        excluded_text=(
            f"{section.n_answers} answers were generated; {excluded} were excluded. An excluded answer "
            "counts neither as aligned nor as misaligned."
        ),
        answers=tuple(
            AnswerView(
                question=row.question,
                answer=row.answer,
                category=row.category or "no category",
                outcome=row.outcome or "no outcome",
                reason=row.reason,
                alignment=number(row.alignment) if is_known(row.alignment) else "not scored",
                alignment_key=repr(float(row.alignment)) if is_known(row.alignment) else "",
                coherence=number(row.coherence) if is_known(row.coherence) else "not scored",
                coherence_key=repr(float(row.coherence)) if is_known(row.coherence) else "",
            )
            for row in answers
        ),
        answer_categories=tuple(sorted({row.category or "no category" for row in answers})),
        answer_outcomes=tuple(sorted({row.outcome or "no outcome" for row in answers})),
    )
