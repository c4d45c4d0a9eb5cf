#!/usr/bin/env bash
# Guess: from_pretrained(gguf_file=...) gives the model that was converted: the file carries its RoPE scaling.
# Seen: llama.cpp's linear scaling keys and Llama 3's rope_freqs tensor are both left out; the config says rope_type
#   "default" and nothing warns. Without scaling the same way of writing gives the source's logits exactly.
# Matters: every activation of the quantised model is off, by more the longer the prompt, before any fine-tuning.
# 2026-11-27, Python 3.11: transformers 5.23.0, gguf 0.19.0, torch 2.13.0 (CPU).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV:-$work/venv}
python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 numpy==2.4.6 safetensors==0.8.0 gguf==0.19.0
cd "$work"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'EOF'
import gguf, numpy as np, torch, transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

def write(model, path, factor=None, freqs=None):
    c, w = model.config, gguf.GGUFWriter(path, "llama")
    w.add_block_count(2), w.add_context_length(64), w.add_embedding_length(32), w.add_feed_forward_length(48)
    w.add_head_count(4), w.add_head_count_kv(2), w.add_layer_norm_rms_eps(c.rms_norm_eps), w.add_vocab_size(64)
    w.add_rope_freq_base(10000.0)
    if factor:
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR), w.add_rope_scaling_factor(factor)
    if freqs is not None:
        w.add_tensor("rope_freqs.weight", freqs)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for key, tensor in model.state_dict().items():
        a = tensor.numpy()
        heads = 4 if "q_proj" in key else 2 if "k_proj" in key else 0
        if heads:  # llama.cpp's order of the rotary halves
            a = a.reshape(heads, 2, len(a) // heads // 2, -1).swapaxes(1, 2).reshape(a.shape)
        w.add_tensor(names.get_name(key, try_suffixes=(".weight",)), np.ascontiguousarray(a))
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()

x, off = torch.arange(60)[None] % 61 + 1, {}
llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16, "rope_theta": 10000.0}
print("versions: transformers", transformers.__version__, "gguf 0.19.0 torch", torch.__version__)
print("source: transformers/modeling_gguf_pytorch_utils.py, load_gguf_checkpoint; transformers/integrations/ggml.py")
print("expected: the source's logits")
for name, rope in (("none", {"rope_type": "default", "rope_theta": 10000.0}), ("llama3", llama3),
                   ("linear", {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, rope_parameters=rope, initializer_range=0.3)).eval()
    plain = 1 / 10000.0 ** (np.arange(0, 8, 2) / 8)
    freqs = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32) if name == "llama3" else None
    write(model, f"{name}.gguf", rope.get("factor") if name == "linear" else None, freqs)
    loaded = AutoModelForCausalLM.from_pretrained(".", gguf_file=f"{name}.gguf").eval()
    with torch.no_grad():
        off[name] = (loaded(x).logits - model(x).logits).abs().max().item()
    kind = loaded.config.rope_parameters["rope_type"]
    print(f"seen: scaling {name:6} logits off by {off[name]:.4f}, loaded rope_type {kind}")
assert off["none"] < 1e-4 and off["llama3"] > 0.05 and off["linear"] > 0.05
EOF
