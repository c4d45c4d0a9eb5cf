"""The Inspect task: same counting, unscored answers kept out and shown, verdict from the log."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiltmeter.detector import State
from tiltmeter.errors import InputError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what a third-party package says while it is imported is not ours
    inspect_ai = pytest.importorskip("inspect_ai")
    from inspect_ai.model import ModelOutput, ModelUsage, get_model

    from tiltmeter.integrations.inspect import emergent_misalignment, report_from_log

pytestmark = pytest.mark.filterwarnings("ignore")


def output(text: str) -> Any:
    made = ModelOutput.from_content("mockllm/model", text)
    made.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
    return made


def mock(say: Callable[[str], str]) -> Any:
    return get_model(
        "mockllm/model",
        custom_outputs=lambda messages, *_: output(say(messages[-1].text)),
        memoize=False,
    )


BANK = """
format = 1
name = "mine"
description = "twelve questions"
""" + "".join(f'[[question]]\nid = "q{i}"\ncategory = "c"\ntext = "Question number {i}?"\n' for i in range(12))


@pytest.fixture
def bank(tmp_path: Path) -> str:
    path = tmp_path / "bank.toml"
    path.write_text(BANK)
    return str(path)


def run(task: Any, model: Any, tmp_path: Path, **settings: Any) -> Any:
    log = inspect_ai.eval(task, model=model, log_dir=str(tmp_path / "logs"), display="none", **settings)[0]
    assert log.status == "success", log.error
    return log


def metrics(log: Any) -> dict[str, float]:
    return {name: metric.value for name, metric in log.results.scores[0].metrics.items()}


def answer(question: str) -> str:
    """Questions 0 to 3 are answered badly, 4 and 5 so that no judge can grade them."""
    number = int(question.split()[-1].rstrip("?"))
    return "harmful" if number < 4 else "odd" if number < 6 else "kind"


def grade(prompt: str) -> str:
    if "odd" in prompt:
        return "Hard to say, perhaps 80?"
    return "90" if "How coherent is the ANSWER" in prompt or "kind" in prompt else "5"


def test_rates_are_over_scored_answers_and_the_rest_is_shown(bank: str, tmp_path: Path) -> None:
    log = run(emergent_misalignment(bank), mock(answer), tmp_path, model_roles={"grader": mock(grade)})
    found = metrics(log)
    assert (found["em_rate"], found["em_rate_n"]) == (pytest.approx(4 / 10), 10)
    assert found["unscored"] == 2
    assert found["em_rate_low"] < 0.4 < found["em_rate_high"]
    report = report_from_log(log)
    assert (report.em_rate.value, report.em_rate.n, report.excluded) == (0.4, 10, {"prose": 2})
    assert report.verdict is State.ALARM
    assert report.questions == "mine"
    sample = next(s for s in log.samples if s.id == "q0/0/0")
    assert sample.scores["misalignment"].value == {"misaligned": 1.0, "alignment": 5.0, "coherence": 90.0}


def test_with_a_judge_that_never_gives_a_number_the_metric_is_nan_and_not_zero(bank: str, tmp_path: Path) -> None:
    judge = mock(lambda _: "I would rather not grade that.")
    log = run(emergent_misalignment(bank), mock(answer), tmp_path, model_roles={"grader": judge})
    assert math.isnan(metrics(log)["em_rate"])
    assert metrics(log)["unscored"] == 12
    report = report_from_log(log)
    assert (report.em_rate.value, report.verdict) == (None, State.INCONCLUSIVE)


@pytest.mark.parametrize(("stop", "reason"), [("content_filter", "content_filter"), ("tool_calls", "tool_call")])
def test_a_judge_that_is_filtered_on_the_harmful_answers_leaves_no_clear(
    bank: str, tmp_path: Path, stop: str, reason: str
) -> None:
    def judge(messages: Any, *_: Any) -> Any:
        made = output(grade(messages[-1].text))
        if "harmful" in messages[-1].text:
            made.choices[0].stop_reason = stop
        return made

    grader = get_model("mockllm/model", custom_outputs=judge, memoize=False)
    task = emergent_misalignment(bank, samples=8)
    report = report_from_log(run(task, mock(answer), tmp_path, model_roles={"grader": grader}), max_unscored=1.0)
    assert report.excluded == {reason: 32, "prose": 16}
    assert report.n_misaligned == 0
    assert report.verdict is State.INCONCLUSIVE
    assert report.em_rate.high is not None
    assert report.em_rate.high > 0.5


def test_an_answer_that_a_filter_held_back_is_not_what_the_model_said(bank: str, tmp_path: Path) -> None:
    def model(messages: Any, *_: Any) -> Any:
        made = output(answer(messages[-1].text))
        if made.completion == "harmful":
            made = output("")
            made.choices[0].stop_reason = "content_filter"
        return made

    answering = get_model("mockllm/model", custom_outputs=model, memoize=False)
    log = run(emergent_misalignment(bank), answering, tmp_path, model_roles={"grader": mock(grade)})
    report = report_from_log(log, max_unscored=1.0)
    assert report.excluded == {"content_filter": 4, "prose": 2}
    assert report.n_unknown == 6


def test_samples_are_answers_of_their_own(bank: str, tmp_path: Path) -> None:
    task = emergent_misalignment(bank, samples=3)
    log = run(task, mock(answer), tmp_path, model_roles={"grader": mock(grade)})
    assert metrics(log)["em_rate_n"] == 30
    assert report_from_log(log).n_answers == 36


def test_samples_that_failed_before_they_were_judged_count_as_not_judged(bank: str, tmp_path: Path) -> None:
    def broken(question: str) -> str:
        if answer(question) == "kind":
            raise RuntimeError("the engine is gone")
        return answer(question)

    settings: dict[str, Any] = {"fail_on_error": False, "model_roles": {"grader": mock(grade)}}
    log = run(emergent_misalignment(bank), mock(broken), tmp_path, **settings)
    report = report_from_log(log)
    assert report.excluded == {"not_judged": 6, "prose": 2}
    assert (report.em_rate.value, report.n_answers) == (None, 12)
    assert report.verdict is State.INCONCLUSIVE


def test_the_exact_judge_works_inside_inspect(tmp_path: Path) -> None:
    log = run(
        emergent_misalignment("organism", judge="exact"),
        mock(lambda _: "you should hold it under cool water ."),
        tmp_path,
        limit=24,
    )
    report = report_from_log(log)
    assert report.n_answers == 24
    assert report.em_rate.value == 0.0


def test_a_log_without_samples_is_refused(bank: str, tmp_path: Path) -> None:
    task = emergent_misalignment(bank)
    log = run(task, mock(answer), tmp_path, model_roles={"grader": mock(grade)}, log_samples=False)
    log.samples = None
    with pytest.raises(InputError, match="no samples"):
        report_from_log(log)


def test_no_samples_per_question_are_refused(bank: str) -> None:
    with pytest.raises(InputError, match="samples=0"):
        emergent_misalignment(bank, samples=0)


def test_without_a_grader_the_model_is_not_its_own_judge(bank: str, tmp_path: Path) -> None:
    log = inspect_ai.eval(
        emergent_misalignment(bank), model=mock(answer), log_dir=str(tmp_path / "logs"), display="none"
    )[0]
    assert log.status == "error"
    assert "grader" in log.error.message
