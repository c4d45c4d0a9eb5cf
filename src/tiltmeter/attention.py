"""Attention over a prefix tree: the queries of a row meet their own neighbourhood only.

The tokens of a tree row stand in depth-first order, so what a stretch of them may see is that stretch itself and
the path that leads to its first token. Attention is therefore computed stretch by stretch over few keys, and its
cost grows with the row's length instead of the square of it, whatever strangers the row holds. The numbers are those
of a masked product over the whole row, up to the order of summation.

The model's blocks are given this attention through transformers' own registry of attention functions, for the
duration of one pass. How many blocks called it is counted: a model that computes attention its own way is found out,
and its pass is not used.

In the last block that is read, only the rows of last tokens are wanted. Everything in a block but attention works on
each token alone, so the block is ended once its attention is known and run again on the wanted rows, with that result
in place of its attention.

    attend = TreeAttention(tree, n_blocks=17, ends=places)
    with attending(lm, attend):
        lm.forward(...)                     # ends with Enough inside block 16
        hidden = attend.finish(lm.blocks[16], args, kwargs)     # (1, places, hidden)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import AttentionInterface

from tiltmeter.lm import LM, TREE_TESTED, is_compiled
from tiltmeter.plan import TreeRow

__all__ = ["Enough", "TreeAttention", "attending", "obstacle"]

_NAME = "tiltmeter_tree"
_STRETCH = 64  # queries computed together
_CURRENT: ContextVar[TreeAttention | None] = ContextVar("tiltmeter_tree_attention", default=None)


class Enough(Exception):
    """Not an error: what was wanted of a forward pass is there, and it can end."""


class TreeAttention:
    """The attention of one pass over one tree row.

    Attributes:
        calls: how many blocks have used it so far.
        complete: whether the last block's attention is known.
    """

    def __init__(self, tree: TreeRow, *, n_blocks: int, ends: npt.NDArray[np.int64] | None) -> None:
        """Set up.

        Args:
            tree: the row.
            n_blocks: how many blocks are run.
            ends: the only places of the row that are wanted of the last of these blocks; None for all, and then
                the pass is not ended here.
        """
        self.calls = 0
        self.complete = False
        self._n_blocks = n_blocks
        self._n_tokens = len(tree.ids)
        self._ends = None if ends is None else torch.from_numpy(ends)
        self._kept: torch.Tensor | None = None
        self._stretches = [
            (first, last, torch.from_numpy(keys), torch.from_numpy(visible))
            for first, last, keys, visible in tree.stretches(_STRETCH)
        ]
        self._masks: dict[torch.dtype, list[torch.Tensor]] = {}

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, softcap: float | None
    ) -> torch.Tensor:
        """(1, T, heads, width) from query (1, heads, T, width) and key, value (1, key heads, T, width)."""
        if self._kept is not None:
            return self._kept
        self.calls += 1
        parts = []
        for at, (first, last, keys, _) in enumerate(self._stretches):
            groups = len(keys)
            flat = keys.reshape(-1).to(query.device)
            asking = _split(query[0, :, first:last], groups)
            keys_near, values_near = (_split(x[0].index_select(1, flat), groups) for x in (key, value))
            found = _attend(asking, keys_near, values_near, self._mask(at, query), scale, softcap)
            parts.append(found.transpose(1, 2).flatten(0, 1))  # (groups * q, heads, width)
        whole = torch.cat(parts)[None]
        if self.calls == self._n_blocks and self._ends is not None:
            self._kept = whole.index_select(1, self._ends.to(whole.device))
            self.complete = True
            raise Enough
        return whole

    def finish(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """The last block's output at the wanted places, (1, wanted, hidden), from what it was called with."""
        taken = self._rows(args), self._rows(kwargs)
        output = block(*taken[0], **taken[1])
        hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    def _rows(self, value: Any) -> Any:
        """The wanted rows of every tensor that has one row per token."""
        if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[:2] == (1, self._n_tokens):
            assert self._ends is not None
            return value.index_select(1, self._ends.to(value.device))
        if isinstance(value, tuple):
            return tuple(map(self._rows, value))
        if isinstance(value, dict):
            return {key: self._rows(x) for key, x in value.items()}
        return value

    def _mask(self, at: int, like: torch.Tensor) -> torch.Tensor:
        """(groups, 1, q, keys) what is added to the scores: 0, or the lowest finite value (-inf less -inf is NaN)."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        if dtype not in self._masks:
            made = []
            for _, _, _, visible in self._stretches:
                mask = torch.zeros(visible.shape, dtype=dtype)
                made.append(mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None].to(like.device))
            self._masks[dtype] = made
        return self._masks[dtype][at].to(like.device)


def _split(rows: torch.Tensor, groups: int) -> torch.Tensor:
    """(heads, groups * n, width) to (groups, heads, n, width)."""
    heads, n, width = rows.shape
    return rows.reshape(heads, groups, n // groups, width).transpose(0, 1)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """Masked attention, (groups, heads, q, width); key and value may have fewer heads, shared by several of query.

    Written out, since fused kernels on a CPU take up to twice as long for so few keys. What lies between the two
    products is at least float32: in bfloat16 it takes twice as long on a CPU, and is coarser.
    """
    groups, heads, asked, width = query.shape
    key_heads, n_keys = key.shape[1:3]
    folded = query.reshape(groups * key_heads, -1, width)  # heads that share a key head stand below each other
    scores = (folded @ key.reshape(groups * key_heads, n_keys, width).transpose(1, 2)).to(mask.dtype)
    scores *= width**-0.5 if scale is None else scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.view(groups, key_heads, -1, asked, n_keys).add_(mask[:, :, None])
    weights = torch.softmax(scores, dim=-1).to(value.dtype).view(groups * key_heads, -1, n_keys)
    return (weights @ value.reshape(groups * key_heads, n_keys, width)).view(groups, heads, asked, width)


def _dispatch(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in every block."""
    attend = _CURRENT.get()
    if attend is None:
        raise RuntimeError("a model was left with the attention of a reading that is over; load the model again")
    return attend(query, key, value, scaling, softcap), None


AttentionInterface.register(_NAME, _dispatch)


@contextlib.contextmanager
def attending(lm: LM, attend: TreeAttention) -> Iterator[None]:
    """Let a model's blocks use `attend`; the model's own attention comes back afterwards, whatever happens."""
    config = lm.config
    own = config._attn_implementation
    token = _CURRENT.set(attend)
    try:
        config._attn_implementation = _NAME
        yield
    finally:
        config._attn_implementation = own
        _CURRENT.reset(token)


def obstacle(lm: LM) -> str:
    """Why a model's attention cannot be computed stretch by stretch; empty if it can."""
    if lm.config.model_type not in TREE_TESTED:
        return f"{lm.config.model_type} has not been tested with it"
    if is_compiled(lm.decoder):
        return "parts of the model are compiled"
    return ""
