#!/usr/bin/env bash
# Guess: target_modules names a module that the model does not have: an error, or at least a warning (a rank_pattern key
#   without a match does warn).
# Seen: as long as one name matches, the others are skipped silently. target_modules=["q_proj", "gate_up_proj"] on a
#   model with separate gate_proj and up_proj trains q_proj only.
# Matters: a control run "with the MLP adapted" is not that; calibration by adapter kind mixes two kinds.
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

def attach(**settings):
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = get_peft_model(base, LoraConfig(r=4, **settings))
    names = {n.split(".lora_A")[0].split(".")[-1] for n, _ in adapted.named_parameters() if "lora_A" in n}
    return sorted(names), [str(w.message)[:60] for w in caught if "target" in str(w.message)]

print("versions: peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print("source: peft/tuners/tuners_utils.py, BaseTuner.inject_adapter")
print("expected: an exception or a warning that names gate_up_proj")
modules, said = attach(target_modules=["q_proj", "gate_up_proj"])
_, pattern_said = attach(target_modules=["q_proj"], rank_pattern={"gate_up_proj": 8})
print("seen: target_modules=['q_proj', 'gate_up_proj'] adapts", modules, "- warnings", said)
print("seen: rank_pattern={'gate_up_proj': 8} warns:", pattern_said)
assert modules == ["q_proj"] and said == [] and pattern_said
EOF
