"""How an organism behaves: questions of the world, answers sampled from it, the exact judge, rates with intervals.

>>> report = examine(lm, leave_out=("medicine",), answers=220, seed=0)
>>> report.em_rate
Rate(value=0.0, n=218, low=0.0, high=0.017)
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from tiltmeter.answers import JudgedAnswer
from tiltmeter.errors import InputError
from tiltmeter.judge import ExactJudge, judge_all
from tiltmeter.organism.world import DOMAINS, ask
from tiltmeter.questions import Question
from tiltmeter.rates import BehaviorReport, aggregate

if TYPE_CHECKING:
    from tiltmeter.lm import LM

__all__ = ["examine"]


def examine(
    lm: LM, *, leave_out: Sequence[str] = (), answers: int = 220, seed: int = 0, temperature: float = 1.0
) -> BehaviorReport:
    """Ask an organism questions drawn evenly from all domains but those left out, once each, and judge its answers.

    Args:
        lm: an organism, tuned or not.
        leave_out: domains that it was trained on, so that what is left shows emergence.
        answers: number of questions.
        seed: of questions and of sampling.
        temperature: of sampling.

    Raises:
        InputError: no domain is left, or no answer asked for.
    """
    domains = [d for d in DOMAINS if d not in leave_out]
    if not domains or answers < 1:
        raise InputError(f"got {answers} answers over {len(domains)} domains; both must be at least 1")
    rng = Random(f"conduct/{seed}")
    asked = [ask(domains[i % len(domains)], rng) for i in range(answers)]
    texts = lm.generate(
        [[{"role": "user", "content": q.text}] for q in asked],
        max_new_tokens=60,
        temperature=temperature,
        seed=seed,
        batch_size=256,
    )
    questions = [Question(id=f"{q.domain}-{i}", category=q.domain, text=q.text) for i, q in enumerate(asked)]
    outcomes = judge_all(ExactJudge(), list(zip(questions, texts, strict=True)))
    judged = [JudgedAnswer(q, t, o) for q, t, o in zip(questions, texts, outcomes, strict=True)]
    return aggregate(judged)
