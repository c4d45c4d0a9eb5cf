"""The record of one run: a reading, a drift profile and a verdict per step, on the disk as soon as they
exist.

`readings.jsonl` holds, one JSON object per line,

    {"kind": "header", "format": 1, "source": "callback", "from_step": 0, "basis": ..., ...}
    {"kind": "reading", "step": 10, "seconds": 0.8, "reading": {...}}
    {"kind": "verdict", "step": 10, "verdict": {...}, "profile": {...}}
    {"kind": "reference", "label": "base", "reading": {...}}       only where it is not the reading at step 0
    {"kind": "end", "step": 60, "why": "..."}

Lines are only ever added. A header marks each start: `from_step` 0 begins a new run, so what stands above it
no longer counts; `from_step` 40 resumes from a checkpoint, so readings above it of steps after 40 belong to a
branch of training that was given up; `from_step` null (checkpoints read from outside) keeps everything.

Live monitoring and checkpoint watching differ in where models come from and share all of this. It knows
nothing of models, and imports without torch.

    >>> run = read_run("out/tiltmeter")
    >>> run.verdict.state, run.first_alarm_step
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tiltmeter.detector import Detector, State, Verdict, inconclusive
from tiltmeter.drift import DriftProfile, Reading, drift
from tiltmeter.errors import ArtifactError, InputError, NumericalError, TiltmeterError
from tiltmeter.runs import RunDir, append_record, read_records

__all__ = ["Observation", "RunReadings", "RunRecord", "read_run"]

READINGS = "readings.jsonl"
FORMAT = 1
STEP0 = "step0"
# What a measurement may fail with while training goes on: our own errors, and what torch raises for a lack of
# memory, a shape or a device. Anything else is a bug, and is shown as one.
MEASUREMENT_FAILURES = (TiltmeterError, ArithmeticError, MemoryError, RuntimeError, ValueError)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Observation:
    """What was seen at one step.

    Attributes:
        step: the training step.
        reading: None where the measurement failed; the verdict says why.
        profile: None where there is no reading, or none to compare it with.
        verdict: on the run up to this step.
        seconds: what the measurement took.
        new: False where it was read earlier and comes from the record.
    """

    step: int
    reading: Reading | None
    profile: DriftProfile | None
    verdict: Verdict
    seconds: float | None = None
    new: bool = True


@dataclass(frozen=True, eq=False)
class RunReadings:
    """The readings and verdicts of one run, as its record tells them.

    Attributes:
        path: the record.
        header: of the latest start.
        observations: in the order of the steps.
        reference: what drift was measured against; None where there is no such reading.
        label: how the reference is called: "step0" or "base".
        ended: why and where the run ended, where its end was recorded.
        torn: how many torn last lines a crash left (0 or 1); their readings are lost.
    """

    path: Path
    header: Mapping[str, Any]
    observations: tuple[Observation, ...]
    reference: Reading | None
    label: str
    ended: str | None
    torn: int

    @property
    def readings(self) -> tuple[Reading, ...]:
        """The readings, in the order of the steps."""
        return tuple(o.reading for o in self.observations if o.reading is not None)

    @property
    def profiles(self) -> tuple[DriftProfile, ...]:
        """The drift profiles, in the order of the steps, the reference's own included."""
        return tuple(o.profile for o in self.observations if o.profile is not None)

    @property
    def verdict(self) -> Verdict:
        """On the run as a whole: its first alarm, else its last verdict."""
        return overall(self.observations)

    @property
    def first_alarm_step(self) -> int | None:
        """The step of the first alarm."""
        alarms = [o.step for o in self.observations if o.verdict.state is State.ALARM]
        return alarms[0] if alarms else None


def overall(observations: Sequence[Observation]) -> Verdict:
    """The verdict on a run: an alarm stays one, whatever could not be measured after it."""
    for observation in observations:
        if observation.verdict.state is State.ALARM:
            return observation.verdict
    return observations[-1].verdict if observations else inconclusive("there is no reading to judge.")


def read_run(folder: str | Path) -> RunReadings:
    """Read the record of a run, while it grows or after its end.

    Args:
        folder: the folder that holds `readings.jsonl`, or that file.

    Raises:
        ArtifactError: there is no record, or it is damaged, foreign or of another format version.
    """
    path = Path(folder)
    path = path / READINGS if path.is_dir() else path
    found = read_records(path)
    state = _State()
    for number, row in zip(found.lines, found.rows, strict=True):
        _check_row(path, number, row)
        try:
            state.take(row)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{path} is damaged at line {number} ({type(error).__name__}: {error}); restore it, or "
                "measure the run again into another folder"
            ) from error
    if not found.rows:
        raise ArtifactError(f"{path} holds no whole line; the run ended before its first reading: start it again")
    return RunReadings(
        path=path,
        header=state.header,
        observations=state.observations(),
        reference=state.reference,
        label=state.label,
        ended=state.ended,
        torn=found.torn,
    )


def _check_row(path: Path, number: int, row: Mapping[str, Any]) -> None:
    if number == 1 and row.get("kind") != "header":
        raise ArtifactError(f"{path} does not begin with a header; give a folder that tiltmeter recorded a run in")
    if row.get("kind") == "header" and row.get("format") != FORMAT:
        raise ArtifactError(
            f"{path} has format {row.get('format')!r} at line {number}; this version of tiltmeter reads "
            f"format {FORMAT}; use the tiltmeter version that wrote it, or measure the run again into "
            "another folder"
        )


@dataclass
class _State:
    """What the lines of a record add up to."""

    header: Mapping[str, Any] = field(default_factory=dict)
    readings: dict[int, Reading] = field(default_factory=dict)
    seconds: dict[int, float | None] = field(default_factory=dict)
    verdicts: dict[int, Verdict] = field(default_factory=dict)
    based_on: tuple[Reading, str] | None = None
    ended: str | None = None

    def take(self, row: Mapping[str, Any]) -> None:
        kind = row["kind"]
        if kind == "header":
            self.header, self.ended = row, None
            if row["from_step"] is not None:
                self._give_up_after(row["from_step"])
        elif kind == "reading":
            self.readings[row["step"]] = Reading.from_dict(row["reading"])
            self.seconds[row["step"]] = row["seconds"]
        elif kind == "verdict":
            self.verdicts[row["step"]] = _verdict(row["verdict"])
        elif kind == "reference":
            self.based_on = (Reading.from_dict(row["reading"]), row["label"])
        elif kind == "end":
            self.ended = f"{row['why']} at step {row['step']}"

    def _give_up_after(self, step: int) -> None:
        if step == 0:
            self.readings, self.verdicts, self.based_on = {}, {}, None
            return
        self.readings = {s: r for s, r in self.readings.items() if s <= step}
        self.verdicts = {s: v for s, v in self.verdicts.items() if s <= step}

    @property
    def reference(self) -> Reading | None:
        return self.based_on[0] if self.based_on else self.readings.get(0)

    @property
    def label(self) -> str:
        return self.based_on[1] if self.based_on else STEP0

    def profile(self, step: int) -> DriftProfile | None:
        """None without a reading, or where it cannot be compared: the verdict on that step says why."""
        reading = self.readings.get(step)
        if reading is None or self.reference is None:
            return None
        try:
            return drift(reading, self.reference, label=self.label)
        except InputError:
            return None

    def judged(self, up_to: int) -> list[DriftProfile]:
        """The profiles that count: sound ones, without the reference's own."""
        steps = [s for s in sorted(self.readings) if s <= up_to and self.readings[s] is not self.reference]
        profiles = [self.profile(step) for step in steps]
        return [profile for profile in profiles if profile is not None and profile.problem is None]

    def observations(self) -> tuple[Observation, ...]:
        cut_off = "the run was cut off before this reading was judged."
        return tuple(
            Observation(
                step=step,
                reading=self.readings.get(step),
                profile=self.profile(step),
                verdict=self.verdicts.get(step) or inconclusive(cut_off, step=step),
                seconds=self.seconds.get(step),
                new=False,
            )
            for step in sorted({*self.readings, *self.verdicts})
        )


class RunRecord:
    """The growing record of one run: measures, judges and writes one step after another.

    A full disk loses nothing: what could not be written waits, and is written before the next line.
    """

    def __init__(self, folder: str | Path, detector: Detector | None, *, header: Mapping[str, Any]) -> None:
        """Open the record, or begin it, and write a header.

        Args:
            folder: holds `readings.jsonl` and `manifest.json`.
            detector: judges; without one every verdict is INCONCLUSIVE.
            header: at least `basis` (digest) and `from_step`, see the module's text.

        Raises:
            InputError: what is there was measured with another basis.
            ArtifactError: what is there is damaged or foreign.
            StorageError: the folder cannot be written.
        """
        self.folder = Path(folder)
        self._path = self.folder / READINGS
        self._detector = detector
        self._waiting: list[dict[str, Any]] = []
        self._state = _State()
        old = read_run(self._path) if _has_lines(self._path) else None
        if old is not None:
            self._require_same_basis(old, header)
            for row in read_records(self._path).rows:
                self._state.take(row)
        if not (self.folder / "manifest.json").exists():
            RunDir.create(self.folder, config=header)
        self.write({"kind": "header", "format": FORMAT, **header})

    def _require_same_basis(self, old: RunReadings, header: Mapping[str, Any]) -> None:
        if header["from_step"] != 0 and old.header.get("basis") != header["basis"]:
            raise InputError(
                f"{self._path} was recorded with another basis ({str(old.header.get('basis'))[:12]}) than "
                f"the one given ({header['basis'][:12]}), and their readings cannot be compared; give the "
                "basis that the run began with, or another output folder"
            )

    @property
    def reference(self) -> Reading | None:
        """What drift is measured against."""
        return self._state.reference

    @property
    def observations(self) -> tuple[Observation, ...]:
        """All that is known of the run, in the order of the steps."""
        return self._state.observations()

    @property
    def verdict(self) -> Verdict:
        """On the run as a whole: its first alarm, else its last verdict."""
        return overall(self.observations)

    def has(self, step: int) -> bool:
        """Whether a reading of this step is in the record."""
        return step in self._state.readings

    def refer_to(self, reading: Reading, label: str) -> None:
        """Measure drift against this reading instead of that at step 0.

        Raises:
            StorageError: it could not be written; it is kept and written with the next line.
        """
        self.write({"kind": "reference", "label": label, "reading": reading.to_dict()})

    def observe(self, step: int, read: Callable[[], Reading], *, starting: bool = False) -> Observation:
        """Measure, judge and record one step. A measurement that fails gives INCONCLUSIVE, never an
        exception.

        Args:
            step: the training step.
            read: measures the model.
            starting: nothing is lost yet, so whatever is wrong with the set-up (another model's basis, no
                chat template) is raised; numbers that are not finite are still recorded.

        Raises:
            StorageError: the record could not be written; the observation is kept and written with the next.
            TiltmeterError: the set-up is wrong, when `starting`.
        """
        begun = time.monotonic()
        rows: list[dict[str, Any]] = []
        reason: str | None = None
        try:
            reading = read()
        except MEASUREMENT_FAILURES as error:
            if starting and not isinstance(error, NumericalError):
                raise
            reason = f"the measurement failed ({_sentence(error)})."
        else:
            seconds = round(time.monotonic() - begun, 4)
            rows.append({"kind": "reading", "step": step, "seconds": seconds, "reading": reading.to_dict()})
            self._state.take(rows[0])
            self._state.readings[step] = reading  # not the copy that went through JSON
        verdict, profile = self._judge(step, reason, starting=starting)
        rows.append(_verdict_row(step, verdict, profile))
        self._state.take(rows[-1])
        observation = Observation(step, self._state.readings.get(step), profile, verdict, self._state.seconds.get(step))
        _report(observation)
        self.write(*rows)
        return observation

    def rejudge(self) -> tuple[Observation, ...]:
        """Judge stored readings with the present detector; verdicts that change are recorded.

        Raises:
            StorageError: the record could not be written.
        """
        for observation in self.observations:
            if observation.reading is None:
                continue
            verdict, profile = self._judge(observation.step, None)
            if verdict != observation.verdict:
                row = _verdict_row(observation.step, verdict, profile)
                self._state.take(row)
                self.write(row)
        return self.observations

    def end(self, step: int, why: str) -> None:
        """Record that the run has ended.

        Raises:
            StorageError: the record could not be written.
        """
        self.write({"kind": "end", "step": step, "why": why})

    def write(self, *rows: dict[str, Any]) -> None:
        """Add lines; what waits from an earlier failure goes first.

        Raises:
            StorageError: they could not be written, and wait.
        """
        for row in rows:
            if row["kind"] in ("header", "reference"):
                self._state.take(row)
        self._waiting.extend(rows)
        while self._waiting:
            append_record(self._path, self._waiting[0])
            del self._waiting[0]

    def _judge(self, step: int, reason: str | None, *, starting: bool = False) -> tuple[Verdict, DriftProfile | None]:
        detector, state = self._detector, self._state
        if reason is not None:
            return inconclusive(reason, step=step, detector=detector), None
        if state.reference is None:
            return inconclusive(_NO_REFERENCE, step=step, detector=detector), None
        try:
            profile = drift(state.readings[step], state.reference, label=state.label)
            if detector is None or profile.problem is not None:
                return inconclusive(profile.problem or _NO_DETECTOR, step=step, detector=detector), profile
            judged = state.judged(step)
            verdict = detector.predict(judged) if judged else inconclusive(_START, step=step, detector=detector)
            return verdict, profile
        except MEASUREMENT_FAILURES as error:
            if starting:
                raise
            return inconclusive(f"the drift cannot be judged ({_sentence(error)}).", step=step, detector=detector), None


_NO_DETECTOR = "no detector was given: the drift is recorded, but nothing says how much of it is normal."
_NO_REFERENCE = "there is no usable reading at step 0 to compare with."
_START = "this is the reading that drift is measured against; nothing has been trained yet."


def _has_lines(path: Path) -> bool:
    return path.exists() and bool(read_records(path).rows)


def _verdict(content: Mapping[str, Any]) -> Verdict:
    values = {f.name: content[f.name] for f in fields(Verdict)}
    return replace(Verdict(**values), state=State(content["state"]))


def _verdict_row(step: int, verdict: Verdict, profile: DriftProfile | None) -> dict[str, Any]:
    return {
        "kind": "verdict",
        "step": step,
        "verdict": verdict.to_dict(),
        "profile": None if profile is None else profile.to_dict(),
    }


def _sentence(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


def _report(observation: Observation) -> None:
    """One line in the log per reading."""
    verdict, profile = observation.verdict, observation.profile
    level = logging.INFO
    if verdict.state is State.ALARM or observation.reading is None or (profile is not None and profile.problem):
        level = logging.WARNING
    numbers = ""
    if profile is not None:
        shifts = " ".join(f"{name} {value:+.3f}" for name, value in zip(profile.names, profile.drift, strict=True))
        numbers = f" | drift {shifts}"
    score = "" if verdict.score is None else f" score {verdict.score:.2f}"
    if verdict.score is not None and verdict.threshold is not None:
        score += f" of {verdict.threshold:.2f}"
    _log.log(level, "step %d: %s%s%s | %s", observation.step, verdict.state, score, numbers, verdict.reason)
