"""An evaluation from plain options: opens the model, the bank and the judge, and keeps them in one place.

What `tiltmeter eval` does; programs call `behavior.evaluate` with objects of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from tiltmeter.behavior import aggregate_file, evaluate
from tiltmeter.errors import AmbiguousAdapter, InactiveAdapter, InputError, NumericalError
from tiltmeter.judge_http import open_judge
from tiltmeter.ledger import Ledger, Price
from tiltmeter.questions import load_questions
from tiltmeter.rates import BehaviorReport, aggregate
from tiltmeter.writers import open_writer

__all__ = ["evaluate_from_options"]


def evaluate_from_options(
    *,
    model: str | None = None,
    adapter: str | None = None,
    answers: Path | None = None,
    questions: str | None = None,
    samples: int = 1,
    judge_spec: str = "exact",
    base_url: str | None = None,
    out: Path | None = None,
    seed: int = 0,
    temperature: float = 1.0,
    max_new_tokens: int | None = None,
    min_scored: int | None = None,
    max_unscored: float | None = None,
    budget_usd: float | None = None,
    price: tuple[float, float] | None = None,
    columns: tuple[str, str, str, str] | None = None,
    scale: str | None = None,
    higher_is_worse: bool | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> BehaviorReport:
    """Evaluate a model, or only aggregate answers that were judged elsewhere.

    Args:
        model: what `lm.load` opens; None with `answers`.
        adapter: a PEFT adapter to put on it.
        answers: judged answers (.csv or .jsonl); nothing is generated or judged then.
        questions: a bank's name or file; by default "organism" for an organism and "general" for any other model.
        samples, seed, temperature, max_new_tokens, out: see `behavior.evaluate`.
        judge_spec: "exact", "local:MODEL" or "openai:NAME".
        base_url: endpoint of an openai judge.
        min_scored, max_unscored: see `rates.aggregate`.
        budget_usd: hard limit of what an openai judge may cost; needs `price`.
        price: dollars per million input and output tokens.
        columns: of question, answer, alignment and coherence in `answers`.
        scale, higher_is_worse: see `answers.read_answer_file`; with `answers` alone.
        progress: called as (done, total, label).

    An adapter that does nothing, several of which nothing says which acted, or weights that are not numbers give an
    INCONCLUSIVE report with the reason.

    Raises:
        InputError: neither or both of a model and answers, or options that do not go together.
        TiltmeterError: see `behavior.evaluate`.
    """
    if (model is None) == (answers is None):
        raise InputError("give either a MODEL to ask, or --answers FILE with answers that were judged already")
    limits: dict[str, Any] = {"min_scored": min_scored, "max_unscored": max_unscored}
    limits = {key: value for key, value in limits.items() if value is not None}
    if answers is not None:
        named: dict[str, Any] = dict(zip(("question", "answer", "alignment", "coherence"), columns or (), strict=False))
        return aggregate_file(answers, **named, scale=scale, higher_is_worse=higher_is_worse, **limits)
    if scale is not None or higher_is_worse is not None:
        raise InputError("a scale and its direction are about judged answers; give them with --answers FILE")
    assert model is not None  # one of the two is there, see above
    if budget_usd is not None and price is None:
        raise InputError("a budget in dollars needs --price, the dollars per million input and output tokens")
    bank = load_questions(questions or ("organism" if model.startswith("organism:") else "general"))
    endpoint: dict[str, Any] = {}
    if judge_spec.startswith("openai:"):
        prices = {judge_spec.partition(":")[2]: Price(*price)} if price else None
        ledger = Ledger(out / "ledger.jsonl" if out else None, prices=prices, budget_usd=budget_usd)
        endpoint = {"cache": out / "replies.sqlite" if out else None, "ledger": ledger}
    # A bank of must-have facts is checked fact by fact, beside the untouched model: the method alone is not specific.
    by_elements = all(question.elements for question in bank.questions)
    judge = open_judge(judge_spec, kind="elements" if by_elements else "rating", base_url=base_url, **endpoint)
    try:
        writer = open_writer(model, adapter=adapter)
    except (InactiveAdapter, AmbiguousAdapter, NumericalError) as error:
        return aggregate([], problem=str(error), model=adapter or model, questions=bank.name, judge=judge.name)
    reference: Literal["base"] | None = "base" if by_elements and adapter else None
    return evaluate(
        writer, bank, judge, samples=samples, out=out, seed=seed, temperature=temperature,
        max_new_tokens=max_new_tokens, progress=progress, reference=reference, **limits,
    )  # fmt: skip
