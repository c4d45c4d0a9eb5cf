"""Watching a run: from inside, as a trainer's callback, or from outside, through the checkpoints that it
saves.

Both are shells around one `measure()` and one `RunRecord`: what differs is where the model comes from.

    trainer = SFTTrainer(..., callbacks=[TiltmeterCallback(basis, detector, every=10, on_alarm="stop")])

    for seen in watch("out/run", basis, detector, follow=True):
        print(seen.step, seen.verdict.state, seen.verdict.reason)

The callback must leave training exactly as it found it: the final weights with and without it are the same,
bit for bit. On several processes with whole copies of the model (DDP) rank 0 reads and writes, and tells the
others whether to stop. A model that `fully_shard` (FSDP 2) spread over processes is read by all of them together,
through all of its blocks, and rank 0 writes. Other sharding (FSDP 1, ZeRO-3, tensor parallelism) is refused, and so is
FSDP 2 in mixed precision, whose arithmetic is not that of the saved checkpoint: such runs can be watched from outside.

Drift is measured against the run's step 0. A resumed run keeps the stored reading; it is never measured anew
on a model that has been trained meanwhile. Where training starts from an adapter that already acts, or
resumes without a stored reading, the reference is the base model with the adapter switched off, and is called
"base".
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback

from tiltmeter.adapter_files import adapter_base, adapter_folder, holds_adapter
from tiltmeter.adapters import base_parameters
from tiltmeter.basis import TraitBasis
from tiltmeter.completeness import SETTLED_SECONDS, STATE_FILE, checkpoint_stamp, missing_part
from tiltmeter.detector import Detector, State, Verdict, inconclusive
from tiltmeter.drift import Reading, measure
from tiltmeter.errors import ArtifactError, InputError, NumericalError, StorageError, TiltmeterError, in_words
from tiltmeter.live import agreed, is_sharded, untouched
from tiltmeter.lm import LM, adapter_state, attach, load, wrap
from tiltmeter.readings import Observation, RunReadings, RunRecord, read_run
from tiltmeter.runs import Checkpoint, checkpoints
from tiltmeter.untrusted import read_json

__all__ = ["Observation", "RunReadings", "TiltmeterCallback", "read_run", "watch"]

OnAlarm = Literal["log", "stop"] | Callable[[Verdict], object]

_log = logging.getLogger(__name__)


class TiltmeterCallback(TrainerCallback):  # type: ignore[misc]
    """Reads the model while a transformers or TRL trainer trains it, and says how the run stands.

    Reads before the first step, every `every` optimizer steps, and at the end; each reading and verdict is on the disk,
    in `readings.jsonl`, when training goes on. A measurement that fails, in whatever way, is recorded as INCONCLUSIVE
    and does not stop the run; nor does an `on_alarm` that fails. What is wrong from the start (a basis of another
    model, no tokenizer, a sharded model, a folder that cannot be written) is raised before the first step.
    """

    def __init__(
        self,
        basis: TraitBasis,
        detector: Detector | None = None,
        *,
        every: int = 10,
        on_alarm: OnAlarm = "log",
        output: str | Path | None = None,
        tokenizer: Any = None,
    ) -> None:
        """Set up; nothing is measured or written before training begins.

        Args:
            basis: fitted on the model that training starts from.
            detector: without one, drift is recorded and every verdict is INCONCLUSIVE.
            every: optimizer steps between readings.
            on_alarm: "log" warns; "stop" ends training after the step of the alarm, on all processes; a
                callable gets the verdict, on rank 0, at the first alarm of each training call, and ends
                training by returning True.
            output: folder of the record; by default `tiltmeter` in the trainer's output folder.
            tokenizer: where the trainer was given no `processing_class`.

        Raises:
            InputError: `every` below 1, or another `on_alarm`.
        """
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise InputError(f"every is {every!r}; it must be a whole number of optimizer steps, at least 1")
        if on_alarm not in ("log", "stop") and not callable(on_alarm):
            raise InputError(f"on_alarm is {on_alarm!r}; it must be 'log', 'stop' or a callable that takes a verdict")
        self.basis = basis
        self.detector = detector
        self.every = every
        self.on_alarm = on_alarm
        self.output = None if output is None else Path(output)
        self.tokenizer = tokenizer
        self._record: RunRecord | None = None
        self._lm: LM | None = None
        self._visited: set[int] = set()
        self._alarmed = False
        self._passive = False
        self._together = False
        self._failure: str | None = None

    @property
    def observations(self) -> tuple[Observation, ...]:
        """All that has been seen so far, in the order of the steps; nothing on other ranks than 0."""
        return self._record.observations if self._record else ()

    @property
    def verdict(self) -> Verdict | None:
        """On the run so far, see `tiltmeter.observations`; None on other ranks than 0."""
        if self._record is None:
            return None if self._failure is None else inconclusive(self._failure, detector=self.detector)
        return self._record.verdict

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the set-up, and read step 0.

        Raises:
            TiltmeterError: something is wrong from the start; see the class.
        """
        folder = self.output or Path(args.output_dir) / "tiltmeter"
        owner = _claim(state, folder, self)
        if owner is not None:
            self._passive = owner is not self
            return
        self._visited, self._alarmed, self._passive = set(), False, False
        self._failure, self._record, self._lm = None, None, None
        try:
            self._start(args, state, control, folder, kwargs)
        except TiltmeterError:
            self._let_go()
            raise
        except Exception as error:  # noqa: BLE001 - training must not end
            self._failure = f"the run could not be read ({in_words(error)})."
            _log.error("%s Training goes on without readings.", self._failure)
            self._lm = None
            if self._record is not None:
                with contextlib.suppress(StorageError):
                    self._record.miss(int(state.global_step), self._failure)

    def _start(self, args: Any, state: Any, control: Any, folder: Path, kwargs: Any) -> None:
        model = kwargs["model"]
        self._together = is_sharded(model)
        step = int(state.global_step)
        if args.process_index == 0 or self._together:
            lm = self._lm = self._wrap(model, kwargs.get("processing_class"))
            with untouched(model, lm.tokenizer):
                self._begin(lm, folder, step, args)
        if step % self.every == 0:
            self._look(step, args, control, starting=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read, if it is time to."""
        step = int(state.global_step)
        if step % self.every == 0:
            self._look(step, args, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the last step, before the trainer may put the best checkpoint's weights back."""
        if control.should_training_stop:
            self._look(int(state.global_step), args, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the last step, unless it has been, and record the end."""
        step = int(state.global_step)
        if getattr(args, "load_best_model_at_end", False) and state.best_model_checkpoint is not None:
            step = int(state.best_global_step or step)  # the trainer has just put these weights back
        self._look(step, args, control)
        self._lm = None  # the trained model must not outlive its owner here
        if self._record is not None and not self._passive:
            why = "stopped on an alarm" if self._alarmed and self.on_alarm == "stop" else "training ended"
            try:
                self._record.end(int(state.global_step), why)
            except Exception as error:  # noqa: BLE001 - training must not end
                _log.error("%s (readings that were not written are lost when this process ends)", in_words(error))
            self._let_go()

    def _let_go(self) -> None:
        """Let others record into the folder."""
        if self._record is not None:
            with contextlib.suppress(OSError, RuntimeError):
                self._record.close()

    def _begin(self, lm: LM, folder: Path, step: int, args: Any) -> None:
        """Open the record, on rank 0, and settle what drift is measured against."""
        base_is_trained = any(parameter.requires_grad for _, parameter in base_parameters(lm.model))
        self.basis.check(lm, weights_may_differ=step > 0 and base_is_trained)
        header = {
            "source": "callback",
            "from_step": step,
            "basis": self.basis.digest,
            "traits": list(self.basis.names),
            "layer": self.basis.layer,
            "model": lm.name,
            "detector": self.detector.calibrated_on if self.detector else None,
            "every": self.every,
            "on_alarm": self.on_alarm if isinstance(self.on_alarm, str) else "callable",
        }
        if args.process_index == 0:
            self._record = RunRecord(folder, self.detector, header=header, take_over=True)
            self._record.rejudge()  # a reading may stand there that a crash left unjudged
        settled = self._record is not None and self._record.reference is not None
        if agreed(settled, args) if self._together else settled:
            return
        if adapter_state(lm) == "active":
            _log.warning("the adapter has been trained before step %d: drift is measured against its base", step)
            try:
                with lm.base() as base:
                    reading = measure(base, self.basis, step=0)
                if self._record is not None:
                    self._record.refer_to(reading, "base")
            except Exception as error:
                if isinstance(error, TiltmeterError) and not isinstance(error, NumericalError):
                    raise
                _log.warning("the base model cannot be read, so nothing can be judged: %s", in_words(error))
        elif step > 0:
            _log.warning(
                "resumed at step %d, and %s holds no reading of step 0: readings are recorded, but there is "
                "nothing to compare them with; `tiltmeter watch` with the model that training began from can "
                "judge the run",
                step,
                folder,
            )

    def _wrap(self, model: torch.nn.Module, processing_class: Any) -> LM:
        tokenizer = processing_class if self.tokenizer is None else self.tokenizer
        if tokenizer is None:
            raise InputError(
                "the trainer has no tokenizer; give one to the trainer (processing_class=) or to "
                "TiltmeterCallback(tokenizer=)"
            )
        return wrap(model, tokenizer, together=self._together)

    def _look(self, step: int, args: Any, control: Any, *, starting: bool = False) -> None:
        """Read one step, once, on rank 0 (of a sharded model: on all); decide on all ranks."""
        if self._passive or step in self._visited:
            return
        self._visited.add(step)
        stop = False
        record, lm = self._record, self._lm
        wanted = record is not None and not record.has(step)
        if self._together and agreed(wanted, args) and record is None and lm is not None:
            with contextlib.suppress(Exception):  # rank 0 meets the same and records it
                self._read(lm, step)
        if record is not None and lm is not None and wanted:
            stop = self._react(self._observe(record, lm, step, starting))
        if agreed(stop, args):
            control.should_training_stop = True

    def _observe(self, record: RunRecord, lm: LM, step: int, starting: bool) -> Observation:
        try:
            return record.observe(step, partial(self._read, lm, step), starting=starting)
        except Exception as error:
            if starting and isinstance(error, TiltmeterError):
                raise
            _log.error("%s (kept in memory, and written with the next reading)", in_words(error))
            return next(o for o in record.observations if o.step == step)

    def _read(self, lm: LM, step: int) -> Reading:
        with untouched(lm.model, lm.tokenizer):
            # After step 0 it is still the same live model, whose base weights may be what is trained.
            return measure(lm, self.basis, step=step, weights_may_differ=step > 0)

    def _react(self, observation: Observation) -> bool:
        """Whether training is to stop."""
        if observation.verdict.state is not State.ALARM:
            return False
        first, self._alarmed = not self._alarmed, True
        if self.on_alarm == "stop":
            _log.warning("training stops at step %d: %s", observation.step, observation.verdict.reason)
            return True
        if callable(self.on_alarm) and first:
            try:
                return self.on_alarm(observation.verdict) is True
            except Exception as error:  # noqa: BLE001 - training must not end
                said = f"on_alarm failed at the alarm ({in_words(error)}); the alarm stands, and training goes on"
                _log.error("step %d: %s", observation.step, said)
                if self._record is not None:
                    with contextlib.suppress(StorageError):  # it waits, and is written with the next line
                        self._record.remark(observation.step, said)
        return False


def _claim(state: Any, folder: Path, callback: TiltmeterCallback) -> TiltmeterCallback | None:
    """Claim a folder for this training call; who holds it, where somebody does already.

    Some launchers register a callback twice. The trainer makes its state anew for each training call, so the
    claim ends with it; only declared fields of the state are saved.
    """
    claims: dict[str, TiltmeterCallback] = vars(state).setdefault("_tiltmeter_claims", {})
    owner = claims.get(str(folder.absolute()))
    if owner is None:
        claims[str(folder.absolute())] = callback
    elif owner is not callback:
        _log.warning("another TiltmeterCallback already records into %s; this one does nothing", folder)
    return owner


def watch(
    run_dir: str | Path,
    basis: TraitBasis,
    detector: Detector | None = None,
    *,
    base: str | Path | LM | None = None,
    follow: bool = False,
    poll: float = 5.0,
    output: str | Path | None = None,
) -> Iterator[Observation]:
    """Measure the checkpoints of a run, in the order of their steps.

    The base model is read once, as step 0, and is what drift is measured against. A checkpoint that is not complete is
    waited for; one that stays so, or cannot be read, gives INCONCLUSIVE with the reason, and is tried again by the next
    call. What an earlier call has read is not read again unless its weights have changed: it comes first, with
    `new=False`, judged by the present detector.

    Args:
        run_dir: holds `checkpoint-N` folders: PEFT adapters, or full weights.
        basis: fitted on the model that training started from.
        detector: without one, drift is recorded and every verdict is INCONCLUSIVE.
        base: the model that training started from; by default what the adapters name as theirs.
        follow: wait for new checkpoints until the run ends.
        poll: seconds between looks.
        output: folder of the record; by default `tiltmeter-watch` in `run_dir`.

    Yields:
        One observation per step, the base model's first.

    Raises:
        InputError: no such folder, no complete checkpoint in it, or no base model given for full weights.
        FingerprintMismatch: the basis was fitted on another model than the base.
        StorageError: the record cannot be written.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise InputError(f"the run folder {folder} does not exist; give the folder that holds checkpoint-N folders")
    if not poll > 0:
        raise InputError(f"poll is {poll}; it must be a number of seconds above zero")
    if isinstance(base, LM) and adapter_state(base) != "none":
        raise InputError(f"the base model {base.name} carries the adapter {base.adapter}; give it without one")
    return _watch(folder, basis, detector, base, poll if follow else None, record_folder(folder, output))


def record_folder(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Where `watch` records a run."""
    return Path(run_dir) / "tiltmeter-watch" if output is None else Path(output)


def _watch(
    folder: Path,
    basis: TraitBasis,
    detector: Detector | None,
    base: str | Path | LM | None,
    poll: float | None,
    output: Path,
) -> Iterator[Observation]:
    first = _first_checkpoint(folder, poll)
    start = _base_model(base, first, basis)
    basis.check(start)
    header = {
        "source": "watch",
        "from_step": None,
        "basis": basis.digest,
        "traits": list(basis.names),
        "layer": basis.layer,
        "model": start.name,
        "detector": detector.calibrated_on if detector else None,
        "run": folder.absolute(),
    }
    record = RunRecord(output, detector, header=header)
    try:
        yield from record.rejudge()
        if not record.has(0):
            yield record.observe(0, lambda: measure(start, basis, step=0), starting=True)
        yield from _checkpoints_read(folder, record, start, basis, poll)
    finally:
        record.close()


def _checkpoints_read(
    folder: Path, record: RunRecord, start: LM, basis: TraitBasis, poll: float | None
) -> Iterator[Observation]:
    tried: dict[int, str] = {}  # the stamp of what was read, or could not be
    waiting: dict[int, tuple[str, float]] = {}  # what is not complete: its stamp, and since when it has that
    while True:
        ended = _has_ended(folder)  # asked first: a checkpoint saved meanwhile is then still found below
        found = checkpoints(folder)
        for checkpoint in found:
            step, stamp = checkpoint.step, _stamp(checkpoint.path)
            if tried.get(step) == stamp or record.stamp(step) == stamp:
                continue
            lacking = missing_part(checkpoint.path)
            if record.has(step) and (lacking or record.stamp(step) is None):
                continue  # read before, and rotated away meanwhile
            if lacking is not None:
                since = waiting[step][1] if step in waiting and waiting[step][0] == stamp else time.monotonic()
                waiting[step] = stamp, since
                if poll is None or ended or time.monotonic() - since > SETTLED_SECONDS:
                    tried[step] = waiting.pop(step)[0]
                    yield record.miss(step, f"{checkpoint.path} is not complete: {lacking}; look again")
                continue
            if record.has(step):
                _log.warning("%s has changed since it was read; both readings count", checkpoint.path)
            waiting.pop(step, None)
            tried[step] = stamp
            yield record.observe(step, partial(_measure_checkpoint, checkpoint, start, basis, stamp), stamp=stamp)
        for step in sorted(set(waiting) - {checkpoint.step for checkpoint in found}):
            del waiting[step]
            yield record.miss(step, f"checkpoint-{step} was removed before it was complete; let more be kept")
        if poll is None or ended:
            break
        time.sleep(poll)


def _stamp(path: Path) -> str:
    """See `checkpoint_stamp`; of what is being removed it is like no other."""
    try:
        return checkpoint_stamp(path)
    except OSError as error:
        return f"changing: {error}"


def _first_checkpoint(folder: Path, poll: float | None) -> Checkpoint:
    while True:
        found = checkpoints(folder)
        lacking = [missing_part(checkpoint.path) for checkpoint in found]
        if None in lacking:
            return found[lacking.index(None)]
        if poll is None:
            why = f" ({found[0].path.name}: {lacking[0]})" if found else ""
            raise InputError(
                f"{folder} holds no complete checkpoint-N folder{why}; give a trainer's output folder, let the "
                "trainer save checkpoints (save_steps), or wait for the first with follow (--follow)"
            )
        time.sleep(poll)


def _has_ended(folder: Path) -> bool:
    """Whether the run says that it is over: in its last checkpoint, or in the callback's record."""
    with contextlib.suppress(ArtifactError):
        if read_run(folder / "tiltmeter").ended is not None:
            return True
    complete = [c for c in checkpoints(folder) if (c.path / STATE_FILE).exists()]
    if not complete:
        return False
    try:
        state = read_json(complete[-1].path / STATE_FILE, foreign=True)
    except ArtifactError:
        return False
    goal, now = state.get("max_steps"), state.get("global_step")
    if isinstance(goal, int) and isinstance(now, int) and 0 < goal <= now:
        return True
    told: Any = state
    for key in ("stateful_callbacks", "TrainerControl", "args", "should_training_stop"):
        told = told.get(key) if isinstance(told, dict) else None
    return told is True


def _base_model(base: str | Path | LM | None, first: Checkpoint, basis: TraitBasis) -> LM:
    if isinstance(base, LM):
        return base
    if base is None:
        if not holds_adapter(first.path):
            raise InputError(
                f"{first.path} does not name the model that training started from; give it with base (--base)"
            )
        base = adapter_base(adapter_folder(first.path))
    return load(base, dtype=_plain_dtype(basis))


def _measure_checkpoint(checkpoint: Checkpoint, start: LM, basis: TraitBasis, stamp: str) -> Reading:
    path = checkpoint.path
    if holds_adapter(path):
        reading = measure(attach(start, path), basis, step=checkpoint.step)
    else:  # The base's tokenizer: a trainer may save none, or one that it has changed.
        tuned = load(path, dtype=_plain_dtype(basis), device=str(start.device), tokenizer=start.tokenizer)
        reading = measure(tuned, basis, step=checkpoint.step, weights_may_differ=True)
    if _stamp(path) != stamp:
        raise InputError(
            f"{path} was changed or removed while it was read; look again, or let more checkpoints be kept"
        )
    return reading


def _plain_dtype(basis: TraitBasis) -> str:
    return basis.fingerprint.dtype.partition("/")[0]  # what follows the slash names a quantisation
