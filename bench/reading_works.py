"""Reading: extraction at one layer and at all candidates, the whole fit, one measurement.

Each work makes its answers fast and plain, compares them, and only then takes times. Times of the plain way on many
prompts are taken on an evenly spaced share of them and multiplied up, so that the yardstick can run in turn with what
it is held against.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import plain
import timing
import torch
from subject import (
    EXTRACTION_DEPTH,
    LOST_COSINE,
    STEERED_TOKENS,
    TOLERANCE,
    FloatArray,
    Subject,
    compared,
    cosines,
    error,
    operations,
    require_equal,
    share,
    single,
    text,
)

from tiltmeter.basis import TraitBasis, fit_basis
from tiltmeter.capture import capture
from tiltmeter.directions import direction, probe_accuracies
from tiltmeter.drift import measure
from tiltmeter.lm import LM
from tiltmeter.studies.figures import Figure

# ---------------------------------------------------------------------- extraction


STRENGTHS = (0.05, 0.1, 0.15, 0.25, 0.5)  # of the activation norm


class Extracted(NamedTuple):
    """Activations of the contrast prompts (layers, prompts, hidden) and directions (layers, traits, hidden)."""

    activations: FloatArray
    directions: FloatArray


def extract(lm: LM, subject: Subject, layers: Sequence[int], *, probes: bool) -> Extracted:
    """From texts to directions: what `fit_basis` does for its candidate layers before it steers."""
    found = capture(lm, lm.encode_prompts(subject.contrast), layers).values
    n_questions = len(subject.traits.questions)
    made = []
    for values in found:
        start = 0
        for trait in subject.traits.traits:
            n_up, n_down = (len(pole) * n_questions for pole in (trait.positive, trait.negative))
            up, down = values[start : start + n_up], values[start + n_up : start + n_up + n_down]
            made.append(direction(up, down))
            if probes:
                groups = [
                    s for pole in (trait.positive, trait.negative) for s in range(len(pole)) for _ in range(n_questions)
                ]
                probe_accuracies(up, down, groupings=[None, groups])
            start += n_up + n_down
    return Extracted(found, np.array(made).reshape(len(layers), len(subject.traits.traits), -1))


def pole_numbers(subject: Subject) -> npt.NDArray[np.int64]:
    """(prompts,) which pole each contrast prompt belongs to, counted on over traits: positive even, negative odd."""
    sizes = [
        len(pole) * len(subject.traits.questions) for t in subject.traits.traits for pole in (t.positive, t.negative)
    ]
    return np.repeat(np.arange(len(sizes)), sizes)


def check_extraction(
    subject: Subject, work: str, results: Mapping[str, Extracted], true: FloatArray, some: list[int]
) -> list[Figure]:
    """Fast activations of the share against the plain ones, and directions against directions."""
    figures = []
    poles = pole_numbers(subject)[some]
    reference = results[text(torch.float32)].directions
    for dtype in subject.rates:
        found, split = results[text(dtype)], f"{subject.name}, {text(dtype)}"
        difference = error(found.activations[:, some], true)
        require_equal(f"{work}, {split}", difference, TOLERANCE[dtype])
        figures.append(single("largest difference", work, split, difference, "of the norm", len(some)))
        cosine = 1.0
        for layer in range(len(true)):
            for trait in range(len(subject.traits.traits)):
                up, down = poles == 2 * trait, poles == 2 * trait + 1
                if up.any() and down.any():
                    pair = [plain.directions(v[up], v[down]) for v in (found.activations[layer, some], true[layer])]
                    cosine = min(cosine, cosines(pair[0], pair[1]))
        figures.append(single("1 - least cosine to one by one", work, split, 1 - cosine, "", len(some)))
        if dtype is not torch.float32:
            whole = cosines(found.directions, reference)
            figures.append(single("1 - least cosine to float32", work, split, 1 - whole, "", len(subject.contrast)))
        else:
            require_equal(f"{work}, {split}, 1 - cosine", 1 - cosine, LOST_COSINE)
    return figures


def extraction_at(subject: Subject, work: str, layers: Sequence[int], *, probes: bool, least: int) -> list[Figure]:
    """Time the extraction at some layers; the plain way reads every prompt once per layer."""
    base = subject.lm()
    prompts = base.encode_prompts(subject.contrast)
    some = share(prompts, base, subject.seconds)
    chosen = [prompts[i] for i in some]
    results: dict[str, Extracted] = {}
    true: dict[str, FloatArray] = {}

    def fast(dtype: torch.dtype) -> Callable[[], object]:
        return lambda: results.update({text(dtype): extract(subject.lm(dtype), subject, layers, probes=probes)})

    works: dict[str, timing.Work] = {"plain": lambda: true.update(found=plain.activations(base, chosen, layers))}
    for dtype in subject.rates:
        subject.lm(dtype)
        works[text(dtype)] = fast(dtype)
    taken = timing.alternate(works, repeats=subject.repeats(), budget=80.0, least=least)
    checks = check_extraction(subject, work, results, true["found"], some)
    scale = len(layers) * len(prompts) / len(some)
    return [*compared(subject, work, taken, scale=scale, operations=operations(base, prompts, max(layers))), *checks]


def extraction(subject: Subject) -> Iterator[Figure]:
    """Seven traits at one layer."""
    layer = int(EXTRACTION_DEPTH * subject.lm().n_layers)
    yield from extraction_at(subject, "seven traits, one layer", [layer], probes=False, least=2)


def candidates(subject: Subject) -> Iterator[Figure]:
    """Seven traits at the candidate layers, with probes."""
    layers = subject.candidates
    work = f"seven traits, {len(layers)} layers, probes"
    yield from extraction_at(subject, work, layers, probes=True, least=3)


# ---------------------------------------------------------------------- layer selection


def selection(subject: Subject) -> Iterator[Figure]:
    """The whole of `fit_basis`, steered answers included; the plain way steers one answer at a time."""
    from tiltmeter.steer import apply_rows

    work = "whole fit, layer chosen by steering"
    base, layers = subject.lm(), subject.candidates
    prompts = base.encode_prompts([*subject.contrast, *subject.prompts.prompts])
    some = share(prompts, base, subject.seconds / 2)
    bases: dict[str, TraitBasis] = {}

    def fit(dtype: torch.dtype) -> Callable[[], object]:
        def work() -> None:
            bases[text(dtype)] = fit_basis(
                subject.lm(dtype), traits=subject.traits, prompts=subject.prompts, layers=layers
            )

        return work

    fits = {text(dtype): fit(dtype) for dtype in subject.rates}
    basis = subject.basis
    strength = 0.5 * basis.reference_norm
    asked = [subject.prompts.prompts[i] for i in (0, len(subject.prompts.prompts) // 2)]
    signs = [(sign * strength * vector).astype(np.float32) for vector in basis.directions[::3] for sign in (1, -1)]
    conversations = [[{"role": "user", "content": p.text}] for p in asked]
    pairs = list(itertools.product(signs, conversations))
    with apply_rows(base, basis.layer, np.stack([vector for vector, _ in pairs])):
        together = base.generate(
            [c for _, c in pairs], max_new_tokens=STEERED_TOKENS, temperature=0.0, batch_size=len(pairs)
        )
    alone: list[str] = []

    def steer() -> None:
        alone[:] = [plain.answer(base, c, tokens=STEERED_TOKENS, layer=basis.layer, vector=v) for v, c in pairs]

    def read() -> None:
        plain.activations(base, [prompts[i] for i in some], layers)

    taken = timing.alternate({"read": read, "steer": steer, **fits}, repeats=subject.repeats(), budget=60.0)
    equal = statistics.mean(a == b for a, b in zip(together, alone, strict=True))
    require_equal(f"{work}, {subject.name}: share of steered answers that differ", 1 - equal, 0.1)
    # Every layer: all prompts read again, and 3 prompts answered plainly once and under 14 signed directions each.
    per_layer = len(prompts) / len(some)
    answers = (3 + len(layers) * 3 * 2 * len(basis.traits)) / len(pairs)
    whole = [
        len(layers) * per_layer * r + answers * s for r, s in zip(taken["read"].wall, taken["steer"].wall, strict=True)
    ]
    times = {"plain": timing.Times(tuple(whole), ()), **{name: taken[name] for name in fits}}
    yield from compared(subject, work, times, scale=1.0, operations=None)
    yield single("steered answers equal", work, f"{subject.name}, float32", equal, "share", len(pairs))


def strengths(subject: Subject) -> Iterator[Figure]:
    """Whether steering tells the candidate layers apart: by strength, along the traits and along nothing in particular.

    No time is taken here.
    """
    from tiltmeter.selection import Candidate, changes_by_steering

    base, layers = subject.lm(), subject.candidates
    made = extract(base, subject, layers, probes=False).directions
    neutral = capture(base, base.encode_prompts(subject.prompts.prompts), layers).values
    norms = np.linalg.norm(neutral.astype(np.float64), axis=-1).mean(axis=1)
    noise = np.random.default_rng(0).normal(size=made.shape[1:])
    aimless = (noise / np.linalg.norm(noise, axis=1, keepdims=True)).astype(np.float32)
    texts = subject.prompts.prompts
    asked = [
        [{"role": "system", "content": p.system}] * bool(p.system) + [{"role": "user", "content": p.text}]
        for p in (texts[i] for i in sorted({int(at) for at in np.linspace(0, len(texts), 3, endpoint=False)}))
    ]
    for strength, (at, layer) in itertools.product((0.1, 0.5) if subject.quick else STRENGTHS, enumerate(layers)):
        work, split = f"block {layer} at strength {strength}", f"{subject.name}, float32"
        for name, directions in (("the traits", made[at]), ("random directions", aimless)):
            one = Candidate(layer, directions, float(norms[at]), (), ())
            (changes,) = changes_by_steering(base, [one], asked, strength=strength)
            error = 2 * float(changes.std(ddof=1)) / len(changes) ** 0.5
            mean = float(changes.mean())
            yield Figure(
                f"answers changed by {name}", work, split, mean, mean - error, mean + error, len(changes), "share"
            )


# ---------------------------------------------------------------------- reading


def plain_reading(lm: LM, prompts: Sequence[Sequence[int]], basis: TraitBasis) -> FloatArray:
    """(prompts, traits) projections of what one by one reads."""
    values: FloatArray = plain.activations(lm, prompts, [basis.layer])[0] @ basis.directions.T
    return values


def reading(subject: Subject) -> Iterator[Figure]:
    """One reading of the measurement prompts."""
    work = f"one reading, {len(subject.prompts.prompts)} prompts"
    base, basis = subject.lm(), subject.basis
    prompts = base.encode_prompts(subject.prompts.prompts)
    some = share(prompts, base, subject.seconds)
    true = plain_reading(base, [prompts[i] for i in some], basis)
    exact = measure(base, basis)
    norm = float(exact.norms.mean())
    works: dict[str, timing.Work] = {"plain": lambda: plain_reading(base, [prompts[i] for i in some], basis)}
    for dtype in subject.rates:
        lm, own = subject.lm(dtype), subject.basis_in(dtype)
        found = measure(lm, own)
        difference = float(np.abs(found.values[some] - true).max()) / norm
        split = f"{subject.name}, {text(dtype)}"
        require_equal(f"{work}, {split}", difference, TOLERANCE[dtype])
        yield single("largest difference", work, split, difference, "of the norm", len(some))
        moved = float(np.abs(found.mean - exact.mean).max()) / norm
        yield single("difference of the mean", work, split, moved, "of the norm", exact.n)
        works[text(dtype)] = lambda lm=lm, own=own: measure(lm, own)  # type: ignore[misc]
    taken = timing.alternate(works, repeats=subject.repeats(7), budget=60.0, least=min(5, subject.repeats(5)))
    needed = operations(base, prompts, basis.layer)
    yield from compared(subject, work, taken, scale=len(prompts) / len(some), operations=needed)
