"""Tiny models as GGUF files, written with the gguf package by the conventions of llama.cpp's converter.

write_gguf(make_source("llama"), folder / "toy.gguf")          # keys and tensors; f32
write_gguf(model, path, keys={"rope.scaling.type": "linear"}, tensors={"rope_freqs.weight": factors})
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tiny import make_model, make_tokenizer

NAMES = {"gemma3_text": "gemma3"}


def _permuted(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """The order of a head's rows in a GGUF of a Llama: pairs side by side."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def make_source(architecture: str, **changes: Any) -> Any:
    """A random model whose biases and norms differ from what new models have, so that losing them shows."""
    model = make_model(architecture, **changes)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def keys_of(config: Any) -> dict[str, Any]:
    """The keys that say what a model is, without the architecture's prefix."""
    if config.model_type == "gpt2":
        return {
            "block_count": config.n_layer, "context_length": config.n_positions, "embedding_length": config.n_embd,
            "feed_forward_length": config.n_inner or 4 * config.n_embd, "attention.head_count": config.n_head,
            "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        }  # fmt: skip
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": rope["rope_theta"],
        "rope.dimension_count": int(head * rope.get("partial_rotary_factor", 1.0)),
    }
    if config.model_type in ("qwen3", "gemma2", "gemma3_text"):
        keys |= {"attention.key_length": head, "attention.value_length": head}
    if config.model_type.startswith("gemma"):
        keys["attention.sliding_window"] = config.sliding_window
    if config.model_type == "gemma2":
        keys["attn_logit_softcapping"] = config.attn_logit_softcapping
        keys["final_logit_softcapping"] = config.final_logit_softcapping
    return keys


def scaling_of(config: Any) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """The keys and tensors that say how rotary positions are scaled; Llama 3's by the converter's formula."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}, {}
    if kind == "yarn":
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": rope["factor"],
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        }, {}
    if kind == "longrope":
        keys = {
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.attn_factor": rope["attention_factor"],
        }
        return keys, {f"rope_factors_{n}.weight": np.array(rope[f"{n}_factor"], np.float32) for n in ("long", "short")}
    if kind == "llama3":
        factors = []
        low, high, context = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
        head = config.head_dim
        for at in range(0, head, 2):
            wave = 2 * math.pi * rope["rope_theta"] ** (at / head)
            if wave < context / high:
                factors.append(1.0)
            elif wave > context / low:
                factors.append(rope["factor"])
            else:
                smooth = (context / wave - low) / (high - low)
                factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
        return {}, {"rope_freqs.weight": np.array(factors, np.float32)}
    return {}, {}


def write_gguf(
    model: Any,
    path: Path,
    *,
    keys: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray[Any, Any]] | None = None,
) -> Path:
    """Write a model and, beside it, the tiny tokenizer; `keys` whose value is None are left out."""
    import gguf

    config = model.config
    kind = NAMES.get(config.model_type, config.model_type)
    kind = "llama" if kind == "mistral" else kind
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    found, more = scaling_of(config) if config.model_type != "gpt2" else ({}, {})
    writer = gguf.GGUFWriter(str(path), kind)
    for key, value in (keys_of(config) | found | (keys or {})).items():
        if value is not None:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add.get(type(value), writer.add_array)(f"{kind}.{key}", value)
    writer.add_pad_token_id(config.pad_token_id)
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        base, _, suffix = name.rpartition(".")
        rows = parameter.detach().float().numpy()
        if kind == "llama" and ".self_attn.q_proj" in name:
            rows = _permuted(rows, config.num_attention_heads)
        if kind == "llama" and ".self_attn.k_proj" in name:
            rows = _permuted(rows, config.num_key_value_heads)
        if kind.startswith("gemma") and "norm" in name:
            rows = rows + 1
        if kind == "gpt2" and suffix == "weight" and (".c_" in name):
            rows = rows.T
        writer.add_tensor(f"{names.get_name(base)}.{suffix}", np.ascontiguousarray(rows))
    for name, rows in (more | (tensors or {})).items():
        writer.add_tensor(name, rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    make_tokenizer().save_pretrained(path.parent)
    return path
