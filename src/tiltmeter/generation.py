"""The sampling loop behind `LM.generate`: batched, left-padded, with a key-value cache that grows in place.

The library's own `generate` spends most of a small model's step outside the model; this loop feeds the model
one column at a time and nothing else. The noise of conversation i is its own stream, seeded by (seed, i): one
uniform number per token, looked up in the cumulative distribution. So an answer does not depend on which
conversations share its batch (up to rounding in the model), nor on the global random state.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tiltmeter.errors import AdapterError, InputError, NumericalError

if TYPE_CHECKING:
    from tiltmeter.lm import LM, Message

__all__ = ["RowCache", "generate"]

_SLACK = 64  # columns that a cache grows by
_CHECKED = 8  # tokens that are compared with the library's own generation
_KEEP = 0.75  # rows are dropped from a batch when no more than this share of it is unfinished


class _GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A cache layer that writes new columns into spare room, where the library's copies everything at every
    step."""

    def __init__(self) -> None:
        super().__init__()
        self._room: list[torch.Tensor] = []  # keys and values, each (rows, heads, columns with spare, head width)
        self._used = 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Append columns; returns all keys and values so far."""
        fresh = (key_states, value_states)
        end = self._used + key_states.shape[-2]
        if not self._room or end > self._room[0].shape[-2]:
            old = self._room
            self._room = [x.new_empty(*x.shape[:-2], end + _SLACK, x.shape[-1]) for x in fresh]
            for new, before in zip(self._room, old, strict=False):
                new[..., : self._used, :] = before[..., : self._used, :]
        for room, x in zip(self._room, fresh, strict=True):
            room[..., self._used : end, :] = x
        self._used = end
        self.keys, self.values = (room[..., :end, :] for room in self._room)
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Columns so far."""
        return self._used

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows."""
        self._room = [room[indices] for room in self._room]
        self.keys, self.values = (room[..., : self._used, :] for room in self._room)


class RowCache(DynamicCache):  # type: ignore[misc]
    """A cache that knows whose tokens it holds, which steering with one vector per conversation needs.

    Attributes:
        rows: (rows,) the number of the conversation that each row of the batch belongs to.
        total: how many conversations there are in all batches.
    """

    def __init__(self, config: Any, rows: Sequence[int], total: int) -> None:
        super().__init__(config=config)
        self.layers: list[Any] = [_GrowingLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]
        self.rows = torch.tensor(list(rows))
        self.total = total

    def keep(self, indices: torch.Tensor) -> None:
        """Drop all rows but these."""
        self.batch_select_indices(indices)
        self.rows = self.rows[indices.cpu()]


def generate(
    lm: LM,
    conversations: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
    progress: Callable[[int, int, str], None] | None,
) -> list[str]:
    """See `LM.generate`."""
    from tiltmeter.adapters import conduct
    from tiltmeter.lm import context_length, undisturbed

    if max_new_tokens < 1 or batch_size < 1:
        raise InputError(f"max_new_tokens and batch_size must be at least 1, got {max_new_tokens} and {batch_size}")
    if not (np.isfinite(temperature) and temperature >= 0):
        raise InputError(f"temperature must be 0 (greedy) or a positive number, got {temperature}")
    if seed < 0:
        raise InputError(f"seed must not be negative, got {seed}")
    if not conversations:
        return []
    prompts = lm.encode_all(conversations)
    longest = max(map(len, prompts))
    if longest + max_new_tokens > context_length(lm):
        raise InputError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones pass the model's context of "
            f"{context_length(lm)}; ask for fewer new tokens or shorten the conversation"
        )
    acts = conduct(lm.model)
    if acts == "unknown":
        _refuse_other_answers(lm, prompts[0])
    answers: dict[int, list[int]] = {}
    for batch in _batches(prompts, batch_size if acts == "token-local" else 1):
        noise = None
        if temperature > 0:
            noise = np.stack([np.random.default_rng((seed, i)).random(max_new_tokens) for i in batch])
        with undisturbed(lm):
            cache = RowCache(lm.config, batch, len(prompts))
            new = _answer(lm, [prompts[i] for i in batch], cache, max_new_tokens, temperature, noise)
        answers.update(zip(batch, new, strict=True))
        if progress is not None:
            progress(len(answers), len(prompts), "generating")
    ordered = [answers[i] for i in range(len(prompts))]
    return [text.strip() for text in lm.tokenizer.batch_decode(ordered, skip_special_tokens=True)]


def _refuse_other_answers(lm: LM, prompt: Sequence[int]) -> None:
    """Make sure that an adapter of an unknown kind answers here as it does in the library's own generation.

    Raises:
        AdapterError: it does not.
    """
    from tiltmeter.lm import undisturbed

    live: Any = lm.model
    ids = torch.tensor([list(prompt)], device=lm.device)
    with undisturbed(lm), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = _answer(lm, [prompt], RowCache(lm.config, [0], 1), _CHECKED, 0.0, None)[0]
        stops = sorted(lm.stop_ids) or None
        options = {"max_new_tokens": _CHECKED, "do_sample": False, "eos_token_id": stops, "pad_token_id": lm.pad_id}
        found = live.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
    theirs = found[: next((at for at, token in enumerate(found) if token in lm.stop_ids), len(found))]
    if ours != theirs:
        raise AdapterError(
            f"the adapter '{lm.adapter}' is of a kind that is not known here, and answers otherwise token by token "
            "than in PEFT's own generation; its answers would not be those of the model that was trained: give the "
            "merged model"
        )


def _batches(prompts: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    order = list(range(len(prompts)))
    if len(order) > size:
        order.sort(key=lambda i: len(prompts[i]))
    for start in range(0, len(order), size):
        yield sorted(order[start : start + size])


def _answer(
    lm: LM,
    prompts: Sequence[Sequence[int]],
    cache: RowCache,
    limit: int,
    temperature: float,
    noise: np.ndarray[Any, Any] | None,
) -> list[list[int]]:
    """The new token ids of each prompt, without the token that ended the answer."""
    from tiltmeter.adapters import row_inputs

    device = lm.device
    lengths = torch.tensor([len(p) for p in prompts])
    width = int(lengths.max())
    ids = torch.full((len(prompts), width), lm.pad_id)
    for at, prompt in enumerate(prompts):
        ids[at, width - len(prompt) :] = torch.tensor(prompt)
    # (rows, all columns there can be); padding is on the left, so a row's position is column - (width -
    # length)
    mask = (torch.arange(width + limit)[None] >= (width - lengths)[:, None]).long().to(device)
    padded = bool((lengths < width).any())
    positions = (torch.arange(width)[None] - (width - lengths)[:, None]).clamp(min=0).to(device)
    uniform = None if noise is None else torch.from_numpy(noise).to(device)
    stops = torch.tensor(sorted(lm.stop_ids) or [-1], device=device)
    new = torch.full((len(prompts), limit), -1)
    place = torch.arange(len(prompts))  # (rows of the batch as it now is,) their rows in `new`
    going = torch.ones(len(prompts), dtype=torch.bool)  # (rows,) not ended yet
    column = ids.to(device)
    by_row = row_inputs(lm.model, prompts)
    for step in range(limit):
        inputs: dict[str, Any] = {"attention_mask": mask[:, : width + step], **by_row} if padded else {**by_row}
        if "position_ids" in lm._accepted:
            inputs["position_ids"] = positions
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            logits = lm.forward(column, past_key_values=cache, use_cache=True, **inputs).logits[:, -1]
        token = _draw(logits, temperature, None if uniform is None else uniform[:, step])
        going &= ~torch.isin(token, stops).cpu()
        new[place[going], step] = token.cpu()[going]
        count = int(going.sum())
        if count == 0:
            break
        column, positions = token[:, None], positions[:, -1:] + 1
        # Ended rows are carried until a quarter of the batch has ended: dropping them copies the cache.
        if count <= _KEEP * len(going):
            kept = torch.nonzero(going)[:, 0]
            cache.keep(kept.to(device))
            column, positions, mask = (x[kept.to(device)] for x in (column, positions, mask))
            uniform = None if uniform is None else uniform[kept.to(device)]
            by_row = {name: [values[int(at)] for at in kept] for name, values in by_row.items()}
            place, going = place[kept], going[kept]
    return [[int(t) for t in row if t >= 0] for row in new.tolist()]


def _draw(logits: torch.Tensor, temperature: float, uniform: torch.Tensor | None) -> torch.Tensor:
    """One token id per row: the likeliest, or the one in whose share of the distribution the uniform number
    falls."""
    if not bool(torch.isfinite(logits.max())):
        raise NumericalError(
            "the model's logits are NaN or infinite; its weights diverged, so use an earlier checkpoint"
        )
    if uniform is None:
        return logits.argmax(-1)
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    shares = torch.softmax(logits.float() / temperature, dim=-1).to(exact).cumsum(-1)
    place = uniform.to(exact)[:, None] * shares[:, -1:]
    return torch.searchsorted(shares, place, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
