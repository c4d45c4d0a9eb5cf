#!/usr/bin/env bash
# Guess: a decoder block returns a tuple, so a forward hook reads output[0] (as most hook code of this field does).
# Seen: in this version Llama, Qwen, Gemma, Mistral, Phi, GPT-2, GPT-NeoX and OPT blocks return the tensor itself, and
#   BLOOM, Falcon, GPT-J, GPT-Neo and MPT blocks a tuple. output[0] of a tensor is the first row of the batch: right
#   dtype, right width, no error when the batch has one row.
# Matters: an activation read so drops the batch axis, or reads row 0 for every row.
# 2026-11-27, Python 3.11: transformers 5.23.0, torch 2.13.0 (CPU).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV:-$work/venv}
python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 numpy==2.4.6 safetensors==0.8.0
cd "$work"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'EOF'
import torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM

x = torch.arange(3, 13)[None].repeat(2, 1)
small = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
settings = {"llama": small, "qwen2": small | {"num_key_value_heads": 2}, "mistral": small | {"num_key_value_heads": 2},
            "gpt_neox": small, "gpt2": dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4),
            "bloom": dict(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
            "falcon": dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
            "gptj": dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4),
            "mpt": dict(vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)}
print("versions: transformers", transformers.__version__, "torch", torch.__version__)
print("source: forward of LlamaDecoderLayer, GPT2Block, BloomBlock, ... in transformers/models/*/modeling_*.py")
print("expected: tuple for all, output[0] of shape (2, 10, 32)")
kinds = {}
for name, values in settings.items():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **values)).eval()
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2)
    outputs = []
    blocks[0].register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        model(x)
    kinds[name] = type(outputs[0]).__name__
    print(f"seen: {name:9} block returns {kinds[name]:6} output[0] has shape {tuple(outputs[0][0].shape)}")
assert {k for k, v in kinds.items() if v == "Tensor"} == {"llama", "qwen2", "mistral", "gpt_neox", "gpt2"}
assert {k for k, v in kinds.items() if v == "tuple"} == {"bloom", "falcon", "gptj", "mpt"}
EOF
