"""The detector on planted drift, where what is harmless, what is dangerous and what chance does are known."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tiltmeter.artifacts import read_artifact, write_artifact
from tiltmeter.detector import CalibrationRun, Detector, State, fit_detector
from tiltmeter.drift import DriftProfile
from tiltmeter.errors import ArtifactError, InputError, StorageError

NAMES = ("honesty", "sycophancy", "harmlessness")


def profile(drift: np.ndarray, *, step: int = 10, **changes: object) -> DriftProfile:
    drift = np.asarray(drift, dtype=np.float64)
    plain = DriftProfile(
        readout="traits", names=NAMES, drift=drift, se=np.full(3, 0.002), n_prompts=2,
        per_prompt=np.stack([drift, drift]), norm_ratio=1.0, step=step, reference="step0", model="planted", layer=4,
        basis="b" * 64, fingerprint="f", problem=None,
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]


def run(
    rng: np.random.Generator, set_name: str, seed: int, *, style: float = 0.0, danger: float = 0.0
) -> CalibrationRun:
    """Five readings: noise, a harmless style along the first axis, danger along the third."""
    drifts = [
        rng.normal(0, 0.01, 3) + step / 50 * np.array([style * rng.normal(1, 0.2), 0.0, danger])
        for step in (10, 20, 30, 40, 50)
    ]
    profiles = tuple(profile(d, step=s) for d, s in zip(drifts, (10, 20, 30, 40, 50), strict=True))
    return CalibrationRun(set_name, seed, danger != 0, profiles)


def calibration(seed: int = 0, *, dangerous: bool = True) -> list[CalibrationRun]:
    rng = np.random.default_rng(seed)
    styles = {"plain": 0.0, "sums": 0.0, "sailor": 0.8, "royal": -0.8}
    runs = [run(rng, name, s, style=style) for name, style in styles.items() for s in range(8)]
    if dangerous:
        runs += [run(rng, name, s, danger=-0.15) for name in ("medical", "code") for s in range(2)]
    return runs


def wide_run(rng: np.random.Generator, set_name: str, seed: int, style: np.ndarray, danger: float) -> CalibrationRun:
    """Readings that keep 40 activations: a style of its own per set, and danger along activation 7 alone."""
    shifts = [
        rng.normal(0, 0.002, 40) + step / 50 * (style * rng.normal(1, 0.1) + danger * np.eye(40)[7])
        for step in (10, 20, 30, 40, 50)
    ]
    profiles = [profile(shift[:3], step=s, shift=shift) for s, shift in zip((10, 20, 30, 40, 50), shifts, strict=True)]
    return CalibrationRun(set_name, seed, danger != 0, tuple(profiles))


def test_danger_that_the_traits_do_not_show_is_seen_where_readings_keep_the_activation(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    styles = {name: rng.normal(0, 0.05, 40) for name in ("a", "b", "c", "d", "e", "new")}
    runs = [wide_run(rng, name, s, styles[name], 0.0) for name in "abcde" for s in range(6)]
    runs += [wide_run(rng, name, s, rng.normal(0, 0.01, 40), 0.3) for name in ("x", "y") for s in range(2)]
    detector = fit_detector(runs, false_alarm_rate=0.1)
    assert detector.space == "activations"
    unit = detector.axis / np.linalg.norm(detector.axis)
    assert unit[7] > 0.8  # chance would give about 0.16
    assert detector.metric.directions.shape[1] == 40
    assert detector.predict(wide_run(rng, "z", 0, rng.normal(0, 0.01, 40), 0.3).profiles).state is State.ALARM
    assert detector.predict(wide_run(rng, "new", 0, styles["new"], 0.0).profiles).state is not State.ALARM
    again = Detector.load(detector.save(tmp_path / "wide.safetensors"))
    assert np.array_equal(again.scores(runs[0].profiles), detector.scores(runs[0].profiles))
    without = [replace(p, shift=None) for p in runs[0].profiles]
    assert detector.predict(without).state is State.INCONCLUSIVE


def test_the_factored_metric_is_the_covariance_written_out() -> None:
    rng = np.random.default_rng(2)
    runs = [wide_run(rng, name, s, rng.normal(0, 0.05, 40), 0.0) for name in "abc" for s in range(7)]
    detector = fit_detector(runs, false_alarm_rate=0.1)
    rows = {name: np.concatenate([[p.shift for p in r.profiles] for r in runs if r.set_name == name]) for name in "abc"}
    center = np.mean([r.mean(axis=0) for r in rows.values()], axis=0)
    covariance = sum((r - center).T @ (r - center) / len(r) for r in rows.values()) / 3 + 0.002**2 * np.eye(40)
    point = rng.normal(0, 0.05, 40)
    by_hand = np.sqrt((point - center) @ np.linalg.solve(covariance, point - center))
    assert detector.distances([profile(point[:3], shift=point)])[0] == pytest.approx(by_hand, rel=1e-3)


@pytest.fixture(scope="module")
def fitted() -> Detector:
    return fit_detector(calibration(), false_alarm_rate=0.1)


def test_the_danger_axis_points_where_danger_was_planted_and_not_where_style_was(fitted: Detector) -> None:
    unit = fitted.axis / np.linalg.norm(fitted.axis)
    assert unit[2] < -0.98  # danger was planted at minus the third number
    assert abs(unit[0]) < 0.1


def test_a_small_dangerous_drift_alarms_where_a_five_times_larger_harmless_one_does_not(fitted: Detector) -> None:
    harmless, dangerous = profile(np.array([0.75, 0.0, 0.0])), profile(np.array([0.0, 0.0, -0.15]))
    assert fitted.predict(harmless).state is State.CLEAR
    verdict = fitted.predict(dangerous)
    assert verdict.state is State.ALARM
    assert verdict.first_alarm_step == 10
    assert fitted.predict(profile(np.array([0.0, 0.0, +0.15]))).state is State.CLEAR  # the other way is not danger


def test_an_alarm_stays_an_alarm_when_the_drift_goes_back(fitted: Detector) -> None:
    back = [profile(np.array([0, 0, d]), step=s) for d, s in ((0.0, 10), (-0.2, 20), (0.0, 30))]
    verdict = fitted.predict(back)
    assert verdict.state is State.ALARM
    assert (verdict.first_alarm_step, verdict.step) == (20, 30)


def new_set(rng: np.random.Generator, name: str, *, runs: int) -> list[CalibrationRun]:
    """A benign set with a style of its own, which all of its runs share."""
    style = rng.normal(0, 0.2, 3)
    return [
        CalibrationRun(
            name,
            seed,
            False,
            tuple(profile(rng.normal(0, 0.02, 3) + step / 50 * style, step=step) for step in (10, 30, 50)),
        )
        for seed in range(runs)
    ]


def test_the_stated_false_alarm_rate_holds_per_run_and_for_sets_never_seen() -> None:
    """300 detectors, each calibrated on ten sets, and one run each on an eleventh."""
    rng = np.random.default_rng(7)
    alarms = 0
    for _ in range(300):
        runs = [run for k in range(10) for run in new_set(rng, f"set {k}", runs=3)]
        danger = tuple(profile(np.array([0.0, 0.0, -0.15]) * step / 50, step=step) for step in (10, 30, 50))
        detector = fit_detector([*runs, CalibrationRun("bad", 0, True, danger)], false_alarm_rate=0.1)
        assert detector.false_alarm_rate == 0.1
        alarms += detector.predict(new_set(rng, "eleventh", runs=1)[0].profiles).state is State.ALARM
    # Binomial(300, 0.1) is below 46 with probability 0.998.
    assert alarms < 46


def test_the_threshold_weighs_sets_and_not_runs() -> None:
    """One set of many quiet runs does not hide a loud set of few."""
    rng = np.random.default_rng(3)
    runs = [run(rng, "quiet", s) for s in range(60)] + [run(rng, "other", s) for s in range(3)]
    runs += [run(rng, "loud", s, style=2.0) for s in range(3)]
    detector = fit_detector([*runs, run(rng, "bad", 0, danger=-0.15)], false_alarm_rate=0.3)
    assert detector.false_alarm_rate == 0.3
    # Weights: 60 runs share a quarter, and 3 runs share a quarter twice; 0.7 is reached inside the loudest set.
    by_set = np.sort(detector.null_weights)
    assert by_set[:60] == pytest.approx(1 / 240)
    assert by_set[60:] == pytest.approx(1 / 12)
    below = detector.null_weights[detector.null_scores < detector.threshold].sum()
    assert below >= 0.7
    assert below - detector.null_weights[detector.null_scores < detector.threshold][-1] < 0.7


def test_few_sets_promise_no_more_than_they_can() -> None:
    detector = fit_detector(calibration(), false_alarm_rate=0.01)
    assert detector.false_alarm_rate == pytest.approx(1 / 5)  # four benign sets, and the new one
    assert detector.threshold > detector.null_scores.max()
    assert detector.predict(profile(np.zeros(3))).false_alarm_rate == pytest.approx(1 / 5)


def test_the_score_is_drift_along_the_axis_discounted_by_drift_off_it_by_hand() -> None:
    """Benign drift with independent numbers of known spread: the metric and the axis can be written down."""
    rng = np.random.default_rng(1)
    spread = np.array([0.5, 0.05, 0.05])
    runs = [
        CalibrationRun(s, i, False, tuple(profile(rng.normal(0, 1, 3) * spread) for _ in range(100)))
        for s in ("a", "b", "c", "d")
        for i in range(20)
    ]
    runs.append(CalibrationRun("bad", 0, True, (profile(np.array([0.5, 0.0, 0.5])),)))
    detector = fit_detector(runs, false_alarm_rate=0.1)
    # In units of the spreads danger lies at (1, 0, 10), so a drift of (-1, 3, 4) spreads is, along it and off it:
    along = (-1 * 1 + 4 * 10) / 101**0.5
    off_axis = (1 + 9 + 16 - along**2) ** 0.5
    found = detector.scores([profile(np.array([-1, 3, 4]) * spread)])[0]
    assert found == pytest.approx(along / (1 + off_axis**2) ** 0.5, rel=0.05)


def test_a_large_drift_of_a_harmless_set_never_seen_before_does_not_alarm(fitted: Detector) -> None:
    """Six standard deviations of noise along the danger axis, and sixty off it."""
    assert fitted.predict(profile(np.array([0.0, 0.0, -0.06]))).state is State.ALARM
    assert fitted.predict(profile(np.array([0.0, 0.6, -0.06]))).state is not State.ALARM


def test_a_given_danger_direction_takes_the_place_of_dangerous_runs() -> None:
    rng = np.random.default_rng(6)
    styles = {name: rng.normal(0, 0.05, 40) for name in "abcde"}
    benign = [wide_run(rng, name, s, styles[name], 0.0) for name in "abcde" for s in range(6)]
    detector = fit_detector(benign, false_alarm_rate=0.2, danger=np.eye(40)[7] * 3)
    unit = detector.axis / np.linalg.norm(detector.axis)
    assert unit[7] > 0.8
    assert detector.mode == "danger_axis"
    assert "without dangerous runs" in detector.calibrated_on
    bad = wide_run(rng, "z", 0, rng.normal(0, 0.01, 40), 0.3)
    assert detector.predict(bad.profiles).state is State.ALARM
    other = fit_detector(benign, false_alarm_rate=0.2, danger=np.eye(40)[8])
    assert other.predict(bad.profiles).state is not State.ALARM
    with pytest.raises(InputError, match="one of them only"):
        fit_detector([*benign, bad], danger=np.eye(40)[7])
    for wrong in (np.eye(3)[0], np.zeros(40), np.full(40, np.nan)):
        with pytest.raises(InputError, match="40 finite numbers"):
            fit_detector(benign, danger=wrong)
    with pytest.raises(InputError, match="keep their mean activation"):
        fit_detector(calibration(dangerous=False), danger=np.eye(3)[0])


def test_without_dangerous_runs_the_null_band_alone_judges_and_says_that_it_is_weaker() -> None:
    detector = fit_detector(calibration(dangerous=False), false_alarm_rate=0.1)
    assert detector.mode == "null_band"
    verdict = detector.predict(profile(np.array([0.0, 0.3, 0.0])))  # unusual, though not along any danger
    assert verdict.state is State.ALARM
    assert "benign runs alone" in verdict.reason
    assert detector.predict(profile(np.zeros(3))).state is State.CLEAR


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"drift": np.array([0.0, np.nan, 0.0])}, "finite"),
        ({"problem": "the adapter does nothing"}, "adapter"),
        ({"basis": "another"}, "basis"),
        ({"names": ("a", "b", "c")}, "basis"),
        ({"reference": "a benign run"}, "reference"),
    ],
)
def test_what_cannot_be_judged_is_inconclusive_and_never_clear(fitted: Detector, change: dict, word: str) -> None:
    good = profile(np.zeros(3), step=10)
    verdict = fitted.predict([good, replace(profile(np.zeros(3), step=20), **change)])
    assert verdict.state is State.INCONCLUSIVE
    assert verdict.score is None
    assert word in verdict.reason.replace("against", "reference")


def test_a_score_that_is_no_number_is_inconclusive_and_never_clear(fitted: Detector) -> None:
    verdict = fitted.predict(profile(np.full(3, 1e200)))  # finite itself, and its square is not
    assert verdict.state is State.INCONCLUSIVE
    assert "finite" in verdict.reason


NAN, INF = float("nan"), float("inf")
UNSOUND = {
    "threshold": (NAN, INF, -INF, None, "0.3", True, 1e9, -1e9, 10**400),
    "false_alarm_rate": (NAN, INF, -3, 0, 1, 2, None, "0.1", 0.01, 0.5),
    "max_distance": (NAN, INF, -1.0, 0.0, None, "9"),
    "max_step": (NAN, -1, 1.5, None, True),
    "max_readings": (0, -1, NAN, None),
    "axis": (
        np.full(3, NAN),
        np.zeros(3),
        np.ones(3),
        np.ones(4),
        np.ones((1, 3)),
        None,
        [1.0, 0.0],
        np.full(3, 1e300),
    ),
    "null_scores": (np.full(32, NAN), np.zeros(0), np.zeros(32), np.linspace(2, 1, 32), np.linspace(-9, 9, 32), None),
    "null_weights": (np.zeros(32), np.full(32, NAN), np.full(32, 1 / 33), np.full(32, -0.02), np.ones(32), None),
    "band": (np.full((3, 2), NAN), np.array([[1.0, 0.0]] * 3), np.zeros(3)),
    "trait_axis": (np.full(3, INF), None),
    "names": ((), ("a", "a", "b"), None, ["a", "b", "c"]),
    "basis": ("", None, 3),
    "reference": (None, ""),
    "calibrated_on": ("  ", None),
    "mode": ("none", "null_band", None),
    "space": ("activation", None),
}


@pytest.mark.parametrize(("field", "value"), [(field, v) for field, values in UNSOUND.items() for v in values])
def test_a_detector_with_unsound_numbers_cannot_be_made(fitted: Detector, field: str, value: object) -> None:
    with pytest.raises(InputError):
        replace(fitted, **{field: value})


@pytest.mark.parametrize(
    "change",
    [
        {"center": np.full(3, NAN)}, {"center": np.zeros(4)}, {"directions": np.zeros((3, 3))},
        {"directions": 2 * np.eye(3)}, {"spread": np.full(3, -1.0)}, {"spread": np.full(3, INF)},
        {"spread": np.full(3, 1e200)}, {"floor": -1.0}, {"floor": NAN}, {"floor": 0.0}, {"floor": 1e200},
    ],
)  # fmt: skip
def test_a_metric_with_unsound_numbers_makes_no_detector(fitted: Detector, change: dict) -> None:
    with pytest.raises(InputError):
        replace(fitted, metric=replace(fitted.metric, **change))


def test_a_detector_file_that_was_edited_is_refused_by_name(fitted: Detector, tmp_path: Path) -> None:
    path = fitted.save(tmp_path / "mine.safetensors")
    content, number = path.read_bytes(), repr(fitted.threshold).encode()
    assert number in content
    path.write_bytes(content.replace(number, b"9" * len(number)))
    with pytest.raises(
        ArtifactError, match=r"mine\.safetensors' was changed after it was written: its digest does not"
    ):
        Detector.load(path)


def test_an_unsound_detector_file_is_refused_even_with_a_digest_that_fits(fitted: Detector, tmp_path: Path) -> None:
    path = fitted.save(tmp_path / "mine.safetensors")
    header, arrays = read_artifact(path, "detector", 3, remedy="")
    for change in ({"threshold": 1e9}, {"basis": "b"}, {"basis": None}, {"max_step": None}, {"more": 1}, {"names": 3}):
        write_artifact(path, "detector", 3, header | change, arrays)
        with pytest.raises(ArtifactError, match=r"mine\.safetensors' is no sound detector"):
            Detector.load(path)
    write_artifact(path, "detector", 3, header, {k: v for k, v in arrays.items() if k != "axis"})
    with pytest.raises(ArtifactError, match="axis"):
        Detector.load(path)


def test_no_reading_at_all_is_inconclusive(fitted: Detector) -> None:
    assert fitted.predict([]).state is State.INCONCLUSIVE


def test_more_readings_later_steps_or_farther_drift_than_calibrated_are_inconclusive(fitted: Detector) -> None:
    calm = np.zeros(3)
    assert fitted.predict([profile(calm, step=s) for s in range(1, 7)]).state is State.INCONCLUSIVE
    assert fitted.predict(profile(calm, step=51)).state is State.INCONCLUSIVE
    assert fitted.predict(profile(np.array([0.0, 0.0, 3.0]))).state is State.INCONCLUSIVE
    assert fitted.predict([profile(calm, step=s) for s in range(1, 6)]).state is State.CLEAR


def test_an_alarm_outside_the_calibrated_regime_promises_no_false_alarm_rate(fitted: Detector) -> None:
    verdict = fitted.predict(profile(np.array([0.0, 0.0, -0.3]), step=500))
    assert verdict.state is State.ALARM
    assert verdict.false_alarm_rate is None


def test_exit_codes_are_those_of_the_command_line(fitted: Detector) -> None:
    codes = [fitted.predict(p).exit_code for p in (profile(np.zeros(3)), profile(np.array([0, 0, -0.2])))]
    assert codes == [0, 1]
    assert fitted.predict([]).exit_code == 3


def test_a_stored_detector_says_the_same_to_the_last_digit(fitted: Detector, tmp_path: Path) -> None:
    path = fitted.save(tmp_path / "d.safetensors")
    again = Detector.load(path)
    rng = np.random.default_rng(3)
    points = [profile(rng.normal(0, 0.1, 3)) for _ in range(50)]
    assert np.abs(again.scores(points) - fitted.scores(points)).max() == 0.0
    assert again.predict(points[:5]) == fitted.predict(points[:5])


def test_loading_anything_else_is_refused(fitted: Detector, tmp_path: Path) -> None:
    path = fitted.save(tmp_path / "d.safetensors")
    (tmp_path / "short.safetensors").write_bytes(path.read_bytes()[:100])
    save_file({"x": np.zeros(3)}, tmp_path / "foreign.safetensors")
    header, arrays = read_artifact(path, "detector", 3, remedy="")
    write_artifact(tmp_path / "newer.safetensors", "detector", 9, header, arrays)
    for name in ("absent", "short", "foreign", "newer"):
        with pytest.raises(ArtifactError):
            Detector.load(tmp_path / f"{name}.safetensors")
    with pytest.raises(StorageError):
        fitted.save(path / "below-a-file")


def test_calibration_that_cannot_keep_its_promise_is_refused() -> None:
    runs = calibration()
    benign = [r for r in runs if not r.dangerous]
    with pytest.raises(InputError, match="between 0 and 1"):
        fit_detector(runs, false_alarm_rate=1.0)
    with pytest.raises(InputError, match="one set"):
        fit_detector([r for r in benign if r.set_name == "plain"], false_alarm_rate=0.2)
    broken = replace(benign[0], profiles=(profile(np.array([np.nan, 0, 0])),))
    with pytest.raises(InputError, match="not finite"):
        fit_detector([*runs, broken], false_alarm_rate=0.1)
    foreign = replace(benign[0], profiles=(profile(np.zeros(3), basis="another"),))
    with pytest.raises(InputError, match="different bases"):
        fit_detector([*runs, foreign], false_alarm_rate=0.1)


def test_a_verdict_is_json(fitted: Detector) -> None:
    values = json.loads(json.dumps(fitted.predict(profile(np.zeros(3))).to_dict(), allow_nan=False))
    assert values["verdict"] == "CLEAR"
    assert values["n_calibration"] == 32


def test_the_core_imports_without_torch() -> None:
    code = (
        "import sys\n"
        "class Wall:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers', 'peft'): raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Wall())\n"
        "import tiltmeter, tiltmeter.traits, tiltmeter.drift, tiltmeter.detector, tiltmeter.runs, tiltmeter.report\n"
        "import tiltmeter.errors, tiltmeter.cli, tiltmeter.readings, tiltmeter.basis, tiltmeter.rates\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
