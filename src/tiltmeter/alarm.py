"""The step-aware alarm: how likely is this run dangerous, given its drift, how fast it drifts, and how long it has run?

    x_k  = [ drift_k , (drift_k - drift_{k-1}) / (step_k - step_{k-1}) * 10 , log(1 + step_k) ]
    P_k  = logistic(w . x_k + b)                       alarm at the first reading with P_k >= 1/2, as published, or at a
                                                       threshold set by `sequential.fit_boundary` on benign runs

A long benign run drifts as far as a short dangerous one; the same drift means less the later it is reached. Which
lengths the alarm has seen decides what it can say: runs of every length that it will meet, benign and dangerous, are
its ANCHORS (arXiv 2606.07631, appendix: cross-regime step-aware alarm, anchor-horizon ablation; its features and
training rule are not published, so these are ours). Readings of a dangerous run before its behavior is misaligned are
left out of the fit: they are neither harmless nor yet dangerous, and what the alarm says of them is its lead.

It knows nothing of models and imports without torch. A reading that is not a number has no probability.

    >>> alarm = fit_alarm(anchors)
    >>> alarm.probabilities(profiles_of_a_run)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tiltmeter import sound
from tiltmeter.errors import InputError
from tiltmeter.regressors import Linear, fit_logistic

__all__ = ["Anchor", "StepAwareAlarm", "features", "fit_alarm"]

Array = NDArray[np.float64]
Use = Literal["drift", "rate", "step"]
_PER = 10.0  # steps that a rate of change is given over


@dataclass(frozen=True, eq=False)
class Anchor:
    """A run whose outcome is known, for the alarm to be fitted on.

    Attributes:
        steps: (readings,) increasing, step 0 left out.
        drift: (readings, k) against the run's start.
        dangerous: (readings,) 1 where behavior was misaligned, 0 where it was not, NaN where the reading is to be
            left out (a dangerous run before its behavior shows it, or an unjudged one).
    """

    steps: Array
    drift: Array
    dangerous: Array

    def until(self, step: int) -> Anchor:
        """The run as it was at that step: a shorter horizon."""
        kept = self.steps <= step
        return Anchor(self.steps[kept], self.drift[kept], self.dangerous[kept])


@dataclass(frozen=True, eq=False)
class StepAwareAlarm:
    """See the module's text.

    Attributes:
        model: logistic regression over the features.
        uses: which groups of features it looks at.
        longest: the last step of any anchor; later ones are outside what was calibrated.

    Raises:
        InputError: no group of features or an unknown one, no probability, or a last step below 1.
    """

    model: Linear
    uses: tuple[Use, ...]
    longest: int

    def __post_init__(self) -> None:
        sound.texts("uses", self.uses)
        for use in self.uses:
            sound.choice("a group of features", use, ("drift", "rate", "step"))
        sound.whole("longest", self.longest, least=1)
        sound.choice("the model's link", self.model.link, ("logistic",))

    def probabilities(self, steps: ArrayLike, drift: ArrayLike) -> Array:
        """P_k of each reading, (readings,); NaN where the drift is not a number."""
        return self.model.predict(features(steps, drift, uses=self.uses))

    def margins(self, steps: ArrayLike, drift: ArrayLike) -> Array:
        """log P_k / (1 - P_k), (readings,): the same order, and no ceiling at 1."""
        return self.model.margin(features(steps, drift, uses=self.uses))

    def covers(self, steps: ArrayLike) -> NDArray[np.bool_]:
        """Which readings lie within the calibrated length, (readings,)."""
        return np.asarray(np.asarray(steps) <= self.longest)


def features(steps: ArrayLike, drift: ArrayLike, *, uses: Sequence[Use] = ("drift", "rate", "step")) -> Array:
    """x of each reading, (readings, features).

    Args:
        steps: (readings,) increasing and above 0.
        drift: (readings, k); the run starts at step 0 with drift 0.
        uses: which groups.

    Raises:
        InputError: steps that do not increase from above 0, or shapes that do not fit.
    """
    at, moved = np.asarray(steps, dtype=np.float64), np.asarray(drift, dtype=np.float64)
    gaps = np.diff(at, prepend=0.0) if at.ndim == 1 else np.zeros(1)
    # Not "no gap is <= 0": a step that is no number has gaps that are none.
    if moved.ndim != 2 or len(moved) != len(at) or not (gaps > 0).all() or not np.isfinite(at).all() or not uses:
        raise InputError(
            f"steps {at.tolist()} and drift of shape {moved.shape} are not a run; give increasing steps above 0 and "
            "one row of drift for each"
        )
    parts = {
        "drift": moved,
        "rate": np.diff(moved, axis=0, prepend=np.zeros((1, moved.shape[1]))) / gaps[:, None] * _PER,
        "step": np.log1p(at)[:, None],
    }
    return np.concatenate([parts[use] for use in uses], axis=1)


def fit_alarm(
    anchors: Sequence[Anchor], *, uses: Sequence[Use] = ("drift", "rate", "step"), penalty: float = 1.0
) -> StepAwareAlarm:
    """Fit on anchors. Benign and dangerous readings weigh the same in sum, however many there are of each.

    Args:
        anchors: benign and dangerous runs of the lengths that are to be judged.
        uses: which groups of features.
        penalty: on the squared weights.

    Raises:
        InputError: no reading of one of the two kinds.
    """
    rows = np.concatenate([features(a.steps, a.drift, uses=uses) for a in anchors]) if anchors else np.empty((0, 1))
    labels = np.concatenate([np.asarray(a.dangerous, dtype=np.float64) for a in anchors]) if anchors else np.empty(0)
    known = np.isfinite(labels)
    kinds = [int((labels[known] == kind).sum()) for kind in (0, 1)]
    if 0 in kinds:
        raise InputError(
            f"the anchors hold {kinds[0]} harmless and {kinds[1]} dangerous readings; both are needed: add runs"
        )
    weights = np.where(labels[known] == 1, len(labels[known]) / (2 * kinds[1]), len(labels[known]) / (2 * kinds[0]))
    model = fit_logistic(rows[known], labels[known], penalty=penalty, weights=weights)
    return StepAwareAlarm(model, tuple(uses), int(max(a.steps.max() for a in anchors)))
