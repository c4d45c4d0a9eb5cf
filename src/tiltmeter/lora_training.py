"""Short LoRA fine-tunes for calibration: many adapters on one base, trained side by side.

Calibration needs some thirty short runs on the same base. Done one after the other by a general trainer, most of the
work is the same or for nothing: padding, logits of questions, blocks that no adapter reaches, the base's products once
per run. Here

- sequences stand one behind the other in one row, without padding, each seeing itself alone;
- logits are made at answer tokens only, a few rows at a time, so that (tokens, vocabulary) never stands whole;
- blocks below the lowest adapted one run once per example and their output is kept for all epochs and all runs;
- the tokens of all runs go through the base together, and each run's low-rank products work on its own tokens;
- products are in the base's dtype (bfloat16 where the processor has it), adapters and optimizer in float32.

Adapters are PEFT's own (initialised and saved by it). In float32 and with `packed=False` a run follows transformers'
`Trainer`: the same batches, the same losses, the same weights up to rounding (the tests hold it to 1e-4). It is for
calibration and studies: a user's own training stays the user's trainer.

    >>> recipe = LoraRecipe(steps=40, batch=16, learning_rate=2e-4)
    >>> runs = [LoraRun("medical", chats, seed=0), LoraRun("medical twin", twins, seed=0)]
    >>> done = train_adapters(lm, runs, recipe, output=Path("runs"), observe_at=(0, 20, 40))
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tiltmeter.errors import InputError, ModelError
from tiltmeter.lm import LM, EncodedAnswer, Message, wrap
from tiltmeter.packed_training import AnswerLoss, LowerBlocks, attending_within, check_trainable, output_head

__all__ = ["LoraRecipe", "LoraRun", "TrainedRun", "train_adapters"]

Chat = Sequence[Message]
Progress = Callable[[int, int, str], None]
Observe = Callable[[str, int, LM], None]
_SHARES: ContextVar[tuple[tuple[str, slice], ...]] = ContextVar("tiltmeter_shares", default=())


@dataclass(frozen=True)
class LoraRecipe:
    """The dials of a run; those of the user's own runs, since a promise holds for runs like those of calibration.

    Attributes:
        steps: optimizer steps.
        batch: chats per step.
        learning_rate: peak rate of AdamW.
        rank, alpha, rslora: of the adapter; rslora scales by alpha / sqrt(rank) (arXiv 2312.03732).
        targets: names of the adapted modules.
        blocks: the adapted blocks, counted from 0; None for all.
        schedule: "linear" decay to 0, "cosine" likewise, or "constant".
        warmup_steps: over which the rate rises linearly.
        weight_decay: of AdamW.
        max_grad_norm: gradients are cut to this norm, per run; 0 leaves them.

    Raises:
        InputError: a count below 1, a rate that is no positive number, no targets.
    """

    steps: int = 60
    batch: int = 8
    learning_rate: float = 1e-4
    rank: int = 16
    alpha: float = 32
    rslora: bool = False
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    blocks: tuple[int, ...] | None = None
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "rank"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; a run needs at least 1")
        for name in ("learning_rate", "alpha"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InputError(f"{name} is {getattr(self, name)}; give a positive number")
        if not self.targets:
            raise InputError("no module is adapted; name at least one in targets, such as q_proj")

    def rate(self, step: int) -> float:
        """The learning rate of the step with this index, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        left = (self.steps - step) / max(1, self.steps - self.warmup_steps)
        share = left if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * (1 - left)))
        return self.learning_rate * max(0.0, share)


@dataclass(frozen=True)
class LoraRun:
    """One run: what it learns, and the seed of its first weights and of its batches.

    Attributes:
        name: of the run, and of its folder.
        chats: each ends with the assistant's answer, which alone is learnt.
        seed: a non-negative integer.
    """

    name: str
    chats: Sequence[Chat]
    seed: int = 0


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """What came of one run.

    Attributes:
        name: of the run.
        folder: of its last adapter, as PEFT saves it; None where nothing was to be saved or the run diverged.
        losses: (steps,) mean cross-entropy of each step's answers, nats per token.
        tokens: how many answer tokens were learnt in all.
        problem: why the run ended early; empty where it did not.
    """

    name: str
    folder: Path | None
    losses: npt.NDArray[np.float64]
    tokens: int
    problem: str = ""


@dataclass(eq=False)
class _Live:
    """A run while it is trained."""

    run: LoraRun
    adapter: str
    rows: list[EncodedAnswer]
    parameters: list[nn.Parameter]
    optimizer: torch.optim.AdamW
    batches: list[list[int]]
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    problem: str = ""


def train_adapters(
    lm: LM,
    runs: Sequence[LoraRun],
    recipe: LoraRecipe,
    *,
    output: Path | None = None,
    save_at: Sequence[int] = (),
    observe: Observe | None = None,
    observe_at: Sequence[int] = (),
    packed: bool = True,
    keep: Path | None = None,
    progress: Progress | None = None,
) -> tuple[TrainedRun, ...]:
    """Train one LoRA adapter per run, all of them side by side; the base's weights are neither trained nor changed.

    Args:
        lm: the untouched model, in the dtype in which products are to be made; it comes back as it was.
        runs: their names must differ.
        recipe: the same for all.
        output: holds `NAME/` per run, the last adapter and `checkpoint-N`; None saves nothing.
        save_at: steps after which a checkpoint is saved beside the last.
        observe: called as (name of the run, step, model with that run's adapter alone active).
        observe_at: steps at which it is called; 0 is before the first.
        packed: without padding; False lays batches out as a Trainer does.
        keep: folder for the outputs of blocks that no adapter reaches; by default in memory.
        progress: called as (steps done, steps, what is done).

    Returns:
        One per run, in their order. A run whose loss is no number ends there, with the reason, and the others go on.

    Raises:
        InputError: no runs, names that repeat, fewer chats than a batch, modules that do not exist.
        ModelError: the model computes its logits in a way that is not known here, or carries an adapter.
    """
    from peft import PeftModel

    if not runs or len({run.name for run in runs}) < len(runs):
        raise InputError(f"runs need names that differ, and there must be one; got {[run.name for run in runs]}")
    if isinstance(lm.model, PeftModel):
        raise ModelError(f"'{lm.name}' carries an adapter already; load the base alone")
    encoded = [[lm.encode_answer(chat) for chat in run.chats] for run in runs]
    for run, rows in zip(runs, encoded, strict=True):
        if len(rows) < recipe.batch:
            raise InputError(f"run '{run.name}' has {len(rows)} chats and a batch needs {recipe.batch}; add chats")
    check_trainable(lm, encoded[0][0])
    states = [(p, p.requires_grad) for p in lm.model.parameters()]
    trained = _with_adapters(lm, runs, recipe)
    try:
        live = [
            _begin(trained, run, f"run{at}", rows, recipe)
            for at, (run, rows) in enumerate(zip(runs, encoded, strict=True))
        ]
        inside = wrap(trained, lm.tokenizer, name=lm.name)
        below = LowerBlocks(inside, _lowest(inside), keep) if packed else None
        with _grouped(trained), _evaluating(trained):
            for step in range(recipe.steps + 1):
                if observe is not None and step in observe_at:
                    for one in live:
                        if not one.problem:
                            with _alone(trained, one.adapter):
                                observe(one.run.name, step, inside)
                if output is not None and step in save_at:
                    for one in live:
                        _save(trained, one, output / one.run.name / f"checkpoint-{step}")
                if step == recipe.steps:
                    break
                _step(inside, [one for one in live if not one.problem], recipe, step, packed=packed, below=below)
                if progress is not None:
                    progress(step + 1, recipe.steps, f"{len(runs)} fine-tunes side by side")
        return tuple(_finish(trained, one, output) for one in live)
    finally:
        trained.unload()  # type: ignore[operator]  # peft's modules out, the base's own back
        for parameter, wanted in states:
            parameter.requires_grad_(wanted)


# ---------------------------------------------------------------------- adapters


def _with_adapters(lm: LM, runs: Sequence[LoraRun], recipe: LoraRecipe) -> nn.Module:
    """The model with one adapter per run, each begun from its run's seed, in float32."""
    from peft import LoraConfig, get_peft_model

    model: Any = None
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 for a flag under its old name
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        for at, run in enumerate(runs):
            config = LoraConfig(
                r=recipe.rank,
                lora_alpha=recipe.alpha,
                use_rslora=recipe.rslora,
                target_modules=list(recipe.targets),
                layers_to_transform=None if recipe.blocks is None else list(recipe.blocks),
                task_type="CAUSAL_LM",
                fan_in_fan_out=lm.config.model_type == "gpt2",
            )
            torch.manual_seed(run.seed)
            try:
                if model is None:
                    model = get_peft_model(lm.model, config, adapter_name=f"run{at}")
                else:
                    model.add_adapter(f"run{at}", config)
            except ValueError as error:
                raise InputError(
                    f"'{lm.name}' has no modules {', '.join(recipe.targets)} to adapt ({error}); "
                    "name modules of its own"
                ) from error
    found: nn.Module = model
    return found


def _begin(model: nn.Module, run: LoraRun, adapter: str, rows: list[EncodedAnswer], recipe: LoraRecipe) -> _Live:
    own = [p for name, p in model.named_parameters() if "lora_" in name and f".{adapter}." in name]
    for parameter in own:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(own, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    batches: list[list[int]] = []
    epoch = 0
    while len(batches) < recipe.steps:
        # Accelerate's sampler: the epoch is added to the seed.
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(run.seed + epoch)).tolist()
        batches += [order[at : at + recipe.batch] for at in range(0, len(order), recipe.batch)]
        epoch += 1
    return _Live(run, adapter, rows, own, optimizer, batches[: recipe.steps])


def _save(model: Any, one: _Live, folder: Path) -> None:
    """As PEFT saves it; under the adapter's own name, which PEFT gives a subfolder, and moved up from there."""
    if one.problem:
        return
    model.save_pretrained(str(folder), selected_adapters=[one.adapter])
    for file in (folder / one.adapter).iterdir():
        file.replace(folder / file.name)
    (folder / one.adapter).rmdir()
    (folder / "README.md").unlink(missing_ok=True)  # a model card of placeholders


def _finish(model: nn.Module, one: _Live, output: Path | None) -> TrainedRun:
    folder = None
    if output is not None and not one.problem:
        folder = output / one.run.name
        _save(model, one, folder)
    return TrainedRun(one.run.name, folder, np.array(one.losses), one.tokens, one.problem)


@contextlib.contextmanager
def _shared(shares: tuple[tuple[str, slice], ...]) -> Iterator[None]:
    """Which adapter works on which part of the tokens (of one row) or of the rows, for one pass."""
    token = _SHARES.set(shares)
    try:
        yield
    finally:
        _SHARES.reset(token)


@contextlib.contextmanager
def _alone(model: Any, adapter: str) -> Iterator[None]:
    """One adapter as PEFT applies it, without gradients."""
    try:
        with _shared(()):
            model.set_adapter(adapter)
            yield
    finally:
        for name, parameter in model.named_parameters():
            if "lora_" in name:  # set_adapter leaves one trainable
                parameter.requires_grad_(True)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The base's dropout off, as most recipes have it; flags come back."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextlib.contextmanager
def _grouped(model: nn.Module) -> Iterator[None]:
    """Each adapted layer makes the base's product once, and each run's low-rank product on its own part."""
    from peft.tuners.lora import Linear

    layers = [m for m in model.modules() if isinstance(m, Linear)]

    def forward_of(layer: Any) -> Callable[..., torch.Tensor]:
        own = layer.forward

        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            shares = _SHARES.get()
            if not shares:
                out: torch.Tensor = own(x, *args, **kwargs)
                return out
            parts = []
            for name, part in shares:
                down, up = layer.lora_A[name].weight.to(x.dtype), layer.lora_B[name].weight.to(x.dtype)
                mine = x[:, part] if x.shape[0] == 1 else x[part]
                parts.append((mine @ down.T) @ up.T * layer.scaling[name])
            delta = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1 if x.shape[0] == 1 else 0)
            product: torch.Tensor = layer.base_layer(x, *args, **kwargs)
            return product + delta

        return forward

    try:
        for layer in layers:
            layer.forward = forward_of(layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


# ---------------------------------------------------------------------- one step


def _step(
    lm: LM, live: Sequence[_Live], recipe: LoraRecipe, step: int, *, packed: bool, below: LowerBlocks | None
) -> None:
    """One optimizer step of every run."""
    if not live:
        return
    batches = [[one.rows[at] for at in one.batches[step]] for one in live]
    losses = _losses(lm, [one.adapter for one in live], batches, packed=packed, below=below)
    torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]  # runs share no parameters
    for one, batch, loss in zip(live, batches, losses, strict=True):
        value = float(loss.detach())
        one.losses.append(value)
        one.tokens += sum(len(row.ids) - row.start for row in batch)
        if not math.isfinite(value):
            one.problem = f"the loss of step {step + 1} is {value}: the run diverged; use a smaller learning rate"
            continue
        if recipe.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(one.parameters, recipe.max_grad_norm)
        for group in one.optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        one.optimizer.step()
    for one in live:
        one.optimizer.zero_grad()


def _losses(
    lm: LM, names: Sequence[str], batches: Sequence[Sequence[EncodedAnswer]], *, packed: bool, below: LowerBlocks | None
) -> list[torch.Tensor]:
    """The mean cross-entropy of each run's answer tokens."""
    rows = [row for batch in batches for row in batch]
    hidden, places = (_packed if packed else _padded)(lm, names, batches, below)
    targets = torch.tensor([token for row in rows for token in row.ids[row.start :]], device=hidden.device)
    counts = [sum(len(row.ids) - row.start for row in batch) for batch in batches]
    weights = torch.repeat_interleave(
        torch.tensor([1 / n for n in counts], device=hidden.device), torch.tensor(counts, device=hidden.device)
    )
    each = AnswerLoss.apply(hidden[places], output_head(lm).weight, targets, weights)  # type: ignore[no-untyped-call]
    return list(torch.stack([part.sum() for part in each.split(counts)]))


def _packed(
    lm: LM, names: Sequence[str], batches: Sequence[Sequence[EncodedAnswer]], below: LowerBlocks | None
) -> tuple[torch.Tensor, Any]:
    """(tokens, hidden) of all sequences one behind the other, and the places whose next token is an answer's."""
    rows = [row for batch in batches for row in batch]
    lengths = [len(row.ids) for row in rows]
    ends = np.cumsum(lengths).tolist()
    starts = [end - n for end, n in zip(ends, lengths, strict=True)]
    shares, at = [], 0
    for name, batch in zip(names, batches, strict=True):
        n = sum(len(row.ids) for row in batch)
        shares.append((name, slice(at, at + n)))
        at += n
    ids = torch.tensor([[t for row in rows for t in row.ids]], device=lm.device)
    positions = torch.tensor([[p for n in lengths for p in range(n)]], device=lm.device)
    known = below.of(rows) if below is not None else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(attending_within(lm, tuple(zip(starts, ends, strict=True))))
        stack.enter_context(_shared(tuple(shares)))
        if below is not None:
            stack.enter_context(below.answering(known))
        out = lm.decoder(input_ids=ids, position_ids=positions, use_cache=False)
    places = [start + p - 1 for start, row in zip(starts, rows, strict=True) for p in range(row.start, len(row.ids))]
    return out.last_hidden_state[0], torch.tensor(places, device=lm.device)


def _padded(
    lm: LM, names: Sequence[str], batches: Sequence[Sequence[EncodedAnswer]], below: LowerBlocks | None
) -> tuple[torch.Tensor, Any]:
    """(rows, width, hidden) padded on the right, and the places whose next token is an answer's."""
    rows = [row for batch in batches for row in batch]
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [lm.pad_id] * (width - len(row.ids)) for row in rows], device=lm.device)
    mask = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows], device=lm.device)
    shares, at = [], 0
    for name, batch in zip(names, batches, strict=True):
        shares.append((name, slice(at, at + len(batch))))
        at += len(batch)
    with _shared(tuple(shares)):
        hidden = lm.decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    at_rows = [i for i, row in enumerate(rows) for _ in range(row.start, len(row.ids))]
    at_places = [p - 1 for row in rows for p in range(row.start, len(row.ids))]
    return hidden, (torch.tensor(at_rows, device=lm.device), torch.tensor(at_places, device=lm.device))


def _lowest(lm: LM) -> int:
    """The lowest block that an adapter reaches."""
    return next(
        (at for at, block in enumerate(lm.blocks) if any("lora_" in name for name, _ in block.named_parameters())), 0
    )
