"""The basis: one direction per trait, at one layer, with everything that is needed to read a model along them.

Fitting runs the untouched model over every system prompt of every trait, combined with every question, and takes
the activations of the last prompt token after all candidate layers in one pass. The direction of a trait is the
unit mean difference between its poles (arXiv 2606.07631, Eq. 1):

    v_t = (mean h+ - mean h-) / || mean h+ - mean h- ||

and the layer is the one where adding such a direction changes the model's greedy answers most. The layer's
linear probes are reported beside; they choose nothing, since they saturate.

A basis belongs to the model it was fitted on. It is stored as one safetensors file with a JSON header, holds that
model's fingerprint, and refuses any other model. This module knows no architecture and registers no hook.

    >>> basis = fit_basis(lm)
    >>> basis.save("basis"); basis = TraitBasis.load("basis")
    >>> basis.drift(tuned, reference=lm).drift
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tiltmeter.errors import (
    ArtifactError,
    FingerprintMismatch,
    InputError,
    LayerError,
    NumericalError,
    StorageError,
)
from tiltmeter.runs import provenance
from tiltmeter.traits import Prompt, PromptSet, TraitSet, load_prompts, load_traits

if TYPE_CHECKING:
    from tiltmeter.capture import BatchPlan
    from tiltmeter.drift import DriftProfile, Reading
    from tiltmeter.lm import LM, Fingerprint

__all__ = ["LayerScore", "LayerSelection", "TraitBasis", "direction", "fit_basis", "probe_accuracy"]

FORMAT = 1
FILE = "basis.safetensors"
STRENGTH = 0.5
"""Steering strength for layer selection, in units of the layer's mean activation norm."""
PROBE_PASS = 0.8
PROBE_SHARE = 0.75
_STEERED_PROMPTS = 3
_STEERED_TOKENS = 32
_FOLDS = 5

FloatArray = NDArray[np.floating[Any]]
Progress = Callable[[int, int, str], None]
Method = Literal["mean_difference", "pca", "logistic"]
_METHODS = ("mean_difference", "pca", "logistic")


class LayerScore(NamedTuple):
    """What was found at one candidate layer.

    Attributes:
        layer: the block after which was read, counted from 0.
        norm: mean activation norm of the measurement prompts there.
        divergence: mean change of greedy answers under steering, 0 (none) to 1; None where not measured.
        probe_accuracy: cross-validated accuracy of each trait's linear probe, 0 to 1.
    """

    layer: int
    norm: float
    divergence: float | None
    probe_accuracy: tuple[float, ...]


@dataclass(frozen=True)
class LayerSelection:
    """How the layer was chosen.

    Attributes:
        scores: one per candidate, in the order of the layers.
        strength: steering strength in units of each layer's mean activation norm; None where nothing was
            steered.
        probes_pass: whether at the chosen layer at least 75 % of the traits have a probe accuracy above 0.8.
        reason: why this layer, in one sentence.
    """

    scores: tuple[LayerScore, ...]
    strength: float | None
    probes_pass: bool
    reason: str


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
    plan: BatchPlan
    fingerprint: Fingerprint
    model: str
    method: str
    pooling: Literal["last_token", "mean"]
    traits_digest: str
    selection: LayerSelection
    provenance: Mapping[str, Any]

    def __post_init__(self) -> None:
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
        if not (np.isfinite(self.reference_norm) and self.reference_norm > 0):
            raise NumericalError(
                f"the reference norm of basis '{self.name}' is {self.reference_norm}; it must be positive; "
                "fit the basis again"
            )

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
        text = json.dumps(content, sort_keys=True).encode()
        arrays = self._arrays()
        return hashlib.sha256(text + b"".join(arrays[key].tobytes() for key in sorted(arrays))).hexdigest()

    def read(self, activations: FloatArray) -> FloatArray:
        """Activations (prompts, hidden) to projections (prompts, k), float32.

        Raises:
            InputError: the activations have another width than the directions.
        """
        hidden = self.directions.shape[1]
        if activations.ndim != 2 or activations.shape[1] != hidden:
            raise InputError(
                f"activations of shape {activations.shape} do not fit a basis of width {hidden}; give "
                f"(prompts, {hidden}), captured after block {self.layer} of {self.model}"
            )
        return np.asarray(activations.astype(np.float32) @ self.directions.T.astype(np.float32))

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
            hint = (
                "; if it was fully fine-tuned or merged from that model, pass weights_may_differ=True"
                if compared.weights != self.fingerprint.weights
                else ""
            )
            raise FingerprintMismatch(
                f"this basis was fitted on {self.model} and cannot read {lm.name}: they differ in "
                f"{', '.join(differing)}; fit a basis on this model, or load the model that it belongs to"
                f"{hint}"
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
        return drift(read(tuned), read(reference))

    def _read_base(self, tuned: LM | Reading, reference: str) -> Reading:
        from tiltmeter.drift import Reading, measure
        from tiltmeter.lm import adapter_state

        if reference != "base":
            raise InputError(
                f"the reference is {reference!r}; allowed are 'base', a model and a reading; load the model first"
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
        from safetensors.numpy import save

        header = {"format": FORMAT, "kind": "basis", **self._header()}
        content = save(self._arrays(), metadata={"tiltmeter": json.dumps(header)})
        target = Path(folder) / FILE
        temporary = ""
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{FILE}.")
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                os.fchmod(file.fileno(), 0o644)
            os.replace(temporary, target)
        except OSError as error:
            if temporary:
                Path(temporary).unlink(missing_ok=True)
            raise StorageError(f"cannot write {target} ({error.strerror}); free space or choose another folder") from error

    @classmethod
    def load(cls, folder: str | Path) -> TraitBasis:
        """Read a basis back from the folder that it was saved to, or from the file itself.

        Raises:
            ArtifactError: there is none, or it is truncated, foreign, damaged or of another format version.
        """
        path = Path(folder)
        path = path / FILE if path.is_dir() else path
        header, arrays = _read_artifact(path)
        try:
            return _from_header(cls, header, arrays)
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise ArtifactError(
                f"{path} is damaged ({type(error).__name__}: {error}); restore it or fit the basis again"
            ) from error

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


_INCIDENTAL = ("provenance", "selection", "model")


def fit_basis(
    lm: LM,
    *,
    traits: str | Path | TraitSet | None = None,
    prompts: str | Path | PromptSet | None = None,
    layers: Sequence[int] | None = None,
    layer: int | None = None,
    method: Method = "mean_difference",
    pooling: Literal["last_token", "mean"] = "last_token",
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
        seed: kept with the basis; no step of the fit is random with greedy answers.
        progress: called as `progress(done, total, label)`.

    Raises:
        InputError: an argument cannot be used; "pca" needs poles of equal size.
        LayerError: a layer lies outside the model.
        NumericalError: activations are not finite, or the poles of a trait do not differ.
    """
    trait_set = _loaded(traits, "organism" if lm.organism else "alignment", load_traits)
    prompt_set = _loaded(prompts, "organism" if lm.organism else "neutral", load_prompts)
    candidates = _candidates(lm.n_layers, layers, layer)
    _check_method(method, trait_set)
    with lm.base() as base:
        return _fit(base, trait_set, prompt_set, candidates, method, pooling, seed, layer is not None, progress)
