"""The basis: one direction per trait, at one layer, with all that is needed to read a model along them.

Fitting runs the untouched model over every system prompt of every trait, combined with every question, and
takes the activations of the last prompt token after all candidate layers in one pass. `directions` makes one
unit direction per trait from them; `selection` chooses the layer, by steering and, where that does not decide, by
linear probes.

A basis belongs to the model it was fitted on. It is stored as one safetensors file with a JSON header, holds
that model's fingerprint, and refuses any other model. This module knows no architecture and registers no
hook; a stored basis is read without torch.

    >>> basis = fit_basis(lm)
    >>> basis.save("basis"); basis = TraitBasis.load("basis")
    >>> basis.drift(tuned, reference=lm).drift
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tiltmeter import sound
from tiltmeter.artifacts import made, read_artifact, write_artifact
from tiltmeter.directions import METHODS, Method, direction, probe_accuracies, project
from tiltmeter.errors import FingerprintMismatch, InputError, LayerError, NumericalError
from tiltmeter.fingerprint import Fingerprint, sha, tokens_digest
from tiltmeter.plan import BatchPlan
from tiltmeter.runs import provenance
from tiltmeter.selection import Candidate, LayerScore, LayerSelection, changes_by_steering, choose
from tiltmeter.traits import Prompt, PromptSet, Trait, TraitSet, load_prompts, load_traits

if TYPE_CHECKING:
    from tiltmeter.drift import DriftProfile, Reading
    from tiltmeter.lm import LM

__all__ = ["LayerScore", "LayerSelection", "TraitBasis", "fit_basis"]

FORMAT = 2
FILE = "basis.safetensors"
_REMEDY = "fit the basis again, with fit_basis or: tiltmeter basis fit"
_STEERED_PROMPTS = 3
_CANDIDATES = 5

FloatArray = NDArray[np.floating[Any]]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class TraitBasis:
    """Trait directions of one model, after one block. Make one with `fit_basis` or `load`.

    Attributes:
        name: of the trait set.
        traits: names of the k directions.
        aligned_poles: per trait, the pole that a well-behaved assistant is on.
        layer: the block after which is read, counted from 0 (before any final norm).
        directions: (k, hidden) float32, unit rows.
        poles: (k, 2) mean projection of the negative and of the positive pole's activations.
        reference_norm: mean activation norm of the measurement prompts on the untouched model.
        prompts: the measurement prompts.
        tokens: digest of the prompts' token ids, as the model's chat template wrote them.
        plan: how they are batched, fixed, since batch composition alone moves low-precision activations.
        fingerprint: of the model.
        model: the name and, where there is one, the revision of the model.
        method: how the directions were made.
        pooling: which token's activation is read.
        traits_digest: of the trait set.
        selection: how the layer was chosen.
        provenance: package versions, commit, seed, command and time of the fit.

    Raises:
        InputError: the shapes do not fit together.
        NumericalError: a number is not finite, or a direction has no length.
    """

    name: str
    traits: tuple[str, ...]
    aligned_poles: tuple[str, ...]
    layer: int
    directions: FloatArray
    poles: FloatArray
    reference_norm: float
    prompts: PromptSet
    tokens: str
    plan: BatchPlan
    fingerprint: Fingerprint
    model: str
    method: str
    pooling: Literal["last_token", "mean"]
    traits_digest: str
    selection: LayerSelection
    provenance: Mapping[str, Any]

    def __post_init__(self) -> None:
        try:
            self._check_fields()
        except InputError as error:
            raise InputError(f"basis '{self.name}' cannot be read with: {error}; fit the basis again") from error
        k = len(self.traits)
        if (
            self.directions.ndim != 2
            or len(self.directions) != k
            or self.poles.shape != (k, 2)
            or len(self.aligned_poles) != k
        ):
            raise InputError(
                f"a basis of {k} traits has directions {self.directions.shape} and poles {self.poles.shape}; "
                f"they must be ({k}, hidden) and ({k}, 2); fit the basis again"
            )
        lengths = np.linalg.norm(self.directions, axis=1)
        if not np.isfinite(self.poles).all() or not np.allclose(lengths, 1, atol=1e-4):
            raise NumericalError(
                f"the directions of basis '{self.name}' are not finite unit vectors (lengths {lengths}); "
                "fit the basis again"
            )
        try:
            sound.number("the reference norm", self.reference_norm, above=0)
        except InputError as error:
            raise NumericalError(f"basis '{self.name}' has no unit: {error}; fit the basis again") from error

    def _check_fields(self) -> None:
        """All that is neither an array nor their unit."""
        for what in ("name", "model", "traits_digest"):
            sound.text(what, getattr(self, what))
        sound.texts("traits", self.traits)
        for pole in self.aligned_poles:
            sound.choice("an aligned pole", pole, ("positive", "negative", "neither"))
        sound.whole("layer", self.layer)
        sound.choice("method", self.method, METHODS)
        sound.choice("pooling", self.pooling, ("last_token", "mean"))
        for prompt in self.prompts.prompts:
            sound.text("a prompt", prompt.text)
            sound.text("a prompt's category", prompt.category)
            sound.text("a system prompt", "" if prompt.system is None else prompt.system, blank=True)
        self.plan.check(len(self.prompts.prompts))
        if not isinstance(self.directions, np.ndarray) or self.directions.dtype.kind != "f":
            raise InputError("directions are no array of floats")
        if not isinstance(self.poles, np.ndarray) or self.poles.dtype.kind != "f":
            raise InputError("poles are no array of floats")
        if not isinstance(self.selection.probes_pass, bool):
            raise InputError(f"probes_pass is {self.selection.probes_pass!r}; it must be true or false")

    @property
    def names(self) -> tuple[str, ...]:
        """The traits: what this readout reads."""
        return self.traits

    @property
    def version(self) -> str | None:
        """The tiltmeter version that fitted it."""
        version: str | None = self.provenance.get("tiltmeter")
        return version

    @property
    def seed(self) -> int | None:
        """The seed of the fit."""
        seed: int | None = self.provenance.get("seed")
        return seed

    @property
    def cosines(self) -> FloatArray:
        """Cosines between the directions, (k, k)."""
        wide = self.directions.astype(np.float64)
        return np.asarray(wide @ wide.T)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all that decides what a reading with this basis means; provenance is left out."""
        content = {key: value for key, value in self._header().items() if key not in _INCIDENTAL}
        arrays = {key: array.tobytes().hex() for key, array in self._arrays().items()}
        return sha([content, arrays])

    def read(self, activations: FloatArray) -> FloatArray:
        """Activations (prompts, hidden) to projections (prompts, k), float32.

        Raises:
            InputError: the activations have another width than the directions.
        """
        return project(activations, self.directions)

    def check(self, lm: LM, *, weights_may_differ: bool = False) -> Fingerprint:
        """Make sure that this basis belongs to a model; adapters do not count.

        Args:
            lm: the model that is to be read.
            weights_may_differ: allow other base weights, as after full fine-tuning or a merged adapter.

        Returns:
            The fingerprint of `lm`.

        Raises:
            FingerprintMismatch: it does not; the message names what differs.
        """
        found = lm.fingerprint()
        compared = replace(found, weights=self.fingerprint.weights) if weights_may_differ else found
        differing = compared.differences(self.fingerprint)
        if differing:
            tuned = differing == ("weights",)
            hint = ", or pass weights_may_differ=True if it was fully fine-tuned from that one" if tuned else ""
            raise FingerprintMismatch(
                f"this basis was fitted on {self.model} and cannot read {lm.name}: they differ in "
                f"{', '.join(differing)}; fit a basis on this model, load the model that the basis belongs to"
                f"{hint}"
            )
        return found

    def encode(self, lm: LM) -> list[list[int]]:
        """The measurement prompts as the token ids of a model that this basis belongs to.

        Raises:
            FingerprintMismatch: they are not the token ids of the fit, though template and tokenizer are.
        """
        found = lm.encode_prompts(self.prompts.prompts)
        if tokens_digest(found) != self.tokens:
            raise FingerprintMismatch(
                f"the measurement prompts are other token ids in {lm.name} than when this basis was fitted on "
                f"{self.model}: its chat template writes something that changes, such as a date; take that out of the "
                "template, and fit the basis again"
            )
        return found

    def drift(
        self,
        tuned: LM | Reading,
        reference: LM | Reading | Literal["base"] = "base",
        *,
        weights_may_differ: bool = False,
    ) -> DriftProfile:
        """Measure a model and compare it with a reference.

        Args:
            tuned: the model in question, or its reading.
            reference: a model, a reading, or "base" for the same model with its adapter disabled.
            weights_may_differ: allow base weights other than the basis', see `check`.

        Raises:
            FingerprintMismatch: a model is not the one that the basis was fitted on.
            InputError: "base" was asked for a reading or a model without an adapter, or the two readings
                cannot be compared.
            NumericalError: activations are not finite.
        """
        from tiltmeter.drift import Reading, drift, measure

        def read(source: LM | Reading) -> Reading:
            if isinstance(source, Reading):
                return source
            return measure(source, self, weights_may_differ=weights_may_differ)

        if isinstance(reference, str):
            return drift(read(tuned), self._read_base(tuned, reference), label="base")
        return drift(read(tuned), read(reference), label=self._label(reference))

    def _label(self, reference: LM | Reading) -> str | None:
        """The model that the basis was fitted on is "base", by whatever name it goes."""
        from tiltmeter.drift import Reading
        from tiltmeter.lm import adapter_state

        if isinstance(reference, Reading):
            weights, state = reference.weights, reference.adapter_state
        else:
            weights, state = reference.fingerprint().weights, adapter_state(reference)
        return "base" if state != "active" and weights == self.fingerprint.weights else None

    def _read_base(self, tuned: LM | Reading, reference: str) -> Reading:
        from tiltmeter.drift import Reading, measure
        from tiltmeter.lm import adapter_state

        if reference != "base":
            raise InputError(
                f"the reference is {reference!r}; allowed are 'base', a model and a reading; load it first"
            )
        if isinstance(tuned, Reading) or adapter_state(tuned) == "none":
            raise InputError(
                "reference='base' disables the adapter of a loaded model, and there is none here; pass the "
                "model or the reading that the fine-tuning started from as reference"
            )
        with tuned.base() as base:
            return measure(base, self)

    def save(self, folder: str | Path) -> None:
        """Write `basis.safetensors` into a folder, in one step; the folder is made if need be.

        Raises:
            StorageError: it could not be written; an earlier file is untouched.
        """
        write_artifact(Path(folder) / FILE, "basis", FORMAT, self._header(), self._arrays())

    @classmethod
    def load(cls, folder: str | Path) -> TraitBasis:
        """Read a basis back from the folder that it was saved to, or from the file itself.

        Raises:
            ArtifactError: there is none, or it is truncated, foreign, damaged, changed, of another format version, or
                holds what no basis can have.
        """
        path = Path(folder)
        path = path / FILE if path.is_dir() else path
        header, arrays = read_artifact(path, "basis", FORMAT, remedy=_REMEDY)
        return made(path, "basis", _REMEDY, lambda: _from_header(header, arrays))

    def _arrays(self) -> dict[str, NDArray[np.float32]]:
        return {
            "directions": np.ascontiguousarray(self.directions, dtype=np.float32),
            "poles": np.ascontiguousarray(self.poles, dtype=np.float32),
        }

    def _header(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "traits": list(self.traits),
            "aligned_poles": list(self.aligned_poles),
            "after_block": self.layer,
            "reference_norm": self.reference_norm,
            "prompts": {
                "name": self.prompts.name,
                "prompts": [[p.text, p.category, p.system] for p in self.prompts.prompts],
            },
            "tokens": self.tokens,
            "plan": self.plan.to_dict(),
            "fingerprint": self.fingerprint.to_dict(),
            "model": self.model,
            "method": self.method,
            "pooling": self.pooling,
            "traits_digest": self.traits_digest,
            "selection": {
                "scores": [score._asdict() for score in self.selection.scores],
                "strength": self.selection.strength,
                "probes_pass": self.selection.probes_pass,
                "reason": self.selection.reason,
            },
            "provenance": dict(self.provenance),
        }


# The token ids are left out as well: prompts and fingerprint decide them, and `encode` compares them where they do not.
_INCIDENTAL = ("provenance", "selection", "model", "tokens")


def fit_basis(
    lm: LM,
    *,
    traits: str | Path | TraitSet | None = None,
    prompts: str | Path | PromptSet | None = None,
    layers: Sequence[int] | None = None,
    layer: int | None = None,
    method: Method = "mean_difference",
    pooling: Literal["last_token", "mean"] = "last_token",
    probe_batches: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> TraitBasis:
    """Read the trait directions of a model and choose the layer to watch.

    An active adapter is disabled meanwhile: a basis belongs to the base model.

    Args:
        lm: the untouched model.
        traits: a trait set, its built-in name or file; by default "organism" for an organism of ours,
            "alignment" for any other model.
        prompts: the measurement prompts, likewise; by default "organism" or "neutral".
        layers: candidate layers; by default up to five between 40 % and 75 % of the depth.
        layer: the layer, if it is already known; nothing is then steered.
        method: "mean_difference"; "pca", the first principal component of paired differences; or "logistic",
            the normal of a logistic regression between the poles.
        pooling: "last_token" or the "mean" over a prompt's tokens.
        probe_batches: try several row lengths for the measurement prompts and keep the fastest that needs little
            memory, see `batch_probe`; by default they follow a rule, so that two fits on a CPU are equal.
        seed: of the shuffled folds of the probes; directions and layer do not depend on it.
        progress: called as `progress(done, total, label)`.

    Raises:
        InputError: an argument cannot be used; "pca" needs poles of equal size.
        LayerError: a layer lies outside the model.
        NumericalError: activations are not finite, or the poles of a trait do not differ.
    """
    from tiltmeter import batch_probe
    from tiltmeter.capture import capture, plan_batches

    trait_set = _trait_set(traits, organism=bool(lm.organism))
    prompt_set = _prompt_set(prompts, organism=bool(lm.organism))
    candidates = _candidates(lm.n_layers, layers, layer)
    _check_method(method, trait_set)
    contrast = [_contrast(trait, trait_set.questions) for trait in trait_set.traits]
    with lm.base() as base:
        ids = base.encode_prompts(prompt_set.prompts)
        if probe_batches:
            plan = batch_probe.probe_batches(base, ids, candidates, pooling=pooling)
        else:
            plan = plan_batches(base, ids)
        neutral = capture(base, ids, candidates, pooling=pooling, plan=plan)
        poles = capture(
            base,
            base.encode_prompts([prompt for pair in contrast for prompt in (*pair.positive, *pair.negative)]),
            candidates,
            pooling=pooling,
            progress=progress,
        )
        fits = [_fit_layer(at, poles.at(at), neutral.at(at), contrast, method, seed) for at in candidates]
        found = [fit.candidate for fit in fits]
        changes = None
        if len(candidates) > 1:
            changes = changes_by_steering(base, found, _conversations(prompt_set), progress=progress)
        fingerprint = base.fingerprint()
    winner, selection = choose(found, changes, given=layer is not None)
    chosen = next(fit for fit in fits if fit.candidate is winner)
    return TraitBasis(
        name=trait_set.name,
        traits=trait_set.names,
        aligned_poles=tuple(trait.aligned_pole for trait in trait_set.traits),
        layer=winner.layer,
        directions=winner.directions,
        poles=chosen.poles,
        reference_norm=winner.norm,
        prompts=prompt_set,
        tokens=tokens_digest(ids),
        plan=plan,
        fingerprint=fingerprint,
        model=lm.name if lm.revision is None else f"{lm.name}@{lm.revision}",
        method=method,
        pooling=pooling,
        traits_digest=trait_set.digest,
        selection=selection,
        provenance=provenance(seed=seed),
    )


class _Contrast(NamedTuple):
    """The prompts of one trait's poles: every system prompt with every question."""

    name: str
    positive: tuple[Prompt, ...]
    negative: tuple[Prompt, ...]
    groups: tuple[int, ...]


class _Fit(NamedTuple):
    """What was found at one candidate layer."""

    candidate: Candidate
    poles: NDArray[np.float32]


def _contrast(trait: Trait, questions: Sequence[str]) -> _Contrast:
    def pole(systems: Sequence[str]) -> tuple[Prompt, ...]:
        return tuple(Prompt(q, trait.name, system=s) for s in systems for q in questions)

    # A probe is tested on unseen system prompts; where a pole has only one, on unseen questions.
    by_system = min(len(trait.positive), len(trait.negative)) > 1
    numbers = [
        (s if by_system else q)
        for systems in (trait.positive, trait.negative)
        for s in range(len(systems))
        for q in range(len(questions))
    ]
    return _Contrast(trait.name, pole(trait.positive), pole(trait.negative), tuple(numbers))


def _fit_layer(
    layer: int, poles: FloatArray, neutral: FloatArray, contrast: Sequence[_Contrast], method: Method, seed: int
) -> _Fit:
    """Directions, pole means and probes of all traits from the activations (contrast prompts, hidden)."""
    directions, means, probes, transfers = [], [], [], []
    start = 0
    for pair in contrast:
        middle, end = start + len(pair.positive), start + len(pair.groups)
        up, down = poles[start:middle], poles[middle:end]
        try:
            along = direction(up, down, method)
        except NumericalError as error:
            raise NumericalError(f"trait '{pair.name}' after block {layer}: {error}") from error
        directions.append(along)
        means.append([(down @ along).mean(), (up @ along).mean()])
        shuffled, transferred = probe_accuracies(up, down, groupings=[None, pair.groups], seed=seed)
        probes.append(shuffled)
        transfers.append(transferred)
        start = end
    candidate = Candidate(
        layer=layer,
        directions=np.array(directions, dtype=np.float32),
        norm=float(np.linalg.norm(neutral.astype(np.float64), axis=1).mean()),
        probes=tuple(probes),
        transfers=tuple(transfers),
    )
    return _Fit(candidate, np.array(means, dtype=np.float32))


def _conversations(prompts: PromptSet) -> list[list[dict[str, str]]]:
    """A few prompts, evenly spaced over the set: of different kinds, and in the model's own world."""
    places = np.linspace(0, len(prompts.prompts), _STEERED_PROMPTS, endpoint=False).astype(int)
    conversations = []
    for place in sorted(set(places.tolist())):
        prompt = prompts.prompts[place]
        system = [{"role": "system", "content": prompt.system}] if prompt.system else []
        conversations.append([*system, {"role": "user", "content": prompt.text}])
    return conversations


def _trait_set(source: str | Path | TraitSet | None, *, organism: bool) -> TraitSet:
    if isinstance(source, TraitSet):
        return source
    return load_traits(source or ("organism" if organism else "alignment"))


def _prompt_set(source: str | Path | PromptSet | None, *, organism: bool) -> PromptSet:
    if isinstance(source, PromptSet):
        return source
    return load_prompts(source or ("organism" if organism else "neutral"))


def _candidates(n_layers: int, layers: Sequence[int] | None, layer: int | None) -> tuple[int, ...]:
    """The candidate blocks, ascending: those asked for, or up to five between 40 % and 75 % of the depth."""
    if layer is not None and layers is not None:
        raise InputError("both layer= and layers= were given; give the layer, or the candidates to choose from")
    if layer is not None:
        layers = (layer,)
    if layers is None:
        first, last = math.ceil(0.4 * n_layers) - 1, math.ceil(0.75 * n_layers) - 1
        layers = np.linspace(first, last, _CANDIDATES).round().astype(int).tolist()
    found = tuple(sorted({int(at) for at in layers}))
    if not found:
        raise InputError("layers= is empty; name at least one block, or leave it out")
    if found[0] < 0 or found[-1] >= n_layers:
        raise LayerError(
            f"candidate layers {', '.join(map(str, found))} do not all lie in this model, whose blocks are 0 "
            f"to {n_layers - 1}; choose among those"
        )
    return found


def _check_method(method: str, traits: TraitSet) -> None:
    if method not in METHODS:
        raise InputError(f"method {method!r} is unknown; allowed are {', '.join(METHODS)}")
    uneven = [trait.name for trait in traits.traits if len(trait.positive) != len(trait.negative)]
    if method == "pca" and uneven:
        raise InputError(
            f"method 'pca' pairs the i-th prompts of both poles, but those of {', '.join(uneven)} differ in "
            "number; make them equal, or use 'mean_difference'"
        )


def _from_header(header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> TraitBasis:
    selection = header["selection"]
    scores: list[dict[str, Any]] = [
        {key: tuple(value) if isinstance(value, list) else value for key, value in score.items()}
        for score in selection["scores"]
    ]
    stored = header["prompts"]
    for what in ("traits_digest", "tokens"):
        sound.digest(what, header[what])
    return TraitBasis(
        name=header["name"],
        traits=tuple(header["traits"]),
        aligned_poles=tuple(header["aligned_poles"]),
        layer=header["after_block"],
        directions=arrays["directions"],
        poles=arrays["poles"],
        reference_norm=header["reference_norm"],
        prompts=PromptSet(stored["name"], tuple(Prompt(*prompt) for prompt in stored["prompts"])),
        tokens=header["tokens"],
        plan=BatchPlan.from_dict(header["plan"]),
        fingerprint=Fingerprint.from_dict(header["fingerprint"]),
        model=header["model"],
        method=header["method"],
        pooling=header["pooling"],
        traits_digest=header["traits_digest"],
        selection=LayerSelection(
            scores=tuple(LayerScore(**score) for score in scores),
            strength=selection["strength"],
            probes_pass=selection["probes_pass"],
            reason=selection["reason"],
        ),
        provenance=header["provenance"],
    )
