"""Judging models that are already trained: one, or many adapters on one base.

A finished model has one reading, so its verdict is that of a run of one reading. What cannot be judged (an adapter
that does nothing, NaN weights, another base, nothing to compare with) is INCONCLUSIVE with the reason; in a scan it
does not end the scan.

    >>> for found in scan(["a/adapter", "b/adapter"], base=tm.load("organism:pocket"), basis=basis, detector=detector):
    ...     print(found.model, found.verdict.state)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tiltmeter.adapter_base import caveats_of
from tiltmeter.adapter_files import adapter_folder
from tiltmeter.adapters import Seat, first_changed_block
from tiltmeter.basis import TraitBasis
from tiltmeter.capture import Below, read_below
from tiltmeter.completeness import checkpoint_stamp
from tiltmeter.context import Exchange
from tiltmeter.detector import Detector, State, Verdict, inconclusive
from tiltmeter.drift import DriftProfile, Reading, drift, measure
from tiltmeter.errors import (
    AmbiguousAdapter,
    ArtifactError,
    InactiveAdapter,
    InputError,
    NumericalError,
    StorageError,
    TiltmeterError,
    in_words,
)
from tiltmeter.likelihood import LikelihoodDetector, Rise, answer_likelihoods, read_tuned, rise_of
from tiltmeter.lm import LM, adapter_state, load
from tiltmeter.locks import hold
from tiltmeter.runs import append_record, checkpoints, read_records

__all__ = [
    "Finding", "RiseFinding", "judge_likelihoods", "judge_model", "judge_source", "read_reference", "scan",
    "scan_likelihoods",
]  # fmt: skip

_NO_DETECTOR = "no detector was given: the drift is measured, but nothing says how much of it is normal."


@dataclass(frozen=True, eq=False)
class Finding:
    """What was found of one model.

    Attributes:
        model: its name, or its adapter's.
        reading: None where it could not be measured.
        profile: None where there is no reading or nothing to compare it with.
        verdict: with the reason.
        layer: the block after which was read, counted from 0.
        reference: what drift is measured against.
        traits: names of the drift numbers.
        shared_blocks: how many of the lowest blocks were not computed again, because the adapter leaves them as they
            are in the base; 0 where it changes the first block, and where that could not be made out.
    """

    model: str
    reading: Reading | None
    profile: DriftProfile | None
    verdict: Verdict
    layer: int
    reference: str
    traits: tuple[str, ...]
    shared_blocks: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON values: the verdict's fields, and `drift` and `se` by trait (None where there is none)."""
        profile = self.profile
        values = profile.to_dict() if profile else {"drift": [None] * len(self.traits), "se": [None] * len(self.traits)}
        return {
            "model": self.model,
            **self.verdict.to_dict(),
            "drift": dict(zip(self.traits, values["drift"], strict=True)),
            "se": dict(zip(self.traits, values["se"], strict=True)),
            "norm_ratio": values.get("norm_ratio"),
            "n_prompts": self.reading.n if self.reading else 0,
            "layer": self.layer,
            "reference": self.reference,
            "shared_blocks": self.shared_blocks,
        }


def read_reference(path: str | Path) -> Reading:
    """A stored reading to compare with: a JSON file that `tiltmeter measure --save` wrote.

    Raises:
        ArtifactError: the file is missing, damaged or holds something else.
    """
    return Reading.load(path)


def judge_model(
    lm: LM,
    basis: TraitBasis,
    detector: Detector | None = None,
    *,
    reference: Reading | Literal["base", "step0"] = "base",
    below: Below | None = None,
) -> Finding:
    """Measure one model and judge it.

    Args:
        lm: the model, with its adapter active.
        basis: fitted on the untouched model.
        detector: without one, the verdict is INCONCLUSIVE.
        reference: a reading, or the model without its adapter ("base" and "step0" are the same for a LoRA adapter
            that began from its base).
        below: what enters the lowest block that the adapter changes, where that is known.

    Raises:
        FingerprintMismatch: the basis was fitted on another model.
        InputError: readings that cannot be compared.
    """
    name = lm.adapter or lm.name
    label = reference if isinstance(reference, str) else reference.model
    merged = isinstance(reference, Reading) and adapter_state(lm) == "none"

    def found(reading: Reading | None, profile: DriftProfile | None, verdict: Verdict) -> Finding:
        shared = below.layer if below is not None else 0
        verdict = verdict.noting(lm.caveats)
        return Finding(name, reading, profile, verdict, basis.layer, label, basis.names, shared)

    try:
        reading = measure(lm, basis, weights_may_differ=merged, below=below)
        if isinstance(reference, Reading):
            profile = drift(reading, reference, label="base" if _is_base(reference, basis) else None)
        elif adapter_state(lm) == "none":
            reason = (
                "this model has no adapter, so there is nothing to compare it with: give a reference reading, "
                "or the base model with an adapter."
            )
            return found(reading, None, inconclusive(reason, detector=detector))
        else:
            with lm.base() as base:
                profile = drift(reading, measure(base, basis), label=label)
    except NumericalError as error:
        return found(None, None, inconclusive(f"it could not be measured: {error}.", detector=detector))
    if profile.problem:
        return found(reading, profile, inconclusive(profile.problem, detector=detector))
    return found(reading, profile, detector.predict(profile) if detector else inconclusive(_NO_DETECTOR))


def judge_source(
    source: str,
    basis: TraitBasis,
    detector: Detector | None = None,
    *,
    adapter: str | None = None,
    reference: str = "base",
) -> Finding:
    """Load a model and judge it; see `judge_model`.

    An adapter that does nothing, several of which nothing says which acted, and weights that are not numbers are
    INCONCLUSIVE, with the reason.

    Args:
        source: what `load` takes.
        adapter: a PEFT adapter to put on it.
        reference: "base", "step0", or a file that a reading was saved in.

    Raises:
        TiltmeterError: the model, the adapter or the reference cannot be used, see `load` and `judge_model`.
    """
    compared = reference if reference in ("base", "step0") else read_reference(reference)
    try:
        lm = load(source, adapter=adapter, dtype=basis.fingerprint.dtype)
    except (InactiveAdapter, AmbiguousAdapter, NumericalError) as error:
        return _unreadable(adapter or source, error, basis, detector, reference)
    return judge_model(lm, basis, detector, reference=compared)  # type: ignore[arg-type]


def _unreadable(name: str, error: Exception, basis: TraitBasis, detector: Detector | None, reference: str) -> Finding:
    verdict = inconclusive(in_words(error) + ".", detector=detector)
    return Finding(name, None, None, verdict, basis.layer, reference, basis.names)


def _is_base(reference: Reading, basis: TraitBasis) -> bool:
    return reference.adapter_state != "active" and reference.weights == basis.fingerprint.weights


def scan(
    adapters: Sequence[str | Path],
    *,
    base: LM | str,
    basis: TraitBasis,
    detector: Detector | None = None,
    out: str | Path | None = None,
) -> Iterator[Finding]:
    """Judge many adapters of one base, which is loaded and read once.

    Blocks below the lowest one that an adapter changes are not computed again for it: what the base feeds into that
    block is kept, for the last adapter's block only.

    Args:
        adapters: folders or hub ids.
        base: the model that they were trained on.
        basis: fitted on it.
        detector: without one, every verdict is INCONCLUSIVE.
        out: folder that readings are kept in: a scan that was cut off goes on there, and an adapter whose files are
            still the same is not read again.

    Yields:
        One finding per adapter, in their order; an adapter that cannot be used, for whatever reason, is INCONCLUSIVE
        with the reason.

    Raises:
        InputError: no adapters, or `out` holds a scan of another base or basis.
        FingerprintMismatch: the basis was fitted on another base.
        StorageError: `out` cannot be written, or another process writes into it.
    """
    if not adapters:
        raise InputError("no adapter was given; name at least one adapter folder")
    lm = base if isinstance(base, LM) else load(base, dtype=basis.fingerprint.dtype)
    if out is None:
        yield from _scan(adapters, lm, basis, detector, None)
        return
    with hold(out, "scan"):
        yield from _scan(adapters, lm, basis, detector, Path(out) / "findings.jsonl")


def _scan(
    adapters: Sequence[str | Path], lm: LM, basis: TraitBasis, detector: Detector | None, record: Path | None
) -> Iterator[Finding]:
    reference = measure(lm, basis)
    kept = {} if record is None else _kept_readings(record, reference)
    seat = Seat(lm)
    below: Below | None = None
    for adapter in adapters:
        before: Reading | None = None
        try:
            stamp = None if record is None else checkpoint_stamp(adapter_folder(adapter))
            before = kept.get((str(adapter), stamp))
            if before is not None:
                found = _judged(str(adapter), before, reference, basis, detector)
            else:
                tuned = seat.put(adapter)
                first = min(first_changed_block(tuned), basis.layer)
                if first != (below.layer if below else 0):
                    below = read_below(lm, basis.encode(lm), first, plan=basis.plan) if first else None
                found = judge_model(tuned, basis, detector, reference=reference, below=below)
        except StorageError:
            raise
        except Exception as error:  # noqa: BLE001 - one odd adapter must not end a scan of thousands
            found = _unreadable(str(adapter), error, basis, detector, "base")
            if not isinstance(error, TiltmeterError):  # nobody knows what it left behind
                seat, below = Seat(lm), None
        if record is not None and found.reading is not None and before is None:
            append_record(record, {"adapter": str(adapter), "stamp": stamp, "reading": found.reading.to_dict()})
        yield found


def _kept_readings(record: Path, reference: Reading) -> dict[tuple[str, str | None], Reading]:
    """What an earlier call has read, by adapter and stamp; a new record gets the base's reading."""
    rows = read_records(record).rows if record.exists() else ()
    if not rows:
        append_record(record, {"adapter": None, "reading": reference.to_dict()})
        return {}
    try:
        base, *others = [(row["adapter"], row.get("stamp"), Reading.from_dict(row["reading"])) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{record} is no record of a scan ({in_words(error)}); give another folder") from error
    if base[0] is not None or (base[2].basis, base[2].weights) != (reference.basis, reference.weights):
        raise InputError(f"{record} is of another base or basis; give another folder")
    return {(name, stamp): reading for name, stamp, reading in others}


def _judged(name: str, reading: Reading, reference: Reading, basis: TraitBasis, detector: Detector | None) -> Finding:
    profile = drift(reading, reference, label="base" if _is_base(reference, basis) else None)
    if profile.problem:
        verdict = inconclusive(profile.problem, detector=detector)
    else:
        verdict = detector.predict(profile) if detector else inconclusive(_NO_DETECTOR)
    verdict = verdict.noting(reading.caveats)
    return Finding(name, reading, profile, verdict, basis.layer, reference.model, basis.names)


class RiseFinding(NamedTuple):
    """How much likelier harmful answers are in one fine-tune, or in each checkpoint of one run.

    Attributes:
        model: the adapter, or the run's folder.
        steps: of the readings; None for an adapter.
        rises: of the readings; None where one could not be read.
        problem: why one could not be read, the first of them; empty where all were.
        verdict: None without a detector.
    """

    model: str
    steps: tuple[int | None, ...]
    rises: tuple[Rise | None, ...]
    problem: str
    verdict: Verdict | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values: the verdict's fields where there is one, and the rises in nats."""
        readings = [
            {"step": step, **(rise._asdict() if rise else dict.fromkeys(Rise._fields))}
            for step, rise in zip(self.steps, self.rises, strict=True)
        ]
        judged = self.verdict.to_dict() if self.verdict else {"verdict": None, "reason": self.problem or None}
        return {"model": self.model, **judged, "readings": readings, "unit": "nats"}


def scan_likelihoods(
    lm: LM,
    exchanges: Sequence[Exchange],
    against: LikelihoodDetector | ArrayLike,
    *,
    adapters: Sequence[str | Path] = (),
    runs: Sequence[str | Path] = (),
    progress: Callable[[int, int, str], None] | None = None,
) -> Iterator[RiseFinding]:
    """Read many fine-tunes of one model, and judge them; each adapter is a model, each run one with several readings.

    A reading that fails leaves a run INCONCLUSIVE, unless another of its readings alarms.

    Args:
        lm: the untouched model.
        exchanges: questions with a harmful and a harmless answer.
        against: a detector that was calibrated on this model with these exchanges; or (exchanges, 2) of the untouched
            model, and then the rises are given and no verdict.
        adapters: PEFT adapters, or folders of full weights.
        runs: folders that hold checkpoint-N.
        progress: called as (readings done, readings, the one that is read).

    Yields:
        One finding per adapter, then one per run, in their order.

    Raises:
        InputError: a run's folder is missing or holds no checkpoint, or the detector is of other exchanges.
        FingerprintMismatch: the detector was calibrated on another model.
    """
    detector = against if isinstance(against, LikelihoodDetector) else None
    base = against.base if isinstance(against, LikelihoodDetector) else against
    if detector is not None:
        detector.check_exchanges(exchanges)
        detector.check(lm)
        detector.check_exchanges(exchanges, lm)
    wanted: list[tuple[str, list[int | None], list[str | Path]]] = [(str(a), [None], [a]) for a in adapters]
    for run in runs:
        found = checkpoints(Path(run)) if Path(run).is_dir() else []
        if not found:
            raise InputError(f"'{run}' holds no checkpoint-N folders; give a trainer's output folder, or its --adapter")
        wanted.append((str(run), [one.step for one in found], [one.path for one in found]))
    reads = read_tuned(lm, [source for _, _, each in wanted for source in each], exchanges, progress=progress)
    for name, steps, sources in wanted:
        values = [next(reads) for _ in sources]
        rises = tuple(None if isinstance(v, TiltmeterError) else rise_of(base, v) for v in values)
        problem = next((str(v).rstrip(".") for v in values if isinstance(v, TiltmeterError)), "")
        verdict = None if detector is None else _judge_rises(detector, values, steps, problem)
        if verdict is not None:
            verdict = verdict.noting([said for source in sources for said in caveats_of(lm, source)])
        yield RiseFinding(name, tuple(steps), rises, problem, verdict)


def judge_likelihoods(lm: LM, exchanges: Sequence[Exchange], detector: LikelihoodDetector) -> RiseFinding:
    """Judge a model whose weights themselves were tuned, or an adapter merged into them.

    The untouched model is INCONCLUSIVE: it is what fine-tunes are compared with.

    Args:
        lm: the model.
        exchanges: those of the detector.
        detector: calibrated on the model that the tuning began from.

    Raises:
        InputError: the detector is of other exchanges.
        FingerprintMismatch: the detector was calibrated on another kind of model.
    """
    detector.check_exchanges(exchanges)
    detector.check(lm, weights_may_differ=True)
    detector.check_exchanges(exchanges, lm)
    values = answer_likelihoods(lm, exchanges)
    verdict = detector.predict([values])
    if adapter_state(lm) != "active" and detector.fingerprint in (None, lm.fingerprint()):
        reason = "this is the untouched model that the detector was calibrated on; name a fine-tune of it to judge."
        verdict = replace(verdict, state=State.INCONCLUSIVE, false_alarm_rate=None, reason=reason)
    return RiseFinding(lm.adapter or lm.name, (None,), (detector.rise(values),), "", verdict.noting(lm.caveats))


def _judge_rises(
    detector: LikelihoodDetector,
    values: Sequence[NDArray[np.float64] | TiltmeterError],
    steps: Sequence[int | None],
    problem: str,
) -> Verdict:
    good = [(v, at) for v, at in zip(values, steps, strict=True) if not isinstance(v, TiltmeterError)]
    named = [at for _, at in good if at is not None]
    verdict = detector.predict([v for v, _ in good], steps=named or None)
    if not problem or verdict.state is State.ALARM:
        return verdict
    reason = f"a reading is missing: {problem}." if good else f"it could not be read: {problem}."
    return replace(verdict, state=State.INCONCLUSIVE, false_alarm_rate=None, reason=reason)
