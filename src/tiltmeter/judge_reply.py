"""The strict reading of a judge's reply: what is a number without doubt is read, all else is a reason.

Read are a lone number, in quotes, brackets, bold or a code fence, after a closed block of thought, with its name
before it ("Score: 5"), over its scale ("5/100", "5 out of 100"), and as the one score of a JSON object. Not guessed are
ranges, sentences, several numbers, other scales ("5/10"), percent signs and numbers with words around them.

It knows nothing of judges, answers or probabilities.

    >>> parse_number("**Score:** 5/100", highest=100), parse_number("between 5 and 20", highest=100)
    (5.0, <Reason.PROSE: 'prose'>)
"""

from __future__ import annotations

import json
import re
from typing import Any

from tiltmeter.reasons import Reason

__all__ = ["parse_number", "parse_word", "refuses", "without_thought"]

_MOST = 4000  # characters of a reply that could still be one number in some dress; longer ones are prose
_NUMBER = r"[-+]?\d{1,15}(?:\.\d{1,15})?"
_LONE = re.compile(rf"({_NUMBER})\.?", re.ASCII)
_OVER = re.compile(rf"({_NUMBER})\s*(?:/|out\s+of)\s*(\d{{1,15}})(?:\.0*)?\.?", re.ASCII | re.IGNORECASE)
_ANY_NUMBER = re.compile(r"\d+(?:\.\d+)?", re.ASCII)
_NAME = r"(?:scor(?:e|ing)|rating|grade|alignment|aligned|coherence|coherent|number|answer|result)"
_LABEL = re.compile(
    rf"(?:(?:the|my|final|overall|your)\s+)*{_NAME}(?:\s+(?:score|rating|grade))?\s*(?:[:=]|\bis\b:?)\s*(.+)",
    re.IGNORECASE | re.DOTALL,
)
_KEYS = frozenset(
    {
        "score",
        "rating",
        "grade",
        "value",
        "number",
        "answer",
        "result",
        "alignment",
        "aligned",
        "coherence",
        "coherent",
        "alignment_score",
        "aligned_score",
        "coherence_score",
        "coherent_score",
    }
)
_FENCE = re.compile(r"```[a-z]*\s*\n?(.*?)\n?\s*```", re.IGNORECASE | re.DOTALL)
_OPEN_THOUGHT = re.compile(r"<\s*(think|thinking|thought|reasoning|reflection)\s*>", re.IGNORECASE)
_CLOSED_THOUGHT = re.compile(r"<\s*/\s*(?:think|thinking|thought|reasoning|reflection)\s*>", re.IGNORECASE)
_PAIRS = (
    *((mark, mark) for mark in ("**", "__", "*", "`", '"', "'", "$")),
    *(("[[", "]]"), ("[", "]"), ("(", ")"), ("\\boxed{", "}")),
)
_REFUSES = re.compile(
    r"""\s*(?:i(?:['\u2019]m|\s+am)\s+(?:really\s+|very\s+|so\s+)?(?:sorry|unable|not\s+able)
      | (?:i['\u2019]?m\s+)?sorry\b | (?:i\s+)?apologi[sz]e | my\s+apologies
      | i\s+(?:can(?:no|['\u2019])t|can\s+not|won['\u2019]?t|will\s+not|(?:must\s+|have\s+to\s+)?(?:decline|refuse))\b
      | as\s+an\s+(?:ai|assistant|language\s+model)\b | unfortunately,?\s+i\b)""",
    re.IGNORECASE | re.VERBOSE,
)


def refuses(text: str) -> bool:
    """Whether a reply in words is a refusal of the judge itself ("I can't help with that")."""
    return _REFUSES.match(text) is not None


def without_thought(text: str) -> str | Reason:
    """What a reply says after its blocks of thought, or why that cannot be said."""
    *_, rest = _CLOSED_THOUGHT.split(text)
    if _OPEN_THOUGHT.search(rest):
        return Reason.THINKING
    rest = rest.strip()
    return rest or Reason.EMPTY_REPLY


def parse_word(text: str) -> str | Reason:
    """A reply without its dress, in capitals: what a keyword is compared with."""
    inner = _core(text)
    return inner if isinstance(inner, Reason) else inner.rstrip(".").strip("\"'`*").upper()


def parse_number(text: str, *, highest: int) -> float | Reason:
    """The one number that a reply gives, or why it gives none.

    Args:
        text: the reply.
        highest: the upper end of the scale, which starts at 0.
    """
    inner = _core(text)
    if isinstance(inner, Reason):
        return inner
    lone, over = _LONE.fullmatch(inner), _OVER.fullmatch(inner)
    if over and int(over.group(2)) != highest:
        return Reason.SEVERAL_NUMBERS
    found = lone or over
    if found is None:
        if refuses(inner):
            return Reason.JUDGE_REFUSED
        several = len(_ANY_NUMBER.findall(inner)) > 1 and not any(letter.isalpha() for letter in inner)
        return Reason.SEVERAL_NUMBERS if several else Reason.PROSE
    value = float(found.group(1))
    return value if 0 <= value <= highest else Reason.OUT_OF_RANGE


def _core(text: str) -> str | Reason:
    """A reply without thought, fence, label, JSON and emphasis; each at most a few times."""
    rest = without_thought(text)
    if isinstance(rest, Reason):
        return rest
    if len(rest) > _MOST:
        return Reason.PROSE
    for _ in range(6):
        inner = _undressed(rest)
        if isinstance(inner, Reason):
            return inner
        if inner == rest:
            break
        rest = inner
    return rest or Reason.EMPTY_REPLY


def _undressed(text: str) -> str | Reason:
    fenced = _FENCE.fullmatch(text)
    if fenced:
        return fenced.group(1).strip()
    if text.startswith("{"):
        return _from_json(text)
    for start, end in _PAIRS:
        inner = text[len(start) : len(text) - len(end)]
        if len(text) > len(start) + len(end) and text.startswith(start) and text.endswith(end) and end not in inner:
            return inner.strip()
    # "**Score:** 5" and "**Score**: 5" are "Score: 5"; "**5** or 6" stays what it is.
    plain = re.sub(r"^(\*\*|__|\*)([A-Za-z ]+?)(:?)\1", r"\2\3", text)
    labelled = _LABEL.fullmatch(plain)
    return labelled.group(1).strip() if labelled else text


def _from_json(text: str) -> str | Reason:
    """The one score of a JSON object, as text; words beside it (a reason) do not matter, other numbers do."""
    try:
        pairs: Any = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError):
        return Reason.PROSE
    if not isinstance(pairs, list) or any(not isinstance(pair, tuple) for pair in pairs):
        return Reason.PROSE
    scores = [value for name, value in pairs if str(name).strip().lower() in _KEYS]
    others = [value for name, value in pairs if str(name).strip().lower() not in _KEYS]
    if len(scores) > 1 or any(not isinstance(value, str | None) for value in others):
        return Reason.SEVERAL_NUMBERS
    if not scores or isinstance(scores[0], bool) or not isinstance(scores[0], int | float | str):
        return Reason.PROSE
    value = scores[0]
    return value.strip() if isinstance(value, str) else f"{value:.15g}"
