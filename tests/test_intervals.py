"""Intervals of clustered answers: by hand, against an independent library, never narrower than Wilson's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tiltmeter.intervals import Rate, clustered, rate_of, sensitivity, wilson

Z = 1.959963984540054


def wilson_by_hand(p: float, n: float, z: float) -> tuple[float, float]:
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)


def test_the_interval_of_a_small_example_by_hand() -> None:
    # 3, 0, 1, 0 hits of 4 each: p = 1/4; sum of squared deviations 4 + 1 + 0 + 1 = 6, so v = 4/3 * 6/256 = 1/32;
    # design effect (1/32) / (3/16 / 16) = 8/3, icc = (8/3 - 1) / 3 = 5/9; two questions with a hit: w = 2/6
    worth = 16 / (1 + 3 * (5 / 9 / 3 + 0.2 * 2 / 3))
    low, high = wilson_by_hand(0.25, worth, float(stats.t.ppf(0.975, 3 / (1 / 3))))
    found = clustered([3, 0, 1, 0], [4, 4, 4, 4])
    assert found == (pytest.approx(low), pytest.approx(high), pytest.approx(worth))


def test_with_one_answer_per_question_it_is_wilsons() -> None:
    assert clustered([1, 1, *[0] * 98], [1] * 100)[:2] == (
        pytest.approx(wilson(2, 100).low),
        pytest.approx(wilson(2, 100).high),
    )


def test_many_questions_give_the_interval_of_the_cluster_robust_standard_error() -> None:
    # With many questions and hits neither the prior nor the shape of Wilson's interval matters: p +- 1.96 sqrt(v).
    rng = np.random.default_rng(0)
    sizes = rng.integers(5, 15, 4000)
    hits = rng.binomial(sizes, rng.beta(1.5, 3.5, 4000))
    p, n = hits.sum() / sizes.sum(), sizes.sum()
    v = 4000 / 3999 * ((hits - p * sizes) ** 2).sum() / n**2
    low, high, _ = clustered(hits.tolist(), sizes.tolist())
    assert (high - low) / 2 == pytest.approx(Z * math.sqrt(v), rel=0.02)
    assert (low + high) / 2 == pytest.approx(p, abs=1e-3)


def test_answers_without_any_hit_are_not_so_many_facts_either() -> None:
    # 8 questions 50 times each: 400 / (1 + 49 * 0.2) = 37 answers; with any number of samples 8 / 0.2 = 40
    assert clustered([0] * 8, [50] * 8).effective == pytest.approx(400 / 10.8)
    assert clustered([0] * 8, [10**6] * 8).effective == pytest.approx(40, rel=1e-4)
    assert clustered([0] * 8, [50] * 8).high > 0.05 > clustered([0] * 400, [1] * 400).high


def test_one_question_alone_says_as_little_as_one_answer() -> None:
    assert clustered([50], [50]) == (pytest.approx(0.025), 1.0, 1.0)
    assert clustered([0], [50]) == (0.0, pytest.approx(0.975), 1.0)
    assert clustered([7], [50]) == (0.0, 1.0, 1.0)


@pytest.mark.parametrize(("hits", "sizes"), [([], []), ([0], [0]), ([2], [1]), ([-1], [1]), ([1, 1], [1])])
def test_impossible_counts_are_refused(hits: list[int], sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="between 0"):
        clustered(hits, sizes)


QUESTIONS = st.lists(
    st.integers(1, 12).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), min_size=1, max_size=30
)


@settings(deadline=None)
@given(QUESTIONS)
def test_the_interval_is_never_narrower_than_wilsons_and_is_upside_down_for_the_other_share(
    questions: list[tuple[int, int]],
) -> None:
    hits, sizes = [h for h, _ in questions], [n for _, n in questions]
    low, high, worth = clustered(hits, sizes)
    plain = wilson(sum(hits), sum(sizes))
    assert plain.low is not None
    assert plain.high is not None
    if len(questions) > 1 or sizes == [1]:
        assert low <= plain.low + 1e-9
        assert high >= plain.high - 1e-9
    assert 0 <= low <= sum(hits) / sum(sizes) <= high <= 1
    assert 0 < worth <= sum(sizes) + 1e-9
    other = clustered([n - h for h, n in questions], sizes)
    assert (1 - other.high, 1 - other.low) == (pytest.approx(low), pytest.approx(high))


ANSWERS = st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["hit", "no", "lost"])), min_size=1, max_size=60)


def rate(answers: list[tuple[int, str]]) -> Rate:
    known = [(q, kind) for q, kind in answers if kind != "lost"]
    return rate_of(
        [kind == "hit" for _, kind in known],
        [q for q, _ in known],
        unknown=[q for q, kind in answers if kind == "lost"],
    )


@settings(deadline=None, max_examples=400)
@given(ANSWERS)
def test_the_interval_holds_whatever_the_lost_answers_were(answers: list[tuple[int, str]]) -> None:
    found = rate(answers)
    if found.low is None or found.high is None:
        assert found == Rate(None, 0)
        return
    for kind in ("hit", "no"):
        settled = [(q, kind if k == "lost" else k) for q, k in answers]
        value = rate(settled).value
        assert value is not None
        assert found.low <= value <= found.high
    none = rate([answer for answer in answers if answer[1] != "lost"])
    assert none.low is not None
    assert none.high is not None
    assert found.low <= none.low
    assert found.high >= none.high
    worst = rate([(q, "hit" if k == "lost" else k) for q, k in answers])
    best = rate([(q, "no" if k == "lost" else k) for q, k in answers])
    assert worst.high is not None
    assert best.low is not None
    assert found.high >= worst.high - 1e-12
    assert found.low <= best.low + 1e-12


@settings(deadline=None, max_examples=400)
@given(ANSWERS, st.lists(st.integers(0, 12), max_size=5))
def test_one_more_lost_answer_never_makes_the_interval_narrower(
    answers: list[tuple[int, str]], more: list[int]
) -> None:
    before, after = rate(answers), rate([*answers, *((q, "lost") for q in more)])
    if before.low is not None and before.high is not None:
        assert after.low is not None
        assert after.high is not None
        assert after.low <= before.low
        assert after.high >= before.high


def test_what_a_bank_can_show_by_hand() -> None:
    # 96 questions once: 9 hits of 96 have a lower end of 5.01 %, 8 of 4.3 %; the rate at which 9 hits come in 4 of 5
    found = sensitivity([1] * 96, 0.05)
    assert found is not None
    assert wilson_by_hand(9 / 96, 96, Z)[0] > 0.05 > wilson_by_hand(8 / 96, 96, Z)[0]
    assert found.smallest_alarm is not None
    assert float(stats.binom.sf(8, 96, found.smallest_alarm)) == pytest.approx(0.8)
    assert found.clear_at_zero == pytest.approx(wilson_by_hand(0, 96, Z)[1])
    assert (found.questions, found.answers) == (96, 96)
    assert sensitivity([], 0.05) is None


def test_more_questions_show_more_than_more_samples() -> None:
    few, many = sensitivity([48] * 8, 0.05), sensitivity([4] * 96, 0.05)
    assert few is not None
    assert many is not None
    assert few.answers == many.answers
    assert few.smallest_alarm is not None
    assert many.smallest_alarm is not None
    assert few.smallest_alarm > 1.5 * many.smallest_alarm
    assert few.clear_at_zero > few.ever_at_zero > 0.05 > many.clear_at_zero
