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
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import TrainerCallback

from tiltmeter.adapters import base_parameters
from tiltmeter.basis import TraitBasis
from tiltmeter.detector import Detector, State, Verdict
from tiltmeter.drift import Reading, measure
from tiltmeter.errors import ArtifactError, InputError, NumericalError, StorageError, TiltmeterError
from tiltmeter.lm import LM, adapter_state, attach, load, wrap
from tiltmeter.readings import Observation, RunReadings, RunRecord, read_run
from tiltmeter.runs import Checkpoint, checkpoints
from tiltmeter.untrusted import read_json

__all__ = ["Observation", "RunReadings", "TiltmeterCallback", "read_run", "watch"]

OnAlarm = Literal["log", "stop"] | Callable[[Verdict], object]

_STATE_FILE = "trainer_state.json"
_SETTLED_SECONDS = 30.0

_log = logging.getLogger(__name__)


class TiltmeterCallback(TrainerCallback):  # type: ignore[misc]
    """Reads the model while a transformers or TRL trainer trains it, and says how the run stands.

    Reads before the first step, every `every` optimizer steps, and at the end; each reading and verdict is on
    the disk, in `readings.jsonl`, when training goes on. A measurement that fails is recorded as INCONCLUSIVE
    and does not stop the run. What is wrong from the start (a basis of another model, no tokenizer, a sharded
    model, a folder that cannot be written) is raised before the first step.
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

    @property
    def observations(self) -> tuple[Observation, ...]:
        """All that has been seen so far, in the order of the steps; nothing on other ranks than 0."""
        return self._record.observations if self._record else ()

    @property
    def verdict(self) -> Verdict | None:
        """On the run so far: its first alarm, else its last verdict; None on other ranks than 0."""
        return self._record.verdict if self._record else None

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
        model = kwargs["model"]
        self._together = _is_sharded(model)
        step = int(state.global_step)
        if args.process_index == 0 or self._together:
            lm = self._lm = self._wrap(model, kwargs.get("processing_class"))
            with _untouched(model, lm.tokenizer):
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
            except StorageError as error:
                _log.error("%s (readings that were not written are lost when this process ends)", error)

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
        self._record = RunRecord(folder, self.detector, header=header) if args.process_index == 0 else None
        settled = self._record is not None and self._record.reference is not None
        if _agreed(settled, args) if self._together else settled:
            return
        if adapter_state(lm) == "active":
            _log.warning("the adapter has been trained before step %d: drift is measured against its base", step)
            try:
                with lm.base() as base:
                    reading = measure(base, self.basis, step=0)
                if self._record is not None:
                    self._record.refer_to(reading, "base")
            except NumericalError as error:
                _log.warning("the base model cannot be read, so nothing can be judged: %s", error)
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
        if self._together and _agreed(wanted, args) and record is None and lm is not None:
            with contextlib.suppress(TiltmeterError):  # rank 0 meets the same and records it
                self._read(lm, step)
        if record is not None and lm is not None and wanted:
            try:
                observation = record.observe(step, partial(self._read, lm, step), starting=starting)
            except StorageError as error:
                if starting:
                    raise
                _log.error("%s (kept in memory, and written with the next reading)", error)
                observation = next(o for o in record.observations if o.step == step)
            stop = self._react(observation)
        if _agreed(stop, args):
            control.should_training_stop = True

    def _read(self, lm: LM, step: int) -> Reading:
        with _untouched(lm.model, lm.tokenizer):
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
            return self.on_alarm(observation.verdict) is True
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


def _agreed(stop: bool, args: Any) -> bool:
    """Rank 0's decision, on every rank."""
    distributed = torch.distributed
    if args.world_size <= 1 or not (distributed.is_available() and distributed.is_initialized()):
        return stop
    device = "cpu" if distributed.get_backend() == "gloo" else args.device
    decision = torch.tensor([int(stop)], device=device)
    distributed.broadcast(decision, src=0)
    return bool(decision.item())


def _is_sharded(model: torch.nn.Module) -> bool:
    """Whether the model is spread over processes in a way that they can read together.

    Raises:
        InputError: it is spread in another way.
    """
    names = {name for module in model.modules() for name in _class_names(module)}
    kind = None
    if "FullyShardedDataParallel" in names:
        kind = "FSDP 1"
    elif any(hasattr(p, "ds_id") for p in model.parameters()):
        kind = "DeepSpeed ZeRO-3"
    elif "FSDPModule" in names:
        if not any(_is_mixed(module) for module in model.modules()):
            return True
        kind = "FSDP in mixed precision"
    elif any("DTensor" in _class_names(p) or "DTensor" in _class_names(p.data) for p in model.parameters()):
        kind = "tensor parallelism"
    if kind is not None:
        raise InputError(
            f"the model is sharded over processes ({kind}), and cannot be read from inside the run; remove "
            "TiltmeterCallback, let the trainer save checkpoints, and run beside it: "
            "tiltmeter watch OUTPUT_DIR --follow"
        )
    return False


def _is_mixed(module: torch.nn.Module) -> bool:
    """Whether `fully_shard` computes this part in another dtype than its weights have."""
    if "FSDPModule" not in _class_names(module):
        return False
    policy = module._get_fsdp_state()._mp_policy  # type: ignore[operator]
    return policy.param_dtype is not None


def _class_names(thing: object) -> set[str]:
    return {kind.__name__ for kind in type(thing).__mro__}


@contextlib.contextmanager
def _untouched(model: torch.nn.Module, tokenizer: Any) -> Iterator[None]:
    """Put back all that a measurement could change for the training around it."""
    training = [(module, module.training) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    sides = {name: getattr(tokenizer, name) for name in ("padding_side", "truncation_side") if hasattr(tokenizer, name)}
    config: Any = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    python, legacy = random.getstate(), np.random.get_state()
    # Only the model's own devices: asking the others would open a context on each.
    devices = {parameter.device for parameter, _ in trainable if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        for module, flag in training:
            module.training = flag
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        for name, side in sides.items():
            setattr(tokenizer, name, side)
        if cache is not None:
            config.use_cache = cache


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

    The base model is read once, as step 0, and is what drift is measured against. A checkpoint that is still
    being written is left alone; one that cannot be read gives INCONCLUSIVE with the reason. What an earlier
    call has read is not read again: it comes first, with `new=False`, judged by the present detector.

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
    yield from record.rejudge()
    seen = {observation.step for observation in record.observations if observation.reading is not None}
    if 0 not in seen:
        yield record.observe(0, lambda: measure(start, basis, step=0), starting=True)
    seen.add(0)
    while True:
        ended = _has_ended(folder)  # asked first: a checkpoint saved meanwhile is then still found below
        for checkpoint in checkpoints(folder):
            if checkpoint.step not in seen and _is_complete(checkpoint.path):
                seen.add(checkpoint.step)
                read = partial(_measure_checkpoint, checkpoint, start, basis)
                yield record.observe(checkpoint.step, read)
        if poll is None or ended:
            break
        time.sleep(poll)
    for checkpoint in checkpoints(folder):
        if checkpoint.step not in seen:
            _log.warning("%s is not complete and was not read; look again when it has been written", checkpoint.path)


def _first_checkpoint(folder: Path, poll: float | None) -> Checkpoint:
    while True:
        complete = [c for c in checkpoints(folder) if _is_complete(c.path)]
        if complete:
            return complete[0]
        if poll is None:
            raise InputError(
                f"{folder} holds no complete checkpoint-N folder; give a trainer's output folder, let the "
                "trainer save checkpoints (save_steps), or wait for the first with follow (--follow)"
            )
        time.sleep(poll)


def _is_complete(path: Path) -> bool:
    """The trainer writes its state last; where there is none, the files must have come to rest."""
    try:
        if (path / _STATE_FILE).exists():
            # Not whole while the trainer writes it; its log may hold NaN.
            read_json(path / _STATE_FILE, foreign=True)
            return True
        changed = [entry.stat().st_mtime for entry in path.iterdir()]
    except (OSError, ArtifactError):  # half written, or removed by the trainer meanwhile
        return False
    return bool(changed) and time.time() - max(changed) > _SETTLED_SECONDS


def _has_ended(folder: Path) -> bool:
    """Whether the run says that it is over: in its last checkpoint, or in the callback's record."""
    with contextlib.suppress(ArtifactError):
        if read_run(folder / "tiltmeter").ended is not None:
            return True
    complete = [c for c in checkpoints(folder) if (c.path / _STATE_FILE).exists()]
    if not complete:
        return False
    try:
        state = read_json(complete[-1].path / _STATE_FILE, foreign=True)
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
        config = first.path / "adapter_config.json"
        named = read_json(config).get("base_model_name_or_path") if config.exists() else None
        if not named:
            raise InputError(
                f"{first.path} does not name the model that training started from; give it with base (--base)"
            )
        base = str(named)
    return load(base, dtype=_plain_dtype(basis))


def _measure_checkpoint(checkpoint: Checkpoint, start: LM, basis: TraitBasis) -> Reading:
    path = checkpoint.path
    if (path / "adapter_config.json").exists():
        return measure(attach(start, path), basis, step=checkpoint.step)
    # The base's tokenizer: a trainer may save none, or one that it has changed.
    tuned = load(path, dtype=_plain_dtype(basis), device=str(start.device), tokenizer=start.tokenizer)
    return measure(tuned, basis, step=checkpoint.step, weights_may_differ=True)


def _plain_dtype(basis: TraitBasis) -> str:
    return basis.fingerprint.dtype.partition("/")[0]  # what follows the slash names a quantisation
