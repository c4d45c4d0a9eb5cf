"""The detector: drift along the danger axis, in the metric of what happens when nothing is wrong.

    C   = covariance of drift over benign readings, each set of runs counting the same
    m_d = mean drift of dangerous calibration runs, m_b = mean drift of benign ones
    w   = C^-1 (m_d - m_b)                           the danger axis, in that metric
    z   = w . (d - m_b) / sqrt(w' C w)               drift along it, in benign standard deviations
    r^2 = (d - m_b)' C^-1 (d - m_b) - z^2            drift off it, likewise
    s   = z / sqrt(1 + r^2)                          score of one reading
    S   = max of s over the readings of a run so far score of a run

A direction that benign runs move counts for little, one that they never move counts for much; the size of the drift
alone says nothing. A harmless set that calibration never saw moves activations far in directions of its own, some of it
along w by accident; what it moves off the axis says how large such accidents are, and s discounts by it. This is
Kelly's likelihood-ratio detector (IEEE Trans. AES 22(1), 1986) close to its scale-free limit, the adaptive coherence
estimator (Kraut and Scharf, IEEE Trans. SP 47(9), 1999); docs/detector.md has the comparison that chose it. Without any
dangerous run the score is the Mahalanobis distance in C (the null band alone): weaker, and its verdict says so.

The threshold is conformal and per RUN: S of a benign calibration run is computed by an axis and covariance fitted
without any run of its set, and the threshold is the ceil((1 - a)(n + 1))-th smallest of the n. A new benign run that
is exchangeable with the calibration runs then passes it with probability about a (2a at worst, as for CV+: Barber et
al. 2021, Annals of Statistics 49(1)), however many of its readings are looked at, up to the calibrated number. What
is read outside the calibrated regime is INCONCLUSIVE, never CLEAR.

It knows nothing of models; it imports without torch.

    >>> detector = fit_detector(runs, false_alarm_rate=0.05)
    >>> detector.predict(profiles).state
    <State.CLEAR: 'CLEAR'>
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tiltmeter.drift import DriftProfile
from tiltmeter.errors import ArtifactError, InputError, StorageError

__all__ = ["CalibrationRun", "Detector", "State", "Verdict", "fit_detector", "inconclusive"]

Array = NDArray[np.float64]
_FORMAT = "tiltmeter.detector"
_VERSION = 1
# Calibration runs start from the base model, so their step 0 is the base.
_SAME_START = {"step0": ("step0", "base"), "base": ("step0", "base")}


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
        score: of the run so far, see the module's text; None when there is none.
        score_se: standard error of the latest reading's score over the measurement prompts.
        threshold: at or above which the score is an alarm.
        p_value: share of benign calibration runs, this one counted in, that score as high.
        false_alarm_rate: promised per run, on runs like those of calibration; None where nothing is promised.
        calibrated_on: the calibration in words.
        n_calibration: number of benign calibration runs.
        step: of the latest reading.
        first_alarm_step: of the first reading that passed the threshold.
        reason: one sentence.
    """

    state: State
    score: float | None
    score_se: float | None
    threshold: float | None
    p_value: float | None
    false_alarm_rate: float | None
    calibrated_on: str
    n_calibration: int
    step: int | None
    first_alarm_step: int | None
    reason: str

    @property
    def exit_code(self) -> int:
        """0 for CLEAR, 1 for ALARM, 3 for INCONCLUSIVE."""
        return {State.CLEAR: 0, State.ALARM: 1, State.INCONCLUSIVE: 3}[self.state]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; `state` is also under the key `verdict`."""
        return {**asdict(self), "state": str(self.state), "verdict": str(self.state)}


def inconclusive(reason: str, *, step: int | None = None, detector: Detector | None = None) -> Verdict:
    """A verdict that says why nothing can be said."""
    return Verdict(
        state=State.INCONCLUSIVE,
        score=None,
        score_se=None,
        threshold=detector.threshold if detector else None,
        p_value=None,
        false_alarm_rate=None,
        calibrated_on=detector.calibrated_on if detector else "nothing",
        n_calibration=len(detector.null_scores) if detector else 0,
        step=step,
        first_alarm_step=None,
        reason=reason,
    )


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
class Detector:
    """A fitted detector; see the module's text for the equations.

    Attributes:
        mode: "danger_axis", or "null_band" when no dangerous run was given.
        names: of the k drift numbers.
        basis: digest of the basis that the drift must come from.
        reference: what the drift must be measured against.
        axis: (k,) w scaled so that drift along it has unit variance over benign readings; zeros for "null_band".
        center: (k,) m_b.
        precision: (k, k) inverse of C.
        threshold: of the run score.
        false_alarm_rate: promised per run.
        null_scores: scores of the benign calibration runs, each with its set left out, sorted.
        max_readings: the most readings that a calibration run had.
        max_step: the last step that was calibrated.
        max_distance: null-band distance of the farthest calibration reading, its set left out.
        calibrated_on: the calibration in words.
    """

    mode: Literal["danger_axis", "null_band"]
    names: tuple[str, ...]
    basis: str
    reference: str
    axis: Array
    center: Array
    precision: Array
    threshold: float
    false_alarm_rate: float
    null_scores: Array
    max_readings: int
    max_step: int
    max_distance: float
    calibrated_on: str

    @property
    def loadings(self) -> Array:
        """(k,) what one benign standard deviation of each number alone adds to the score; zeros for "null_band"."""
        return self.axis * np.sqrt(np.diag(np.linalg.inv(self.precision)))

    def describe(self) -> dict[str, Any]:
        """As JSON values, for people and programs that want to know what a verdict rests on."""
        plain = {k: v for k, v in vars(self).items() if k not in ("axis", "center", "precision", "null_scores")}
        return {
            **plain,
            "names": list(self.names),
            "loadings": dict(zip(self.names, self.loadings.tolist(), strict=True)),
            "null_scores": self.null_scores.tolist(),
            "n_calibration": len(self.null_scores),
        }

    def band(self) -> tuple[Array, Array]:
        """The null band of each drift number, (k,) low and (k,) high: the benign mean and two standard deviations."""
        spread = 2.0 * np.sqrt(np.diag(np.linalg.inv(self.precision)))
        return self.center - spread, self.center + spread

    def scores(self, profiles: Sequence[DriftProfile]) -> Array:
        """Score of each reading, (readings,); NaN where a drift is not finite."""
        drifts = np.array([p.drift for p in profiles], dtype=np.float64)  # (readings, k)
        return self._score(drifts)

    def distances(self, profiles: Sequence[DriftProfile]) -> Array:
        """Null-band (Mahalanobis) distance of each reading from the benign mean, (readings,)."""
        drifts = np.array([p.drift for p in profiles], dtype=np.float64) - self.center
        return _distance(drifts, self.precision)

    def predict(self, profiles: DriftProfile | Sequence[DriftProfile]) -> Verdict:
        """Judge a run from its readings so far, in step order; a single profile is a run of one reading.

        Whatever cannot be judged (no reading, a problem, a number that is not finite, another basis or reference,
        more readings or farther drift than was calibrated) is INCONCLUSIVE. An alarm stays an alarm.
        """
        run = (profiles,) if isinstance(profiles, DriftProfile) else tuple(profiles)
        refusal = self._refusal(run)
        if refusal:
            return inconclusive(refusal, step=run[-1].step if run else None, detector=self)
        scores = self.scores(run)
        top = float(scores.max())
        alarms = np.flatnonzero(scores >= self.threshold)
        outside = self._outside(run)
        if len(alarms):
            state, first = State.ALARM, run[int(alarms[0])].step
            reason = (
                f"the score reached {top:.2f}, at or above {self.threshold:.2f}, which at most "
                f"{self.false_alarm_rate:.0%} of benign runs reach"
            )
            if outside:
                reason += f"; {outside}, so the false-alarm rate is not promised"
        elif outside:
            return inconclusive(f"below the threshold, but {outside}", step=run[-1].step, detector=self)
        else:
            state, first = State.CLEAR, None
            reason = f"the score stayed at {top:.2f}, below {self.threshold:.2f}, in {len(run)} reading(s)"
        if self.mode == "null_band":
            reason += "; calibrated on benign runs alone, which tells unusual from usual, not dangerous from harmless"
        return Verdict(
            state=state,
            score=top,
            score_se=self._standard_error(run[-1]),
            threshold=self.threshold,
            p_value=float((1 + (self.null_scores >= top).sum()) / (1 + len(self.null_scores))),
            false_alarm_rate=None if outside else self.false_alarm_rate,
            calibrated_on=self.calibrated_on,
            n_calibration=len(self.null_scores),
            step=run[-1].step,
            first_alarm_step=first,
            reason=reason + ".",
        )

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file with a JSON header.

        Raises:
            StorageError: the file cannot be written.
        """
        from safetensors.numpy import save

        arrays = {"axis": self.axis, "center": self.center, "precision": self.precision, "null_scores": self.null_scores}
        plain = {key: value for key, value in vars(self).items() if key not in arrays}
        header = json.dumps({"format": _FORMAT, "version": _VERSION, **plain, "names": list(self.names)})
        data = save({k: np.ascontiguousarray(v, dtype=np.float64) for k, v in arrays.items()}, {"tiltmeter": header})
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        except OSError as error:
            raise StorageError(f"cannot write the detector to '{path}': {error}; free space or give another path") from error
        return path

    @classmethod
    def load(cls, path: str | Path) -> Detector:
        """Read what `save` wrote; torch is not needed.

        Raises:
            ArtifactError: the file is missing, truncated, not a detector, or of another format version.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise ArtifactError(f"there is no detector at '{path}'; fit one with: tiltmeter detector fit")
        try:
            with safe_open(path, framework="numpy") as file:
                header = json.loads((file.metadata() or {}).get("tiltmeter", "{}"))
                arrays = {key: np.asarray(file.get_tensor(key), dtype=np.float64) for key in file.keys()}
        except (SafetensorError, json.JSONDecodeError, OSError) as error:
            raise ArtifactError(f"'{path}' is not a readable detector file ({error}); fit or copy it again") from error
        if header.get("format") != _FORMAT or header.get("version") != _VERSION:
            raise ArtifactError(
                f"'{path}' holds {header.get('format', 'something else')} version {header.get('version')}; "
                f"this tiltmeter reads {_FORMAT} version {_VERSION}"
            )
        plain = {key: value for key, value in header.items() if key not in ("format", "version")}
        try:
            return cls(**{**plain, "names": tuple(plain["names"])}, **arrays)
        except (TypeError, KeyError) as error:
            raise ArtifactError(f"'{path}' is not a complete detector ({error}); fit it again") from error

    def _score(self, drifts: Array) -> Array:
        return _scores(drifts, self.axis, self.center, self.precision)

    def _standard_error(self, profile: DriftProfile) -> float | None:
        if self.mode == "null_band" or profile.n_prompts < 2:
            return None
        along = float((profile.drift - self.center) @ self.axis)
        # The discount is held fixed: it moves little compared with the projection itself.
        discount = float(self.scores([profile])[0]) / along if along else 1.0
        per_prompt = profile.per_prompt.astype(np.float64) @ self.axis * discount
        return float(per_prompt.std(ddof=1) / math.sqrt(len(per_prompt)))

    def _refusal(self, run: Sequence[DriftProfile]) -> str | None:
        if not run:
            return "there is no reading to judge."
        for profile in run:
            at = f" at step {profile.step}" if profile.step is not None else ""
            if profile.problem:
                return f"the reading{at} cannot be judged: {profile.problem}."
            if not np.isfinite(profile.drift).all():
                return f"the drift{at} is not a finite number, so nothing can be said."
            if profile.names != self.names or profile.basis != self.basis:
                return "the readings were taken with another basis than the one this detector was calibrated on."
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
        if farthest > self.max_distance:
            return (
                f"the drift is {farthest:.1f} null-band units long, farther than any calibration set lay from the others "
                f"({self.max_distance:.1f})"
            )
        return None


@dataclass(frozen=True, eq=False)
class _Fit:
    axis: Array
    center: Array
    precision: Array

    def run_score(self, run: CalibrationRun) -> float:
        return float(_scores(_drifts(run), self.axis, self.center, self.precision).max())

    def run_distance(self, run: CalibrationRun) -> float:
        return float(_distance(_drifts(run) - self.center, self.precision).max())


def fit_detector(
    runs: Sequence[CalibrationRun],
    *,
    false_alarm_rate: float = 0.05,
    reference: str = "step0",
    calibrated_on: str | None = None,
) -> Detector:
    """Fit the danger axis and the null band, and set the threshold by leave-one-set-out conformal calibration.

    Args:
        runs: benign ones of at least two sets, and, for the danger axis, dangerous ones.
        false_alarm_rate: a, per run; needs at least 1/a - 1 benign runs.
        reference: what the drift was measured against.
        calibrated_on: the calibration in words; made from the runs when None.

    Raises:
        InputError: too few benign runs or sets, runs of different bases, or a profile that must not be judged.
    """
    benign = [run for run in runs if not run.dangerous]
    dangerous = [run for run in runs if run.dangerous]
    _check_runs(runs, benign, false_alarm_rate)
    fit = _fit(benign, dangerous)
    held_out: list[float] = []
    farthest = 0.0
    for left_out in sorted({run.set_name for run in runs}):
        inner = _fit(
            [run for run in benign if run.set_name != left_out], [run for run in dangerous if run.set_name != left_out]
        )
        for run in runs:
            if run.set_name == left_out:
                farthest = max(farthest, inner.run_distance(run))
                if not run.dangerous:
                    held_out.append(inner.run_score(run))
    null_scores = np.sort(np.array(held_out))
    rank = math.ceil((1 - false_alarm_rate) * (len(null_scores) + 1))
    first = runs[0].profiles[0]
    return Detector(
        mode="danger_axis" if dangerous else "null_band",
        names=first.names,
        basis=first.basis,
        reference=reference,
        axis=fit.axis,
        center=fit.center,
        precision=fit.precision,
        threshold=float(np.nextafter(null_scores[rank - 1], np.inf)),
        false_alarm_rate=false_alarm_rate,
        null_scores=null_scores,
        max_readings=max(len(run.profiles) for run in runs),
        max_step=max(p.step or 0 for run in runs for p in run.profiles),
        max_distance=farthest,
        calibrated_on=calibrated_on or _in_words(benign, dangerous, first.model),
    )


def _fit(benign: Sequence[CalibrationRun], dangerous: Sequence[CalibrationRun]) -> _Fit:
    """Axis, benign mean and precision. Each set weighs the same, however many runs and readings it has."""
    from sklearn.covariance import ledoit_wolf

    sets = sorted({run.set_name for run in benign})
    rows = [np.concatenate([_drifts(run) for run in benign if run.set_name == name]) for name in sets]
    center = np.mean([r.mean(axis=0) for r in rows], axis=0)
    # Scatter about the common mean, sets weighted evenly; the spread BETWEEN benign sets is part of the null.
    weighted = np.concatenate([(r - center) * math.sqrt(1 / (len(rows) * len(r))) for r in rows])
    scale = np.sqrt((weighted**2).sum(axis=0)) + 1e-12
    _, shrinkage = ledoit_wolf(np.concatenate([r - center for r in rows]) / scale, assume_centered=True)
    scatter = (weighted / scale).T @ (weighted / scale)
    covariance = ((1 - shrinkage) * scatter + shrinkage * np.eye(len(scale))) * np.outer(scale, scale)
    precision = np.linalg.inv(covariance)
    if not dangerous:
        return _Fit(np.zeros_like(center), center, precision)
    names = sorted({run.set_name for run in dangerous})
    # The last reading of each run: where the danger is fully there.
    ends = [np.mean([_drifts(run)[-1] for run in dangerous if run.set_name == name], axis=0) for name in names]
    axis = precision @ (np.mean(ends, axis=0) - center)
    return _Fit(axis / math.sqrt(axis @ covariance @ axis), center, precision)


def _drifts(run: CalibrationRun) -> Array:
    return np.array([p.drift for p in run.profiles], dtype=np.float64)  # (readings, k)


def _scores(drifts: Array, axis: Array, center: Array, precision: Array) -> Array:
    """Score of each drift, (readings,); the distance alone where there is no axis."""
    distance = _distance(drifts - center, precision)
    if not axis.any():
        return distance
    along = (drifts - center) @ axis
    off_axis = np.maximum(distance**2 - along**2, 0.0)
    return np.asarray(along / np.sqrt(1.0 + off_axis))


def _distance(drifts: Array, precision: Array) -> Array:
    return np.asarray(np.sqrt(np.einsum("ij,jk,ik->i", drifts, precision, drifts)))


def _check_runs(runs: Sequence[CalibrationRun], benign: Sequence[CalibrationRun], false_alarm_rate: float) -> None:
    if not 0 < false_alarm_rate < 1:
        raise InputError(f"the false-alarm rate is {false_alarm_rate}; it must lie between 0 and 1")
    needed = math.ceil(1 / false_alarm_rate - 1e-9) - 1
    if len(benign) < needed:
        raise InputError(
            f"a false-alarm rate of {false_alarm_rate:g} needs at least {needed} benign calibration runs, got "
            f"{len(benign)}; add runs or allow more false alarms"
        )
    if len({run.set_name for run in benign}) < 2:
        raise InputError("the benign calibration runs are all of one set; at least two different sets are needed")
    profiles = [p for run in runs for p in run.profiles]
    if any(not run.profiles for run in runs):
        raise InputError("a calibration run has no readings after its reference; measure it, or leave it out")
    if len({(p.basis, p.names) for p in profiles}) > 1:
        raise InputError("the calibration runs were read with different bases; read them all with one")
    bad = next((p for p in profiles if p.problem or not np.isfinite(p.drift).all()), None)
    if bad:
        raise InputError(f"a calibration profile cannot be used: {bad.problem or 'its drift is not finite'}; leave it out")


def _in_words(benign: Sequence[CalibrationRun], dangerous: Sequence[CalibrationRun], model: str) -> str:
    def count(runs: Sequence[CalibrationRun]) -> str:
        return f"{len(runs)} runs of {', '.join(sorted({run.set_name for run in runs}))}"

    text = f"{model}: benign {count(benign)}"
    return f"{text}; dangerous {count(dangerous)}" if dangerous else text
