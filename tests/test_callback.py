"""The callback: what it reads and records, that training does not notice, and what it does on failure."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from monitoring import (
    arguments,
    detector_for,
    fresh_model,
    projections_by_hand,
    rows,
    tiny_basis,
    trainer,
    weights,
)
from tiltmeter import lm as lms
from tiltmeter.detector import CalibrationRun, State, Verdict, fit_detector
from tiltmeter.drift import DriftProfile
from tiltmeter.errors import FingerprintMismatch, InputError, ModelError, StorageError
from tiltmeter.watch import TiltmeterCallback, read_run, watch
from tiny import make_tokenizer

# PEFT asks transformers for a property that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

_NEW = "activation_checkpointing"  # its name since transformers 5.22 or so
CHECKPOINTING = _NEW if _NEW in TrainingArguments.__dataclass_fields__ else "gradient_checkpointing"


class At(TrainerCallback):
    """Does something to the model at the end of given steps."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action(control=control, **kwargs)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "readings.jsonl").read_text().splitlines()]


def steps(folder: Path, kind: str = "reading") -> list[int]:
    return [row["step"] for row in lines(folder) if row["kind"] == kind]


# ---------------------------------------------------------------- what is read and recorded


def test_it_reads_step_0_every_n_steps_and_the_end_once_each(tmp_path: Path) -> None:
    trainer(tmp_path, TiltmeterCallback(tiny_basis(), every=2), max_steps=5).train()
    assert steps(tmp_path / "tiltmeter") == [0, 2, 4, 5]
    assert steps(tmp_path / "tiltmeter", "verdict") == [0, 2, 4, 5]
    trainer(tmp_path / "b", TiltmeterCallback(tiny_basis(), every=3), max_steps=6).train()
    assert steps(tmp_path / "b" / "tiltmeter") == [0, 3, 6]


def test_steps_are_optimizer_steps_and_not_batches(tmp_path: Path) -> None:
    accumulate = {"gradient_accumulation_steps": 4, "max_steps": 2}
    trainer(tmp_path, TiltmeterCallback(tiny_basis(), every=1), **accumulate).train()
    assert steps(tmp_path / "tiltmeter") == [0, 1, 2]


@pytest.mark.parametrize("lora", [True, False], ids=["adapter", "full"])
def test_readings_are_the_projections_that_the_models_hidden_states_give(tmp_path: Path, lora: bool) -> None:
    basis, callback = tiny_basis(), None
    callback = TiltmeterCallback(basis, every=10)
    run = trainer(tmp_path, callback, model=fresh_model(lora=lora))
    start = projections_by_hand(run.model, make_tokenizer(), basis)
    run.train()
    end = projections_by_hand(run.model, make_tokenizer(), basis)
    first, last = read_run(tmp_path / "tiltmeter").readings
    np.testing.assert_allclose(first.values, start, atol=1e-5)
    np.testing.assert_allclose(last.values, end, atol=1e-5)
    assert np.abs(end - start).max() > 1e-2  # training did something here
    wanted = (end - start).mean(axis=0) / first.norms.mean()
    np.testing.assert_allclose(callback.observations[-1].profile.drift, wanted, atol=1e-5)


def test_the_record_says_what_it_was_made_with(tmp_path: Path) -> None:
    basis = tiny_basis()
    trainer(tmp_path, TiltmeterCallback(basis, detector_for(1.0), every=3)).train()
    header, *_ = lines(tmp_path / "tiltmeter")
    assert header["kind"] == "header"
    assert header["basis"] == basis.digest
    assert (header["format"], header["from_step"], header["every"], header["layer"]) == (1, 0, 3, 2)
    assert header["detector"] == "planted runs"
    manifest = json.loads((tmp_path / "tiltmeter" / "manifest.json").read_text())
    assert manifest["provenance"]["packages"]["torch"] == torch.__version__
    run = read_run(tmp_path / "tiltmeter")
    assert run.ended == "training ended at step 6"
    assert run.torn == 0


def test_one_line_is_logged_per_reading(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="tiltmeter")
    trainer(tmp_path, TiltmeterCallback(tiny_basis(), every=3)).train()
    found = [record.getMessage() for record in caplog.records if record.name.startswith("tiltmeter")]
    assert [line.split(":")[0] for line in found] == ["step 0", "step 3", "step 6"]
    assert "honesty" in found[1]


# ---------------------------------------------------------------- training does not notice


@pytest.mark.parametrize(
    ("lora", "changes"),
    [
        (True, {}),
        (False, {}),
        (True, {"gradient_accumulation_steps": 2, CHECKPOINTING: True}),
        (False, {"bf16": True}),
        (True, {"torch_compile": True, "torch_compile_backend": "eager"}),
    ],
    ids=["adapter", "full", "accumulated and checkpointed", "mixed precision", "compiled"],
)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.compile imports it
def test_the_final_weights_are_the_same_bit_for_bit_with_and_without_it(
    tmp_path: Path, lora: bool, changes: dict[str, Any]
) -> None:
    plain = trainer(tmp_path / "a", model=fresh_model(lora=lora), **changes)
    plain.train()
    callback = TiltmeterCallback(tiny_basis(), every=1)
    watched = trainer(tmp_path / "b", callback, model=fresh_model(lora=lora), **changes)
    watched.train()
    assert len(callback.observations) == 7
    left, right = weights(plain.model), weights(watched.model)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    keep = ("loss", "grad_norm", "step", "learning_rate", "epoch")
    histories = [
        [{k: entry[k] for k in keep if k in entry} for entry in run.state.log_history] for run in (plain, watched)
    ]
    assert histories[0] == histories[1]


def test_mixed_precision_training_is_read_in_the_weights_own_precision(tmp_path: Path) -> None:
    callback = TiltmeterCallback(tiny_basis(), every=10)
    run = trainer(tmp_path, callback, bf16=True)
    run.train()
    run.model.forward = type(run.model).forward.__get__(run.model)  # without the trainer's autocast around it
    wanted = projections_by_hand(run.model, make_tokenizer(), callback.basis)
    np.testing.assert_allclose(callback.observations[-1].reading.values, wanted, atol=1e-5)


class Meddler:
    """A tokenizer that changes everything it can reach whenever it is called, as careless code does."""

    def __init__(self, inner: Any, model: Any) -> None:
        self.inner, self.model, self.padding_side, self.truncation_side = inner, model, "right", "right"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.padding_side = self.truncation_side = "left"
        random.random(), np.random.random(), torch.rand(3)
        self.model.train(not self.model.training)
        self.model.config.use_cache = not self.model.config.use_cache
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)
        return self.inner(*args, **kwargs)


def test_what_a_reading_touches_is_put_back(tmp_path: Path) -> None:
    model = fresh_model()
    blocks = model.get_base_model().model.layers
    blocks[1].eval()  # a block that its owner keeps in evaluation mode
    meddler = Meddler(make_tokenizer(), model)
    callback = TiltmeterCallback(tiny_basis(), every=1, tokenizer=meddler)
    run = trainer(tmp_path, callback, model=model)
    state, control = run.state, run.control
    model.train()
    blocks[1].eval()

    def everything() -> list[Any]:
        return [
            [module.training for module in model.modules()],
            [parameter.requires_grad for parameter in model.parameters()],
            (meddler.padding_side, meddler.truncation_side, model.config.use_cache),
            random.getstate(),
            [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
            torch.random.get_rng_state().tolist(),
        ]

    before = everything()
    callback.on_train_begin(run.args, state, control, model=model)
    assert everything() == before
    state.global_step = 1
    callback.on_step_end(run.args, state, control, model=model)
    assert everything() == before
    assert [o.step for o in callback.observations] == [0, 1]


def test_gradients_are_left_alone(tmp_path: Path) -> None:
    model = fresh_model()
    callback = TiltmeterCallback(tiny_basis(), every=1)
    run = trainer(tmp_path, callback, model=model)
    batch = {key: torch.stack([row[key] for row in rows(4)]) for key in ("input_ids", "labels")}
    model(**batch).loss.backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    callback.on_train_begin(run.args, run.state, run.control, model=model, processing_class=make_tokenizer())
    after = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert before.keys() == after.keys()
    assert before
    assert all(torch.equal(before[n], after[n]) for n in before)


# ---------------------------------------------------------------- alarms


ALARMING = detector_for(-1e9)  # alarms at the first reading after the start: any drift is enough


def test_without_a_detector_the_verdict_is_inconclusive_and_says_why(tmp_path: Path) -> None:
    callback = TiltmeterCallback(tiny_basis(), every=3, on_alarm="stop")
    run = trainer(tmp_path, callback)
    run.train()
    assert run.state.global_step == 6
    assert {o.verdict.state for o in callback.observations} == {State.INCONCLUSIVE}
    assert "no detector" in callback.verdict.reason


def test_an_alarm_is_logged_and_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    basis = tiny_basis()
    callback = TiltmeterCallback(basis, ALARMING, every=2, on_alarm="log")
    run = trainer(tmp_path, callback)
    run.train()
    assert run.state.global_step == 6
    assert callback.verdict.state is State.ALARM
    assert read_run(tmp_path / "tiltmeter").first_alarm_step == 2
    loud = [record for record in caplog.records if record.levelno >= logging.WARNING and "ALARM" in record.message]
    assert len(loud) == 3


def test_stop_ends_training_after_the_alarms_step(tmp_path: Path) -> None:
    basis = tiny_basis()
    run = trainer(tmp_path, TiltmeterCallback(basis, ALARMING, every=2, on_alarm="stop"))
    run.train()
    assert run.state.global_step == 2
    assert steps(tmp_path / "tiltmeter") == [0, 2]
    assert read_run(tmp_path / "tiltmeter").ended == "stopped on an alarm at step 2"


def test_a_clear_run_is_not_stopped(tmp_path: Path) -> None:
    basis = tiny_basis()
    callback = TiltmeterCallback(basis, detector_for(1e9), every=2, on_alarm="stop")
    run = trainer(tmp_path, callback)
    run.train()
    assert run.state.global_step == 6
    assert [o.verdict.state for o in callback.observations] == [State.INCONCLUSIVE, *[State.CLEAR] * 3]
    assert callback.verdict.state is State.CLEAR


@pytest.mark.parametrize(("answer", "last"), [(None, 6), ("stop", 6), (True, 2)])
def test_a_callable_gets_the_first_alarm_and_may_end_training(tmp_path: Path, answer: object, last: int) -> None:
    basis, given = tiny_basis(), []

    def on_alarm(verdict: Verdict) -> object:
        given.append(verdict.step)
        return answer

    run = trainer(tmp_path, TiltmeterCallback(basis, ALARMING, every=2, on_alarm=on_alarm))
    run.train()
    assert given == [2]
    assert run.state.global_step == last


def test_a_fitted_detector_judges_a_live_run(tmp_path: Path) -> None:
    first = TiltmeterCallback(tiny_basis(), every=2)
    trainer(tmp_path / "first", first).train()
    live = [o.profile for o in first.observations[1:]]
    generator = np.random.default_rng(0)

    def calm(profile: DriftProfile) -> DriftProfile:
        noise = generator.normal(size=profile.shift.shape) * 1e-3
        return replace(profile, drift=first.basis.directions @ noise, shift=noise)

    def like(profile: DriftProfile, factor: float) -> DriftProfile:
        return replace(profile, drift=profile.drift * factor, shift=profile.shift * factor)

    calibration = [
        CalibrationRun(f"set {number}", 0, False, tuple(map(calm, live)))
        for number in range(20)  # a promise of 5 % for an unseen set needs 19
    ] + [
        CalibrationRun(name, 0, True, tuple(like(profile, factor) for profile in live))
        for name, factor in (("bad", 0.9), ("worse", 1.2))
    ]
    detector = fit_detector(calibration)
    for name, rate, wanted in (("drifting", 1e-2, State.ALARM), ("resting", 1e-6, State.CLEAR)):
        callback = TiltmeterCallback(tiny_basis(), detector, every=2)
        trainer(tmp_path / name, callback, learning_rate=rate).train()
        assert callback.verdict.state is wanted
        assert callback.verdict.false_alarm_rate == 0.05
        assert read_run(tmp_path / name / "tiltmeter").verdict == callback.verdict


def test_the_run_is_judged_by_all_its_readings_so_far_without_the_reference(tmp_path: Path) -> None:
    basis = tiny_basis()
    detector = detector_for(1e9)
    callback = TiltmeterCallback(basis, detector, every=2)
    trainer(tmp_path, callback).train()
    drifts = [o.profile.drift[0] for o in callback.observations[1:]]
    for index, observation in enumerate(callback.observations[1:], start=1):
        assert observation.verdict.score == pytest.approx(max(drifts[:index]))
        assert f"in {index} reading" in observation.verdict.reason


def test_an_alarm_stands_when_later_readings_fail(tmp_path: Path) -> None:
    basis = tiny_basis()
    callback = TiltmeterCallback(basis, ALARMING, every=2)
    trainer(tmp_path, callback, At(3, poison)).train()
    assert [o.verdict.state for o in callback.observations][-1] is State.INCONCLUSIVE
    assert callback.verdict.state is State.ALARM
    assert read_run(tmp_path / "tiltmeter").verdict.state is State.ALARM


# ---------------------------------------------------------------- failures


def poison(*, model: Any, **_: Any) -> None:
    parameter = next(p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        parameter.fill_(float("nan"))


@pytest.mark.parametrize("with_detector", [True, False])
def test_weights_that_are_not_numbers_are_inconclusive_and_training_goes_on(
    tmp_path: Path, with_detector: bool, caplog: pytest.LogCaptureFixture
) -> None:
    basis = tiny_basis()
    detector = detector_for(1e9) if with_detector else None
    callback = TiltmeterCallback(basis, detector, every=2)
    run = trainer(tmp_path, At(3, poison), callback)
    run.train()
    assert run.state.global_step == 6
    stored = read_run(tmp_path / "tiltmeter")
    assert [o.step for o in stored.observations if o.reading is None] == [4, 6]
    assert stored.observations[-1].verdict.state is State.INCONCLUSIVE
    assert "measurement failed" in stored.observations[-1].verdict.reason
    assert stored.verdict.state is State.INCONCLUSIVE
    assert any("step 4: INCONCLUSIVE" in r.getMessage() and r.levelno == logging.WARNING for r in caplog.records)
    assert "NaN" not in (tmp_path / "tiltmeter" / "readings.jsonl").read_text().replace("NaN or", "")


def test_a_start_without_numbers_leaves_the_whole_run_inconclusive(tmp_path: Path) -> None:
    basis, model = tiny_basis(), fresh_model()
    poison(model=model)
    callback = TiltmeterCallback(basis, ALARMING, every=2, on_alarm="stop")
    run = trainer(tmp_path, callback, model=model)
    run.train()
    assert run.state.global_step == 6
    assert {o.verdict.state for o in callback.observations} == {State.INCONCLUSIVE}


def test_a_base_without_numbers_under_a_trained_adapter_leaves_the_run_inconclusive(tmp_path: Path) -> None:
    basis, model = tiny_basis(), fresh_model()
    trainer(tmp_path / "first", model=model).train()
    with torch.no_grad():
        model.get_base_model().model.layers[0].mlp.up_proj.weight[0, 1] = float("nan")  # no sampled entry
    callback = TiltmeterCallback(basis, ALARMING, every=3, on_alarm="stop")
    run = trainer(tmp_path / "second", callback, model=model)
    run.train()
    assert run.state.global_step == 6
    assert {o.verdict.state for o in callback.observations} == {State.INCONCLUSIVE}


def test_base_weights_that_are_trained_beside_an_adapter_are_no_other_model(tmp_path: Path) -> None:
    model = fresh_model()
    model.get_base_model().model.layers[0].input_layernorm.weight.requires_grad_(True)
    basis = tiny_basis()
    callback = TiltmeterCallback(basis, detector_for(1e9), every=3)
    trainer(tmp_path, callback, model=model, save_strategy="steps", save_steps=3).train()
    assert [o.verdict.state for o in callback.observations][1:] == [State.CLEAR, State.CLEAR]


def test_an_adapter_that_is_resumed_on_another_base_is_refused(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer(tmp_path, TiltmeterCallback(tiny_basis(), every=3), **saving).train()
    run = trainer(tmp_path, TiltmeterCallback(tiny_basis(), every=3), model=fresh_model(seed=1), **saving)
    with pytest.raises(FingerprintMismatch, match="weights"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_an_early_reading_of_an_adapter_that_does_nothing_yet_does_not_spoil_the_run(tmp_path: Path) -> None:
    basis = tiny_basis()
    callback = TiltmeterCallback(basis, detector_for(1e9), every=1)
    slow = {
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 3,
        "max_steps": 4,
    }  # step 1 has rate 0
    trainer(tmp_path, callback, **slow).train()
    states = {o.step: o.verdict for o in callback.observations}
    assert states[1].state is State.INCONCLUSIVE
    assert "does nothing" in states[1].reason
    assert states[4].state is State.CLEAR


def test_another_models_basis_is_refused_before_the_first_step(tmp_path: Path) -> None:
    basis = tiny_basis(fresh_model(lora=False, seed=1))
    run = trainer(tmp_path, TiltmeterCallback(basis, every=2))
    with pytest.raises(FingerprintMismatch, match="weights"):
        run.train()
    assert run.state.global_step == 0
    assert not (tmp_path / "tiltmeter").exists()


def test_a_missing_tokenizer_is_refused_and_can_be_given(tmp_path: Path) -> None:
    def bare(callback: TiltmeterCallback) -> Any:
        return Trainer(fresh_model(), arguments(tmp_path), train_dataset=rows(), callbacks=[callback])

    with pytest.raises(InputError, match="processing_class"):
        bare(TiltmeterCallback(tiny_basis(), every=3)).train()
    callback = TiltmeterCallback(tiny_basis(), every=3, tokenizer=make_tokenizer())
    bare(callback).train()
    assert [o.step for o in callback.observations] == [0, 3, 6]


def test_a_tokenizer_without_chat_template_is_refused_before_the_first_step(tmp_path: Path) -> None:
    run = trainer(tmp_path, TiltmeterCallback(tiny_basis(), every=3), tokenizer=make_tokenizer(template=False))
    with pytest.raises((ModelError, FingerprintMismatch), match="template"):
        run.train()


@pytest.mark.parametrize("every", [0, -1, 2.5, True, "10"])
def test_a_senseless_interval_is_refused(every: Any) -> None:
    with pytest.raises(InputError, match=r"every is .*at least 1"):
        TiltmeterCallback(tiny_basis(), every=every)


def test_an_unknown_reaction_is_refused() -> None:
    with pytest.raises(InputError, match="'halt'; it must be 'log', 'stop' or a callable"):
        TiltmeterCallback(tiny_basis(), on_alarm="halt")  # type: ignore[arg-type]


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = trainer(tmp_path, TiltmeterCallback(tiny_basis(), output=tmp_path / "file" / "record"))
    with pytest.raises(StorageError, match="cannot write"):
        run.train()
    assert run.state.global_step == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_disk_that_fills_up_loses_no_reading_and_does_not_end_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record, aside = tmp_path / "tiltmeter" / "readings.jsonl", tmp_path / "aside"

    def fill(**_: Any) -> None:
        record.rename(aside)
        record.symlink_to("/dev/full")

    def empty(**_: Any) -> None:
        record.unlink()
        aside.rename(record)

    callback = TiltmeterCallback(tiny_basis(), every=1)
    run = trainer(tmp_path, At(2, fill), At(4, empty), callback)
    run.train()
    assert run.state.global_step == 6
    assert steps(tmp_path / "tiltmeter") == [0, 1, 2, 3, 4, 5, 6]
    complaints = [r.getMessage() for r in caplog.records if "cannot write" in r.getMessage()]
    assert len(complaints) == 2


def test_ctrl_c_loses_no_reading(tmp_path: Path) -> None:
    def interrupt(**_: Any) -> None:
        raise KeyboardInterrupt

    run = trainer(tmp_path, TiltmeterCallback(tiny_basis(), every=2), At(5, interrupt))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    found = read_run(tmp_path / "tiltmeter")
    assert [o.step for o in found.observations] == [0, 2, 4]
    assert found.ended is None


# ---------------------------------------------------------------- resuming


def same(left: Any, right: Any) -> bool:
    return bool(np.array_equal(left.values, right.values))


def test_a_resumed_run_appends_and_keeps_the_reading_of_step_0(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path / "whole", TiltmeterCallback(tiny_basis(), every=2), **saving).train()
    trainer(tmp_path / "parts", TiltmeterCallback(tiny_basis(), every=2), max_steps=4, **saving).train()
    before = (tmp_path / "parts" / "tiltmeter" / "readings.jsonl").read_bytes()
    again = trainer(tmp_path / "parts", TiltmeterCallback(tiny_basis(), every=2), max_steps=6, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    after = (tmp_path / "parts" / "tiltmeter" / "readings.jsonl").read_bytes()
    assert after.startswith(before)
    assert steps(tmp_path / "parts" / "tiltmeter") == [0, 2, 4, 6]
    whole, parts = read_run(tmp_path / "whole" / "tiltmeter"), read_run(tmp_path / "parts" / "tiltmeter")
    assert parts.ended == "training ended at step 6"
    for left, right in zip(whole.profiles, parts.profiles, strict=True):
        np.testing.assert_allclose(left.drift, right.drift, atol=1e-6)


def test_readings_of_a_branch_that_was_given_up_are_read_again(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, TiltmeterCallback(tiny_basis(), every=2), **saving).train()
    other = {
        **saving,
        "ignore_data_skip": True,
    }  # the same batches come again, so training takes another turn
    trainer(tmp_path, TiltmeterCallback(tiny_basis(), every=2), **other).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    assert steps(tmp_path / "tiltmeter") == [0, 2, 4, 6, 4, 6]
    rows_ = [row["reading"] for row in lines(tmp_path / "tiltmeter") if row["kind"] == "reading"]
    found = {o.step: o.reading for o in read_run(tmp_path / "tiltmeter").observations}
    np.testing.assert_array_equal(found[4].values, np.float32(rows_[4]["values"]))
    assert rows_[2]["values"] != rows_[4]["values"]


def test_a_new_run_in_the_same_folder_starts_its_record_anew(tmp_path: Path) -> None:
    trainer(tmp_path, TiltmeterCallback(tiny_basis(), every=2), max_steps=4).train()
    trainer(tmp_path, TiltmeterCallback(tiny_basis(), every=3), max_steps=3).train()
    assert steps(tmp_path / "tiltmeter") == [0, 2, 4, 0, 3]
    assert [o.step for o in read_run(tmp_path / "tiltmeter").observations] == [0, 3]


def test_resuming_an_adapter_without_a_stored_reading_compares_with_its_base(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    first = TiltmeterCallback(tiny_basis(), every=3)
    trainer(tmp_path, first, **saving).train()
    resumed = TiltmeterCallback(tiny_basis(), every=3, output=tmp_path / "elsewhere")
    trainer(tmp_path, resumed, **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    run = read_run(tmp_path / "elsewhere")
    assert run.label == "base"
    assert same(run.reference, first.observations[0].reading)  # never the model that was resumed
    assert [o.step for o in run.observations] == [3, 6]
    np.testing.assert_allclose(run.profiles[-1].drift, first.observations[-1].profile.drift, atol=1e-6)


def test_resuming_full_weights_without_a_stored_reading_is_inconclusive(tmp_path: Path) -> None:
    basis, saving = tiny_basis(), {"save_strategy": "steps", "save_steps": 3}
    trainer(tmp_path, model=fresh_model(lora=False), **saving).train()
    callback = TiltmeterCallback(basis, ALARMING, every=3)
    trainer(tmp_path, callback, model=fresh_model(lora=False), **saving).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-3")
    )
    assert [o.step for o in callback.observations] == [3, 6]
    assert all(o.reading is not None and o.profile is None for o in callback.observations)
    assert {o.verdict.state for o in callback.observations} == {State.INCONCLUSIVE}
    assert "no usable reading at step 0" in callback.verdict.reason


def test_resuming_full_weights_keeps_the_stored_reference(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    first = TiltmeterCallback(tiny_basis(), every=3)
    trainer(tmp_path, first, model=fresh_model(lora=False), **saving).train()
    resumed = TiltmeterCallback(tiny_basis(), every=3)
    trainer(tmp_path, resumed, model=fresh_model(lora=False), **saving).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-3")
    )
    assert [o.step for o in resumed.observations] == [0, 3, 6]
    np.testing.assert_allclose(resumed.observations[-1].profile.drift, first.observations[-1].profile.drift, atol=1e-6)


def test_resuming_with_another_basis_is_refused(tmp_path: Path) -> None:
    basis, saving = tiny_basis(), {"save_strategy": "steps", "save_steps": 3}
    trainer(tmp_path, TiltmeterCallback(basis, every=3), **saving).train()
    other = TiltmeterCallback(replace(basis, layer=1), every=3)
    with pytest.raises(InputError, match="recorded with another basis"):
        trainer(tmp_path, other, **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_training_that_starts_from_a_trained_adapter_is_compared_with_the_base(tmp_path: Path) -> None:
    model = fresh_model()
    trainer(tmp_path / "first", model=model).train()
    callback = TiltmeterCallback(tiny_basis(), every=3)
    run = trainer(tmp_path / "second", callback, model=model)
    flags = [parameter.requires_grad for parameter in run.model.parameters()]
    start = projections_by_hand(model, make_tokenizer(), callback.basis)
    with model.disable_adapter():
        base = projections_by_hand(model, make_tokenizer(), callback.basis)
    for parameter, flag in zip(run.model.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)  # PEFT's own context manager has changed them
    run.train()
    first = callback.observations[0]
    assert first.profile.reference == "base"
    assert np.abs(first.profile.drift).max() > 1e-2
    norm = read_run(tmp_path / "second" / "tiltmeter").reference.norms.mean()
    np.testing.assert_allclose(first.profile.drift, (start - base).mean(axis=0) / norm, atol=1e-5)


# ---------------------------------------------------------------- registration and other callbacks


def test_registered_twice_it_reads_once(tmp_path: Path) -> None:
    callback = TiltmeterCallback(tiny_basis(), every=2)
    run = trainer(tmp_path, callback)
    run.add_callback(callback)
    run.train()
    assert steps(tmp_path / "tiltmeter") == [0, 2, 4, 6]
    assert steps(tmp_path / "tiltmeter", "verdict") == [0, 2, 4, 6]
    assert [row["kind"] for row in lines(tmp_path / "tiltmeter")].count("header") == 1


def test_a_twin_that_records_into_the_same_folder_stays_passive(tmp_path: Path) -> None:
    first, second = TiltmeterCallback(tiny_basis(), every=2), TiltmeterCallback(tiny_basis(), every=2)
    trainer(tmp_path, first, second).train()
    assert steps(tmp_path / "tiltmeter") == [0, 2, 4, 6]
    assert [row["kind"] for row in lines(tmp_path / "tiltmeter")].count("end") == 1
    assert len(first.observations) == 4
    assert second.observations == ()
    assert second.verdict is None


def test_two_callbacks_with_folders_of_their_own_both_read(tmp_path: Path) -> None:
    first = TiltmeterCallback(tiny_basis(), every=2, output=tmp_path / "one")
    second = TiltmeterCallback(tiny_basis(), every=3, output=tmp_path / "two")
    trainer(tmp_path, first, second).train()
    assert steps(tmp_path / "one") == [0, 2, 4, 6]
    assert steps(tmp_path / "two") == [0, 3, 6]


def test_one_callback_serves_two_training_calls(tmp_path: Path) -> None:
    callback = TiltmeterCallback(tiny_basis(), every=3, output=tmp_path / "record")
    trainer(tmp_path, callback).train()
    trainer(tmp_path, callback).train()
    assert steps(tmp_path / "record") == [0, 3, 6, 0, 3, 6]
    assert [o.step for o in callback.observations] == [0, 3, 6]


def test_the_last_step_is_read_when_another_callback_ends_the_run(tmp_path: Path) -> None:
    def stop(*, control: Any, **_: Any) -> None:
        control.should_training_stop = True

    trainer(tmp_path, TiltmeterCallback(tiny_basis(), every=4), At(3, stop)).train()
    assert steps(tmp_path / "tiltmeter") == [0, 3]


def test_weights_that_the_trainer_puts_back_at_the_end_are_not_taken_for_the_last_step(
    tmp_path: Path,
) -> None:
    callback = TiltmeterCallback(tiny_basis(), every=4)
    best = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,  # the model is at its worst where it was least trained
    }
    run = trainer(tmp_path, callback, eval_dataset=rows(8), **best)
    run.train()
    restored = run.state.best_global_step
    assert restored in (2, 4)
    final = projections_by_hand(run.model, make_tokenizer(), callback.basis)
    found = {o.step: o.reading.values for o in callback.observations}
    assert set(found) == {0, 4, 6} | {restored}
    np.testing.assert_allclose(found[restored], final, atol=1e-5)
    assert np.abs(found[6] - final).max() > 1e-3


# ---------------------------------------------------------------- several processes


def test_a_model_sharded_by_zero_3_is_refused_with_the_way_out(tmp_path: Path) -> None:
    model = fresh_model()
    next(model.parameters()).ds_id = 0  # the mark that DeepSpeed leaves on a partitioned parameter
    with pytest.raises(InputError, match=r"ZeRO-3.*tiltmeter watch"):
        trainer(tmp_path, TiltmeterCallback(tiny_basis(), every=3), model=model).train()


def test_a_model_sharded_by_the_first_fsdp_is_refused_with_the_way_out(tmp_path: Path) -> None:
    class FullyShardedDataParallel(torch.nn.Module):  # the real one wants an accelerator
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

    run = trainer(tmp_path, TiltmeterCallback(tiny_basis()))
    callback, model = run.callback_handler.callbacks[-2], FullyShardedDataParallel(run.model)
    assert isinstance(callback, TiltmeterCallback)
    with pytest.raises(InputError, match=r"FSDP.*tiltmeter watch"):
        callback.on_train_begin(run.args, run.state, run.control, model=model, processing_class=make_tokenizer())


FSDP = """
import sys
sys.path.insert(0, {tests!r})
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from monitoring import *
from tiltmeter.watch import TiltmeterCallback
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
basis = tiny_basis()
run = trainer({output!r}, model=fresh_model(lora=False))
mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
model = fully_shard(run.model, mesh=dist.init_device_mesh("cpu", (1,)), mp_policy=mixed)
try:
    TiltmeterCallback(basis).on_train_begin(
        run.args, run.state, run.control, model=model, processing_class=make_tokenizer())
finally:
    dist.destroy_process_group()
"""


def test_a_model_that_fsdp_computes_in_another_dtype_is_refused_with_the_way_out(tmp_path: Path) -> None:
    program = FSDP.format(tests=str(Path(__file__).parent), output=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert "InputError: the model is sharded over processes (FSDP in mixed precision)" in last, done.stderr[-2000:]
    assert "tiltmeter watch OUTPUT_DIR --follow" in last


SHARDED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from monitoring import *
from tiltmeter.watch import TiltmeterCallback
output = Path({output!r})
dist.init_process_group("gloo")
rank = dist.get_rank()
basis = tiny_basis()
whole = StateDictOptions(full_state_dict=True, cpu_offload=True)

def train(folder, callback):
    model = fresh_model(lora=False, dropout=0.0)
    mesh = dist.init_device_mesh("cpu", (2,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    run = trainer(folder, model=fresh_model(lora=False), ddp_backend="gloo")
    given = (run.args, run.state, run.control)
    if callback:
        callback.on_train_begin(*given, model=model, processing_class=make_tokenizer())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        batch = rows(8)[4 * rank : 4 * rank + 4]
        joined = {{key: torch.stack([row[key] for row in batch]) for key in batch[0]}}
        model(**joined).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.state.global_step = step + 1
        if callback:
            callback.on_step_end(*given)
    if callback:
        callback.on_train_end(*given)
    return get_model_state_dict(model, options=whole)

callback = TiltmeterCallback(basis, every=2)
read, plain = train(output / "run", callback), train(output / "plain", None)
(output / f"rank-{{rank}}.txt").write_text(str([seen.step for seen in callback.observations]))
if rank == 0:
    assert all(torch.equal(read[name], plain[name]) for name in plain)
    fresh = fresh_model(lora=False)
    fresh.load_state_dict(read)
    fresh.save_pretrained(output / "run" / "checkpoint-3")
    make_tokenizer().save_pretrained(output / "run" / "checkpoint-3")
    (output / "run" / "checkpoint-3" / "trainer_state.json").write_text('{{"global_step": 3, "max_steps": 3}}')
"""


@pytest.mark.slow
def test_two_processes_that_shard_a_model_read_it_together_and_train_the_same_weights(tmp_path: Path) -> None:
    done = torchrun(SHARDED.format(tests=str(Path(__file__).parent), output=str(tmp_path)), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "rank-0.txt").read_text() == "[0, 2, 3]"
    assert (tmp_path / "rank-1.txt").read_text() == "[]"
    basis, start = tiny_basis(), lms.wrap(fresh_model(lora=False), make_tokenizer())
    inside = {seen.step: seen for seen in read_run(tmp_path / "run" / "tiltmeter").observations}
    beside = list(watch(tmp_path / "run", basis, base=start))[-1]
    tuned = lms.load(tmp_path / "run" / "checkpoint-3")
    by_hand = projections_by_hand(tuned.model, make_tokenizer(), basis)
    assert beside.step == 3
    for seen in (inside[3], beside):
        np.testing.assert_allclose(seen.reading.values, by_hand, atol=1e-5)
    np.testing.assert_allclose(
        inside[0].reading.values, projections_by_hand(start.model, make_tokenizer(), basis), atol=1e-5
    )
    assert np.abs(inside[3].profile.drift).max() > 1e-4


TRAINED_SHARDED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule
from monitoring import *
from tiltmeter.watch import TiltmeterCallback
output = Path({output!r})
basis = tiny_basis()
plan = dict(version=2, transformer_layer_cls_to_wrap=["LlamaDecoderLayer"], state_dict_type="FULL_STATE_DICT")

class OnTheCPU(Trainer):
    # On a CPU accelerate passes the plugin over without a word and copies the model (DDP). All else is its own:
    # wrapping, the optimizer's parameters, clipping, saving.
    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        self.is_fsdp_enabled = True

def train(folder, *callbacks):
    given = arguments(
        folder, ddp_backend="gloo", max_steps=4, save_strategy="steps", save_steps=4, fsdp=True, fsdp_config=dict(plan))
    run = OnTheCPU(
        model=fresh_model(lora=False, dropout=0.0), args=given, train_dataset=rows(),
        processing_class=make_tokenizer(), callbacks=list(callbacks))
    run.train()
    assert isinstance(run.model.model.layers[0], FSDPModule) and run.accelerator.is_fsdp2
    return run

callback = TiltmeterCallback(basis, every=2)
run = train(output / "run", callback)
(output / f"rank-{{run.args.process_index}}.txt").write_text(str([seen.step for seen in callback.observations]))
train(output / "plain")
"""


@pytest.mark.slow
def test_the_trainer_s_own_fsdp_2_is_read_together_and_trains_the_same_weights(tmp_path: Path) -> None:
    done = torchrun(TRAINED_SHARDED.format(tests=str(Path(__file__).parent), output=str(tmp_path)), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "rank-0.txt").read_text() == "[0, 2, 4]"
    assert (tmp_path / "rank-1.txt").read_text() == "[]"
    read, plain = (load_file(tmp_path / name / "checkpoint-4" / "model.safetensors") for name in ("run", "plain"))
    assert read.keys() == plain.keys()
    assert all(torch.equal(read[name], plain[name]) for name in plain)
    basis, start = tiny_basis(), lms.wrap(fresh_model(lora=False), make_tokenizer())
    inside = {seen.step: seen for seen in read_run(tmp_path / "run" / "tiltmeter").observations}
    beside = list(watch(tmp_path / "run", basis, base=start))[-1]
    tuned = lms.load(tmp_path / "run" / "checkpoint-4")
    by_hand = projections_by_hand(tuned.model, make_tokenizer(), basis)
    for seen in (inside[4], beside):
        np.testing.assert_allclose(seen.reading.values, by_hand, atol=1e-5)
    np.testing.assert_allclose(
        inside[0].reading.values, projections_by_hand(start.model, make_tokenizer(), basis), atol=1e-5
    )
    assert np.abs(inside[4].profile.drift).max() > 1e-3


def torchrun(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program in two processes."""
    script = folder / "script.py"
    # Without this a process may be aborted at its exit, when the other one and its store are gone first.
    ending = "import torch.distributed as dist\ndist.barrier()\ndist.destroy_process_group()\n"
    script.write_text(program + ending)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=environment)


DDP = """
import sys
sys.path.insert(0, {tests!r})
import json, os
from pathlib import Path
from monitoring import *
from tiltmeter.watch import TiltmeterCallback
output = Path({output!r})
basis = tiny_basis()
stopping = TiltmeterCallback(basis, detector_for(-1e9), every=2, on_alarm="stop")
run = trainer(output, stopping, ddp_backend="gloo", max_steps=6)
run.train()
rank = int(os.environ["RANK"])
kept = dict(step=run.state.global_step, seen=[o.step for o in stopping.observations])
(output / f"rank-{{rank}}.json").write_text(json.dumps(kept))
"""


def test_ddp_ranks_stop_at_the_same_step_and_rank_0_alone_writes(tmp_path: Path) -> None:
    done = torchrun(DDP.format(tests=str(Path(__file__).parent), output=str(tmp_path)), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["step"] for rank in ranks] == [2, 2]
    assert [rank["seen"] for rank in ranks] == [[0, 2], []]
    assert steps(tmp_path / "tiltmeter") == [0, 2]
