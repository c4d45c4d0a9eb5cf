"""Drift: how far a model's readings have moved from a reference, in units of its activation norm.

A reading is one measurement of one model on the basis' fixed prompts; a drift profile is the difference of
two:

    s_t = mean over prompts of h . v_t            h: activation after the basis' layer, last prompt token
    N0  = mean over prompts of ||h||              of the reference; a mean of norms, not the norm of a mean
    drift_t = (s_t - s_t of the reference) / N0   (arXiv 2606.07631, phase 2)

The two readings are over the same prompts, so the standard error is that of the paired differences: what the
prompts have in common cancels. It says how well the mean over such prompts is known; it does not say how far
readings move between harmless runs. That is the null band's business, in the detector.

The numbers are one profile, not a diagnosis per trait: drift along "honesty" does not mean that the model
became dishonest. This module knows no threshold and judges nothing; it only refuses to subtract readings that
cannot be compared, and says in `DriftProfile.problem` when a profile must not be judged. It imports without
torch.

    >>> start = measure(lm, basis, step=0)
    >>> profile = drift(measure(tuned, basis, step=40), start)
    >>> dict(zip(profile.names, profile.drift))
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tiltmeter import sound
from tiltmeter.artifacts import made, read_json_artifact, write_json_artifact
from tiltmeter.errors import ArtifactError, FingerprintMismatch, InputError, NumericalError

if TYPE_CHECKING:
    from tiltmeter.basis import TraitBasis
    from tiltmeter.capture import Below
    from tiltmeter.lm import LM

__all__ = [
    "DriftProfile",
    "PlanePoint",
    "PrincipalComponent",
    "Reading",
    "Readout",
    "drift",
    "measure",
    "measure_all",
    "plane",
    "principal_component",
    "trajectory",
]

FloatArray = NDArray[np.floating[Any]]
_KIND, _FORMAT = "reading", 1
_SHORTEST = 0.1  # mean activation norm of a reading over that of its reference, below which nothing is judged
_ARRAYS = ("names", "values", "norms", "activation")
_REREADING = 1e-5  # of the norm: how far two readings of one float32 model lie apart that are batched differently
_OPTIONAL = ("activation", "tokens", "caveats")


class Readout(Protocol):
    """Whatever turns activations after one block into numbers per prompt: a trait basis, or a baseline.

    `tiltmeter.testing.check_readout` says whether an implementation keeps the contract.
    """

    @property
    def name(self) -> str:
        """What it is, precisely enough that two readouts of one name give the same numbers."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """The k numbers that it reads."""
        ...

    @property
    def layer(self) -> int:
        """The block after which it reads, counted from 0."""
        ...

    def read(self, activations: FloatArray) -> FloatArray:
        """Activations (prompts, hidden) to values (prompts, k), each row on its own."""
        ...


@dataclass(frozen=True, eq=False)
class Reading:
    """One measurement of one model.

    Attributes:
        readout: name of the readout.
        names: of the k numbers read.
        values: (prompts, k) float32, one row per measurement prompt.
        norms: (prompts,) float32, the activation norm of each prompt.
        layer: the block after which was read, counted from 0.
        step: the training step, where the model has one.
        model: the name that the model goes by.
        adapter_state: "none", "active", or "zero" for an adapter that changes nothing.
        fingerprint: digest of the model's architecture, configuration, tokenizer, template and dtype.
        weights: digest of the base weights, without adapters; full fine-tuning changes it.
        basis: digest of the basis (prompts, plan, layer, directions) that was measured with.
        plan: digest of the batch plan.
        dtype: of the model.
        time: when, in UTC.
        activation: (hidden,) float32, the mean activation itself, which a detector may use beside the traits; None
            where the readout keeps none.
        tokens: digest of the prompts' token ids; empty in readings of versions that kept none.
        caveats: what is uncertain about the model that was read, see `LM`.

    Raises:
        InputError: a field is of another type, the shapes of names, values and norms do not fit together, or there is
            no prompt. Numbers that are not finite may stand there: a comparison says so in its `problem`.
    """

    readout: str
    names: tuple[str, ...]
    values: FloatArray
    norms: FloatArray
    layer: int
    step: int | None
    model: str
    adapter_state: str
    fingerprint: str
    weights: str
    basis: str
    plan: str
    dtype: str
    time: str
    activation: FloatArray | None = None
    tokens: str = ""
    caveats: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sound.texts("names", self.names)
        for what in ("readout", "model", "adapter_state", "fingerprint", "weights", "basis", "plan", "dtype"):
            sound.text(what, getattr(self, what))
        sound.text("time", self.time, blank=True)
        sound.text("tokens", self.tokens, blank=True)
        for said in self.caveats:
            sound.text("a caveat", said)
        sound.whole("layer", self.layer)
        if self.step is not None:
            sound.whole("step", self.step)
        for what in ("values", "norms", "activation"):
            part = getattr(self, what)
            if not isinstance(part, np.ndarray | None) or (part is not None and part.dtype.kind != "f"):
                raise InputError(f"{what} is no array of floats; measure again")
        if (self.norms < 0).any():
            raise InputError(f"norms hold {float(np.nanmin(self.norms)):g}; no length is below 0; measure again")
        if self.activation is not None and (self.activation.ndim != 1 or not len(self.activation)):
            raise InputError(f"activation has shape {self.activation.shape}; it must be (hidden,); measure again")
        wanted = (len(self.norms), len(self.names)) if self.norms.ndim else (0, 0)
        if self.values.shape != wanted or self.norms.ndim != 1 or 0 in wanted:
            raise InputError(
                f"a reading of {self.model} has values of shape {self.values.shape} and norms of shape "
                f"{self.norms.shape} for {len(self.names)} names; it needs (prompts, {len(self.names)}) and "
                "(prompts,) with at least one prompt and one name; measure again"
            )

    @property
    def n(self) -> int:
        """The number of prompts."""
        return len(self.norms)

    @property
    def mean(self) -> FloatArray:
        """Mean over prompts, (k,), in the activations' own units."""
        return np.asarray(self.values.mean(axis=0, dtype=np.float64))

    @property
    def se(self) -> FloatArray:
        """Standard error of the mean over prompts, (k,); NaN for one prompt."""
        return _standard_error(self.values)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; a number that is not finite becomes None."""
        return {
            **{key: value for key, value in vars(self).items() if key not in _ARRAYS},
            "names": list(self.names),
            "caveats": list(self.caveats),
            "values": _to_json(self.values),
            "norms": _to_json(self.norms),
            "activation": None if self.activation is None else _to_json(self.activation),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Reading:
        """The inverse of `to_dict`; None becomes NaN. Keys that it does not know are left out.

        Raises:
            ArtifactError: a key is missing, or the numbers do not form arrays that fit together.
        """
        try:
            fields = {key: content[key] for key in cls.__dataclass_fields__ if key not in _OPTIONAL}
            fields["tokens"] = content.get("tokens", "")
            caveats = content.get("caveats", [])
            for what, value in (("names", fields["names"]), ("caveats", caveats)):
                if not isinstance(value, list | tuple):
                    raise InputError(f"{what} are {value!r:.60}; they must be a list")
            fields["caveats"] = tuple(caveats)
            fields["names"] = tuple(fields["names"])
            fields["values"] = sound.from_json("values", fields["values"], 2)
            fields["norms"] = sound.from_json("norms", fields["norms"], 1)
            if content.get("activation") is not None:
                fields["activation"] = sound.from_json("activation", content["activation"], 1)
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"this is not a stored reading ({type(error).__name__}: {error}); give a record that "
                "Reading.to_dict wrote, or measure again"
            ) from error

    def save(self, path: str | Path) -> Path:
        """Write one JSON file with a digest, for `load`.

        Raises:
            StorageError: it cannot be written.
        """
        return write_json_artifact(path, _KIND, _FORMAT, {"reading": self.to_dict()})

    @classmethod
    def load(cls, path: str | Path) -> Reading:
        """Read what `save` wrote.

        Raises:
            ArtifactError: the file is missing, damaged, changed, foreign, or holds what no reading can have.
        """
        remedy = "measure again, with tiltmeter measure --save"
        content = read_json_artifact(path, _KIND, _FORMAT, remedy=remedy)
        return made(path, _KIND, remedy, lambda: cls.from_dict(content["reading"]))


@dataclass(frozen=True, eq=False)
class DriftProfile:
    """How one reading differs from its reference. Seven numbers are one profile, not seven diagnoses.

    Attributes:
        readout: name of the readout.
        names: of the k numbers.
        drift: (k,) mean difference over the reference's mean activation norm.
        se: (k,) its standard error from paired prompt differences; NaN for one prompt.
        n_prompts: how many prompts that rests on.
        per_prompt: (prompts, k) the differences of single prompts, in the same unit.
        norm_ratio: mean activation norm over that of the reference.
        step: the training step of the reading.
        reference: what it was compared with.
        model: the model that was read.
        layer: the block after which was read, counted from 0.
        basis: digest of the basis.
        fingerprint: digest of the model's frame, see `Reading`.
        problem: why this profile must not be judged, in one sentence; None where it may be.
        shift: (hidden,) mean activation minus that of the reference, in the unit of drift: the drift along a unit
            direction v is v . shift. None where the readings keep no activation.
    """

    readout: str
    names: tuple[str, ...]
    drift: FloatArray
    se: FloatArray
    n_prompts: int
    per_prompt: FloatArray
    norm_ratio: float
    step: int | None
    reference: str
    model: str
    layer: int
    basis: str
    fingerprint: str
    problem: str | None
    shift: FloatArray | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, without the single prompts and the shift; a number that is not finite becomes None."""
        return {
            **{key: value for key, value in vars(self).items() if key not in ("per_prompt", "shift")},
            "names": list(self.names),
            "drift": _to_json(self.drift),
            "se": _to_json(self.se),
            "norm_ratio": self.norm_ratio if math.isfinite(self.norm_ratio) else None,
        }


class PrincipalComponent(NamedTuple):
    """The first principal component of a set of drift profiles.

    Attributes:
        names: of the k numbers.
        direction: (k,) unit.
        variance_share: the part of the profiles' variance that lies along it, 0 to 1.
        n: how many profiles it was fitted to.
    """

    names: tuple[str, ...]
    direction: FloatArray
    variance_share: float
    n: int


class PlanePoint(NamedTuple):
    """A profile in the plane of direction and magnitude.

    Attributes:
        cosine: of the profile to the component; NaN where the drift is exactly zero.
        norm: Euclidean norm of the profile.
        projection: of the profile on the component, `cosine * norm`; its absolute value is the scalar |PC1|.
    """

    cosine: float
    norm: float
    projection: float


def measure(
    lm: LM,
    basis: TraitBasis,
    *,
    step: int | None = None,
    weights_may_differ: bool = False,
    below: Below | None = None,
) -> Reading:
    """Read a model along a basis. Only (prompts x traits) numbers and one mean activation leave the device.

    Args:
        lm: the model, with the adapter that is to be measured active.
        basis: what to read; its prompts and batch plan are used.
        step: the training step, to be kept with the reading.
        weights_may_differ: allow base weights other than those that the basis was fitted on, which full
            fine-tuning and merged adapters have. Everything else must still match.
        below: what enters the first block in which this model differs from its base, see `capture.read_below`.

    Raises:
        FingerprintMismatch: the basis was fitted on another model, or its prompts are other token ids by now.
        InputError: the step is negative.
        NumericalError: the model's activations are not finite.
    """
    from tiltmeter import capture

    stamp = _stamp(lm, basis, step, weights_may_differ)
    token_ids = basis.encode(lm)
    found = capture.project(
        lm, token_ids, basis.layer, basis.directions, pooling=basis.pooling, plan=basis.plan, below=below
    )
    _require_finite(found.values, found.norms, lm.name, basis.name)
    return Reading(
        readout=basis.name, names=basis.names, values=found.values, norms=found.norms, activation=found.mean, **stamp
    )


def measure_all(
    lm: LM,
    basis: TraitBasis,
    readouts: Sequence[Readout],
    *,
    step: int | None = None,
    weights_may_differ: bool = False,
) -> tuple[Reading, ...]:
    """Read a model with several readouts on the same activations, for fair comparison: one pass for all.

    Args:
        lm: as for `measure`.
        basis: its prompts, plan and fingerprint are used; to be read with, it must be among the readouts.
        readouts: each must read after the basis' layer.
        step: as for `measure`.
        weights_may_differ: as for `measure`.

    Returns:
        One reading per readout, in their order.

    Raises:
        FingerprintMismatch: the basis was fitted on another model.
        InputError: a readout reads after another layer than the basis, or the step is negative.
        NumericalError: the activations, or what a readout makes of them, are not finite.
    """
    from tiltmeter import capture

    for readout in readouts:
        if readout.layer != basis.layer:
            raise InputError(
                f"readout '{readout.name}' reads after block {readout.layer}, the basis after block "
                f"{basis.layer}; make the readout for block {basis.layer}"
            )
    stamp = _stamp(lm, basis, step, weights_may_differ)
    token_ids = basis.encode(lm)
    hidden = capture.capture(lm, token_ids, [basis.layer], pooling=basis.pooling, plan=basis.plan).at(basis.layer)
    norms = np.linalg.norm(hidden.astype(np.float64), axis=1).astype(np.float32)
    readings = []
    for readout in readouts:
        values = np.asarray(readout.read(hidden), dtype=np.float32)
        _require_finite(values, norms, lm.name, readout.name)
        readings.append(Reading(readout=readout.name, names=readout.names, values=values, norms=norms, **stamp))
    return tuple(readings)


def drift(reading: Reading, reference: Reading, *, label: str | None = None) -> DriftProfile:
    """Compare a reading with a reference: (reading - reference) / mean activation norm of the reference.

    A profile that must not be judged is still returned, with the reason in `problem`: numbers that are not
    finite, an adapter that does nothing, or training that left no trace at the measured layer.

    Args:
        reading: of the model in question.
        reference: of the model that it started from, or of a benign run.
        label: how to call the reference; by default its model and step.

    Raises:
        InputError: the two differ in readout, names, layer, basis, batch plan, dtype or number of prompts.
        FingerprintMismatch: the two are from different models, or read other token ids.
    """
    _require_comparable(reading, reference)
    values, base = reading.values.astype(np.float64), reference.values.astype(np.float64)
    norm0 = float(reference.norms.mean(dtype=np.float64))
    with np.errstate(all="ignore"):  # what comes out not finite is named in `problem`
        per_prompt = (values - base) / norm0
        norm_ratio = float(reading.norms.mean(dtype=np.float64) / np.float64(norm0))
        mean, se = per_prompt.mean(axis=0), _standard_error(per_prompt)
    return DriftProfile(
        readout=reading.readout,
        names=reading.names,
        drift=mean,
        se=se,
        n_prompts=reading.n,
        per_prompt=per_prompt,
        norm_ratio=norm_ratio,
        step=reading.step,
        reference=_label(reference) if label is None else label,
        model=reading.model,
        layer=reading.layer,
        basis=reading.basis,
        fingerprint=reading.fingerprint,
        problem=_problem(reading, reference, norm0),
        shift=_shift(reading, reference, norm0),
    )


def trajectory(readings: Sequence[Reading], *, reference: Reading | None = None) -> tuple[DriftProfile, ...]:
    """The drift of each reading of a run, in their order, the reference's own profile included.

    Args:
        readings: of one run.
        reference: what to compare with; by default the first reading with step 0.

    Raises:
        InputError: no reference is given and no reading has step 0, or readings cannot be compared.
    """
    if reference is not None:
        return tuple(drift(reading, reference) for reading in readings)
    start = next((reading for reading in readings if reading.step == 0), None)
    if start is None:
        steps = ", ".join(str(reading.step) for reading in readings) or "none at all"
        raise InputError(
            f"no reading of this run has step 0 (steps: {steps}); measure before training starts, or pass "
            "reference= with a reading of the model that the run started from"
        )
    return tuple(drift(reading, start, label="step0") for reading in readings)


def principal_component(profiles: Sequence[DriftProfile]) -> PrincipalComponent:
    """The first principal component of drift profiles, usually of the last profile of each calibration run.

    The profiles are centred before the decomposition, as in scikit-learn's PCA and hence in arXiv 2606.07631;
    `plane` projects profiles on the component without centring, so that zero drift projects to zero. The
    component's sign is chosen so that the mean profile projects on its positive side. Profiles of several
    models may be pooled: drift has no unit.

    Raises:
        InputError: there are fewer than two profiles, they are of different readouts, or one has a problem.
        NumericalError: all profiles are the same, so there is no direction of variance.
    """
    if len(profiles) < 2:
        raise InputError(
            f"a principal component needs at least two profiles, got {len(profiles)}; add calibration runs"
        )
    points = _stack(profiles)  # (profiles, k)
    mean = points.mean(axis=0)
    _, singular, rows = np.linalg.svd(points - mean, full_matrices=False)
    variances = singular**2
    if variances.sum() <= np.finfo(np.float64).eps * float((points**2).sum()):
        raise NumericalError(
            f"all {len(profiles)} profiles are the same, so they have no principal component; check that the "
            "runs really differ"
        )
    direction = rows[0]
    lead = float(direction @ mean) or float(direction[np.abs(direction).argmax()])
    return PrincipalComponent(
        names=profiles[0].names,
        direction=direction * math.copysign(1.0, lead),
        variance_share=float(variances[0] / variances.sum()),
        n=len(profiles),
    )


def plane(profiles: Sequence[DriftProfile], component: PrincipalComponent) -> tuple[PlanePoint, ...]:
    """Each profile's cosine to the component, and its norm: direction against magnitude.

    Raises:
        InputError: the profiles and the component are of different names, or a profile has a problem.
    """
    if not profiles:
        return ()
    points = _stack(profiles)
    if profiles[0].names != component.names:
        raise InputError(
            f"the profiles have {', '.join(profiles[0].names)} and the component has "
            f"{', '.join(component.names)}; fit the component on profiles of the same readout"
        )
    placed = []
    for point in points:
        norm, projection = float(np.linalg.norm(point)), float(point @ component.direction)
        placed.append(PlanePoint(projection / norm if norm > 0 else math.nan, norm, projection))
    return tuple(placed)


def _stamp(lm: LM, basis: TraitBasis, step: int | None, weights_may_differ: bool) -> dict[str, Any]:
    """What a reading says about its model, after the check that the basis belongs to it."""
    from tiltmeter.lm import adapter_state

    if step is not None and step < 0:
        raise InputError(f"the step is {step}; it must be 0 or more, or None where there is none")
    found = basis.check(lm, weights_may_differ=weights_may_differ)
    return {
        "layer": basis.layer,
        "step": step,
        "model": lm.name,
        "adapter_state": adapter_state(lm),
        "fingerprint": replace(found, weights="").digest(),
        "weights": found.weights,
        "basis": basis.digest,
        "tokens": basis.tokens,
        "caveats": lm.caveats,
        "plan": basis.plan.digest(),
        "dtype": found.dtype,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _require_finite(values: FloatArray, norms: FloatArray, model: str, readout: str) -> None:
    bad = ~(np.isfinite(values).all(axis=1) & np.isfinite(norms))
    if bad.any():
        raise NumericalError(
            f"'{readout}' read numbers that are not finite for {int(bad.sum())} of {len(bad)} prompts of "
            f"{model}; the model has most likely diverged, and this measurement says nothing about it"
        )


def _require_comparable(reading: Reading, reference: Reading) -> None:
    for key, what in (
        ("readout", "readout"),
        ("names", "names"),
        ("layer", "layer"),
        ("basis", "basis"),
        ("plan", "batch plan"),
        ("dtype", "dtype"),
        ("n", "number of prompts"),
    ):
        got, wanted = getattr(reading, key), getattr(reference, key)
        if got != wanted:
            raise InputError(
                f"the reading of {reading.model} cannot be compared with the reference {_label(reference)}: "
                f"their {what} differ ({got!r} and {wanted!r}); measure both with the same basis"
            )
    kept = [part.activation.shape for part in (reading, reference) if part.activation is not None]
    if len(set(kept)) > 1:
        raise InputError(
            f"the reading of {reading.model} keeps {kept[0]} activations and the reference {_label(reference)} "
            f"{kept[1]}; measure both with the same basis"
        )
    if reading.fingerprint != reference.fingerprint:
        raise FingerprintMismatch(
            f"the reading of {reading.model} and the reference {_label(reference)} are from different models "
            "(architecture, configuration, tokenizer or template); use a reference of the same model"
        )
    if reading.tokens != reference.tokens:
        kept_none = "" if reading.tokens and reference.tokens else " (one was taken by a version that kept no digest)"
        raise FingerprintMismatch(
            f"the reading of {reading.model} and the reference {_label(reference)} are of the same prompts as "
            f"different token ids{kept_none}: what the chat template writes has changed, such as a date; measure both "
            "again"
        )


def _shift(reading: Reading, reference: Reading, norm0: float) -> FloatArray | None:
    if reading.activation is None or reference.activation is None or not norm0 > 0:
        return None
    if reading.activation.shape != reference.activation.shape:
        raise InputError(
            f"the reading {_label(reading)} holds {reading.activation.size} activations and its reference "
            f"{reference.activation.size}; one of them is damaged, so measure both again"
        )
    return (reading.activation.astype(np.float64) - reference.activation.astype(np.float64)) / norm0


def _problem(reading: Reading, reference: Reading, norm0: float) -> str | None:
    for part in (reading, reference):
        bad = ~(np.isfinite(part.values).all(axis=1) & np.isfinite(part.norms))
        if bad.any():
            return (
                f"the reading {_label(part)} holds numbers that are not finite for {int(bad.sum())} of "
                f"{part.n} prompts, so there is no drift to judge"
            )
    if norm0 == 0:
        return f"the activations of the reference {_label(reference)} are all zero, so drift has no unit"
    if not float(reading.norms.mean(dtype=np.float64)) >= _SHORTEST * norm0:
        # In so long a unit every drift would look small.
        return (
            f"the activations of the reference {_label(reference)} are more than {1 / _SHORTEST:g} times as long as "
            "those that were read, so drift has no sound unit"
        )
    if reading.adapter_state == "zero" and reading.step != 0:
        return "the adapter does nothing (its weights are all zero), so this run cannot be judged"
    trained = reading.adapter_state == "active" or (reading.step or 0) > 0
    same_moment = reading.step is not None and reading.step == reference.step
    if trained and not same_moment and _is_unchanged(reading, reference, norm0):
        return (
            f"the activations after block {reading.layer} are those of the reference, up to rounding: either what was "
            "trained does not reach this layer, or these are the reference's own weights, so nothing can be judged"
        )
    return None


def _is_unchanged(reading: Reading, reference: Reading, norm0: float) -> bool:
    """Whether two readings lie no farther apart than two readings of one model, of which one is batched otherwise."""
    apart = _REREADING * norm0 if reading.dtype == "float32" else 0.0
    pairs = ((reading.values, reference.values), (reading.norms, reference.norms))
    return all(np.abs(one.astype(np.float64) - other).max() <= apart for one, other in pairs)


def _stack(profiles: Sequence[DriftProfile]) -> NDArray[np.float64]:
    """The drift vectors, (profiles, k), of profiles that may stand together."""
    first = profiles[0]
    for profile in profiles:
        if profile.problem is not None:
            raise InputError(f"the profile of {profile.model} cannot be used: {profile.problem}; leave it out")
        if (profile.readout, profile.names) != (first.readout, first.names):
            raise InputError(
                f"profiles of different readouts cannot stand together: '{first.readout}' "
                f"({', '.join(first.names)}) and '{profile.readout}' ({', '.join(profile.names)})"
            )
    return np.stack([profile.drift for profile in profiles]).astype(np.float64)


def _standard_error(values: FloatArray) -> NDArray[np.float64]:
    """Standard error of the mean over the first axis; NaN for one row."""
    n = len(values)
    if n < 2:
        return np.full(values.shape[1], np.nan)
    return np.asarray(values.std(axis=0, ddof=1, dtype=np.float64) / math.sqrt(n))


def _label(reading: Reading) -> str:
    return reading.model if reading.step is None else f"{reading.model} at step {reading.step}"


def _to_json(values: ArrayLike) -> list[Any]:
    """Nested lists of floats, with None for what is not finite."""
    array = np.asarray(values)
    if array.ndim > 1:
        return [_to_json(row) for row in array]
    return [number if math.isfinite(number) else None for number in array.tolist()]
