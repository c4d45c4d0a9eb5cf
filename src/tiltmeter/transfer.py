"""A detector that a new model needs no dangerous run for: its own benign readings, and the danger that others showed.

    x    position between the trait poles after several blocks, at relative depths: (traits x blocks); pole units make
         it the same measure in every model
    C, m covariance and mean of x over the NEW model's benign readings, each set of runs counting the same: its own
         null band
    d    the mean shift of dangerous runs against benign ones in OTHER models, each model counting the same
    w    = C^-1 d
    z    = w . (x - m) / sqrt(w' C w),    r^2 = (x - m)' C^-1 (x - m) - z^2,    s = z / sqrt(1 + r^2)
    S    = max of s over the readings of a run so far; threshold: conformal over the new model's benign sets, each
           scored by a band that saw none of its runs (`tiltmeter.detector`)

What is shared between models is a direction in the space of traits; what is each model's own is how loud every
direction is when nothing is wrong. Positions are absolute: the poles and the benign band stand still, so a run that
STARTS misaligned is seen without any reference, where drift from its own step 0 shows nothing (arXiv 2606.07631,
limits: warm start).

A verdict says how sure it is. The score's interval comes from the prompts (`interval`), and a reading that lies farther
off the axis than any benign or dangerous calibration run is outside the calibrated regime: INCONCLUSIVE unless it
alarms, never CLEAR. Imports without torch; knows nothing of models.

    >>> danger = fit_danger([model_a_runs, model_b_runs])
    >>> detector = fit_transfer(danger, benign_runs_of_c)
    >>> detector.predict(positions, steps=steps).state
    <State.CLEAR: 'CLEAR'>
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tiltmeter import sound
from tiltmeter.artifacts import made, read_artifact, write_artifact
from tiltmeter.detector import Metric, fit_metric
from tiltmeter.errors import InputError
from tiltmeter.verdicts import State, Verdict, check_conformal, decide, set_threshold, weigh_sets

__all__ = ["Danger", "PositionRun", "TransferDetector", "band_of", "fit_danger", "fit_transfer"]

Array = NDArray[np.float64]
_KIND, _FORMAT = "transfer detector", 2
FLOOR = 0.1
"""No direction is believed to be quieter than this share of the root mean square benign spread."""


class PositionRun(NamedTuple):
    """One run of one model, as positions.

    Attributes:
        set_name: what it was fine-tuned on; runs of one set are left out together.
        dangerous: whether its behavior ended misaligned.
        positions: (readings, d).
    """

    set_name: str
    dangerous: bool
    positions: Array


def band_of(benign: Sequence[tuple[str, Array]], *, floor: float = FLOOR) -> Metric:
    """The metric of benign readings, with a floor in units of their own spread.

    Args:
        benign: name of the set, and values (readings, d), of each benign run.
        floor: share of the root mean square spread over directions.

    Raises:
        InputError: there is no run, or the benign readings are all the same.
    """
    if not benign:
        raise InputError("a null band needs benign runs, and there are none; add harmless calibration sets")
    bare = fit_metric(benign, 0.0)
    size = float(np.sqrt((bare.spread**2).sum() / len(bare.center))) if len(bare.spread) else 0.0
    if not size > 0:
        raise InputError("all benign readings are the same, so they say nothing about what is normal; add runs")
    return Metric(bare.center, bare.directions, bare.spread, floor * size)


@dataclass(frozen=True, eq=False)
class Danger:
    """What fine-tuning that went bad did, in pole units.

    Attributes:
        direction: (d,) unit.
        sources: the models that it was learnt from.
        agreement: mean cosine between the models' own directions; NaN for one model.

    Raises:
        InputError: a direction that is no finite unit vector, no source, or an agreement that is no cosine.
    """

    direction: Array
    sources: tuple[str, ...]
    agreement: float

    def __post_init__(self) -> None:
        sound.array("direction", self.direction, (None,))
        sound.number("the length of the direction", np.linalg.norm(self.direction), least=1 - 1e-6, most=1 + 1e-6)
        sound.texts("sources", tuple(dict.fromkeys(self.sources)))
        if self.agreement == self.agreement:  # NaN: of one model
            sound.number("agreement", self.agreement, least=-1 - 1e-9, most=1 + 1e-9)


def fit_danger(models: Sequence[tuple[str, Sequence[PositionRun]]]) -> Danger:
    """The shared danger direction: per model, the mean end of dangerous sets less that of benign sets, unit; averaged.

    Args:
        models: name and runs of each source model.

    Raises:
        InputError: no model, or a model without dangerous or without benign runs.
    """
    rows = []
    for name, runs in models:
        ends = {
            kind: [
                np.mean([r.positions[-1] for r in runs if r.dangerous == kind and r.set_name == s], axis=0)
                for s in sorted({r.set_name for r in runs if r.dangerous == kind})
            ]
            for kind in (True, False)
        }
        if not ends[True] or not ends[False]:
            raise InputError(f"the runs of {name} are all of one kind; a danger direction needs both")
        shift = np.mean(ends[True], axis=0) - np.mean(ends[False], axis=0)
        rows.append(shift / np.linalg.norm(shift))
    if not rows:
        raise InputError("a danger direction needs at least one model with dangerous and benign runs")
    stacked = np.stack(rows)
    cosines = (stacked @ stacked.T)[np.triu_indices(len(rows), 1)]
    mean = stacked.mean(axis=0)
    agreement = float(cosines.mean()) if len(cosines) else float("nan")
    return Danger(mean / np.linalg.norm(mean), tuple(name for name, _ in models), agreement)


@dataclass(frozen=True, eq=False)
class TransferDetector:
    """See the module's text.

    Attributes:
        danger: learnt elsewhere.
        band: of this model's benign readings.
        threshold: a run whose score reaches it alarms.
        false_alarm_rate: promised for a run on a new benign set; at least 1 / (K + 1) with K benign sets.
        null_scores: of the benign calibration runs, each with its set left out, sorted.
        null_weights: their weights, see `tiltmeter.detector`.
        farthest: largest distance off the axis of a benign calibration run, its set left out.
        max_readings: the most readings of a calibration run.

    Raises:
        InputError: a field is of another type, not finite or outside its range, shapes do not agree, or the threshold
            is not the one that the calibration scores give.
    """

    danger: Danger
    band: Metric
    threshold: float
    false_alarm_rate: float
    null_scores: Array
    null_weights: Array
    farthest: float
    max_readings: int

    def __post_init__(self) -> None:
        sound.array("center", self.band.center, (len(self.danger.direction),))
        # A louder floor than the benign readings themselves would drown every direction.
        size = float(np.sqrt((self.band.spread**2).sum() / len(self.band.center)))
        sound.number("floor", self.band.floor, above=0, most=size * (1 + 1e-9))
        sound.number("farthest", self.farthest, least=0)
        sound.whole("max_readings", self.max_readings, least=1)
        check_conformal(self)

    def along(self, positions: ArrayLike) -> tuple[Array, Array]:
        """z and r of each reading (readings, d): how far along the danger axis and off it, in benign deviations."""
        points = np.asarray(positions, dtype=np.float64)
        z = (points - self.band.center) @ self.band.toward(self.danger.direction)
        return z, np.sqrt(np.maximum(self.band.distance(points) ** 2 - z**2, 0.0))

    def scores(self, positions: ArrayLike) -> Array:
        """s of each reading (readings, d)."""
        points = np.asarray(positions, dtype=np.float64)
        return self.band.score(points, self.band.toward(self.danger.direction))

    def interval(self, prompts: ArrayLike, *, draws: int = 500, seed: int = 0) -> tuple[float, float]:
        """95 % bootstrap interval of one reading's score over the measurement prompts.

        Args:
            prompts: (prompts, d) positions of single prompts.
            draws: of the bootstrap.
            seed: of the bootstrap.
        """
        points = np.asarray(prompts, dtype=np.float64)
        rows = np.random.default_rng(seed).integers(0, len(points), size=(draws, len(points)))
        low, high = np.percentile(self.scores(points[rows].mean(axis=1)), [2.5, 97.5])
        return float(low), float(high)

    def predict(
        self, positions: ArrayLike, *, steps: ArrayLike | None = None, prompts: ArrayLike | None = None
    ) -> Verdict:
        """Judge a run from its readings so far; a misaligned start may be its first reading.

        Args:
            positions: (readings, d).
            steps: (readings,) for the verdict's text; 1, 2, ... by default.
            prompts: (prompts, d) positions of single prompts at the latest reading: the reason then gives the interval
                of its score, and a run is not CLEAR whose interval reaches the threshold.
        """
        sources = ", ".join(self.danger.sources)
        calibrated_on = f"{len(self.null_scores)} benign runs; danger from {sources}"
        points = np.asarray(positions, dtype=np.float64)
        at = list(range(1, len(points) + 1 if points.ndim else 1)) if steps is None else np.asarray(steps).tolist()

        def nothing(reason: str) -> Verdict:
            last = at[-1] if at else None
            n = len(self.null_scores)
            return Verdict(
                State.INCONCLUSIVE, None, self.threshold, None, None, calibrated_on, n, last, None, reason
            )  # fmt: skip

        if points.ndim != 2 or not len(points) or points.shape[1] != len(self.danger.direction):
            return nothing(f"positions of shape {points.shape} say nothing.")
        if len(at) != len(points):
            return nothing(f"{len(points)} readings were given and {len(at)} steps.")
        if not np.isfinite(points).all():
            return nothing("a position is not a number.")
        off = float(self.along(points)[1].max())
        outside = None
        if len(points) > self.max_readings:
            outside = f"the run has {len(points)} readings and calibration runs had {self.max_readings}"
        elif not off <= self.farthest:
            outside = f"a reading lies {off:.1f} off the axis, and calibration runs at most {self.farthest:.1f}"
        note, unsure = "", None
        if prompts is not None:
            single = np.asarray(prompts, dtype=np.float64)
            if single.ndim != 2 or single.shape[1:] != points.shape[1:] or not np.isfinite(single).all():
                return nothing(f"single prompts of shape {single.shape} say nothing of the latest reading.")
            low, high = self.interval(single)
            note = f"; at the latest reading it is {low:.2f} to {high:.2f} over the prompts"
            unsure = None if high < self.threshold else f"too few prompts to call it clear{note}"
        return decide(
            self, self.scores(points), at, calibrated_on=calibrated_on, outside=outside, unsure=unsure, note=note
        )

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file with a JSON header.

        Raises:
            StorageError: it cannot be written.
        """
        header = {
            "sources": list(self.danger.sources),
            "agreement": None if np.isnan(self.danger.agreement) else self.danger.agreement,
            "floor": self.band.floor, "threshold": self.threshold, "false_alarm_rate": self.false_alarm_rate,
            "farthest": self.farthest, "max_readings": self.max_readings,
        }  # fmt: skip
        arrays = {
            "direction": self.danger.direction, "center": self.band.center, "directions": self.band.directions,
            "spread": self.band.spread, "null_scores": self.null_scores, "null_weights": self.null_weights,
        }  # fmt: skip
        return write_artifact(path, _KIND, _FORMAT, header, {k: np.asarray(v, np.float64) for k, v in arrays.items()})

    @classmethod
    def load(cls, path: str | Path) -> TransferDetector:
        """Read what `save` wrote.

        Raises:
            ArtifactError: the file is missing, damaged, foreign or of another version.
        """
        remedy = "fit the detector again"
        header, arrays = read_artifact(path, _KIND, _FORMAT, remedy=remedy)

        def make() -> TransferDetector:
            center, directions, spread = (arrays.pop(key) for key in ("center", "directions", "spread"))
            agreement = header.pop("agreement")
            danger = Danger(
                arrays.pop("direction"),
                tuple(header.pop("sources")),
                float("nan") if agreement is None else agreement,
            )
            return cls(
                danger=danger, band=Metric(center, directions, spread, header.pop("floor")), **{**header, **arrays}
            )

        return made(path, _KIND, remedy, make)


def fit_transfer(
    danger: Danger, benign: Sequence[PositionRun], *, false_alarm_rate: float = 0.05, floor: float = FLOOR
) -> TransferDetector:
    """Fit the null band and the threshold on benign runs of the new model; no dangerous run of it is used.

    Args:
        danger: learnt on other models.
        benign: of at least two sets.
        false_alarm_rate: per run on a new set; with fewer than 1/a - 1 sets the detector states a larger one.
        floor: see `band_of`.

    Raises:
        InputError: a dangerous run, fewer than two sets, or positions of another width than the danger's.
    """
    kinds = sorted({run.set_name for run in benign})
    if any(run.dangerous for run in benign) or len(kinds) < 2:
        raise InputError(f"got runs of {', '.join(kinds) or 'nothing'}; give benign runs of at least two sets")
    if any(run.positions.shape[1:] != danger.direction.shape for run in benign):
        raise InputError(f"the danger has {len(danger.direction)} coordinates, and the runs another number of them")
    tops: list[tuple[str, float]] = []
    farthest = 0.0
    for kind in kinds:
        band = band_of([(run.set_name, run.positions) for run in benign if run.set_name != kind], floor=floor)
        axis = band.toward(danger.direction)
        for points in (run.positions for run in benign if run.set_name == kind):
            along = (points - band.center) @ axis
            tops.append((kind, float(band.score(points, axis).max())))
            farthest = max(farthest, float(np.sqrt(np.maximum(band.distance(points) ** 2 - along**2, 0.0)).max()))
    scores, weights = weigh_sets(tops)
    return TransferDetector(
        danger=danger,
        band=band_of([(run.set_name, run.positions) for run in benign], floor=floor),
        threshold=set_threshold(scores, weights, false_alarm_rate),
        false_alarm_rate=max(false_alarm_rate, 1 / (len(kinds) + 1)),
        null_scores=scores,
        null_weights=weights,
        farthest=farthest,
        max_readings=max(len(run.positions) for run in benign),
    )
