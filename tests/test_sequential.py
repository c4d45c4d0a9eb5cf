"""Sequential tests: thresholds by hand, and false-alarm rates under dependence, by simulation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tiltmeter.errors import InputError
from tiltmeter.sequential import conformal_rank, cusum, envelope, fit_boundary, fit_eprocess


def benign_paths(n: int, readings: int = 12, seed: int = 0) -> np.ndarray:
    """Random walks with a random drift of their own: readings of one run depend on each other strongly."""
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.normal(size=(n, readings)), axis=1) + rng.normal(size=(n, 1)) * np.arange(readings)


@pytest.mark.parametrize(("n", "rank"), [(19, 19), (20, 20), (39, 38), (99, 95), (59, 57)])
def test_the_rank_is_the_ceiling_of_the_quantile_over_one_more_run(n: int, rank: int) -> None:
    assert conformal_rank(n, 0.05) == rank


def test_too_few_runs_promise_nothing() -> None:
    with pytest.raises(InputError, match="at least 19"):
        conformal_rank(18, 0.05)
    with pytest.raises(InputError, match="between 0 and 1"):
        conformal_rank(100, 0.0)


def test_cusum_by_hand() -> None:
    assert cusum([1.0, 0.2, -3.0, 2.0, 2.0], allowance=0.5).tolist() == pytest.approx([0.5, 0.2, 0.0, 1.5, 3.0])
    assert np.isnan(cusum([1.0, np.nan, 5.0], allowance=0.0)[1:]).all()


def test_the_boundary_is_the_ranked_maximum_and_a_run_on_it_does_not_cross() -> None:
    runs = [[0.0, float(i)] for i in range(1, 20)]  # maxima 1 to 19
    test = fit_boundary(runs, false_alarm_rate=0.1)  # rank ceil(0.9 * 20) = 18
    assert test.threshold == 18.0
    assert test.first_crossing([0.0, 18.0]) is None
    assert test.first_crossing([18.5, 0.0]) == 0
    assert test.p_value([0.0, 18.5]) == pytest.approx(2 / 20)


def test_the_boundary_keeps_its_rate_over_whole_runs_of_dependent_readings() -> None:
    alarms = []
    for seed in range(300):
        paths = benign_paths(60, seed=seed)
        shape = envelope(list(paths[:20]))
        test = fit_boundary(list(paths[20:59]), false_alarm_rate=0.1, path=shape.standardise)
        alarms.append(test.first_crossing(paths[59]) is not None)
    assert np.mean(alarms) < 0.1 + 2.5 * np.sqrt(0.09 / 300)
    assert np.mean(alarms) > 0.04  # it is not simply silent


def test_a_boundary_that_knows_how_far_benign_runs_are_by_each_reading_alarms_earlier() -> None:
    paths = benign_paths(200, seed=1)
    flat = fit_boundary(list(paths[100:]), false_alarm_rate=0.05)
    shape = envelope(list(paths[:100]))
    curved = fit_boundary(list(paths[100:]), false_alarm_rate=0.05, path=shape.standardise)
    dangerous = 6.0 * np.arange(1, 13)
    early, late = curved.first_crossing(dangerous), flat.first_crossing(dangerous)
    assert early is not None
    assert late is not None
    assert early < late


def test_a_run_that_cannot_be_compared_is_refused_and_not_called_clear() -> None:
    test = fit_boundary([[0.0, float(i)] for i in range(20)])
    with pytest.raises(InputError, match="no run of 1 to 2 readings"):
        test.first_crossing([0.0, 0.0, 0.0])
    with pytest.raises(InputError, match="not a number"):
        test.first_crossing([0.0, np.nan])
    for nothing in ([], [[0.0]]):
        with pytest.raises(InputError, match="no run of"):
            test.first_crossing(nothing)
        with pytest.raises(InputError, match="no run of"):
            test.p_value(nothing)
    blind = replace(test, path=lambda scores: scores * np.nan)
    with pytest.raises(InputError, match="the statistic of a reading is not a number"):
        blind.first_crossing([0.0])
    for change in (
        {"threshold": np.nan}, {"threshold": np.inf}, {"threshold": 99.0}, {"false_alarm_rate": np.nan},
        {"false_alarm_rate": 0.5}, {"maxima": np.zeros(0)}, {"maxima": test.maxima * np.nan}, {"readings": 0},
    ):  # fmt: skip
        with pytest.raises(InputError):
            replace(test, **change)
    with pytest.raises(InputError, match="one and the same number"):
        fit_boundary([[0.0], [0.0, 1.0]])
    with pytest.raises(InputError, match="not finite"):
        fit_boundary([[np.nan]] * 20)
    with pytest.raises(InputError, match="at least two"):
        envelope([[0.0, 1.0]])
    with pytest.raises(InputError, match="later readings"):
        envelope([[0.0], [1.0]]).standardise([0.0, 1.0])


def test_e_values_by_hand() -> None:
    process = fit_eprocess([[1.0, 0.0], [3.0, 0.0]], weights=[0.5, 0.5])
    # reading 1: 3 * 4 / (4 + 4) = 1.5; reading 2: nothing moved anywhere, so it is worth 1
    assert process.evidence([4.0, 0.0]).tolist() == pytest.approx([0.75, 1.25])
    assert fit_eprocess([[1.0, 1.0]]).weights.tolist() == [0.5, 0.5]


def test_the_e_process_keeps_its_rate_and_its_mean_under_dependence() -> None:
    crossed, last = [], []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        # One heavy-tailed size per run: all of its readings are large together.
        runs = np.exp(1.5 * rng.normal(size=(40, 1)) + 0.1 * rng.normal(size=(40, 12)))
        process = fit_eprocess(list(runs[:39]))
        crossed.append(process.first_crossing(runs[39], false_alarm_rate=0.1) is not None)
        last.append(process.evidence(runs[39])[-1])
    assert np.mean(crossed) <= 0.1
    assert np.mean(last) == pytest.approx(1.0, abs=0.2)


def test_the_e_process_sees_a_run_that_is_far_from_benign() -> None:
    rng = np.random.default_rng(0)
    process = fit_eprocess(list(np.abs(rng.normal(size=(60, 12)))))
    assert process.first_crossing(np.full(12, 40.0)) is not None
    assert process.first_crossing(np.full(12, 0.5)) is None


def test_an_e_process_refuses_what_has_no_proof() -> None:
    with pytest.raises(InputError, match="sum to at most 1"):
        fit_eprocess([[1.0, 1.0]], weights=[0.9, 0.9])
    with pytest.raises(InputError, match="values of 0 or more"):
        fit_eprocess([[-1.0, 1.0]])
    process = fit_eprocess([[1.0, 1.0]])
    with pytest.raises(InputError, match="can be weighed"):
        process.evidence([np.nan])


def test_evidence_that_is_no_number_is_refused_and_not_called_clear() -> None:
    process = fit_eprocess([[1.0, 1.0], [2.0, 2.0]])
    for bad in ([], [np.nan], [np.inf], [-1.0], [1.0, 1.0, 1.0], [[1.0]]):
        with pytest.raises(InputError):
            process.first_crossing(bad)
    for rate in (np.nan, 0.0, -3, 1.0, np.inf, None):
        with pytest.raises(InputError, match="false_alarm_rate"):
            process.first_crossing([1.0], false_alarm_rate=rate)
    for change in ({"null": process.null * np.nan}, {"weights": np.full(2, np.nan)}, {"weights": np.ones(2)}):
        with pytest.raises(InputError):
            replace(process, **change)
    with pytest.raises(InputError, match="allowance"):
        cusum([9.0], allowance=np.nan)
