"""Watching a run reading after reading with one false-alarm rate for the whole run.

A detector that looks at every reading has many chances to be wrong. Everything here is about the RUN: calibration is n
benign runs, the new run is one more, and all that is assumed is that a benign new run is exchangeable with them (any of
the n + 1 could have been the new one). Readings of one run may depend on each other in any way.

    path       a statistic T_1, T_2, ... of a run, each computed from the readings so far: the score itself, its
               running sum (CUSUM), or either in units of what benign runs reach by that reading
    boundary   threshold = the ceil((1 - a)(n + 1))-th smallest of max_k T_k over calibration runs. A benign run then
               crosses it, at any of its readings, with probability at most a: split conformal prediction applied
               to the maximum of the path (Vovk, Gammerman, Shafer 2005; ties count as crossings not made)
    e-process  e_k = (n + 1) f_k / (f_k + sum_i f_ik), f >= 0 any statistic; E[e_k] = 1 under exchangeability. With
               weights w_k >= 0, sum w_k <= 1, M_k = sum_{j <= k} w_j e_j never falls, and E[M_last] <= 1, so by Markov
               P(some M_k >= 1/a) <= a. No independence between readings is used. (Wang and Ramdas 2022,
               J. R. Stat. Soc. B 84(3): averages of dependent e-values are e-values.)

The time-varying boundary is where an earlier alarm comes from: benign runs have moved less by their second reading than
by their last, so the same score means more early. This module imports without torch and knows nothing of models.

    >>> test = fit_boundary(benign_scores, false_alarm_rate=0.05, path=envelope(other_benign_scores).standardise)
    >>> test.first_crossing(scores)
    3
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tiltmeter import sound
from tiltmeter.errors import InputError

__all__ = ["Boundary", "EProcess", "Envelope", "conformal_rank", "cusum", "envelope", "fit_boundary", "fit_eprocess"]

Array = NDArray[np.float64]
Path = Callable[[Array], Array]


def conformal_rank(n: int, false_alarm_rate: float) -> int:
    """Which of n ordered calibration scores is the threshold, counted from 1: ceil((1 - a)(n + 1)).

    Raises:
        InputError: the rate is outside 0 to 1, or n is too small to promise it: n must be at least 1/a - 1.
    """
    if not 0 < false_alarm_rate < 1:
        raise InputError(f"the false-alarm rate is {false_alarm_rate}; it must lie between 0 and 1")
    rank = math.ceil((1 - false_alarm_rate) * (n + 1) - 1e-9)
    if rank > n:
        raise InputError(
            f"{n} benign runs cannot promise a false-alarm rate of {false_alarm_rate:g}; at least "
            f"{math.ceil(1 / false_alarm_rate - 1e-9) - 1} are needed: add runs or allow more false alarms"
        )
    return rank


def cusum(scores: ArrayLike, *, allowance: float) -> Array:
    """C_k = max(0, C_{k-1} + s_k - allowance), (readings,): evidence that adds up (Page 1954, Biometrika 41).

    A score that is not a number makes that and every later value not a number.

    Raises:
        InputError: the allowance is no finite number.
    """
    sound.number("allowance", allowance)
    found, level = [], 0.0
    for score in np.asarray(scores, dtype=np.float64):
        level = max(0.0, level + float(score) - allowance) if np.isfinite(score) and np.isfinite(level) else math.nan
        found.append(level)
    return np.array(found)


class Envelope(NamedTuple):
    """What benign runs reach by each reading.

    Attributes:
        center, spread: (readings,) mean and standard deviation of benign scores at that reading.
    """

    center: Array
    spread: Array

    def standardise(self, scores: ArrayLike) -> Array:
        """(s_k - center_k) / spread_k, (readings,).

        Raises:
            InputError: the run has more readings than the envelope.
        """
        s = np.asarray(scores, dtype=np.float64)
        if len(s) > len(self.center):
            raise InputError(
                f"the run has {len(s)} readings and calibration runs had {len(self.center)}; nothing is known about "
                "later readings: calibrate on runs as long as this one"
            )
        return np.asarray((s - self.center[: len(s)]) / self.spread[: len(s)])


def envelope(runs: Sequence[ArrayLike], *, floor: float = 0.25) -> Envelope:
    """Mean and spread of benign scores at each reading, smoothed over neighbours.

    To keep the promise of `fit_boundary`, these runs must be others than those that set its threshold, or be left out
    in turn.

    Args:
        runs: scores of benign runs, of equal length.
        floor: the spread is at no reading below this share of its mean over readings.

    Raises:
        InputError: fewer than two runs, or runs of different lengths.
    """
    stacked = _stack(runs)
    if len(stacked) < 2:
        raise InputError(f"an envelope needs at least two benign runs, got {len(stacked)}")
    center, spread = _smooth(stacked.mean(axis=0)), _smooth(stacked.std(axis=0, ddof=1))
    return Envelope(center, np.maximum(spread, max(floor * float(spread.mean()), np.finfo(np.float64).tiny)))


@dataclass(frozen=True, eq=False)
class Boundary:
    """A threshold on the maximum of a path; see the module's text.

    Attributes:
        threshold: a run whose path passes ABOVE it alarms.
        false_alarm_rate: a, per run.
        maxima: (n,) of the calibration runs' paths, sorted.
        readings: how many a calibration run had.
        path: from scores to the statistic.

    Raises:
        InputError: a number is not finite or outside its range, or the threshold is not the one that the maxima give.
    """

    threshold: float
    false_alarm_rate: float
    maxima: Array
    readings: int
    path: Path

    def __post_init__(self) -> None:
        sound.array("maxima", self.maxima, (None,))
        sound.number("threshold", self.threshold)
        sound.whole("readings", self.readings, least=1)
        wanted = np.sort(self.maxima)[conformal_rank(len(self.maxima), self.false_alarm_rate) - 1]
        if not math.isclose(self.threshold, wanted, rel_tol=1e-12):
            raise InputError(
                f"threshold is {self.threshold:.6g}; the {len(self.maxima)} calibration runs give {wanted:.6g} at a "
                f"false-alarm rate of {self.false_alarm_rate:g}"
            )

    def first_crossing(self, scores: ArrayLike) -> int | None:
        """Index of the first reading at which the alarm is raised, or None.

        Raises:
            InputError: the run has no reading, more than calibration had, or a score or statistic that is not a
                number: nothing is promised there, and silence would look like safety.
        """
        above = np.flatnonzero(self._follow(scores) > self.threshold)
        return int(above[0]) if len(above) else None

    def _follow(self, scores: ArrayLike) -> Array:
        """The statistic of each reading, (readings,), all finite."""
        s = np.asarray(scores, dtype=np.float64)
        if s.ndim != 1 or not 1 <= len(s) <= self.readings:
            raise InputError(f"scores of shape {s.shape} are no run of 1 to {self.readings} readings; see Boundary")
        if not np.isfinite(s).all():
            raise InputError("a score is not a number, so the run cannot be called clear; measure it again")
        found = np.asarray(self.path(s), dtype=np.float64)
        if found.shape != s.shape or not np.isfinite(found).all():
            raise InputError("the statistic of a reading is not a number, so the run cannot be called clear")
        return found

    def p_value(self, scores: ArrayLike) -> float:
        """Share of the n + 1 runs, this one counted in, whose path reaches as high.

        Raises:
            InputError: see `first_crossing`.
        """
        top = float(np.max(self._follow(scores)))
        return float((1 + (self.maxima >= top).sum()) / (1 + len(self.maxima)))


def fit_boundary(runs: Sequence[ArrayLike], *, false_alarm_rate: float = 0.05, path: Path | None = None) -> Boundary:
    """Set the threshold from benign runs that the scores and the path were not fitted on.

    Args:
        runs: scores of benign calibration runs, of equal length.
        false_alarm_rate: per run.
        path: from scores (readings,) to the statistic (readings,), using at each reading only those so far; by
            default the score itself.

    Raises:
        InputError: too few runs for the rate, runs of different lengths, or scores that are not finite.
    """
    stacked = _stack(runs)
    rank = conformal_rank(len(stacked), false_alarm_rate)
    follow = path or np.asarray
    maxima = np.sort([float(np.max(follow(row))) for row in stacked])
    return Boundary(float(maxima[rank - 1]), false_alarm_rate, maxima, stacked.shape[1], follow)


@dataclass(frozen=True, eq=False)
class EProcess:
    """Evidence against "this run is benign" that may be looked at any time; see the module's text.

    Attributes:
        null: (n, readings) statistic of the benign calibration runs, 0 or more.
        weights: (readings,) how the bet is spread over readings; they sum to at most 1.

    Raises:
        InputError: a value below 0 or not finite, or weights that are not as said.
    """

    null: Array
    weights: Array

    def __post_init__(self) -> None:
        sound.array("null", self.null, (None, None), least=0)
        sound.whole("the number of calibration runs", len(self.null), least=1)
        sound.array("weights", self.weights, (self.null.shape[1],), least=0)
        sound.number("the sum of the weights", self.weights.sum(), above=0, most=1 + 1e-12)

    def evidence(self, statistic: ArrayLike) -> Array:
        """M_k, (readings,), of a run's statistic (0 or more).

        Raises:
            InputError: no reading, more than calibration had, or a value below 0 or not finite.
        """
        f = np.asarray(statistic, dtype=np.float64)
        if f.ndim != 1 or not 1 <= len(f) <= self.null.shape[1] or not np.isfinite(f).all() or (f < 0).any():
            raise InputError(
                f"got values of shape {f.shape} from {f.min() if f.size else math.nan} up; 1 to {self.null.shape[1]} "
                "finite values of 0 or more can be weighed"
            )
        null = self.null[:, : len(f)]
        total = f + null.sum(axis=0)
        e = np.where(total > 0, (len(null) + 1) * f / np.where(total > 0, total, 1.0), 1.0)
        return np.asarray(np.cumsum(self.weights[: len(f)] * e))

    def first_crossing(self, statistic: ArrayLike, *, false_alarm_rate: float = 0.05) -> int | None:
        """Index of the first reading with M_k >= 1/a, or None; benign runs have one with probability at most a.

        Raises:
            InputError: see `evidence`, or a rate outside 0 to 1.
        """
        sound.number("false_alarm_rate", false_alarm_rate, above=0, below=1)
        above = np.flatnonzero(self.evidence(statistic) >= 1.0 / false_alarm_rate)
        return int(above[0]) if len(above) else None


def fit_eprocess(runs: Sequence[ArrayLike], *, weights: ArrayLike | None = None) -> EProcess:
    """Weigh new runs against benign ones.

    Args:
        runs: statistic of benign calibration runs at each reading, 0 or more, of equal length.
        weights: (readings,), 0 or more, summing to at most 1; evenly spread by default.

    Raises:
        InputError: a value below 0 or not finite, or weights that are not as said.
    """
    null = _stack(runs)
    spread = np.full(null.shape[1], 1.0 / null.shape[1]) if weights is None else np.asarray(weights, dtype=np.float64)
    if (null < 0).any() or spread.shape != (null.shape[1],) or (spread < 0).any() or spread.sum() > 1 + 1e-12:
        raise InputError(
            "an e-process needs values of 0 or more, and one weight of 0 or more per reading that sum to at most 1"
        )
    return EProcess(null, spread)


def _stack(runs: Sequence[ArrayLike]) -> Array:
    rows = [np.asarray(run, dtype=np.float64) for run in runs]
    if not rows or len({row.shape for row in rows}) != 1 or rows[0].ndim != 1 or not len(rows[0]):
        raise InputError(
            f"got runs of shapes {sorted({row.shape for row in rows})}; give benign runs of one and the same number "
            "of readings"
        )
    stacked = np.stack(rows)
    if not np.isfinite(stacked).all():
        raise InputError("a calibration score is not finite; leave that run out")
    return stacked


def _smooth(values: Array) -> Array:
    """Mean of each value and its neighbours."""
    padded = np.concatenate([values[:1], values, values[-1:]])
    return np.asarray((padded[:-2] + padded[1:-1] + padded[2:]) / 3.0)
