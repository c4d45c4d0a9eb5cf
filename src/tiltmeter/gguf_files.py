"""What a GGUF file says of its model and transformers drops while loading: put back, or refused by name.

transformers reads the keys that it has a place for and takes its own defaults for the rest: RoPE scaling, the window of
Phi 3, biases of a Llama, the head width of a small Qwen 3. The model then loads, and its numbers are another model's.
So every key of the file is looked at: it agrees with the config, is written into it, or ends loading.

    facts = read_facts("model.gguf")
    restore(config, facts)               # before the weights are read
    refuse_unread(model, facts)          # after
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiltmeter.errors import ModelError, require
from tiltmeter.gguf_header import check_gguf

__all__ = ["Facts", "read_facts", "refuse_unread", "restore"]

# Architectures with a reader of their own in transformers, which takes the config from the file; only what bends
# positions is looked at there.
_OTHER = ("lfm2", "qwen35", "qwen35moe", "gemma4", "gpt-oss", "gpt_oss", "minimax-m2", "deci", "mamba")
# Keys with the names that configs have for them.
_PLAIN = {
    "vocab_size": ("vocab_size",),
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "feed_forward_length": ("intermediate_size", "n_inner", "ffn_hidden_size"),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "use_parallel_residual": ("use_parallel_residual",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
}
# What these keys say of every model that transformers reads; another value cannot be kept.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "pooling_type": (0,),
    "logit_scale": (1.0,),
    "embedding_scale": (1.0,),
    "residual_scale": (1.0,),
    "expert_weights_scale": (0.0, 1.0),
    "expert_gating_func": (0, 1),  # softmax
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.alpha": (0.0,),
}
# Handled below, or without a bearing on the numbers.
_HANDLED = frozenset(
    {
        "attention.value_length", "attention.scale", "attention.sliding_window_pattern", "rope.dimension_count",
        "rope.freq_base", "rope.freq_base_swa", "rope.dimension_count_swa", "rope.scale_linear", "rope.scaling.type",
        "rope.scaling.factor", "rope.scaling.attn_factor", "rope.scaling.original_context_length",
        "rope.scaling.finetuned", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow", "tensor_data_layout",
    }
)  # fmt: skip
_WIDE = {"gemma2": 46, "gemma3_text": 62}  # blocks of the 27B models
_FREQS, _LONG, _SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}  # of every Llama 3; a file keeps only what follows from them


class Facts(NamedTuple):
    """What a GGUF file says of its model: the keys of its architecture, without that prefix, and its tensors."""

    path: Path
    architecture: str
    keys: Mapping[str, Any]
    tensors: frozenset[str]
    factors: Mapping[str, npt.NDArray[np.float64]]
    """By what the frequencies of rotary positions are divided, where the file holds such tensors."""
    vocabulary: int | None
    """The rows of the embedding."""


def read_facts(path: str | Path) -> Facts:
    """The header of a GGUF file, and its tensors of rotary factors.

    Raises:
        MissingExtra: the `gguf` package is not installed.
        ModelError: truncated, or no GGUF file.
    """
    gguf = require("gguf", extra="gguf")
    check_gguf(path, error=ModelError)
    try:
        reader = gguf.GGUFReader(str(path))
        architecture = str(reader.get_field("general.architecture").contents())
        start = f"{architecture}."
        keys = {k.removeprefix(start): _value(f) for k, f in reader.fields.items() if k.startswith(start)}
        factors = {
            t.name: np.asarray(gguf.quants.dequantize(t.data, t.tensor_type), dtype=np.float64).reshape(-1)
            for t in reader.tensors
            if t.name in (_FREQS, _LONG, _SHORT)
        }
        rows = next((int(t.shape[-1]) for t in reader.tensors if t.name == "token_embd.weight"), None)
        facts = Facts(Path(path), architecture, keys, frozenset(t.name for t in reader.tensors), factors, rows)
    except (ValueError, IndexError, KeyError, OSError, TypeError, AttributeError, NotImplementedError, OverflowError,
            struct.error) as error:  # fmt: skip
        raise ModelError(f"'{path}' is truncated or no GGUF file ({error}); fetch it again") from error
    for key in _PLAIN:
        found = keys.get(key)
        if isinstance(found, list) and len(set(found)) != 1 and architecture not in _OTHER:
            raise _lost(facts, key, "a number per block")
    return facts


def _value(field: Any) -> Any:
    """A key's value; a float32 as the decimal that it was written from, as 1e-05 and not 9.99999974e-06."""
    found = field.contents()
    return float(str(np.float32(found))) if isinstance(found, float) else found


def restore(config: Any, facts: Facts) -> None:
    """Write into a model's config what its GGUF file says and transformers has dropped.

    Args:
        config: as transformers made it from the file; changed in place.
        facts: of the file.

    Raises:
        ModelError: the file says something that the config has no place for.
    """
    if facts.architecture in _OTHER:
        bent = facts.keys.get("rope.scaling.type", "none") != "none" or facts.factors
        if bent and facts.architecture not in ("deci", "mamba"):
            raise _lost(facts, "rope.scaling.type", facts.keys.get("rope.scaling.type"))
        return
    for key, value in facts.keys.items():
        if key in _PLAIN:
            _restore_plain(config, facts, key, value)
        elif key in _NEUTRAL:
            if value not in _NEUTRAL[key] and not (key == "attention.max_alibi_bias" and facts.architecture == "bloom"):
                raise _lost(facts, key, value)
        elif key not in _HANDLED:
            raise _lost(facts, key, value)
    if facts.vocabulary is not None:
        config.vocab_size = facts.vocabulary
    if config.model_type == "mistral" and "attention.sliding_window" not in facts.keys:
        config.sliding_window = None  # the default of its class is 4096
    _restore_attention(config, facts)
    _restore_rope(config, facts)


def _lost(facts: Facts, key: str, value: Any) -> ModelError:
    return ModelError(
        f"'{facts.path}' says {facts.architecture}.{key} = {value!r}, which is lost when transformers reads the file, "
        "so it would be another model; load the safetensors that it was made from"
    )


def _restore_plain(config: Any, facts: Facts, key: str, value: Any) -> None:
    name = next((n for n in _PLAIN[key] if hasattr(config, n)), None)
    if isinstance(value, list):
        value = value[0]  # they are all the same
    if name is not None:
        setattr(config, name, value)
        return
    width = config.hidden_size
    implied = {
        "attention.key_length": width // config.num_attention_heads,
        "attention.head_count_kv": config.num_attention_heads,
        "feed_forward_length": 4 * width,
    }
    if value and value != implied.get(key):
        raise _lost(facts, key, value)


def _restore_attention(config: Any, facts: Facts) -> None:
    keys, head = facts.keys, _head(config)
    if keys.get("attention.value_length", head) != head:
        raise _lost(facts, "attention.value_length", keys["attention.value_length"])
    scale = keys.get("attention.scale")
    if not scale and config.model_type in _WIDE:  # llama.cpp knows the models of these widths by their depth
        wide = config.num_hidden_layers == _WIDE[config.model_type]
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if wide else head
    if scale:
        if hasattr(config, "query_pre_attn_scalar"):
            config.query_pre_attn_scalar = round(scale**-2, 3)
        elif not math.isclose(scale, head**-0.5, rel_tol=1e-4):
            raise _lost(facts, "attention.scale", scale)
    pattern = keys.get("attention.sliding_window_pattern")
    if pattern is not None:
        blocks = range(config.num_hidden_layers)
        slides = pattern if isinstance(pattern, list) else [bool(pattern) and (i + 1) % pattern != 0 for i in blocks]
        if not hasattr(config, "layer_types") or len(slides) < len(blocks):
            raise _lost(facts, "attention.sliding_window_pattern", pattern)
        config.layer_types = ["sliding_attention" if slides[i] else "full_attention" for i in blocks]
    for tensor, name in (("attn_q.bias", "attention_bias"), ("ffn_gate.bias", "mlp_bias")):
        if f"blk.0.{tensor}" in facts.tensors and hasattr(config, name):
            setattr(config, name, True)


def _head(config: Any) -> int:
    """The width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _restore_rope(config: Any, facts: Facts) -> None:
    """The base, the share of a head that turns, and the scaling of rotary positions."""
    keys = facts.keys
    stored = getattr(config, "rope_parameters", None)
    if stored is None:
        for key in keys:
            if key.startswith("rope.") and not (key == "rope.scaling.type" and keys[key] == "none"):
                raise _lost(facts, key, keys[key])
        return
    nested = any(isinstance(v, dict) for v in stored.values())
    rope = dict(stored["full_attention"] if nested else stored)
    if "rope.freq_base" in keys:
        rope["rope_theta"] = keys["rope.freq_base"]
    head, turned = _head(config), keys.get("rope.dimension_count")
    if turned and turned != head:
        if "partial_rotary_factor" not in rope and not hasattr(config, "partial_rotary_factor"):
            raise _lost(facts, "rope.dimension_count", turned)
        rope["partial_rotary_factor"] = turned / head
    scaling = _scaling(config, facts, float(rope["rope_theta"]), int(turned or head))
    if scaling:
        rope = {k: v for k, v in rope.items() if k in ("rope_theta", "partial_rotary_factor")} | scaling
    if hasattr(config, "original_max_position_embeddings") and "original_max_position_embeddings" in rope:
        config.original_max_position_embeddings = rope["original_max_position_embeddings"]
    if not nested:
        config.rope_parameters = rope
        return
    local = dict(stored["sliding_attention"])
    if "rope.freq_base_swa" in keys:
        local["rope_theta"] = keys["rope.freq_base_swa"]
    config.rope_parameters = {"sliding_attention": local, "full_attention": rope}


def _scaling(config: Any, facts: Facts, theta: float, turned: int) -> dict[str, Any]:
    """The settings of rotary scaling in the words of transformers; empty where there is none."""
    keys, factors = facts.keys, facts.factors
    kind = str(keys.get("rope.scaling.type", "none"))
    factor = keys.get("rope.scaling.factor") or keys.get("rope.scale_linear")
    context = keys.get("rope.scaling.original_context_length")
    attention = float(keys.get("rope.scaling.attn_factor", 1.0))
    if _FREQS in factors:
        if kind != "none" or np.allclose(factors[_FREQS], 1):
            if kind != "none":
                raise _lost(facts, "rope.scaling.type", f"{kind} beside {_FREQS}")
            return {}
        return _by_frequency(config, factors[_FREQS], theta, turned)
    if _LONG in factors or _SHORT in factors or kind == "longrope":
        if not (_LONG in factors and _SHORT in factors and context):
            raise _lost(facts, "rope.scaling.type", kind)
        return {
            "rope_type": "longrope",
            "long_factor": _plain(factors[_LONG]),
            "short_factor": _plain(factors[_SHORT]),
            "original_max_position_embeddings": int(context),
            "attention_factor": attention,
        }
    if kind == "none" and (not factor or factor == 1):
        return {}
    if kind in ("none", "linear") and factor and attention == 1:
        return {"rope_type": "linear", "factor": float(factor)}
    if kind == "yarn" and factor and context:
        attention *= float(keys.get("rope.scaling.yarn_attn_factor", 1.0))
        found = {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": int(context)}
        if attention != 1:
            found["attention_factor"] = attention * (0.1 * math.log(factor) + 1)
        for key, name in (("rope.scaling.yarn_beta_fast", "beta_fast"), ("rope.scaling.yarn_beta_slow", "beta_slow")):
            if key in keys:
                found[name] = float(keys[key])
        return found
    raise _lost(facts, "rope.scaling.type", kind)


def _by_frequency(config: Any, factors: npt.NDArray[np.float64], theta: float, turned: int) -> dict[str, Any]:
    """Llama 3's scaling from the numbers that its frequencies are divided by; any others are kept as they are.

    Between the highest and the lowest frequencies, 1/f = (1 - s)/F + s with s = (C/w - 1)/3, where w is the wavelength
    and C the original context: so C follows from any such f.
    """
    factor = float(factors.max())
    waves = 2 * math.pi * theta ** (np.arange(0, turned, 2) / turned)
    smooth = (factors > 1 + 1e-4) & (factors < factor * (1 - 1e-4))
    if len(waves) == len(factors) and smooth.any():
        share = (1 / factors[smooth] - 1 / factor) / (1 - 1 / factor)
        context = round(float(np.median(waves[smooth] * (share * 3 + 1))))
        scale = np.clip((context / waves - 1) / 3, 0, 1)
        if np.allclose(1 / ((1 - scale) / factor + scale), factors, rtol=1e-3):
            found = {"rope_type": "llama3", "factor": float(str(np.float32(factor)))}
            return found | _LLAMA3 | {"original_max_position_embeddings": context}
    return {
        "rope_type": "longrope",
        "long_factor": _plain(factors),
        "short_factor": _plain(factors),
        "original_max_position_embeddings": int(config.max_position_embeddings),
        "attention_factor": 1.0,
    }


def _plain(values: npt.NDArray[np.float64]) -> list[float]:
    return [float(str(np.float32(v))) for v in values]


def refuse_unread(model: Any, facts: Facts) -> None:
    """Refuse a file with tensors that the loaded model has no place for: transformers leaves them out in silence.

    Raises:
        ModelError: there are such tensors; the message names one.
    """
    if facts.architecture in _OTHER:
        return
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    processor = TENSOR_PROCESSORS.get(facts.architecture, TensorProcessor)(config=model.config.to_dict())
    read = set(get_gguf_hf_weights_map(model, processor))
    unread = sorted(
        name for name in facts.tensors - read - {_FREQS, _LONG, _SHORT} if not name.endswith(".attn_rot_embd.weight")
    )
    if unread:
        raise ModelError(
            f"'{facts.path}' holds {len(unread)} tensors that transformers leaves out, such as '{unread[0]}', so it "
            "would be another model; load the safetensors that it was made from"
        )
