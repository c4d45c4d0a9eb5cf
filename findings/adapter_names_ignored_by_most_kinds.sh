#!/usr/bin/env bash
# Guess: forward(adapter_names=["__base__", "default"]) reads base and adapter in one batch for every kind of adapter,
#   or raises where a kind cannot.
# Seen: LoRA honours it. IA3, LoHa, LoKr, OFT, HRA and VeRA take the argument, raise nothing, and answer the "__base__"
#   row with the adapter switched on.
# Matters: drift measured against such a "base" row is zero for any adapter: failure that looks like safety.
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
from peft import HRAConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, VeraConfig, get_peft_model

def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2)).eval()

x = torch.arange(3, 13)[None]
with torch.no_grad():
    base = model()(x).logits
print("versions: peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print("source: peft/tuners/lora/layer.py, Linear.forward; peft/tuners/ia3/layer.py, Linear.forward")
print("expected: the __base__ row equals the base (0), or an exception")
answered = []
for make in (LoraConfig, IA3Config, LoHaConfig, LoKrConfig, OFTConfig, HRAConfig, VeraConfig):
    extra = {"feedforward_modules": []} if make is IA3Config else {}
    adapted = get_peft_model(model(), make(target_modules=["q_proj", "v_proj"], **extra)).eval()
    torch.manual_seed(1)
    for p in adapted.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p) * 0.3)
    with torch.no_grad():
        rows = adapted(input_ids=x.repeat(2, 1), adapter_names=["__base__", "default"]).logits
    off, effect = ((rows[i] - base[0]).abs().max().item() for i in (0, 1))
    print(f"seen: {make.__name__:10} __base__ row off by {off:.3f}, adapter row off by {effect:.3f}")
    if off > 1e-3:
        answered.append(make.__name__)
assert answered == ["IA3Config", "LoHaConfig", "LoKrConfig", "OFTConfig", "HRAConfig", "VeraConfig"], answered
EOF
