#!/usr/bin/env bash
# Guess: add_weighted_adapter(["one"], [1.0]) copies adapter "one"; what cannot be combined is refused.
# Seen: only lora_A and lora_B are combined. A trained DoRA magnitude and trained modules_to_save are left out silently:
#   the copy of an adapter whose training sits in modules_to_save is the base model.
# Matters: the combined adapter reads as harmless because half of it (or all of it) is not there.
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
import warnings
import torch, transformers, peft
from transformers import LlamaConfig, LlamaForCausalLM
from peft import LoraConfig, get_peft_model

def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2)).eval()

x = torch.arange(3, 13)[None]
with torch.no_grad():
    base = model()(x).logits
print("versions: peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print("source: peft/tuners/lora/model.py, LoraModel.add_weighted_adapter")
print("expected: the copy with weight 1 gives the logits of the original, or an exception or warning")
seen = {}
for name, settings, trained in (("DoRA magnitude", {"use_dora": True}, "magnitude"),
                                ("modules_to_save", {"modules_to_save": ["lm_head"]}, "modules_to_save")):
    config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], **settings)
    adapted = get_peft_model(model(), config, adapter_name="one")
    for key, p in adapted.named_parameters():
        if trained in key and p.requires_grad:
            p.data.mul_(3)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        effect = (adapted(x).logits - base).abs().max().item()
        adapted.add_weighted_adapter(["one"], [1.0], "copy", combination_type="linear")
        adapted.set_adapter("copy")
        copy = (adapted(x).logits - base).abs().max().item()
    said = [str(w.message) for w in caught if "adapter" in str(w.message) or trained in str(w.message)]
    seen[name] = (effect, copy, said)
    print(f"seen: {name:15} original moves the logits by {effect:.3f}, its copy by {copy:.3f}; warnings {said}")
assert all(effect > 0.05 and copy < 1e-5 and not said for effect, copy, said in seen.values())
EOF
