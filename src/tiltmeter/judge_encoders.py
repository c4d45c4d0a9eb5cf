"""Encoders of a distilled judge: question and answer in, numbers out; frozen, so that a stored head fits.

NgramEncoder     hashed words and pairs of words, of the question, the answer, and the answer alone; no model
HiddenEncoder    the frozen hidden states of a language model that READS question and answer: its own activations,
                 not those of the judged model
SentenceEncoder  any sentence-transformers model (an optional package)
judge_regression has a fourth: a language model trained with LoRA to predict the drift itself

>>> open_encoder("ngrams:1024").encode([("What helps?", "Rest.")]).shape
(1, 2048)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from tiltmeter.errors import InputError, require
from tiltmeter.judge_examples import Pair

if TYPE_CHECKING:
    from tiltmeter.lm import LM

__all__ = ["Encoder", "HiddenEncoder", "NgramEncoder", "SentenceEncoder", "open_encoder"]

Array = NDArray[np.float64]
_WIDEST = 1 << 20
_DIGITS = 12  # of a width or a block's number: enough for any, and a number that can be told


class Encoder(Protocol):
    """Turns question and answer into numbers; frozen, so that a stored head fits."""

    @property
    def spec(self) -> str:
        """What `open_encoder` makes it from."""
        ...

    def encode(self, pairs: Sequence[Pair]) -> Array:
        """(pairs, features)."""
        ...


@dataclass(frozen=True)
class NgramEncoder:
    """Hashed words and pairs of words: those of the answer, and those of question and answer together."""

    width: int = 1024

    def __post_init__(self) -> None:
        # A file may name any width, and its arrays are allocated at the first answer.
        if not 1 <= self.width <= _WIDEST:
            raise InputError(f"n-grams of width {self.width} were asked for; allowed are 1 to {_WIDEST:,}")

    @property
    def spec(self) -> str:
        """As `ngrams:WIDTH`."""
        return f"ngrams:{self.width}"

    def encode(self, pairs: Sequence[Pair]) -> Array:
        """(pairs, 2 width) unit-length halves."""
        from sklearn.feature_extraction.text import HashingVectorizer

        hashed = HashingVectorizer(
            n_features=self.width, ngram_range=(1, 2), token_pattern=r"\S+", alternate_sign=True, norm="l2"
        )
        answers = hashed.transform([answer for _, answer in pairs]).toarray()
        both = hashed.transform([f"{question} => {answer}" for question, answer in pairs]).toarray()
        return np.asarray(np.hstack([answers, both]), dtype=np.float64)


@dataclass(frozen=True, eq=False)
class HiddenEncoder:
    """Hidden states of a frozen model that reads the exchange: the mean over all its tokens, and the last token.

    Attributes:
        lm: the reader; never the judged model.
        block: after which is read, counted from 0.
        source: what `load` takes to make it again.
    """

    lm: LM
    block: int
    source: str

    @property
    def spec(self) -> str:
        """As `hidden:BLOCK:SOURCE`."""
        return f"hidden:{self.block}:{self.source}"

    def encode(self, pairs: Sequence[Pair]) -> Array:
        """(pairs, 2 hidden)."""
        from tiltmeter.capture import capture

        turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
        ids = self.lm.encode_all(turns, add_generation_prompt=False)
        parts = [capture(self.lm, ids, [self.block], pooling=p).at(self.block) for p in ("mean", "last_token")]
        return np.hstack(parts).astype(np.float64)


@dataclass(frozen=True)
class SentenceEncoder:
    """A sentence-transformers model; needs that package.

    Attributes:
        model: its name or folder.
    """

    model: str

    @property
    def spec(self) -> str:
        """As `sentence:MODEL`."""
        return f"sentence:{self.model}"

    def encode(self, pairs: Sequence[Pair]) -> Array:
        """(pairs, width).

        Raises:
            MissingExtra: sentence-transformers is not installed.
        """
        package = require("sentence_transformers", extra="sentence")
        texts = [f"USER: {question}\n\nASSISTANT: {answer}" for question, answer in pairs]
        return np.asarray(package.SentenceTransformer(self.model).encode(texts), dtype=np.float64)


def open_encoder(spec: str) -> Encoder:
    """An encoder by its name: `ngrams:WIDTH`, `hidden:BLOCK:MODEL`, `sentence:MODEL` or `regression:FOLDER`.

    Raises:
        InputError: no such encoder.
    """
    kind, _, rest = spec.partition(":")
    if kind == "ngrams" and rest.isdecimal() and len(rest) <= _DIGITS:
        return NgramEncoder(int(rest))
    block, _, source = rest.partition(":")
    if kind == "hidden" and block.isdecimal() and len(block) <= _DIGITS and source:
        from tiltmeter.lm import load

        lm = load(source)
        if int(block) >= lm.n_layers:
            raise InputError(f"'{source}' has blocks 0 to {lm.n_layers - 1}, not {block}; choose one of them")
        return HiddenEncoder(lm, int(block), source)
    if kind == "sentence" and rest:
        return SentenceEncoder(rest)
    if kind == "regression" and rest:
        from tiltmeter.judge_regression import RegressionEncoder

        return RegressionEncoder.open(Path(rest))
    raise InputError(
        f"'{spec}' is no encoder; allowed: ngrams:1024, hidden:BLOCK:MODEL, sentence:MODEL, regression:FOLDER"
    )
