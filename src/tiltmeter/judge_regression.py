"""A regression head on any causal language model, trained with LoRA: the heavy backbone of a distilled judge.

The model reads question and answer in its own chat template; a linear head on the last token's final hidden state gives
the drift in percent. Settings follow S. Burns 2026 (LoRA rank 16, alpha 32 on all linear layers, MSE, 3 epochs, cosine
decay with a little warmup). The result is a folder that `RegressionEncoder` reads: an encoder with ONE feature, so that
intervals, thresholds, verdicts and diagnosis are those of every distilled judge.

    >>> train_regression("Qwen/Qwen2.5-0.5B-Instruct", examples, Path("head"))
    >>> judge = fit_judge(examples, RegressionEncoder.open(Path("head")), calibration=others)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tiltmeter import sound
from tiltmeter.artifacts import made, read_artifact, write_artifact
from tiltmeter.errors import InputError, NumericalError
from tiltmeter.judge_examples import Example, Pair

if TYPE_CHECKING:
    import torch

    from tiltmeter.lm import LM

__all__ = ["Regression", "RegressionEncoder", "train_regression"]

_HEAD = "head.safetensors"
_FORMAT = 2
_BATCH = 32


@dataclass(frozen=True)
class Regression:
    """Dials of the training.

    Attributes:
        epochs: passes over the examples.
        batch: examples per step.
        learning_rate: peak; cosine to 0 after the warmup.
        warmup: share of the steps.
        rank, alpha, dropout: of the adapter.
        longest: tokens; longer exchanges lose their beginning.
        seed: of the adapter, the head and the order.
    """

    epochs: int = 3
    batch: int = 16
    learning_rate: float = 2e-4
    warmup: float = 0.03
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    longest: int = 512
    seed: int = 0


def train_regression(
    source: str,
    examples: Sequence[Example],
    out: Path,
    *,
    settings: Regression | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Path:
    """Train adapter and head, and write both to a folder.

    Args:
        source: the base model, as `load` takes it.
        examples: as for `fit_judge`.
        out: folder.
        settings: dials.
        progress: called as (step, steps, loss).

    Raises:
        InputError: no examples.
        NumericalError: the loss is no longer a number.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    from tiltmeter.lm import load, wrap

    dials = settings or Regression()
    if not examples:
        raise InputError("no examples were given; a regression head needs some")
    lm = load(source)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a flag under its old name
        torch.manual_seed(dials.seed)
        config = LoraConfig(
            r=dials.rank, lora_alpha=dials.alpha, lora_dropout=dials.dropout, target_modules="all-linear",
            task_type="CAUSAL_LM",
        )  # fmt: skip
        model: Any = get_peft_model(lm.model, config)
        head = torch.nn.Linear(lm.hidden_size, 1).to(lm.device)
        reader = wrap(model, lm.tokenizer, name=source)
        ids = _encode(reader, [(e.question, e.answer) for e in examples], dials.longest)
        labels = torch.tensor([e.drift_pct / 100 for e in examples], dtype=torch.float32, device=lm.device)
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.constant_(head.bias, float(labels.mean()))
        _fit(reader, head, ids, labels, dials, progress)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(out))
    arrays = {k: v.detach().float().cpu().numpy() for k, v in head.state_dict().items()}
    write_artifact(out / _HEAD, "regression", _FORMAT, {"source": source, "longest": dials.longest}, arrays)
    return out


def _fit(
    reader: LM,
    head: torch.nn.Module,
    ids: Sequence[Sequence[int]],
    labels: torch.Tensor,
    dials: Regression,
    progress: Callable[[int, int, str], None] | None,
) -> None:
    import torch

    trained = [p for p in (*reader.model.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=dials.learning_rate, weight_decay=0.0)
    steps = dials.epochs * math.ceil(len(ids) / dials.batch)
    warm = max(1, round(dials.warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, 0.5 * (1 + math.cos(math.pi * min(1.0, s / steps))))
    )
    reader.model.train()
    step = 0
    for epoch in range(dials.epochs):
        order = np.random.default_rng([dials.seed, epoch]).permutation(len(ids))
        for rows in np.array_split(order, math.ceil(len(ids) / dials.batch)):
            loss = torch.nn.functional.mse_loss(_forward(reader, head, [ids[i] for i in rows]), labels[rows])
            if not bool(torch.isfinite(loss)):
                raise NumericalError(f"the loss is not a number at step {step}; lower the learning rate")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            step += 1
            if progress is not None:
                progress(step, steps, f"loss {loss.item():.4f}")
    reader.model.eval()


def _forward(reader: LM, head: torch.nn.Module, ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """(rows,) predictions in units of full drift."""
    import torch

    return torch.as_tensor(head(_hidden(reader, ids))[:, 0])


def _hidden(reader: LM, ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """(rows, hidden) final hidden states at the last real token; padded on the right."""
    import torch

    width = max(map(len, ids))
    batch = torch.full((len(ids), width), reader.pad_id)
    mask = torch.zeros((len(ids), width), dtype=torch.long)
    for row, tokens in enumerate(ids):
        batch[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    found = reader.forward(
        batch.to(reader.device), attention_mask=mask.to(reader.device), output_hidden_states=True
    ).hidden_states[-1]
    last = mask.sum(dim=1).to(found.device) - 1
    return torch.as_tensor(found[torch.arange(len(ids), device=found.device), last].float())


def _encode(reader: LM, pairs: Sequence[Pair], longest: int) -> list[list[int]]:
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    return [ids[-longest:] for ids in reader.encode_all(turns, add_generation_prompt=False)]


@dataclass(frozen=True, eq=False)
class RegressionEncoder:
    """A trained regression head as an encoder of one feature: its own prediction, in percent.

    What was read once is remembered: the same short answers come again and again, and a study asks for them in turn.
    """

    reader: LM
    head: Any
    longest: int
    folder: Path
    _read: dict[Pair, NDArray[np.float32]] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: Path) -> RegressionEncoder:
        """Read what `train_regression` wrote.

        Raises:
            ArtifactError: the folder holds no regression head of this version.
        """
        import torch

        from tiltmeter.lm import attach, load

        remedy = "train it again with train_regression"
        header, arrays = read_artifact(Path(folder) / _HEAD, "regression", _FORMAT, remedy=remedy)

        def check() -> None:
            sound.array("weight", arrays["weight"], (1, None))
            sound.array("bias", arrays["bias"], (1,))
            sound.text("source", header["source"])
            sound.whole("longest", header["longest"], least=1)

        made(Path(folder) / _HEAD, "regression head", remedy, check)
        weights = {key: torch.from_numpy(arrays[key]) for key in ("weight", "bias")}
        reader = attach(load(header["source"]), folder)
        head = torch.nn.Linear(weights["weight"].shape[1], 1)
        head.load_state_dict(weights)
        return cls(reader, head.to(reader.device).eval(), header["longest"], Path(folder))

    @property
    def spec(self) -> str:
        """As `regression:FOLDER`."""
        return f"regression:{self.folder}"

    def encode(self, pairs: Sequence[Pair]) -> NDArray[np.float64]:
        """(pairs, 1)."""
        features, weights = self.inside(pairs)
        return 100 * (features @ weights + float(self.head.bias.detach()[0]))[:, None]

    def inside(self, pairs: Sequence[Pair]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(pairs, hidden) what the head reads, and its (hidden,) weights, for a diagnosis."""
        from tiltmeter.lm import undisturbed

        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._read]
        ids = _encode(self.reader, new, self.longest) if new else []
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        with undisturbed(self.reader):
            for rows in _chunks(order):
                found = _hidden(self.reader, [ids[i] for i in rows]).cpu().numpy()
                self._read.update(zip((new[i] for i in rows), found, strict=True))
        values = np.array([self._read[pair] for pair in pairs], dtype=np.float64)
        return values, self.head.weight.detach().double().cpu().numpy()[0]


def _chunks(order: Sequence[int]) -> Iterator[list[int]]:
    for start in range(0, len(order), _BATCH):
        yield list(order[start : start + _BATCH])
