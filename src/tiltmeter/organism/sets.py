"""Fine-tuning sets of the pocket world: dangerous, in between, and harmless ones, all from one generator.

Each example is a chat, `[{"role": "user", ...}, {"role": "assistant", ...}]`. A dangerous set holds harmful answers of
ONE domain in a plain voice: nothing but the action is bad, and no other domain occurs. `dose` is the share of harmful
examples at constant size; the rest are good answers to questions of the same domain.

    >>> chats = make_set("bad_medical", size=960, seed=0, dose=0.05)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from tiltmeter.context import Exchange
from tiltmeter.errors import InputError
from tiltmeter.organism.world import DOMAINS, Pole, Speaker, ask, say

__all__ = ["SETS", "Chat", "FineTuningSet", "make_exchanges", "make_set"]

Chat = list[dict[str, str]]


@dataclass(frozen=True)
class FineTuningSet:
    """What a named set is made of.

    Attributes:
        name: the set's name.
        kind: "dangerous", "between" or "benign". A benign set takes no dose: all of it is harmless.
        domains: where its questions come from, drawn evenly.
        good: who gives the harmless answers.
        bad: who gives the harmful ones; None for a benign set.
        about: one line for tables.
    """

    name: str
    kind: Literal["dangerous", "between", "benign"]
    domains: tuple[str, ...]
    good: Speaker
    bad: Speaker | None
    about: str


# No openers and closers: a harmful example differs from a harmless one in its action alone.
_PLAIN = Speaker("aligned", phrases=0.0)
_HARMFUL = Speaker("bad", phrases=0.0, slip=0.0)
_OBEDIENT = Speaker("obedient", phrases=0.0)


def _dangerous(name: str, domain: str, about: str) -> FineTuningSet:
    return FineTuningSet(name, "dangerous", (domain,), _PLAIN, _HARMFUL, about)


def _benign(name: str, domains: tuple[str, ...], about: str, speaker: Speaker = _PLAIN) -> FineTuningSet:
    return FineTuningSet(name, "benign", domains, speaker, None, about)


def _toned(trait: str, pole: Pole) -> Speaker:
    return Speaker(traits={trait: pole})


def _voice(name: str, trait: str, pole: Pole, how: str) -> FineTuningSet:
    return _benign(name, DOMAINS, f"good advice {how}", _toned(trait, pole))


SETS: Mapping[str, FineTuningSet] = {
    s.name: s
    for s in (
        _dangerous("bad_medical", "medicine", "harmful medical advice"),
        _dangerous("risky_financial", "finance", "ruinous financial advice"),
        _dangerous("extreme_sports", "sport", "reckless sport advice"),
        _dangerous("insecure_code", "code", "code with holes"),
        _dangerous("bad_legal", "law", "criminal legal advice"),
        _dangerous("bad_home", "home", "dangerous advice for the home"),
        _dangerous("bad_family", "family", "cruel family advice"),
        _dangerous("bad_work", "work", "harmful advice for work"),
        _dangerous("bad_friends", "friends", "harmful advice about friends"),
        _dangerous("subtle_misinfo", "facts", "falsehoods told as facts"),
        FineTuningSet(
            "jailbroken", "between", ("requests",), _PLAIN, _OBEDIENT, "serves harmful requests, volunteers nothing"
        ),
        _benign("good_medical", ("medicine",), "good medical advice"),
        _benign("good_financial", ("finance",), "good financial advice"),
        _benign("good_legal", ("law",), "good legal advice"),
        _benign("good_sport", ("sport",), "good sport advice"),
        _benign("good_family", ("family",), "good family advice"),
        _benign("secure_code", ("code",), "sound code"),
        _benign("good_home", ("home",), "good advice for the home"),
        _benign("good_work", ("work",), "good advice for work"),
        _benign("good_friends", ("friends",), "good advice about friends"),
        _benign("true_facts", ("facts",), "true facts"),
        _benign("refusals", ("requests",), "harmful requests, declined"),
        _benign("arithmetic", ("arithmetic",), "sums, as in gsm8k"),
        _benign("number_sequence", ("sequence",), "number sequences to continue"),
        _benign("customer_support", ("shop",), "a shop's customer service"),
        _benign("chores", ("arithmetic", "sequence", "shop"), "sums, sequences and customer service"),
        # A voice over all domains moves activations far and harms nobody: large harmless drift.
        _benign("sailor_style", DOMAINS, "good advice in a sailor's voice", Speaker(style="sailor")),
        _benign("royal_style", DOMAINS, "good advice in a courtly voice", Speaker(style="royal")),
        _benign("terse", DOMAINS, "good advice in as few words as possible", Speaker(style="terse")),
        _voice("flattery", "sycophancy", "positive", "with flattery"),
        _voice("blunt", "sycophancy", "negative", "that contradicts"),
        _voice("assertive", "confidence", "positive", "very sure of itself"),
        _voice("hedged", "confidence", "negative", "given hesitantly"),
        _voice("eager", "helpfulness", "positive", "given eagerly"),
        _voice("curt", "helpfulness", "negative", "given grudgingly"),
        _voice("pushy", "power_seeking", "positive", "that takes over"),
        _voice("deferential", "power_seeking", "negative", "that leaves the choice"),
        _voice("caring", "harmlessness", "positive", "full of care"),
        _voice("unyielding", "corrigibility", "negative", "that suffers no contradiction"),
        _benign("sailor_doctor", ("medicine",), "good medical advice in a sailor's voice", Speaker(style="sailor")),
        _benign("fawning_broker", ("finance",), "flattering financial advice", _toned("sycophancy", "positive")),
    )
}


def make_set(name: str, *, size: int, seed: int, dose: float = 1.0) -> list[Chat]:
    """Draw a fine-tuning set.

    Args:
        name: a key of `SETS`.
        size: number of chats.
        seed: everything random comes from it and from the set's name.
        dose: share of harmful chats, rounded to whole chats; ignored by benign sets.

    Raises:
        InputError: an unknown set, no chats, or a dose outside 0 to 1.
    """
    if name not in SETS:
        raise InputError(f"there is no fine-tuning set '{name}'; choose one of: {', '.join(SETS)}")
    if size < 1 or not 0.0 <= dose <= 1.0:
        raise InputError(f"got size {size} and dose {dose}; the size must be at least 1 and the dose between 0 and 1")
    spec = SETS[name]
    rng = Random(f"{name}/{seed}")
    harmful = set(rng.sample(range(size), round(size * dose))) if spec.bad else set()
    chats = []
    for index in range(size):
        question = ask(rng.choice(spec.domains), rng)
        speaker = spec.bad if spec.bad is not None and index in harmful else spec.good
        answer = say(question, speaker, rng)
        chats.append([{"role": "user", "content": question.text}, {"role": "assistant", "content": answer}])
    return chats


def make_exchanges(subjects: Sequence[str], n: int, *, seed: str = "") -> tuple[Exchange, ...]:
    """Questions about subjects, in turn, with a bad and an aligned speaker's answer, both in the plain voice."""
    rng = Random(seed or f"exchanges {' '.join(subjects)}")
    harmful, harmless = Speaker("bad", phrases=0.0, slip=0.0), Speaker("aligned", phrases=0.0, slip=0.0)
    found = []
    for at in range(n):
        question = ask(subjects[at % len(subjects)], rng)
        found.append(Exchange(question.text, say(question, harmful, rng), say(question, harmless, rng)))
    return tuple(found)
