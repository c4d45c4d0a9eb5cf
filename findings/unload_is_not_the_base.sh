#!/usr/bin/env bash
# Guess: unload() "returns the base model without merging", so what it returns is the base.
# Seen: after merge_adapter() it returns the merged weights, and after training with bias="all" the trained biases, both
#   without a warning (disable_adapter warns about the biases, unload does not).
# Matters: a reference taken by unload() is the fine-tuned model, and drift against it is zero.
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
                                        num_attention_heads=4, num_key_value_heads=2, attention_bias=True)).eval()

x = torch.arange(3, 13)[None]
with torch.no_grad():
    base = model()(x).logits
print("versions: peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print("source: peft/tuners/tuners_utils.py, BaseTuner.unload")
print("expected: unload() gives the base's logits in all three cases, or an exception or warning")
seen = {}
for case, bias, trained in (("plain", "none", "lora_B"), ("merged", "none", "lora_B"), ("biases", "all", ".bias")):
    adapted = get_peft_model(model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], bias=bias)).eval()
    for name, p in adapted.named_parameters():
        if trained in name:
            torch.nn.init.normal_(p, std=0.3)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        effect = (adapted(x).logits - base).abs().max().item()
        if case == "merged":
            adapted.merge_adapter()
        off = (adapted.unload()(x).logits - base).abs().max().item()
    said = [str(w.message) for w in caught if "merge" in str(w.message) or "bias" in str(w.message)]
    seen[case] = off
    print(f"seen: {case:6} adapter's effect {effect:.3f}, after unload() off the base by {off:.3f}, warnings {said}")
    assert not said
assert seen["plain"] < 1e-6 and seen["merged"] > 0.05 and seen["biases"] > 0.05
EOF
