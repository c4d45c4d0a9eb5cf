#!/usr/bin/env bash
# Guess: disable_adapter() around a merged adapter is a read: afterwards the adapter is merged again, and the base that
#   was read is the base.
# Seen: the first forward inside the block subtracts the update from the weights. In bfloat16 that does not give the
#   base's bits back, and after the block the adapter stays unmerged.
# Matters: the "base" reading is off by rounding noise of the size of a small drift, and reading changed the model.
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
                                        num_attention_heads=4, num_key_value_heads=2)).eval().bfloat16()

x = torch.arange(3, 13)[None]
original = model()
weight = original.model.layers[0].self_attn.q_proj.weight
adapted = get_peft_model(model(), LoraConfig(r=4, target_modules=["q_proj"])).eval()
for name, p in adapted.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(p, std=0.3)
adapted.merge_adapter()
module = adapted.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
merged_before = module.merged
with adapted.disable_adapter(), torch.no_grad():
    off = (adapted(x).logits - original(x).logits).abs().max().item()
changed = (module.base_layer.weight != weight).float().mean().item()
print("versions: peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print("source: peft/tuners/lora/layer.py, Linear.forward (unmerges when disabled)")
print("expected: merged before and after; logits inside the block equal the base's")
print(f"seen: merged {merged_before} before, {module.merged} after; logits off by {off:.4f};",
      f"{changed:.0%} of the base's weights have other bits")
assert merged_before and not module.merged and off > 0 and changed > 0.01
EOF
