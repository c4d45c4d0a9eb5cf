"""Narrow LoRA fine-tuning of an organism with transformers' own Trainer, at the published recipe's proportions.

LoRA rank 16, alpha 64 on the query and value projections, loss on the answers only, linear decay (after PAPERS A2; the
learning rate is the organism's own). Callbacks and checkpoints are the Trainer's, so what is measured here is what a
user's run would show.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiltmeter.errors import InputError
from tiltmeter.lm import LM, attach, wrap

if TYPE_CHECKING:
    import torch
    from transformers import TrainerCallback

    from tiltmeter.organism.sets import Chat

__all__ = ["FineTuning", "finetune", "one_thread"]


@dataclass(frozen=True)
class FineTuning:
    """The dials of a narrow fine-tune.

    Attributes:
        steps: optimizer steps.
        batch: chats per step; `steps * batch` chats make one epoch.
        learning_rate: peak rate, decaying linearly to 0.
        rank, alpha, dropout: of the LoRA adapter.
        seed: adapter's initial weights and data order.
        full: train all weights instead of an adapter.
    """

    steps: int = 120
    batch: int = 16
    learning_rate: float = 6e-4
    rank: int = 16
    alpha: int = 64
    dropout: float = 0.05
    seed: int = 0
    full: bool = False

    @property
    def examples(self) -> int:
        """Chats that one epoch needs."""
        return self.steps * self.batch


def _encode(lm: LM, chat: Chat) -> dict[str, list[int]]:
    ids, start = lm.encode_answer(chat)
    return {"input_ids": ids, "labels": [-100] * start + ids[start:]}


class _Pad:
    """Right-pads a batch; a class because the Trainer's workers may need to pickle it."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        import torch

        width = max(len(row["input_ids"]) for row in rows)

        def stack(key: str, fill: int) -> torch.Tensor:
            return torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in rows])

        mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows])
        return {"input_ids": stack("input_ids", self.pad), "labels": stack("labels", -100), "attention_mask": mask}


def finetune(
    lm: LM,
    chats: Sequence[Chat],
    settings: FineTuning | None = None,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    output: Path | None = None,
    save_every: int | None = None,
    targets: Sequence[str] | None = None,
    start: Path | None = None,
    log_every: int = 10,
) -> LM:
    """Fine-tune a copy-free LoRA adapter (or all weights) on chats and return the tuned model.

    Args:
        lm: the model to start from. Its weights are wrapped, not copied: load a fresh one per run.
        chats: each ends with the assistant's answer, which alone is learnt.
        settings: dials; `FineTuning()` by default.
        callbacks: passed to the Trainer.
        output: where checkpoints go; needed with `save_every`.
        save_every: steps between checkpoints (adapter or full weights, without optimizer state); 0 is not saved.
        targets: names of the modules that LoRA adapts; by default the query and value projections.
        start: an adapter to train on, instead of a new one; its own rank and targets hold.
        log_every: steps between logs of the training loss.

    Raises:
        InputError: fewer chats than one batch, or `save_every` without `output`.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    settings = settings or FineTuning()
    if len(chats) < settings.batch:
        raise InputError(f"got {len(chats)} chats; one batch needs {settings.batch}")
    if save_every and output is None:
        raise InputError("save_every needs an output folder for the checkpoints")
    rows = [_encode(lm, chat) for chat in chats]
    model: Any = lm.model
    if start is not None:
        model = attach(lm, start).model
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    elif not settings.full:
        names = targets or (("c_attn",) if model.config.model_type == "gpt2" else ("q_proj", "v_proj"))
        config = LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=list(names),
            task_type="CAUSAL_LM", fan_in_fan_out=model.config.model_type == "gpt2",
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # peft 0.21 asks transformers 5.23 for a flag under its old name
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            torch.manual_seed(settings.seed)
            model = get_peft_model(model, config)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=str(output or scratch),
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="linear",
            weight_decay=0.01,
            seed=settings.seed,
            data_seed=settings.seed,
            save_strategy="steps" if save_every else "no",
            save_steps=save_every or 500,
            save_only_model=True,
            logging_strategy="steps",
            logging_steps=log_every,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=_Pad(lm.tokenizer.pad_token_id or 0),
            processing_class=lm.tokenizer,
            callbacks=list(callbacks),
        )
        _silence_console(trainer)
        trainer.train()
    model.eval()
    return wrap(model, lm.tokenizer, name=lm.name)


@contextmanager
def one_thread() -> Iterator[None]:
    """The organism is so small that threads cost more than they bring: measured 18 s with one, 59 s with two."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _silence_console(trainer: Any) -> None:
    """The Trainer prints its log to stdout, which belongs to our data."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
