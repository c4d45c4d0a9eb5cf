"""The detector: drift along the danger axis, in the metric of what happens when nothing is wrong.

    x   = the shift of the mean activation, (hidden,), or the k drift numbers where readings keep no activation
    C   = covariance of x over benign readings (each set of runs counting the same) + f^2 I
    m_d = mean x of dangerous calibration runs, m_b = mean x of benign ones
    w   = C^-1 (m_d - m_b)                           the danger axis, in that metric
    z   = w . (x - m_b) / sqrt(w' C w)               drift along it, in benign standard deviations
    r^2 = (x - m_b)' C^-1 (x - m_b) - z^2            drift off it, likewise
    s   = z / sqrt(1 + r^2)                          score of one reading
    S   = max of s over the readings of a run so far score of a run

f is the standard error of a reading along a unit direction: no benign spread is believed to be smaller than what the
choice of prompts alone does. A direction that benign runs move counts for little, one that they never move counts for
much; the size of the drift alone says nothing. A harmless set that calibration never saw moves activations far in
directions of its own, some of it along w by accident; what it moves off the axis says how large such accidents are, and
s discounts by it. This is Kelly's likelihood-ratio detector (IEEE Trans. AES 22(1), 1986) close to its scale-free
limit, the adaptive coherence estimator (Kraut and Scharf, IEEE Trans. SP 47(9), 1999); docs/log.md has the comparison
on calibration runs that chose it. Without any dangerous run the score is the Mahalanobis distance in C (the null band
alone): weaker, and its verdict says so. Or m_d - m_b is given as a direction that needs no fine-tuned model
(`tiltmeter.context`).

The threshold is conformal, per RUN and for a NEW set. S of a benign calibration run is computed by an axis and
covariance fitted without any run of its set. Runs of one set resemble each other, so sets are what counts: with K
benign sets, each run of a set of n weighs 1 / ((K + 1) n), and the threshold is the smallest score with weight 1 - a at
or below it (Lee, Barber and Willett 2023, arXiv 2306.06342). A run on a benign set that is exchangeable with the
calibration sets then passes it with probability about a (2a at worst, as for CV+: Barber et al. 2021, Annals of
Statistics 49(1)), however many of its readings are looked at, up to the calibrated number. K sets can promise no less
than 1 / (K + 1): asked for less, the detector takes the largest score and states that rate. What is read outside the
calibrated regime is INCONCLUSIVE, never CLEAR.

It knows nothing of models; it imports without torch.

    >>> detector = fit_detector(runs, false_alarm_rate=0.05)
    >>> detector.predict(profiles).state
    <State.CLEAR: 'CLEAR'>
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tiltmeter import sound
from tiltmeter.artifacts import made, read_artifact, write_artifact
from tiltmeter.drift import DriftProfile
from tiltmeter.errors import InputError
from tiltmeter.verdicts import State, Verdict, check_conformal, decide, inconclusive, set_threshold, weigh_sets

__all__ = [
    "CalibrationRun",
    "Detector",
    "Metric",
    "State",
    "Verdict",
    "fit_detector",
    "fit_metric",
    "inconclusive",
    "set_threshold",
    "weigh_sets",
]

Array = NDArray[np.float64]
_FORMAT = 3
_ARRAYS = ("axis", "trait_axis", "band", "null_scores", "null_weights")
_METRIC = ("center", "directions", "spread")
_NEGLIGIBLE = 0.01  # benign spread below this share of the floor changes nothing and is not kept
_HUGE = 1e100  # a spread whose square is a number
_SMALLEST_FLOOR = 1e-4  # of drift, where readings rest on prompts that all moved alike
# Calibration runs start from the base model, so their step 0 is the base.
_SAME_START = {"step0": ("step0", "base"), "base": ("step0", "base")}


@dataclass(frozen=True, eq=False)
class CalibrationRun:
    """One fine-tuning run whose outcome is known.

    Attributes:
        set_name: what it was fine-tuned on; runs of one set are left out together.
        seed: of the run.
        dangerous: whether behavior at its end was misaligned (EM rate above 5 %).
        profiles: drift at each reading after the reference, in step order.
    """

    set_name: str
    seed: int
    dangerous: bool
    profiles: tuple[DriftProfile, ...]


@dataclass(frozen=True, eq=False)
class Metric:
    """What benign runs do: their mean, the directions that they move, and how far.

    The covariance is diag(spread^2) in the orthonormal `directions`, plus floor^2 in all. Kept as factors, since a
    covariance of thousands of activations would not fit a file.

    Attributes:
        center: (dim,) m_b.
        directions: (rank, dim) orthonormal rows.
        spread: (rank,) benign standard deviation along each, the floor left out.
        floor: f; 0 in a metric that nothing is measured with.

    Raises:
        InputError: a number that is not finite, shapes that do not agree, directions that are not orthonormal, or a
            spread or floor below 0.
    """

    center: Array
    directions: Array
    spread: Array
    floor: float

    def __post_init__(self) -> None:
        sound.array("center", self.center, (None,))
        sound.array("directions", self.directions, (None, len(self.center)))
        sound.array("spread", self.spread, (len(self.directions),), least=0)
        sound.number("floor", self.floor, least=0, most=_HUGE)
        sound.number("the largest spread", max([0.0, *self.spread.tolist()]), most=_HUGE)
        sound.orthonormal("directions", self.directions)

    def whiten(self, points: Array) -> Array:
        """C^-1 (x - m_b) for points (n, dim)."""
        centred = points - self.center
        share = self.spread**2 / (self.spread**2 + self.floor**2)
        return np.asarray((centred - (centred @ self.directions.T * share) @ self.directions) / self.floor**2)

    def standardise(self, points: Array) -> Array:
        """C^-1/2 (x - m_b) for points (n, dim): benign readings have unit variance in every direction."""
        centred = points - self.center
        share = 1.0 - self.floor / np.sqrt(self.spread**2 + self.floor**2)
        return np.asarray((centred - (centred @ self.directions.T * share) @ self.directions) / self.floor)

    def distance(self, points: Array) -> Array:
        """Mahalanobis distance of points (n, dim) from the benign mean, (n,)."""
        with np.errstate(all="ignore"):
            return np.asarray(np.sqrt(np.maximum(((points - self.center) * self.whiten(points)).sum(axis=1), 0.0)))

    def toward(self, shift: Array) -> Array:
        """The axis (dim,) of a danger that lies at the benign mean plus `shift` (dim,): C^-1 shift, scaled so that
        drift along it has unit variance."""
        axis = self.whiten((self.center + shift)[None])[0]
        return np.asarray(axis / math.sqrt(axis @ self.apply(axis)))

    def apply(self, vector: Array) -> Array:
        """C v, (dim,)."""
        return np.asarray((self.directions @ vector * self.spread**2) @ self.directions + self.floor**2 * vector)

    def score(self, points: Array, axis: Array) -> Array:
        """s of points (n, dim); the distance alone where the axis is all zero."""
        with np.errstate(all="ignore"):  # what overflows is no number, and no verdict rests on it
            distance = self.distance(points)
            if not axis.any():
                return distance
            along = (points - self.center) @ axis
            return np.asarray(along / np.sqrt(1.0 + np.maximum(distance**2 - along**2, 0.0)))


@dataclass(frozen=True, eq=False)
class Detector:
    """A fitted detector; see the module's text for the equations.

    Attributes:
        mode: "danger_axis", or "null_band" when no dangerous run was given.
        space: what x is: "activations" or "drift".
        names: of the k drift numbers.
        basis: digest of the basis that the drift must come from.
        reference: what the drift must be measured against.
        metric: what benign runs do.
        axis: (dim,) w scaled so that drift along it has unit variance over benign readings; zeros for "null_band".
        trait_axis: (k,) mean drift numbers of dangerous runs less those of benign ones, for people to look at.
        band: (k, 2) benign mean of each drift number, less and plus two standard deviations, for people to look at.
        threshold: of the run score.
        false_alarm_rate: promised for a run on a new set; at least 1 / (K + 1) with K benign sets.
        null_scores: scores of the benign calibration runs, each with its set left out, sorted.
        null_weights: their weights, see the module's text; they add up to K / (K + 1).
        max_readings: the most readings that a calibration run had.
        max_step: the last step that was calibrated.
        max_distance: null-band distance of the farthest calibration reading, its set left out.
        calibrated_on: the calibration in words.

    Raises:
        InputError: a field is of another type, not finite or outside its range, shapes do not agree, the axis does not
            have unit variance in the metric, or the threshold is not the one that the calibration scores give.
    """

    mode: Literal["danger_axis", "null_band"]
    space: Literal["activations", "drift"]
    names: tuple[str, ...]
    basis: str
    reference: str
    metric: Metric
    axis: Array
    trait_axis: Array
    band: Array
    threshold: float
    false_alarm_rate: float
    null_scores: Array
    null_weights: Array
    max_readings: int
    max_step: int
    max_distance: float
    calibrated_on: str

    def __post_init__(self) -> None:
        sound.choice("mode", self.mode, ("danger_axis", "null_band"))
        sound.choice("space", self.space, ("activations", "drift"))
        sound.texts("names", self.names)
        for what in ("basis", "reference", "calibrated_on"):
            sound.text(what, getattr(self, what))
        k, dim = len(self.names), len(self.metric.center)
        sound.number("floor", self.metric.floor, above=0)
        sound.array("axis", self.axis, (k if self.space == "drift" else dim,))
        sound.array("center", self.metric.center, (len(self.axis),))
        sound.array("trait_axis", self.trait_axis, (k,))
        sound.array("band", self.band, (k, 2))
        if (self.band[:, 0] > self.band[:, 1]).any():
            raise InputError("band has a lower end above its upper one")
        for what in ("max_readings", "max_step"):
            sound.whole(what, getattr(self, what), least=int(what == "max_readings"))
        sound.number("max_distance", self.max_distance, above=0)
        check_conformal(self)
        with np.errstate(all="ignore"):  # what overflows is no unit variance
            variance = float(self.axis @ self.metric.apply(self.axis))
        if not math.isclose(variance, float(self.mode == "danger_axis"), rel_tol=1e-6):
            raise InputError(
                f"drift along axis has variance {variance:.6g} over benign readings; it must be 1 in mode danger_axis, "
                f"and the axis zero in mode null_band (this is {self.mode})"
            )

    def describe(self) -> dict[str, Any]:
        """As JSON values, for people and programs that want to know what a verdict rests on."""
        return {
            **self._plain(),
            "trait_axis": dict(zip(self.names, self.trait_axis.tolist(), strict=True)),
            "band": dict(zip(self.names, self.band.tolist(), strict=True)),
            "null_scores": self.null_scores.tolist(),
            "null_weights": self.null_weights.tolist(),
            "n_calibration": len(self.null_scores),
            "benign_directions": len(self.metric.spread),
            "floor": self.metric.floor,
        }

    def scores(self, profiles: Sequence[DriftProfile]) -> Array:
        """Score of each reading, (readings,); NaN where a drift is not finite."""
        return self.metric.score(_points(profiles, self.space), self.axis)

    def distances(self, profiles: Sequence[DriftProfile]) -> Array:
        """Null-band (Mahalanobis) distance of each reading from the benign mean, (readings,)."""
        return self.metric.distance(_points(profiles, self.space))

    def predict(self, profiles: DriftProfile | Sequence[DriftProfile]) -> Verdict:
        """Judge a run from its readings so far, in step order; a single profile is a run of one reading.

        Whatever cannot be judged (no reading, a problem, a number that is not finite, another basis or reference,
        more readings or farther drift than was calibrated) is INCONCLUSIVE. An alarm stays an alarm.
        """
        run = (profiles,) if isinstance(profiles, DriftProfile) else tuple(profiles)
        refusal = self._refusal(run)
        if refusal:
            return inconclusive(refusal, step=getattr(run[-1], "step", None) if run else None, detector=self)
        note = ""
        if self.mode == "null_band":
            note = "; calibrated on benign runs alone, which tells unusual from usual, not dangerous from harmless"
        return decide(
            self,
            self.scores(run),
            [profile.step for profile in run],
            calibrated_on=self.calibrated_on,
            outside=self._outside(run),
            note=note,
        )

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file with a JSON header.

        Raises:
            InputError: the basis is not named by its digest.
            StorageError: the file cannot be written.
        """
        sound.digest("basis", self.basis)
        arrays = {key: getattr(self, key) for key in _ARRAYS} | {key: getattr(self.metric, key) for key in _METRIC}
        return write_artifact(path, "detector", _FORMAT, {**self._plain(), "floor": self.metric.floor}, arrays)

    @classmethod
    def load(cls, path: str | Path) -> Detector:
        """Read what `save` wrote; torch is not needed.

        Raises:
            ArtifactError: the file is missing, truncated, changed, not a detector, of another format version, or
                holds what no detector can have.
        """
        remedy = "fit one with: tiltmeter detector fit"
        header, arrays = read_artifact(path, "detector", _FORMAT, remedy=remedy)

        def make() -> Detector:
            sound.digest("basis", header["basis"])
            metric = Metric(**{key: arrays.pop(key) for key in _METRIC}, floor=header.pop("floor"))
            fields: dict[str, Any] = {**header, **arrays, "names": tuple(header["names"]), "metric": metric}
            return cls(**fields)

        return made(path, "detector", remedy, make)

    def _plain(self) -> dict[str, Any]:
        """All that is neither an array nor the metric."""
        return {k: list(v) if k == "names" else v for k, v in vars(self).items() if k not in (*_ARRAYS, "metric")}

    def _refusal(self, run: Sequence[DriftProfile]) -> str | None:
        if not run:
            return "there is no reading to judge."
        for profile in run:
            if not isinstance(profile, DriftProfile):
                return f"a {type(profile).__name__} stands where a drift profile belongs."
            at = f" at step {profile.step}" if profile.step is not None else ""
            if profile.problem:
                return f"the reading{at} cannot be judged: {profile.problem}."
            numbers = [profile.drift] if profile.shift is None else [profile.drift, profile.shift]
            if not all(isinstance(n, np.ndarray) and n.dtype.kind == "f" and np.isfinite(n).all() for n in numbers):
                return f"the drift{at} is not a finite number, so nothing can be said."
            if self.space == "activations" and profile.shift is None:
                return f"the reading{at} holds no mean activation, which this detector needs: measure it again."
            if profile.names != self.names or profile.basis != self.basis:
                return "the readings were taken with another basis than the one this detector was calibrated on."
            point = profile.shift if self.space == "activations" else profile.drift
            if profile.drift.shape != (len(self.names),) or (point is not None and point.shape != self.axis.shape):
                return f"the drift{at} has another shape than the detector's, so nothing can be said."
            if profile.reference not in _SAME_START.get(self.reference, (self.reference,)):
                return (
                    f"the drift is measured against '{profile.reference}', but this detector was calibrated on drift "
                    f"against '{self.reference}'."
                )
        return None

    def _outside(self, run: Sequence[DriftProfile]) -> str | None:
        """Why the run lies outside the calibrated regime, or None."""
        if len(run) > self.max_readings:
            return f"the run has {len(run)} readings and calibration runs had at most {self.max_readings}"
        last = max((p.step or 0) for p in run)
        if last > self.max_step:
            return f"the run has reached step {last} and calibration ended at step {self.max_step}"
        farthest = float(self.distances(run).max())
        if not farthest <= self.max_distance:
            return (
                f"the drift is {farthest:.1f} null-band units long, farther than any calibration set lay from the "
                f"others ({self.max_distance:.1f})"
            )
        return None


def fit_detector(
    runs: Sequence[CalibrationRun],
    *,
    false_alarm_rate: float = 0.05,
    reference: str = "step0",
    calibrated_on: str | None = None,
    danger: ArrayLike | None = None,
) -> Detector:
    """Fit the danger axis and the null band, and set the threshold by leave-one-set-out conformal calibration.

    Args:
        runs: benign ones of at least two sets, and, for the danger axis, dangerous ones.
        false_alarm_rate: a, per run on a new set; with fewer than 1/a - 1 benign sets the detector states a larger one.
        reference: what the drift was measured against.
        calibrated_on: the calibration in words; made from the runs when None.
        danger: (hidden,) the direction in which danger moves the mean activation, where no dangerous run is known:
            `tiltmeter.context.context_danger`. Its length does not matter.

    Raises:
        InputError: fewer than two benign sets, runs of different bases, or a profile that must not be judged; with
            `danger`, dangerous runs beside it, readings without their activation, or one of another width.
    """
    benign = [run for run in runs if not run.dangerous]
    dangerous = [run for run in runs if run.dangerous]
    _check_runs(runs, benign, false_alarm_rate)
    space: Literal["activations", "drift"] = (
        "activations" if all(p.shift is not None for run in runs for p in run.profiles) else "drift"
    )
    toward = _checked_danger(danger, runs, space, any_dangerous=bool(dangerous)) if danger is not None else None
    floor = float(np.sqrt(np.nanmean([p.se**2 for run in runs for p in run.profiles]))) or _SMALLEST_FLOOR
    points = {id(run): _points(run.profiles, space) for run in runs}
    held_out: list[tuple[str, float]] = []
    farthest = 0.0
    n_sets = len(_sets(runs, dangerous=False))
    for left_out in sorted({run.set_name for run in runs}):
        rest = [run for run in runs if run.set_name != left_out]
        metric, axis = _fit(rest, points, floor, toward)
        same_set = [run for run in runs if run.set_name == left_out]
        farthest = max([farthest, *(float(metric.distance(points[id(run)]).max()) for run in same_set)])
        harmless = [points[id(run)] for run in same_set if not run.dangerous]
        held_out += [(left_out, float(metric.score(x, axis).max())) for x in harmless]
    null_scores, null_weights = weigh_sets(held_out)
    metric, axis = _fit(runs, points, floor, toward)
    first = runs[0].profiles[0]
    traits, trait_axis = _fit(runs, {id(run): _points(run.profiles, "drift") for run in runs}, floor)
    return Detector(
        mode="danger_axis" if axis.any() else "null_band",
        space=space,
        names=first.names,
        basis=first.basis,
        reference=reference,
        metric=metric,
        axis=axis,
        trait_axis=traits.apply(trait_axis) if dangerous else trait_axis,
        band=_band(traits),
        threshold=set_threshold(null_scores, null_weights, false_alarm_rate),
        false_alarm_rate=max(false_alarm_rate, 1 / (n_sets + 1)),
        null_scores=null_scores,
        null_weights=null_weights,
        max_readings=max(len(run.profiles) for run in runs),
        max_step=max(p.step or 0 for run in runs for p in run.profiles),
        max_distance=farthest,
        calibrated_on=calibrated_on or _in_words(benign, dangerous, first.model, given=toward is not None),
    )


def _checked_danger(danger: ArrayLike, runs: Sequence[CalibrationRun], space: str, *, any_dangerous: bool) -> Array:
    """The direction that was given, (hidden,) float64."""
    if any_dangerous:
        raise InputError("dangerous runs and a danger direction were given; the axis can come from one of them only")
    if space != "activations":
        raise InputError("a danger direction needs readings that keep their mean activation; measure the runs again")
    found = np.asarray(danger, dtype=np.float64)
    width = _points(runs[0].profiles, space).shape[1]
    if found.shape != (width,) or not np.isfinite(found).all() or not found.any():
        raise InputError(
            f"the danger direction has shape {found.shape}; it needs {width} finite numbers, not all zero: take it "
            "from the same model, after the block that the basis reads"
        )
    return found


def _fit(
    runs: Sequence[CalibrationRun], points: Mapping[int, Array], floor: float, danger: Array | None = None
) -> tuple[Metric, Array]:
    """The metric of the benign runs and the danger axis. Each set weighs the same, however many runs it has."""
    metric = fit_metric([(run.set_name, points[id(run)]) for run in runs if not run.dangerous], floor)
    center = metric.center
    if danger is not None:
        return metric, metric.toward(danger)
    # The last reading of each dangerous run: where the danger is fully there.
    ends = [
        np.mean([points[id(r)][-1] for r in runs if r.set_name == name and r.dangerous], axis=0)
        for name in _sets(runs, dangerous=True)
    ]
    if not ends:
        return metric, np.zeros_like(center)
    return metric, metric.toward(np.mean(ends, axis=0) - center)


def fit_metric(benign: Sequence[tuple[str, Array]], floor: float) -> Metric:
    """What benign runs do. Each set weighs the same, however many runs it has.

    Args:
        benign: name of the set, and points (readings, dim), of each benign run.
        floor: f.
    """
    names = sorted({name for name, _ in benign})
    groups = [np.concatenate([points for other, points in benign if other == name]) for name in names]
    center = np.mean([rows.mean(axis=0) for rows in groups], axis=0)
    # Scatter about the common mean: the spread BETWEEN benign sets is part of the null.
    weighted = np.concatenate([(rows - center) / math.sqrt(len(groups) * len(rows)) for rows in groups])
    _, spread, directions = np.linalg.svd(weighted, full_matrices=False)
    kept = spread > max(_NEGLIGIBLE * floor, np.finfo(np.float64).eps * float(spread.max()))
    return Metric(center, directions[kept], spread[kept], floor)


def _sets(runs: Sequence[CalibrationRun], *, dangerous: bool) -> list[str]:
    return sorted({run.set_name for run in runs if run.dangerous == dangerous})


def _band(metric: Metric) -> Array:
    """(dim, 2) benign mean of each number, less and plus two standard deviations."""
    variance = (metric.directions**2 * metric.spread[:, None] ** 2).sum(axis=0) + metric.floor**2
    return np.stack([metric.center - 2 * np.sqrt(variance), metric.center + 2 * np.sqrt(variance)], axis=1)


def _points(profiles: Sequence[DriftProfile], space: str) -> Array:
    """x of each reading, (readings, dim)."""
    return np.array([p.shift if space == "activations" else p.drift for p in profiles], dtype=np.float64)


def _check_runs(runs: Sequence[CalibrationRun], benign: Sequence[CalibrationRun], false_alarm_rate: float) -> None:
    if not 0 < false_alarm_rate < 1:
        raise InputError(f"the false-alarm rate is {false_alarm_rate}; it must lie between 0 and 1")
    if len({run.set_name for run in benign}) < 2:
        raise InputError("the benign calibration runs are all of one set; at least two different sets are needed")
    profiles = [p for run in runs for p in run.profiles]
    if any(not run.profiles for run in runs):
        raise InputError("a calibration run has no readings after its reference; measure it, or leave it out")
    if len({(p.basis, p.names) for p in profiles}) > 1:
        raise InputError("the calibration runs were read with different bases; read them all with one")
    bad = next((p for p in profiles if p.problem or not np.isfinite(p.drift).all()), None)
    if bad:
        problem = bad.problem or "its drift is not finite"
        raise InputError(f"a calibration profile cannot be used: {problem}; leave it out")


def _in_words(benign: Sequence[CalibrationRun], dangerous: Sequence[CalibrationRun], model: str, *, given: bool) -> str:
    def count(runs: Sequence[CalibrationRun]) -> str:
        return f"{len(runs)} runs of {', '.join(sorted({run.set_name for run in runs}))}"

    text = f"{model}: benign {count(benign)}"
    if given:
        return f"{text}; danger as a direction found without dangerous runs"
    return f"{text}; dangerous {count(dangerous)}" if dangerous else text
