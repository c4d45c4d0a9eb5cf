#!/usr/bin/env bash
# Guess: position_ids that start again at 0 mark packed conversations; since transformers isolates them in training, it
#   isolates them in every forward without an attention mask.
# Seen: only if no cache is made. By default (use_cache=True, in eval and no_grad too) the second conversation attends
#   to the first, silently. A mask of ones undoes the isolation too. Trainer sets use_cache=False, a call does not.
# Matters: the same packed row gives other activations in training and when it is read afterwards.
# 2026-11-27, Python 3.11: transformers 5.23.0, torch 2.13.0 (CPU).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV:-$work/venv}
python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 numpy==2.4.6 safetensors==0.8.0
cd "$work"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'EOF'
import torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                     num_attention_heads=4, num_key_value_heads=2)).eval()
first, second = torch.arange(3, 9)[None], torch.arange(20, 27)[None]
row = torch.cat([first, second], 1)
positions = torch.cat([torch.arange(6), torch.arange(7)])[None]
with torch.no_grad():
    alone = model(second).logits
    off = {name: (model(row, position_ids=positions, **settings).logits[:, 6:] - alone).abs().max().item()
           for name, settings in (("use_cache=False", {"use_cache": False}), ("default", {}),
                                  ("use_cache=False, mask of ones",
                                   {"use_cache": False, "attention_mask": torch.ones_like(row)}))}
print("versions: transformers", transformers.__version__, "torch", torch.__version__)
print("source: transformers/masking_utils.py, _preprocess_mask_arguments (needs past_key_values None, no mask)")
print("expected: the packed second conversation has the logits that it has alone, each time")
for name, value in off.items():
    print(f"seen: {name:30} off by {value:.1e}")
assert off["use_cache=False"] < 1e-5 and off["default"] > 1e-2 and off["use_cache=False, mask of ones"] > 1e-2
EOF
