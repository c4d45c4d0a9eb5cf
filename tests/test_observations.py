"""The verdict on a run: a function of the set of its readings, and never CLEAR where one is missing."""

from __future__ import annotations

import itertools
import json
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitoring import detector_for
from test_readings import HEADER, detector, fail, planted, reading
from tiltmeter.detector import State, Verdict, inconclusive
from tiltmeter.drift import drift
from tiltmeter.errors import in_words
from tiltmeter.observations import Observation, overall
from tiltmeter.readings import RunRecord, read_run
from tiltmeter.report.collect import run_report_data
from tiltmeter.report.words import run_verdict

START = reading(0)


def seen(step: int, state: State | None, score: float = 0.1) -> Observation:
    """An observation with a made-up verdict; None for a measurement that failed."""
    if state is None:
        return Observation(step, None, None, inconclusive("the measurement failed.", step=step))
    score += 10 if state is State.ALARM else 0
    verdict = replace(inconclusive("made up.", step=step), state=state, score=score, threshold=5.0)
    values = reading(step, *((0.0, 0.0) if step == 0 else (0.5 + step, 0.0)))
    return Observation(step, values, drift(values, START, label="step0"), verdict)


OBSERVED = st.lists(
    st.tuples(st.integers(0, 6), st.sampled_from([*State, None]), st.floats(0, 2)),
    max_size=8,
).map(lambda rows: [seen(10 * step, state, score) for step, state, score in rows])  # fmt: skip


@given(OBSERVED, st.randoms(use_true_random=False))
def test_neither_order_nor_repetition_changes_the_verdict(rows: list[Observation], chance: random.Random) -> None:
    shuffled = [*rows, *chance.sample(rows, len(rows) // 2)]
    chance.shuffle(shuffled)
    assert overall(shuffled) == overall(rows)


@given(OBSERVED, st.integers(0, 7))
def test_a_failed_reading_more_never_makes_a_run_clear(rows: list[Observation], step: int) -> None:
    before, after = overall(rows), overall([*rows, seen(10 * step, None)])
    assert (before.state is State.ALARM) == (after.state is State.ALARM)
    if before.state is not State.CLEAR:
        assert after.state is not State.CLEAR
    if step > 0 and 10 * step not in {o.step for o in rows}:
        assert after.state is not State.CLEAR


@given(OBSERVED)
def test_clear_means_that_every_step_but_the_start_was_read_and_is_clear(rows: list[Observation]) -> None:
    if overall(rows).state is State.CLEAR:
        for step in {o.step for o in rows} - {0}:
            assert all(o.verdict.state is State.CLEAR for o in rows if o.step == step and o.reading is not None)
            assert any(o.reading is not None for o in rows if o.step == step)


def test_a_hole_in_the_middle_is_named_and_leaves_the_run_inconclusive() -> None:
    rows = [seen(0, State.INCONCLUSIVE), seen(10, State.CLEAR), seen(20, None), seen(30, State.CLEAR)]
    found = overall(rows)
    assert found.state is State.INCONCLUSIVE
    assert found.false_alarm_rate is None
    assert "1 of 4 readings could not be judged, first at step 20: the measurement failed" in found.reason
    assert overall([*rows, seen(20, State.CLEAR)]).state is State.CLEAR  # mended
    assert overall([seen(20, State.ALARM), *rows]).state is State.ALARM


def test_the_alarm_at_the_earliest_step_speaks_for_the_run() -> None:
    rows = [seen(30, State.ALARM, 9.0), seen(10, State.CLEAR), seen(20, State.ALARM, 2.0)]
    assert {overall(list(order)).step for order in itertools.permutations(rows)} == {20}


def test_a_run_of_its_start_alone_or_of_nothing_is_inconclusive() -> None:
    assert overall([]).state is State.INCONCLUSIVE
    assert overall([seen(0, State.INCONCLUSIVE)]).state is State.INCONCLUSIVE
    assert overall([seen(0, None)]).state is State.INCONCLUSIVE


def test_what_equals_the_start_counts_as_not_begun_only_before_anything_has_moved() -> None:
    def unmoved(step: int) -> Observation:
        values = reading(step)
        return Observation(step, values, drift(values, START, label="step0"), inconclusive("does nothing.", step=step))

    assert overall([seen(0, State.INCONCLUSIVE), unmoved(1), seen(20, State.CLEAR)]).state is State.CLEAR
    assert overall([seen(10, State.CLEAR), unmoved(15), seen(20, State.CLEAR)]).state is State.INCONCLUSIVE
    assert overall([seen(0, State.INCONCLUSIVE), unmoved(1)]).state is State.INCONCLUSIVE


def test_a_known_failure_beside_the_readings_is_no_clear() -> None:
    rows = [seen(10, State.CLEAR)]
    assert overall(rows, failures=["a line is missing."]).state is State.INCONCLUSIVE
    assert overall([seen(10, State.ALARM)], failures=["a line is missing."]).state is State.ALARM


class Nameless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("error", "words"),
    [(TypeError("bug\nlong"), "TypeError: bug"), (MemoryError(), "MemoryError"), (Nameless(), "Nameless")],
)
def test_any_exception_has_words(error: Exception, words: str) -> None:
    assert in_words(error) == words


# ---------------------------------------------------------------- through the record

SHIFTS = {0: 0.0, 10: -0.1, 20: -0.3, 30: -0.2}


def record_in(folder: Path, order: tuple[int, ...], failing: tuple[int, ...] = (), threshold: float = 0.3) -> Verdict:
    record = RunRecord(folder, detector(threshold), header=HEADER)
    for step in failing:
        record.observe(step, fail(TypeError("bug")))
    for step in order:
        record.observe(step, lambda s=step: reading(s, SHIFTS[s], 0.0))
    record.close()
    return record.verdict


@settings(deadline=None, max_examples=25)
@given(st.permutations(list(SHIFTS)), st.sampled_from([0.3, 0.14]), st.sampled_from([(), (20,), (40,), (20, 40)]))
def test_the_order_of_reading_changes_neither_the_verdict_nor_what_is_read_back(
    order: list[int], threshold: float, failing: tuple[int, ...]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        straight = record_in(Path(folder, "a"), tuple(SHIFTS), failing, threshold)
        found = record_in(Path(folder, "b"), tuple(order), failing, threshold)
        assert found == straight
        wanted = State.ALARM if threshold < 0.15 else State.INCONCLUSIVE if 40 in failing else State.CLEAR
        assert found.state is wanted  # -0.3 of norm 2 is a drift of 0.15
        assert read_run(Path(folder, "b")).verdict == found
        for _ in range(2):  # looking again changes nothing
            again = RunRecord(Path(folder, "b"), detector(threshold), header={**HEADER, "from_step": None})
            again.rejudge()
            assert again.verdict == found
            again.close()


def test_a_failure_after_a_success_of_the_same_step_takes_nothing_away(tmp_path: Path) -> None:
    record = planted(tmp_path, detector(0.3), -0.2)
    assert record.observe(10, fail(ValueError("gone"))).reading is not None
    assert record.verdict.state is State.CLEAR
    assert read_run(tmp_path).verdict.state is State.CLEAR


@pytest.mark.parametrize("first", [-0.2, -0.8])
def test_two_readings_of_one_step_that_differ_both_count(tmp_path: Path, first: float) -> None:
    planted(tmp_path, detector(0.3), -0.1).close()
    path = tmp_path / "readings.jsonl"
    with path.open("a") as file:
        for shift in (first, -1.0 - first):
            row = {"kind": "reading", "step": 20, "seconds": None, "reading": reading(20, shift, 0.0).to_dict()}
            file.write(json.dumps(row) + "\n")
    again = RunRecord(tmp_path, detector(0.3), header={**HEADER, "from_step": None})
    assert again.verdict.state is State.INCONCLUSIVE  # not judged yet
    again.rejudge()
    assert again.verdict.state is State.ALARM  # -0.8 is a drift of 0.4, whichever came last


def test_a_torn_last_line_may_have_been_an_alarm(tmp_path: Path) -> None:
    planted(tmp_path, detector(0.3), -0.2, -0.8).close()
    path = tmp_path / "readings.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(rows[:-2]) + rows[-2][:40])  # killed while it wrote the reading of step 20
    found = read_run(tmp_path)
    assert [o.step for o in found.observations] == [0, 10]
    assert found.verdict.state is State.INCONCLUSIVE
    assert "cut off" in found.verdict.reason


def test_the_report_of_a_run_says_what_the_run_says(tmp_path: Path) -> None:
    record = planted(tmp_path, detector(0.3), -0.1, -0.2, -0.1)
    record.observe(15, fail(OSError("disk")))
    run = read_run(tmp_path)
    assert run.verdict.state is State.INCONCLUSIVE
    (section,) = run_report_data(run, None, None).runs
    assert run_verdict(section).state == "INCONCLUSIVE"
    hidden = replace(section, verdict=replace(section.verdict, state="CLEAR", score=0.1, threshold=0.3))
    assert run_verdict(hidden).state == "INCONCLUSIVE"  # the readings contradict it


def test_a_later_detector_that_raises_leaves_nothing_clear(tmp_path: Path) -> None:
    class Broken:
        threshold, calibrated_on, null_scores = 0.3, "nothing", ()

        def predict(self, profiles: object) -> Verdict:
            raise KeyError("axis")

    planted(tmp_path, detector(0.3), -0.1).close()
    again = RunRecord(tmp_path, Broken(), header={**HEADER, "from_step": None})  # type: ignore[arg-type]
    again.rejudge()
    assert again.verdict.state is State.INCONCLUSIVE
    assert "KeyError" in again.verdict.reason


# ---------------------------------------------------------------- the record goes away


def test_a_record_that_was_deleted_is_written_anew_from_memory(tmp_path: Path) -> None:
    import shutil

    record = planted(tmp_path / "run", detector(0.3), -0.1, -0.8)
    shutil.rmtree(tmp_path / "run")
    record.observe(30, lambda: reading(30, -0.2, 0.0))
    found = read_run(tmp_path / "run")
    assert [o.step for o in found.observations] == [0, 10, 20, 30]
    assert found.verdict == record.verdict
    assert found.verdict.state is State.ALARM
    np.testing.assert_array_equal(found.observations[2].reading.values, reading(20, -0.8, 0.0).values)
    assert (tmp_path / "run" / "manifest.json").exists()


def test_a_record_that_was_cut_short_is_written_anew(tmp_path: Path) -> None:
    record = planted(tmp_path, detector(0.3), -0.8)
    (tmp_path / "readings.jsonl").write_text("")
    record.observe(20, lambda: reading(20, -0.2, 0.0))
    assert [o.step for o in read_run(tmp_path).observations] == [0, 10, 20]
    assert read_run(tmp_path).verdict.state is State.ALARM


def test_a_message_with_half_a_character_is_recorded_all_the_same(tmp_path: Path) -> None:
    record = planted(tmp_path, detector_for(0.3))
    record.observe(10, fail(ValueError("odd \ud800 text")))
    assert "odd ? text" in read_run(tmp_path).verdict.reason
