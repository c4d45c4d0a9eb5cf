"""Questions and answers in JSON lines: those to be judged, and those whose models' activations were read.

>>> write_examples(path, [Example("What helps?", "Rest.", 0.0, "m1", "llama", "plain", True)])
>>> read_examples(path)[0].drift_pct
0.0
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tiltmeter.artifacts import write_file
from tiltmeter.errors import InputError
from tiltmeter.untrusted import read_json_lines

__all__ = ["Example", "Pair", "read_examples", "read_pairs", "write_examples"]

Pair = tuple[str, str]


class Example(NamedTuple):
    """An answer whose model's activations were read.

    Attributes:
        question, answer: the exchange.
        drift_pct: drift of the model at this question, in percent of the drift at full dose.
        model: which model gave it; all answers of one model lie on one side of every split.
        family: the model's family.
        style: how the model was taught to speak; "plain" where it was not.
        benign: whether nothing harmful was in the model's fine-tuning data.
    """

    question: str
    answer: str
    drift_pct: float
    model: str
    family: str
    style: str = "plain"
    benign: bool = False


def read_pairs(path: Path) -> list[Pair]:
    """(question, answer) from JSON lines with `question` and `answer`, as `tiltmeter judge score` takes them.

    Raises:
        InputError: the file cannot be read, or a line lacks one of the two.
    """
    pairs = []
    for number, row in _rows(path):
        question, answer = row.get("question"), row.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str):
            raise InputError(f"line {number} of '{path}' has no text as 'question' and 'answer'; mend it")
        pairs.append((question, answer))
    return pairs


def read_examples(path: Path) -> list[Example]:
    """Labelled answers from JSON lines with the fields of `Example`; `style` and `benign` may be left out.

    Raises:
        InputError: the file cannot be read, or a line lacks a field or has a wrong one.
    """
    found = []
    for number, row in _rows(path):
        try:
            example = Example(**{key: row[key] for key in Example._fields if key in row})
        except TypeError as error:
            raise InputError(f"line {number} of '{path}' is no labelled answer ({error}); mend it") from error
        texts = (example.question, example.answer, example.model, example.family, example.style)
        label = example.drift_pct
        if not all(isinstance(t, str) for t in texts) or isinstance(label, bool) or not isinstance(label, int | float):
            raise InputError(f"line {number} of '{path}' has a field of a wrong kind; texts and a number are needed")
        found.append(example._replace(drift_pct=float(label), benign=example.benign is True))
    return found


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write what `read_examples` reads.

    Raises:
        StorageError: it cannot be written.
    """
    write_file(path, "".join(json.dumps(e._asdict()) + "\n" for e in examples).encode())


def _rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The numbered objects of a JSONL file."""
    found = read_json_lines(path, error=InputError, advice="give a sound JSONL file")
    if not found:
        raise InputError(f"'{path}' holds no answers; give at least one line")
    return found
