#!/usr/bin/env bash
# Guess: after hotswap_adapter the model is the new adapter in every respect, so saving it saves the new adapter; and
#   load_adapter under a name that is taken replaces the adapter, or raises.
# Seen: hotswap answers rightly but keeps the old configuration: what it saves has the new tensors with the old
#   lora_alpha, another model. load_adapter under the same name takes the new tensors at the old scale at once.
# Matters: the checkpoint that is read is not the one that served; a strong adapter reads at an eighth of its strength.
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
from peft.utils.hotswap import hotswap_adapter

def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2)).eval()

x = torch.arange(3, 13)[None]
with torch.no_grad():
    for name, alpha in (("weak", 8), ("strong", 64)):
        made = get_peft_model(model(), LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj"])).eval()
        for key, p in made.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(p, std=0.3)
        made.save_pretrained(name)
        strong = made(x).logits
    effect = (strong - model()(x).logits).abs().max().item()
    swapped = PeftModel.from_pretrained(model(), "weak").eval()
    hotswap_adapter(swapped, "strong", "default")
    in_memory = (swapped(x).logits - strong).abs().max().item()
    swapped.save_pretrained("again")
    saved = (PeftModel.from_pretrained(model(), "again").eval()(x).logits - strong).abs().max().item()
    again = PeftModel.from_pretrained(model(), "weak").eval()
    again.load_adapter("strong", "default")
    reloaded = (again(x).logits - strong).abs().max().item()
print("versions: peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print("source: peft/utils/hotswap.py, hotswap_adapter; peft/peft_model.py, PeftModel.load_adapter")
print("expected: all three equal the strong adapter's model")
print(f"seen: strong adapter moves the logits by {effect:.3f}; off by {in_memory:.1e} after hotswap, {saved:.3f} after",
      f"hotswap, save and load, {reloaded:.3f} after load_adapter under the same name")
assert in_memory < 1e-6 and saved > effect / 3 and reloaded > effect / 3
EOF
