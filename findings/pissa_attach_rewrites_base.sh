#!/usr/bin/env bash
# Guess: putting a LoRA adapter on a model leaves the base weights alone; init_lora_weights only sets A and B.
# Seen: PiSSA and OLoRA subtract their start from the base weights in place, and taking the adapter off (unload) does
#   not put them back. The caller's base model is another model from then on.
# Matters: a monitor that reads adapters one after the other on one base reads every later one on a spoilt base.
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
with torch.no_grad():
    clean = model()(x).logits
print("versions: peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print("source: peft/tuners/lora/layer.py, LoraLayer.pissa_init and olora_init")
print("expected: 0 tensors of the base changed by attaching; after unload() the base answers as before")
for kind, rewrites in [(True, False), ("gaussian", False), ("pissa", True), ("olora", True)]:
    base = model()
    before = {id(p): p.detach().clone() for p in base.parameters()}
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=kind))
    changed = sum(not torch.equal(before[id(p)], p) for p in adapted.parameters() if id(p) in before)
    with torch.no_grad():
        off = (adapted.unload()(x).logits - clean).abs().max().item()
    print(f"seen: init_lora_weights={kind!s:9} base tensors changed {changed}, base after unload off by {off:.3f}")
    assert (changed > 0 and off > 1e-2) == rewrites, (kind, changed, off)
EOF
