"""The behavioral evaluation as an Inspect task: same questions, prompts, strict reading and counting.

Generation, judge calls, retries, caching, limits and the log are Inspect's. A sample is one answer; its score
holds alignment, coherence and whether it is misaligned, each None where the judge gave no score, with the
reason beside it. The metrics state both rates with their n and 95 % interval, and NaN where a rate cannot be
said. `report_from_log` turns a log into a `BehaviorReport` with its verdict; samples that failed before they
were judged count there as not judged.

From the command line, with a second model as judge:

    inspect eval tiltmeter/emergent_misalignment --model openai/... --model-role grader=openai/...

In Python:

    >>> task = emergent_misalignment("general", judge="openai/gpt-4o")                 # doctest: +SKIP
    >>> report_from_log(inspect_ai.eval(task, model="vllm/my-model")[0]).verdict       # doctest: +SKIP
    <State.CLEAR: 'CLEAR'>
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import asdict
from typing import Any, Literal

from tiltmeter.answers import JudgedAnswer
from tiltmeter.errors import InputError, MissingExtra
from tiltmeter.judge import (
    ExactJudge,
    Judge,
    Outcome,
    Reason,
    Reply,
    Score,
    TokenStep,
    Unscored,
    digest,
    outcome_from_dict,
    outcome_to_dict,
)
from tiltmeter.judge_model import RatingJudge
from tiltmeter.questions import Question, load_questions
from tiltmeter.rates import MAX_UNSCORED, MIN_SCORED, THRESHOLD, BehaviorReport, Rate, aggregate

try:
    from inspect_ai import Task, task
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.model import GenerateConfig, get_model
    from inspect_ai.scorer import SampleScore, metric, scorer
    from inspect_ai.scorer import Score as InspectScore
    from inspect_ai.solver import generate
except ImportError as error:
    raise MissingExtra(
        "this needs the package 'inspect_ai', which is not installed; run: pip install 'tiltmeter[inspect]'"
    ) from error

__all__ = ["InspectChat", "emergent_misalignment", "misalignment", "report_from_log"]

TOP_LOGPROBS = 20


class InspectChat:
    """A model that Inspect manages, as the one whom the judges ask."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.name = str(model)
        self.identity = digest("inspect", self.name)
        self.concurrency = 16
        self._config: dict[str, Any] = {"logprobs": True, "top_logprobs": TOP_LOGPROBS}

    def session(self) -> AbstractAsyncContextManager[object]:
        """Inspect holds the connections."""
        return nullcontext()

    async def ask(self, prompt: str, *, max_tokens: int) -> Reply | Unscored:
        """Ask at temperature 0; see `Chat.ask`. An endpoint's failure is Inspect's: it fails the sample."""
        config = GenerateConfig(temperature=0.0, max_tokens=max_tokens, **self._config)
        output = await self.model.generate(prompt, config=config)
        if not output.choices:
            return Unscored(Reason.EMPTY_REPLY, "the judge replied with nothing")
        if output.stop_reason == "content_filter":
            return Unscored(Reason.CONTENT_FILTER, "stopped by a content filter")
        if output.stop_reason == "tool_calls":
            return Unscored(Reason.TOOL_CALL, "the judge called a tool instead of replying")
        logprobs = output.choices[0].logprobs
        steps = tuple(
            TokenStep(step.token, tuple((top.token, top.logprob) for top in step.top_logprobs or ()))
            for step in (logprobs.content if logprobs else ())
        )
        return Reply(output.completion, output.stop_reason not in ("max_tokens", "model_length"), steps)


def _held_back(output: Any) -> Unscored | None:
    """Why what came back is not what the model under test said: its endpoint is no part of the model."""
    if output.stop_reason == "content_filter":
        return Unscored(Reason.CONTENT_FILTER, "the answer was stopped by a content filter")
    if output.error or not output.choices:
        return Unscored(Reason.NOT_JUDGED, f"the model's endpoint gave no answer: {output.error or 'no choices'}")
    return None


def _judge(judge: str | Judge | None) -> Judge:
    if judge is None:
        return RatingJudge(InspectChat(get_model(role="grader", required=True)))
    if isinstance(judge, str):
        return ExactJudge() if judge == "exact" else RatingJudge(InspectChat(get_model(judge)))
    return judge


def _answers(scores: Any) -> list[JudgedAnswer]:
    """The judged answers behind Inspect's sample scores."""
    return [_judged((entry.score.metadata or {}).get("tiltmeter", {}), "") for entry in scores]


def _judged(record: Mapping[str, Any], failure: str) -> JudgedAnswer:
    question = _question(record.get("question", {}))
    outcome = record.get("outcome")
    judged: Outcome = outcome_from_dict(outcome) if outcome else Unscored(Reason.NOT_JUDGED, failure)
    return JudgedAnswer(question, str(record.get("answer", "")), judged, int(record.get("sample", 0)))


def _question(fields: Mapping[str, Any]) -> Question:
    values = dict(fields) or {"id": "unknown", "category": "unknown", "text": ""}
    for name in ("elements", "accept"):
        values[name] = tuple(values.get(name, ()))
    values["rubric"] = tuple(values["rubric"]) if values.get("rubric") else None
    values["judge_prompts"] = tuple((name, text) for name, text in values.get("judge_prompts", ()))
    return Question(**values)


def _stated(name: str, rate: Rate) -> dict[str, float]:
    def number(value: float | None) -> float:
        return math.nan if value is None else value

    return {
        name: number(rate.value),
        f"{name}_low": number(rate.low),
        f"{name}_high": number(rate.high),
        f"{name}_n": float(rate.n),
    }


# Inspect leaves scores that are NaN out before it calls a metric, and its mean of nothing is 0. The scores
# here are mappings, so that these metrics see every sample, and refuse to state a rate over too few.
@metric(scores="unreduced")  # type: ignore[untyped-decorator]
def em_rates(min_scored: int = MIN_SCORED, max_unscored: float = MAX_UNSCORED) -> Any:
    """Both rates of `rates.aggregate`, each with n and interval; NaN where it cannot be said."""

    def compute(scores: list[SampleScore]) -> dict[str, float]:  # Inspect reads this annotation
        report = aggregate(_answers(scores), min_scored=min_scored, max_unscored=max_unscored)
        unscored = {"unscored": float(report.n_answers - report.em_rate.n)}
        return {
            **_stated("em_rate", report.em_rate),
            **_stated("em_rate_coherent", report.em_rate_coherent),
            **unscored,
        }

    return compute


@scorer(metrics=[em_rates()])  # type: ignore[untyped-decorator]
def misalignment(judge: str | Judge | None = None) -> Any:
    """Scores an answer with one of tiltmeter's judges.

    Args:
        judge: the name of an Inspect model, "exact" for the pocket organism, or any `Judge`; by default the
            model in the role "grader". The model under test is never its own judge by default.
    """
    opened: list[Judge] = []

    async def score(state: Any, target: Any) -> Any:
        if not opened:
            opened.append(_judge(judge))
        question = _question(state.metadata["question"])
        answer = state.output.completion
        held_back = _held_back(state.output)
        if held_back is None:
            async with opened[0].session():
                outcome = await opened[0].score(question, answer)
        else:
            outcome = held_back
        judged = JudgedAnswer(question, answer, outcome, int(state.metadata["sample"]))
        scored = outcome if isinstance(outcome, Score) else None
        unscored = outcome if isinstance(outcome, Unscored) else None
        return InspectScore(
            value={
                "misaligned": float(judged.misaligned) if scored else None,
                "alignment": scored.alignment if scored else None,
                "coherence": scored.coherence if scored else None,
            },
            answer=answer,
            explanation=unscored.detail if unscored else None,
            metadata={
                "reason": str(unscored.reason) if unscored else "scored",
                "tiltmeter": {
                    "question": asdict(question),
                    "sample": judged.sample,
                    "answer": answer,
                    "outcome": outcome_to_dict(outcome),
                },
            },
        )

    return score


@task  # type: ignore[untyped-decorator]
def emergent_misalignment(
    questions: str = "general",
    samples: int = 1,
    judge: str | None = None,
    paraphrases: Literal["all", "first"] = "all",
    temperature: float = 1.0,
    max_tokens: int = 600,
) -> Any:
    """Emergent misalignment: open questions, judged for alignment and coherence.

    Args:
        questions: a bank's name or file; see `questions.load_questions`.
        samples: answers per question. They are samples of their own, not epochs: averaging over epochs would
            hide how many answers were scored.
        judge: see `misalignment`.
        paraphrases: see `questions.load_questions`.
        temperature: of the model under test.
        max_tokens: longest answer.

    Raises:
        InputError: the bank cannot be used, or `samples` is below 1.
    """
    if samples < 1:
        raise InputError(f"got samples={samples}; allowed are whole numbers from 1")
    bank = load_questions(questions, paraphrases=paraphrases)
    dataset = MemoryDataset(
        [
            Sample(
                id=f"{question.id}/{question.variant}/{sample}",
                input=_messages(question),
                metadata={"question": asdict(question), "sample": sample, "category": question.category},
            )
            for question in bank.questions
            for sample in range(samples)
        ],
        name=bank.name,
    )
    return Task(
        dataset=dataset,
        solver=generate(),
        scorer=misalignment(judge),
        config=GenerateConfig(temperature=temperature, max_tokens=max_tokens),
        metadata={"questions": bank.name, "questions_digest": bank.digest},
    )


def _messages(question: Question) -> list[Any]:
    from inspect_ai.model import ChatMessageSystem, ChatMessageUser

    kinds = {"system": ChatMessageSystem, "user": ChatMessageUser}
    return [kinds[message["role"]](content=message["content"]) for message in question.messages]


def report_from_log(
    log: Any,
    *,
    min_scored: int = MIN_SCORED,
    max_unscored: float = MAX_UNSCORED,
    threshold: float = THRESHOLD,
) -> BehaviorReport:
    """Count the answers of an Inspect log (an `EvalLog`) as `behavior.evaluate` would.

    Raises:
        InputError: the log holds no samples.
    """
    if not log.samples:
        raise InputError(
            f"the log of '{log.eval.task}' (status {log.status}) holds no samples; read it whole, not the "
            "header alone, and run it with log_samples on"
        )
    answers = []
    for sample in log.samples:
        scores = sample.scores or {}
        found = [s.metadata["tiltmeter"] for s in scores.values() if s.metadata and "tiltmeter" in s.metadata]
        failed = sample.error.message if sample.error else "no score in the log"
        answers.append(_judged(found[0] if found else dict(sample.metadata or {}), failed))
    return aggregate(
        answers,
        min_scored=min_scored,
        max_unscored=max_unscored,
        threshold=threshold,
        model=str(log.eval.model),
        questions=str((log.eval.metadata or {}).get("questions", "")),
        judge="inspect",
        settings={"task_args": dict(log.eval.task_args), "log": str(log.location)},
    )
