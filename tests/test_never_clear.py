"""Whatever says a verdict or a rate, says neither CLEAR nor 0 of what is no sound number.

The functions are found by their return annotations: a new one fails `test_every_function_is_walked` until it stands in
CASES, with what it is to be given of each kind of unsound input, or in ELSEWHERE, with the reason.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import test_detector
import test_guard
import test_judge_distilled
import test_likelihood
import test_readings
import tiltmeter
from tiltmeter.answers import JudgedAnswer
from tiltmeter.behavior import aggregate_file
from tiltmeter.detector import Detector, State, Verdict, fit_detector
from tiltmeter.guard import SteeringGuard, Trace, fit_trace
from tiltmeter.intervals import Rate, rate_of, wilson
from tiltmeter.judge import Reason, Score, Unscored
from tiltmeter.judge_distilled import DistilledJudge, fit_judge, score_rows
from tiltmeter.judge_encoders import NgramEncoder
from tiltmeter.likelihood import LikelihoodDetector
from tiltmeter.observations import Observation, first_alarm, overall
from tiltmeter.questions import Question
from tiltmeter.rates import aggregate
from tiltmeter.readings import RunRecord, read_run
from tiltmeter.transfer import Danger, PositionRun, TransferDetector, fit_transfer
from tiltmeter.verdicts import compare, decide, inconclusive

KINDS = ("nan", "+inf", "-inf", "empty", "missing", "None", "wrong shape")
NUMBERS = {"nan": np.nan, "+inf": np.inf, "-inf": -np.inf}
REFUSALS = (tiltmeter.TiltmeterError, TypeError, ValueError, AttributeError)
Given = dict[str, Callable[[], Any]]

# ---------------------------------------------------------------------- what there is to walk


def modules() -> Iterator[Any]:
    for found in pkgutil.walk_packages(tiltmeter.__path__, "tiltmeter."):
        if not found.name.startswith("tiltmeter.integrations"):  # of packages that need not be installed
            yield importlib.import_module(found.name)


def names_in(annotation: object) -> set[str]:
    return set(re.findall(r"\w+", annotation if isinstance(annotation, str) else str(annotation)))


@cache
def bearing() -> frozenset[str]:
    """Names of the types that hold a verdict, a state or a rate, at any depth."""
    held: dict[str, set[str]] = {}  # two classes of one name count as one
    for module in modules():
        for one in vars(module).values():
            ours = inspect.isclass(one) and one.__module__.startswith("tiltmeter")
            if ours and (dataclasses.is_dataclass(one) or hasattr(one, "_fields")):
                fields = getattr(one, "__annotations__", {}).values()
                held.setdefault(one.__name__, set()).update(*map(names_in, fields))
    found = {"State", "Verdict", "Rate"}
    while new := {name for name, names in held.items() if names & found} - found:
        found |= new
    return frozenset(found)


def walked() -> set[str]:
    """Public functions, methods and properties whose return annotation names such a type."""
    found = set()
    for module in modules():
        home = module.__name__.removeprefix("tiltmeter.")
        for name, one in vars(module).items():
            if name.startswith("_") or getattr(one, "__module__", None) != module.__name__:
                continue
            members = {f"{home}.{name}": one}
            if inspect.isclass(one):
                members = {f"{home}.{name}.{k}": v for k, v in vars(one).items() if not k.startswith("_")}
            for where, member in members.items():
                inner = member.fget if isinstance(member, property) else getattr(member, "func", member)
                inner = inspect.unwrap(getattr(inner, "__func__", inner)) if callable(inner) else inner
                if inspect.isfunction(inner) and names_in(inner.__annotations__.get("return", "")) & bearing():
                    found.add(where)
    return found


# ---------------------------------------------------------------------- subjects


@cache
def drift_detector() -> Detector:
    return fit_detector(test_detector.calibration(), false_alarm_rate=0.2)


def profile(*drift: float, **changes: Any) -> Any:
    return test_detector.profile(np.array(drift), **changes)


@cache
def transfer_detector() -> TransferDetector:
    rng = np.random.default_rng(0)
    runs = [PositionRun(name, False, rng.normal(size=(3, 4))) for name in "abcdef" for _ in range(4)]
    return fit_transfer(Danger(np.eye(4)[0], ("another",), float("nan")), runs, false_alarm_rate=0.2)


def likelihood_detector() -> LikelihoodDetector:
    return test_likelihood.detector(**test_likelihood.FOUR)


@cache
def heard() -> tuple[SteeringGuard, Trace]:
    trace, kinds = test_guard.TestKinds().trace(list("abc"), 40, 0)
    return fit_trace(trace, false_alarm_rate=0.1, kinds=kinds), trace


@cache
def distilled() -> DistilledJudge:
    return fit_judge(test_judge_distilled.TRAINING, NgramEncoder(64), calibration=test_judge_distilled.CALIBRATION)


KIND_ANSWERS = test_judge_distilled.pairs(test_judge_distilled.answers("new", 0.0, seed=9))


@dataclasses.dataclass(frozen=True)
class Blind:
    """An encoder of one number throughout."""

    number: float
    width: int
    spec: str = "blind"

    def encode(self, pairs: Any) -> Any:
        return np.full((len(pairs), self.width), self.number)


def blind(number: float, width: int | None = None) -> DistilledJudge:
    return replace(distilled(), encoder=Blind(number, width or len(distilled().weights)))


def seen(step: int, verdict: Verdict, *, read: bool = True) -> Observation:
    return Observation(step, test_readings.reading(step, 0.1, 0.0) if read else None, None, verdict)


def clear(score: Any = 0.1, threshold: Any = 0.3) -> Verdict:
    return replace(inconclusive("made up."), state=State.CLEAR, score=score, threshold=threshold)


def record(folder: Path, *read: Any) -> RunRecord:
    """A record of a run of these readings; what is no reading fails."""
    folder.mkdir(parents=True)
    kept = RunRecord(folder, test_readings.detector(0.3), header=test_readings.HEADER)
    kept.observe(0, lambda: test_readings.reading(0))
    for number, one in enumerate(read, start=1):
        kept.observe(10 * number, lambda one=one: one() if callable(one) else one)
    return kept


def broken_reading(kind: str) -> Any:
    good = test_readings.reading(10, 0.1, 0.0)
    if kind in NUMBERS:
        return replace(good, values=np.full_like(good.values, NUMBERS[kind]))
    if kind == "None":
        return None
    shape = {"empty": (0, 2), "missing": (2, 2), "wrong shape": (3, 5)}[kind]  # missing: one prompt of three
    return lambda: replace(good, values=np.ones(shape, np.float32), norms=np.ones(shape[0], np.float32))


def edited(folder: Path, **changes: Any) -> Path:
    """A recorded run whose last verdict somebody has edited."""
    record(folder, test_readings.reading(10, 0.1, 0.0))
    lines = (folder / "readings.jsonl").read_text().splitlines()
    at = max(i for i, line in enumerate(lines) if json.loads(line)["kind"] == "verdict")
    row = json.loads(lines[at])
    row["verdict"] |= changes
    lines[at] = json.dumps(row)
    (folder / "readings.jsonl").write_text("\n".join(lines) + "\n")
    return folder


EDITS: dict[str, dict[str, Any]] = {
    "nan": {"score": float("nan")}, "+inf": {"score": float("inf")}, "-inf": {"threshold": float("-inf")},
    "empty": {"score": ""}, "missing": {"threshold": None}, "None": {"score": None}, "wrong shape": {"score": [0.1]},
}  # fmt: skip


def judged(alignment: Any, coherence: Any = 90.0) -> JudgedAnswer:
    return JudgedAnswer(Question(id="q", text="Why?", category="x"), "Because.", Score(alignment, coherence))


def unscored(n: int) -> list[JudgedAnswer]:
    silent = Unscored(Reason.UNPARSABLE)
    return [JudgedAnswer(Question(id=f"q{i}", text="Why?", category="x"), "Because.", silent) for i in range(n)]


def table(folder: Path, alignment: Any, *, rows: int = 200) -> Path:
    folder.mkdir(parents=True)
    path = folder / "judged.jsonl"
    row = {"question": "Why?", "answer": "So.", "alignment": alignment, "coherence": 90}
    path.write_text("".join(json.dumps({**row, "question": f"Why {i}?"}) + "\n" for i in range(rows)))
    return path


def each(make: Callable[[Any], Any], **rest: Callable[[], Any]) -> Given:
    """The three numbers that are none, and what is given of the other kinds."""
    return {kind: (lambda value=value: make(value)) for kind, value in NUMBERS.items()} | rest


# ---------------------------------------------------------------------- cases


def cases(tmp: Path) -> dict[str, tuple[Callable[[], Any], Given]]:
    """Per function: a call that gives CLEAR or a rate of 0 (None where none can), and calls that must not."""
    drift, moved, likely = drift_detector(), transfer_detector(), likelihood_detector()
    guard, trace = heard()
    calm, good = np.zeros((2, 4)), test_readings.reading(10, 0.1, 0.0)
    base = test_likelihood.BASE

    def guarded(judge: Callable[[Trace], Any]) -> Given:
        return each(
            lambda v: judge(replace(trace, answer=np.full_like(trace.answer, v))),
            empty=lambda: judge(trace.take(np.zeros(len(trace.tokens), bool))),
            missing=lambda: judge(replace(trace, tokens=0 * trace.tokens, answer=np.full_like(trace.answer, np.nan))),
            None_=lambda: judge(None),  # type: ignore[arg-type]
            wrong_shape=lambda: judge(replace(trace, answer=trace.answer[:, :, :1])),
        )

    def texts(judge: Callable[[DistilledJudge, Any], Any]) -> Given:
        return each(
            lambda v: judge(blind(v), KIND_ANSWERS),
            empty=lambda: judge(distilled(), []),
            missing=lambda: judge(distilled(), [(q, " ") for q, _ in KIND_ANSWERS]),
            None_=lambda: judge(distilled(), [(q, None) for q, _ in KIND_ANSWERS]),
            wrong_shape=lambda: judge(blind(0.0, 3), KIND_ANSWERS),
        )

    def recorded(look: Callable[[RunRecord], Any], name: str) -> Given:
        return {
            kind: (lambda kind=kind: look(record(tmp / name / kind.replace(" ", ""), broken_reading(kind))))
            for kind in KINDS
        }

    def from_file(look: Callable[[Path], Any], name: str) -> Given:
        return {
            kind: (lambda kind=kind: look(edited(tmp / name / kind.replace(" ", ""), **EDITS[kind]))) for kind in KINDS
        }

    def set_of(look: Callable[[list[Observation]], Any]) -> Given:
        hole = seen(20, inconclusive("it could not be read."), read=False)
        return each(
            lambda v: look([seen(10, clear()), seen(20, clear(score=v))]),
            empty=lambda: look([]),
            missing=lambda: look([seen(10, clear()), hole]),
            None_=lambda: look([seen(10, clear(score=None))]),
            wrong_shape=lambda: look([seen(10, clear(score=np.zeros(2)))]),
        )

    def counted(value: Any) -> Any:
        return aggregate([judged(value) for _ in range(200)])

    return {
        "detector.Detector.predict": (
            lambda: drift.predict(profile(0, 0, 0)),
            each(
                lambda v: drift.predict([profile(0, 0, 0), profile(0, v, 0, step=20)]),
                empty=lambda: drift.predict([]),
                missing=lambda: drift.predict([profile(0, 0, 0, problem="it could not be read")]),
                None_=lambda: drift.predict([profile(0, 0, 0), None]),  # type: ignore[list-item]
                wrong_shape=lambda: drift.predict(profile(0, 0, 0, drift=np.zeros(4))),
            ),
        ),
        "transfer.TransferDetector.predict": (
            lambda: moved.predict(calm[:1]),
            each(
                lambda v: moved.predict(np.vstack([calm[:1], np.full((1, 4), v)])),
                empty=lambda: moved.predict(np.zeros((0, 4))),
                missing=lambda: moved.predict(calm, steps=[1]),
                None_=lambda: moved.predict(None),  # type: ignore[arg-type]
                wrong_shape=lambda: moved.predict(np.zeros((2, 3))),
            ),
        ),
        "likelihood.LikelihoodDetector.predict": (
            lambda: likely.predict([test_likelihood.reading(0.5, 0.0, noise=0.1)]),
            each(
                lambda v: likely.predict([base + v]),
                empty=lambda: likely.predict([]),
                missing=lambda: likely.predict([base[:-1]]),
                None_=lambda: likely.predict([None]),  # type: ignore[list-item]
                wrong_shape=lambda: likely.predict([base.T]),
            ),
        ),
        "guard.SteeringGuard.judge": (lambda: guard.judge(trace), guarded(guard.judge)),
        "guard.SteeringGuard.judge_model": (lambda: guard.judge_model(trace), guarded(guard.judge_model)),
        "judge_distilled.DistilledJudge.verdict": (
            lambda: distilled().verdict(KIND_ANSWERS), texts(lambda judge, pairs: judge.verdict(pairs)),
        ),
        "judge_distilled.score_rows": (lambda: score_rows(distilled(), KIND_ANSWERS)[0], texts(score_rows)),
        "verdicts.compare": (
            lambda: compare(0.1, 0.3),
            each(
                lambda v: [compare(v, 0.3), compare(0.1, v), compare(v, v)],
                empty=lambda: compare(np.zeros(0), 0.3),  # type: ignore[arg-type]
                missing=lambda: compare(None, None),
                None_=lambda: [compare(None, 0.3), compare(0.1, None)],
                wrong_shape=lambda: compare(np.zeros(2), 0.3),  # type: ignore[arg-type]
            ),
        ),
        "verdicts.decide": (
            lambda: decide(drift, [0.0], [1], calibrated_on="x"),
            each(
                lambda v: decide(drift, [0.0, v], [1, 2], calibrated_on="x"),
                empty=lambda: decide(drift, [], [], calibrated_on="x"),
                missing=lambda: decide(drift, [0.0], [1, 2], calibrated_on="x"),
                None_=lambda: decide(drift, [None], [1], calibrated_on="x"),  # type: ignore[list-item]
                wrong_shape=lambda: decide(drift, [[0.0], [0.0]], [1, 2], calibrated_on="x"),
            ),
        ),
        "observations.overall": (lambda: overall([seen(10, clear())]), set_of(overall)),
        "observations.first_alarm": (None, set_of(first_alarm)),
        "readings.read_run": (
            lambda: read_run(edited(tmp / "fine", score=0.1)).observations[-1].verdict,
            from_file(lambda folder: [o.verdict for o in read_run(folder).observations], "read"),
        ),
        "readings.RunReadings.verdict": (
            lambda: read_run(edited(tmp / "fine-2", score=0.1)).verdict,
            from_file(lambda folder: read_run(folder).verdict, "reread"),
        ),
        "readings.RunRecord.observe": (
            lambda: record(tmp / "seen", good).observations[-1].verdict,
            recorded(lambda kept: kept.observations[-1].verdict, "observe"),
        ),
        "readings.RunRecord.observations": (
            lambda: record(tmp / "all", good).observations[-1].verdict,
            recorded(lambda kept: [o.verdict for o in kept.observations], "observations"),
        ),
        "readings.RunRecord.verdict": (
            lambda: record(tmp / "one", good).verdict, recorded(lambda kept: kept.verdict, "verdict"),
        ),
        "readings.RunRecord.rejudge": (
            lambda: record(tmp / "again", good).rejudge()[-1].verdict,
            recorded(lambda kept: [o.verdict for o in kept.rejudge()], "rejudge"),
        ),
        "readings.RunRecord.miss": (
            None, {kind: (lambda k=kind: record(tmp / f"miss-{k[:4]}", good).miss(30, k).verdict) for kind in KINDS},
        ),
        "rates.aggregate": (
            lambda: counted(100.0).em_rate,
            each(
                counted,
                empty=lambda: aggregate([]),
                missing=lambda: aggregate(unscored(200)),
                None_=lambda: counted(None),
                wrong_shape=lambda: counted(np.zeros(2)),
            ),
        ),
        "intervals.rate_of": (
            lambda: rate_of([False] * 200, list(range(200))),
            each(
                lambda v: rate_of([v] * 200, list(range(200))),
                empty=lambda: rate_of([], []),
                missing=lambda: rate_of([False] * 200, []),
                None_=lambda: rate_of(None, [1]),  # type: ignore[arg-type]
                wrong_shape=lambda: rate_of(np.zeros((2, 2), bool), [1, 2]),  # type: ignore[arg-type]
            ),
        ),
        "intervals.wilson": (
            lambda: wilson(0, 200),
            each(
                lambda v: wilson(v, 200),  # type: ignore[arg-type]
                empty=lambda: wilson(0, 0),
                missing=lambda: wilson(0, None),  # type: ignore[arg-type]
                None_=lambda: wilson(None, 200),  # type: ignore[arg-type]
                wrong_shape=lambda: wilson([0, 0], 200),  # type: ignore[arg-type]
            ),
        ),
        "behavior.aggregate_file": (
            lambda: aggregate_file(table(tmp / "judged", 100)).em_rate,
            each(
                lambda v: aggregate_file(table(tmp / f"judged {v}", v)),
                empty=lambda: aggregate_file(table(tmp / "judged 0", 100, rows=0)),
                missing=lambda: aggregate_file(table(tmp / "judged -", "")),
                None_=lambda: aggregate_file(table(tmp / "judged None", None)),
                wrong_shape=lambda: aggregate_file(table(tmp / "judged []", [100, 100])),
            ),
        ),
    }  # fmt: skip


MODEL = "reads or asks a model, and leaves the verdict to a function that is walked"
PAGE = "lays out a verdict that was made before"
COUNTS = "shows counts of a study, whose verdicts come from functions that are walked"
ONE = "scores one answer, or reads such scores; what they make of a model is counted by rates.aggregate"
ELSEWHERE = {
    "answers.read_answer_file": ONE,
    "answers.read_answers": ONE,
    "judge.ExactJudge.score": ONE,
    "judge.Judge.score": ONE,
    "judge.judge_all": ONE,
    "judge.outcome_from_dict": ONE,
    "judge_model.ElementJudge.score": ONE,
    "judge_model.RatingJudge.score": ONE,
    "studies.dose_response.run": COUNTS,
    "studies.judge_distillation.distill": COUNTS,
    "studies.trait_run.run": COUNTS,
    "behavior.evaluate": MODEL,
    "evaluate.evaluate_from_options": MODEL,
    "organism.conduct.examine": MODEL,
    "scan.judge_likelihoods": MODEL,
    "scan.judge_model": MODEL,
    "scan.judge_source": MODEL,
    "scan.scan": MODEL,
    "scan.scan_likelihoods": MODEL,
    "watch.TiltmeterCallback.observations": MODEL,
    "watch.TiltmeterCallback.verdict": MODEL,
    "watch.watch": MODEL,
    "report.collect.behavior_report_data": PAGE,
    "report.collect.behavior_section": PAGE,
    "report.collect.run_report_data": PAGE,
    "studies.cells.Tally.rate": COUNTS,
    "studies.demo.run": MODEL,
    "studies.demo.Story.last": COUNTS,
    "studies.organism_report.judge_run": COUNTS,
    "studies.organism_report.run": COUNTS,
    "studies.steered.Counts.coherence": COUNTS,
    "studies.steered.Counts.em": COUNTS,
    "studies.steered.Counts.em_coherent": COUNTS,
    "studies.steered.Counts.relevance": COUNTS,
    "verdicts.Verdict.noting": "adds to the reason of a verdict that was made before",
    "verdicts.inconclusive": "says nothing but INCONCLUSIVE",
}
ALL = sorted(
    {
        "behavior.aggregate_file", "detector.Detector.predict", "guard.SteeringGuard.judge",
        "guard.SteeringGuard.judge_model", "judge_distilled.DistilledJudge.verdict", "judge_distilled.score_rows",
        "likelihood.LikelihoodDetector.predict", "observations.first_alarm", "observations.overall", "rates.aggregate",
        "intervals.rate_of", "intervals.wilson",
        "readings.RunReadings.verdict", "readings.RunRecord.miss", "readings.RunRecord.observations",
        "readings.RunRecord.observe", "readings.RunRecord.rejudge", "readings.RunRecord.verdict", "readings.read_run",
        "transfer.TransferDetector.predict", "verdicts.compare", "verdicts.decide",
    }
)  # fmt: skip


def safety_in(value: object) -> Iterator[str]:
    """Every CLEAR and every rate of 0 that an answer holds, at any depth."""
    if value == State.CLEAR:
        yield "CLEAR"
    elif isinstance(value, Rate):
        if value.value is not None and not value.value > 0:
            yield f"a rate of {value.value}"
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from safety_in(getattr(value, field.name))
    elif isinstance(value, tuple | list):
        for one in value:
            yield from safety_in(one)
    elif isinstance(value, dict):
        yield from safety_in(list(value.values()))


def test_every_function_is_walked(tmp_path: Path) -> None:
    assert walked() == {*ALL, *ELSEWHERE}
    assert set(cases(tmp_path)) == set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_what_is_no_sound_number_is_neither_clear_nor_a_rate_of_zero(name: str, tmp_path: Path) -> None:
    sound, unsound = cases(tmp_path)[name]
    unsound = {kind.rstrip("_").replace("_", " "): call for kind, call in unsound.items()}
    assert set(unsound) == set(KINDS)
    if sound is not None:
        assert list(safety_in(sound())), "the same call with sound numbers is never CLEAR: the case shows nothing"
    for kind, call in unsound.items():
        try:
            with np.errstate(all="ignore"):
                found = list(safety_in(call()))
        except REFUSALS:
            continue
        assert not found, f"{name} says {found} of {kind}"
