#!/usr/bin/env bash
# Guess: "with model.disable_adapter(): ..." leaves things as they were; an adapter loaded for inference stays frozen.
# Seen: leaving the block sets requires_grad on the adapter's weights, whatever it was before.
# Matters: one reading of the base in a callback makes a frozen adapter (a reference policy, another run's adapter)
#   train along with whatever optimizer collects trainable parameters next.
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
from peft import LoraConfig, PeftModel, get_peft_model

def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2))

get_peft_model(model(), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained("adapter")
loaded = PeftModel.from_pretrained(model(), "adapter", is_trainable=False)
before = sum(p.requires_grad for p in loaded.parameters())
with loaded.disable_adapter(), torch.no_grad():
    loaded(torch.arange(3, 13)[None])
after = sum(p.requires_grad for p in loaded.parameters())
print("versions: peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print("source: peft/peft_model.py, PeftModel.disable_adapter; peft/tuners/tuners_utils.py, enable_adapters")
print("expected: 0 trainable tensors before and after")
print(f"seen: {before} trainable tensors before, {after} after")
assert before == 0 and after == 4
EOF
