"""Verdicts, and the one place where a score and a threshold become one.

CLEAR has to be proven: the score is a finite number, the threshold is a finite number, the score lies below it, and
nothing stands outside what was calibrated. An ALARM needs the score to reach the threshold. Everything else, NaN,
infinity and nothing at all among it, is INCONCLUSIVE with the reason.

Conformal thresholds are set here too, and checked: a threshold is a function of the calibration scores, their weights
and the false-alarm rate, so one that those cannot have produced is refused. See `tiltmeter.detector` for the equations.

It knows nothing of models and of readings, and imports without torch.

    >>> compare(0.2, 0.35), compare(float("nan"), 0.35), compare(0.2, float("nan"))
    (<State.CLEAR: 'CLEAR'>, <State.INCONCLUSIVE: 'INCONCLUSIVE'>, <State.INCONCLUSIVE: 'INCONCLUSIVE'>)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tiltmeter import sound
from tiltmeter.errors import InputError

__all__ = [
    "Calibrated",
    "State",
    "Verdict",
    "check_conformal",
    "compare",
    "decide",
    "inconclusive",
    "set_threshold",
    "weigh_sets",
]

Array = NDArray[np.float64]
_EXACT = 1e-9


class State(StrEnum):
    """What a verdict says."""

    CLEAR = "CLEAR"
    ALARM = "ALARM"
    INCONCLUSIVE = "INCONCLUSIVE"


@dataclass(frozen=True)
class Verdict:
    """A statement about one run, and what it rests on.

    Attributes:
        state: CLEAR, ALARM or INCONCLUSIVE.
        score: of the run so far, see the detector; None when there is none.
        threshold: at or above which the score is an alarm.
        p_value: weight of the benign calibration runs that score as high, a new set counted in.
        false_alarm_rate: promised per run, on sets like those of calibration; None where nothing is promised.
        calibrated_on: the calibration in words.
        n_calibration: number of benign calibration runs.
        step: of the latest reading.
        first_alarm_step: of the first reading that passed the threshold.
        reason: one sentence.

    Raises:
        InputError: a CLEAR without a finite score that is no higher than a finite threshold.
    """

    state: State
    score: float | None
    threshold: float | None
    p_value: float | None
    false_alarm_rate: float | None
    calibrated_on: str
    n_calibration: int
    step: int | None
    first_alarm_step: int | None
    reason: str

    def __post_init__(self) -> None:
        if self.state != State.CLEAR:
            return
        sound.number("the threshold of a CLEAR verdict", self.threshold)
        assert self.threshold is not None  # checked above
        sound.number("the score of a CLEAR verdict", self.score, most=self.threshold)

    @property
    def exit_code(self) -> int:
        """0 for CLEAR, 1 for ALARM, 3 for INCONCLUSIVE."""
        return {State.CLEAR: 0, State.ALARM: 1, State.INCONCLUSIVE: 3}[self.state]

    def noting(self, caveats: Sequence[str]) -> Verdict:
        """The same verdict, whose reason goes on with what is uncertain about what was judged."""
        new = [said for said in caveats if said not in self.reason]
        return replace(self, reason=" ".join([self.reason, *(f"Note: {said}." for said in new)])) if new else self

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; `state` is also under the key `verdict`."""
        return {**asdict(self), "state": str(self.state), "verdict": str(self.state)}


class Calibrated(Protocol):
    """What every detector with a conformal threshold has; see `weigh_sets`."""

    @property
    def threshold(self) -> float:
        """Of the score of a run."""
        ...

    @property
    def false_alarm_rate(self) -> float:
        """Promised per run."""
        ...

    @property
    def null_scores(self) -> Array:
        """(n,) of benign runs, ascending."""
        ...

    @property
    def null_weights(self) -> Array:
        """(n,) of those."""
        ...


class _Judge(Protocol):
    """What a verdict without a score says of its detector."""

    @property
    def threshold(self) -> float: ...
    @property
    def null_scores(self) -> Array: ...
    @property
    def calibrated_on(self) -> str: ...


def inconclusive(reason: str, *, step: int | None = None, detector: _Judge | None = None) -> Verdict:
    """A verdict that says why nothing can be said."""
    return Verdict(
        state=State.INCONCLUSIVE,
        score=None,
        threshold=detector.threshold if detector else None,
        p_value=None,
        false_alarm_rate=None,
        calibrated_on=detector.calibrated_on if detector else "nothing",
        n_calibration=len(detector.null_scores) if detector else 0,
        step=step,
        first_alarm_step=None,
        reason=reason,
    )


def compare(score: float | None, threshold: float | None, *, outside: bool = False) -> State:
    """What a score says: ALARM where it reaches the threshold, CLEAR only where it is proven to lie below.

    Args:
        score, threshold: whatever was computed, or None.
        outside: whether something lies outside what was calibrated, or could not be made sure of: never CLEAR then.
    """
    if score is None or threshold is None or not (math.isfinite(score) and math.isfinite(threshold)):
        return State.INCONCLUSIVE
    if score >= threshold:
        return State.ALARM
    return State.CLEAR if score < threshold and not outside else State.INCONCLUSIVE


def decide(
    by: Calibrated,
    scores: ArrayLike,
    steps: Sequence[int | None],
    *,
    calibrated_on: str,
    said: tuple[str, str] = ("the score reached", "the score stayed at"),
    unit: str = "",
    outside: str | None = None,
    unsure: str | None = None,
    note: str = "",
) -> Verdict:
    """The verdict on a run from the scores of its readings: the one decision of every detector of runs.

    Args:
        by: the detector; its threshold holds for the largest score.
        scores: (readings,) in step order; one that is not a finite number leaves a run INCONCLUSIVE in which no other
            one alarms.
        steps: of the readings.
        calibrated_on: in words.
        said: how the reason of an ALARM and that of a CLEAR begin.
        unit: of the score, for the reason: "nats".
        outside: why the run lies outside what was calibrated: no CLEAR, and an ALARM promises no rate.
        unsure: why the run cannot be called clear though its score lies below: no CLEAR.
        note: added to the reason of a CLEAR or an ALARM.
    """
    values = np.asarray(scores, dtype=np.float64)
    last = steps[-1] if len(steps) else None
    whole = values.ndim == 1 and values.size > 0 and len(values) == len(steps)
    finite = np.isfinite(values) if whole else np.zeros(values.shape, dtype=np.bool_)
    top = float(values[finite].max()) if finite.any() else math.nan
    state = compare(top, by.threshold, outside=bool(outside or unsure))
    if state is not State.ALARM and not finite.all():
        top, state = math.nan, State.INCONCLUSIVE
    named, limit = f"{top:.2f}{unit and ' '}{unit}", f"{by.threshold:.2f}"
    score, first = (top if math.isfinite(top) else None), None
    if state is State.ALARM:
        first = steps[int(np.flatnonzero(finite & (values >= by.threshold))[0])]
        reason = f"{said[0]} {named}, at or above {limit}, which at most {by.false_alarm_rate:.0%} of benign runs reach"
        reason += note + (f"; {outside}, so the false-alarm rate is not promised" if outside else "")
    elif state is State.CLEAR:
        reason = f"{said[1]} {named}, below {limit}, in {len(values)} reading(s){note}"
    elif score is None:
        reason = "the score is not a finite number: the detector is damaged, or the reading beyond all measure"
    elif not math.isfinite(by.threshold):
        reason = f"the threshold is {by.threshold}, so nothing can be said"
    else:
        reason = f"below the threshold ({named}, below {limit}), but {outside or unsure}"
    rest = 1.0 - by.null_weights.sum()  # the new set's own weight
    return Verdict(
        state=state,
        score=score,
        threshold=by.threshold,
        p_value=None if score is None else float(by.null_weights[by.null_scores >= top].sum() + rest),
        false_alarm_rate=None if outside or state is State.INCONCLUSIVE else by.false_alarm_rate,
        calibrated_on=calibrated_on,
        n_calibration=len(by.null_scores),
        step=last,
        first_alarm_step=first,
        reason=f"{reason}.",
    )


def weigh_sets(scores: Sequence[tuple[str, float]]) -> tuple[Array, Array]:
    """Scores of benign runs, (n,) ascending, and their weights: 1 / ((K + 1) n) for each of n runs of one of K sets.

    Args:
        scores: name of the set, and score, of each benign run.
    """
    counts = Counter(name for name, _ in scores)
    ordered = sorted((score, 1 / ((len(counts) + 1) * counts[name])) for name, score in scores)
    found, weights = np.array(ordered).T
    return found, weights


def set_threshold(scores: Array, weights: Array, false_alarm_rate: float) -> float:
    """The score at or above which a run alarms, see the text of `tiltmeter.detector`.

    Just above the smallest score with weight 1 - a at or below it, or above the largest where there is none.
    """
    enough = np.flatnonzero(np.cumsum(weights) >= 1 - false_alarm_rate - 1e-9)
    return float(np.nextafter(scores[enough[0] if len(enough) else -1], np.inf))


def check_conformal(by: Calibrated, *, floor: float | None = None) -> None:
    """Refuse a calibration that does not hang together: the threshold must be the one that scores, weights and rate
    give.

    Args:
        by: a detector.
        floor: below which no threshold of this kind lies.

    Raises:
        InputError: a number that is not finite or outside its range, weights that those of no number of sets are, a
            rate that so many sets cannot promise, or a threshold that the scores cannot have produced.
    """
    sound.number("false_alarm_rate", by.false_alarm_rate, above=0, below=1)
    sound.number("threshold", by.threshold)
    sound.array("null_scores", by.null_scores, (None,))
    sound.array("null_weights", by.null_weights, (len(by.null_scores),), above=0)
    if not len(by.null_scores) or (np.diff(by.null_scores) < 0).any():
        raise InputError(
            f"null_scores are {len(by.null_scores)} numbers; they must be in ascending order, at least two"
        )
    n_sets = _sets_of(by.null_weights)
    if by.false_alarm_rate < 1 / (n_sets + 1) - _EXACT:
        raise InputError(
            f"false_alarm_rate is {by.false_alarm_rate:g}; {n_sets} benign sets can promise no less than "
            f"{1 / (n_sets + 1):.3g}"
        )
    wanted = set_threshold(by.null_scores, by.null_weights, by.false_alarm_rate)
    if floor is not None:
        wanted = max(wanted, floor)
    if not math.isclose(by.threshold, wanted, rel_tol=_EXACT, abs_tol=np.finfo(np.float64).tiny):
        raise InputError(
            f"threshold is {by.threshold:.6g}; the {len(by.null_scores)} calibration scores give {wanted:.6g} at a "
            f"false-alarm rate of {by.false_alarm_rate:g}"
        )


def _sets_of(weights: Array) -> int:
    """The number K of sets: weights add up to K / (K + 1), each is 1 / ((K + 1) n), and n divides how many are so."""
    total = float(weights.sum())
    n_sets = round(total / (1 - total)) if 0 < total < 1 else 0
    runs = 1 / ((n_sets + 1) * weights)
    whole = np.round(runs)
    good = (
        n_sets >= 2
        and abs(total - n_sets / (n_sets + 1)) < _EXACT
        and bool(np.allclose(runs, whole, rtol=1e-6))
        and all(int((whole == n).sum()) % n == 0 for n in np.unique(whole))
    )
    if not good:
        raise InputError(
            f"null_weights add up to {total:.6g} and are not those of two or more benign sets of which each counts the "
            "same"
        )
    return n_sets
