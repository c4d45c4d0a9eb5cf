"""Traits and prompts: the texts that a basis is read from, and the texts that a model is measured on.

A trait is a pair of poles, each a few system prompts; a trait set adds the questions that every system
prompt is combined with. A prompt set is the fixed list of measurement prompts. Both are plain TOML, built in
by name or read from a file of one's own, and checked when they are made: a set that is empty, lacks a pole
or says the same thing twice raises before any model is run.

This module knows no model, template or token. The design (seven traits, five system prompts a pole, thirty
questions, 115 measurement prompts) is that of arXiv 2606.07631; the texts are our own.

    >>> load_traits("alignment").names
    ('honesty', 'sycophancy', 'harmlessness', 'power_seeking', 'helpfulness', 'confidence', 'corrigibility')
    >>> len(load_prompts("neutral").prompts)
    115

A trait file:

    name = "mine"
    questions = ["What should I cook?", "..."]     # or: questions_from = "alignment"

    [[traits]]
    name = "patience"
    description = "Takes its time."
    aligned_pole = "positive"                      # or "negative"; "neither" for a trait of style
    positive = ["You are patient.", "..."]
    negative = ["You are impatient.", "..."]       # the i-th of both poles form a pair

A prompt file:

    name = "mine"

    [[groups]]
    category = "technical"
    system = "You are brief."                      # optional
    prompts = ["Why does ice float?", "..."]
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast

from tiltmeter.errors import InputError
from tiltmeter.untrusted import read_toml

__all__ = ["Prompt", "PromptSet", "Trait", "TraitSet", "load_prompts", "load_traits"]

AlignedPole = Literal["positive", "negative", "neither"]
_POLES = ("positive", "negative", "neither")


@dataclass(frozen=True)
class Trait:
    """A pole pair of system prompts.

    Attributes:
        name: how the trait is called in tables, one word or joined by underscores.
        description: one sentence on what the positive pole does.
        aligned_pole: the pole that a well-behaved assistant is on; "neither" where the trait is one of style.
        positive: the system prompts that call the trait forth.
        negative: the system prompts that call forth its opposite; the i-th is paired with the i-th positive.

    Raises:
        InputError: a pole is empty, a text is blank or occurs twice, or `aligned_pole` is unknown.
    """

    name: str
    description: str
    aligned_pole: AlignedPole
    positive: tuple[str, ...]
    negative: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.aligned_pole not in _POLES:
            raise InputError(
                f"trait '{self.name}' has aligned_pole {self.aligned_pole!r}; allowed are {', '.join(_POLES)}"
            )
        if not self.name.strip():
            raise InputError("a trait has no name; give each trait a short unique name")
        for pole, texts in (("positive", self.positive), ("negative", self.negative)):
            _require_texts(texts, f"the {pole} pole of trait '{self.name}'")
        _refuse_repeats([*self.positive, *self.negative], f"the system prompts of trait '{self.name}'")


@dataclass(frozen=True)
class TraitSet:
    """Traits that share one list of questions.

    Attributes:
        name: of the set; a basis and its readings carry it.
        traits: in the order that every array of the package keeps.
        questions: each is asked under each system prompt.

    Raises:
        InputError: there is no trait or no question, or a name or a question occurs twice.
    """

    name: str
    traits: tuple[Trait, ...]
    questions: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.traits:
            raise InputError(f"trait set '{self.name}' has no trait; give at least one")
        _refuse_repeats(self.names, f"the trait names of set '{self.name}'")
        _require_texts(self.questions, f"the questions of trait set '{self.name}'")
        _refuse_repeats(self.questions, f"the questions of trait set '{self.name}'")

    @property
    def names(self) -> tuple[str, ...]:
        """The trait names, in order."""
        return tuple(trait.name for trait in self.traits)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all that shapes the directions: names, poles and questions, in order."""
        return _digest([[[t.name, t.aligned_pole, t.positive, t.negative] for t in self.traits], self.questions])


@dataclass(frozen=True)
class Prompt:
    """One user turn, with the category that it is counted under and, where there is one, a system prompt."""

    text: str
    category: str
    system: str | None = None


@dataclass(frozen=True)
class PromptSet:
    """The measurement prompts, in a fixed order.

    Raises:
        InputError: the set is empty, or a prompt is blank or occurs twice under the same system prompt.
    """

    name: str
    prompts: tuple[Prompt, ...]

    def __post_init__(self) -> None:
        label = f"prompt set '{self.name}'"
        _require_texts([prompt.text for prompt in self.prompts], label)
        _refuse_repeats(((prompt.system, prompt.text) for prompt in self.prompts), label)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of what the model sees, in order. The set's name and the categories do not enter."""
        return _digest([[prompt.system, prompt.text] for prompt in self.prompts])


def load_traits(source: str | Path) -> TraitSet:
    """Read a trait set.

    Args:
        source: the name of a built-in set ("alignment", "semantic", "organism") or the path of a TOML file.

    Raises:
        InputError: there is no such set or file, or its content cannot be used; the message says where.
    """
    content, label = _read_toml("traits", source)
    _check_keys(content, label, required={"name", "traits"}, optional={"questions", "questions_from"})
    if ("questions" in content) == ("questions_from" in content):
        raise InputError(
            f"{label} needs either 'questions' (a list) or 'questions_from' (the name of a built-in set), and not both"
        )
    if "questions_from" in content:
        lender = content["questions_from"]
        if lender not in _builtin("traits"):
            raise InputError(
                f"{label} takes its questions from {lender!r}; that must be one of the built-in sets: "
                f"{', '.join(_builtin('traits'))}"
            )
        questions = load_traits(lender).questions
    else:
        questions = _texts(content["questions"], f"'questions' of {label}")
    return TraitSet(
        name=_text(content["name"], f"'name' of {label}"),
        traits=tuple(_trait(table, label) for table in _tables(content["traits"], "traits", label)),
        questions=questions,
    )


def load_prompts(source: str | Path) -> PromptSet:
    """Read a prompt set.

    Args:
        source: the name of a built-in set ("neutral", "organism") or the path of a TOML file.

    Raises:
        InputError: there is no such set or file, or its content cannot be used; the message says where.
    """
    content, label = _read_toml("prompts", source)
    _check_keys(content, label, required={"name", "groups"})
    prompts: list[Prompt] = []
    for number, group in enumerate(_tables(content["groups"], "groups", label), start=1):
        where = f"group {number} of {label}"
        _check_keys(group, where, required={"category", "prompts"}, optional={"system"})
        category = _text(group["category"], f"'category' in {where}")
        system = _text(group["system"], f"'system' in {where}") if "system" in group else None
        texts = _texts(group["prompts"], f"'prompts' in {where}")
        prompts.extend(Prompt(text, category, system) for text in texts)
    return PromptSet(_text(content["name"], f"'name' of {label}"), tuple(prompts))


def _trait(table: Mapping[str, Any], label: str) -> Trait:
    name = _text(table.get("name"), f"'name' of a trait in {label}")
    where = f"trait '{name}' of {label}"
    _check_keys(table, where, required={"name", "description", "aligned_pole", "positive", "negative"})
    return Trait(
        name=name,
        description=_text(table["description"], f"'description' of {where}"),
        aligned_pole=cast(AlignedPole, table["aligned_pole"]),  # checked by Trait
        positive=_texts(table["positive"], f"'positive' of {where}"),
        negative=_texts(table["negative"], f"'negative' of {where}"),
    )


def _read_toml(kind: Literal["traits", "prompts"], source: str | Path) -> tuple[dict[str, Any], str]:
    """The parsed file and how messages call it."""
    folder = files("tiltmeter") / "data" / kind
    if source in (builtin := _builtin(kind)):
        return tomllib.loads((folder / f"{source}.toml").read_text("utf-8")), f"the built-in {kind} '{source}'"
    advice = f"give the path of a sound TOML file or one of the built-in {kind}: {', '.join(builtin)}"
    return read_toml(source, error=InputError, advice=advice), str(source)


def _builtin(kind: Literal["traits", "prompts"]) -> list[str]:
    folder = files("tiltmeter") / "data" / kind
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml"))


def _check_keys(table: Mapping[str, Any], label: str, *, required: set[str], optional: Iterable[str] = ()) -> None:
    missing = sorted(required - set(table))
    if missing:
        raise InputError(f"{label} lacks {', '.join(map(repr, missing))}; add it")
    unknown = sorted(set(table) - required - set(optional))
    if unknown:
        allowed = ", ".join(sorted(required | set(optional)))
        raise InputError(f"{label} has {', '.join(map(repr, unknown))}, which is unknown; allowed are {allowed}")


def _tables(value: object, key: str, label: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise InputError(f"'{key}' of {label} must be one or more [[{key}]] tables")
    return value


def _text(value: object, label: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{label} is {value!r}; it must be a text that is not blank")
    return value


def _texts(value: object, label: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InputError(f"{label} is {value!r}; it must be a list of texts")
    return tuple(value)


def _require_texts(texts: Iterable[str], label: str) -> None:
    texts = tuple(texts)
    if not texts:
        raise InputError(f"{label} is empty; give at least one text")
    for position, text in enumerate(texts, start=1):
        if not text.strip():
            raise InputError(f"text {position} of {label} is blank; write it or take it out")


def _refuse_repeats(items: Iterable[object], label: str) -> None:
    repeated = [item for item, count in Counter(items).items() if count > 1]
    if repeated:
        raise InputError(f"{label} hold {repeated[0]!r} more than once; each may occur once")


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()
