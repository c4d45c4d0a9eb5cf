#!/usr/bin/env bash
# Guess: logits and hidden states have one entry per input token, whatever adapter is on; or all "virtual token" kinds
#   behave alike.
# Seen: prompt tuning puts its virtual tokens in front of logits and hidden states (10 tokens in, 15 out), prefix tuning
#   does not (10 in, 10 out). Index 0 is no longer the first input token.
# Matters: reading "the token at position i" reads another token, with no error: the longer row has a position i too.
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
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

x = torch.arange(3, 13)[None]
print("versions: peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print("source: peft/peft_model.py, PeftModelForCausalLM.forward")
print("expected: 10 logits and 10 hidden states for 10 tokens")
seen = {}
for make in (PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig):
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2))
    adapted = get_peft_model(base, make(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    with torch.no_grad():
        out = adapted(input_ids=x, output_hidden_states=True)
    seen[make.__name__] = (out.logits.shape[1], out.hidden_states[1].shape[1])
    print(f"seen: {make.__name__:20} logits {out.logits.shape[1]}, hidden states {out.hidden_states[1].shape[1]}")
assert seen == {"PromptTuningConfig": (15, 15), "PromptEncoderConfig": (15, 15), "PrefixTuningConfig": (10, 10)}
EOF
