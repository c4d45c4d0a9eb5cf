"""A model read from a GGUF file has the logits of the model that the file was made from, or is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiltmeter import lm as lms
from tiltmeter.errors import ModelError
from tiny import make_model
from toy_gguf import make_source, write_gguf

pytest.importorskip("gguf")

LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 500000.0,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "long_factor": [1.0, 2.0, 3.0, 4.0], "short_factor": [1.0, 1.1, 1.2, 1.3],
    "original_max_position_embeddings": 64, "attention_factor": 1.2, "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
}  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(8, 60, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def loaded(model: Any, folder: Path, **more: Any) -> lms.LM:
    return lms.load(write_gguf(model, folder / "toy.gguf", **more), device="cpu")


@pytest.mark.parametrize(
    ("architecture", "changes", "keys"),
    [
        ("llama", {}, {}),
        ("llama", {"tie_word_embeddings": True}, {}),
        ("llama", {"attention_bias": True}, {}),
        ("llama", {"mlp_bias": True}, {}),
        ("llama", {"rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}, {}),
        ("llama", {"rope_parameters": LINEAR}, {}),
        ("llama", {"rope_parameters": LINEAR}, {"rope.scaling.type": None, "rope.scaling.factor": None,
                                                "rope.scale_linear": 4.0}),
        ("llama", {"rope_parameters": YARN}, {}),
        ("llama", {"head_dim": 32, "rope_parameters": LLAMA3}, {}),
        ("qwen2", {"rope_parameters": YARN}, {}),
        ("qwen2", {"tie_word_embeddings": True}, {}),
        ("qwen3", {}, {}),
        ("mistral", {"sliding_window": None}, {"vocab_size": None}),
        ("gemma2", {"tie_word_embeddings": True, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}, {}),
        ("gemma3", {"tie_word_embeddings": True}, {}),
        ("phi3", {"sliding_window": 16}, {"attention.sliding_window": 16}),
        ("phi3", {"original_max_position_embeddings": 64, "rope_parameters": LONG}, {}),
        ("gpt2", {}, {}),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_a_gguf_file_has_the_logits_of_its_source(
    architecture: str, changes: dict[str, Any], keys: dict[str, Any], tmp_path: Path
) -> None:
    source = make_source(architecture, **changes)
    found = loaded(source, tmp_path, keys=keys)
    assert torch.equal(logits(found.model), logits(source))


def test_llama_3s_scaling_comes_back_in_its_own_words(tmp_path: Path) -> None:
    source = make_source("llama", head_dim=32, rope_parameters=LLAMA3)
    found = loaded(source, tmp_path)
    assert found.config.rope_parameters == LLAMA3
    assert lms.wrap(source, found.tokenizer).fingerprint() == found.fingerprint()


def test_frequencies_that_are_no_llama_3s_are_divided_as_the_file_says(tmp_path: Path) -> None:
    source = make_source("llama")
    factors = np.array([1.0, 3.0, 2.0, 7.0], np.float32)
    found = loaded(source, tmp_path, tensors={"rope_freqs.weight": factors})
    rotary = source.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq / torch.from_numpy(factors)
    torch.testing.assert_close(logits(found.model), logits(source), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"rope.scaling.type": "dynamic", "rope.scaling.factor": 2.0}, "rope.scaling.type = 'dynamic'"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}, "rope.scaling.type = 'yarn'"),
        ({"rope.scaling.type": "longrope"}, "rope.scaling.type = 'longrope'"),
        ({"rope.scaling.alpha": 1000.0}, "rope.scaling.alpha"),
        ({"rope.dimension_count": 4, "attention.key_length": 8}, "rope.dimension_count"),
        ({"attention.sliding_window": 16}, "attention.sliding_window"),
        ({"attention.value_length": 4}, "attention.value_length"),
        ({"attention.scale": 0.5}, "attention.scale"),
        ({"attention.causal": False}, "attention.causal"),
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
        ({"logit_scale": 0.25}, "logit_scale"),
        ({"expert_count": 8}, "expert_count"),
        ({"attention.something_new": 1}, "attention.something_new"),
        ({"attention.head_count_kv": [2, 2, 1, 2]}, "attention.head_count_kv"),
    ],
)
def test_what_a_config_has_no_place_for_is_refused_by_name(keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"lost when transformers reads") as refusal:
        loaded(make_model("llama"), tmp_path, keys=keys)
    assert said in str(refusal.value)


def test_tensors_that_no_module_takes_are_refused_by_name(tmp_path: Path) -> None:
    extra = {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}
    with pytest.raises(ModelError, match=r"1 tensors that transformers leaves out, such as 'blk.0.attn_sinks.weight'"):
        loaded(make_model("llama"), tmp_path, tensors=extra)


def test_keys_that_change_nothing_are_no_reason_to_refuse(tmp_path: Path) -> None:
    source = make_source("llama")
    keys = {"rope.scaling.type": "none", "rope.scaling.factor": 1.0, "expert_count": 0, "attention.causal": True,
            "attention.key_length": 8, "attention.value_length": 8, "attention.scale": 8**-0.5,
            "rope.scaling.finetuned": False}  # fmt: skip
    assert torch.equal(logits(loaded(source, tmp_path, keys=keys).model), logits(source))
