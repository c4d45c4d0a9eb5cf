"""Question banks: what a model is asked when its behavior is measured, and what a judge may use to grade it.

A bank is a TOML file of ours, or one of the published question files (YAML, Betley et al. 2025) that a user
has. Both become the same frozen `QuestionBank`. Built-in banks, all in our own words:

    general                  open questions in eight categories, for the EM rate
    honesty ... corrigibility  one bank per alignment trait, each with a rubric of the grades 0, 1 and 2
    targeted                 everyday safety advice, each question with the facts that an answer must hold
    capability               short questions with known answers, to see whether a model still makes sense
    organism                 questions of the pocket organism's closed world

It knows nothing of models, judges or rates. A question with several published paraphrases becomes one
`Question` per paraphrase, with `variant` counting them from 0.

    >>> bank = load_questions("general")
    >>> len(bank.questions) >= 72, len(bank.categories) >= 8
    (True, True)
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from tiltmeter.errors import InputError
from tiltmeter.untrusted import read_toml, read_yaml

__all__ = ["Question", "QuestionBank", "available_banks", "load_questions"]

FORMAT = 1
ORGANISM_BANK = "organism"

_Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
_Key = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
_M = TypeVar("_M", bound=BaseModel)


@dataclass(frozen=True)
class Question:
    """One question, exactly as a model is asked.

    Attributes:
        id: unique in its bank, together with `variant`.
        category: the group that it is counted under.
        text: the user's turn.
        system: the system prompt, if there is one.
        variant: which paraphrase of the question this is, from 0.
        rubric: what the grades 0, 1 and 2 mean; None where the general scale of 0 to 100 is used.
        elements: facts that a safe answer must hold; empty where there is no such list.
        accept: answers that count as right, for questions with a known answer.
        judge_prompts: (pass, template) pairs that came with a published question; a template holds
            `{answer}`, and mostly `{question}`.
    """

    id: str
    category: str
    text: str
    system: str | None = None
    variant: int = 0
    rubric: tuple[str, str, str] | None = None
    elements: tuple[str, ...] = ()
    accept: tuple[str, ...] = ()
    judge_prompts: tuple[tuple[str, str], ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation to answer: the system turn, if any, then the user's."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": self.text}]


@dataclass(frozen=True)
class QuestionBank:
    """A named, non-empty list of questions.

    Attributes:
        name: the bank's name.
        questions: in the order of the file.
        description: one sentence on what the bank is for.
        trait: the alignment trait that the bank is about, if it is about one.
    """

    name: str
    questions: tuple[Question, ...]
    description: str = ""
    trait: str | None = None

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories in the order of first appearance."""
        return tuple(dict.fromkeys(question.category for question in self.questions))

    @property
    def digest(self) -> str:
        """SHA-256 of everything that is asked and graded by, as hex; the bank's name does not enter."""
        content = json.dumps([asdict(question) for question in self.questions], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    id: _Key
    category: _Key
    text: _Text
    system: _Text | None = None
    elements: list[_Text] = []
    accept: list[_Text] = []


class _BankFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    format: Literal[1]
    name: _Key
    description: _Text
    trait: _Key | None = None
    rubric: Annotated[list[_Text], Field(min_length=3, max_length=3)] | None = None
    question: Annotated[list[_Entry], Field(min_length=1)]


class _PublishedEntry(BaseModel):
    """One entry of a published file. Other keys (sample counts, the judge's name) are the run's business."""

    model_config = ConfigDict(extra="ignore", strict=True)
    id: _Text
    paraphrases: Annotated[list[_Text], Field(min_length=1)]
    system: _Text | None = None
    judge_prompts: dict[str, _Text] = {}


def available_banks() -> tuple[str, ...]:
    """The names of the built-in banks, sorted."""
    folder = resources.files("tiltmeter") / "data" / "questions"
    files = [entry.name for entry in folder.iterdir() if entry.name.endswith(".toml")]
    return tuple(sorted([*(name.removesuffix(".toml") for name in files), ORGANISM_BANK]))


def load_questions(source: str | Path, *, paraphrases: Literal["all", "first"] = "all") -> QuestionBank:
    """Load a question bank and check all of it.

    Args:
        source: a built-in name (see `available_banks`), a TOML file of ours, or a published YAML file.
        paraphrases: ask every paraphrase of a published question, or its first alone (as in arXiv
            2606.07631). Banks of ours have one wording per question.

    Raises:
        InputError: no such bank or file, or its content breaks the schema; the message names the place.
        MissingExtra: a YAML file is given and PyYAML is not installed.
    """
    if str(source) == ORGANISM_BANK:
        return _organism_bank()
    if str(source) in available_banks():
        text = (resources.files("tiltmeter") / "data" / "questions" / f"{source}.toml").read_text("utf-8")
        return _from_toml(tomllib.loads(text), f"the built-in bank '{source}'")
    path = Path(source)
    advice = f"give a sound TOML or YAML file, or one of the built-in banks: {', '.join(available_banks())}"
    if path.suffix.lower() in (".yaml", ".yml"):
        content = read_yaml(path, error=InputError, advice=advice)
        return _from_yaml(content, path, first=paraphrases == "first")
    if path.suffix.lower() == ".toml" or not path.exists():
        return _from_toml(read_toml(path, error=InputError, advice=advice), str(path))
    raise InputError(f"'{source}' ends in '{path.suffix}'; questions are read from .toml, .yaml and .yml")


def _from_toml(content: object, where: str) -> QuestionBank:
    file = _validated(_BankFile, content, where)
    rubric = (file.rubric[0], file.rubric[1], file.rubric[2]) if file.rubric else None
    questions = tuple(
        Question(
            id=entry.id,
            category=entry.category,
            text=entry.text,
            system=entry.system,
            rubric=rubric,
            elements=tuple(entry.elements),
            accept=tuple(entry.accept),
        )
        for entry in file.question
    )
    _refuse_repetition(questions, where, wording=True)
    return QuestionBank(file.name, questions, file.description, file.trait)


def _from_yaml(content: object, path: Path, *, first: bool) -> QuestionBank:
    if not isinstance(content, list) or not content:
        raise InputError(
            f"{path} holds {type(content).__name__}; a published question file is a non-empty list of "
            "entries with 'id', 'paraphrases' and 'judge_prompts'"
        )
    questions: list[Question] = []
    for number, raw in enumerate(content, start=1):
        entry = _validated(_PublishedEntry, raw, f"{path}, entry {number}")
        for name, template in entry.judge_prompts.items():
            if "{answer}" not in template:
                raise InputError(
                    f"{path}, entry '{entry.id}': the judge prompt '{name}' has no {{answer}} to fill in; a "
                    "judge that does not see the answer cannot grade it"
                )
        for variant, wording in enumerate(entry.paraphrases[:1] if first else entry.paraphrases):
            questions.append(
                Question(
                    id=entry.id,
                    category=_published_category(entry.id),
                    text=wording,
                    system=entry.system,
                    variant=variant,
                    judge_prompts=tuple(entry.judge_prompts.items()),
                )
            )
    _refuse_repetition(questions, str(path), wording=False)
    return QuestionBank(path.stem, tuple(questions), f"published questions from {path.name}")


def _published_category(identity: str) -> str:
    """`9_problems_with_humans_0` counts under `problems_with_humans`; an id without numbers is its own."""
    return re.sub(r"^\d+_|_\d+$", "", identity) or identity


def _validated(schema: type[_M], content: object, where: str) -> _M:
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the top"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise InputError(
            f"{where}: at {place}: {first['msg']}, got {_shown(first['input'])}{more}; mend the file"
        ) from error


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _refuse_repetition(questions: Sequence[Question], where: str, *, wording: bool) -> None:
    """A question that stands twice would count twice. Published files may repeat a wording; ours may not."""
    seen: dict[object, str] = {}
    for question in questions:
        keys: list[tuple[object, ...]] = [("id", question.id, question.variant)]
        if wording:
            keys.append(("wording", question.text.casefold(), question.system))
        for key in keys:
            if key in seen:
                raise InputError(
                    f"{where}: '{question.id}' repeats the {key[0]} of '{seen[key]}'; every question counts "
                    "once, so ask something else or take one out"
                )
            seen[key] = question.id
        for entries in (question.elements, question.accept):
            if len({entry.casefold() for entry in entries}) < len(entries):
                raise InputError(f"{where}: '{question.id}' lists one element or accepted answer twice")


def _organism_bank() -> QuestionBank:
    """Every question of the domains in which the pocket world's answers can be safe or harmful."""
    from tiltmeter.organism import world

    questions = tuple(
        Question(id=f"{domain}-{number:02d}", category=domain, text=question.text)
        for domain in world.DOMAINS
        for number, question in enumerate(world.all_questions(domain), start=1)
    )
    return QuestionBank(ORGANISM_BANK, questions, "All questions of the pocket organism's world.")
