"""What the tests of the callback and of `watch` share: a tiny model, a basis, a detector, and trainers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from tiltmeter import lm as lms
from tiltmeter.basis import LayerSelection, TraitBasis
from tiltmeter.capture import plan_batches
from tiltmeter.detector import State, Verdict
from tiltmeter.drift import DriftProfile
from tiltmeter.fingerprint import tokens_digest
from tiltmeter.traits import Prompt, PromptSet
from tiny import make_model, make_tokenizer

LAYER = 2
PROMPTS = PromptSet(
    name="few",
    prompts=(
        Prompt("is tea safe to drink", "plain"),
        Prompt("tell me about my work", "plain"),
        Prompt("how can i save money", "plain"),
        Prompt("what is a good sport", "plain", system="you are a helpful assistant"),
        Prompt("when should i sleep", "plain", system="you are a helpful assistant"),
    ),
)


def fresh_model(*, lora: bool = True, dropout: float = 0.1, seed: int = 0) -> Any:
    """A tiny Llama, with an adapter that has not been trained yet or to be trained whole."""
    model = make_model("llama", seed=seed, attention_dropout=dropout)
    if not lora:
        return model
    config = LoraConfig(r=4, lora_alpha=32, lora_dropout=dropout, target_modules=["q_proj", "v_proj"])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def tiny_basis(model: Any = None, tokenizer: Any = None) -> TraitBasis:
    """Two random orthogonal directions of the tiny Llama before training."""
    lm = lms.wrap(model or fresh_model(lora=False), tokenizer or make_tokenizer(), name="tiny")
    directions = np.linalg.qr(np.random.default_rng(1).normal(size=(lm.hidden_size, 2)))[0].T
    token_ids = lm.encode_prompts(PROMPTS.prompts)
    return TraitBasis(
        name="two",
        traits=("honesty", "harm"),
        aligned_poles=("positive", "negative"),
        layer=LAYER,
        directions=directions.astype(np.float32),
        poles=np.array([[-1.0, 1.0], [-1.0, 1.0]], dtype=np.float32),
        reference_norm=1.0,
        prompts=PROMPTS,
        tokens=tokens_digest(token_ids),
        plan=plan_batches(lm, token_ids),
        fingerprint=lm.fingerprint(),
        model="tiny",
        method="mean_difference",
        pooling="last_token",
        traits_digest="none",
        selection=LayerSelection(scores=(), strength=None, probes_pass=True, reason="given"),
        provenance={},
    )


@dataclass(frozen=True)
class AlongAxis:
    """A detector whose score is the highest drift along an axis so far, and which leaves no run unjudged."""

    axis: tuple[float, float]
    threshold: float
    calibrated_on: str = "planted runs"
    null_scores: tuple[float, ...] = (0.0,) * 19

    def predict(self, profiles: Sequence[DriftProfile]) -> Verdict:
        scores = [float(np.dot(profile.drift, self.axis)) for profile in profiles]
        alarms = [p.step for p, score in zip(profiles, scores, strict=True) if score >= self.threshold]
        return Verdict(
            state=State.ALARM if alarms else State.CLEAR,
            score=max(scores),
            threshold=self.threshold,
            p_value=0.5,
            false_alarm_rate=0.05,
            calibrated_on=self.calibrated_on,
            n_calibration=len(self.null_scores),
            step=profiles[-1].step,
            first_alarm_step=alarms[0] if alarms else None,
            reason=f"a score of {max(scores)} in {len(profiles)} reading(s).",
        )


def detector_for(threshold: float, *, axis: tuple[float, float] = (1.0, 0.0)) -> Any:
    """Alarms when the drift along `axis` (by default: the first number) reaches the threshold."""
    return AlongAxis(axis, threshold)


def rows(n: int = 64, length: int = 12) -> list[dict[str, Any]]:
    """Random token sequences to train on."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(8, 60, (n, length), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.clone()} for row in ids]


def arguments(output: Path, **changes: Any) -> TrainingArguments:
    """Six steps on the CPU, without reports or checkpoints unless asked for."""
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(**(settings | changes))


def trainer(
    output: Path,
    *callbacks: Any,
    model: Any = None,
    tokenizer: Any = None,
    eval_dataset: Any = None,
    **changes: Any,
) -> Trainer:
    """A trainer on random rows."""
    return Trainer(
        model=fresh_model() if model is None else model,
        args=arguments(output, **changes),
        train_dataset=rows(),
        eval_dataset=eval_dataset,
        processing_class=make_tokenizer() if tokenizer is None else tokenizer,
        callbacks=list(callbacks),
    )


def weights(model: Any) -> dict[str, torch.Tensor]:
    """A copy of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def projections_by_hand(model: Any, tokenizer: Any, basis: TraitBasis) -> np.ndarray:
    """What a reading must hold, (prompts, 2): the library's own hidden states, one prompt at a time."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    rows = []
    for prompt in PROMPTS.prompts:
        turns = [{"role": "user", "content": prompt.text}]
        if prompt.system:
            turns.insert(0, {"role": "system", "content": prompt.system})
        found = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            states = model(**found, output_hidden_states=True).hidden_states
        # Entry 0 is the embedding, so entry k + 1 is the output of block k.
        rows.append(states[LAYER + 1][0, -1].float().numpy() @ basis.directions.T)
    for module, flag in flags:
        module.training = flag
    return np.stack(rows)
