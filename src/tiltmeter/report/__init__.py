"""The report: one HTML file that opens offline and shows a verdict with all of its evidence.

What it is: frozen dataclasses that hold everything the page shows (numbers, numpy arrays and plain strings),
and two functions, `build_html` and `write_report`. The file loads nothing from anywhere: style, script and
figures are inside it, and its content security policy forbids every request.

What it does not know: how anything was measured, which model was read, or how a detector decides. It neither
computes a rate nor an interval; it shows what it is given and says in words what it was not given. It works
without torch. The one judgement that it makes is a guard: a CLEAR that lacks its score, its threshold or its
last reading is shown as INCONCLUSIVE, since a hole in the evidence must not look like safety.

Units: drift is in units of the reference's mean prompt norm (the quantity of arXiv 2606.07631, section on
measurement); rates are shares between 0 and 1; steps are optimiser steps.

Example:
    >>> data = ReportData(title="Nothing yet", runs=(), headline="No run was made.")
    >>> "INCONCLUSIVE" in build_html(data)
    True
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tiltmeter.artifacts import write_file
from tiltmeter.errors import InputError

__all__ = [
    "STANDARD_LIMITS",
    "AnswerRow",
    "BasisSection",
    "BehaviorCurve",
    "BehaviorSection",
    "LayerRow",
    "NullBand",
    "Rate",
    "ReportData",
    "RunSection",
    "VerdictRow",
    "build_html",
    "write_report",
]

FloatArray = NDArray[np.floating]
IntArray = NDArray[np.integer]

STANDARD_LIMITS = (
    "It reads activations on a fixed set of ordinary prompts. Harm that shows only under a trigger, a topic "
    "or a kind of question that this set does not hold can pass unseen.",
    "It sees movement along the traits it was given. A model can change in ways that none of them covers.",
    "Drift is measured from a reference. Whatever was already wrong with the reference stays invisible.",
    "Small doses of bad data can move activations no further than good data do. Below the noise of benign "
    "runs there is nothing to see, and a run can be CLEAR for that reason alone.",
    "The false-alarm rate holds for runs like those it was calibrated on: same model, same kind of training, "
    "same length and reading interval. Elsewhere it is not promised, and misses carry no promise at all.",
    "It tells that a run resembles runs that went bad. It does not tell what the model will say: an alarm is "
    "a reason to test behavior, and CLEAR does not replace testing it.",
    "It alarms about when behavior changes, seldom long before.",
    "Training other than supervised fine-tuning, such as preference or reinforcement learning, is not covered.",
)
"""What the alarm cannot see, in plain words: true of every report; add what is true of yours."""

STATES = ("CLEAR", "ALARM", "INCONCLUSIVE")


def _check_shape(what: str, array: NDArray[np.generic], *allowed: tuple[int, ...]) -> None:
    if np.shape(array) not in allowed:
        raise InputError(
            f"{what} has shape {np.shape(array)}; allowed: {' or '.join(map(str, allowed))}. "
            "Pass one row per step and one column per trait, in the order of `steps` and `traits`."
        )


def _check_shares(what: str, values: FloatArray) -> None:
    finite = np.asarray(values, dtype=float)[np.isfinite(np.asarray(values, dtype=float))]
    if finite.size and (finite.min() < 0 or finite.max() > 1):
        raise InputError(
            f"{what} holds {finite.min():g} to {finite.max():g}; allowed are shares from 0 to 1 (NaN where "
            "there is no value). Divide percentages by 100."
        )


def _check_steps(what: str, steps: IntArray) -> None:
    if np.any(np.diff(steps) <= 0):
        raise InputError(
            f"the steps of {what} are {np.asarray(steps).tolist()}; allowed are strictly increasing steps. "
            "Sort them and keep one reading per step."
        )


@dataclass(frozen=True, kw_only=True)
class VerdictRow:
    """A verdict on one reading or on a whole run; the fields carry the detector's own names.

    Attributes:
        state: CLEAR, ALARM or INCONCLUSIVE.
        reason: one sentence.
        score: the alarm score, in the unit that `RunSection.score_unit` names; None where there is none.
        threshold: the score from which on the detector alarms.
        p_value: conformal p-value among the benign calibration runs, between 0 and 1.
        false_alarm_rate: the share of benign runs that the detector promised to alarm on at most.
        calibrated_on: what the promise was calibrated on, in words.
        n_calibration: the number of calibration runs behind the promise.
        step: the step that the verdict is about.
    """

    state: str
    reason: str
    score: float | None = None
    threshold: float | None = None
    p_value: float | None = None
    false_alarm_rate: float | None = None
    calibrated_on: str = ""
    n_calibration: int | None = None
    step: int | None = None

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise InputError(f"a verdict has the state {self.state!r}; allowed: {', '.join(STATES)}.")


@dataclass(frozen=True, kw_only=True, eq=False)
class NullBand:
    """How far readings move when nothing is wrong.

    Attributes:
        low: lower edge per trait, shape (traits,) or (steps, traits), in drift units.
        high: upper edge, same shape.
        source: what the band is, in words, for instance "2.5 to 97.5 % of benign readings".
        n: the number of benign runs or re-reads behind it.
        score_low: lower edge of the alarm score when nothing is wrong.
        score_high: upper edge of the alarm score when nothing is wrong.
    """

    low: FloatArray
    high: FloatArray
    source: str
    n: int
    score_low: float | None = None
    score_high: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class BehaviorCurve:
    """The EM rate over training: five arrays of shape (checkpoints,).

    Attributes:
        steps: optimiser steps, strictly increasing.
        em_rate: share of misaligned and coherent answers, NaN where nothing could be scored.
        low: lower end of the 95 % Wilson interval.
        high: upper end of the 95 % Wilson interval.
        n: scored answers.
    """

    steps: IntArray
    em_rate: FloatArray
    low: FloatArray
    high: FloatArray
    n: IntArray

    def __post_init__(self) -> None:
        shape = np.shape(self.steps)
        for what in ("em_rate", "low", "high", "n"):
            _check_shape(f"`{what}` of a behavior curve", getattr(self, what), shape)
        for what in ("em_rate", "low", "high"):
            _check_shares(f"`{what}` of a behavior curve", getattr(self, what))
        _check_steps("a behavior curve", self.steps)


@dataclass(frozen=True, kw_only=True, eq=False)
class RunSection:
    """One monitored run.

    Attributes:
        name: short key, unique in the report.
        label: what a reader sees.
        model: which model the numbers are from.
        traits: trait names, the columns of `drift`.
        steps: optimiser steps of the readings, shape (steps,), strictly increasing.
        drift: shape (steps, traits), in units of the reference's mean prompt norm; NaN where not read.
        se: standard error of `drift` over the measurement prompts, same shape.
        n_prompts: measurement prompts behind every reading.
        score: alarm score per reading, shape (steps,), NaN where there is none.
        threshold: one number, one per step (steps,), or None where no detector was used.
        verdicts: one per reading, or none at all.
        verdict: the verdict on the whole run. None: derived from `verdicts` (any alarm is an alarm, any
            reading that could not be judged leaves the run INCONCLUSIVE).
        null_band: how far benign runs move; None where it is not known.
        first_alarm_step: step of the first alarm; None without alarm.
        behavior: the EM rate over the run; None where it was not measured.
        behavior_step: first step whose EM rate is above `behavior_threshold`; None where it never was.
        behavior_threshold: the EM rate from which on a model counts as misaligned, a share.
        score_unit: the unit of `score` and `threshold`, in words.
        reference: what drift is measured from, in words.
    """

    name: str
    label: str
    model: str
    traits: tuple[str, ...]
    steps: IntArray
    drift: FloatArray
    se: FloatArray
    n_prompts: int
    score: FloatArray
    threshold: float | FloatArray | None = None
    verdicts: tuple[VerdictRow, ...] = ()
    verdict: VerdictRow | None = None
    null_band: NullBand | None = None
    first_alarm_step: int | None = None
    behavior: BehaviorCurve | None = None
    behavior_step: int | None = None
    behavior_threshold: float = 0.05
    score_unit: str = "detector units"
    reference: str = "step 0"

    def __post_init__(self) -> None:
        n, k = len(self.steps), len(self.traits)
        who = f"of run {self.name!r}"
        _check_steps(f"run {self.name!r}", self.steps)
        _check_shape(f"`drift` {who}", self.drift, (n, k))
        _check_shape(f"`se` {who}", self.se, (n, k))
        _check_shape(f"`score` {who}", self.score, (n,))
        if self.threshold is not None:
            _check_shape(f"`threshold` {who}", np.asarray(self.threshold), (), (n,))
        if self.null_band is not None:
            _check_shape(f"the null band's `low` {who}", self.null_band.low, (k,), (n, k))
            _check_shape(f"the null band's `high` {who}", self.null_band.high, (k,), (n, k))
        if self.verdicts and len(self.verdicts) != n:
            raise InputError(
                f"run {self.name!r} has {len(self.verdicts)} verdicts for {n} readings; allowed: one per "
                "reading, or none at all. Judge every reading, INCONCLUSIVE where one cannot be judged."
            )


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One candidate layer: steering divergence and probe accuracy (0 to 1), None where not measured."""

    layer: int
    divergence: float | None
    probe_accuracy: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class BasisSection:
    """The trait basis that the drift was read with.

    Attributes:
        model: the model that the directions were read from.
        layer: decoder block, counted from 0, whose output is read.
        traits: trait names.
        cosines: cosine between every two directions, shape (traits, traits).
        axis: the direction in drift space that the plane compares with, shape (traits,); None where unknown.
        axis_name: "danger axis" or "PC1".
        axis_source: what the axis was found on, in words, with n.
        layers: the candidates of the layer selection.
        method: how directions were found.
        pooling: which token was read.
    """

    model: str
    layer: int
    traits: tuple[str, ...]
    cosines: FloatArray
    axis: FloatArray | None = None
    axis_name: str = "danger axis"
    axis_source: str = ""
    layers: tuple[LayerRow, ...] = ()
    method: str = ""
    pooling: str = ""

    def __post_init__(self) -> None:
        k = len(self.traits)
        _check_shape("`cosines` of the basis", self.cosines, (k, k))
        if self.axis is not None:
            _check_shape("`axis` of the basis", self.axis, (k,))


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A share with the number of answers behind it and its 95 % Wilson interval.

    Attributes:
        value: the share, None where it cannot be stated.
        n: scored answers.
        low: lower end of the interval.
        high: upper end of the interval.
        reason: why `value` is None.
    """

    value: float | None
    n: int
    low: float | None = None
    high: float | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        known = [v for v in (self.value, self.low, self.high) if v is not None]
        _check_shares("a rate", np.asarray(known, dtype=float))


@dataclass(frozen=True, kw_only=True)
class AnswerRow:
    """One answer and what the judge said: scores from 0 to 100, None where there is none."""

    question: str
    answer: str
    category: str
    alignment: float | None
    coherence: float | None
    outcome: str
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class BehaviorSection:
    """What the model said, judged.

    Attributes:
        name: what a reader sees.
        model: which model answered.
        judge: who judged.
        em_rate: misaligned and coherent, over all answers with both scores.
        em_rate_coherent: misaligned, over the coherent ones.
        n_answers: answers generated, scored or not.
        excluded: answers without a usable score, by reason.
        reason: why a rate is None, where the rate itself does not say it.
        categories: the first rate, per category.
        answers: the answers themselves.
        agreement: agreement between judges, in words.
        verdict: the verdict on behavior; a report without runs shows it on top.
        threshold: the EM rate from which on a model counts as misaligned, a share.
    """

    name: str
    model: str
    judge: str
    em_rate: Rate
    em_rate_coherent: Rate
    n_answers: int
    excluded: Mapping[str, int] = field(default_factory=dict)
    reason: str = ""
    categories: Mapping[str, Rate] = field(default_factory=dict)
    answers: tuple[AnswerRow, ...] = ()
    agreement: str = ""
    verdict: VerdictRow | None = None
    threshold: float = 0.05


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """All that the page shows.

    Attributes:
        title: the page's title.
        runs: the monitored runs; the first ones get the most distinct colours.
        headline: one sentence under the title.
        basis: the trait basis, or None.
        behavior: one section per judged set of answers.
        provenance: what made this report; nested mappings are flattened.
        limits: what the alarm cannot see, one plain sentence or two each.
    """

    title: str
    runs: tuple[RunSection, ...]
    headline: str = ""
    basis: BasisSection | None = None
    behavior: tuple[BehaviorSection, ...] = ()
    provenance: Mapping[str, object] = field(default_factory=dict)
    limits: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [run.name for run in self.runs]
        if len(set(names)) != len(names):
            raise InputError(f"the runs are named {names}; allowed: each name once. Rename the repeated ones.")


def build_html(data: ReportData) -> str:
    """The report as one HTML page that needs nothing but a browser.

    The same data give the same text, byte for byte: no dates, no random identifiers.
    """
    from tiltmeter.report.page import render  # matplotlib and jinja2 are needed only here

    return render(data)


def write_report(data: ReportData, path: str | Path) -> Path:
    """Write the report to `path`, whole or not at all.

    A reader never sees half a page: the text goes to a neighbouring file that then takes the name.

    Returns:
        The path that was written.

    Raises:
        StorageError: the file could not be written; an older report under that name is still there.
    """
    return write_file(path, build_html(data).encode("utf-8"))
