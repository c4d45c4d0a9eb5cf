#!/usr/bin/env bash
# Guess: a fresh adapter is the identity (LoRA's B is zero), so step 0 of a run is the base model.
# Seen: FourierFT, VBLoRA and C3A start with a random update that moves the logits at once; HRA and OSF start as the
#   identity only to rounding, not bit for bit. Nothing warns.
# Matters: "moved, hence trained" and "equal bits, hence untrained" are both wrong; a reference must be the base itself.
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
from peft import (C3AConfig, FourierFTConfig, HRAConfig, LoHaConfig, LoraConfig, OSFConfig, VBLoRAConfig, VeraConfig,
                  get_peft_model)

def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2)).eval()

x = torch.arange(3, 13)[None]
with torch.no_grad():
    base = model()(x).logits
kinds = {LoraConfig: {}, LoHaConfig: {}, VeraConfig: {}, FourierFTConfig: {"n_frequency": 10},
         VBLoRAConfig: {"num_vectors": 4, "vector_length": 4, "r": 2}, C3AConfig: {"block_size": 8},
         HRAConfig: {}, OSFConfig: {}}
print("versions: peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print("source: reset_*_parameters in peft/tuners/{fourierft,vblora,c3a,hra,osf}/layer.py")
print("expected: 0 for every kind")
seen = {}
for make, settings in kinds.items():
    fresh = get_peft_model(model(), make(target_modules=["q_proj", "v_proj"], **settings)).eval()
    with torch.no_grad():
        seen[make.__name__] = (fresh(x).logits - base).abs().max().item()
    print(f"seen: fresh {make.__name__:16} moves the logits by {seen[make.__name__]:.1e}")
assert all(seen[k] == 0 for k in ("LoraConfig", "LoHaConfig", "VeraConfig"))
assert all(seen[k] > 1e-3 for k in ("FourierFTConfig", "VBLoRAConfig", "C3AConfig"))
assert all(0 < seen[k] < 1e-4 for k in ("HRAConfig", "OSFConfig"))
EOF
