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
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tiltmeter import sound
from tiltmeter.detector import Detector, State, Verdict, inconclusive
from tiltmeter.drift import DriftProfile, Reading, drift
from tiltmeter.errors import ArtifactError, InputError, NumericalError, TiltmeterError, in_words
from tiltmeter.locks import hold
from tiltmeter.observations import Observation, first_alarm, overall
from tiltmeter.runs import RunDir, append_record, read_records, write_records

__all__ = ["Observation", "RunReadings", "RunRecord", "overall", "read_run"]

READINGS = "readings.jsonl"
FORMAT = 1
STEP0 = "step0"
_KEPT = ("header", "reference", "reading", "verdict")  # the lines that `_State` can write anew

_log = logging.getLogger(__name__)


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
        """On the run as a whole, see `tiltmeter.observations`; a torn last line may have been an alarm."""
        return overall(self.observations, failures=[_TORN] if self.torn else ())

    @property
    def first_alarm_step(self) -> int | None:
        """The step of the first alarm."""
        alarm = first_alarm(self.observations)
        return None if alarm is None else alarm.step


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
    if row.get("kind") in ("reading", "verdict") and type(row.get("step")) is not int:
        raise ArtifactError(
            f"{path} is damaged at line {number} (its step is {str(row.get('step'))[:20]!r}); restore it, or "
            "measure the run again into another folder"
        )
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
    doubles: list[Reading] = field(default_factory=list)
    seconds: dict[int, float | None] = field(default_factory=dict)
    stamps: dict[int, str | None] = field(default_factory=dict)
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
            self.add(row["step"], Reading.from_dict(row["reading"]))
            self.seconds[row["step"]] = row["seconds"]
            self.stamps[row["step"]] = row.get("stamp")
        elif kind == "verdict":
            self.verdicts[row["step"]] = _verdict(row["verdict"])
        elif kind == "reference":
            self.based_on = (Reading.from_dict(row["reading"]), row["label"])
        elif kind == "end":
            self.ended = f"{row['why']} at step {row['step']}"

    def add(self, step: int, reading: Reading) -> None:
        """Of two readings of one step that differ, both count: which came first says nothing."""
        before = self.readings.get(step)
        if before is not None and before.values.tobytes() != reading.values.tobytes():
            self.doubles.append(before)
        self.readings[step] = reading

    def _give_up_after(self, step: int) -> None:
        if step == 0:
            self.readings, self.doubles, self.verdicts, self.based_on = {}, [], {}, None
            return
        self.doubles = [r for r in self.doubles if (r.step or 0) <= step]
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
        return self._compare(self.readings.get(step))

    def _compare(self, reading: Reading | None) -> DriftProfile | None:
        if reading is None or self.reference is None:
            return None
        try:
            return drift(reading, self.reference, label=self.label)
        except InputError:
            return None

    def rows(self) -> list[dict[str, Any]]:
        """The record's lines, from what is known: the header, the reference, and each step."""
        rows: list[dict[str, Any]] = [dict(self.header)]
        if self.based_on is not None:
            reading, label = self.based_on
            rows.append({"kind": "reference", "label": label, "reading": reading.to_dict()})
        rows += [_reading_row(reading.step or 0, None, reading) for reading in self.doubles]
        for step in sorted({*self.readings, *self.verdicts}):
            if step in self.readings:
                row = _reading_row(step, self.seconds.get(step), self.readings[step])
                rows.append(row | ({"stamp": self.stamps[step]} if self.stamps.get(step) else {}))
            if step in self.verdicts:
                rows.append(_verdict_row(step, self.verdicts[step], self.profile(step)))
        return rows

    def judged(self, up_to: int) -> list[DriftProfile]:
        """The profiles that count: sound ones, without the reference's own."""
        readings = [*self.readings.items(), *((r.step or 0, r) for r in self.doubles)]
        counted = [(s, r) for s, r in readings if s <= up_to and r is not self.reference]
        # By content where the steps are the same, so that the order of the record does not matter.
        counted.sort(key=lambda pair: (pair[0], pair[1].values.tobytes()))
        profiles = [self._compare(reading) for _, reading in counted]
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

    def __init__(
        self, folder: str | Path, detector: Detector | None, *, header: Mapping[str, Any], take_over: bool = False
    ) -> None:
        """Open the record, or begin it, and write a header.

        Args:
            folder: holds `readings.jsonl` and `manifest.json`.
            detector: judges; without one every verdict is INCONCLUSIVE.
            header: at least `basis` (digest) and `from_step`, see the module's text.
            take_over: end what this very process still has open there, as a training call that was interrupted.

        Raises:
            FolderInUse: another process records into the folder.
            InputError: what is there was measured with another basis.
            ArtifactError: what is there is damaged or foreign.
            StorageError: the folder cannot be written.
        """
        self.folder = Path(folder)
        self._path = self.folder / READINGS
        self._detector = detector
        self._waiting: list[dict[str, Any]] = []
        self._state = _State()
        self._lock = hold(self.folder, f"record of {header.get('source', 'a run')}", take_over=take_over)
        self._size = self._path.stat().st_size if self._path.is_file() else 0
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
        """On the run as a whole, see `tiltmeter.observations`."""
        return overall(self.observations)

    def has(self, step: int) -> bool:
        """Whether a reading of this step is in the record."""
        return step in self._state.readings

    def stamp(self, step: int) -> str | None:
        """Of the checkpoint that the reading of this step was taken of, where it is known."""
        return self._state.stamps.get(step) if self.has(step) else None

    def remark(self, step: int, text: str) -> None:
        """Record something that is no reading and changes no verdict.

        Raises:
            StorageError: the record could not be written.
        """
        self.write({"kind": "remark", "step": step, "text": text})

    def refer_to(self, reading: Reading, label: str) -> None:
        """Measure drift against this reading instead of that at step 0.

        Raises:
            StorageError: it could not be written; it is kept and written with the next line.
        """
        self.write({"kind": "reference", "label": label, "reading": reading.to_dict()})

    def observe(
        self, step: int, read: Callable[[], Reading], *, starting: bool = False, stamp: str | None = None
    ) -> Observation:
        """Measure, judge and record one step. A measurement that fails gives INCONCLUSIVE, never an
        exception.

        Args:
            step: the training step.
            read: measures the model.
            starting: nothing is lost yet, so whatever is wrong with the set-up (another model's basis, no
                chat template) is raised; numbers that are not finite are still recorded.
            stamp: what says that it is the same checkpoint when one looks again.

        Raises:
            StorageError: the record could not be written; the observation is kept and written with the next.
            TiltmeterError: the set-up is wrong, when `starting`.
        """
        begun = time.monotonic()
        rows: list[dict[str, Any]] = []
        reason: str | None = None
        try:
            reading = read()
            row = _reading_row(step, round(time.monotonic() - begun, 4), reading)
        except Exception as error:
            if starting and isinstance(error, TiltmeterError) and not isinstance(error, NumericalError):
                raise
            reason = f"the measurement failed ({in_words(error)})."
        else:
            rows.append(row if stamp is None else row | {"stamp": stamp})
            self._state.seconds[step] = row["seconds"]
            self._state.stamps[step] = stamp
            self._state.add(step, reading)  # not the copy that went through JSON
        if reason is not None and self.has(step):
            _log.warning("step %d: %s An earlier reading of it stands.", step, reason)
            reason = None
        verdict, profile = self._judge(step, reason, starting=starting)
        rows.append(_verdict_row(step, verdict, profile))
        self._state.take(rows[-1])
        observation = Observation(step, self._state.readings.get(step), profile, verdict, self._state.seconds.get(step))
        _report(observation)
        # What is read late changes the verdicts on later steps, and as the reference those on all.
        rows += self._judge_again(step if self._state.based_on or step else -1)
        self.write(*rows)
        return observation

    def miss(self, step: int, why: str) -> Observation:
        """Record that a step could not be read, and why; see `observe`."""

        def fail() -> Reading:
            raise InputError(why)

        return self.observe(step, fail)

    def rejudge(self) -> tuple[Observation, ...]:
        """Judge stored readings with the present detector; verdicts that change are recorded.

        Raises:
            StorageError: the record could not be written.
        """
        self.write(*self._judge_again(-1))
        return self.observations

    def _judge_again(self, after: int) -> list[dict[str, Any]]:
        """Judge the readings of later steps once more; the rows of those whose verdict changes."""
        rows = []
        for step in sorted(self._state.readings):
            if step <= after:
                continue
            verdict, profile = self._judge(step, None)
            if verdict != self._state.verdicts.get(step):
                rows.append(_verdict_row(step, verdict, profile))
                self._state.take(rows[-1])
        return rows

    def end(self, step: int, why: str) -> None:
        """Record that the run has ended.

        Raises:
            StorageError: the record could not be written.
        """
        self.write({"kind": "end", "step": step, "why": why})

    def write(self, *rows: dict[str, Any]) -> None:
        """Add lines; what waits from an earlier failure goes first, and a record that was deleted is written anew.

        Raises:
            StorageError: they could not be written, and wait.
        """
        for row in rows:
            if row["kind"] in ("header", "reference"):
                self._state.take(row)
        self._waiting.extend(rows)
        if not self._lock.held:  # the folder was deleted or exchanged: nobody else may have it meanwhile
            self._lock = hold(self.folder, self._lock.doing, take_over=True)
        if self._was_lost():
            _log.error("%s was deleted or cut short while the run went on; it is written anew", self._path)
            write_records(self._path, self._state.rows())
            if not (self.folder / "manifest.json").exists():
                RunDir.create(self.folder, config=self._state.header)
            self._waiting = [row for row in self._waiting if row["kind"] not in _KEPT]
        while self._waiting:
            append_record(self._path, self._waiting[0])
            del self._waiting[0]
        self._size = self._path.stat().st_size

    def _was_lost(self) -> bool:
        """Whether lines that were on the disk are there no longer. What is no file, such as a device, is left alone."""
        if not self._size:
            return False
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return True
        return stat.S_ISREG(status.st_mode) and status.st_size < self._size

    def close(self) -> None:
        """Let another process record into the folder; what was seen stays readable here."""
        self._lock.release()

    def _judge(self, step: int, reason: str | None, *, starting: bool = False) -> tuple[Verdict, DriftProfile | None]:
        verdict, profile = self._judge_plainly(step, reason, starting=starting)
        reading = self._state.readings.get(step)
        return verdict.noting(reading.caveats if reading is not None else ()), profile

    def _judge_plainly(self, step: int, reason: str | None, *, starting: bool) -> tuple[Verdict, DriftProfile | None]:
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
        except Exception as error:
            if starting and isinstance(error, TiltmeterError):
                raise
            return inconclusive(f"the drift cannot be judged ({in_words(error)}).", step=step, detector=detector), None


_TORN = "the last line of the record is cut off, so a reading may be missing; resume the run, or look at it again."
_NO_DETECTOR = "no detector was given: the drift is recorded, but nothing says how much of it is normal."
_NO_REFERENCE = "there is no usable reading at step 0 to compare with."
_START = "this is the reading that drift is measured against; nothing has been trained yet."


def _has_lines(path: Path) -> bool:
    return path.exists() and bool(read_records(path).rows)


def _verdict(content: Mapping[str, Any]) -> Verdict:
    values = {f.name: content[f.name] for f in fields(Verdict)}
    for name in ("calibrated_on", "reason"):
        sound.text(name, values[name], blank=True)
    for name in {*values} - {"state", "calibrated_on", "reason"}:
        if values[name] is not None or name == "n_calibration":
            (sound.whole if name in ("step", "first_alarm_step", "n_calibration") else sound.number)(name, values[name])
    return replace(Verdict(**values), state=State(content["state"]))


def _reading_row(step: int, seconds: float | None, reading: Reading) -> dict[str, Any]:
    return {"kind": "reading", "step": step, "seconds": seconds, "reading": reading.to_dict()}


def _verdict_row(step: int, verdict: Verdict, profile: DriftProfile | None) -> dict[str, Any]:
    return {
        "kind": "verdict",
        "step": step,
        "verdict": verdict.to_dict(),
        "profile": None if profile is None else profile.to_dict(),
    }


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
