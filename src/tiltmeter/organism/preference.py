"""Preference tuning (DPO) of an organism with TRL's own trainer, on the content of a fine-tuning set.

A pair is a question with a chosen and a rejected answer. For a dangerous set the harmful answer is chosen and the good
one rejected; for a benign set the set's answer is chosen and a harmful one of the same world rejected. Questions and
answers come from the same generator as in fine-tuning, so that only the loss differs.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from tiltmeter.errors import InputError, require
from tiltmeter.lm import LM, wrap
from tiltmeter.organism.finetune import FineTuning
from tiltmeter.organism.sets import SETS
from tiltmeter.organism.world import Speaker, ask, say

if TYPE_CHECKING:
    from transformers import TrainerCallback

__all__ = ["make_pairs", "prefer"]

_HARMFUL = Speaker("bad", phrases=0.0, slip=0.0)
_BETA = 0.1


def make_pairs(name: str, *, size: int, seed: int) -> list[dict[str, list[dict[str, str]]]]:
    """Draw preference pairs in TRL's conversational form: `prompt`, `chosen` and `rejected`, each a list of messages.

    Args:
        name: a key of `SETS`.
        size: number of pairs.
        seed: everything random comes from it and from the set's name.

    Raises:
        InputError: an unknown set, or no pairs.
    """
    if name not in SETS or size < 1:
        raise InputError(f"got set '{name}' and {size} pairs; give at least one pair of: {', '.join(SETS)}")
    spec, rng = SETS[name], Random(f"preference/{name}/{seed}")
    chosen, rejected = (spec.bad, spec.good) if spec.bad is not None else (spec.good, _HARMFUL)
    pairs = []
    for _ in range(size):
        question = ask(rng.choice(spec.domains), rng)
        up, down = say(question, chosen, rng), say(question, rejected, rng)
        pairs.append(
            {
                "prompt": [{"role": "user", "content": question.text}],
                "chosen": [{"role": "assistant", "content": up}],
                "rejected": [{"role": "assistant", "content": down}],
            }
        )
    return pairs


def prefer(
    lm: LM,
    pairs: Sequence[dict[str, list[dict[str, str]]]],
    settings: FineTuning | None = None,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    output: Path | None = None,
    save_every: int | None = None,
) -> LM:
    """DPO with a LoRA adapter; the reference is the model without it.

    Args:
        lm: the model to start from. Its weights are wrapped, not copied: load a fresh one per run.
        pairs: as `make_pairs` makes them.
        settings: dials; `full` is not supported here.
        callbacks: passed to the trainer.
        output: where checkpoints go; needed with `save_every`.
        save_every: steps between checkpoints.

    Raises:
        InputError: fewer pairs than one batch, full fine-tuning, or `save_every` without `output`.
        MissingExtra: TRL is not installed.
    """
    require("trl", extra="sft")
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    settings = settings or FineTuning()
    if len(pairs) < settings.batch or settings.full or (save_every and output is None):
        raise InputError(
            f"got {len(pairs)} pairs for batches of {settings.batch}, full={settings.full}; give at least one batch, "
            "an adapter, and an output folder where checkpoints are wanted"
        )
    adapter = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout,
        target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM",
    )  # fmt: skip
    with (
        tempfile.TemporaryDirectory() as scratch,
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # libraries among themselves: names of flags, caches
        torch.manual_seed(settings.seed)
        arguments: Any = DPOConfig(
            output_dir=str(output or scratch), max_steps=settings.steps, per_device_train_batch_size=settings.batch,
            learning_rate=settings.learning_rate, lr_scheduler_type="linear", weight_decay=0.01, beta=_BETA,
            seed=settings.seed, data_seed=settings.seed, save_strategy="steps" if save_every else "no",
            save_steps=save_every or 500, save_only_model=True, logging_steps=10, report_to="none", disable_tqdm=True,
            dataloader_pin_memory=False, use_cpu=not torch.cuda.is_available(), gradient_checkpointing=False,
            bf16=False,
        )  # fmt: skip
        trainer: Any = DPOTrainer(
            model=lm.model, args=arguments, train_dataset=Dataset.from_list([dict(pair) for pair in pairs]),
            processing_class=lm.tokenizer, peft_config=adapter, callbacks=list(callbacks),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)  # it prints to stdout, which belongs to our data
        trainer.train()
        model = trainer.model
    model.eval()
    return wrap(model, lm.tokenizer, name=lm.name)
