#!/usr/bin/env bash
# Guess: layer_replication belongs to the adapter: with it disabled or unloaded the model has its own depth again.
# Seen: get_peft_model rebuilds the base's layer list and its num_hidden_layers. Disabled or unloaded, it keeps the
#   extra layers and answers as neither the base nor the adapter.
# Matters: "adapter off" is no reference for such an adapter, and layer k of the reading is not layer k of the base.
# 2026-11-27, Python 3.11: peft 0.21.2, transformers 5.23.0, torch 2.13.0 (CPU).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV:-$work/venv}
python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 numpy==2.4.6 safetensors==0.8.0 peft==0.21.2
cd "$work"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'EOF'
import torch, transformers, peft
from transformers import LlamaConfig, LlamaForCausalLM
from peft import LoraConfig, get_peft_model

def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2)).eval()

x = torch.arange(3, 13)[None]
base = model()
with torch.no_grad():
    original = base(x).logits
    config = LoraConfig(r=4, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]])
    adapted = get_peft_model(base, config).eval()
    with adapted.disable_adapter():
        disabled = (adapted(x).logits - original).abs().max().item()
    plain = adapted.unload()
    unloaded = (plain(x).logits - original).abs().max().item()
print("versions: peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print("source: peft/tuners/tuners_utils.py, replicate_layers")
print("expected: 2 layers and the base's logits, disabled and unloaded")
print(f"seen: {len(plain.model.layers)} layers after unload(), config says {plain.config.num_hidden_layers};",
      f"logits off the base by {disabled:.3f} disabled, {unloaded:.3f} unloaded")
assert len(plain.model.layers) == 3 and disabled > 1e-2 and unloaded > 1e-2
EOF
