"""Does an adapter do anything? Decided by what the model computes, not by the names of tensors.

The model and its base answer the same few rows: words drawn over the whole vocabulary, the tokens whose embedding
differs most, and the words that switch an adapter on. Where the last hidden states and logits are the base's, the
adapter does nothing. An untrained adapter of most kinds gives the base's numbers bit for bit. Some take weights apart
and put them together again; for these, and for kinds that are not known, what counts as a difference comes from how far
two readings of the base itself lie apart (the row alone, and as the longer one of two).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from tiltmeter.adapter_kinds import is_exact_untrained

if TYPE_CHECKING:
    from tiltmeter.lm import LM

__all__ = ["acting_layers", "configs_of", "state", "tuner_layers"]

_ROWS, _WORDS = 4, 24
_MARKED = 32  # tokens with an embedding of their own that are shown
_CHUNK = 4096  # rows of an embedding compared at once
_NOISE_FACTOR = 8.0
_LEAST_NOISE = 3e-5  # relative; untrained HRA, OSF and FRoD lie up to 1e-5 from the base in float32


def tuner_layers(model: nn.Module) -> list[Any]:
    """The modules that PEFT has put around others, to adapt them or to train a copy."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    return [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def configs_of(model: nn.Module) -> list[Mapping[str, Any]]:
    """The configs of the adapters on a model, those that are switched off included."""
    found = getattr(model, "peft_config", None)
    return [config.to_dict() for config in found.values()] if isinstance(found, dict) else []


def acting_layers(model: nn.Module) -> list[tuple[Any, list[str]]]:
    """The layers that are switched on and hold something of an active adapter, with the names of these adapters."""
    found = []
    for layer in tuner_layers(model):
        if not layer.disable_adapters and (names := sorted(set(layer.active_adapters) & _held(layer))):
            found.append((layer, names))
    return found


def _held(layer: Any) -> set[str]:
    """The names of the adapters of which a layer holds something."""
    names = {part for name, _ in layer.named_parameters() for part in name.split(".")}
    for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
        held = getattr(layer, attribute, None)
        if isinstance(held, Mapping | nn.ModuleDict | nn.ParameterDict):
            names |= set(held.keys())
    return names


def state(lm: LM) -> Literal["none", "active", "zero"]:
    """See `lm.adapter_state`."""
    acting = acting_layers(lm.model)
    if not acting:
        return "none"
    configs = configs_of(lm.model)
    exact = all(map(is_exact_untrained, configs))
    if exact and any(_is_moved_lora(layer, name) for layer, names in acting for name in names):
        return "active"
    return "active" if _has_effect(lm, acting, configs, exact=exact) else "zero"


def _is_moved_lora(layer: Any, name: str) -> bool:
    """Whether a layer carries plain LoRA matrices that are not zero: then no pass is needed to know that it acts."""
    from peft.tuners.lora import LoraLayer

    from tiltmeter.lm import whole

    if not isinstance(layer, LoraLayer) or name in layer.lora_variant or name not in layer.lora_A:
        return False
    if not isinstance(layer.lora_A, nn.ModuleDict):  # AdaLoRA has a third matrix
        return False
    sides: tuple[Any, Any] = (layer.lora_A[name], layer.lora_B[name])
    pair = [whole(side.weight.detach()) for side in sides]
    return layer.scaling[name] != 0 and all(bool(matrix.any()) for matrix in pair)


def _has_effect(lm: LM, acting: list[tuple[Any, list[str]]], configs: list[Mapping[str, Any]], *, exact: bool) -> bool:
    from tiltmeter.lm import undisturbed

    with undisturbed(lm):
        with lm.base() as base:
            size = int(base.config.vocab_size)
        rows = _probe_rows(lm, size, acting, configs)
        tuned = [_answer(lm, row) for row in rows]
        with lm.base() as base:
            plain = [_answer(base, row) for row in rows]
            exact = exact and size == int(lm.config.vocab_size)  # products of other shapes round otherwise
            noise = 0.0 if exact else _LEAST_NOISE + _NOISE_FACTOR * _noise(base, rows[0], plain[0])
    return not max(_apart(*pair) for pair in zip(tuned, plain, strict=True)) <= noise  # NaN is an effect


def _probe_rows(
    lm: LM, size: int, acting: list[tuple[Any, list[str]]], configs: list[Mapping[str, Any]]
) -> list[torch.Tensor]:
    """Rows of tokens, each (1, T), of the first `size` of the vocabulary."""
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, size, (_WORDS,), generator=draw) for _ in range(_ROWS)]
    marked = [int(token) for layer, _ in acting for token in _marked_tokens(layer) if token < size]
    for start in range(0, len(marked), _WORDS):
        rows.append(torch.tensor(marked[start : start + _WORDS]))
    for config in configs:
        if opening := config.get("alora_invocation_tokens"):
            rows.append(torch.cat([rows[0], torch.tensor(opening), rows[1][:2]]))
    return [row[None].to(lm.device) for row in rows]


def _marked_tokens(layer: Any) -> list[int]:
    """Of a layer around an embedding: the tokens that it moves farthest."""
    base = layer
    while not isinstance(base, nn.Embedding):
        inner = getattr(base, "base_layer", None) or getattr(base, "original_module", None)
        if not isinstance(inner, nn.Module) or inner is base:
            return []
        base = inner
    moved = []
    for start in range(0, base.num_embeddings, _CHUNK):
        ids = torch.arange(start, min(start + _CHUNK, base.num_embeddings), device=base.weight.device)[None]
        moved.append((layer(ids) - base(ids)).abs().amax(-1)[0])
    distance, ids = torch.cat(moved).topk(min(_MARKED, base.num_embeddings))
    return [int(token) for token in ids[distance > 0]]


def _answer(lm: LM, ids: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The last hidden states (T, hidden) and the last token's logits (vocabulary,) of the first row, float32."""
    found = lm.forward(ids, output_hidden_states=True, **inputs)
    return found.hidden_states[-1][0].float(), found.logits[0, -1].float()


def _apart(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> float:
    """The largest difference of any number, in units of the largest of the second."""
    widths = [min(a.shape[-1], b.shape[-1]) for a, b in zip(one, other, strict=True)]  # a vocabulary may have grown
    pairs = zip(one, other, widths, strict=True)
    return max(float((a[..., :n] - b[..., :n]).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b, n in pairs)


def _noise(lm: LM, ids: torch.Tensor, alone: tuple[torch.Tensor, torch.Tensor]) -> float:
    """How far two readings of one row lie apart: alone, and beside a row that is padded."""
    both = torch.cat([ids, ids.flip(1)])
    mask = torch.ones_like(both)
    mask[1, -(ids.shape[1] // 2) :] = 0
    return _apart(_answer(lm, both, attention_mask=mask), alone)
