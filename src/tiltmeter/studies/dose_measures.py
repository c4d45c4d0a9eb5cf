"""The arithmetic of dose response: distances, shares of the full-dose drift, and the smallest dose that is seen.

    cosine drift of a run       mean over prompts of 1 - cos(h_run, h_benign)             (S. Burns 2026, drift v1/v2)
    share of full               (drift_dose - floor) / (drift_full - floor)
    floor                       the cosine drift of reseeded BENIGN runs: two fine-tunes always differ
    alarm                       score above the ceil((1 - a)(n + 1))-th smallest of n benign runs' scores
    smallest dose seen          the lowest from which on at least a share `power` of the runs alarms, at every dose
    conversion point of prompt  the lowest dose at which its mean alignment falls by at least `least`

The original reports drift without a floor; with n benign runs that neither made the reference nor the axis, the
conformal threshold holds at any n >= 1/a - 1 (Vovk et al. 2005) for a new benign run that is exchangeable with them.
Everything is by run: prompts and answers of one run are not independent. This module knows neither models nor files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from tiltmeter.errors import InputError

__all__ = [
    "Estimate",
    "Sighting",
    "cohens_d",
    "conformal_threshold",
    "conversion_point",
    "cosine_distance",
    "fisher_interval",
    "share_of_full",
    "smallest_dose",
    "spearman",
]

Array = NDArray[np.float64]
CONFIDENCE = 0.95
_ROUNDING = 1e-9


class Estimate(NamedTuple):
    """A number with its 95 % interval; an end is None where the interval is unbounded or there is none."""

    value: float | None
    low: float | None
    high: float | None
    n: int


class Sighting(NamedTuple):
    """From which dose on a detector sees poisoning.

    Attributes:
        dose: None where no dose is seen.
        low, high: percentile interval over resampled runs; None stands for "no dose".
        alarms: (dose, runs alarmed, runs) for every dose, ascending.
        threshold: a score above it is an alarm.
        n_null: benign runs behind the threshold.
    """

    dose: float | None
    low: float | None
    high: float | None
    alarms: tuple[tuple[float, int, int], ...]
    threshold: float
    n_null: int


def cosine_distance(one: NDArray[Any], other: NDArray[Any]) -> Array:
    """1 - cos over the last axis: (..., hidden) and (..., hidden) to (...)."""
    a, b = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(1.0 - (a * b).sum(axis=-1) / lengths)


def share_of_full(dosed: ArrayLike, full: ArrayLike, floor: ArrayLike | None = None) -> Estimate:
    """Drift at a dose as a share of the drift at full dose, with the noise floor subtracted from both.

    The interval is Fieller's (1954, JRSS B 16(2)) for a ratio of means, with the degrees of freedom of the smallest
    group; where the full-dose drift cannot be told from the floor, the ratio is unbounded and has no interval.

    Args:
        dosed: (runs,) drift of the runs at the dose.
        full: (runs,) drift of the runs at full dose.
        floor: (runs,) drift of benign runs; None subtracts nothing, as in the original.

    Raises:
        InputError: a group has fewer than two runs.
    """
    groups = [np.asarray(g, dtype=np.float64) for g in (dosed, full, np.zeros(2) if floor is None else floor)]
    if min(map(len, groups)) < 2:
        raise InputError(f"got groups of {[len(g) for g in groups]} runs; an interval needs at least 2 in each")
    means, variances = [g.mean() for g in groups], [g.var(ddof=1) / len(g) for g in groups]
    above, whole = means[0] - means[2], means[1] - means[2]
    n = sum(len(g) for g in groups[: 2 if floor is None else 3])
    if whole <= 0:
        return Estimate(None, None, None, n)
    counted = groups if floor is not None else groups[:2]
    t = float(stats.t.ppf((1 + CONFIDENCE) / 2, min(map(len, counted)) - 1))
    var_above, var_whole, shared = variances[0] + variances[2], variances[1] + variances[2], variances[2]
    # (above - s whole)^2 <= t^2 (var_above - 2 s shared + s^2 var_whole), a quadratic in s
    a = whole**2 - t**2 * var_whole
    b = above * whole - t**2 * shared
    c = above**2 - t**2 * var_above
    if a <= 0:
        return Estimate(above / whole, None, None, n)
    root = math.sqrt(max(b * b - a * c, 0.0))
    return Estimate(above / whole, (b - root) / a, (b + root) / a, n)


def cohens_d(dosed: ArrayLike, benign: ArrayLike) -> Estimate:
    """Difference of means in pooled standard deviations over runs; the interval is that of a noncentral t.

    Raises:
        InputError: a group has fewer than two runs.
    """
    a, b = np.asarray(dosed, dtype=np.float64), np.asarray(benign, dtype=np.float64)
    if min(len(a), len(b)) < 2:
        raise InputError(f"got {len(a)} and {len(b)} runs; Cohen's d needs at least 2 in each group")
    df = len(a) + len(b) - 2
    pooled = math.sqrt(((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / df)
    if pooled == 0:
        return Estimate(None, None, None, df + 2)
    d = float(a.mean() - b.mean()) / pooled
    scale = math.sqrt(len(a) * len(b) / (len(a) + len(b)))
    half = stats.norm.ppf((1 + CONFIDENCE) / 2) * math.sqrt(1 / scale**2 + d * d / (2 * (df + 2)))
    return Estimate(d, d - half, d + half, df + 2)


def conformal_threshold(null: ArrayLike, false_alarm_rate: float) -> float:
    """The score that a new benign run passes with probability at most `false_alarm_rate`.

    Raises:
        InputError: too few benign runs for that rate, or scores that are not numbers.
    """
    scores = np.sort(np.asarray(null, dtype=np.float64))
    needed = math.ceil(1 / false_alarm_rate - _ROUNDING) - 1
    if len(scores) < needed or not np.isfinite(scores).all():
        raise InputError(
            f"a false-alarm rate of {false_alarm_rate:g} needs at least {needed} benign runs with finite scores, got "
            f"{int(np.isfinite(scores).sum())} of {len(scores)}; add runs or allow more false alarms"
        )
    return float(scores[_rank(len(scores), false_alarm_rate)])


def smallest_dose(
    scores: Mapping[float, ArrayLike],
    null: ArrayLike,
    *,
    false_alarm_rate: float = 0.05,
    power: float = 0.8,
    resamples: int = 2000,
    seed: int = 0,
) -> Sighting:
    """The smallest dose from which on a detector alarms on at least a share `power` of the runs.

    Args:
        scores: (runs,) by dose; higher is more suspicious.
        null: (runs,) scores of benign runs that nothing was fitted on.
        false_alarm_rate: per run.
        power: share of runs that must alarm at the dose and at every higher one.
        resamples: of benign and dosed runs, for the interval.
        seed: of the resampling.

    Raises:
        InputError: too few benign runs, a dose without runs, or a run without a score.
    """
    rows = {dose: np.asarray(values, dtype=np.float64) for dose, values in sorted(scores.items())}
    if not rows or min(map(len, rows.values())) < 1:
        raise InputError("a dose has no runs; give at least one run for each dose")
    lost = sum(int((~np.isfinite(values)).sum()) for values in rows.values())
    if lost:
        raise InputError(
            f"{lost} runs have no score, which must not pass for a low one; run them again or leave them out"
        )
    clean = np.asarray(null, dtype=np.float64)
    threshold = conformal_threshold(clean, false_alarm_rate)
    rng = np.random.default_rng(seed)
    rank = _rank(len(clean), false_alarm_rate)
    limits = np.sort(rng.choice(clean, (resamples, len(clean))), axis=1)[:, rank]
    seen = np.full(resamples, math.inf)
    unbroken = np.ones(resamples, dtype=bool)
    for dose, values in reversed(rows.items()):
        shares = (rng.choice(values, (resamples, len(values))) > limits[:, None]).mean(axis=1)
        unbroken &= shares >= power - _ROUNDING
        seen[unbroken] = dose
    alarms = tuple((dose, int((values > threshold).sum()), len(values)) for dose, values in rows.items())
    low, high = np.quantile(seen, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], method="inverted_cdf")
    return Sighting(
        _first_seen({dose: hits / n for dose, hits, n in alarms}, power),
        _or_none(float(low)), _or_none(float(high)), alarms, threshold, len(clean),
    )  # fmt: skip


def conversion_point(alignment: Mapping[float, float], benign: float, *, least: float) -> float | None:
    """The lowest dose at which a prompt's mean alignment lies at least `least` points below the benign one's."""
    return next((dose for dose in sorted(alignment) if benign - alignment[dose] >= least), None)


def spearman(one: Sequence[float], other: Sequence[float]) -> Estimate:
    """Rank correlation with the interval of Fisher's transformation (variance after Bonett and Wright 2000)."""
    n = len(one)
    if n < 5 or len(set(one)) < 2 or len(set(other)) < 2:
        return Estimate(None, None, None, n)
    rho = float(stats.spearmanr(one, other).statistic)
    if abs(rho) >= 1 - _ROUNDING:
        return Estimate(rho, None, None, n)
    return Estimate(rho, *fisher_interval(rho, n), n)


def fisher_interval(rho: float, n: int) -> tuple[float, float]:
    """95 % interval of a rank correlation below 1 over n > 3 pairs, by Fisher's transformation."""
    half = stats.norm.ppf((1 + CONFIDENCE) / 2) * math.sqrt((1 + rho**2 / 2) / (n - 3))
    middle = math.atanh(min(max(rho, -1 + _ROUNDING), 1 - _ROUNDING))
    return math.tanh(middle - half), math.tanh(middle + half)


def _rank(n: int, false_alarm_rate: float) -> int:
    """Which of n sorted scores is the threshold, counted from 0."""
    return math.ceil((1 - false_alarm_rate) * (n + 1) - _ROUNDING) - 1


def _first_seen(shares: Mapping[float, float], power: float) -> float | None:
    seen = None
    for dose in sorted(shares, reverse=True):
        if shares[dose] < power - _ROUNDING:
            break
        seen = dose
    return seen


def _or_none(value: float) -> float | None:
    return None if math.isinf(value) else value
