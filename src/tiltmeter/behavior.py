"""Behavior: what a model says when it is asked, judged and counted.

`evaluate` puts a bank of questions to a model, has the answers judged and counts them; `aggregate_file` only
counts answers that were judged elsewhere. What the rates, intervals and verdicts mean is said in `rates`.

Every answer and every judgement is on the disk as soon as it is there, so a run that is killed goes on where
it stopped: nothing is judged twice and nothing is lost.

It knows nothing of activations. How answers are written is the writer's business (an `LM`, or another
engine), how they are judged the judge's.

    >>> report = evaluate(lm, load_questions("general"), judge, samples=1)     # doctest: +SKIP
    >>> report.em_rate, report.verdict                                         # doctest: +SKIP
    (Rate(value=0.0, n=96, low=0.0, high=0.038), <State.CLEAR: 'CLEAR'>)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np

from tiltmeter.answers import JudgedAnswer, read_answer_file, write_answers
from tiltmeter.errors import ArtifactError, InputError
from tiltmeter.judge import (
    Judge,
    Outcome,
    Unscored,
    Writer,
    digest,
    judge_all,
    outcome_from_dict,
    outcome_to_dict,
)
from tiltmeter.locks import hold
from tiltmeter.questions import Question, QuestionBank
from tiltmeter.rates import (
    MAX_UNSCORED,
    MIN_SCORED,
    THRESHOLD,
    BehaviorReport,
    Limits,
    aggregate,
    agreement,
    alignment_change,
)
from tiltmeter.runs import Records, RunDir, write_json

if TYPE_CHECKING:
    from tiltmeter.lm import LM

__all__ = ["BehaviorReport", "aggregate", "aggregate_file", "evaluate"]

CHUNK = 128  # answers written at a time; part of what a seed means, so not an option

Progress = Callable[[int, int, str], None]


def aggregate_file(
    path: str | Path,
    *,
    question: str | None = None,
    answer: str | None = None,
    alignment: str | None = None,
    coherence: str | None = None,
    category: str | None = None,
    scale: str | None = None,
    higher_is_worse: bool | None = None,
    min_scored: int = MIN_SCORED,
    max_unscored: float = MAX_UNSCORED,
    threshold: float = THRESHOLD,
) -> BehaviorReport:
    """Count answers that were judged elsewhere; `answers.read_answer_file` says how it is read.

    Raises:
        InputError: the file or a column cannot be used, or a limit is out of range.
    """
    read = read_answer_file(
        path,
        question=question,
        answer=answer,
        alignment=alignment,
        coherence=coherence,
        category=category,
        scale=scale,
        higher_is_worse=higher_is_worse,
    )
    return aggregate(
        read.answers,
        doubled=read.doubled,
        min_scored=min_scored,
        max_unscored=max_unscored,
        threshold=threshold,
        questions=Path(path).name,
        judge="judged elsewhere",
    )


def evaluate(
    lm: Writer,
    questions: QuestionBank,
    judge: Judge,
    *,
    samples: int = 1,
    out: str | Path | None = None,
    seed: int = 0,
    temperature: float = 1.0,
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    min_scored: int = MIN_SCORED,
    max_unscored: float = MAX_UNSCORED,
    threshold: float = THRESHOLD,
    second: Judge | None = None,
    reference: Writer | Literal["base"] | None = None,
    progress: Progress | None = None,
    resume: bool = True,
) -> BehaviorReport:
    """Ask a model all questions, have its answers judged, and count.

    With `out`, every answer and every judgement is on the disk as soon as it is there. A run that was killed
    goes on where it stopped when it is started again: what was judged is not judged again, except for answers
    that an endpoint failed on (no connection, timeout, 429, 5xx), which are tried once more. The folder holds
    manifest.json, generated.jsonl, judgements.jsonl, and at the end answers.jsonl and report.json; with a
    reference, the same under reference/.

    Args:
        lm: who answers.
        questions: what is asked.
        judge: who judges.
        samples: answers per question.
        out: a folder for the results; None keeps them in memory.
        seed: of the sampling; a question's answers do not change with the batch size.
        temperature: of the sampling; 0 is greedy.
        max_new_tokens: longest answer; None means 600 (as in arXiv 2606.07631), or half of the model's
            context if that is less.
        batch_size: answers written at once.
        min_scored: see `aggregate`.
        max_unscored: see `aggregate`.
        threshold: see `aggregate`.
        second: a second judge, for the agreement; the rates are the first one's.
        reference: the untouched model, to be asked the same; "base" switches the adapter of `lm` off for it.
        progress: called with (done, in all, what is done).
        resume: go on with a run that `out` already holds; False refuses such a folder.

    Raises:
        InputError: an argument is out of range, or `out` holds a run with other settings.
        BudgetExceeded: the judge's budget is spent; what was judged is kept in `out`.
        JudgeError: the judge cannot be used.
        StorageError: `out` cannot be written, or another process writes into it.
    """
    limits = Limits(min_scored, max_unscored, threshold)
    limits.check()
    if max_new_tokens is None:
        max_new_tokens = _longest_answer(lm)
    if samples < 1 or not temperature >= 0 or max_new_tokens < 1 or batch_size < 1 or seed < 0:
        raise InputError(
            f"got samples={samples}, temperature={temperature}, max_new_tokens={max_new_tokens}, batch_size="
            f"{batch_size} and seed={seed}; counts start at 1, temperature and seed at 0"
        )
    base: AbstractContextManager[Writer | None]
    base = _without_adapter(lm) if isinstance(reference, str) else nullcontext(reference)
    draw = _Draw(questions, samples, seed, temperature, max_new_tokens, batch_size)
    folder = None if out is None else Path(out)
    with nullcontext() if folder is None else hold(folder, "evaluation"):
        report = _evaluate_one(lm, draw, judge, second, folder, limits, progress, resume)
        with base as untouched:
            if untouched is not None:
                there = None if folder is None else folder / "reference"
                beside = _evaluate_one(untouched, draw, judge, None, there, limits, progress, resume)
                change = alignment_change(report.answers, beside.answers)
                report = replace(report, reference=beside, alignment_change=change)
        if folder is not None:
            write_json(folder / "report.json", report.to_dict())
        return report


@runtime_checkable
class _Loaded(Protocol):
    """What tells an `LM` from another engine, without importing torch for those that need none."""

    adapter: str | None

    def fingerprint(self) -> Any: ...
    def base(self) -> Any: ...


class _Draw(NamedTuple):
    """Which answers to write."""

    bank: QuestionBank
    samples: int
    seed: int
    temperature: float
    max_new_tokens: int
    batch_size: int

    @property
    def asked(self) -> list[tuple[Question, int]]:
        return [(question, sample) for sample in range(self.samples) for question in self.bank.questions]

    def settings(self) -> dict[str, Any]:
        return {
            "questions": self.bank.name,
            "questions_digest": self.bank.digest,
            "samples": self.samples,
            "seed": self.seed,
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
        }


def _evaluate_one(
    lm: Writer,
    draw: _Draw,
    judge: Judge,
    second: Judge | None,
    folder: Path | None,
    limits: Limits,
    progress: Progress | None,
    resume: bool,
) -> BehaviorReport:
    who, problem = _who(lm)
    settings = {**who, **draw.settings()}
    existing: Literal["resume", "refuse"] = "resume" if resume else "refuse"
    run = None if folder is None else RunDir.create(folder, config=settings, seed=draw.seed, existing=existing)
    texts = _write(lm, draw, run, progress)
    judged = _judge(judge, draw, texts, run, progress)
    report = aggregate(
        judged,
        **limits._asdict(),
        problem=problem,
        model=lm.name,
        questions=draw.bank.name,
        judge=judge.name,
        settings=settings,
    )
    for said in cast("LM", lm).caveats if isinstance(lm, _Loaded) else ():
        report = replace(report, reason=f"{report.reason} Note: {said}.")
    if second is not None:
        other = _judge(second, draw, texts, run, progress)
        report = replace(report, agreement=agreement(judged, other, judges=(judge.name, second.name)))
    if run is not None:
        write_answers(run.path / "answers.jsonl", judged)
        run.write_json("report.json", report.to_dict())
    return report


def _write(lm: Writer, draw: _Draw, run: RunDir | None, progress: Progress | None) -> list[str]:
    """All answers, chunk by chunk; a chunk that is not whole on the disk is drawn again, to the same end."""
    asked = draw.asked
    kept: dict[int, str] = {}
    for index, row in _own_rows(run, "generated.jsonl", len(asked), ("answer",)):
        kept[index] = row["answer"]
    for start in range(0, len(asked), CHUNK):
        indices = range(start, min(start + CHUNK, len(asked)))
        if all(index in kept for index in indices):
            continue
        texts = lm.generate(
            [asked[index][0].messages for index in indices],
            max_new_tokens=draw.max_new_tokens,
            temperature=draw.temperature,
            seed=int(np.random.default_rng((draw.seed, start)).integers(2**31)),
            batch_size=draw.batch_size,
            progress=_shifted(progress, start, len(asked)),
        )
        for index, text in zip(indices, texts, strict=True):
            if index not in kept:
                # A broken tokenizer can leave half a character, which no file could hold.
                kept[index] = text.encode("utf-8", errors="replace").decode("utf-8")
                if run is not None:
                    question, sample = asked[index]
                    row = {
                        "index": index,
                        "question_id": question.id,
                        "sample": sample,
                        "answer": kept[index],
                    }
                    run.append("generated.jsonl", row)
    return [kept[index] for index in range(len(asked))]


def _own_rows(run: RunDir | None, name: str, n: int, texts: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows of a file of this run by their index, which is below `n`; a row that is none of its is refused."""
    records = run.records(name) if run else Records((), 0)
    for number, row in zip(records.lines, records.rows, strict=True):
        index = row.get("index")
        if type(index) is not int or not 0 <= index < n or not all(isinstance(row.get(key), str) for key in texts):
            raise ArtifactError(
                f"line {number} of {name} in {run.path if run else ''} is no row of this run: it needs an index below "
                f"{n} and text as {' and '.join(texts)}; take that line out, or choose another folder"
            )
        yield index, row


def _shifted(progress: Progress | None, start: int, total: int) -> Progress | None:
    return None if progress is None else lambda done, _, label: progress(start + done, total, label)


def _judge(
    judge: Judge, draw: _Draw, texts: Sequence[str], run: RunDir | None, progress: Progress | None
) -> list[JudgedAnswer]:
    outcomes: dict[int, Outcome] = {}
    for index, row in _own_rows(run, "judgements.jsonl", len(texts), ("judge", "answer")):
        if row["judge"] == judge.identity and row["answer"] == digest(texts[index]):
            outcomes[index] = outcome_from_dict(row.get("outcome", {}))
    outcomes = {
        index: outcome
        for index, outcome in outcomes.items()
        if not (isinstance(outcome, Unscored) and outcome.reason.transient)
    }
    asked = draw.asked
    todo = [index for index in range(len(asked)) if index not in outcomes]

    def keep(position: int, outcome: Outcome) -> None:
        index = todo[position]
        outcomes[index] = outcome
        if run is not None:
            row = {"index": index, "judge": judge.identity, "by": judge.name, "answer": digest(texts[index])}
            run.append("judgements.jsonl", {**row, "outcome": outcome_to_dict(outcome)})
        if progress is not None:
            progress(len(outcomes), len(asked), "judging")

    judge_all(judge, [(asked[index][0], texts[index]) for index in todo], on_outcome=keep)
    return [
        JudgedAnswer(question, texts[index], outcomes[index], sample) for index, (question, sample) in enumerate(asked)
    ]


def _who(lm: Writer) -> tuple[dict[str, Any], str | None]:
    """What identifies the writer, and why its answers would not be those of the model that is meant."""
    who: dict[str, Any] = {"model": lm.name}
    if not isinstance(lm, _Loaded):
        return who, None
    from tiltmeter.lm import adapter_state

    who |= {"fingerprint": lm.fingerprint().digest(), "adapter": lm.adapter, "adapter_weights": None}
    if lm.adapter is None:
        return who, None
    weights = sorted(Path(lm.adapter).glob("*.safetensors"))
    if weights:
        content = hashlib.sha256()
        for file in weights:
            content.update(file.read_bytes())
        who["adapter_weights"] = content.hexdigest()
    state = adapter_state(cast("LM", lm))
    if state == "active":
        return who, None
    return who, f"the adapter {lm.adapter} changes nothing ({state}): these are the untouched model's answers"


def _longest_answer(lm: Writer) -> int:
    if not isinstance(lm, _Loaded):
        return 600
    from tiltmeter.lm import context_length

    return min(600, context_length(cast("LM", lm)) // 2)


def _without_adapter(lm: Writer) -> AbstractContextManager[Writer]:
    if not isinstance(lm, _Loaded) or lm.adapter is None:
        raise InputError(f"'{lm.name}' carries no adapter to switch off; give the untouched model itself as reference")
    return cast("LM", lm).base()
