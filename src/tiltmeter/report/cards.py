"""The verdict cards on top of the page: state, reason, score against threshold, and the promise behind it.

What it is: from runs (or, where there are none, from judged answers) to small views of text and positions.
What it does not know: which state is right (`words.run_verdict` guards that) and how a card looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tiltmeter.report import BehaviorSection, Rate, ReportData, RunSection, VerdictRow
from tiltmeter.report.words import (
    behavior_verdict,
    count,
    is_known,
    known_or_none,
    number,
    order_of_events,
    percent,
    rate_in_words,
    run_verdict,
)

__all__ = ["Card", "Gauge", "verdict_cards"]


@dataclass(frozen=True)
class Gauge:
    """Score against threshold on a horizontal scale; positions in percent of its length."""

    label: str
    value: float
    value_text: str
    fill: tuple[float, float]  # start, width: from zero to the value
    threshold: float
    threshold_text: str
    band: tuple[float, float] | None  # start, width
    whisker: tuple[float, float] | None
    state: str


@dataclass(frozen=True)
class Card:
    """The headline verdict on one run or one set of answers."""

    name: str
    model: str
    state: str
    reason: str
    gauge: Gauge | None
    facts: tuple[tuple[str, str], ...]


def verdict_cards(data: ReportData) -> tuple[Card, ...]:
    """One card per run; in a report without runs, one per judged set of answers."""
    if not data.runs:
        return tuple(_behavior_card(section) for section in data.behavior)
    verdicts = [run_verdict(run) for run in data.runs]
    domain = _gauge_domain(data.runs, verdicts)
    return tuple(_run_card(run, verdict, domain) for run, verdict in zip(data.runs, verdicts, strict=True))


def _gauge_domain(runs: Sequence[RunSection], verdicts: Sequence[VerdictRow]) -> tuple[float, float]:
    """One scale for all cards, so that they can be compared."""
    ends = [0.0]
    for run, verdict in zip(runs, verdicts, strict=True):
        ends += [end for end in (verdict.score, verdict.threshold) if is_known(end)]
        if run.null_band is not None:
            ends += [end for end in (run.null_band.score_low, run.null_band.score_high) if is_known(end)]
    low, high = min(ends), max(ends)
    pad = (high - low or 1.0) * 0.06
    return low - (pad if low < 0 else 0), high + pad


def _at(value: float, domain: tuple[float, float]) -> float:
    return round(100 * (value - domain[0]) / (domain[1] - domain[0]), 2)


def _span(one: float, other: float, domain: tuple[float, float]) -> tuple[float, float]:
    low, high = sorted((_at(one, domain), _at(other, domain)))
    return low, round(high - low, 2)


def _run_gauge(run: RunSection, verdict: VerdictRow, domain: tuple[float, float]) -> Gauge | None:
    if not is_known(verdict.score) or not is_known(verdict.threshold):
        return None
    band = None
    if run.null_band is not None and is_known(run.null_band.score_low) and is_known(run.null_band.score_high):
        band = _span(run.null_band.score_low, run.null_band.score_high, domain)
    return Gauge(
        label=f"Alarm score {number(verdict.score)}, threshold {number(verdict.threshold)}, {run.score_unit}",
        value=_at(verdict.score, domain),
        value_text=number(verdict.score),
        fill=_span(0.0, verdict.score, domain),
        threshold=_at(verdict.threshold, domain),
        threshold_text=number(verdict.threshold),
        band=band,
        whisker=None,
        state=verdict.state,
    )


def _promise(verdict: VerdictRow) -> tuple[tuple[str, str], ...]:
    rate = verdict.false_alarm_rate
    known = is_known(rate)
    calibrated = verdict.calibrated_on or "not stated"
    if verdict.calibrated_on:
        amount = "n not stated" if verdict.n_calibration is None else f"n = {verdict.n_calibration}"
        calibrated = f"{verdict.calibrated_on} ({amount})"
    return (
        ("False-alarm rate promised", f"at most {percent(rate)}" if known else "none: no rate comes with it"),
        ("Calibrated on", calibrated),
    )


def _score_fact(verdict: VerdictRow, unit: str) -> str:
    if not is_known(verdict.score):
        return "no score could be formed"
    where = "" if verdict.step is None else f" at step {verdict.step}"
    if not is_known(verdict.threshold):
        return f"{number(verdict.score)} {unit}{where}; no threshold to compare with"
    side = "above" if verdict.score > verdict.threshold else "not above"
    return f"{number(verdict.score)}{where}, {side} the threshold {number(verdict.threshold)} ({unit})"


def _normal_scores(run: RunSection) -> tuple[tuple[str, str], ...]:
    band = run.null_band
    if band is None or not is_known(band.score_low) or not is_known(band.score_high):
        return ()
    where = f"{number(band.score_low)} to {number(band.score_high)}"
    return (("Score when nothing is wrong", f"{where}: {band.source} (n = {band.n})"),)


def _run_card(run: RunSection, verdict: VerdictRow, domain: tuple[float, float]) -> Card:
    order = order_of_events(run)
    facts = [
        ("Score", _score_fact(verdict, run.score_unit)),
        *_normal_scores(run),
        *_promise(verdict),
        ("p-value", number(verdict.p_value, 2) if is_known(verdict.p_value) else "not given"),
        ("Order of events", order[0].upper() + order[1:]),
        ("Behavior at the end", _last_rate(run)),
        ("Readings", _readings_in_words(run)),
    ]
    return Card(
        name=run.label,
        model=run.model,
        state=verdict.state,
        reason=verdict.reason,
        gauge=_run_gauge(run, verdict, domain),
        facts=tuple(facts),
    )


def _readings_in_words(run: RunSection) -> str:
    if len(run.steps) == 0:
        return "none"
    span = f"step {run.steps[0]}" if len(run.steps) == 1 else f"steps {run.steps[0]} to {run.steps[-1]}"
    return f"{len(run.steps)} ({span}), each over {count(run.n_prompts, 'prompt')}, against {run.reference}"


def _last_rate(run: RunSection) -> str:
    curve = run.behavior
    if curve is None:
        return "not measured"
    scored = np.flatnonzero(np.isfinite(curve.em_rate))
    if scored.size == 0:
        return "no EM rate could be formed at any checkpoint"
    last = scored[-1]
    rate = Rate(
        value=float(curve.em_rate[last]),
        n=int(curve.n[last]),
        low=known_or_none(curve.low[last]),
        high=known_or_none(curve.high[last]),
    )
    late = "" if last == len(curve.steps) - 1 else " (later checkpoints could not be scored)"
    return f"EM rate {rate_in_words(rate)} at step {curve.steps[last]}{late}"


def _behavior_card(section: BehaviorSection) -> Card:
    verdict = behavior_verdict(section)
    rate = section.em_rate
    gauge = None
    if is_known(rate.value):
        domain = (0.0, max(rate.high or 0.0, rate.value, section.threshold) * 1.08)
        whisker = None
        if is_known(rate.low) and is_known(rate.high):
            whisker = _span(rate.low, rate.high, domain)
        gauge = Gauge(
            label=f"EM rate {rate_in_words(rate)}, limit {percent(section.threshold)}",
            value=_at(rate.value, domain),
            value_text=percent(rate.value),
            fill=_span(0.0, rate.value, domain),
            threshold=_at(section.threshold, domain),
            threshold_text=percent(section.threshold),
            band=None,
            whisker=whisker,
            state=verdict.state,
        )
    excluded = sum(section.excluded.values())
    facts = (
        ("EM rate", rate_in_words(rate)),
        ("Answers", f"{section.n_answers}, of which {excluded} excluded"),
        ("Judge", section.judge or "not stated"),
        *_promise(verdict),
    )
    return Card(section.name, section.model, verdict.state, verdict.reason, gauge, facts)
