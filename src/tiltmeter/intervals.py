"""Intervals of shares whose answers come in clusters: several answers to one question are not so many facts.

Fifty answers to one question say what that question brings out, not what the next one would. The interval is about
questions of this kind, asked anew. With n answers in all, n_q to question q, y_q hits among them, and p = sum y / n:

    v    = G / (G-1) sum_q (y_q - p n_q)^2 / n^2          variance of p between the G questions (ratio estimator)
    d    = v / (p (1-p) / n)                               design effect
    m    = sum_q n_q^2 / n                                 answers per question, as the design effect feels them
    icc  = (d - 1) / (m - 1), from 0 to 1                  likeness of answers to one question
    w    = g / (g + 4)                                     g: questions with at least one of the rarer outcome
    n'   = n / (1 + (m-1) (w icc + (1-w) 0.2))             the independent answers that these are worth
    t    = quantile of Student's t with (G-1) / w degrees

and the interval is Wilson's with n' for n and t for z, never narrower than Wilson's over all n (after Korn & Graubard
1998, with Wilson's interval for Clopper's). Few hits cannot show how alike the answers to one question are: without
any hit the estimate of icc is 0 / 0. So it is drawn towards 0.2, the highest that is published for such banks, which
weighs as much as four questions with a hit. Both constants were chosen by measured coverage (docs/trust.md). With one
answer per question it is Wilson's interval exactly; one question alone says as little as one answer does (Clopper and
Pearson's interval for one trial).

    >>> low, high, worth = clustered([50, 0, 0, 0, 0, 0, 0, 0], [50] * 8)            # 50 hits, all of one question
    >>> round(low, 3), round(high, 3), round(worth)
    (0.042, 0.316, 22)
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import optimize, special, stats

__all__ = ["CONFIDENCE", "Interval", "Rate", "Sensitivity", "clustered", "rate_of", "sensitivity", "wilson"]

CONFIDENCE = 0.95
PRIOR_ICC = 0.2
PRIOR_WEIGHT = 4.0
POWER = 0.8
_STEPS = 64  # how many numbers of unknown answers are tried, for the lowest and the highest end


@dataclass(frozen=True)
class Rate:
    """A share of answers.

    Attributes:
        value: between 0 and 1; None where it cannot be said.
        n: answers it is a share of.
        low: lower end of the 95 % interval; see the module's text, and `rates` for answers without a score.
        high: upper end.
    """

    value: float | None
    n: int
    low: float | None = None
    high: float | None = None


Counts = npt.NDArray[np.int64]


class Interval(NamedTuple):
    """An interval from 0 to 1, and the number of independent answers that these were worth."""

    low: float
    high: float
    effective: float


class Sensitivity(NamedTuple):
    """What a bank asked this often can show.

    Attributes:
        smallest_alarm: the true rate at which the lower end passes the threshold in four of five evaluations.
        clear_at_zero: the upper end without one misaligned answer.
        ever_at_zero: the same for the same questions with any number of samples.
        questions: questions with an answer.
        answers: answers in all.
    """

    smallest_alarm: float | None
    clear_at_zero: float
    ever_at_zero: float
    questions: int
    answers: int


def wilson(successes: int, n: int) -> Rate:
    """A share with its 95 % Wilson interval, for independent answers; None for a share of nothing."""
    if n == 0:
        return Rate(None, 0)
    interval = stats.binomtest(successes, n).proportion_ci(confidence_level=CONFIDENCE, method="wilson")
    return Rate(successes / n, n, float(interval.low), float(interval.high))


def clustered(hits: Sequence[int] | Counts, sizes: Sequence[int] | Counts) -> Interval:
    """The interval of a share of hits, from the hits and the answers of each question; see the module's text.

    Args:
        hits: per question, at most its size.
        sizes: answers per question; questions without answers do not count.

    Raises:
        ValueError: there is no answer, or a question has more hits than answers.
    """
    y, n_q = np.asarray(hits, dtype=float), np.asarray(sizes, dtype=float)
    if y.shape != n_q.shape or not np.all((y >= 0) & (y <= n_q)) or n_q.sum() == 0:
        raise ValueError("hits have to lie between 0 and the answers of each question, and some question needs one")
    y, n_q = y[n_q > 0], n_q[n_q > 0]
    n, groups = float(n_q.sum()), len(n_q)
    p = float(y.sum()) / n
    plain = _wilson(p, n, float(special.ndtri((1 + CONFIDENCE) / 2)))
    m = float((n_q**2).sum()) / n
    if m <= 1:
        return Interval(*plain, n)
    if groups == 1:
        tail = (1 - CONFIDENCE) / 2
        return Interval(tail if p == 1 else 0.0, 1 - tail if p == 0 else 1.0, 1.0)
    icc = 0.0
    if 0 < p < 1:
        between = groups / (groups - 1) * float(((y - p * n_q) ** 2).sum()) / n**2
        icc = min(1.0, max(0.0, (between * n / (p * (1 - p)) - 1) / (m - 1)))
    seen = min(int((y > 0).sum()), int((y < n_q).sum()))
    weight = seen / (seen + PRIOR_WEIGHT)
    worth = n / (1 + (m - 1) * (weight * icc + (1 - weight) * PRIOR_ICC))
    low, high = _wilson(p, worth, _quantile(groups, weight))
    return Interval(min(low, plain[0]), max(high, plain[1]), worth)


def rate_of(hits: Sequence[bool], questions: Sequence[Hashable], *, unknown: Sequence[Hashable] = ()) -> Rate:
    """A share with its interval, which also holds whatever the unknown answers were.

    The lower end is the lowest with none, some (in order) or all of the unknown answers counted as no hits, the upper
    end the highest with none, some or all counted as hits; so one more of them never makes the interval narrower.

    Args:
        hits: per answer.
        questions: per answer, what it answers.
        unknown: the question of each answer of which it is not known whether it is a hit.
    """
    if not hits:
        return Rate(None, 0)
    places = {question: place for place, question in enumerate(dict.fromkeys((*questions, *unknown)))}
    found, sizes = np.zeros(len(places), dtype=int), np.zeros(len(places), dtype=int)
    for question, hit in zip(questions, hits, strict=True):
        found[places[question]] += bool(hit)
        sizes[places[question]] += 1
    low, high = 1.0, 0.0
    for counted in np.unique(np.linspace(0, len(unknown), _STEPS + 1).round().astype(int)):
        lost = np.bincount([places[question] for question in unknown[:counted]], minlength=len(places))
        low = min(low, clustered(found, sizes + lost).low)
        high = max(high, clustered(found + lost, sizes + lost).high)
    return Rate(int(found.sum()) / len(hits), len(hits), low, high)


def sensitivity(sizes: Sequence[int], threshold: float) -> Sensitivity | None:
    """What a bank asked this often can show, at the icc assumed before anything is seen; None for no answers."""
    counts = [size for size in sizes if size > 0]
    if not counts:
        return None
    nothing = clustered([0] * len(counts), counts)
    ever = clustered([0] * len(counts), [100_000] * len(counts))
    worth = nothing.effective

    def passes(hits: int) -> bool:
        seen = min(hits, len(counts)) if worth < sum(counts) else 0
        z = _quantile(len(counts), seen / (seen + PRIOR_WEIGHT))
        return _wilson(min(hits / worth, 1.0), worth, z)[0] > threshold

    least = next((hits for hits in range(int(worth) + 2) if passes(hits)), None)
    smallest = None
    if least is not None and least <= worth:
        # With k successes due of n trials, P(X >= k) is a beta distribution in p; n need not be whole there.
        smallest = float(optimize.brentq(lambda p: stats.beta.cdf(p, least, worth - least + 1) - POWER, 0.0, 1.0))
    return Sensitivity(smallest, nothing.high, ever.high, len(counts), sum(counts))


def _quantile(groups: int, weight: float) -> float:
    """Student's t where the spread between questions is estimated, and the normal one where it is assumed."""
    tail = (1 + CONFIDENCE) / 2
    return float(special.ndtri(tail) if weight == 0 else special.stdtrit((groups - 1) / weight, tail))


def _wilson(p: float, n: float, z: float) -> tuple[float, float]:
    scale = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z / scale * float(np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)))
    return (0.0 if p == 0 else max(0.0, centre - half)), (1.0 if p == 1 else min(1.0, centre + half))
