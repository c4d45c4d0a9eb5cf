"""Training survives whatever a reading, a reaction or the disk does, and finds the model as it left it."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from monitoring import detector_for, fresh_model, tiny_basis, trainer, weights
from tiltmeter.detector import State, Verdict
from tiltmeter.errors import FolderInUse, NumericalError
from tiltmeter.readings import RunRecord
from tiltmeter.watch import TiltmeterCallback, read_run
from tiny import make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


class Custom(Exception):
    """Nobody's exception, whose text cannot even be made."""

    def __str__(self) -> str:
        raise ZeroDivisionError


ERRORS = [
    TypeError("bug"),
    OSError(5, "Input/output error"),
    RuntimeError("shape"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
    KeyError("axis"),
    AssertionError(),
    RecursionError("maximum recursion depth exceeded"),
    MemoryError(),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    ArithmeticError("overflow"),
    StopIteration(),
    AttributeError("'NoneType' object has no attribute"),
    NotImplementedError("no kernel"),
    ImportError("no module"),
    NumericalError("two prompts of three are not finite"),
    Custom(),
]


class Saboteur:
    """A hook on a block that raises while the model is read, and so in evaluation mode, at given steps."""

    def __init__(self, model: Any, error: Exception, steps: set[int]) -> None:
        self.error, self.steps, self.step = error, steps, 0
        block = model.get_base_model().model.layers[1]
        block.register_forward_pre_hook(self)

    def __call__(self, module: torch.nn.Module, inputs: Any) -> None:
        if not torch.is_grad_enabled() and self.step in self.steps:
            raise self.error


def begin(tmp_path: Path, error: Exception, steps: set[int], **more: Any) -> tuple[Any, Any, TiltmeterCallback, Any]:
    """A trainer's parts, to be driven by hand."""
    model = fresh_model()
    saboteur = Saboteur(model, error, steps)
    callback = TiltmeterCallback(tiny_basis(), detector_for(1e9), every=1, **more)
    run = trainer(tmp_path, callback, model=model)
    return run, model, callback, saboteur


def everything(model: Any) -> list[Any]:
    """All that a reading could leave behind."""
    return [
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        [sorted(vars(m)) for m in model.modules()],
        model.config.use_cache,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        random.getstate(),
        [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        torch.random.get_rng_state().tolist(),
    ]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_no_exception_in_a_reading_ends_training_or_leaves_anything_behind(tmp_path: Path, error: Exception) -> None:
    run, model, callback, saboteur = begin(tmp_path, error, {1})
    given = (run.args, run.state, run.control)
    model.train()
    callback.on_train_begin(*given, model=model, processing_class=make_tokenizer())
    poke(model)
    before = everything(model)
    run.state.global_step = saboteur.step = 1
    callback.on_step_end(*given, model=model)
    assert everything(model) == before
    run.state.global_step = saboteur.step = 2
    callback.on_step_end(*given, model=model)
    callback.on_train_end(*given, model=model)
    failed = callback.observations[1]
    assert (failed.step, failed.reading) == (1, None)
    assert failed.verdict.state is State.INCONCLUSIVE
    said = str(error).splitlines()[0].rstrip(".") if not isinstance(error, Custom) and str(error) else ""
    assert said in failed.verdict.reason
    assert isinstance(error, NumericalError) or type(error).__name__ in failed.verdict.reason
    assert callback.observations[2].verdict.state is State.CLEAR  # the next reading is sound again
    assert callback.verdict.state is State.INCONCLUSIVE
    assert read_run(tmp_path / "tiltmeter").verdict == callback.verdict


def poke(model: Any) -> None:
    """Make the adapter act, as a step of training would."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)


def test_the_weights_after_failed_readings_are_those_of_a_run_without_any(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "a", max_steps=3)
    plain.train()
    model = fresh_model()
    saboteur = Saboteur(model, TypeError("bug"), {0})
    callback = TiltmeterCallback(tiny_basis(), detector_for(1e9), every=1, output=tmp_path / "record")
    watched = trainer(tmp_path / "b", callback, model=model, max_steps=3)
    watched.train()
    assert saboteur.step == 0  # every reading failed
    assert {o.reading for o in callback.observations} == {None}
    left, right = weights(plain.model), weights(watched.model)
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert callback.verdict.state is State.INCONCLUSIVE


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_no_exception_in_on_alarm_ends_training_or_takes_the_alarm_back(tmp_path: Path, error: Exception) -> None:
    def react(verdict: Verdict) -> None:
        raise error

    model = fresh_model()
    callback = TiltmeterCallback(tiny_basis(), detector_for(-1e9), every=1, on_alarm=react)
    run = trainer(tmp_path, callback, model=model)
    given = (run.args, run.state, run.control)
    callback.on_train_begin(*given, model=model, processing_class=make_tokenizer())
    poke(model)
    run.state.global_step = 1
    callback.on_step_end(*given, model=model)
    callback.on_train_end(*given, model=model)
    assert run.control.should_training_stop is False
    assert callback.verdict.state is State.ALARM
    assert read_run(tmp_path / "tiltmeter").verdict.state is State.ALARM
    named = "two prompts" if isinstance(error, NumericalError) else type(error).__name__
    assert f"on_alarm failed at the alarm ({named}" in (tmp_path / "tiltmeter" / "readings.jsonl").read_text()


@pytest.mark.parametrize("error", [TypeError("bug"), RuntimeError("no kernel"), MemoryError()], ids=repr)
def test_a_start_that_cannot_be_read_leaves_the_run_inconclusive_and_training_going(
    tmp_path: Path, error: Exception
) -> None:
    run, _, callback, _ = begin(tmp_path, error, {0})
    run.args.max_steps = 2
    run.train()
    assert run.state.global_step == 2
    assert callback.verdict.state is State.INCONCLUSIVE
    assert type(error).__name__ in callback.observations[0].verdict.reason


def test_a_set_up_that_breaks_in_an_unforeseen_way_is_reported_and_does_not_end_training(tmp_path: Path) -> None:
    class Odd:
        def __getattr__(self, name: str) -> Any:
            raise LookupError(name)

    callback = TiltmeterCallback(tiny_basis(), detector_for(1e9), tokenizer=Odd())
    run = trainer(tmp_path, callback, max_steps=1)
    run.train()
    assert run.state.global_step == 1
    assert callback.verdict is not None
    assert callback.verdict.state is State.INCONCLUSIVE
    assert "LookupError" in callback.verdict.reason


def test_a_record_folder_that_is_deleted_mid_run_is_written_anew(tmp_path: Path) -> None:
    from test_callback import At

    callback = TiltmeterCallback(tiny_basis(), detector_for(-1e9), every=2, output=tmp_path / "record")
    run = trainer(tmp_path / "run", At(3, lambda **_: shutil.rmtree(tmp_path / "record")), callback)
    run.train()
    assert run.state.global_step == 6
    found = read_run(tmp_path / "record")
    assert [o.step for o in found.observations] == [0, 2, 4, 6]
    assert found.first_alarm_step == 2  # before the folder went
    assert found.ended == "training ended at step 6"


def test_a_record_folder_that_cannot_be_made_again_does_not_end_training(tmp_path: Path) -> None:
    from test_callback import At

    def spoil(**_: Any) -> None:
        shutil.rmtree(tmp_path / "record")
        (tmp_path / "record").write_text("a file now")

    callback = TiltmeterCallback(tiny_basis(), detector_for(1e9), every=2, output=tmp_path / "record")
    run = trainer(tmp_path / "run", At(3, spoil), callback)
    run.train()
    assert run.state.global_step == 6
    assert [o.step for o in callback.observations] == [0, 2, 4, 6]


def test_a_second_run_into_the_same_folder_is_refused_before_its_first_step(tmp_path: Path) -> None:
    from test_locks import end, holder

    other = holder(tmp_path / "tiltmeter")
    try:
        run = trainer(tmp_path, TiltmeterCallback(tiny_basis(), every=2))
        with pytest.raises(FolderInUse, match=str(other.pid)):
            run.train()
        assert run.state.global_step == 0
    finally:
        end(other)


def test_training_that_was_interrupted_can_begin_again_in_the_same_process(tmp_path: Path) -> None:
    header = {"source": "callback", "from_step": 0, "basis": "b" * 64}
    first = RunRecord(tmp_path, None, header=header)
    second = RunRecord(tmp_path, None, header=header, take_over=True)
    second.end(0, "training ended")
    second.close()
    assert first.observations == ()
