"""The transferable detector: two planted models that share a danger and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tiltmeter.detector import State
from tiltmeter.errors import ArtifactError, InputError
from tiltmeter.transfer import Danger, PositionRun, TransferDetector, band_of, fit_danger, fit_transfer

D = 10
DANGER = np.eye(D)[0] * 0.6 + np.eye(D)[1] * 0.8


def model(seed: int, *, sets: int = 25, dangerous: int = 2, loud: float = 5.0) -> list[PositionRun]:
    """Benign runs wander along directions of this model's own, far; dangerous ones move along the shared danger too."""
    rng = np.random.default_rng(seed)
    start = rng.normal(size=D)
    own = np.linalg.qr(rng.normal(size=(D, D)))[0][:3]
    grow = np.linspace(0.1, 1.0, 12)[:, None]
    runs = []
    for number in range(sets + dangerous):
        bad = number >= sets
        end = loud * rng.normal(size=3) @ own + 0.1 * rng.normal(size=D) + 3.0 * bad * DANGER
        positions = start + grow * end + 0.02 * rng.normal(size=(12, D))
        runs.append(PositionRun(f"set-{number}", bad, positions))
    return runs


def benign(runs: list[PositionRun]) -> list[PositionRun]:
    return [run for run in runs if not run.dangerous]


def test_a_band_measures_distance_in_the_covariance_of_its_runs() -> None:
    rng = np.random.default_rng(0)
    runs = [(f"s{i}", rng.normal(size=(40, 4)) * [1, 2, 3, 4]) for i in range(3)]
    band = band_of(runs, floor=0.2)
    stacked = np.concatenate([x for _, x in runs])
    scatter = np.cov(stacked.T, bias=True)
    covariance = scatter + 0.04 * np.trace(scatter) / 4 * np.eye(4)
    points = rng.normal(size=(5, 4)) * 3
    gap = points - stacked.mean(axis=0)
    assert np.allclose(band.distance(points) ** 2, np.einsum("ij,jk,ik->i", gap, np.linalg.inv(covariance), gap))
    assert np.allclose(np.linalg.norm(band.standardise(points), axis=1), band.distance(points))
    w = np.linalg.solve(covariance, DANGER[:4])
    z = gap @ w / np.sqrt(w @ covariance @ w)
    assert np.allclose((points - band.center) @ band.toward(DANGER[:4]), z)
    r2 = band.distance(points) ** 2 - z**2
    assert np.allclose(band.score(points, band.toward(DANGER[:4])), z / np.sqrt(1 + r2))


def test_danger_learnt_on_other_models_is_seen_in_a_new_one_that_gave_benign_readings_alone() -> None:
    danger = fit_danger([("a", model(1, dangerous=20)), ("b", model(2, dangerous=20))])
    assert danger.direction @ DANGER > 0.6  # each source adds harmless movement of its own
    hits, alarms = [], []
    for seed in range(10, 30):
        runs = model(seed, sets=50, dangerous=3)
        detector = fit_transfer(danger, benign(runs)[:40])
        hits += [detector.predict(run.positions).state is State.ALARM for run in runs if run.dangerous]
        alarms += [detector.predict(run.positions).state is State.ALARM for run in benign(runs)[40:]]
    assert np.mean(hits) > 0.9
    assert np.mean(alarms) < 0.05 + 2.5 * np.sqrt(0.05 * 0.95 / len(alarms))


def test_magnitude_alone_would_not_do() -> None:
    runs = model(5)
    size = [np.linalg.norm(run.positions[-1] - run.positions[0]) for run in benign(runs)]
    assert np.median(size) > 3.0  # harmless movement is longer than the danger


def test_a_run_that_starts_misaligned_is_seen_at_its_first_reading() -> None:
    runs = model(3, sets=40)
    danger = fit_danger([(str(seed), model(seed, sets=60, dangerous=40)) for seed in (1, 2, 5)])
    assert danger.direction @ DANGER > 0.9
    detector = fit_transfer(danger, benign(runs))
    start = next(run.positions[-1:] for run in runs if run.dangerous)
    verdict = detector.predict(start, steps=[0])
    assert verdict.state is State.ALARM
    assert verdict.first_alarm_step == 0


def test_what_lies_outside_calibration_is_inconclusive_and_never_clear() -> None:
    runs = model(4)
    detector = fit_transfer(fit_danger([("a", model(1))]), benign(runs))
    inside = benign(runs)[0].positions
    assert detector.predict(inside).state is State.CLEAR
    far = inside - 1000 * DANGER  # far off, and away from danger
    sideways = inside + 500 * np.eye(D)[7]
    assert detector.predict(sideways).state is not State.CLEAR
    assert detector.predict(far + 500 * np.eye(D)[5]).state is not State.CLEAR
    assert detector.predict(np.concatenate([inside, inside])).state is State.INCONCLUSIVE
    assert detector.predict(np.full((1, D), np.nan)).state is State.INCONCLUSIVE
    assert detector.predict(np.zeros((0, D))).state is State.INCONCLUSIVE
    assert detector.predict(np.zeros((2, D - 1))).state is State.INCONCLUSIVE


def test_the_scores_interval_narrows_with_the_number_of_prompts() -> None:
    runs = model(4)
    detector = fit_transfer(fit_danger([("a", model(1))]), benign(runs))
    rng = np.random.default_rng(0)
    center = benign(runs)[0].positions[-1]
    widths = []
    for n in (20, 2000):
        low, high = detector.interval(center + 0.5 * rng.normal(size=(n, D)))
        assert low < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 4


def test_a_score_that_the_prompts_do_not_settle_is_not_clear() -> None:
    runs = model(4)
    detector = fit_transfer(fit_danger([("a", model(1))]), benign(runs))
    inside = benign(runs)[0].positions
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(400, D))
    noise -= noise.mean(axis=0)
    sure = detector.predict(inside, prompts=inside[-1] + 0.01 * noise)
    unsure = detector.predict(inside, prompts=inside[-1] + 60.0 * noise[:6])
    assert (sure.state, unsure.state) == (State.CLEAR, State.INCONCLUSIVE)
    assert "over the prompts" in sure.reason
    assert detector.predict(inside, prompts=np.full((3, D), np.nan)).state is State.INCONCLUSIVE


def test_it_is_stored_and_read_back(tmp_path: Path) -> None:
    runs = model(4)
    detector = fit_transfer(fit_danger([("a", model(1))]), benign(runs))
    again = TransferDetector.load(detector.save(tmp_path / "t.safetensors"))
    points = runs[-1].positions
    assert np.abs(again.scores(points) - detector.scores(points)).max() < 1e-12
    assert again.predict(points) == detector.predict(points)
    with pytest.raises(ArtifactError, match="there is no transfer detector"):
        TransferDetector.load(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="no safetensors"):
        TransferDetector.load(tmp_path / "bad")


def test_calibration_that_cannot_serve_is_refused() -> None:
    runs = model(4)
    danger = fit_danger([("a", model(1))])
    with pytest.raises(InputError, match="benign runs of at least two sets"):
        fit_transfer(danger, runs)
    assert fit_transfer(danger, benign(runs)[:5]).false_alarm_rate == pytest.approx(1 / 6)  # five sets promise no less
    with pytest.raises(InputError, match="of one kind"):
        fit_danger([("a", benign(runs))])
    with pytest.raises(InputError, match="at least one model"):
        fit_danger([])
    with pytest.raises(InputError, match="coordinates"):
        fit_transfer(danger, [run._replace(positions=run.positions[:, :3]) for run in benign(runs)])
    with pytest.raises(InputError, match="readings are the same"):
        band_of([("a", np.ones((3, 2)))])


def test_a_detector_with_unsound_numbers_cannot_be_made() -> None:
    rng = np.random.default_rng(0)
    runs = [PositionRun(name, False, rng.normal(size=(3, 4))) for name in "abcdef" for _ in range(4)]
    danger = Danger(np.eye(4)[0], ("another",), float("nan"))
    detector = fit_transfer(danger, runs, false_alarm_rate=0.2)
    for change in (
        {"threshold": np.nan}, {"threshold": np.inf}, {"threshold": 99.0}, {"threshold": None},
        {"false_alarm_rate": -3},
        {"false_alarm_rate": np.nan}, {"farthest": np.nan}, {"farthest": -1.0}, {"farthest": np.inf},
        {"max_readings": 0},
        {"band": replace(detector.band, floor=0.0)}, {"band": replace(detector.band, floor=1e9)},
        {"null_scores": detector.null_scores * np.nan}, {"null_weights": detector.null_weights * 2},
    ):  # fmt: skip
        with pytest.raises(InputError):
            replace(detector, **change)
    for change in (
        {"direction": np.zeros(4)}, {"direction": 2 * np.eye(4)[0]}, {"direction": np.full(4, np.nan)}, {"sources": ()},
        {"agreement": np.inf}, {"agreement": 2.0}, {"direction": None},
    ):  # fmt: skip
        with pytest.raises(InputError):
            replace(danger, **change)
