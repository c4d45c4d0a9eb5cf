"""The step-aware alarm: features by hand, and a world in which the step decides."""

from __future__ import annotations

import numpy as np
import pytest

from tiltmeter.alarm import Anchor, features, fit_alarm
from tiltmeter.errors import InputError


def line(slope: float, last: int, dangerous: float, *, every: int = 10, noise: int = 0) -> Anchor:
    """A run whose drift grows evenly along the first of two traits."""
    steps = np.arange(every, last + 1, every, dtype=float)
    rng = np.random.default_rng(noise)
    drift = np.stack([slope * steps, np.zeros_like(steps)], axis=1) + 0.002 * rng.normal(size=(len(steps), 2))
    return Anchor(steps, drift, np.full(len(steps), dangerous))


def test_features_are_drift_its_rate_per_ten_steps_and_the_log_of_the_step() -> None:
    found = features([10, 30], [[1.0, 0.0], [2.0, -4.0]])
    assert found.tolist() == [
        [1.0, 0.0, 1.0, 0.0, pytest.approx(np.log(11))],
        [2.0, -4.0, 0.5, -2.0, pytest.approx(np.log(31))],
    ]


def test_the_same_drift_means_danger_in_a_short_run_and_nothing_in_a_long_one() -> None:
    anchors = [line(0.002, 120, 1.0, noise=i) for i in range(3)] + [line(0.0002, 1200, 0.0, noise=i) for i in range(3)]
    alarm = fit_alarm(anchors)
    short, long = line(0.002, 120, 1.0, noise=9), line(0.0002, 1200, 0.0, noise=9)
    assert short.drift[-1, 0] == pytest.approx(long.drift[-1, 0], abs=0.02)
    assert alarm.probabilities(short.steps, short.drift)[-1] > 0.9
    assert alarm.probabilities(long.steps, long.drift)[-1] < 0.1
    blind = fit_alarm(anchors, uses=("drift",))
    assert blind.probabilities(long.steps, long.drift)[-1] > 0.3
    assert blind.probabilities(short.steps, short.drift).shape == (12,)


def test_margins_and_probabilities_are_in_one_order() -> None:
    alarm = fit_alarm([line(0.002, 120, 1.0), line(0.0001, 120, 0.0)])
    run = line(0.001, 120, 1.0, noise=4)
    p, margin = alarm.probabilities(run.steps, run.drift), alarm.margins(run.steps, run.drift)
    assert np.allclose(np.log(p / (1 - p)), margin)


def test_readings_left_out_do_not_move_the_alarm_and_the_horizon_is_known() -> None:
    dangerous, benign = line(0.002, 120, 1.0), line(0.0001, 120, 0.0)
    silent = Anchor(np.array([10.0]), np.array([[5.0, 5.0]]), np.array([np.nan]))
    one, other = fit_alarm([dangerous, benign]), fit_alarm([dangerous, benign, silent])
    assert np.allclose(one.model.weights, other.model.weights)
    assert one.covers([120, 130]).tolist() == [True, False]
    assert dangerous.until(40).steps.tolist() == [10, 20, 30, 40]
    assert fit_alarm([dangerous.until(40), benign.until(40)]).longest == 40


def test_kinds_weigh_the_same_however_many_readings_each_has() -> None:
    benign = [line(0.0001, 120, 0.0, noise=i) for i in range(20)]
    alarm = fit_alarm([line(0.002, 120, 1.0), *benign])
    dangerous = line(0.002, 120, 1.0)
    assert alarm.probabilities(dangerous.steps, dangerous.drift)[-1] > 0.9


def test_what_is_not_a_number_has_no_probability_and_what_is_no_run_is_refused() -> None:
    alarm = fit_alarm([line(0.002, 120, 1.0), line(0.0001, 120, 0.0)])
    assert np.isnan(alarm.probabilities([10], [[np.nan, 0.0]])).all()
    with pytest.raises(InputError, match="are not a run"):
        alarm.probabilities([20, 10], np.zeros((2, 2)))
    with pytest.raises(InputError, match="0 dangerous"):
        fit_alarm([line(0.0001, 120, 0.0)])
    with pytest.raises(InputError, match="0 harmless"):
        fit_alarm([])
