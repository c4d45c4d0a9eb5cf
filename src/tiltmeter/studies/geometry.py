"""Geometry of drift over runs: is there one danger axis, how stable is it, and what are the seven numbers worth?

After arXiv 2606.07631, section on geometry: a pooled principal component over the final drift of all calibration runs,
its share of the variance, its loadings, the plane of direction (cosine to it) and magnitude, and how trait drift goes
with behavior. Intervals are bootstrap over RUNS, since readings of one run are not independent. Drift has no unit, so
runs of several models are pooled; the seven numbers stay one profile, not seven diagnoses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tiltmeter.errors import InputError, NumericalError

__all__ = [
    "Component",
    "Correlation",
    "bootstrap",
    "component",
    "danger_correlation",
    "left_out_cosines",
    "remove",
]

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Component:
    """The first principal component of final drift profiles, centred, turned to the side of the dangerous runs.

    Attributes:
        direction: (k,) unit: the loadings.
        share: part of the variance along it, with its bootstrap interval over runs.
        low, high: of the 95 % interval.
        n: number of runs.
    """

    direction: Array
    share: float
    low: float
    high: float
    n: int


class Correlation(NamedTuple):
    """Pearson correlation of one trait's drift with the EM rate over runs, before and after the first component's
    part of the drift is taken away; with bootstrap intervals over runs."""

    raw: float
    raw_low: float
    raw_high: float
    without: float
    without_low: float
    without_high: float


def bootstrap(n: int, *, draws: int = 2000, seed: int = 0, groups: ArrayLike | None = None) -> NDArray[np.int64]:
    """Rows to draw with replacement, (draws, n); with `groups`, whole groups are drawn and n varies (-1 pads).

    Args:
        n: number of rows.
        draws: how often.
        seed: of the draw.
        groups: (n,) label of each row: rows of one run stay together.
    """
    rng = np.random.default_rng(seed)
    if groups is None:
        return np.asarray(rng.integers(0, n, size=(draws, n)))
    _, codes = np.unique(np.asarray(groups), return_inverse=True)
    members = [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]
    picked = [np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))]) for _ in range(draws)]
    width = max(len(rows) for rows in picked)
    return np.array([np.pad(rows, (0, width - len(rows)), constant_values=-1) for rows in picked])


def component(profiles: ArrayLike, rates: ArrayLike, *, draws: int = 2000, seed: int = 0) -> Component:
    """Fit the pooled component.

    Args:
        profiles: (runs, k) final drift.
        rates: (runs,) final EM rate; decides the sign alone.
        draws: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        InputError: fewer than three runs, or shapes that do not fit.
        NumericalError: the profiles do not vary.
    """
    points, em = np.asarray(profiles, dtype=np.float64), np.asarray(rates, dtype=np.float64)
    if points.ndim != 2 or len(points) < 3 or em.shape != (len(points),):
        raise InputError(f"profiles {points.shape} and rates {em.shape} do not fit; give at least three runs")
    direction, share = _first(points)
    if not np.isfinite(share):
        raise NumericalError(f"all {len(points)} profiles are the same, so they have no principal component")
    along = points @ direction
    sign = np.sign((along - along.mean()) @ (em - em.mean())) or 1.0
    drawn = [_first(points[rows])[1] for rows in bootstrap(len(points), draws=draws, seed=seed)]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return Component(direction * sign, share, float(low), float(high), len(points))


def left_out_cosines(profiles: ArrayLike, groups: Sequence[str]) -> dict[str, float]:
    """|cosine| between the component of all runs and that without one group (a perturbation, or a model) at a time.

    Raises:
        InputError: fewer than two groups, or one group without which fewer than three runs are left.
    """
    points, names = np.asarray(profiles, dtype=np.float64), np.asarray(groups)
    kinds = list(dict.fromkeys(groups))
    if len(kinds) < 2 or any((names != kind).sum() < 3 for kind in kinds):
        raise InputError("a component needs at least two groups, and three runs when any one of them is left out")
    whole = _first(points)[0]
    return {kind: float(abs(whole @ _first(points[names != kind])[0])) for kind in kinds}


def remove(profiles: ArrayLike, direction: ArrayLike) -> Array:
    """Profiles (n, k) without their part along a unit direction (k,)."""
    points, unit = np.asarray(profiles, dtype=np.float64), np.asarray(direction, dtype=np.float64)
    return np.asarray(points - np.outer(points @ unit, unit))


def danger_correlation(
    profiles: ArrayLike, rates: ArrayLike, *, draws: int = 2000, seed: int = 0
) -> tuple[Correlation, ...]:
    """How each trait's drift goes with the EM rate over runs, raw and with the first component removed.

    The paper asks whether the drift of a trait goes with the behavior of that trait (on/off ratio 1.03, and 0.74
    without the component). The organism's judge gives one number, the EM rate, so the question here is whether a trait
    says anything about it beyond the common component.

    Raises:
        InputError: see `component`.
    """
    points, em = np.asarray(profiles, dtype=np.float64), np.asarray(rates, dtype=np.float64)
    axis = component(points, em, draws=1).direction
    rest = remove(points, axis)
    rows = bootstrap(len(points), draws=draws, seed=seed)
    found = []
    for trait in range(points.shape[1]):
        numbers: list[float] = []
        for values in (points[:, trait], rest[:, trait]):
            drawn = [_pearson(values[row], em[row]) for row in rows]
            numbers += [_pearson(values, em), *(float(v) for v in np.nanpercentile(drawn, [2.5, 97.5]))]
        found.append(Correlation(*numbers))
    return tuple(found)


def _first(points: Array) -> tuple[Array, float]:
    """Unit first axis of centred points, and its share of the variance (NaN without variance)."""
    _, singular, rows = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)
    total = float((singular**2).sum())
    return rows[0], float(singular[0] ** 2 / total) if total > 0 else float("nan")


def _pearson(x: Array, y: Array) -> float:
    a, b = x - x.mean(), y - y.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 0 else float("nan")
