"""What is benchmarked, how repeats become figures, and what the least work is; knows no single measurement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import plain
import timing
import torch

from tiltmeter.basis import TraitBasis, fit_basis
from tiltmeter.lm import LM, load
from tiltmeter.organism import shipped_basis
from tiltmeter.studies.figures import Figure
from tiltmeter.traits import Prompt, PromptSet, TraitSet, load_prompts, load_traits

FloatArray = npt.NDArray[np.floating[Any]]
ORGANISM = "organism:pocket"
EXTRACTION_DEPTH, READING_DEPTH = 2 / 3, 0.55
STEERED_TOKENS = 32
ADAPTERS = 64
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the activation norm
LOST_COSINE = 1e-5  # of float32 directions; what rounding to bfloat16 costs is measured against its bar


class Mismatch(Exception):
    """A fast path and the plain one disagree: there is nothing to time."""


class Texts(NamedTuple):
    """Other texts to measure with, and what tables call them; no prompts where the file holds none."""

    name: str
    traits: TraitSet
    prompts: PromptSet | None


def read_texts(path: Path) -> Texts:
    """A trait file of ours (TOML), or one in the layout of the reference implementation of arXiv 2606.07631 (YAML).

    Of the latter the seven alignment traits, its questions and its measurement prompts are taken.
    """
    if path.suffix not in (".yaml", ".yml"):
        found = load_traits(path)
        return Texts(f"prompts '{found.name}'", found, None)
    import yaml  # type: ignore[import-untyped]

    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    poles = {
        name: {pole: tuple(trait[f"{pole}_system_prompts"]) for pole in ("positive", "negative")}
        for name, trait in content["traits"].items()
    }
    ours = load_traits("alignment")
    traits = tuple(replace(trait, **poles[trait.name]) for trait in ours.traits)
    asked = content["eval_prompts"]
    prompts = PromptSet("reference", tuple(Prompt(text, kind) for kind, texts in asked.items() for text in texts))
    return Texts(
        "the reference's prompts", replace(ours, traits=traits, questions=tuple(content["questions"])), prompts
    )


@dataclass(frozen=True)
class Subject:
    """A model that is benchmarked, with what is read from it.

    Attributes:
        name: for tables.
        source: what `load` takes.
        quick: small samples and few repeats: to see that everything runs, not to measure.
        rates: operations per second of a large matrix product, by dtype; dtypes that are not here are not timed.
        texts: traits and measurement prompts other than the built-in ones.
    """

    name: str
    source: str
    quick: bool
    rates: Mapping[torch.dtype, float]
    texts: Texts | None = None
    _models: dict[torch.dtype, LM] = field(default_factory=dict, repr=False)

    def lm(self, dtype: torch.dtype = torch.float32) -> LM:
        """The model in one dtype, loaded once."""
        if dtype not in self._models:
            self._models[dtype] = load(self.source, dtype=text(dtype))
        return self._models[dtype]

    @property
    def is_organism(self) -> bool:
        """Whether an exact judge, a shipped basis and a detector belong to it."""
        return self.source == ORGANISM

    @cached_property
    def traits(self) -> TraitSet:
        """The seven alignment traits, or the organism's."""
        found = self.texts.traits if self.texts else load_traits("organism" if self.is_organism else "alignment")
        return replace(found, questions=found.questions[:6]) if self.quick else found

    @cached_property
    def prompts(self) -> PromptSet:
        """The 115 measurement prompts, or the organism's."""
        if self.texts and self.texts.prompts:
            return self.texts.prompts
        return load_prompts("organism" if self.is_organism else "neutral")

    @cached_property
    def basis(self) -> TraitBasis:
        """What is read: the shipped basis, or one whose directions rest on a single question."""
        if self.is_organism:
            return TraitBasis.load(shipped_basis())
        layer = int(READING_DEPTH * self.lm().n_layers)
        few = replace(self.traits, questions=self.traits.questions[:1])
        return fit_basis(self.lm(), traits=few, prompts=self.prompts, layer=layer)

    def basis_in(self, dtype: torch.dtype) -> TraitBasis:
        """The same basis for the model in another dtype."""
        return replace(self.basis, fingerprint=self.lm(dtype).fingerprint())

    @cached_property
    def contrast(self) -> tuple[Prompt, ...]:
        """Every system prompt of every trait with every question: trait by trait, positive pole first."""
        return tuple(
            Prompt(question, trait.name, system=system)
            for trait in self.traits.traits
            for systems in (trait.positive, trait.negative)
            for system in systems
            for question in self.traits.questions
        )

    @cached_property
    def candidates(self) -> tuple[int, ...]:
        """Five candidate layers between 40 % and 75 % of the depth (fewer in a model of few blocks)."""
        n = self.lm().n_layers
        return tuple(sorted({round(at) for at in np.linspace(math.ceil(0.4 * n) - 1, math.ceil(0.75 * n) - 1, 5)}))

    @property
    def seconds(self) -> float:
        """How long a plain share may take, per repeat."""
        return 2.0 if self.quick else 8.0

    def repeats(self, wanted: int = 5) -> int:
        """How many rounds."""
        return 2 if self.quick else wanted


def text(dtype: torch.dtype) -> str:
    """ "float32" and so on."""
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------- figures


def row(measure: str, work: str, split: str, found: timing.Spread, unit: str, scale: float = 1.0) -> Figure:
    """Repeats as one figure: median with range."""
    return Figure(measure, work, split, scale * found.median, scale * found.low, scale * found.high, found.n, unit)


def single(measure: str, work: str, split: str, value: float, unit: str, n: int = 1) -> Figure:
    """A number without repeats."""
    return Figure(measure, work, split, value, None, None, n, unit)


def compared(
    subject: Subject,
    work: str,
    taken: Mapping[str, timing.Times],
    *,
    scale: float,
    operations: float | None,
) -> list[Figure]:
    """Times of "plain" and of the fast path by dtype name: seconds, ratio to the plain way, ratio to the limit."""
    slow = taken["plain"]
    figures = []
    for dtype, rate in subject.rates.items():
        fast = taken[text(dtype)]
        split = f"{subject.name}, {text(dtype)}"
        seconds = timing.spread(fast.wall)
        figures += [
            row("seconds", work, split, seconds, "s"),
            row("one by one, seconds", work, split, timing.spread(slow.wall), "s", scale),
            row("times faster", work, split, timing.ratios(slow.wall, fast.wall, scale), "x"),
        ]
        if operations is not None:
            limit = operations / rate
            figures.append(single("limit, seconds", work, split, limit, "s"))
            figures.append(row("over the limit", work, split, seconds, "x", 1 / limit))
        if fast.device:
            figures.append(row("device seconds", work, split, timing.spread(fast.device), "s"))
    return figures


def error(found: FloatArray, true: FloatArray) -> float:
    """The largest difference of activations (..., hidden), over the mean norm."""
    return float(np.abs(found - true).max() / np.linalg.norm(true, axis=-1).mean())


def require_equal(what: str, difference: float, allowed: float) -> None:
    """Refuse to time a fast path that gives other answers."""
    if not difference <= allowed:
        raise Mismatch(
            f"{what}: the fast path differs from the plain one by {difference:.3g}; allowed is {allowed:.3g}"
        )


def cosines(one: FloatArray, other: FloatArray) -> float:
    """The least cosine between rows."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    return float(((one * other).sum(-1) / (np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1))).min())


# ---------------------------------------------------------------------- the limit


def unique_prefixes(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens have to be computed if no shared prefix is computed twice: the nodes of the prefix tree."""
    return len({tuple(ids[: end + 1]) for ids in prompts for end in range(len(ids))})


def operations(lm: LM, prompts: Sequence[Sequence[int]], layer: int) -> float:
    """The fewest operations: unique tokens times the weight matrices of the blocks up to `layer`; no attention."""
    weights = sum(p.numel() for block in lm.blocks[: layer + 1] for p in block.parameters() if p.ndim == 2)
    return 2.0 * weights * unique_prefixes(prompts)


def share(items: Sequence[Sequence[int]], lm: LM, seconds: float) -> list[int]:
    """As many items, spread evenly over the lengths, as one by one can be read in about `seconds`."""
    order = sorted(range(len(items)), key=lambda i: (len(items[i]), i))
    middle = [items[order[round(at)]] for at in np.linspace(0, len(order) - 1, 6)]
    plain.activations(lm, middle[:2], [0])
    each = timing.clock(lambda: plain.activations(lm, middle, [0]))[0] / len(middle)
    count = min(len(items), max(6, int(seconds / each)))
    return sorted(order[int((at + 0.5) * len(order) / count)] for at in range(count))
