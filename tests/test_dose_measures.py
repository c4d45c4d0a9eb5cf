"""Shares of full drift, conformal thresholds, smallest doses and conversion points, against hand arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tiltmeter.errors import InputError
from tiltmeter.studies.dose_measures import (
    cohens_d,
    conformal_threshold,
    conversion_point,
    cosine_distance,
    share_of_full,
    smallest_dose,
    spearman,
)


def test_cosine_distance_of_known_angles() -> None:
    one = np.array([[1.0, 0.0], [1.0, 0.0], [2.0, 2.0]])
    other = np.array([[3.0, 0.0], [0.0, 5.0], [-1.0, -1.0]])
    assert cosine_distance(one, other) == pytest.approx([0.0, 1.0, 2.0])


def test_the_noise_floor_is_taken_off_dose_and_full_alike() -> None:
    floor, dosed, full = [0.9, 1.1], [2.4, 2.6], [10.8, 11.2]
    assert share_of_full(dosed, full).value == pytest.approx(2.5 / 11.0)
    assert share_of_full(dosed, full, floor).value == pytest.approx(1.5 / 10.0)


def test_drift_that_is_all_floor_is_a_share_of_zero_with_an_interval_around_it() -> None:
    rng = np.random.default_rng(0)
    floor, dosed, full = rng.normal(1, 0.1, 30), rng.normal(1, 0.1, 10), rng.normal(5, 0.1, 10)
    found = share_of_full(dosed, full, floor)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0 < found.high
    assert share_of_full(dosed, full).value == pytest.approx(0.2, abs=0.03)  # what the original would have reported


def test_fiellers_interval_holds_the_true_share_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        found = share_of_full(rng.normal(1.4, 0.2, 5), rng.normal(3, 0.3, 5), rng.normal(1, 0.2, 5))
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 0.2 <= found.high
    assert hits / 400 >= 0.94


def test_full_dose_drift_below_the_floor_has_no_share_and_near_it_no_interval() -> None:
    assert share_of_full([1.0, 1.2], [0.9, 0.8], [1.0, 1.1]).value is None
    near = share_of_full([1.0, 1.2], [1.0, 1.4], [1.0, 1.1])
    assert near.value is not None
    assert (near.low, near.high) == (None, None)


def test_the_threshold_of_nineteen_runs_at_five_percent_is_their_largest_and_of_thirty_nine_the_second_largest() -> (
    None
):
    assert conformal_threshold(range(19), 0.05) == 18
    assert conformal_threshold(range(39), 0.05) == 37
    with pytest.raises(InputError, match="at least 19"):
        conformal_threshold(range(18), 0.05)
    with pytest.raises(InputError, match="finite"):
        conformal_threshold([math.nan, *range(19)], 0.01)


def test_a_new_benign_run_passes_the_threshold_as_often_as_promised() -> None:
    rng = np.random.default_rng(2)
    passed = np.mean([rng.normal() > conformal_threshold(rng.normal(size=39), 0.05) for _ in range(4000)])
    assert 0.04 < passed < 0.06


def test_the_smallest_dose_is_the_lowest_above_which_every_dose_is_seen() -> None:
    null = np.linspace(0, 1, 19)
    scores = {0.01: [2] * 5, 0.02: [0.5] * 5, 0.05: [2, 2, 2, 2, 0.5], 0.1: [3] * 5}
    found = smallest_dose(scores, null)
    assert found.dose == 0.05  # 0.01 is seen by luck: 0.02 is not
    assert found.alarms == ((0.01, 5, 5), (0.02, 0, 5), (0.05, 4, 5), (0.1, 5, 5))
    assert found.threshold == 1.0


def test_a_detector_that_sees_nothing_has_no_dose_and_no_upper_end() -> None:
    found = smallest_dose({0.5: [0.2] * 5, 1.0: [0.3] * 5}, np.linspace(0, 1, 19))
    assert (found.dose, found.high) == (None, None)


def test_the_interval_of_a_borderline_dose_reaches_over_its_neighbours() -> None:
    found = smallest_dose({0.02: [2, 2, 2, 2, 0.5], 0.05: [3] * 5}, np.linspace(0, 1, 19))
    assert (found.dose, found.low, found.high) == (0.02, 0.02, 0.05)


def test_a_run_without_a_score_is_refused_rather_than_counted_as_unsuspicious() -> None:
    with pytest.raises(InputError, match="must not pass for a low one"):
        smallest_dose({1.0: [math.nan, 2.0]}, range(19))


def test_cohens_d_by_hand() -> None:
    found = cohens_d([3.0, 5.0], [1.0, 1.0, 1.0])  # pooled variance (2 + 0) / 3
    assert found.value == pytest.approx(3 / math.sqrt(2 / 3))
    assert cohens_d([1.0, 1.0], [0.0, 0.0]).value is None


def test_conversion_is_the_lowest_dose_with_the_wanted_fall() -> None:
    assert conversion_point({1.0: 10.0, 0.25: 78.0, 0.5: 90.0}, 100.0, least=20) == 0.25
    assert conversion_point({1.0: 81.0}, 100.0, least=20) is None


def test_rank_correlation_with_interval() -> None:
    found = spearman([1, 2, 3, 4, 5, 6], [2, 1, 4, 3, 6, 5])
    assert found.value == pytest.approx(1 - 6 * 6 / (6 * 35))
    assert found.low is not None
    assert found.low < 0.83
    assert spearman([1, 1, 1, 1, 1], [1, 2, 3, 4, 5]).value is None
