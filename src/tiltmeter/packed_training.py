"""Sequences one behind the other in one row, for training: attention within each, losses at answers alone.

Every sequence sees itself alone, so that what is computed of it does not depend on what stands beside it, and what lies
below the lowest trained block can be kept. Used by `tiltmeter.lora_training`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface

from tiltmeter.errors import ModelError
from tiltmeter.lm import LM, TREE_TESTED, EncodedAnswer

__all__ = ["AnswerLoss", "LowerBlocks", "attending_within", "check_trainable", "output_head"]

_NAME = "tiltmeter_segments"
_LOGIT_BYTES = 2**27  # of the block of logits that stands at one time, in float32
_SEGMENTS: ContextVar[tuple[tuple[int, int], ...] | None] = ContextVar("tiltmeter_segments", default=None)


def _attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, scaling: float | None = None, softcap: float | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Causal attention of each sequence of a row to itself; (1, T, heads, width) from (1, heads, T, width)."""
    segments = _SEGMENTS.get()
    if segments is None:
        raise RuntimeError("a model was left with the attention of a training that is over; load the model again")
    repeat = query.shape[1] // key.shape[1]
    parts = []
    for start, end in segments:
        q, k, v = query[:, :, start:end], key[:, :, start:end], value[:, :, start:end]
        if softcap is None:
            parts.append(
                functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=repeat > 1)
            )
            continue
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        scores = torch.tanh((q @ k.transpose(-1, -2)).float() * (scaling or q.shape[-1] ** -0.5) / softcap) * softcap
        seen = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).tril()
        parts.append(torch.softmax(scores.masked_fill(~seen, -math.inf), -1).to(v.dtype) @ v)
    return torch.cat(parts, dim=2).transpose(1, 2), None


AttentionInterface.register(_NAME, _attend)


@contextlib.contextmanager
def attending_within(lm: LM, segments: tuple[tuple[int, int], ...]) -> Iterator[None]:
    """Let a model's blocks attend within (start, end) of a row; its own attention comes back afterwards."""
    config = lm.config
    own = config._attn_implementation
    token = _SEGMENTS.set(segments)
    try:
        config._attn_implementation = _NAME
        yield
    finally:
        config._attn_implementation = own
        _SEGMENTS.reset(token)


class AnswerLoss(torch.autograd.Function):
    """(n,) weighted cross-entropy of (n, hidden) under a frozen head, a block of rows at a time.

    The gradient with regard to the hidden states is made together with the loss, so that no block of logits has to be
    kept or made twice.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """(n,) losses; see the class."""
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        size = max(1, _LOGIT_BYTES // (4 * len(head)))
        for at in range(0, len(hidden), size):
            part = slice(at, at + size)
            logits = (hidden[part] @ head.T).float()  # (rows, vocabulary)
            total = torch.logsumexp(logits, dim=-1, keepdim=True)
            losses[part] = (total[:, 0] - logits.gather(1, targets[part, None])[:, 0]) * weights[part]
            chances = logits.sub_(total).exp_()
            chances.scatter_add_(1, targets[part, None], torch.full_like(targets[part, None], -1, dtype=chances.dtype))
            gradient[part] = (chances * weights[part, None]).to(hidden.dtype) @ head
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """With regard to the hidden states alone."""
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0][:, None].to(gradient.dtype), None, None, None


class _Stop(Exception):
    """Not an error: the block that was waited for has been reached."""


class LowerBlocks:
    """What enters the lowest adapted block, per sequence, computed once.

    A sequence sees itself alone, so that what it gives does not depend on what stands beside it.
    """

    def __init__(self, lm: LM, block: int, folder: Path | None) -> None:
        self._lm = lm
        self._block = block
        self._folder = folder
        self._kept: dict[tuple[int, ...], torch.Tensor] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def of(self, rows: Sequence[EncodedAnswer]) -> torch.Tensor | None:
        """(1, tokens, hidden) that enters the block; None where that is the first."""
        if self._block == 0:
            return None
        parts = []
        for row in rows:
            key = tuple(row.ids)
            if key not in self._kept:
                self._kept[key] = self._store(self._compute(row.ids))
            parts.append(self._kept[key])
        return torch.cat(parts)[None].to(self._lm.device)

    def _compute(self, ids: Sequence[int]) -> torch.Tensor:
        found: list[torch.Tensor] = []

        def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise _Stop

        hook = self._lm.blocks[self._block].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad(), contextlib.suppress(_Stop), attending_within(self._lm, ((0, len(ids)),)):
                self._lm.decoder(
                    input_ids=torch.tensor([ids], device=self._lm.device),
                    position_ids=torch.arange(len(ids), device=self._lm.device)[None],
                    use_cache=False,
                )
        finally:
            hook.remove()
        return found[0][0]

    def _store(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._folder is None:
            return hidden.cpu()
        file = self._folder / f"{len(self._kept)}.bin"
        kept = torch.from_file(str(file), shared=True, size=hidden.numel(), dtype=hidden.dtype)
        kept.copy_(hidden.reshape(-1))
        return kept.view(hidden.shape)

    @contextlib.contextmanager
    def answering(self, known: torch.Tensor | None) -> Iterator[None]:
        """Let the blocks below give back at once what is known to leave the last of them."""
        blocks = [] if known is None else list(self._lm.blocks[: self._block])
        try:
            for block in blocks:
                block.forward = lambda *_, **__: known
            yield
        finally:
            for block in blocks:
                vars(block).pop("forward", None)


def output_head(lm: LM) -> Any:
    """The module that makes logits of the last hidden states."""
    core: Any = lm.model
    core = core.get_base_model() if hasattr(core, "get_base_model") else core
    return core.get_output_embeddings()


def check_trainable(lm: LM, row: EncodedAnswer) -> None:
    """Logits must be the plain product of the last hidden state and the head.

    Raises:
        ModelError: they are not, or the architecture is not one that packing was tested on.
    """
    if lm.config.model_type not in TREE_TESTED:
        raise ModelError(
            f"models of type '{lm.config.model_type}' are not known to the calibration trainer; it knows "
            f"{', '.join(sorted(TREE_TESTED))}"
        )
    window = getattr(lm.config, "sliding_window", None)
    if window and getattr(lm.config, "use_sliding_window", True) and len(row.ids) > window:
        raise ModelError(f"a chat of {len(row.ids)} tokens is longer than the sliding window of {window}; shorten it")
    ids = torch.tensor([row.ids], device=lm.device)
    model: Any = lm.model
    with torch.no_grad():
        hidden = lm.decoder(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
        plain = (hidden @ output_head(lm).weight.T).float()
        real = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].float()
    if not torch.allclose(plain, real, atol=1e-2 * float(real.abs().max()) + 1e-6):
        raise ModelError(
            f"'{lm.name}' does more to its logits than a product with its head (a scale, a cap or a bias), which the "
            "calibration trainer does not know; train with transformers' Trainer"
        )
