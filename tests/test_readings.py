"""The record of a run: what is written, what reading it back makes of it, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from monitoring import detector_for
from tiltmeter.detector import State
from tiltmeter.drift import Reading
from tiltmeter.errors import ArtifactError, FingerprintMismatch, InputError, NumericalError
from tiltmeter.readings import RunRecord, read_run

HEADER = {"source": "test", "from_step": 0, "basis": "b" * 64}


def reading(step: int, *shifts: float, model: str = "m") -> Reading:
    """Three prompts of norm 2, all shifted alike: the drift is shift / 2."""
    base = np.array([[1.0, 0.0], [2.0, 1.0], [4.0, -1.0]])
    return Reading(
        readout="two",
        names=("honesty", "harm"),
        values=(base + np.array(shifts or (0.0, 0.0))).astype(np.float32),
        norms=np.full(3, 2.0, dtype=np.float32),
        layer=2,
        step=step,
        model=model,
        adapter_state="active" if step else "zero",
        fingerprint="f",
        weights="w",
        basis="b" * 64,
        plan="p",
        dtype="float32",
        time="2026-01-01T00:00:00+00:00",
    )


def detector(threshold: float) -> Any:
    """Scores a reading by minus its honesty drift."""
    return detector_for(threshold, axis=(-1.0, 0.0))


def fail(error: BaseException) -> Callable[[], Reading]:
    def read() -> Reading:
        raise error

    return read


def planted(folder: Path, judge: Any, *shifts: float) -> RunRecord:
    record = RunRecord(folder, judge, header=HEADER)
    for index, shift in enumerate((0.0, *shifts)):
        record.observe(10 * index, lambda i=index, s=shift: reading(10 * i, s, 0.0))
    return record


def test_it_imports_without_torch() -> None:
    program = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; import tiltmeter.readings"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_planted_run_reads_back_as_it_was_observed(tmp_path: Path) -> None:
    record = planted(tmp_path, detector(0.3), -0.2, -0.8, -0.4)
    run = read_run(tmp_path)
    np.testing.assert_allclose([p.drift[0] for p in run.profiles], [0.0, -0.1, -0.4, -0.2], atol=1e-6)
    assert [o.step for o in run.observations] == [0, 10, 20, 30]
    states = [o.verdict.state for o in run.observations]
    assert states == [State.INCONCLUSIVE, State.CLEAR, State.ALARM, State.ALARM]
    assert run.first_alarm_step == 20
    assert run.verdict.step == 20
    assert run.verdict.score == pytest.approx(0.4)
    for left, right in zip(record.observations, run.observations, strict=True):
        assert left.verdict == right.verdict
        np.testing.assert_array_equal(left.reading.values, right.reading.values)
    assert (run.label, run.ended, run.torn) == ("step0", None, 0)
    assert run.reference.step == 0


def test_profiles_are_written_beside_the_verdicts_for_other_readers(tmp_path: Path) -> None:
    planted(tmp_path, None, -0.8)
    last = json.loads((tmp_path / "readings.jsonl").read_text().splitlines()[-1])
    assert last["kind"] == "verdict"
    assert last["verdict"]["verdict"] == "INCONCLUSIVE"
    assert last["profile"]["drift"] == pytest.approx([-0.4, 0.0])


def test_a_reading_that_was_never_judged_is_inconclusive(tmp_path: Path) -> None:
    planted(tmp_path, detector(0.3), -0.1)
    lines = (tmp_path / "readings.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "readings.jsonl").write_text("".join(lines[:-1]) + lines[-1][:30])
    run = read_run(tmp_path)
    assert run.torn == 1
    assert run.observations[-1].reading is not None
    assert run.verdict.state is State.INCONCLUSIVE
    assert "cut off" in run.verdict.reason


def test_a_failed_measurement_keeps_its_reason(tmp_path: Path) -> None:
    record = planted(tmp_path, detector(0.3), -0.1)
    seen = record.observe(20, fail(NumericalError("two prompts of three are not finite; measure again")))
    assert (seen.reading, seen.profile) == (None, None)
    run = read_run(tmp_path)
    assert run.verdict.state is State.INCONCLUSIVE
    assert "two prompts of three are not finite" in run.verdict.reason
    assert run.verdict == record.verdict
    assert not record.has(20)
    assert [o.reading is None for o in run.observations] == [False, False, True]


@pytest.mark.parametrize(
    "error", [RuntimeError("out of memory\nlong trace"), MemoryError(), ValueError("shape")], ids=repr
)
def test_what_a_device_raises_is_recorded_and_not_raised(tmp_path: Path, error: BaseException) -> None:
    record = planted(tmp_path, detector(0.3))
    verdict = record.observe(10, fail(error)).verdict
    assert verdict.state is State.INCONCLUSIVE
    assert "\n" not in verdict.reason


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)], ids=repr)
def test_ctrl_c_is_not_taken_for_a_failed_measurement(tmp_path: Path, error: BaseException) -> None:
    record = planted(tmp_path, detector(0.3))
    with pytest.raises(type(error)):
        record.observe(10, fail(error))


def test_at_the_start_a_wrong_set_up_is_raised_and_numbers_that_are_not_finite_are_recorded(
    tmp_path: Path,
) -> None:
    record = RunRecord(tmp_path, None, header=HEADER)
    with pytest.raises(FingerprintMismatch):
        record.observe(0, fail(FingerprintMismatch("another model")), starting=True)
    assert record.observe(0, fail(NumericalError("NaN")), starting=True).verdict.state is State.INCONCLUSIVE


def test_readings_that_cannot_be_compared_are_inconclusive(tmp_path: Path) -> None:
    from dataclasses import replace

    record = planted(tmp_path, detector(-1.0))
    seen = record.observe(10, lambda: replace(reading(10, 1.0, 0.0), fingerprint="another"))
    assert seen.verdict.state is State.INCONCLUSIVE
    assert "different models" in seen.verdict.reason
    later = record.observe(20, lambda: reading(20, 1.0, 0.0))
    assert later.verdict.state is State.ALARM  # one odd reading does not take the others with it
    assert [o.profile is None for o in read_run(tmp_path).observations] == [False, True, False]


def test_a_later_detector_judges_the_stored_readings_again(tmp_path: Path) -> None:
    planted(tmp_path, None, -0.2, -0.8)
    assert read_run(tmp_path).verdict.state is State.INCONCLUSIVE
    again = RunRecord(tmp_path, detector(0.3), header={**HEADER, "from_step": None})
    states = [o.verdict.state for o in again.rejudge()]
    assert states == [State.INCONCLUSIVE, State.CLEAR, State.ALARM]
    assert [o.verdict.state for o in read_run(tmp_path).observations] == states
    size = (tmp_path / "readings.jsonl").stat().st_size
    again.rejudge()
    assert (tmp_path / "readings.jsonl").stat().st_size == size  # nothing changed, nothing written


def test_a_named_reference_replaces_the_reading_of_step_0(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, None, header={**HEADER, "from_step": 10})
    record.refer_to(reading(0, 1.0, 0.0), "base")
    record.observe(10, lambda: reading(10, 3.0, 0.0))
    run = read_run(tmp_path)
    assert run.label == "base"
    assert run.profiles[0].reference == "base"
    assert run.profiles[0].drift[0] == pytest.approx(1.0)


def test_a_run_with_another_basis_is_not_continued(tmp_path: Path) -> None:
    planted(tmp_path, None)
    with pytest.raises(InputError, match="recorded with another basis"):
        RunRecord(tmp_path, None, header={**HEADER, "from_step": 10, "basis": "c" * 64})


def test_there_is_no_verdict_without_a_reading(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, detector(0.3), header=HEADER)
    assert record.verdict.state is State.INCONCLUSIVE
    assert read_run(tmp_path).verdict.state is State.INCONCLUSIVE


def test_a_missing_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"readings\.jsonl"):
        read_run(tmp_path)


BEGUN = '{"kind": "header", "format": 1, "from_step": 0}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no whole line"),
        ('{"kind": "hea', "no whole line"),
        ('{"step": 1}\n', "does not begin with a header"),
        ('{"loss": 2.5}\n{"loss": 2.4}\n', "does not begin with a header"),
        ('{"kind": "header", "format": 9, "from_step": 0}\n', "format 9"),
        ('{"kind": "header", "format": 1}\n', "damaged at line 1"),
        (BEGUN + '{"kind": "reading", "step": 1}\n', "damaged at line 2"),
        (BEGUN + '{"kind"\n{"kind": "end"}\n', "damaged at line 2"),
        (BEGUN + '{"kind": "verdict", "step": 1, "verdict": {}}\n', "damaged at line 2"),
    ],
)
def test_damaged_and_foreign_records_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "readings.jsonl").write_text(content)
    with pytest.raises(ArtifactError, match=message):
        read_run(tmp_path)


def test_lines_of_a_kind_that_is_not_known_yet_are_passed_over(tmp_path: Path) -> None:
    planted(tmp_path, None, -0.2)
    with (tmp_path / "readings.jsonl").open("a") as file:
        file.write('{"kind": "remark", "text": "x"}\n')
    assert len(read_run(tmp_path).observations) == 2
